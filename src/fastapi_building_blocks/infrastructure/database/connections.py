"""The connection pool: fair, capped, and cheap to borrow from without a greenlet.

``ConnectionPool`` is an ordinary SQLAlchemy pool, so ``session.engine`` shares it, but it also lends a
connection directly (``take``/``acquire``/``release``) for the path that runs statements on the driver.
Three rules keep it honest:

- Only live connections are idle in it: one that broke leaves the pool and frees its place, so that a
  borrower never has to reconnect on the way.
- Whoever waits longest is served first; a returned connection is handed over directly.
- After one connection was found broken, those opened before it are distrusted and replaced.

A look around, ten times a second while a connection is lent, ends calls whose time is over, replaces connections that
are old, and finds those that nobody gives back: none of that costs a call more than a timestamp.
"""

import asyncio
import logging
import math
import random
import sys
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from contextvars import Context, ContextVar
from types import FrameType
from typing import Any, TypeVar

import greenlet
from sqlalchemy.pool import AsyncAdaptedQueuePool, ConnectionPoolEntry, Pool, PoolProxiedConnection
from sqlalchemy.pool.base import _ConnectionRecord
from sqlalchemy.util import await_, greenlet_spawn
from sqlalchemy.util.concurrency import in_greenlet

from fastapi_building_blocks.domain.errors import PoolTimeoutError

from .deadlines import current_deadline, deadline_passed, time_left

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")

_CLOSE_TIMEOUT = 2.0
_RECOVER_TIMEOUT = 2.0
_END_TIMEOUT = 4.0
"""Seconds that the server may take to end what it runs for nobody. One KILL may take MariaDB two, and others wait behind it."""
_LOOK_AGAIN = 0.1
"""Seconds between two looks at the connections that are lent."""
_GRACE = 0.2
"""Seconds that a call may take to end after it was asked to, before it is cancelled."""
_RECYCLE_JITTER = 0.1
"""What share of their age connections are replaced early, so that not all are at once."""
_NEVER = math.inf
_PATIENCE = 0.2
"""Seconds that whoever ends what cancelled callers left running waits for a connection, before it takes one too many."""
_ABORT_TIMEOUT = 0.3
"""Seconds that whatever runs on an aborted connection may take to notice."""
_SPARE_LINGER = 30.0
"""Seconds that connections beyond ``pool_size`` stay open unused: opening one costs more than keeping it."""

_reservations: ContextVar[frozenset[object]] = ContextVar("reservations", default=frozenset())


