"""A cache in Redis, which may be slow, full or away at any time: then it costs its timeout once, and nothing more."""

import asyncio
import importlib
import logging
import random
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Final
from urllib.parse import parse_qsl, urlencode, urlsplit

from fastapi_building_blocks.infrastructure.cache.cache import HELD, Cache, CacheUnavailable

logger = logging.getLogger(__name__)

_BEAT: Final = 0.5
"""Seconds between two looks at a Redis that works: whether it is there, and the same that it was."""
_FIRST_PROBE: Final = 0.02
_PROBE: Final = 0.25
"""The longest pause between two attempts to find it back."""
_GRACE: Final = 1.0
"""Seconds between finding it and reading from it: longer than others need to find it, and to deliver what they kept."""
_PATIENCE: Final = 0.25
"""Seconds that a probe may take; nobody waits for it."""
_SOCKET_SECONDS: Final = 2.0
_FULL_PAUSE: Final = 1.0
"""Seconds without an attempt to store after Redis has said that it is full."""
_FULL_WARNING: Final = 60.0
_MOST_PENDING: Final = 10_000
"""Invalidations kept one by one while Redis is away; beyond that, every table that was used here."""
_CHUNK: Final = 500
_DEFAULT_PORTS: Final = {"sentinel": 26379, "cluster": 6379}

# A value of another type than bytes is nobody's of ours: it may be written over.
_EXCHANGE: Final = """
local held = redis.pcall('GET', KEYS[1])
if type(held) ~= 'string' then held = '' end
if held ~= '' and held == ARGV[2] then return 1 end
if held ~= ARGV[1] then return 0 end
if ARGV[2] == '' then redis.call('DEL', KEYS[1]) else redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3]) end
return 1
"""
_DROP: Final = f"""
if redis.pcall('GET', KEYS[1]) ~= '{HELD.decode()}' then redis.call('DEL', KEYS[1]) end
return 1
"""

Command = tuple[Any, ...]


