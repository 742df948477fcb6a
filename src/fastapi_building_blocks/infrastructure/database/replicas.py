"""Read replicas: which server a read goes to, and how far each replica is.

A ``ReplicaSet`` stands in front of a session that has replicas; a session without any knows nothing of it. Single reads
and read-only units of work go to a replica, the one with the least work outstanding, everything else to the primary.

- *Rotation.* A replica is read from while it answers, replays the primary's writes and lags by ``max_lag`` at most. A
  monitor looks twice a second. It compares positions in the log, so it knows the lag of a replica that has lost the
  primary as well, and an idle primary makes nobody old.
- *Own writes.* A read whose context has written goes to a replica that is known to have replayed that, at no cost; else
  it waits for one as long as ``consistency_wait``, else it goes to the primary.
- *Failures.* Whatever a single read fails with on a replica, the primary has the last word, while there is time left. A
  replica that stands still is left by the reads that wait for it.

What is known of a replica's position holds for connections that were open when it said so: a server that was restarted
since may be further back.
"""

import asyncio
import hashlib
import logging
import math
import random
import time
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing, suppress
from contextvars import Context
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import sqlalchemy as sa

from fastapi_building_blocks.domain.errors import (
    BuildingBlocksError,
    CommitOutcomeUnknownError,
    ConnectionLostError,
    StatementTimeoutError,
)

from .connections import ConnectionPool, PooledConnection
from .consistency import Mark, Position, accepts_old, current_scope, includes, newest, prefer_primary
from .deadlines import seconds_left
from .dialects.portable import Replayed
from .session import Iteration, Operation, TransactionBackend
from .sqlalchemy_errors import driver_error, out_of_time
from .sqlalchemy_session import SQLAlchemySession, SQLAlchemyTransaction
from .statement_kinds import is_opaque, is_read

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")

_LOOK_TIMEOUT = 1.0
"""Seconds that a server may take to say how far it is."""
_LOOK_AGAIN = 0.5
_LOOK_AGAIN_AT_ONCE = 0.05
_LONGEST_BACKOFF = 2.0
_FIRST_PAUSE, _LONGEST_PAUSE = 0.002, 0.02
"""Seconds between two questions to a replica whether it is as far as a read needs it."""
_CERTAIN = 60.0
"""Seconds after ``max_lag`` in which a mark is still regarded: what clocks of different machines may differ by."""
_HISTORY = 120.0
_SAMPLE = 0.1
"""Seconds between two positions of the primary that are remembered."""


@dataclass(frozen=True, slots=True)
class ReplicaStatus:
    """A replica at one moment."""

    name: str
    """Its host and port, as ``StatementEvent.server`` has it."""
    in_rotation: bool
    """Whether reads go to it."""
    reason: str
    """Why not; empty while they do."""
    lag: float | None
    """Seconds that it is behind the primary, to half a second; None: not known."""
    reads: int
    """Single reads and read-only units that went to it so far."""
    outstanding: int
    """Calls that are on it or wait for a connection to it."""


_UNSEEN = "not looked at yet"
_BLANK = Mark()
_DISTRUST = Mark(unknown_at=math.inf)
"""Of a context that was told what cannot be verified: replicas are never safe for it."""