class PooledConnection(PoolProxiedConnection):
    """One connection of the pool, with the driver's own object at hand; SQLAlchemy can run on it as well."""

    __slots__ = (
        "_caller",
        "_cancelling",
        "_is_cancelled",
        "_loop",
        "_patience",
        "_record",
        "dbapi_connection",
        "driver",
        "epoch",
        "intact",
        "is_late",
        "leaving",
        "lent",
        "old_at",
        "opened_at",
        "turn",
        "until",
        "valid",
    )

    dbapi_connection: Any

    def __init__(self, record: ConnectionPoolEntry, epoch: int, old_at: float = _NEVER) -> None:
        self._record = record
        self.dbapi_connection = record.dbapi_connection
        self.driver: Any = record.driver_connection
        self.epoch = epoch
        self.valid = True
        self.intact = True
        """False once statements of unknown content ran on it: its transaction state is checked on return."""
        self.old_at = old_at
        """When it is replaced, by ``time.monotonic()``."""
        self.opened_at = time.monotonic()
        """Since when it is surely open."""
        self.until = _NEVER
        """When the call that is open on it has to end, by ``time.monotonic()``."""
        self.is_late = False
        """Whether that call was asked to end."""
        self.turn = 0
        """How often it was taken back from a call that went on."""
        self.lent: tuple[float, str] | None = None
        """Since when, and from which line, it is held by what may hold it long; None: not held, or reported."""
        self.leaving: asyncio.Task[None] | None = None
        """What closes it, where SQLAlchemy has given it up."""
        self._loop = asyncio.get_running_loop()  # kept: to ask for it is a system call each time
        self._caller: asyncio.Task[Any] | None = None
        self._is_cancelled = False
        self._cancelling = 0
        self._patience = _NEVER

    def start_clock(self, patience: float, *, heeds_deadline: bool = True) -> None:
        """Give the call that follows so many seconds, or what the deadline around it leaves.

        Raises:
            DeadlineExceededError: it leaves nothing.
        """
        now = time.monotonic()
        until = now + patience
        end = current_deadline.get() if heeds_deadline else None
        if end is not None and end < until:
            if end <= now:
                raise deadline_passed()
            until = end
        if self._is_cancelled:
            self._take_back_cancellation()
        self._caller = caller = asyncio.current_task(self._loop)
        # Asked here: whoever cancels the task during the call wants it to end, though the call may end first.
        self._cancelling = 0 if caller is None else caller.cancelling()
        self.is_late = False
        self._patience = patience
        self.until = until

    def check_turn(self, turn: int) -> None:
        """Raise RuntimeError if the connection was taken back since: what runs on it now is somebody else's."""
        if turn != self.turn:
            raise RuntimeError("the unit of work has ended while a statement of it was on its way")

    def next_statement(self, turn: int) -> None:
        """Begin the time of a call anew, for another of the statements that it is made of.

        Args:
            turn: the connection's when the call began.

        Raises:
            DeadlineExceededError: the deadline around the call has passed.
            RuntimeError: the connection was taken back since the call began.
        """
        self.check_turn(turn)
        if self.until < _NEVER or self._is_cancelled:
            self.start_clock(self._patience)

    def stop_clock(self) -> None:
        """End the time of a call: what follows takes its own."""
        self.until = _NEVER
        if self._is_cancelled:
            self._take_back_cancellation()

    def rest(self) -> None:
        """Forget the call, and who made it: its task may have failed, and holds on to all that it had."""
        self.until = _NEVER  # as stop_clock(), written out: every call of a session comes this way
        if self._is_cancelled:
            self._take_back_cancellation()
        self._caller = None

    def cancel_call(self) -> None:
        """Cancel the task that waits for the call."""
        self.until = _NEVER
        if self._caller is not None:
            self.is_late = self._is_cancelled = True
            self._caller.cancel()

    def ran_out_of_time(self, error: BaseException) -> bool:
        """Whether ``error`` is what ``cancel_call`` has raised, and nobody else wants the task to end."""
        if not self._is_cancelled or self._caller is None:
            return False
        self._is_cancelled = False
        return self._caller.uncancel() <= self._cancelling and isinstance(error, asyncio.CancelledError)

    def _take_back_cancellation(self) -> None:
        """Forget a cancellation that did not end the call, as the answer came first, or the driver made it an error.

        Else ``asyncio.timeout`` and others that count them would take the next one for somebody else's.
        """
        self._is_cancelled = False
        if self._caller is not None and self._caller is asyncio.current_task():
            self._caller.uncancel()

    @property
    def pool(self) -> "ConnectionPool":
        """The pool that it belongs to."""
        pool: ConnectionPool = self._record._ConnectionRecord__pool  # type: ignore[attr-defined]
        return pool

    @property
    def driver_connection(self) -> Any:  # type: ignore[override]  # SQLAlchemy's own is a property as well
        return self.driver

    @property
    def record(self) -> ConnectionPoolEntry:
        return self._record

    @property
    def info(self) -> dict[str, Any]:
        return self._record.info

    @property
    def record_info(self) -> dict[str, Any] | None:
        return self._record.record_info

    @property
    def is_valid(self) -> bool:
        return self.valid

    @property
    def is_detached(self) -> bool:
        return False

    def invalidate(self, e: BaseException | None = None, soft: bool = False) -> None:
        if e is None or isinstance(e, Exception):
            self.valid = False  # the borrower discards it; what was merely cancelled is recovered if it can be

    def cursor(self, *args: Any, **kwargs: Any) -> Any:
        turn = self.turn
        cursor = self.dbapi_connection.cursor(*args, **kwargs)
        self.check_turn(turn)
        return cursor

    def __getattr__(self, name: str) -> Any:
        return getattr(self.dbapi_connection, name)