class RedisCache(Cache):
    """Bytes in Redis, shared by all processes of a service.

    The URL says where, and which kind of Redis:

    - ``redis://host:6379/0``, ``unix:///path?db=0``: one server;
    - ``redis+sentinel://host1:26379,host2:26379/service/0``: the primary that Sentinel knows as ``service``;
    - ``redis+cluster://host1:7000,host2:7001``: a Cluster, found through these nodes;
    - ``rediss://``, ``rediss+sentinel://`` and ``rediss+cluster://``: the same over TLS.

    User and password stand before the hosts, redis-py's options (``ssl_ca_certs`` and others) in the query;
    ``sentinel_username`` and ``sentinel_password`` are Sentinel's own.

    A call that fails, or takes longer than ``timeout``, opens a circuit: from then on nothing is asked of Redis until a
    probe in the background has found it back, and what was invalidated meanwhile is gone from it. One warning says
    that it is away, and one line that it is back.

    Calls of one turn of the event loop travel together. Used by one event loop; ``disconnect`` ends its background task.

    Args:
        url: as above.
        prefix: stands before every key; one for each database of those that share a Redis.
        timeout: seconds that one call may take.

    Raises:
        ValueError: the URL is of no such form.
        ImportError: redis-py is not installed.
    """

    def __init__(self, url: str, *, prefix: str = "fastapi-building-blocks:", timeout: float = 0.05) -> None:
        if not 0 < timeout <= _SOCKET_SECONDS:
            raise ValueError(f"timeout is a number of seconds up to {_SOCKET_SECONDS}")
        super().__init__(prefix)
        self._place = _Place(url)
        self._timeout = timeout
        self._client: Any = None
        self._turn: _Turn | None = None
        self._is_sending = False
        self._watcher: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closing: set[asyncio.Task[None]] = set()
        self._identity: str | None = None
        self._is_closed = False
        self._is_lost = asyncio.Event()
        self._looking = asyncio.Lock()
        self._last_answer = 0.0
        self._return_at = 0.0
        self._full_until = 0.0
        self._full_warned = -_FULL_WARNING
        self._tables: set[str] = set()
        self._pending: dict[str, tuple[bool, float]] = {}
        self._distrusts_all = False

    def __repr__(self) -> str:
        return f"RedisCache({self._place.kind}, prefix={self.prefix!r}, state={self.figures.state!r})"

    # Beginning and ending

    async def connect(self) -> None:
        self._start()
        await self._look()

    async def disconnect(self) -> None:
        self._is_closed = True
        tasks = [task for task in (self._watcher, *self._tasks) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._watcher = None
        self._fail_turn()
        await self._drop_client()

    def _start(self) -> None:
        if self._watcher is None:
            # Both belong to the event loop that uses them first, and this may be another one than before.
            self._is_lost, self._looking = asyncio.Event(), asyncio.Lock()
            self._is_closed = False
            self._last_answer = time.monotonic()
            self._watcher = asyncio.ensure_future(self._watch())

    def know_table(self, generation: str) -> None:
        self._tables.add(generation)

    # Calls

    async def get_many(self, keys: Sequence[str]) -> Sequence[bytes | None]:
        if self.figures.state != "closed" or self._watcher is None:
            self._require_closed()
        if time.monotonic() - self._last_answer > _GRACE:
            # The event loop stood still, or the machine: others may have found Redis away and back meanwhile.
            self._lose("this process has not heard of Redis for too long")
            raise CacheUnavailable
        turn = self._current_turn()
        places = [turn.keys.setdefault(key, len(turn.keys)) for key in keys]
        answer: asyncio.Future[Sequence[bytes | None]] = asyncio.get_running_loop().create_future()
        turn.readers.append((answer, places))
        return await answer

    async def exchange(self, key: str, expected: bytes | None, value: bytes | None, seconds: float) -> bool:
        self._require_closed()
        if value is not None and time.monotonic() < self._full_until:
            raise CacheUnavailable
        milliseconds = max(1, int(seconds * 1000))
        answer = await self._command(("EVAL", _EXCHANGE, 1, key, expected or b"", value or b"", milliseconds))
        if isinstance(answer, Exception):
            self.figures.errors += 1
            if not str(answer).startswith(("OOM", "command not allowed when used memory")):
                self._lose(answer)
            elif value is not None:
                self._note_full()
            raise CacheUnavailable
        return bool(answer)

    async def invalidate(self, keys: Sequence[str], generations: Sequence[str], hold: float = 0.0) -> None:
        self.figures.invalidations += len(keys) + len(generations)
        until = time.monotonic() + hold if hold else 0.0
        if self._watcher is None:
            self._start()
        # Noted before it is tried: a caller that is cancelled meanwhile has invalidated all the same.
        noted = dict.fromkeys(keys, (False, until)) | dict.fromkeys(generations, (True, until))
        if self.figures.state == "open":
            self._keep_pending(noted)
            return
        try:
            answers = await asyncio.gather(*(self._command(command) for command in self._removals(noted)))
            failure = next((answer for answer in answers if isinstance(answer, Exception)), None)
        except CacheUnavailable:
            self._keep_pending(noted)
        except BaseException:
            self._keep_pending(noted)
            self._lose("an invalidation was interrupted")
            raise
        else:
            if failure is not None:
                self._keep_pending(noted)
                self._lose(failure)

    def _removals(self, noted: dict[str, tuple[bool, float]]) -> list[Command]:
        now = time.monotonic()
        commands: list[Command] = []
        plain: list[str] = []
        for key, (is_generation, until) in noted.items():
            if until > now:
                commands.append(("SET", key, HELD, "PX", max(1, int((until - now) * 1000))))
            elif is_generation:
                commands.append(("EVAL", _DROP, 1, key))
            elif self._place.kind == "cluster":
                commands.append(("DEL", key))
            else:
                plain.append(key)
        commands += [("DEL", *plain[start : start + _CHUNK]) for start in range(0, len(plain), _CHUNK)]
        return commands

    def _keep_pending(self, noted: dict[str, tuple[bool, float]]) -> None:
        for key, (is_generation, until) in noted.items():
            # A table stays held for the write that is in doubt; a row's next write has seen that one end.
            held = self._pending[key][1] if is_generation and key in self._pending else 0.0
            self._pending[key] = (is_generation, max(until, held))
        if len(self._pending) > _MOST_PENDING:
            self._distrusts_all = True
            kept = {key: kind for key, kind in self._pending.items() if kind[0]}
            self._pending = kept if len(kept) <= _MOST_PENDING else {}

    def _require_closed(self) -> None:
        if self._watcher is None and not self._is_closed:
            self._start()
        if self.figures.state != "closed" or self._is_closed:
            raise CacheUnavailable

    # Turns: what one turn of the event loop asks is one call of Redis, and the next one waits for its answer

    def _current_turn(self) -> "_Turn":
        if self._turn is None:
            self._turn = _Turn()
            if not self._is_sending:
                asyncio.get_running_loop().call_soon(self._send)
        return self._turn

    async def _command(self, command: Command) -> Any:
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._current_turn().commands.append((answer, command))
        return await answer

    def _send(self) -> None:
        if self._is_sending:
            return
        if self._is_closed:
            self._fail_turn()
            return
        turn, self._turn = self._turn, None
        if turn is None:
            return
        self._is_sending = True
        task = asyncio.ensure_future(self._send_turn(turn))
        self._tasks.add(task)
        task.add_done_callback(partial(self._end_turn, turn))

    def _end_turn(self, turn: "_Turn", task: asyncio.Task[None]) -> None:
        # Not by the task itself: one that is cancelled before its first step does nothing.
        self._tasks.discard(task)
        self._is_sending = False
        if task.cancelled():
            turn.fail()
        self._send()

    async def _send_turn(self, turn: "_Turn") -> None:
        keys = list(turn.keys)
        alone = self._place.kind != "cluster"
        answers: list[Any] = []
        pings: list[Any] = []
        try:
            for part in self._parts([command for _, command in turn.commands], keys):
                got = await self._within(self._execute(part, with_pings=bool(keys)), self._timeout)
                answers += got[: len(part)]
                pings += got[len(part) :]
            values: list[Any] = answers[len(turn.commands) :]
            failure = _first_failure((*values, *pings))
            if failure is not None:
                raise failure
            if alone:
                values = [value for part in values for value in part]
        except Exception as error:  # noqa: BLE001 - the driver's, the system's: all of them say that it is not there
            turn.fail()
            self.figures.errors += 1
            self._lose(error)
        else:
            self._last_answer = time.monotonic()
            turn.answer(answers, [None if isinstance(value, Exception) else value for value in values])

    def _parts(self, commands: list[Command], keys: list[str]) -> list[list[Command]]:
        """Return the commands and the reads in parts so short that only Redis can be too slow for the timeout."""
        parts = [commands[start : start + _CHUNK] for start in range(0, len(commands), _CHUNK)] or [[]]
        for start in range(0, len(keys), _CHUNK):
            some = keys[start : start + _CHUNK]
            reads: list[Command] = (
                [("GET", key) for key in some] if self._place.kind == "cluster" else [("MGET", *some)]
            )
            if start:
                parts.append(reads)
            else:
                parts[-1] += reads
        return parts

    async def _execute(self, commands: Sequence[Command], *, with_pings: bool = False) -> list[Any]:
        """Return the answers to commands, some of which may be errors.

        Args:
            with_pings: in a Cluster, have every primary answer as well. Where one of them is gone, a process that wrote
                to it keeps all of its invalidations back, so nobody may go on reading from the others.
        """
        if self._client is None:
            self._client = self._place.client()
        if self._place.kind == "cluster":
            return await self._execute_in_cluster(commands, with_pings)
        if len(commands) == 1:
            try:
                return [await self._client.execute_command(*commands[0])]
            except self._place.response_error as error:
                return [error]
        async with self._client.pipeline(transaction=False) as pipeline:
            for command in commands:
                pipeline.execute_command(*command)
            answers: list[Any] = await pipeline.execute(raise_on_error=False)
            return answers

    async def _execute_in_cluster(self, commands: Sequence[Command], with_pings: bool) -> list[Any]:
        await self._client.initialize()
        async with self._client.pipeline() as pipeline:
            for command in commands:
                pipeline.execute_command(*command)
            for node in self._client.get_primaries() if with_pings else ():
                pipeline.execute_command("PING", target_nodes=node)
            answers: list[Any] = await pipeline.execute(raise_on_error=False)
            return answers

    async def _within(self, call: Any, seconds: float) -> Any:
        """Await a call, but no longer than this; an answer that has come while the event loop was busy counts."""
        task: Any = asyncio.current_task()
        loop, cancelling = asyncio.get_running_loop(), task.cancelling()
        is_late = False
        timer: asyncio.Handle

        def expire(turns: int) -> None:
            nonlocal timer, is_late
            if turns:
                timer = loop.call_soon(expire, turns - 1)
            else:
                is_late = True
                task.cancel()

        timer = loop.call_later(seconds, expire, 5)
        try:
            return await call
        except asyncio.CancelledError:
            if is_late and task.cancelling() <= cancelling + 1:
                raise TimeoutError(f"no answer within {seconds} s") from None
            raise
        finally:
            timer.cancel()
            if is_late:
                task.uncancel()  # however the call ended: redis-py may have made something else of it

    def _fail_turn(self) -> None:
        turn, self._turn = self._turn, None
        if turn is not None:
            turn.fail()

    # The circuit

    def _lose(self, error: object) -> None:
        """Open the circuit."""
        if self.figures.state == "closed":
            logger.warning(
                "the cache is away; reads go to the database until it is back",
                extra={"error": type(error).__name__ if isinstance(error, Exception) else error},
            )
        self.figures.state = "open"
        self._is_lost.set()
        self._fail_turn()

    def _note_full(self) -> None:
        now = time.monotonic()
        self._full_until = now + _FULL_PAUSE
        if now - self._full_warned >= _FULL_WARNING:
            self._full_warned = now
            logger.warning("the cache is full and evicts nothing; what is read from the database is not kept")

    async def _watch(self) -> None:
        pause = _FIRST_PROBE
        while not self._is_closed:
            self._is_lost.clear()
            if self.figures.state == "closed":
                # Not in step with others, and at once where it is lost: what could not be removed waits for that.
                with suppress(TimeoutError):
                    async with asyncio.timeout(_BEAT * random.uniform(0.8, 1.0)):  # noqa: S311 - no secret
                        await self._is_lost.wait()
            else:
                await asyncio.sleep(pause)
            await self._look()
            pause = _FIRST_PROBE if self.figures.state == "closed" else min(pause * 2, _PROBE)

    async def _look(self) -> None:
        """See whether Redis is there, and lead the circuit back to closed, step by step."""
        async with self._looking:
            await self._look_alone()

    async def _look_alone(self) -> None:
        try:
            if self.figures.state == "open":
                await self._drop_client()  # what it knows of servers and connections may be old
            identity = await self._within(self._ask_identity(), max(_PATIENCE, self._timeout))
            self._last_answer = time.monotonic()
            if self._identity not in (None, identity):
                # Another server, or one that was started again: it may have lost invalidations that this one had.
                self._distrusts_all = True
                self._lose("another server answers")
            self._identity = identity
            if self.figures.state == "closed":
                return
            await self._deliver()
        except Exception as error:  # noqa: BLE001 - as for a turn
            self.figures.errors += 1
            self._lose(error)
            return
        now = time.monotonic()
        if self.figures.state == "open":
            self.figures.state = "returning"
            self._return_at = now + _GRACE
        elif now >= self._return_at and not self._pending and not self._distrusts_all:
            self.figures.state = "closed"
            logger.info("the cache is back")

    async def _ask_identity(self) -> str:
        """Return what another server would answer otherwise: its own random number, that of each primary in a Cluster."""
        if self._client is None:
            self._client = self._place.client()
        if self._place.kind != "cluster":
            return str((await self._client.info("server"))["run_id"])
        known = await self._client.info("server", target_nodes=type(self._client).PRIMARIES)
        return " ".join(sorted(str(server["run_id"]) for server in known.values()))

    async def _deliver(self) -> None:
        """Remove from Redis what was invalidated while it was away."""
        if self._distrusts_all:
            self._distrusts_all = False
            try:
                await self._remove(dict.fromkeys(self._tables, (True, 0.0)))
            except BaseException:
                self._distrusts_all = True
                raise
        while self._pending:
            part = dict(list(self._pending.items())[:_CHUNK])
            await self._remove(part)
            for key, kind in part.items():
                if self._pending.get(key) == kind:
                    del self._pending[key]

    async def _remove(self, noted: dict[str, tuple[bool, float]]) -> None:
        if noted:
            failure = _first_failure(
                await self._within(self._execute(self._removals(noted)), max(_PATIENCE, self._timeout)), every=True
            )
            if failure is not None:
                raise failure

    async def _drop_client(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            # In a task of its own: whoever is cancelled here, as the watcher is in the end, leaves no connection open.
            closing = asyncio.ensure_future(self._close(client))
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)
        if self._closing:
            await asyncio.wait(tuple(self._closing))

    async def _close(self, client: Any) -> None:
        with suppress(Exception):
            await self._within(client.aclose(), 1.0)


class _Turn:
    """What is asked of Redis in one call: keys to read, each once, and commands."""

    __slots__ = ("commands", "keys", "readers")

    def __init__(self) -> None:
        self.keys: dict[str, int] = {}
        self.readers: list[tuple[asyncio.Future[Sequence[bytes | None]], list[int]]] = []
        self.commands: list[tuple[asyncio.Future[Any], Command]] = []

    def answer(self, answers: Sequence[Any], values: Sequence[bytes | None]) -> None:
        """Give everyone what they asked for; a command may have an error for an answer."""
        for (future, _), answer in zip(self.commands, answers, strict=False):
            if not future.done():
                future.set_result(answer)
        for reader, places in self.readers:
            if not reader.done():
                reader.set_result([values[place] for place in places])

    def fail(self) -> None:
        """Tell everyone that there is no answer."""
        for future in (*(future for future, _ in self.commands), *(reader for reader, _ in self.readers)):
            if not future.done():
                future.set_exception(CacheUnavailable())


class _WrongURL(ValueError):  # noqa: N818 - seen as a ValueError
    """The URL is of no form that is known here; the message quotes nothing of it."""


class _Place:
    """Where Redis is, as a URL says it, and how to make a client for it."""

    def __init__(self, url: str) -> None:
        self._redis = _redis()
        self.response_error: type[Exception] = self._redis.ResponseError
        self._url = url
        reason = None
        try:
            self._understand(url)
            client = self.client()
            if self.kind == "server":
                client.connection_pool.make_connection()  # which tells unknown options, and connects to nothing
        except _WrongURL:
            raise
        except (ValueError, TypeError) as error:
            reason = type(error).__name__
        if reason is not None:
            # Not what they say, nor as a cause: they quote the part that they cannot read, perhaps of the password.
            raise ValueError(
                f"the Redis URL cannot be read ({reason}): encode user and password by urllib.parse.quote(..., safe=''), "
                "and see whether port, database number and options are such"
            )

    def _understand(self, url: str) -> None:
        scheme, _, kind = urlsplit(url).scheme.partition("+")
        if (
            scheme not in ("redis", "rediss", "unix")
            or kind not in ("", "sentinel", "cluster")
            or (kind and scheme == "unix")
        ):
            raise _WrongURL(
                "a Redis URL begins with redis://, rediss://, unix://, redis+sentinel:// or redis+cluster:// "
                "(rediss+... for TLS)"
            )
        self.kind = kind or "server"
        self._is_encrypted = scheme == "rediss"
        if kind:
            self._parse(url, kind)

    def _parse(self, url: str, kind: str) -> None:
        parts = urlsplit(url)
        login, _, places = parts.netloc.rpartition("@")
        self._hosts = [_host(place, _DEFAULT_PORTS[kind]) for place in places.split(",") if place]
        path = [part for part in parts.path.split("/") if part]
        if not self._hosts or len(path) > (2 if kind == "sentinel" else 0) or (kind == "sentinel" and not path):
            raise _WrongURL(
                "the URL is redis+sentinel://host1:26379,host2:26379/service/0"
                if kind == "sentinel"
                else "the URL is redis+cluster://host1:7000,host2:7001, without a database number"
            )
        self._service = path[0] if path else ""
        query = dict(parse_qsl(parts.query))
        self._sentinel_login = {
            name: query.pop(f"sentinel_{name}") for name in ("username", "password") if f"sentinel_{name}" in query
        }
        number = path[1] if len(path) > 1 else "0"
        plain = (
            f"redis://{login}@localhost/{number}?{urlencode(query)}"
            if login
            else (f"redis://localhost/{number}?{urlencode(query)}")
        )
        options = importlib.import_module("redis.asyncio.connection").parse_url(plain)
        self._options = {name: value for name, value in options.items() if name not in ("host", "port")}

    def client(self) -> Any:
        """Return a new client; it connects with its first call."""
        retry = importlib.import_module("redis.asyncio.retry").Retry(
            importlib.import_module("redis.backoff").NoBackoff(), 0
        )
        sockets = {"socket_timeout": _SOCKET_SECONDS, "socket_connect_timeout": _SOCKET_SECONDS}
        asyncio_redis = importlib.import_module("redis.asyncio")
        if self.kind == "server":
            return asyncio_redis.Redis.from_url(self._url, protocol=2, retry=retry, **sockets)
        encrypted = {"ssl": True} if self._is_encrypted else {}
        if self.kind == "cluster":
            nodes = [importlib.import_module("redis.asyncio.cluster").ClusterNode(*host) for host in self._hosts]
            options = {name: value for name, value in self._options.items() if name != "db"}
            return asyncio_redis.RedisCluster(
                startup_nodes=nodes, protocol=2, retry=retry, **sockets, **encrypted, **options
            )
        sentinel = asyncio_redis.Sentinel(
            self._hosts,
            sentinel_kwargs={"retry": retry, **sockets, **encrypted, **self._sentinel_login},
            protocol=2,
            retry=retry,
            **sockets,
            **encrypted,
            **self._options,
        )
        return _WithSentinels(sentinel, sentinel.master_for(self._service))


class _WithSentinels:
    """A client of the primary that closes its clients of the Sentinels as well."""

    def __init__(self, sentinel: Any, primary: Any) -> None:
        self._sentinel = sentinel
        self.execute_command = primary.execute_command
        self.pipeline = primary.pipeline
        self.info = primary.info
        self._primary = primary

    async def aclose(self) -> None:
        """Close every connection."""
        for client in (self._primary, *self._sentinel.sentinels):
            await client.aclose()


def _host(place: str, port: int) -> tuple[str, int]:
    parts = urlsplit(f"//{place}")
    if not parts.hostname:
        raise _WrongURL("the URL names no host")
    return parts.hostname, parts.port or port


def _first_failure(answers: Iterable[Any], *, every: bool = False) -> Exception | None:
    """Return the first answer that is an error, but for a value of another type, which is read as none."""
    for answer in answers:
        if isinstance(answer, Exception) and (every or not str(answer).startswith("WRONGTYPE")):
            return answer
    return None


def _redis() -> Any:
    try:
        return importlib.import_module("redis")
    except ImportError as error:
        raise ImportError("a RedisCache needs redis-py: pip install 'fastapi-building-blocks[redis]'") from error
