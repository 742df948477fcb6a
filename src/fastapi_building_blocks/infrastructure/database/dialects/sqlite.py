"""SQLite, with aiosqlite: one thread a connection, one hop to it a call."""

import asyncio
import sqlite3
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any
from weakref import WeakSet

import sqlalchemy as sa
from sqlalchemy.dialects import sqlite
from sqlalchemy.engine import URL
from sqlalchemy.ext.asyncio import AsyncEngine

from fastapi_building_blocks.domain.errors import (
    BuildingBlocksError,
    ConnectionLostError,
    ConstraintError,
    DeadlockError,
    DuplicateKeyError,
    ForeignKeyError,
    InvalidInputError,
    SerializationError,
    StatementTimeoutError,
    UnavailableError,
    UnsupportedOperationError,
)
from fastapi_building_blocks.domain.query import Operator
from fastapi_building_blocks.infrastructure.database.connections import PooledConnection

from .portable import Failure, PortableDialect, Row, lower_case, on_conflict

# https://www.sqlite.org/rescode.html
_BY_EXTENDED_CODE: dict[int, type[BuildingBlocksError]] = {
    sqlite3.SQLITE_CONSTRAINT_UNIQUE: DuplicateKeyError,
    sqlite3.SQLITE_CONSTRAINT_PRIMARYKEY: DuplicateKeyError,
    sqlite3.SQLITE_CONSTRAINT_ROWID: DuplicateKeyError,
    sqlite3.SQLITE_CONSTRAINT_FOREIGNKEY: ForeignKeyError,
    sqlite3.SQLITE_CONSTRAINT_TRIGGER: ForeignKeyError,
    sqlite3.SQLITE_BUSY_SNAPSHOT: SerializationError,
}
_BY_CODE: dict[int, type[BuildingBlocksError]] = {
    sqlite3.SQLITE_CONSTRAINT: ConstraintError,
    sqlite3.SQLITE_MISMATCH: ConstraintError,
    sqlite3.SQLITE_TOOBIG: ConstraintError,
    sqlite3.SQLITE_BUSY: DeadlockError,
    sqlite3.SQLITE_LOCKED: DeadlockError,
    sqlite3.SQLITE_INTERRUPT: StatementTimeoutError,
    sqlite3.SQLITE_READONLY: UnsupportedOperationError,
    sqlite3.SQLITE_CANTOPEN: ConnectionLostError,
    sqlite3.SQLITE_IOERR: UnavailableError,
    sqlite3.SQLITE_FULL: UnavailableError,
    sqlite3.SQLITE_NOTADB: ConnectionLostError,
    sqlite3.SQLITE_CORRUPT: UnavailableError,
}
_NAMES = {
    getattr(sqlite3, name): name for name in ("SQLITE_CANTOPEN", "SQLITE_NOTADB", "SQLITE_READONLY", "SQLITE_BUSY")
}
_REFUSALS = {
    "SQLITE_CANTOPEN": "the file cannot be opened",
    "SQLITE_NOTADB": "the file is not a database",
    "SQLITE_READONLY": "the file cannot be written",
}
_PRAGMAS = (
    "PRAGMA journal_mode = WAL",
    "PRAGMA synchronous = NORMAL",
    "PRAGMA foreign_keys = ON",
    "PRAGMA busy_timeout = 5000",
)
_PATIENCE = 0.1
"""Seconds that an interrupted statement may take to end by itself."""
_GLOB_SPECIALS = str.maketrans({"*": "[*]", "?": "[?]", "[": "[[]"})
_CLOSED = frozenset({"Connection closed", "no active connection", "Cannot operate on a closed database."})
"""What aiosqlite and Python say of a connection that is closed; they have no code for it."""


class _Cursor(sqlite3.Cursor):
    """A cursor that may be closed after its connection: SQLAlchemy would log that as an error."""

    def close(self) -> None:
        with suppress(sqlite3.ProgrammingError):
            super().close()