class ConnectionPool(AsyncAdaptedQueuePool):
    """At most ``pool_size + max_overflow`` connections, lent first come first served.

    The session sets what only its dialect knows: ``is_dead`` (does the driver know that a connection is
    gone?), ``in_transaction`` (was a transaction left open?), ``recover`` (make an interrupted connection
    usable again, or answer False), ``interrupt`` (ask what a connection runs to end; answers whether that is possible),
    ``is_abandoned`` and ``end_abandoned`` (does the server still run what was
    interrupted, and how does another connection end that?), and times in seconds: ``connect_timeout``, ``recycle`` (the
    age at which a connection is replaced) and ``leak_threshold``; ``engine`` is SQLAlchemy's on this pool, and ``server``
    what observers call the server. It lends nothing before ``reopen``, or ``reserve`` for
    those who have ``entered``.
    """

    is_dead: Callable[[Any], bool]
    in_transaction: Callable[[PooledConnection], bool]
    recover: Callable[[PooledConnection], Awaitable[bool]]
    interrupt: Callable[[PooledConnection], bool]
    is_abandoned: Callable[[PooledConnection], bool]
    end_abandoned: Callable[[PooledConnection, PooledConnection], Awaitable[None]]
    connect_timeout: float = 5.0
    recycle: float = _NEVER
    leak_threshold: float = _NEVER
    engine: Any = None
    server: str = "primary"

    def __init__(
        self, creator: Any, pool_size: int = 5, max_overflow: int = 10, timeout: float = 5.0, **arguments: Any
    ) -> None:
        Pool.__init__(self, creator, **arguments)
        self._size = pool_size
        self._timeout = timeout
        self.limit = pool_size + max_overflow
        """The most connections that are open at once."""
        self._connections: set[PooledConnection] = set()
        self._idle: deque[PooledConnection] = deque()
        self._open = 0  # live connections, and places reserved for those being opened or closed
        self._waiters: deque[asyncio.Future[PooledConnection | None]] = deque()
        self._epoch = 0
        self._closed = True
        self._reserved: object | None = None
        self._refusal: Callable[[], Exception] = not_connected
        self._draining: dict[asyncio.Future[None], set[PooledConnection]] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._trimmer: asyncio.TimerHandle | None = None
        self._watch: asyncio.TimerHandle | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._nobodys = Context()  # of the look around, which logs about others than who has set it off
        self._least_idle = 0

    # Borrowing

    def take(self) -> PooledConnection | None:
        """Return an idle connection, the one used last, or None: then ``acquire``.

        Raises:
            RuntimeError: the connections belong to another event loop.
        """
        idle = self._idle
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            self.check_loop()
        if self._watch is None:
            self._watch = loop.call_later(_LOOK_AGAIN, self._look, context=self._nobodys)
            self._retire()  # nobody has looked while all were idle
        while idle:
            connection = idle.pop()
            if not self.is_dead(connection.driver):
                self._least_idle = min(self._least_idle, len(idle))
                return connection
            self.discard(connection)
        return None

    async def acquire(self) -> PooledConnection:
        """Return a connection: an idle one, a new one, or the next that is returned.

        Raises:
            PoolTimeoutError: none became free within the pool timeout (seconds), or the deadline around the call.
            TimeoutError: a new one could not be opened within the connect timeout (seconds).
        """
        self.check_open()
        left = time_left()
        if left is None:
            return await self._acquire()
        try:
            async with asyncio.timeout(left) as timeout:
                return await self._acquire()
        except TimeoutError as error:
            if not timeout.expired():
                raise
            raise PoolTimeoutError("no database connection became free before the deadline") from error

    async def _acquire(self) -> PooledConnection:
        connection = self.take()
        if connection is not None:
            return connection
        if self._open < self.limit:
            self._open += 1
            return await self._open_one()
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[PooledConnection | None] = loop.create_future()
        self._waiters.append(waiter)
        expiry = loop.call_later(self._timeout, self._expire, waiter)
        try:
            connection = await self._served(waiter)
        finally:
            expiry.cancel()
        return connection if connection is not None else await self._open_one()

    def check_loop(self) -> None:
        """Raise RuntimeError if connections are lent in another event loop than this one."""
        if not self._closed and self._loop is not asyncio.get_running_loop():
            raise RuntimeError(
                "the session is connected in another event loop; use one session in each, or disconnect() it first"
            )

    def check_open(self) -> None:
        """Raise RuntimeError, or what ``reserve`` was told, unless connections are lent to this task."""
        if self._reserved is not None:
            if self._reserved not in _reservations.get():
                raise self._refusal()
        elif self._closed:
            raise not_connected()

    def release(self, connection: PooledConnection) -> None:
        """Give a healthy connection back, to whoever waits longest."""
        connection.rest()
        connection.lent = None
        if connection.epoch != self._epoch or not connection.valid or self._closed:
            self.discard(connection)
            return
        if not connection.intact:
            if self.in_transaction(connection):
                self.mend(connection)
                return
            connection.intact = True
        waiters = self._waiters
        while waiters:
            waiter = waiters.popleft()
            if not waiter.done():
                waiter.set_result(connection)
                return
        self._idle.append(connection)
        if self._trimmer is None and len(self._idle) > self._size:
            self._least_idle = len(self._idle)
            self._trimmer = asyncio.get_running_loop().call_later(_SPARE_LINGER, self._trim)

    def discard(self, connection: PooledConnection, *, distrust: bool = False) -> asyncio.Task[None]:
        """Close a connection in the background and free its place; with ``distrust``, doubt the others as well."""
        connection.until = _NEVER
        connection.lent = None
        if distrust:
            self.distrust(connection)
        return self._in_background(self._close(connection))

    def give_up(self, borrowed: PoolProxiedConnection, cause: BaseException) -> None:
        """Close what SQLAlchemy has borrowed, as soon as the greenlet of the one who did is left.

        Outside of it the driver drops the connection at once. Within, a caller that is cancelled again would leave it
        half closed, and its place taken.
        """
        asyncio.get_running_loop().call_soon(borrowed.invalidate, cause)

    def mend(self, connection: PooledConnection) -> None:
        """Take back a connection whose call was interrupted; it is lent again only once it is known to be sound."""
        connection.turn += 1
        connection.until = _NEVER
        connection.lent = None
        self._in_background(self._recover(connection))

    def distrust(self, connection: PooledConnection) -> None:
        """Replace every connection that was opened before ``connection`` broke."""
        if connection.epoch == self._epoch:
            self.renew()

    def renew(self) -> None:
        """Replace every connection that is open now: what is lent on its return."""
        self._epoch += 1
        while self._idle:
            self.discard(self._idle.pop())

    def cancel_calls(self) -> None:
        """End every call that is on the way, as if its time were over."""
        for connection in tuple(self._connections):
            if connection.until < _NEVER:
                connection.cancel_call()

    def find(self, driver: Any) -> PooledConnection | None:
        """Return the connection with this one of SQLAlchemy's or the driver's underneath."""
        return next((one for one in self._connections if driver in (one.dbapi_connection, one.driver)), None)

    def outstanding(self) -> int:
        """How many calls are on a connection or wait for one."""
        return self._open - len(self._idle) + len(self._waiters)

    def note_holder(self, connection: PooledConnection) -> None:
        """Remember who holds a connection from here on, for what may hold it for long."""
        if self.leak_threshold < _NEVER:
            connection.lent = (time.monotonic(), _place_of_caller())

    def _look(self) -> None:
        """Look at every connection once: for calls that are late, holders that forgot, and age."""
        now = time.monotonic()
        loop = asyncio.get_running_loop()
        for connection in tuple(self._connections):
            try:
                self._look_at(connection, now)
            except Exception as error:  # noqa: BLE001 - say, a logging filter's; the others keep their clock
                loop.call_exception_handler({"message": "a connection could not be looked at", "exception": error})
        self._retire()
        lends = self._open > len(self._idle)
        self._watch = loop.call_later(_LOOK_AGAIN, self._look, context=self._nobodys) if lends else None

    def _look_at(self, connection: PooledConnection, now: float) -> None:
        if connection.until <= now:
            was_asked, connection.is_late = connection.is_late, True
            if not was_asked and self.interrupt(connection):
                connection.until = now + _GRACE
            else:
                connection.cancel_call()
        if connection.lent is not None and now - connection.lent[0] > self.leak_threshold:
            (_, place), connection.lent = connection.lent, None
            logger.warning(
                "a database connection is held for more than %g s; it was taken at %s", self.leak_threshold, place
            )

    def _retire(self) -> None:
        """Close the connections that are old, and those that are lent on their return."""
        now = time.monotonic()
        for connection in tuple(self._connections):
            if connection.old_at <= now:
                connection.old_at = _NEVER
                connection.epoch = -1
                if connection in self._idle:
                    self._idle.remove(connection)
                    self.discard(connection)

    def _in_background(self, work: Coroutine[Any, Any, Answer]) -> asyncio.Task[Answer]:
        """Run what is finished even if nobody waits for it; ``drain`` does."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def drain(self, patience: float = 0.0) -> int:
        """Close what is idle, refuse who waits, and have what is lent closed on its return.

        What is not closed after ``patience`` seconds is aborted, and whatever runs on it fails. Returns how many
        connections that were.
        """
        self._end_reservation()
        self._closed = True
        if self._trimmer is not None:
            self._trimmer.cancel()
            self._trimmer = None
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_exception(disconnected())
        self.renew()
        lent = set(self._connections)
        begun = set(self._tasks)
        is_empty = await self._is_empty_within(patience, lent)
        if self._closed and self._watch is not None:  # until here it has ended calls that were late
            self._watch.cancel()
            self._watch = None
        # Without those of whoever has connected anew meanwhile.
        late = set() if is_empty else lent & self._connections
        await self._abort(late, begun)
        return len(late)

    async def _abort(self, late: set[PooledConnection], begun: set[asyncio.Task[Any]]) -> None:
        """Drop connections that are lent, and end what runs in the background: what had ``begun``, if others go on."""
        for connection in late:
            connection.valid = False
            begun.add(self._in_background(self._drop(connection)))
        if await self._is_empty_within(_ABORT_TIMEOUT, late) and self._tasks:
            await asyncio.wait(tuple(self._tasks), timeout=_ABORT_TIMEOUT)
        for connection in late:  # whoever holds it still may do so for long
            self._forget(connection)
        await asyncio.sleep(0)  # what is cancelled before it has begun could not clean up
        if ending := self._tasks.copy() if self._closed else self._tasks & begun:
            for task in ending:
                task.cancel()
            await asyncio.wait(ending, timeout=_ABORT_TIMEOUT)

    async def _drop(self, connection: PooledConnection) -> None:
        """End what runs on a connection, where that is possible, and close it under whoever holds it."""
        try:
            if self.interrupt(connection):
                async with asyncio.timeout(_ABORT_TIMEOUT):
                    await self.recover(connection)
        except Exception:
            logger.debug("an interrupted connection could not be recovered", exc_info=True)
        finally:
            with suppress(Exception):
                connection.record.invalidate()  # outside a greenlet the driver drops it without a word

    async def _is_empty_within(self, seconds: float, lent: set[PooledConnection]) -> bool:
        """Wait until nothing is open any more, or none of those that were lent where others have connected meanwhile."""
        if not self._open:
            return True
        emptied: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._draining[emptied] = lent
        try:
            await asyncio.wait({emptied}, timeout=seconds)
        finally:
            del self._draining[emptied]
        return emptied.done()

    def reopen(self) -> None:
        """Lend connections, until ``drain``."""
        self._begin_anew()
        self._end_reservation()

    def reserve(self, refusal: Callable[[], Exception]) -> object:
        """Lend connections to those who have ``entered`` only, until ``admit``; others are raised what ``refusal`` makes.

        Returns the reservation: it ends with ``drain``, too.
        """
        self._begin_anew()
        self._reserved, self._refusal = object(), refusal
        # Idle connections are reserved as well. Said here, since the way of every statement has no time to ask.
        self.take = self._take_reserved  # type: ignore[method-assign]
        return self._reserved

    def is_reserved(self, reservation: object) -> bool:
        """Whether connections are lent to those of this reservation still."""
        return self._reserved is reservation

    def admit(self, reservation: object) -> bool:
        """Lend connections to everybody; False, and nothing, where the reservation has ended meanwhile."""
        if not self.is_reserved(reservation):
            return False
        self.reopen()
        return True

    def _begin_anew(self) -> None:
        self.check_loop()
        if self._closed and self._watch is not None:
            # Of a call that was refused, in an event loop that may be no more: nothing would look around in this one.
            self._watch.cancel()
            self._watch = None
        self._loop = asyncio.get_running_loop()
        self._closed = False

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Have this task, and those that it starts meanwhile, lent what is reserved now."""
        token = _reservations.set(_reservations.get() | {self._reserved})
        try:
            yield
        finally:
            _reservations.reset(token)

    def _take_reserved(self) -> PooledConnection | None:
        return ConnectionPool.take(self) if self._reserved in _reservations.get() else None

    def _end_reservation(self) -> None:
        self._reserved = None
        self.__dict__.pop("take", None)

    async def _open_one(self) -> PooledConnection:
        # In a task of its own: a cancelled caller leaves the new connection to the pool. Some drivers would lose a
        # half-open one, which the server then keeps.
        opening = self._in_background(self._open_in_time())
        try:
            await asyncio.wait({opening})
        except asyncio.CancelledError:
            opening.add_done_callback(self._keep)
            raise
        if opening.cancelled():  # by drain(): that is not the caller's own end
            raise disconnected()
        connection = opening.result()
        if self._closed:  # meanwhile; the clock of its call would be nobody's
            self.release(connection)
            raise disconnected()
        return connection

    async def _open_in_time(self) -> PooledConnection:
        epoch = self._epoch
        try:
            async with asyncio.timeout(self.connect_timeout):
                record = await greenlet_spawn(self._create_connection)
        except BaseException:
            self._free_place()
            raise
        connection = self._wrap(record)
        connection.epoch = epoch  # whoever has doubted them all meanwhile has doubted this one as well
        return connection

    def _keep(self, opening: asyncio.Task[PooledConnection]) -> None:
        """Keep the connection whose caller did not wait for it."""
        if not opening.cancelled() and opening.exception() is None:
            self.release(opening.result())

    def _wrap(self, record: ConnectionPoolEntry) -> PooledConnection:
        connection: PooledConnection | None = record.info.get("pooled")
        if connection is None or connection.dbapi_connection is not record.dbapi_connection:
            age = self.recycle * random.uniform(1 - _RECYCLE_JITTER, 1)  # noqa: S311 - jitter, not a secret
            connection = PooledConnection(record, self._epoch, time.monotonic() + age)
            record.info["pooled"] = connection
            self._connections.add(connection)
        return connection

    def _expire(self, waiter: "asyncio.Future[PooledConnection | None]") -> None:
        if not waiter.done():
            self._waiters.remove(waiter)
            waiter.set_exception(
                PoolTimeoutError(f"no database connection became free within {self._timeout:g} seconds")
            )

    def _pass_on(self, connection: PooledConnection | None) -> None:
        if connection is None:
            self._free_place()
        else:
            self.release(connection)

    def _free_place(self) -> None:
        while self._waiters and self._open <= self.limit:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)  # the place goes to the one that waits longest, who opens a connection
                break
        else:
            self._open -= 1
        for emptied, lent in self._draining.items():
            if not emptied.done() and (not self._open or (not self._closed and lent.isdisjoint(self._connections))):
                emptied.set_result(None)

    async def _close(self, connection: PooledConnection) -> None:
        record = connection.record
        connection.rest()
        connection.valid = False
        try:
            try:
                if not self.is_dead(connection.driver):  # otherwise nobody is there to take leave of
                    async with asyncio.timeout(_CLOSE_TIMEOUT):
                        await greenlet_spawn(record.close)
            finally:
                if record.dbapi_connection is not None:
                    record.invalidate()  # outside a greenlet the driver drops it without a word
        except Exception:
            logger.debug("a connection did not close cleanly", exc_info=True)
        finally:
            self._forget(connection)

    async def _recover(self, connection: PooledConnection) -> None:
        sound = False
        try:
            async with asyncio.timeout(_RECOVER_TIMEOUT):
                sound = connection.valid and await self.recover(connection)
            if not sound and self.is_abandoned(connection):
                async with asyncio.timeout(_END_TIMEOUT):
                    await self._end_abandoned(connection)
        except Exception:
            logger.debug("an interrupted connection could not be recovered", exc_info=True)
        finally:
            if sound:
                connection.intact = True
                self.release(connection)
            else:
                connection.valid = False
                await self._close(connection)

    async def _end_abandoned(self, connection: PooledConnection) -> None:
        """Have the server end what it runs for nobody: until then the connection counts there, whoever closed it here."""
        helper = None
        try:
            helper = await self._take_first()
            await self.end_abandoned(connection, helper)
            self.release(helper)
        except BaseException:
            if helper is not None:
                self.discard(helper)
            raise

    async def _take_first(self) -> PooledConnection:
        """Return a connection before all who wait for one; one too many for a moment, where none comes back soon."""
        self.check_open()
        connection = self.take()
        if connection is not None:
            return connection
        while self._open >= self.limit:
            waiter: asyncio.Future[PooledConnection | None] = asyncio.get_running_loop().create_future()
            self._waiters.appendleft(waiter)
            try:
                async with asyncio.timeout(_PATIENCE):
                    connection = await self._served(waiter)
            except TimeoutError:
                if self._open <= self.limit:  # else somebody has taken that one, for the same
                    break
            else:
                return connection if connection is not None else await self._open_one()
        self._open += 1
        return await self._open_one()

    async def _served(self, waiter: "asyncio.Future[PooledConnection | None]") -> PooledConnection | None:
        try:
            return await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled() and waiter.exception() is None:
                self._pass_on(waiter.result())  # it was served and cancelled in the same moment
            raise

    def _trim(self) -> None:
        """Close the connections beyond ``pool_size`` that were idle all the time since the last look."""
        self._trimmer = None
        for _ in range(min(self._least_idle, len(self._idle) - self._size)):
            self.discard(self._idle.popleft())
        self._least_idle = len(self._idle)
        if len(self._idle) > self._size:
            self._trimmer = asyncio.get_running_loop().call_later(_SPARE_LINGER, self._trim)

    # SQLAlchemy's side: always called within a greenlet

    def _create_connection(self) -> ConnectionPoolEntry:
        return _PoolEntry(self)

    def take_back(self, record: ConnectionPoolEntry) -> None:
        """Close a connection that could not be returned, as soon as the greenlet of the one who tried is left."""
        asyncio.get_running_loop().call_soon(self._take_back, record)

    def _take_back(self, record: ConnectionPoolEntry) -> None:
        record.invalidate()
        self._do_return_conn(record)

    def _do_get(self) -> ConnectionPoolEntry:
        connection = self.take() or await_(self.acquire())
        self.note_holder(connection)
        return connection.record

    def _do_return_conn(self, record: ConnectionPoolEntry) -> None:
        if record.dbapi_connection is None:
            broken: PooledConnection | None = record.info.get("pooled")
            if broken is not None and self.is_abandoned(broken):
                broken.valid = False
                self.mend(broken)
            elif broken is not None and broken.leaving is not None and not broken.leaving.done():
                broken.leaving.add_done_callback(lambda _: self._has_left(broken))  # the server still counts it
            else:
                self._forget(broken)
        else:
            connection = self._wrap(record)
            connection.intact = False
            self.release(connection)

    def _close_connection(self, connection: Any, *, terminate: bool = False) -> None:
        if not terminate:
            self._dialect.do_close(connection)  # SQLAlchemy's own logs an error where the server is silent
        elif in_greenlet():
            # SQLAlchemy would have its caller wait for that, and in a task of which nobody knows.
            pooled = self.find(connection)
            leaving = self._in_background(self._take_leave(connection, pooled))
            if pooled is not None:
                pooled.leaving = leaving
        else:
            super()._close_connection(connection, terminate=True)

    async def _take_leave(self, connection: Any, pooled: PooledConnection | None) -> None:
        is_closed = False
        try:
            if not self.is_dead(connection.driver_connection):
                async with asyncio.timeout(_CLOSE_TIMEOUT):
                    if pooled is not None and self.interrupt(pooled) and await self.recover(pooled):
                        entry: Any = pooled.record
                        entry.dbapi_connection = connection  # in memory it is the database: it stays
                    else:
                        await greenlet_spawn(self._dialect.do_close, connection)
                is_closed = True
        except Exception:
            logger.debug("a connection did not close cleanly", exc_info=True)
        finally:
            if not is_closed:
                super()._close_connection(connection, terminate=True)

    def _has_left(self, connection: PooledConnection) -> None:
        """Free the place of a connection that SQLAlchemy has given up, or lend it again if it was kept."""
        if connection.record.dbapi_connection is None:
            self._forget(connection)
        else:
            self.release(connection)

    def _forget(self, connection: PooledConnection | None) -> None:
        """Free the place of a connection, once; None is one that was never made."""
        if connection is not None:
            if connection not in self._connections:
                return
            self._connections.discard(connection)
        self._free_place()

    def _invalidate(
        self, connection: PoolProxiedConnection, exception: BaseException | None = None, _checkin: bool = True
    ) -> None:
        pooled = connection if isinstance(connection, PooledConnection) else connection.info.get("pooled")
        if pooled is not None:
            self.distrust(pooled)
        if _checkin and connection.is_valid:
            connection.invalidate(exception)

    def dispose(self) -> None:
        # In tasks of their own: a cancelled caller loses no place, and a silent server holds up nobody for long.
        closing = [self.discard(self._idle.pop()) for _ in tuple(self._idle)]
        if closing:
            await_(asyncio.wait(closing))

    def recreate(self) -> "ConnectionPool":
        return self  # one pool for the session's whole life, whoever disposes of the engine

    def size(self) -> int:
        return self._size

    def checkedin(self) -> int:
        return len(self._idle)

    def checkedout(self) -> int:
        return self._open - len(self._idle)

    def overflow(self) -> int:
        return self._open - self._size

    def waiting(self) -> int:
        """How many callers wait for a connection."""
        return sum(not waiter.done() for waiter in self._waiters)

    def status(self) -> str:
        return f"{self.checkedout()} lent, {self.checkedin()} idle, {self.waiting()} waiting, at most {self.limit}"


