"""A session on any database that SQLAlchemy speaks to, from a URL alone."""

import asyncio
import logging
import math
import random
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing, suppress
from itertools import count
from typing import TYPE_CHECKING, Any, Self
from weakref import WeakSet

import sqlalchemy as sa
from sqlalchemy.engine import URL, Connection, Result, make_url
from sqlalchemy.engine.base import OptionEngine
from sqlalchemy.exc import ArgumentError, InvalidRequestError, NoSuchModuleError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.util import greenlet_spawn

from fastapi_building_blocks.domain.errors import (
    BuildingBlocksError,
    ConnectionLostError,
    StatementTimeoutError,
    UnavailableError,
)

from .connections import ConnectionPool, PooledConnection, disconnected, not_connected
from .consistency import reads_from_primary
from .deadlines import deadline, seconds_left
from .dialects import PortableDialect, Timeouts, dialect_for
from .engine_clock import keep_time
from .observation import Observation, Observer
from .plain_types import adapt_dialect
from .session import DatabaseSession, Iteration, Operation, PoolStatus, TransactionBackend
from .settings import DatabaseSettings
from .sqlalchemy_errors import driver_error, out_of_time, outcome_unknown, translate, translate_commit, write_unknown
from .statement_kinds import is_opaque, is_read, may_write

if TYPE_CHECKING:
    from .replicas import ReplicaSet, ReplicaStatus

logger = logging.getLogger(__name__)

_ASYNC_DRIVERS = {
    "postgresql": ("asyncpg", "postgres"),
    "mysql": ("aiomysql", "mysql"),
    "mariadb": ("aiomysql", "mysql"),
    "sqlite": ("aiosqlite", "sqlite"),
    "mssql": ("aioodbc", "mssql"),
}
_EXTRAS = {"asyncmy": "asyncmy", **dict(_ASYNC_DRIVERS.values())}
_REPLAYS = 5
"""How often a statement is prepared anew when ALTER TABLE has made its plan stale."""
_REPLAY_PAUSE = 0.02
"""Seconds before the second of them; each later one waits as much longer."""
_ROLLBACK_TIMEOUT = 2.0
_LATE_ROLLBACK_TIMEOUT = 0.3
"""Seconds for a ROLLBACK when the deadline has passed; after that the connection is mended in the background."""
_LEAVE_TIMEOUT = 2.0
"""Seconds that the end of a stream may take whose consumer has left it early."""
_CONNECT_WINDOW = 60.0
_CONNECT_FIRST_DELAY = 0.2
_CONNECT_LONGEST_DELAY = 5.0
_START_PATIENCE = 2.0
"""Seconds that ``start()`` waits for a database that says nothing, or is being prepared."""
_START_LONGEST_DELAY = 2.0
"""Seconds from a database that is there to a service that has noticed, at most."""
_LOOK_TIMEOUT = 1.0
"""Seconds that a server may take to say how it is."""
_START_LOGS_ALL = 10
"""Attempts that are logged, each; of those that follow as many are left out between two."""


class _Ping:
    """The statement behind ``ping``."""

    sql = "SELECT 1"
    name = "ping"
    reads = True