class _Connection(sqlite3.Connection):
    """A connection that can end what its cursors have begun, whoever holds them.

    A cursor that is not read to its end keeps its locks, after ROLLBACK and even after the connection is closed, until
    nobody holds it any more, not even the traceback of a cancelled task: https://www.sqlite.org/c3ref/close.html
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._cursors: WeakSet[sqlite3.Cursor] = WeakSet()

    def cursor(self, factory: Any = _Cursor) -> Any:
        cursor = super().cursor(factory)
        self._cursors.add(cursor)
        return cursor

    def undo(self) -> None:
        """Close every cursor, and end the transaction without keeping anything."""
        for cursor in tuple(self._cursors):
            cursor.close()
        self.rollback()

    def close(self) -> None:
        with suppress(sqlite3.Error):  # it is closed already, or was interrupted
            self.undo()
        super().close()


class SQLiteDialect(PortableDialect):
    """SQLite through the adapted cursor."""

    name = "sqlite"
    installs = "sqlite"
    insert_returning = True
    update_returning = True
    upsert_style = "on conflict"
    nulls_clause = True
    row_values = True
    transactional_ddl = True
    ends_statements = False
    largest_statement = 32_766
    default_isolation = "SERIALIZABLE"
    refusals = _REFUSALS

    def pool_size(self, url: URL, pool_size: int, max_overflow: int) -> tuple[int, int]:
        # Each connection to :memory: is a database of its own, and those to a shared cache do not wait for each
        # other's locks (SQLITE_LOCKED), so there is one, taken in turn.
        self.in_memory = url.database in (None, "", ":memory:") or url.query.get("mode") == "memory"
        return (1, 0) if self.in_memory else (pool_size, max_overflow)

    def engine_arguments(self, url: URL) -> dict[str, Any]:
        return {"connect_args": {"factory": _Connection}}

    def prepare(self, engine: AsyncEngine) -> None:
        @sa.event.listens_for(engine.sync_engine, "connect")
        def set_up(dbapi_connection: Any, _record: Any) -> None:
            # SQLite's own lower() knows ASCII only.
            dbapi_connection.create_function("unicode_lower", 1, _lower, deterministic=True)
            cursor = dbapi_connection.cursor()
            for pragma in _PRAGMAS:
                cursor.execute(pragma)
            cursor.close()

    async def begin(self, connection: PooledConnection, isolation: str | None, read_only: bool) -> None:
        # A deferred transaction that reads and then writes fails at once, whatever the busy timeout.
        if read_only:
            connection.info["query_only"] = True
            await self.command(connection, "PRAGMA query_only = ON")
            await self.command(connection, "BEGIN")
        else:
            await self.command(connection, "BEGIN IMMEDIATE")

    def interrupt(self, connection: PooledConnection) -> bool:
        driver = connection.driver
        if driver._connection is None:
            return False  # closed meanwhile
        driver._connection.interrupt()
        return True

    async def commit(self, connection: PooledConnection) -> None:
        await self.command(connection, "COMMIT")
        await self._writable(connection)

    async def rollback(self, connection: PooledConnection) -> None:
        if self.in_transaction(connection):  # SQLite ends it by itself after some errors
            await self.command(connection, "ROLLBACK")
        await self._writable(connection)

    async def _writable(self, connection: PooledConnection) -> None:
        if connection.info.pop("query_only", False):
            await self.command(connection, "PRAGMA query_only = OFF")

    def in_transaction(self, connection: PooledConnection) -> bool:
        driver = connection.driver
        try:
            return driver._connection is not None and bool(driver.in_transaction)
        except sqlite3.ProgrammingError:
            return False  # its thread has just closed it

    def is_dead(self, driver: Any) -> bool:
        return driver._connection is None

    async def recover(self, connection: PooledConnection) -> bool:
        # The thread finishes what it was given, or is stopped in it; the reset queues behind that. A cursor that nobody
        # could close may still hold an old snapshot, on which no write can begin. So a new connection takes over, but
        # for :memory:, where this one is the database.
        driver = connection.driver
        work = _reset if self.in_memory else _end
        reset = asyncio.ensure_future(driver._execute(work, driver._conn))
        await asyncio.wait({reset}, timeout=_PATIENCE)
        if not reset.done():
            driver._conn.interrupt()
        try:
            await reset
        except sqlite3.OperationalError:  # the interrupt reached the reset itself
            await driver._execute(work, driver._conn)
        connection.info.pop("query_only", None)
        return self.in_memory

    def error_code(self, error: BaseException) -> str | None:
        code = getattr(error, "sqlite_errorcode", None)
        # Of an extended code the last byte is the code: https://www.sqlite.org/rescode.html
        return None if code is None else _NAMES.get(code & 0xFF, str(code))

    def may_open_later(self, failure: Exception) -> bool:
        # A file that cannot be opened stays so; one that is locked, while another connection turns it to WAL, does not.
        return isinstance(failure, DeadlockError)

    def classify(self, error: BaseException, statement: Any) -> Failure | None:
        if isinstance(error, OverflowError):
            return Failure(InvalidInputError)
        code = getattr(error, "sqlite_errorcode", None)
        if code is None:
            is_closed = isinstance(error, ValueError | sqlite3.Error) and str(error) in _CLOSED
            return Failure(ConnectionLostError) if is_closed else None
        kind = _BY_EXTENDED_CODE.get(code) or _BY_CODE.get(code & 0xFF)
        if kind is None:
            return None
        subject = str(error).partition("constraint failed: ")[2]
        if subject.startswith("index "):
            return Failure(kind, subject.removeprefix("index ").strip("'"))
        if code & 0xFF == sqlite3.SQLITE_CONSTRAINT and code != sqlite3.SQLITE_CONSTRAINT_CHECK:
            return Failure(kind, columns=tuple(name.rpartition(".")[2] for name in subject.split(", ") if name))
        return Failure(kind, subject or None)

    def text_operand(self, operator: Operator, text: str | None) -> str | None:
        if operator is Operator.STARTS_WITH and text is not None:
            return text.translate(_GLOB_SPECIALS) + "*"
        return text

    def text_search(self, operator: Operator, column: Any, operand: Any) -> Any:
        # SQLite's LIKE does not regard the case of ASCII letters; GLOB and instr do.
        if operator is Operator.STARTS_WITH:
            return column.op("GLOB", is_comparison=True)(operand)
        if operator is Operator.ICONTAINS:
            column, operand = sa.func.unicode_lower(column), sa.func.unicode_lower(operand)
        return sa.func.instr(column, operand) > 0

    def upsert(
        self, table: sa.Table, row: Mapping[Any, Any], on: Sequence[str], written: Sequence[str], version: str | None
    ) -> Any:
        return on_conflict(sqlite.insert(table).values(row), row, on, written, version)

    def lock(self, query: Any, table: sa.Table, lock: str) -> Any:
        if lock not in ("update", "share"):
            raise UnsupportedOperationError(f"SQLite locks the whole database, so it has no {lock!r} for a row")
        return query  # a unit of work that may write holds the database's write lock since it began


def _lower(text: str | None) -> str | None:
    return lower_case(text) if isinstance(text, str) else text


def _reset(connection: _Connection) -> None:
    connection.undo()
    connection.execute("PRAGMA query_only = OFF")


def _end(connection: _Connection) -> None:
    """Close it in the same step: what its last user still sends would be kept after a ROLLBACK alone."""
    connection.undo()
    connection.close()


class AiosqliteDialect(SQLiteDialect):
    """SQLite on aiosqlite's thread: a statement and its rows in one hop."""

    async def _call(self, connection: PooledConnection, function: Callable[..., Any], *arguments: Any) -> Any:
        driver = connection.driver
        return await driver._execute(function, driver._conn, *arguments)

    async def fetch(self, connection: PooledConnection, statement: Any, arguments: Any) -> Sequence[Row]:
        return await self._call(connection, _fetch, statement.sql, arguments)  # type: ignore[no-any-return]

    async def execute(self, connection: PooledConnection, statement: Any, arguments: Any) -> int:
        return await self._call(connection, _execute, statement.sql, arguments)  # type: ignore[no-any-return]

    async def insert(self, connection: PooledConnection, statement: Any, arguments: Any) -> Any:
        return await self._call(connection, _insert, statement.sql, arguments)

    async def execute_many(self, connection: PooledConnection, statement: Any, rows: Sequence[Row]) -> int:
        return await self._call(connection, _execute_many, statement.sql, rows)  # type: ignore[no-any-return]

    async def command(self, connection: PooledConnection, sql: str) -> None:
        await self._call(connection, _command, sql)

    async def begin(self, connection: PooledConnection, isolation: str | None, read_only: bool) -> None:
        if read_only:
            connection.info["query_only"] = True
        await self._call(connection, _begin_reading if read_only else _begin_writing)

    async def batches(
        self, connection: PooledConnection, statement: Any, arguments: tuple[Any, int]
    ) -> AsyncGenerator[Sequence[Row], None]:
        values, size = arguments
        cursor = await self._call(connection, sqlite3.Connection.execute, statement.sql, values)
        try:
            while rows := await self._call(connection, _fetch_some, cursor, size):
                yield rows
        except asyncio.CancelledError:
            raise  # closing would wait for what was interrupted
        except BaseException:
            if connection.valid:  # given up meanwhile, it is closed and the cursor with it
                await connection.driver._execute(cursor.close)
            raise


def _fetch(connection: sqlite3.Connection, sql: str, arguments: Any) -> list[Any]:
    return connection.execute(sql, arguments).fetchall()


def _fetch_some(connection: sqlite3.Connection, cursor: sqlite3.Cursor, size: int) -> list[Any]:  # noqa: ARG001
    return cursor.fetchmany(size)


def _execute(connection: sqlite3.Connection, sql: str, arguments: Any) -> int:
    return connection.execute(sql, arguments).rowcount


def _insert(connection: sqlite3.Connection, sql: str, arguments: Any) -> int | None:
    return connection.execute(sql, arguments).lastrowid


def _execute_many(connection: sqlite3.Connection, sql: str, rows: Sequence[Row]) -> int:
    return connection.executemany(sql, rows).rowcount


def _command(connection: sqlite3.Connection, sql: str) -> None:
    connection.execute(sql)


def _begin_writing(connection: sqlite3.Connection) -> None:
    connection.execute("BEGIN IMMEDIATE")


def _begin_reading(connection: sqlite3.Connection) -> None:
    connection.execute("PRAGMA query_only = ON")
    connection.execute("BEGIN")