class _PoolEntry(_ConnectionRecord):
    """SQLAlchemy's record of a connection, which is returned even if what has to be done before fails.

    ``session.engine`` sets the isolation level back by a statement, on some drivers. If that is cancelled, SQLAlchemy
    takes the connection for returned, and the pool would not know of it.
    """

    def checkin(self, _fairy_was_created: bool = True) -> None:
        is_out = self.fairy_ref is not None or not _fairy_was_created
        pool: Any = self._ConnectionRecord__pool  # type: ignore[attr-defined]
        try:
            super().checkin(_fairy_was_created)
        except BaseException:
            if is_out:
                pool.take_back(self)
            raise


_LIBRARIES = ("fastapi_building_blocks", "sqlalchemy", "contextlib", "asyncio")


def _place_of_caller() -> str:
    """Return the line outside of this library and SQLAlchemy from which a connection is taken."""
    frame: FrameType | None = sys._getframe(1)
    inside = greenlet.getcurrent()
    while True:
        while frame is not None:
            if not frame.f_globals.get("__name__", "").startswith(_LIBRARIES):
                return f"{frame.f_code.co_filename}:{frame.f_lineno}, in {frame.f_code.co_name}"
            frame = frame.f_back
        if inside.parent is None:
            return "an unknown place"
        inside = inside.parent
        frame = inside.gr_frame


def disconnected() -> RuntimeError:
    """Return what a call raises that waits for a connection while the session is disconnected."""
    return RuntimeError("the session was disconnected")


def not_connected() -> RuntimeError:
    """Return what the use of a session that is not connected raises."""
    return RuntimeError("the session is not connected; await session.connect() first")