class ReplicaSet:
    """Routes the calls of one session between its primary and its replicas.

    Args:
        primary: the session; its ``perform``, ``iterate`` and ``open_transaction`` are replaced by those here.
        connect: makes a session like it for another URL; one that ``looks`` has a single connection and little patience.
        urls: the replicas'.
    """

    def __init__(
        self,
        primary: SQLAlchemySession,
        connect: Callable[[sa.URL, bool], SQLAlchemySession],
        urls: Sequence[sa.URL],
        max_lag: float,
        consistency_wait: float,
    ) -> None:
        self._primary = primary
        self._probe = connect(primary.engine.url, True)
        self._replicas = [Replica(name_of(url), connect(url, False), connect(url, True)) for url in urls]
        self._max_lag = max_lag
        self._wait = consistency_wait
        self._rotation: list[Replica] = []
        self._turn = 0
        self._history = _History()
        self._ask_primary = _Shared(self._ask)
        self._own = Mark()
        self._monitor: asyncio.Task[Any] | None = None
        place = primary.engine.url
        named = f"{place.get_backend_name()} {place.database}"
        self._database = hashlib.sha256(named.encode()).hexdigest()[:8]
        self._perform = primary.perform
        self._iterate = primary.iterate
        primary.perform = self.perform  # type: ignore[method-assign]
        primary.iterate = self.iterate  # type: ignore[method-assign]
        primary.open_transaction = self.open_transaction  # type: ignore[method-assign]
        # SQLAlchemy's own transactions, on session.engine, are writes like others.
        sa.event.listen(primary.engine.sync_engine, "commit", lambda _connection: self.note_write())

    # Lifecycle

    async def start(self) -> None:
        """Look at every server once, and go on looking; a replica that does not answer is no failure."""
        if self._monitor is not None:
            return
        for session in self._sessions():
            session.open_pool()
        self._history, self._ask_primary = _History(), _Shared(self._ask)
        for replica in self._replicas:
            replica.begin()
        # Before anything is awaited, so that a second caller begins no other.
        self._monitor = asyncio.get_running_loop().create_task(self._watch(), context=Context())
        await self._sample()
        await asyncio.gather(*[self._look_at(replica) for replica in self._replicas])

    async def stop(self) -> None:
        """Give every connection to replicas back."""
        monitor, self._monitor = self._monitor, None
        if monitor is not None:
            monitor.cancel()
            await asyncio.wait({monitor})
        self._rotation = []
        for replica in self._replicas:
            replica.in_rotation, replica.reason = False, _UNSEEN
            replica.forget()
        await asyncio.gather(*[session.disconnect() for session in self._sessions()])

    def sessions(self) -> list[SQLAlchemySession]:
        """Return what reads run on, the primary left out."""
        return [replica.session for replica in self._replicas]

    def status(self) -> list[ReplicaStatus]:
        """Return how each replica is."""
        return [
            ReplicaStatus(one.name, one.in_rotation, one.reason, one.lag, one.reads, one.pool.outstanding())
            for one in self._replicas
        ]

    def _sessions(self) -> list[SQLAlchemySession]:
        return [self._probe, *[session for one in self._replicas for session in (one.session, one.probe)]]

    # What the session does

    async def perform(self, operation: Operation, statement: Any, arguments: Any) -> Any:
        """Run one operation where it belongs."""
        if not is_read(statement):
            try:
                return await self._perform(operation, statement, arguments)
            finally:
                self.note_write()
        replica, wanted = self._at_once() or await self.choose()
        if replica is not None:
            begun = time.monotonic()
            try:
                return await replica.perform(operation, statement, arguments, wanted)
            except (BuildingBlocksError, RuntimeError) as error:
                self.check_may_repeat(replica, error, begun)
        try:
            return await self._perform(operation, statement, arguments)
        finally:
            if is_opaque(statement):
                self.note_write()

    async def iterate(self, operation: Iteration, statement: Any, arguments: Any) -> AsyncGenerator[Any, None]:
        """Run one streamed read where it belongs; what fails before its first batch begins again on the primary."""
        replica, wanted = await self.choose() if is_read(statement) else (None, None)
        if replica is not None:
            begun, has_some = time.monotonic(), False
            try:
                async with aclosing(replica.iterate(operation, statement, arguments, wanted)) as batches:
                    async for batch in batches:
                        has_some = True
                        yield batch
                return
            except (BuildingBlocksError, RuntimeError) as error:
                if has_some:
                    replica.suspected.set()
                    raise
                self.check_may_repeat(replica, error, begun)
        try:
            async with aclosing(self._iterate(operation, statement, arguments)) as batches:
                async for batch in batches:
                    yield batch
        finally:
            if is_opaque(statement):
                self.note_write()

    def open_transaction(self, isolation: str | None, read_only: bool) -> TransactionBackend:
        """Return a unit of work's side here: on a replica if it only reads."""
        self._primary.pool.check_open()
        isolation = self._primary.dialect.check_isolation(isolation)
        unit = _ReadingUnit if read_only else _WritingUnit
        return unit(self, self._primary.pool, self._primary.dialect, isolation, read_only)

    def note_write(self) -> None:
        """Remember that this context has written; whether that was kept does not matter."""
        scope = current_scope.get()
        if scope is not None:
            scope.mark(self._database).note_write(self._tell)
        self._own.note_write(self._tell)

    def check_may_repeat(self, replica: "Replica", error: Exception, begun: float) -> None:
        """Raise the error again if the primary cannot do better in the time that is left."""
        replica.suspected.set()
        limit = self._primary.dialect.timeouts.statement
        is_late = isinstance(error, StatementTimeoutError) and time.monotonic() - begun >= (limit or math.inf)
        if is_late or seconds_left() <= 0:
            raise error
        logger.debug("a read on replica %s failed and goes to the primary", replica.name, exc_info=error)

    # Where to

    async def choose(self) -> "tuple[Replica | None, Position | None]":
        """Return the replica for a read of this context, None for the primary, and what the read needs to find there."""
        return self._at_once() or await self._choose_for(self._mark())

    def _at_once(self) -> "tuple[Replica | None, Position | None] | None":
        """Return the same where nothing has to be asked; None: something has."""
        if not self._rotation or prefer_primary.get():
            return None, None
        if accepts_old.get() or (mark := self._mark()).is_blank:
            return self._least_busy(None), None
        if mark.is_open or mark.unknown_at is not None or mark.position is None:
            return None
        replica = self._least_busy(mark.position)
        return None if replica is None else (replica, mark.position)

    def _mark(self) -> Mark:
        scope = current_scope.get()
        if scope is None:
            return self._own
        return _DISTRUST if scope.distrusted else scope.marks.get(self._database, _BLANK)

    async def _choose_for(self, mark: Mark) -> "tuple[Replica | None, Position | None]":
        if mark.is_open:
            await mark.settle()
        now = time.monotonic()
        if mark.unknown_at is not None:
            if now < mark.unknown_at + self._max_lag:
                return None, None
            mark.unknown_at = None
        wanted = mark.position
        if wanted is None:
            return self._least_busy(None), None
        replica = self._least_busy(wanted)
        if replica is None:
            if now > mark.position_at + self._max_lag + _CERTAIN:
                mark.position = None  # whoever lags no more than max_lag has it; the log itself has begun anew
                return self._least_busy(None), None
            replica = await self._caught_up(wanted, mark.position_at)
        return replica, wanted

    def _least_busy(self, wanted: Position | None) -> "Replica | None":
        """Return the replica with the least work of those known to be as far; of equal ones each in turn."""
        rotation = self._rotation
        self._turn += 1
        best, least = None, math.inf
        for place in range(self._turn, self._turn + len(rotation)):
            replica = rotation[place % len(rotation)]
            if wanted is None or (replica.position is not None and includes(replica.position, wanted)):
                work = replica.pool.outstanding()
                if work < least:
                    best, least = replica, work
        return best

    async def _caught_up(self, wanted: Position, since: float) -> "Replica | None":
        """Wait until a replica is as far, within ``consistency_wait``; None: none was."""
        now = time.monotonic()
        give_up = now + min(self._wait, seconds_left() / 2)  # the primary needs some of it as well
        # One that was behind by more a moment ago need not be asked.
        near = [one for one in self._rotation if (one.lag or 0.0) - (now - since) <= self._wait]
        near.sort(key=lambda one: one.lag or 0.0)
        pause = _FIRST_PAUSE
        while near and (left := give_up - time.monotonic()) > 0:
            for replica in near:
                if replica.position is not None and includes(replica.position, wanted):
                    return replica
            asking = [replica.asked.soon() for replica in near]
            await asyncio.wait(asking, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            for replica in near:
                if replica.in_rotation and replica.position is not None and includes(replica.position, wanted):
                    return replica
            await asyncio.sleep(min(pause, max(give_up - time.monotonic(), 0)))
            pause = min(pause * 2, _LONGEST_PAUSE)
            near = [one for one in near if one.in_rotation]
        return None

    # How far they are

    async def _ask(self) -> Position | None:
        position: Position | None = await self._probe.look(self._probe.dialect.written)
        if position is not None:
            self._history.add(time.monotonic(), position)
        return position

    async def _tell(self) -> Position | None:
        """Return how far the primary is; None if it does not say in time."""
        if not self._primary.dialect.tells_positions:
            return None
        asking = self._ask_primary.soon()
        await asyncio.wait({asking}, timeout=max(min(_LOOK_TIMEOUT, seconds_left()), 0))
        return asking.result() if _has_answer(asking) else None

    async def _sample(self) -> None:
        if self._primary.dialect.tells_positions:
            await asyncio.wait({self._ask_primary.soon()}, timeout=_LOOK_TIMEOUT)

    async def _look_at(self, replica: "Replica") -> bool:
        """Ask a replica how far it is, and have it join the rotation or leave it; says whether it has answered."""
        asking = replica.asked.soon()
        await asyncio.wait({asking}, timeout=_LOOK_TIMEOUT)
        if not _has_answer(asking):
            error = asking.exception() if asking.done() and not asking.cancelled() else None
            replica.cut()
            self._leave(replica, "it does not answer" if error is None else f"it cannot be asked: {error}")
            return False
        self._judge(replica, asking.result())
        return True

    def _judge(self, replica: "Replica", said: Replayed) -> None:
        replica.lag = self._history.lag_of(said.position)
        if not said.is_replica:
            self._leave(replica, "it is no replica (any more): it takes writes of its own")
        elif self._history and replica.lag is None:
            self._leave(
                replica, "it has not replayed what the primary had when it was first looked at, or follows another one"
            )
        elif (replica.lag or 0.0) > self._max_lag:
            self._leave(replica, f"it lags by {replica.lag:.1f} s")
        elif not replica.in_rotation:
            replica.in_rotation, replica.reason = True, ""
            self._rotation = [one for one in self._replicas if one.in_rotation]
            logger.info("replica %s is read from", replica.name)

    def _leave(self, replica: "Replica", reason: str) -> None:
        is_news = replica.in_rotation or replica.reason == _UNSEEN
        replica.in_rotation, replica.reason = False, reason
        self._rotation = [one for one in self._replicas if one.in_rotation]
        if is_news:
            logger.warning("replica %s is not read from: %s", replica.name, reason)

    async def _watch(self) -> None:
        await asyncio.gather(self._watch_primary(), *[self._watch_replica(replica) for replica in self._replicas])

    async def _watch_primary(self) -> None:
        while True:
            await self._sample()
            await asyncio.sleep(_LOOK_AGAIN)

    async def _watch_replica(self, replica: "Replica") -> None:
        failures = 0
        while True:
            if failures:
                longest = min(_LOOK_AGAIN * 2 ** (failures - 1), _LONGEST_BACKOFF)
                await asyncio.sleep(random.uniform(longest / 2, longest))  # noqa: S311 - jitter, not a secret
            else:
                await asyncio.sleep(_LOOK_AGAIN_AT_ONCE)
                with suppress(TimeoutError):
                    await asyncio.wait_for(replica.suspected.wait(), _LOOK_AGAIN - _LOOK_AGAIN_AT_ONCE)
            replica.suspected.clear()
            try:
                failures = 0 if await self._look_at(replica) else min(failures + 1, 10)
            except Exception as error:  # noqa: BLE001 - say, a logging filter's; it is looked at again
                told = {"message": f"replica {replica.name} could not be looked at", "exception": error}
                asyncio.get_running_loop().call_exception_handler(told)


class Replica:
    """One replica: its pool, what is known of it, and who waits for it."""

    def __init__(self, name: str, session: SQLAlchemySession, probe: SQLAlchemySession) -> None:
        self.name = name
        self.session = session
        self.probe = probe
        self.pool: ConnectionPool = session.pool
        self._patience = session.dialect.patience
        self.pool.server = name
        self.in_rotation = False
        self.reason = _UNSEEN
        self.lag: float | None = None
        self.reads = 0
        self.position: Position | None = None
        """What it is known to have replayed, for connections that were open at ``position_at``."""
        self.position_at = -math.inf
        self.asked: _Shared[Replayed]
        self.suspected: asyncio.Event
        self.cuts = 0
        """How often everybody had to leave it."""
        self._waiting: set[asyncio.Timeout] = set()
        self._acquire = session._acquire
        session._acquire = self.acquire  # type: ignore[method-assign]

    def begin(self) -> None:
        """Be ready to be looked at, in the event loop that runs now."""
        self.asked, self.suspected = _Shared(self._ask), asyncio.Event()

    async def _ask(self) -> Replayed:
        at = time.monotonic()
        said: Replayed = await self.probe.look(self.probe.dialect.replayed)
        self._learn(said, at)
        return said

    def _learn(self, said: Replayed, at: float) -> None:
        if said.is_replica and said.position is not None and at > self.position_at:
            self.position, self.position_at = said.position, at

    def forget(self) -> None:
        """Know nothing of it: it may be restarted, further back."""
        self.position, self.position_at, self.lag = None, -math.inf, None

    def cut(self) -> None:
        """End every call that is on it or waits for a connection, and replace the connections."""
        self.cuts += 1
        self.forget()
        self.pool.renew()
        self.pool.cancel_calls()
        now = asyncio.get_running_loop().time()
        for bound in tuple(self._waiting):
            bound.reschedule(now)
        self._waiting.clear()

    async def acquire(self) -> PooledConnection:
        """Return a connection, or raise ``ConnectionLostError`` as soon as the replica is cut."""
        try:
            async with asyncio.timeout(None) as bound:
                self._waiting.add(bound)
                try:
                    return await self._acquire()
                finally:
                    self._waiting.discard(bound)
        except TimeoutError:
            raise has_left() from None

    async def perform(self, operation: Operation, statement: Any, arguments: Any, wanted: Position | None) -> Any:
        """Run a single read on a connection that is as far as wanted; once, since the primary serves as well."""
        self.reads += 1
        pool = self.pool
        connection = pool.take() or await self.acquire()
        try:
            connection.start_clock(self._patience)
            if wanted is not None and connection.opened_at >= self.position_at:
                turn = connection.turn
                await self.check(connection, wanted)
                connection.next_statement(turn)
            answer = await operation(connection, statement, arguments)
        except Exception as error:
            failure = self.session._give_back_after(connection, error, statement)
            if failure is error:
                raise
            raise failure from driver_error(error)
        except BaseException as error:
            pool.mend(connection)
            if connection.ran_out_of_time(error):
                raise out_of_time() from None
            raise
        pool.release(connection)
        return answer

    async def iterate(
        self, operation: Iteration, statement: Any, arguments: Any, wanted: Position | None
    ) -> AsyncGenerator[Any, None]:
        """Run a streamed read on a connection that is as far as wanted."""
        self.reads += 1
        cuts = self.cuts

        async def assured(connection: PooledConnection, statement: Any, arguments: Any) -> AsyncGenerator[Any, None]:
            if wanted is not None:
                await self.check(connection, wanted)
            async with aclosing(operation(connection, statement, arguments)) as batches:
                async for batch in batches:
                    yield batch
                    if self.cuts != cuts:
                        raise has_left()

        async with aclosing(self.session.iterate(assured, statement, arguments)) as batches:
            async for batch in batches:
                yield batch

    async def check(self, connection: PooledConnection, wanted: Position) -> None:
        """Make sure that what a connection leads to is as far: one that was opened since it last said so may not be.

        Raises:
            ConnectionLostError: it is not.
        """
        if connection.opened_at >= self.position_at:
            at = time.monotonic()
            said: Replayed = await self.probe.dialect.replayed(connection, None, None)
            self._learn(said, at)
            if not (said.is_replica and said.position is not None and includes(said.position, wanted)):
                raise ConnectionLostError("the replica is further back than it was")


class _WritingUnit(SQLAlchemyTransaction):
    """A unit of work on the primary; once its COMMIT was sent, its context has written."""

    def __init__(self, replicas: ReplicaSet, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._replicas = replicas

    async def commit(self) -> None:
        try:
            await super().commit()
        finally:
            self._replicas.note_write()


class _ReadingUnit(SQLAlchemyTransaction):
    """A read-only unit of work: on one replica to its end, or on the primary."""

    def __init__(self, replicas: ReplicaSet, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._replicas = replicas
        self._replica: Replica | None = None
        self._wanted: Position | None = None
        self._cuts = 0

    async def begin(self) -> PooledConnection:
        replica, self._wanted = await self._replicas.choose()
        if replica is not None:
            begun, on_primary = time.monotonic(), (self._pool, self._dialect)
            self._replica, self._pool, self._dialect = replica, replica.pool, replica.session.dialect
            self._cuts = replica.cuts
            replica.reads += 1
            try:
                return await super().begin()
            except (BuildingBlocksError, RuntimeError) as error:
                self._replica, (self._pool, self._dialect) = None, on_primary
                self._replicas.check_may_repeat(replica, error, begun)
        return await super().begin()

    async def _take(self) -> PooledConnection:
        if self._replica is None:
            return await super()._take()
        connection = self._pool.take() or await self._replica.acquire()
        if self._wanted is not None:
            self._connection = connection
            try:
                # Before BEGIN: what is replayed after the transaction's snapshot is not in it.
                self.start_clock()
                await self._replica.check(connection, self._wanted)
            except BaseException as error:
                self._pool.mend(connection)
                if connection.ran_out_of_time(error):
                    raise out_of_time() from None
                if not isinstance(error, Exception):
                    raise
                failure = self.translate(error, None)
                if failure is error:
                    raise
                raise failure from driver_error(error)
        return connection

    def start_clock(self) -> None:
        if self._replica is not None and self._replica.cuts != self._cuts:
            raise has_left()
        super().start_clock()

    async def commit(self) -> None:
        with suppress(CommitOutcomeUnknownError):  # everything was read, and there is nothing to keep
            await super().commit()


class _Shared(Generic[Answer]):
    """One question for all who ask at once: whoever comes while it is on the way gets the answer to the next one."""

    def __init__(self, ask: Callable[[], Awaitable[Answer]]) -> None:
        self._ask = ask
        self._asking: asyncio.Task[Answer] | None = None
        self._next: asyncio.Task[Answer] | None = None

    def soon(self) -> "asyncio.Task[Answer]":
        """Return the answer to a question that is asked from now on."""
        if self._next is None or self._next.done():
            # In a context of its own: nobody's deadline bounds what others wait for as well.
            self._next = asyncio.get_running_loop().create_task(self._ask_after(self._asking), context=Context())
            self._next.add_done_callback(_seen)
        return self._next

    async def _ask_after(self, before: "asyncio.Task[Answer] | None") -> Answer:
        if before is not None and not before.done():
            await asyncio.wait({before})
        self._asking, self._next = self._next, None
        return await self._ask()


def _has_answer(task: asyncio.Task[Any]) -> bool:
    return task.done() and not task.cancelled() and task.exception() is None


def _seen(task: asyncio.Task[Any]) -> None:
    if not task.cancelled():
        task.exception()  # marks it as seen, whoever has stopped waiting


class _History:
    """How far the primary was, and when, for the last minutes."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, Position]] = deque()

    def __bool__(self) -> bool:
        return bool(self._samples)

    def add(self, at: float, position: Position) -> None:
        """Remember that the primary was so far."""
        samples = self._samples
        if samples:
            since, last = samples[-1]
            if not includes(position, last):
                samples.clear()  # another primary, whose log goes on from somewhere else
            elif includes(last, position):
                return
            elif at - since < _SAMPLE and len(samples) > 1:
                samples[-1] = since, newest(last, position)
                return
        samples.append((at, position))
        while len(samples) > 2 and samples[1][0] < at - _HISTORY:
            samples.popleft()

    def lag_of(self, position: Position | None) -> float | None:
        """Return for how many seconds the primary has been further; None: longer than is remembered."""
        ahead = None
        for at, passed in reversed(self._samples):
            if position is not None and includes(position, passed):
                return 0.0 if ahead is None else time.monotonic() - ahead
            ahead = at
        return None


def name_of(url: sa.URL) -> str:
    """Return what a replica is called: its host and port, or its file."""
    return f"{url.host}:{url.port}" if url.host and url.port else url.host or str(url.database)


def has_left() -> ConnectionLostError:
    """Return what a call raises that a replica does not answer any more."""
    return ConnectionLostError("the replica that was being read does not answer any more")