class SQLAlchemySession(DatabaseSession):
    """Owns engine, pool and transactions of one database; made from its URL, with no I/O before ``connect()``.

    Args:
        url: for example ``postgresql+asyncpg://user:password@host:5432/name`` or ``sqlite+aiosqlite:///./file.db``.
        pool_size: connections that stay open.
        max_overflow: connections beyond those under load; never more than both together are open.
        pool_timeout: seconds that a caller waits for a connection (``PoolTimeoutError``).
        connect_timeout: seconds that opening one connection may take.
        connect_attempts: how often ``connect()`` tries before it gives up.
        statement_timeout: seconds that one statement may take (``StatementTimeoutError``), whether the database ends it,
            or does not answer any more and the session does.
        recycle: seconds after which a connection is replaced, the next time that nobody uses it; None: never.
        leak_threshold: seconds after which a held connection is logged, with the line that took it; None: never.
        shutdown_timeout: seconds that ``disconnect()`` waits for connections in use before it closes them all the same.
        replica_urls: read replicas, one server each, of the primary's kind and driver. Single reads and read-only units of
            work go to them, see ``docs/scaling-reads.md``; each has a pool like the primary's, and a connection more.
        max_lag: seconds that a replica may be behind and still be read from.
        consistency_wait: seconds that a read waits for a replica to have what its context has written; then it goes to the
            primary.
        pgbouncer: the URL leads to PgBouncer in transaction mode (PostgreSQL by asyncpg). Nothing is then prepared, set or
            locked on a connection beyond its transaction, and a statement costs one round trip more.
        portable: run everything on SQLAlchemy's adapted cursors, not on the driver itself; for finding out whether the
            fast path is to blame.

    Raises:
        ValueError: the URL is not one of an asynchronous driver, names no database or is not percent-encoded, a
            number makes no sense, a replica is of another kind, or ``pgbouncer`` is said of another database.
        ModuleNotFoundError: the driver is not installed; the message has the command.
    """

    def __init__(
        self,
        url: str | URL,
        *,
        pool_size: int = 5,
        max_overflow: int = 10,
        pool_timeout: float = 5.0,
        connect_timeout: float = 5.0,
        connect_attempts: int = 5,
        statement_timeout: float | None = 30.0,
        recycle: float | None = 1800.0,
        leak_threshold: float | None = 60.0,
        shutdown_timeout: float = 10.0,
        replica_urls: Sequence[str | URL] = (),
        max_lag: float = 10.0,
        consistency_wait: float = 0.1,
        pgbouncer: bool = False,
        portable: bool = False,
    ) -> None:
        _check_knobs(
            (pool_size, max_overflow, connect_attempts),
            (pool_timeout, connect_timeout, statement_timeout, recycle, leak_threshold, shutdown_timeout, max_lag),
        )
        if not 0 <= consistency_wait < math.inf:
            raise ValueError("consistency_wait is a number of seconds, 0 or more")
        self._url = _checked(url)
        self._connect_attempts = connect_attempts
        self._shutdown_timeout = shutdown_timeout
        self.dialect: PortableDialect = dialect_for(
            self._url, Timeouts(connect_timeout, statement_timeout), portable=portable, pgbouncer=pgbouncer
        )
        if self.dialect.needs_database_name and not (self._url.database or self._url.query.get("database")):
            raise ValueError(
                f"the database URL names no database; write it after the host: {self._url.drivername}://…/name"
            )
        self._is_connected = False
        self._connecting: asyncio.Future[None] | None = None
        self._starting: asyncio.Task[None] | None = None
        self._observation: Observation | None = None
        self.statements: dict[Any, Any] = {}
        """What repositories have compiled for this database, by repository class."""
        self.unlearned: WeakSet[Any] = WeakSet()
        """What they have compiled before it was known what the database can do."""
        size, overflow = self.dialect.pool_size(self._url, pool_size, max_overflow)
        try:
            # One pool whose connections rest in autocommit: a single statement is one round trip, and a
            # transaction is begun explicitly. No ping and no rollback on return: the pool's own rules replace them.
            self._engine: AsyncEngine = create_async_engine(
                self._url,
                poolclass=ConnectionPool,
                pool_size=size,
                max_overflow=overflow,
                pool_timeout=pool_timeout,
                isolation_level="AUTOCOMMIT",
                skip_autocommit_rollback=True,
                pool_reset_on_return=None,
                hide_parameters=True,
                **self.dialect.engine_arguments(self._url),
            )
        except ModuleNotFoundError as error:
            driver = self._url.get_driver_name()
            raise ModuleNotFoundError(
                f"the driver {driver} is not installed: "
                f"pip install 'fastapi-building-blocks[{_EXTRAS.get(driver, self.dialect.installs)}]'",
                name=error.name,
            ) from error
        except ImportError as error:
            raise ImportError(
                f"the driver {self._url.get_driver_name()} is installed, but a library of the system that it needs is "
                f"not ({error}); for SQL Server install unixODBC and an ODBC driver",
                name=error.name,
            ) from error
        adapt_dialect(self._engine.dialect)
        self.dialect.prepare(self._engine)
        self._pool: ConnectionPool = self._engine.sync_engine.pool  # type: ignore[assignment]
        self._pool.engine = self._engine.sync_engine
        self._pool.is_dead = self.dialect.is_dead
        self._pool.in_transaction = self.dialect.in_transaction
        self._pool.recover = self.dialect.recover
        self._pool.interrupt = self.dialect.interrupt
        self._pool.is_abandoned = self.dialect.is_abandoned
        self._pool.end_abandoned = self.dialect.end_abandoned
        self._pool.connect_timeout = connect_timeout
        # In memory, the connection is the database.
        self._pool.recycle = math.inf if recycle is None or self.dialect.in_memory else recycle
        self._pool.leak_threshold = math.inf if leak_threshold is None else leak_threshold
        self._patience = self.dialect.patience
        keep_time(self._engine.sync_engine, self._pool, self.dialect)
        self._engine.sync_engine._option_cls = _UsersEngine
        self._users_engine = self._engine.execution_options(isolation_level=self.dialect.default_isolation)
        self._replicas: "ReplicaSet | None" = None  # noqa: UP037 - the import below makes the name a local one
        if replica_urls:

            def alike(place: URL, looks: bool) -> SQLAlchemySession:
                """Return a session for another of the servers; one that only looks has little patience."""
                return SQLAlchemySession(
                    place,
                    pool_size=1 if looks else pool_size,
                    max_overflow=2 if looks else max_overflow,
                    pool_timeout=_LOOK_TIMEOUT if looks else pool_timeout,
                    connect_timeout=min(connect_timeout, _LOOK_TIMEOUT) if looks else connect_timeout,
                    statement_timeout=_LOOK_TIMEOUT if looks else statement_timeout,
                    recycle=recycle,
                    leak_threshold=leak_threshold,
                    shutdown_timeout=shutdown_timeout,
                    pgbouncer=pgbouncer,
                    portable=portable,
                )

            # It is made of sessions: at the top of the module this import would go round in a circle.
            from .replicas import ReplicaSet  # noqa: PLC0415

            places = [_checked_replica(place, self._url) for place in replica_urls]
            self._replicas = ReplicaSet(self, alike, places, max_lag, consistency_wait)

    @classmethod
    def from_settings(cls, settings: DatabaseSettings) -> Self:
        """Return a session with the knobs of ``DATABASE_*``."""
        return cls(**settings.model_dump())

    @property
    def is_connected(self) -> bool:
        """Whether the database was reached, and ``disconnect()`` not called since."""
        return self._is_connected

    def __repr__(self) -> str:
        place = self._url.set(query={})  # there may be a password in the query
        return f"{type(self).__name__}({place.render_as_string(hide_password=True)!r})"

    @property
    def dialect_name(self) -> str:
        return self._url.get_backend_name()

    @property
    def engine(self) -> AsyncEngine:
        """An ordinary SQLAlchemy engine on the session's own pool, for what is not a repository's business.

        Its errors are SQLAlchemy's, but for calls that take longer than ``statement_timeout`` or the deadline around them
        (``StatementTimeoutError``, and ``CommitOutcomeUnknownError`` for COMMIT).
        """
        return self._users_engine

    # Lifecycle

    async def connect(self) -> None:
        """Open the first connection, trying again with growing random delays while the server is not there.

        A refused login, an unknown database and a file that cannot be opened are not tried again. A session that is
        connected stays as it is.

        Raises:
            ConnectionLostError: it could not be reached in ``connect_attempts``, or refused the user or database.
            RuntimeError: ``start()`` is connecting the session, it was disconnected meanwhile, or it is connected in
                another event loop.
        """
        await self._others_connecting()
        if self._starting is not None:
            raise RuntimeError("start() is connecting the session already")
        if self._is_connected:
            return
        self._connecting = connecting = asyncio.get_running_loop().create_future()
        reservation = self._pool.reserve(not_connected)
        try:
            with self._pool.entered():
                await self._keep_trying(reservation)
                if self._replicas is not None:
                    await self._replicas.start()
            if not self._pool.admit(reservation):
                raise disconnected()
        except BaseException:
            self._is_connected = False
            if self._replicas is not None:
                await self._replicas.stop()
            await self._pool.drain()
            raise
        finally:
            self._connecting = None
            connecting.set_result(None)

    async def _others_connecting(self) -> None:
        """Wait until no other call of ``connect()`` is on its way."""
        self._pool.check_loop()
        while self._connecting is not None:
            await asyncio.wait({self._connecting})

    async def _keep_trying(self, reservation: object) -> None:
        """Open the first connection, in ``connect_attempts``."""
        give_up = time.monotonic() + _CONNECT_WINDOW
        for attempt in count(1):
            try:
                await self._open_first()
                return
            except Exception as error:  # noqa: BLE001 - translate() knows which of them are the database's
                if not self._pool.is_reserved(reservation):
                    raise disconnected() from None
                longest = min(_CONNECT_FIRST_DELAY * 2**attempt, _CONNECT_LONGEST_DELAY)
                # At least half of it: so many attempts are meant to last for some time.
                delay = random.uniform(longest / 2, longest)  # noqa: S311 - jitter, not a secret
                is_last = attempt == self._connect_attempts or time.monotonic() + delay > give_up
                if is_last or not self._may_mend(error):
                    raise self._cannot_connect(error, attempt) from driver_error(error)
                self._log_attempt(error, f"{attempt} of {self._connect_attempts}", delay)
                await asyncio.sleep(delay)

    async def start(self, prepare: Callable[[], Awaitable[object]] | None = None) -> None:
        """Connect now, or in the background for as long as it takes: a service may start before its database.

        It waits two seconds at most for what is known by then. A server that is there and refuses the login, or has no
        such database, fails the start, because that is a wrong setting. One that is not there is tried again with
        growing random delays ("full jitter") of two seconds at most; if it then comes up and refuses, that is logged
        and tried again, since servers are often reachable before they are set up. Meanwhile every call raises
        ``UnavailableError``. A second call while the first goes on changes nothing.

        Args:
            prepare: awaited once the database is there and before anybody else uses it: to migrate it, say. It is
                awaited again if the database goes away meanwhile. Any other failure of it is final: it fails the start,
                or, in the background, is logged and leaves the session unavailable.

        Raises:
            ConnectionLostError: the server refused the user or the database.
            RuntimeError: it is connected in another event loop.
        """
        await self._others_connecting()
        if self._starting is not None:
            return
        if self._is_connected:
            if prepare is not None:
                await prepare()
            return
        known: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        reservation = self._pool.reserve(_not_there_yet)
        self._starting = asyncio.create_task(self._keep_starting(prepare, known, reservation))
        try:
            await asyncio.wait({known}, timeout=_START_PATIENCE)
            if known.done():
                known.result()
            else:
                known.cancel()
        except BaseException:
            await self.disconnect()
            raise

    async def _keep_starting(
        self, prepare: Callable[[], Awaitable[object]] | None, known: "asyncio.Future[None]", reservation: object
    ) -> None:
        """Connect, prepare, and let everybody in; ``known`` is what ``start()`` waits for."""
        for attempt in count(1):
            if not self._pool.is_reserved(reservation):
                return  # a preparation has outlived disconnect()
            is_there = False
            try:
                with self._pool.entered():
                    await self._open_first()
                    is_there = True
                    if prepare is not None:
                        await _uncancelled(prepare())
                break
            except Exception as error:  # noqa: BLE001 - whatever a service's own code raises
                if self._is_final(error, is_there, known):
                    self._fail_start(error if is_there else self._cannot_connect(error, attempt), known)
                    return
                longest = min(_CONNECT_FIRST_DELAY * 2 ** min(attempt, 10), _START_LONGEST_DELAY)
                delay = random.uniform(0, longest)  # noqa: S311 - jitter, not a secret
                if attempt <= _START_LOGS_ALL or attempt % _START_LOGS_ALL == 0:
                    self._log_attempt(error, str(attempt), delay)
            _settle(known)
            await asyncio.sleep(delay)
        if attempt > 1:
            logger.info("%s is there, at attempt %d", self._place(), attempt)
        await self._let_everybody_in(reservation)
        _settle(known)

    async def _let_everybody_in(self, reservation: object) -> None:
        if self._replicas is not None:
            await self._replicas.start()
        if self._pool.admit(reservation):
            self._starting = None
        elif self._replicas is not None:
            await self._replicas.stop()

    def _is_final(self, error: Exception, is_there: bool, known: "asyncio.Future[None]") -> bool:
        """Whether to give up: after a failed preparation, or while ``start()`` can still say what is wrong."""
        if is_there:
            return not isinstance(translate(error, self.dialect), UnavailableError)
        return not known.done() and not self._may_mend(error)

    def _fail_start(self, error: Exception, known: "asyncio.Future[None]") -> None:
        if not known.done():
            known.set_exception(error)
            return
        # Without its message, which may hold SQL and values.
        reason = error.detail if isinstance(error, BuildingBlocksError) else _reason(error, self.dialect)
        self._is_connected, self._starting = False, None
        logger.error("preparing %s failed (%s); it stays unavailable", self._place(), reason)

    async def _open_first(self) -> None:
        connection = await self._pool.acquire()
        if not self._is_connected:
            self.dialect.learn(self._engine)
            for statements in self.unlearned:
                statements.forget()
            self.unlearned.clear()
            self._is_connected = True
        self._pool.release(connection)

    async def disconnect(self) -> None:
        """Close the pool; what is in use may finish within ``shutdown_timeout``, and is then closed all the same.

        It always ends, a second after that at the latest. A unit of work that was cut off has kept nothing.
        """
        self._is_connected = False
        end = time.monotonic() + self._shutdown_timeout
        starting, self._starting = self._starting, None
        if starting is not None:
            starting.cancel()
            await asyncio.wait({starting}, timeout=self._shutdown_timeout)
        closing = [] if self._replicas is None else [asyncio.create_task(self._replicas.stop())]
        late = await self._pool.drain(max(0.0, end - time.monotonic()))
        if late:
            logger.warning(
                "%d connections to %s were still in use after %g s, and are closed",
                late,
                self._place(),
                self._shutdown_timeout,
            )
        await asyncio.gather(*closing)
        await self._engine.dispose()

    async def __aenter__(self) -> Self:
        await self.connect()
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.disconnect()

    async def ping(self) -> None:
        """Ask the database for a sign of life.

        Raises:
            UnavailableError, DeadlineExceededError: there is none within ``connect_timeout``.
        """
        with deadline(self.dialect.timeouts.connect), reads_from_primary():
            await self.perform(self.dialect.fetch, _Ping, ())

    def pool_status(self) -> PoolStatus:
        """Return how many connections there are, lent and idle, and how many tasks wait for one; to the primary."""
        pool = self._pool
        return PoolStatus(pool.size(), pool.checkedout(), pool.checkedin(), pool.waiting())

    def replica_status(self) -> "list[ReplicaStatus]":
        """Return of each replica whether it is read from, how far it is behind, and how much it has to do."""
        return [] if self._replicas is None else self._replicas.status()

    def observe(self, observer: Observer) -> None:
        """Have ``observer`` called after every statement, in the task that sent it, with a ``StatementEvent``.

        That includes what SQLAlchemy runs, on ``session.engine`` as well. An observer that raises is logged.
        """
        if self._observation is None:
            self._observation = Observation(self.dialect, self._engine.sync_engine)
        self._observation.add(observer)
        for replica in [] if self._replicas is None else self._replicas.sessions():
            replica.observe(observer)

    async def create_tables(self, metadata: sa.MetaData) -> None:
        """Create the tables that do not exist; for tests and demos, migrations are Alembic's."""
        async with self.engine.begin() as connection:
            await connection.run_sync(metadata.create_all)

    def _may_mend(self, error: Exception) -> bool:
        return self.dialect.may_open_later(translate(error, self.dialect))

    def _cannot_connect(self, error: Exception, attempt: int) -> ConnectionLostError:
        reason = _reason(error, self.dialect)
        return ConnectionLostError(f"cannot connect to {self._place()}: {reason} (attempt {attempt})")

    def _log_attempt(self, error: Exception, attempt: str, delay: float) -> None:
        level, what = (logging.WARNING, "does not answer") if self._may_mend(error) else (logging.ERROR, "refuses")
        logger.log(
            level,
            "%s %s (%s); attempt %s, next in %.1f s",
            self._place(),
            what,
            _reason(error, self.dialect),
            attempt,
            delay,
        )

    def _place(self) -> str:
        url = self._url
        if url.host is None:
            return f"{self.dialect_name} {url.database or 'in memory'}"
        port = url.port or self.dialect.default_port
        return f"{self.dialect_name} at {url.host}{f':{port}' if port else ''}"

    # What replicas are made of

    @property
    def pool(self) -> ConnectionPool:
        """The pool that everything of the session runs on."""
        return self._pool

    def open_pool(self) -> None:
        """Lend connections without having made one: a server that is not there is not the caller's first concern."""
        self._pool.reopen()

    async def look(self, operation: Operation) -> Any:
        """Run an operation that asks the server about itself, on a first connection if need be."""
        if not self._is_connected:
            try:
                await self._open_first()
            except Exception as error:  # noqa: BLE001 - translate() knows which of them are the database's
                raise ConnectionLostError(_reason(error, self.dialect)) from driver_error(error)
        return await self.perform(operation, _Ping, ())

    # What repositories run on

    async def perform(self, operation: Operation, statement: Any, arguments: Any) -> Any:
        connection = self._pool.take()
        if connection is None:
            connection = await self._acquire()
        try:
            connection.start_clock(self._patience)
            answer = await operation(connection, statement, arguments)
        except Exception as error:
            failure = self._give_back_after(connection, error, statement)
            if self._may_replay(failure, error, statement):
                return await self._replay(operation, statement, arguments, _REPLAYS)
            if isinstance(failure, ConnectionLostError) and may_write(statement):
                failure = write_unknown()  # a statement outside a transaction is its own COMMIT
            if failure is error:
                raise
            raise failure from driver_error(error)
        except BaseException as error:
            self._pool.mend(connection)
            if connection.ran_out_of_time(error):
                raise (write_unknown() if may_write(statement) else out_of_time()) from None
            raise
        self._pool.release(connection)
        return answer

    def _may_replay(self, failure: Exception, error: Exception, statement: Any) -> bool:
        """Whether a single statement may run on another connection: a read of a dead one, or any of a stale plan."""
        if isinstance(failure, ConnectionLostError):
            return is_read(statement) and not is_opaque(statement)
        return self.dialect.plan_is_stale(driver_error(error))

    async def _replay(self, operation: Operation, statement: Any, arguments: Any, replays: int) -> Any:
        """Run a single statement once more, and again while its table keeps changing."""
        connection = await self._acquire()
        try:
            connection.start_clock(self._patience)
            answer = await operation(connection, statement, arguments)
        except Exception as error:  # noqa: BLE001 - translate() knows which of them are the database's
            failure = self._give_back_after(connection, error, statement)
            if replays > 1 and self.dialect.plan_is_stale(driver_error(error)):
                await asyncio.sleep(_REPLAY_PAUSE * (_REPLAYS - replays + 1))
                return await self._replay(operation, statement, arguments, replays - 1)
            if isinstance(failure, ConnectionLostError) and may_write(statement):
                failure = write_unknown()
            raise failure from driver_error(error)
        except BaseException as error:
            self._pool.mend(connection)
            if connection.ran_out_of_time(error):
                raise (write_unknown() if may_write(statement) else out_of_time()) from None
            raise
        self._pool.release(connection)
        return answer

    async def iterate(  # noqa: C901 - one loop, with an end for each way out of it
        self, operation: Iteration, statement: Any, arguments: Any
    ) -> AsyncGenerator[Any, None]:
        replays = _REPLAYS
        while True:
            connection = self._pool.take() or await self._acquire()
            begun = left = False
            self._pool.note_holder(connection)
            try:
                connection.start_clock(self._patience)
                async with aclosing(operation(connection, statement, arguments)) as batches:
                    async for batch in batches:
                        begun = True
                        connection.stop_clock()  # the consumer's time is its own
                        try:
                            yield batch
                        except GeneratorExit:
                            left = True  # the operation closes its cursor, which may mean to read what is left
                            connection.start_clock(_LEAVE_TIMEOUT, heeds_deadline=False)
                            raise
                        connection.start_clock(self._patience)
            except GeneratorExit:
                connection.intact = False  # the consumer left early; the operation has closed its cursor
                self._pool.release(connection)
                raise
            except Exception as error:
                failure = self._give_back_after(connection, error, statement)
                if left:
                    return  # the consumer has what it wanted
                if replays and not begun and self._may_replay(failure, error, statement):
                    await asyncio.sleep(_REPLAY_PAUSE * (_REPLAYS - replays))
                    replays = 0 if isinstance(failure, ConnectionLostError) else replays - 1
                    continue
                if failure is error:
                    raise
                raise failure from driver_error(error)
            except BaseException as error:
                self._pool.mend(connection)
                if connection.ran_out_of_time(error):
                    if left:
                        return
                    raise out_of_time() from None
                raise
            self._pool.release(connection)
            return

    async def _acquire(self) -> PooledConnection:
        try:
            return await self._pool.acquire()
        except Exception as error:
            failure = _not_opened(error, self.dialect)
            if failure is error:
                raise
            raise failure from driver_error(error)

    def _give_back_after(self, connection: PooledConnection, error: Exception, statement: Any) -> Exception:
        """Return the connection after an error, or give it up, and say what to raise."""
        connection.stop_clock()
        failure = translate(error, self.dialect, statement)
        if isinstance(failure, ConnectionLostError) or self.dialect.plan_is_stale(driver_error(error)):
            self._pool.discard(connection, distrust=True)
        elif isinstance(error, BuildingBlocksError) or (
            failure is not error and self.dialect.is_answer(driver_error(error))
        ):
            connection.intact = False
            self._pool.release(connection)
        else:
            self._pool.mend(connection)  # not an answer of the database: the call may have ended midway
        return failure

    def open_transaction(self, isolation: str | None, read_only: bool) -> TransactionBackend:
        self._pool.check_open()
        return SQLAlchemyTransaction(self._pool, self.dialect, self.dialect.check_isolation(isolation), read_only)

    # Any Core statement

    async def execute(self, statement: Any, parameters: Any = None) -> Any:
        if isinstance(parameters, list | tuple) and len(parameters) > 1:
            async with self.transaction() as unit:  # many rows are more than one statement: all or none
                return await unit.execute(statement, parameters)
        return await super().execute(statement, parameters)

    async def execute_on(self, connection: PooledConnection, statement: Any, parameters: Any) -> Any:
        connection.intact = False
        return await self.dialect.spawn(connection, self._run, connection, statement, parameters)

    def _run(self, connection: PooledConnection, statement: Any, parameters: Any) -> Any:
        # The Connection is never closed: that would end the transaction and return the connection.
        result = Connection(connection.pool.engine, connection).execute(statement, parameters)
        if not result.returns_rows:
            result.close()
            return result
        fetched: Result[Any] = result.freeze()()
        return fetched

    async def stream_on(
        self, connection: PooledConnection, statement: Any, parameters: Any
    ) -> AsyncGenerator[Any, None]:
        connection.intact = False
        turn = connection.turn
        own = self.dialect.streams_in_transaction and not self.dialect.in_transaction(connection)
        if own:
            await self.dialect.begin(connection, None, True)
        core = Connection(connection.pool.engine, connection).execution_options(stream_results=True)
        result = await self.dialect.spawn(connection, core.execute, statement, parameters)
        try:
            while rows := await self.dialect.spawn(connection, result.fetchmany, 1000):
                yield rows
        except asyncio.CancelledError:
            raise  # closing would wait for what was interrupted
        except BaseException:
            # The end of a unit has closed it with its connection.
            if result.cursor is not None and connection.turn == turn and connection.record.dbapi_connection is not None:
                await greenlet_spawn(result.close)
            raise
        if own:
            await self.dialect.commit(connection)


