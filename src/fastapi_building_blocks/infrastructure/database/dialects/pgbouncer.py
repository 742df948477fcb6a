"""PostgreSQL behind PgBouncer in transaction mode, where each transaction may run on another server connection.

Nothing may be left on a server connection for a later statement to find: no prepared statement, no setting.

- A statement is prepared unnamed and bound in one implicit transaction: asyncpg ends its Parse and Describe with Flush,
  not with Sync, so PgBouncer keeps the server connection until the answer. That holds for every version of PgBouncer,
  and the description of a row is never older than the row. Named statements that PgBouncer tracks
  (``max_prepared_statements``) would outlive ALTER TABLE there, and fail.
- Every BEGIN sets the statement timeout for its transaction, in the same packet. A statement of its own is timed here.
- What sends for long, COPY and batches, is in a transaction: PgBouncer releases a server connection whose COPY has
  failed, and would pass the rest of the rows to somebody else's.
"""

import asyncio
import math
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.engine import URL, ExceptionContext
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.util import await_

from fastapi_building_blocks.domain.errors import StatementTimeoutError
from fastapi_building_blocks.infrastructure.database.connections import PooledConnection

from .portable import Failure, Row
from .postgresql import AsyncpgDialect, PostgreSQLDialect

Answer = TypeVar("Answer")

_UNSETTLED = "unsettled"
"""Marks a connection on which a call has ended without the server's word that it is at rest."""

_SETTLE_TIMEOUT = 1.0
"""Seconds until an interrupted statement that PgBouncer has not passed on, or the server not ended, is given up."""


class _LateAnswerError(TimeoutError):
    """A statement of its own was not answered within the statement timeout."""


class PgBouncerDialect(PostgreSQLDialect):
    """The portable path behind PgBouncer."""

    keeps_sessions = False

    def engine_arguments(self, url: URL) -> dict[str, Any]:
        arguments = {
            "timeout": self.timeouts.connect,
            # Written as PostgreSQL reports it: PgBouncer compares the text, and would set it again for every transaction.
            "server_settings": {"client_encoding": "UTF8"},
            "statement_cache_size": 0,
            "prepared_statement_cache_size": 0,
            "connection_class": _connection_class(self.timeouts.statement),
        }
        return {"connect_args": arguments}

    def prepare(self, engine: AsyncEngine) -> None:
        super().prepare(engine)
        sa.event.listen(engine.sync_engine, "connect", _read_dates_as_iso)
        sa.event.listen(engine.sync_engine, "handle_error", self._note_core_error)

    async def spawn(self, connection: PooledConnection, function: Callable[..., Any], *arguments: Any) -> Any:
        return await self._timed(connection, super().spawn(connection, function, *arguments))

    async def command(self, connection: PooledConnection, sql: str) -> None:
        await connection.driver.execute(sql)

    async def begin(self, connection: PooledConnection, isolation: str | None, read_only: bool) -> None:
        # Timed as well: it waits for a server connection, and PgBouncer's own patience is two minutes.
        await self._timed(connection, super().begin(connection, isolation, read_only))

    async def execute_many(self, connection: PooledConnection, statement: Any, rows: Sequence[Row]) -> int:
        async with self._in_transaction(connection):
            return await super().execute_many(connection, statement, rows)

    async def upsert_many(self, connection: PooledConnection, statement: Any, rows: Sequence[Row]) -> int:
        async with self._in_transaction(connection):
            return await super().upsert_many(connection, statement, rows)

    async def insert_many(self, connection: PooledConnection, statement: Any, rows: Any) -> int:
        async with self._in_transaction(connection):
            return await super().insert_many(connection, statement, rows)

    @asynccontextmanager
    async def _in_transaction(self, connection: PooledConnection) -> AsyncIterator[None]:
        """Have a transaction around what is sent in pieces; after an error the pool rolls it back."""
        if connection.driver.is_in_transaction():
            yield
            return
        await self.begin(connection, None, False)
        yield
        await self.commit(connection)

    async def _timed(self, connection: PooledConnection, call: Coroutine[Any, Any, Answer]) -> Answer:
        """Await a call, outside a transaction for no longer than the statement timeout."""
        if connection.driver.is_in_transaction():
            return await call
        bound = asyncio.timeout(self.timeouts.statement)
        try:
            async with bound:
                return await call
        except Exception as error:
            if not self.is_answer(error):
                connection.info[_UNSETTLED] = True
            if bound.expired() and isinstance(error, TimeoutError):
                raise _LateAnswerError from error
            raise

    def _note_core_error(self, context: ExceptionContext) -> None:
        connection = context.connection
        if connection is not None and not connection.invalidated and not self.is_answer(context.original_exception):
            connection.info[_UNSETTLED] = True

    def in_transaction(self, connection: PooledConnection) -> bool:
        return _UNSETTLED in connection.info or super().in_transaction(connection)

    async def recover(self, connection: PooledConnection) -> bool:
        driver = connection.driver
        try:
            async with asyncio.timeout(_SETTLE_TIMEOUT):
                return await self._settle(connection)
        except TimeoutError:
            # PgBouncer forgets a statement that still waits for a server connection only when its client goes.
            driver.terminate()
            return False

    async def _settle(self, connection: PooledConnection) -> bool:
        driver = connection.driver
        if driver.is_closed():
            return False
        try:
            await driver.execute("SELECT 1")
        except Exception:
            if not driver.is_in_transaction():
                raise  # otherwise a transaction that has failed refuses everything but its end
        # One in doubt may have begun after its caller was gone. Closing it would cost PgBouncer the server connection.
        if driver.is_in_transaction():
            await driver.execute("ROLLBACK")
        connection.info.pop(_UNSETTLED, None)
        # A BEGIN that was cancelled makes asyncpg send SAVEPOINT next time. At rest, the connection may go.
        return not driver.is_in_transaction() and not driver.awaits_end_of_transaction

    def classify(self, error: BaseException, statement: Any) -> Failure | None:
        if isinstance(error, _LateAnswerError):
            return Failure(StatementTimeoutError)
        return super().classify(error, statement)


