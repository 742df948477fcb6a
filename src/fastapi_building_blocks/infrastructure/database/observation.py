"""Watching statements: what metrics, traces and slow logs are made of. Nothing is in the way while nobody watches."""

import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Engine

from .dialects import PortableDialect
from .engine_clock import LateCallError
from .sqlalchemy_errors import out_of_time, translate

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StatementEvent:
    """One statement that was sent to the database, after its answer came. It holds no parameters: they are secrets."""

    sql: str
    """The text as sent, with placeholders."""
    name: str
    """A repository's by table and shape (``users by key``), ``BEGIN``, ``COMMIT`` and the like, otherwise ``core``."""
    rows: int
    """How many rows came back or were touched; 0 where the database does not say, and for a stream of SQLAlchemy's."""
    seconds: float
    """From sending to the last row; of a stream without what its consumer took, of SQLAlchemy's until it can be read."""
    error: Exception | None = None
    """What the statement ended with, of the domain's tree where the database raised it."""
    server: str = "primary"
    """Where it was sent: ``primary``, or the host and port of a replica."""


Observer = Callable[[StatementEvent], None]

_COMMANDS = {
    "begin": "BEGIN",
    "commit": "COMMIT",
    "rollback": "ROLLBACK",
    "savepoint": "SAVEPOINT",
    "release_savepoint": "RELEASE SAVEPOINT",
    "rollback_to_savepoint": "ROLLBACK TO SAVEPOINT",
}


class Observation:
    """Tells observers of every statement of one session: repositories', units of work's and SQLAlchemy's own.

    Made with the first observer. It puts itself in front of the dialect's operations and listens to the engine, so
    that a session without observers runs neither.
    """

    def __init__(self, dialect: PortableDialect, engine: Engine) -> None:
        self._dialect = dialect
        self._observers: list[Observer] = []
        self._busy: set[Any] = set()  # connections with an operation on the way: what it is made of is not told again
        for operation in ("fetch", "execute", "insert", "execute_many", "insert_many", "upsert_many"):
            setattr(dialect, operation, self._watched(getattr(dialect, operation)))
        for operation, name in _COMMANDS.items():
            setattr(dialect, operation, self._watched_command(getattr(dialect, operation), name))
        dialect.batches = self._watched_batches(dialect.batches)  # type: ignore[method-assign]
        sa.event.listen(engine, "before_cursor_execute", self._core_begins)
        sa.event.listen(engine, "after_cursor_execute", self._core_ends)
        sa.event.listen(engine, "handle_error", self._core_fails)

    def add(self, observer: Observer) -> None:
        """Call ``observer`` with every event from now on."""
        self._observers.append(observer)

    def _tell(  # noqa: PLR0917 - the fields of an event, in their order
        self, connection: Any, sql: str, name: str, rows: int, seconds: float, error: Exception | None = None
    ) -> None:
        event = StatementEvent(sql, name, rows, seconds, error, connection.pool.server)
        for observer in self._observers:
            try:
                observer(event)
            except Exception:
                logger.exception("an observer of statements failed; the statement did not")

    def _failure(self, connection: Any, error: BaseException, statement: Any = None) -> Exception:
        if not isinstance(error, Exception):
            # On session.engine it is SQLAlchemy's own, which whoever cancels it has done for himself.
            is_late = getattr(connection, "is_late", False)
            return out_of_time() if is_late else InterruptedError("the call was cancelled")
        if isinstance(error, LateCallError):
            return error.failure
        return translate(error, self._dialect, statement)

    # The driver's path

    def _watched(self, operation: Callable[[Any, Any, Any], Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def watched(connection: Any, statement: Any, arguments: Any) -> Any:
            if connection in self._busy:
                return await operation(connection, statement, arguments)
            self._busy.add(connection)
            since = time.perf_counter()
            try:
                answer = await operation(connection, statement, arguments)
            except BaseException as error:
                failure, seconds = self._failure(connection, error, statement), time.perf_counter() - since
                self._tell(connection, statement.sql, statement.name, 0, seconds, failure)
                raise
            finally:
                self._busy.discard(connection)
            seconds = time.perf_counter() - since
            self._tell(connection, statement.sql, statement.name, _rows_in(operation, answer), seconds)
            return answer

        return watched

    def _watched_command(self, command: Callable[..., Awaitable[None]], name: str) -> Callable[..., Awaitable[None]]:
        async def watched(connection: Any, *arguments: Any) -> None:
            if connection in self._busy:
                return await command(connection, *arguments)
            since = time.perf_counter()
            try:
                await command(connection, *arguments)
            except BaseException as error:
                self._tell(connection, name, name, 0, time.perf_counter() - since, self._failure(connection, error))
                raise
            return self._tell(connection, name, name, 0, time.perf_counter() - since)

        return watched

    def _watched_batches(self, batches: Callable[..., AsyncGenerator[Any, None]]) -> Any:
        async def watched(connection: Any, statement: Any, arguments: Any) -> AsyncGenerator[Any, None]:
            self._busy.add(connection)
            rows, seconds, since = 0, 0.0, time.perf_counter()
            try:
                async with aclosing(batches(connection, statement, arguments)) as opened:
                    async for batch in opened:
                        rows += len(batch)
                        seconds += time.perf_counter() - since
                        yield batch
                        since = time.perf_counter()
            except GeneratorExit:
                self._tell(connection, statement.sql, statement.name, rows, seconds)  # the consumer left early
                raise
            except BaseException as error:
                seconds += time.perf_counter() - since
                self._tell(
                    connection,
                    statement.sql,
                    statement.name,
                    rows,
                    seconds,
                    self._failure(connection, error, statement),
                )
                raise
            finally:
                self._busy.discard(connection)
            self._tell(connection, statement.sql, statement.name, rows, seconds + time.perf_counter() - since)

        return watched

    # SQLAlchemy's path

    def _core_begins(self, _connection: Any, _cursor: Any, _sql: str, _values: Any, context: Any, _many: bool) -> None:
        context.observed_since = time.perf_counter()

    def _core_ends(self, connection: Any, cursor: Any, sql: str, _values: Any, context: Any, _many: bool) -> None:
        seconds = time.perf_counter() - context.observed_since
        # Of rows that are still to be read some drivers of MySQL say that they are 2 ** 64 - 1.
        rows = 0 if context._is_server_side else max(cursor.rowcount, 0)
        self._tell(connection.engine, sql, "core", rows, seconds)

    def _core_fails(self, failure: Any) -> None:
        since = getattr(failure.execution_context, "observed_since", None)
        if since is not None:
            seconds = time.perf_counter() - since
            self._tell(
                failure.engine,
                failure.statement,
                "core",
                0,
                seconds,
                self._failure(failure.connection.connection, failure.original_exception),
            )


def _rows_in(operation: Any, answer: Any) -> int:
    if operation.__name__ == "fetch":
        return len(answer)
    return 1 if operation.__name__ == "insert" else max(answer, 0)
