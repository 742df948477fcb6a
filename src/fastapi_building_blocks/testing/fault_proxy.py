"""A TCP proxy that stands between a client and a server, and misbehaves when a test tells it to."""

import asyncio
import random
import socket
import struct
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal, Self

from sqlalchemy.engine import make_url

Direction = Literal["both", "to_server", "to_client"]

_LOCALHOST = "127.0.0.1"
_CHUNK = 64 * 1024
_CHUNKS_ON_THE_WAY = 64
_LAST_BYTES = 2.0
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


def free_port() -> int:
    """Return a port of 127.0.0.1 that nobody listens on.

    It lies below the range that the system takes clients' ports from. There, a client that knocks again and again at a
    server that is down is in the end connected to itself, and the server finds its port taken when it comes back.
    """
    for _ in range(100):
        port = random.randint(15_000, 30_000)  # noqa: S311 - no secret
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((_LOCALHOST, port))
            except OSError:
                continue
        return port
    raise RuntimeError("found no free port between 15000 and 30000 on 127.0.0.1")


class FaultProxy:
    """Forwards connections to a server, with faults that can be set and healed at any time.

    ::

        async with FaultProxy("127.0.0.1", 5432) as proxy, SQLAlchemySession(proxy.url(url)) as session:
            proxy.latency(0.2)
            ...
            proxy.heal()

    Faults add up until ``heal()``. A ``direction`` of ``"to_server"`` or ``"to_client"`` lets the other one work. The
    proxy runs in the event loop that entered it, and its methods are called there; a client that blocks this loop waits
    for itself. It reads no encrypted connection: connect without TLS where an answer or a message is to be dropped.

    Args:
        host: where the server is.
        port: the server's port.
    """

    def __init__(self, host: str, port: int) -> None:
        self._server = (host, port)
        self._port: int | None = None
        self._listener: socket.socket | None = None
        self._links: set[_Link] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._faults = _Faults()
        self._healed = asyncio.Event()
        self.accepted = 0
        """Connections accepted since the start; those that were reset at once are counted too."""
        self.was_reset = 0
        """Connections that ``reset`` has ended."""
        self.was_cut = 0
        """Connections that ``cut_after`` has ended."""
        self.dropped_answers = 0
        """Answers that ``drop_answer_to`` has swallowed."""
        self.dropped_messages = 0
        """Messages that ``drop_message`` has swallowed."""

    @property
    def port(self) -> int:
        """The proxy's own port on 127.0.0.1."""
        if self._port is None:
            raise RuntimeError("the proxy has no port before it is entered with 'async with'")
        return self._port

    @property
    def connections(self) -> int:
        """How many connections go through the proxy now."""
        return len(self._links)

    def url(self, url: str) -> str:
        """Return the URL of the same database through the proxy.

        Raises:
            ValueError: the URL names its server in the query (a socket file, several hosts), where no proxy gets between.
        """
        address = make_url(url)
        if {"host", "unix_socket"} & set(address.query):
            raise ValueError("name the server as host and port in the URL; its query cannot go through a proxy")
        return address.set(host=_LOCALHOST, port=self.port).render_as_string(hide_password=False)

    # Faults

    def latency(self, seconds: float, direction: Direction = "both") -> None:
        """Deliver everything this much later; with both directions a round trip takes twice as long."""
        for way in _ways(direction):
            self._faults.latency[way] = seconds

    def blackhole(self, direction: Direction = "both") -> None:
        """Go on accepting connections and bytes, and deliver none; closing is not passed on either.

        A connection that has lost bytes stays silent after ``heal()`` too, until one of its ends closes it: TCP delivers
        nothing after a gap. One that was idle meanwhile works again.
        """
        self._faults.swallowing.update(_ways(direction))

    def reset(self, *, existing: bool = True, new: bool = True) -> None:
        """Reset (RST) the connections that exist, and every new one until ``heal()``."""
        self._faults.resetting = self._faults.resetting or new
        if existing:
            for link in list(self._links):
                self.was_reset += 1
                self._reset(link)

    def cut_after(self, count: int, direction: Direction = "to_client") -> None:
        """Close each connection once ``count`` more bytes have gone that way; the bytes before that are delivered."""
        for way in _ways(direction):
            self._faults.cut_after[way] = count
            for link in self._links:
                link.left[way] = count

    def refuse(self) -> None:
        """Stop listening: new connections are refused. Those that exist are left alone; ``reset`` ends them."""
        if self._listener is not None:
            asyncio.get_running_loop().remove_reader(self._listener)
            self._listener.close()
            self._listener = None

    def drop_answer_to(self, message: bytes, times: int | None = 1) -> None:
        """Forward a client's message, wait for the server's answer, swallow it and reset the connection.

        The client cannot know what became of its message; the test can: the server has answered.

        Args:
            message: what the message contains, for example ``b"COMMIT"``, upper and lower case as it is sent.
            times: how many messages; None is all until ``heal()``.
        """
        self._break_at(message, times, drops_answer=True)

    def drop_message(self, message: bytes, times: int | None = 1) -> None:
        """Swallow a client's message and reset the connection: to the client the same, but the server never got it."""
        self._break_at(message, times, drops_answer=False)

    def heal(self) -> None:
        """End every fault, and listen again."""
        self._faults = _Faults()
        for link in self._links:
            link.left.clear()
            link.drops_answer = False
        self._healed.set()
        self._healed = asyncio.Event()
        if self._listener is None:
            self._listen()

    def _break_at(self, message: bytes, times: int | None, *, drops_answer: bool) -> None:
        if not message:
            raise ValueError("every message contains b''; name some bytes of the one that is meant")
        self._faults.triggers.append(_Trigger(message, times, drops_answer))

    # Connections

    async def __aenter__(self) -> Self:
        self._port = free_port()
        self._listen()
        return self

    async def __aexit__(self, *exception: object) -> None:
        self.refuse()
        for link in list(self._links):
            self._reset(link)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _listen(self) -> None:
        listener = socket.socket()
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((_LOCALHOST, self.port))
            listener.listen(1024)
            listener.setblocking(False)
        except OSError:
            listener.close()
            raise
        self._listener = listener
        asyncio.get_running_loop().add_reader(listener, self._accept, listener)

    def _accept(self, listener: socket.socket) -> None:
        try:
            client, _ = listener.accept()
        except OSError:
            return  # gone before it was accepted
        self.accepted += 1
        if self._faults.resetting:
            self.was_reset += 1
            _reset(client)
            return
        client.setblocking(False)
        task = asyncio.create_task(self._serve(client))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, client: socket.socket) -> None:
        try:
            from_server, to_server = await asyncio.open_connection(*self._server)
        except BaseException as error:
            _reset(client)
            if isinstance(error, OSError):
                return  # a server that is not there
            raise
        from_client, to_client = await asyncio.open_connection(sock=client)
        link = _Link(to_client, to_server, dict(self._faults.cut_after))
        self._links.add(link)
        carriers = {
            asyncio.create_task(self._carry(link, "to_server", from_client, to_server)),
            asyncio.create_task(self._carry(link, "to_client", from_server, to_client)),
        }
        try:
            await asyncio.wait(carriers, return_when=asyncio.FIRST_COMPLETED)
            await link.close()
        finally:
            self._reset(link)
            for carrier in carriers:
                carrier.cancel()
            await asyncio.gather(*carriers, return_exceptions=True)

    def _reset(self, link: "_Link") -> None:
        link.reset()
        self._links.discard(link)

    async def _carry(
        self, link: "_Link", way: Direction, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Carry bytes one way until an end closes or a fault cuts the connection."""
        loop = asyncio.get_running_loop()
        on_the_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(_CHUNKS_ON_THE_WAY)
        delivery = asyncio.create_task(_deliver(on_the_way, writer))
        was_reset = False
        try:
            try:
                while not link.is_cut and (data := await reader.read(_CHUNK)):
                    data = self._let_through(link, way, data)
                    if data:
                        await on_the_way.put((loop.time() + self._faults.latency.get(way, 0.0), data))
            except ConnectionError:
                was_reset = True
            while way in self._faults.swallowing:
                await self._healed.wait()
            await on_the_way.put((loop.time() + self._faults.latency.get(way, 0.0), b""))
            await delivery
            if was_reset:
                self._reset(link)
        finally:
            delivery.cancel()

    def _let_through(self, link: "_Link", way: Direction, data: bytes) -> bytes:
        """Return what is left of some bytes after the faults."""
        if way in self._faults.swallowing:
            link.silent.add(way)
        if way in link.silent:
            return b""
        if way == "to_server":
            sent = link.tail + data
            trigger = self._faults.triggered(sent)
            link.tail = sent[max(0, len(sent) - self._faults.remembered) :]
            if trigger is not None:
                link.drops_answer = trigger.drops_answer
                if not trigger.drops_answer:
                    self.dropped_messages += 1
                    self._reset(link)
                    return b""
        elif link.drops_answer:
            self.dropped_answers += 1
            self._reset(link)
            return b""
        left = link.left.get(way)
        if left is None:
            return data
        data = data[:left]
        link.left[way] = left - len(data)
        if not link.left[way] and not link.is_cut:
            self.was_cut += 1
            link.is_cut = True
        return data


@dataclass
class _Trigger:
    """A client's message at which a connection breaks."""

    message: bytes
    times: int | None
    drops_answer: bool


@dataclass
class _Faults:
    """What is wrong at present."""

    latency: dict[Direction, float] = field(default_factory=dict)
    swallowing: set[Direction] = field(default_factory=set)
    resetting: bool = False
    cut_after: dict[Direction, int] = field(default_factory=dict)
    triggers: list[_Trigger] = field(default_factory=list)

    @property
    def remembered(self) -> int:
        """How many of a client's last bytes have to be remembered, because a message may come in two parts."""
        return max((len(trigger.message) - 1 for trigger in self.triggers), default=0)

    def triggered(self, data: bytes) -> _Trigger | None:
        """Return the first trigger that these bytes contain, and count it."""
        for trigger in self.triggers:
            if trigger.times != 0 and trigger.message in data:
                if trigger.times is not None:
                    trigger.times -= 1
                return trigger
        return None


class _Link:
    """A client's connection to the proxy, and the proxy's own to the server for it."""

    def __init__(
        self, to_client: asyncio.StreamWriter, to_server: asyncio.StreamWriter, left: dict[Direction, int]
    ) -> None:
        self._writers = (to_client, to_server)
        self.left = left
        self.silent: set[Direction] = set()
        self.is_cut = False
        self.drops_answer = False
        self.tail = b""

    async def close(self) -> None:
        """Close both ends after what was written to them, if they take it soon."""
        for writer in self._writers:
            writer.close()
        with suppress(TimeoutError):
            async with asyncio.timeout(_LAST_BYTES):
                await asyncio.gather(*(writer.wait_closed() for writer in self._writers), return_exceptions=True)

    def reset(self) -> None:
        """Reset both ends."""
        for writer in self._writers:
            end: socket.socket | None = writer.get_extra_info("socket")
            if end is not None and end.fileno() >= 0:
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
            writer.transport.abort()


def _ways(direction: Direction) -> tuple[Direction, ...]:
    if direction not in ("both", "to_server", "to_client"):
        raise ValueError(f"direction is 'both', 'to_server' or 'to_client', not {direction!r}")
    return ("to_server", "to_client") if direction == "both" else (direction,)


def _reset(end: socket.socket) -> None:
    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
    end.close()


async def _deliver(on_the_way: "asyncio.Queue[tuple[float, bytes]]", writer: asyncio.StreamWriter) -> None:
    """Write each piece when it is due, up to the empty one that ends the connection."""
    loop = asyncio.get_running_loop()
    broken = False
    while True:
        due, data = await on_the_way.get()
        if due > loop.time():
            await asyncio.sleep(due - loop.time())
        if not data:
            return
        if broken:
            continue  # nobody is there to take it; whoever reads from this end finds that out too
        try:
            writer.write(data)
            await writer.drain()
        except ConnectionError:
            broken = True