class _UsersConnection(Connection):
    """A connection of ``session.engine``; cancelled while it is made, it goes back to the pool.

    Some drivers set the isolation level by a statement, in SQLAlchemy's constructor. Interrupted there, the connection
    would be left to the garbage collector.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        try:
            super().__init__(*arguments, **options)
        except BaseException as error:
            made = getattr(self, "_dbapi_connection", None)
            if made is not None:
                pool: Any = self.engine.pool
                pool.give_up(made, error)
            raise


class _UsersEngine(OptionEngine):
    """``session.engine``, and what its ``execution_options`` makes."""

    _connection_cls = _UsersConnection


_UsersEngine._option_cls = _UsersEngine


class SQLAlchemyTransaction(TransactionBackend):
    """One connection, between BEGIN and its return to the pool."""

    def __init__(self, pool: ConnectionPool, dialect: PortableDialect, isolation: str | None, read_only: bool) -> None:
        self._pool = pool
        self._dialect = dialect
        self._isolation = isolation
        self._read_only = read_only
        self._connection: PooledConnection

    async def begin(self) -> PooledConnection:
        connection = await self._take()
        try:
            return await self._begin_on(connection)
        except ConnectionLostError:
            # Nothing was sent but BEGIN, to a connection that had died while idle: another one serves as well.
            return await self._begin_on(await self._take())

    async def _take(self) -> PooledConnection:
        try:
            return self._pool.take() or await self._pool.acquire()
        except Exception as error:
            failure = _not_opened(error, self._dialect)
            if failure is error:
                raise
            raise failure from driver_error(error)

    async def _begin_on(self, connection: PooledConnection) -> PooledConnection:
        self._connection = connection
        self._pool.note_holder(connection)
        try:
            self.start_clock()
            await self._dialect.begin(connection, self._isolation, self._read_only)
        except BaseException as error:
            self._pool.mend(connection)
            if connection.ran_out_of_time(error):
                raise out_of_time() from None
            if not isinstance(error, Exception):
                raise
            failure = self._translate(error)
            if failure is error:
                raise
            raise failure from driver_error(error)
        self.stop_clock()
        return connection

    def start_clock(self) -> None:
        self._connection.start_clock(self._dialect.patience)

    def start_last_clock(self) -> None:
        self._connection.start_clock(_LEAVE_TIMEOUT, heeds_deadline=False)

    def has_ended(self) -> bool:
        connection = self._connection
        if not self._dialect.transactional_ddl or self._dialect.is_dead(connection.driver):
            return False
        return not self._dialect.in_transaction(connection)

    def stop_clock(self) -> None:
        self._connection.stop_clock()

    def ran_out_of_time(self, error: BaseException) -> StatementTimeoutError | None:
        return out_of_time() if self._connection.ran_out_of_time(error) else None

    async def commit(self) -> None:
        if self._connection.record.dbapi_connection is None:
            self._pool.mend(self._connection)
            raise ConnectionLostError("the session was disconnected before the unit of work ended; nothing was kept")
        if self.has_ended():
            self._pool.mend(self._connection)
            raise RuntimeError("a COMMIT or ROLLBACK of its own ended the transaction before the unit of work did")
        try:
            self.start_clock()
            await self._dialect.commit(self._connection)
        except BaseException as error:
            self._pool.mend(self._connection)
            if self._connection.ran_out_of_time(error):
                raise outcome_unknown() from None
            if not isinstance(error, Exception):
                raise
            failure = translate_commit(error, self._dialect)
            if failure is error:
                raise
            raise failure from driver_error(error)
        self._pool.release(self._connection)

    async def rollback(self) -> None:
        try:
            patience = min(_ROLLBACK_TIMEOUT, max(seconds_left(), _LATE_ROLLBACK_TIMEOUT))
            self._connection.start_clock(patience, heeds_deadline=False)
            await self._dialect.rollback(self._connection)
        except BaseException as error:
            self._pool.mend(self._connection)
            if not (self._connection.ran_out_of_time(error) or isinstance(error, Exception)):
                raise
            logger.debug("ROLLBACK failed; the connection is given up", exc_info=True)
        else:
            self._pool.release(self._connection)

    def abandon(self) -> None:
        self._pool.mend(self._connection)

    async def savepoint(self, name: str) -> None:
        await self._dialect.savepoint(self._connection, name)

    async def release_savepoint(self, name: str) -> None:
        await self._dialect.release_savepoint(self._connection, name)

    async def rollback_to_savepoint(self, name: str) -> None:
        await self._dialect.rollback_to_savepoint(self._connection, name)

    def translate(self, error: Exception, statement: Any) -> Exception:
        failure = self._translate(error, statement)
        if failure is not error:
            failure.__cause__ = driver_error(error)
        return failure

    def _translate(self, error: Exception, statement: Any = None) -> Exception:
        failure = translate(error, self._dialect, statement)
        if isinstance(failure, ConnectionLostError) or self._dialect.plan_is_stale(driver_error(error)):
            self._pool.distrust(self._connection)
        return failure


def _checked(url: str | URL) -> URL:
    parsed = is_async = None
    with suppress(ArgumentError, NoSuchModuleError, ValueError, InvalidRequestError):
        parsed = make_url(url)
        is_async = parsed.get_dialect().is_async
    if parsed is None or is_async is None:
        # Not chained: SQLAlchemy's error quotes parts of the URL, the password among them.
        raise ValueError(
            "the database URL is not one that SQLAlchemy knows; expected for example "
            "postgresql+asyncpg://user:password@host:5432/name, mysql+aiomysql://…, mssql+aioodbc://… "
            "or sqlite+aiosqlite:///./file.db"
        )
    if parsed.host and "@" in f"{parsed.host}{parsed.database}":
        # Part of the password would pass for the host, and be shown as such.
        raise ValueError("percent-encode the user and password in the URL: there is an @ (%40) or a / (%2F) in them")
    if not is_async:
        name = parsed.get_backend_name()
        driver = _ASYNC_DRIVERS.get(name, ("an asynchronous driver", ""))[0]
        raise ValueError(f"{parsed.drivername}:// has no asynchronous driver; write {name}+{driver}://")
    return parsed


def _checked_replica(url: str | URL, primary: URL) -> URL:
    place = _checked(url)
    if place.drivername != primary.drivername:
        raise ValueError(
            f"a replica has its primary's kind and driver: {primary.drivername}://, not {place.drivername}://"
        )
    return place


def _check_knobs(numbers: tuple[int, int, int], seconds: tuple[float | None, ...]) -> None:
    pool_size, max_overflow, connect_attempts = numbers
    if pool_size < 1 or max_overflow < 0 or connect_attempts < 1:
        raise ValueError("pool_size and connect_attempts are at least 1, and max_overflow is not negative")
    if not all(value is None or 0 < value < math.inf for value in seconds):
        raise ValueError("a timeout is a number of seconds greater than 0")


def _not_there_yet() -> UnavailableError:
    return UnavailableError("the database is not available yet")


async def _uncancelled(work: Awaitable[object]) -> None:
    """Await it; if it is cancelled from within, that is a failure like any other."""
    try:
        await work
    except asyncio.CancelledError as cancelled:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise RuntimeError("the preparation of the database was cancelled") from cancelled


def _settle(known: "asyncio.Future[None]") -> None:
    if not known.done():
        known.set_result(None)


def _not_opened(error: Exception, dialect: PortableDialect) -> Exception:
    """Return the domain's error for one that the opening of a connection raised, whatever the database's reason."""
    failure = translate(error, dialect)
    if type(failure) is BuildingBlocksError:
        return ConnectionLostError("the database refused a connection")
    return failure


def _reason(error: Exception, dialect: PortableDialect) -> str:
    """Say why a connection could not be made, without anything that may hold a secret."""
    cause = driver_error(error)
    if isinstance(cause, TimeoutError) or isinstance(cause.__cause__, TimeoutError):
        return "no answer in time"
    if isinstance(cause, OSError):
        return cause.strerror or type(cause).__name__
    code = dialect.error_code(cause)
    if code is None:
        return type(cause).__name__
    return f"{dialect.refusal(cause) or type(cause).__name__} ({code})"