class AsyncpgPgBouncerDialect(PgBouncerDialect, AsyncpgDialect):
    """asyncpg's own connection behind PgBouncer."""

    async def fetch(self, connection: PooledConnection, statement: Any, arguments: Any) -> Sequence[Row]:
        return await self._timed(connection, super().fetch(connection, statement, arguments))

    async def execute(self, connection: PooledConnection, statement: Any, arguments: Any) -> int:
        return await self._timed(connection, super().execute(connection, statement, arguments))

    async def _read(
        self, connection: PooledConnection, statement: Any, arguments: tuple[Any, int]
    ) -> AsyncGenerator[Sequence[Row], None]:
        values, size = arguments
        # driver.cursor() would name the statement, and the name would stay on the server connection.
        prepared = await connection.driver.prepare(statement.sql)
        cursor = await prepared.cursor(*values)
        while rows := await cursor.fetch(size):
            yield rows


def _read_dates_as_iso(connection: Any, _record: Any) -> None:
    """Have dates as text in ISO order, which PostgreSQL does unless told otherwise; PgBouncer keeps track of it."""
    driver = connection.driver_connection
    if not str(getattr(driver.get_settings(), "DateStyle", "")).startswith("ISO"):
        await_(driver.execute("SET DateStyle = 'ISO'"))


def _connection_class(statement_timeout: float | None) -> type:
    """Return asyncpg's connection with a statement timeout (seconds) in every transaction, whoever begins it."""
    import asyncpg

    limit = (
        "" if statement_timeout is None else f"; SET LOCAL statement_timeout = {math.ceil(statement_timeout * 1000)}"
    )

    class PgBouncerConnection(asyncpg.Connection):  # type: ignore[misc]  # asyncpg ships no types
        """Sets for the transaction what a connection of PostgreSQL's own would have set for good."""

        @property
        def awaits_end_of_transaction(self) -> bool:
            """Whether asyncpg itself began a transaction, or tried to, and has not ended it."""
            return self._top_xact is not None

        async def execute(self, query: str, *arguments: Any, **options: Any) -> str:
            if query.startswith("BEGIN"):
                query = query.rstrip("; ") + limit
            status: str = await super().execute(query, *arguments, **options)
            return status

        async def _get_statement(self, *arguments: Any, **options: Any) -> Any:
            self._has_introspected = False
            statement = await super()._get_statement(*arguments, **options)
            if self._has_introspected:
                # That ended the implicit transaction, and the table may have changed since: an old description would
                # make something else of the new rows.
                statement = await super()._get_statement(*arguments, **options)
            return statement

        async def _introspect_types(self, *arguments: Any) -> Any:
            # It turns "jit" off and on again around its query: on two connections of the server, it would stay off.
            if self.is_in_transaction():
                return await super()._introspect_types(*arguments)
            async with self.transaction():
                types = await super()._introspect_types(*arguments)
            self._has_introspected = True
            return types

    return PgBouncerConnection
