"""MySQL and MariaDB, with aiomysql or asyncmy."""

import asyncio
import math
import re
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from datetime import datetime
from decimal import Decimal
from functools import lru_cache, partial
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import mysql
from sqlalchemy.engine import URL, ExceptionContext
from sqlalchemy.ext.asyncio import AsyncEngine

from fastapi_building_blocks.domain.errors import (
    BuildingBlocksError,
    ConnectionLostError,
    ConstraintError,
    DeadlockError,
    DuplicateKeyError,
    ForeignKeyError,
    InvalidInputError,
    LockNotAvailableError,
    SerializationError,
    StatementTimeoutError,
    UnsupportedOperationError,
)
from fastapi_building_blocks.domain.query import Operator
from fastapi_building_blocks.infrastructure.database.connections import PooledConnection
from fastapi_building_blocks.infrastructure.database.consistency import Position

from .portable import Failure, PortableDialect, Replayed, Row

# https://mariadb.com/kb/en/mariadb-error-code-reference/ and
# https://dev.mysql.com/doc/mysql-errors/8.4/en/server-error-reference.html
# A table that was altered after the transaction's snapshot is 1412 on MySQL, and InnoDB's own 159 on MariaDB.
_BY_CODE: dict[int, type[BuildingBlocksError]] = {
    1062: DuplicateKeyError,
    1586: DuplicateKeyError,
    1216: ForeignKeyError,
    1217: ForeignKeyError,
    1451: ForeignKeyError,
    1452: ForeignKeyError,
    1048: ConstraintError,
    1364: ConstraintError,
    1406: ConstraintError,
    1264: ConstraintError,
    1690: ConstraintError,
    3819: ConstraintError,
    4025: ConstraintError,
    1292: InvalidInputError,
    1366: InvalidInputError,
    1213: DeadlockError,
    1205: DeadlockError,
    1020: SerializationError,
    1412: SerializationError,
    159: SerializationError,
    3572: LockNotAvailableError,
    1792: UnsupportedOperationError,
    1969: StatementTimeoutError,
    3024: StatementTimeoutError,
    1317: StatementTimeoutError,
    1040: ConnectionLostError,
    1053: ConnectionLostError,
    1158: ConnectionLostError,
    1159: ConnectionLostError,
    1160: ConnectionLostError,
    1161: ConnectionLostError,
    1927: ConnectionLostError,
    2002: ConnectionLostError,
    2003: ConnectionLostError,
    2006: ConnectionLostError,
    2013: ConnectionLostError,
    2014: ConnectionLostError,
    2055: ConnectionLostError,
    4031: ConnectionLostError,
}
_REFUSALS = {
    "1049": "the database does not exist",
    "1045": "the login was refused",
    "1698": "the login was refused",
    "1044": "the user may not use this database",
    "1040": "the server has too many connections",
    "2003": "the server cannot be reached",
}
_CONNECTION_OF_A_CURSOR = {"aiomysql": "_connection", "asyncmy": "connection"}
"""The attribute of each driver's cursors that holds their connection."""
_KILL_POLL = 0.005
"""Seconds until a connection is killed again: that it is not there any more says that it is gone."""
_NO_CODE = 0
_NO_SUCH_THREAD = "1094"
_LOCK_WAIT_TIMEOUT = 1205
_SUBQUERY_RETURNS_MORE_THAN_ONE_ROW = 1242
_TWO_ROWS = "(SELECT 1 UNION ALL SELECT 2)"
_WRONG_VALUE = 1292
_KEY_MARK = re.compile(r"'upsert met key (\d+)'$")
_BAD_NULL, _NO_DEFAULT, _TOO_LONG, _OUT_OF_RANGE = 1048, 1364, 1406, 1264
_SERVER_STATUS_IN_TRANSACTION = 1
_SERVER_STATUS_NO_BACKSLASH_ESCAPES = 512
_WHO_AM_I = "SELECT VERSION(), CONCAT(@@hostname, ':', @@port), CONNECTION_ID()"
_INSERT = re.compile(r"(INSERT INTO .+? VALUES )(\((?:%s, )*%s\))((?: ON DUPLICATE KEY UPDATE .*)?)", re.DOTALL)
_LONGEST_STATEMENT = 500_000
"""Characters of an INSERT of many rows; one takes four bytes at most, and servers take 4 MiB at least."""


class _Uptime:
    """The question for how many seconds the server has run.

    Not the one which connections it has: a MariaDB that is asked for its PROCESSLIST by a client that goes meanwhile may
    crash (seen with 10.11.19).
    """

    sql = "SHOW GLOBAL STATUS LIKE 'Uptime'"
    name = "uptime"


class _Written:
    """The question how far a MariaDB primary is: the last transaction of each domain in its binary log."""

    sql = "SELECT @@gtid_binlog_pos, @@log_bin"
    name = "position"
    reads = True


class _Replayed:
    """The question how far a MariaDB replica is, what it has in a log of its own, and who it is."""

    sql = "SELECT @@gtid_slave_pos, @@gtid_binlog_pos, @@server_id"
    name = "replica position"
    reads = True


class MySQLDialect(PortableDialect):
    """MySQL and MariaDB through any driver's adapted cursor."""

    name = "mysql"
    installs = "mysql"
    default_port = 3306
    needs_database_name = True
    refusals = _REFUSALS
    # Its name is the whole server's, and of 64 characters at most.
    migration_lock = "SELECT COALESCE(GET_LOCK(CONCAT('migration of ', SHA1(DATABASE())), 0), 0)"
    upsert_style = "on duplicate key"
    largest_statement = 60_000
    default_isolation = "REPEATABLE READ"
    is_mariadb = False

    def engine_arguments(self, url: URL) -> dict[str, Any]:
        return {"connect_args": {"connect_timeout": self.timeouts.connect, "charset": "utf8mb4"}}

    def prepare(self, engine: AsyncEngine) -> None:
        # Whatever the server's default: a value that does not fit is refused, never cut, and the key 0 stays 0.
        # The drivers escape with backslashes, so those have to mean what they say.
        modes = "REPLACE(@@sql_mode, 'NO_BACKSLASH_ESCAPES', ''), ',STRICT_TRANS_TABLES,NO_AUTO_VALUE_ON_ZERO'"
        strict = f"SET SESSION sql_mode = CONCAT({modes})"
        limit = self.timeouts.statement

        if (name := _CONNECTION_OF_A_CURSOR.get(engine.dialect.driver)) is not None:
            sa.event.listen(engine.sync_engine, "handle_error", partial(_let_go_of_cursor, name))

        @sa.event.listens_for(engine.sync_engine, "connect")
        def set_up(dbapi_connection: Any, record: Any) -> None:
            cursor = dbapi_connection.cursor()
            cursor.execute(_WHO_AM_I)
            version, server, number = cursor.fetchone()
            record.info["server"] = server, number, time.monotonic()
            mariadb = "mariadb" in str(version).lower()
            cursor.execute(strict)
            if limit is not None:
                cursor.execute(
                    f"SET SESSION max_statement_time = {limit:f}"
                    if mariadb
                    else f"SET SESSION max_execution_time = {math.ceil(limit * 1000)}"
                )
            cursor.close()

    def learn(self, engine: AsyncEngine) -> None:
        dialect: Any = engine.dialect
        self.is_mariadb = bool(dialect.is_mariadb)
        self.insert_returning = bool(dialect.insert_returning)

    async def begin(self, connection: PooledConnection, isolation: str | None, read_only: bool) -> None:
        if isolation:
            # It holds for the next transaction only; interrupted in between, the connection is closed.
            await self.command(connection, f"SET TRANSACTION ISOLATION LEVEL {isolation}")
        await self.command(connection, f"START TRANSACTION{' READ ONLY' if read_only else ''}")

    def in_transaction(self, connection: PooledConnection) -> bool:
        return bool(connection.driver.server_status & _SERVER_STATUS_IN_TRANSACTION)

    def is_dead(self, driver: Any) -> bool:
        # Whatever arrived without being asked for is a farewell, or the rest of an answer that nobody read.
        reader = getattr(driver, "_reader", None)  # aiomysql; asyncmy has a protocol of its own
        if reader is not None:
            return bool(reader.at_eof() or reader._buffer or reader.exception())
        protocol = getattr(driver, "_proto", None)
        return protocol is None or driver._stream_broken or protocol.length != protocol.pos

    def is_abandoned(self, connection: PooledConnection) -> bool:
        # A cancelled call closes its socket, which the server does not notice while it works or waits for a lock.
        return getattr(connection.driver, "_close_reason", None) is not None

    async def end_abandoned(self, connection: PooledConnection, helper: PooledConnection) -> None:
        server, number, since = connection.info["server"]
        if helper.info["server"][0] != server:
            return  # behind one address there may be several
        [(_, uptime)] = await self.fetch(helper, _Uptime, ())
        if int(uptime) + 1 < time.monotonic() - since:
            return  # it was restarted, and counts its connections anew
        while True:
            try:
                await self.command(helper, f"KILL {number}")
            except Exception as error:
                if self.error_code(error) == _NO_SUCH_THREAD:
                    return
                raise
            await asyncio.sleep(_KILL_POLL)

    @property
    def tells_positions(self) -> bool:
        return self.is_mariadb  # MySQL's are sets, which nothing here compares

    async def written(self, connection: PooledConnection, statement: Any, arguments: Any) -> Position | None:
        if not self.is_mariadb:
            return None
        [[written, is_logged]] = await self.fetch(connection, _Written, ())
        return _position(written) if is_logged else None

    async def replayed(self, connection: PooledConnection, statement: Any, arguments: Any) -> Replayed:
        if not self.is_mariadb:
            return await super().replayed(connection, statement, arguments)
        [[replayed, logged, server]] = await self.fetch(connection, _Replayed, ())
        position = _position(replayed)
        # Once it writes by itself, its own transactions are later than those that it has replayed.
        own = [(log, place) for log, by, place in _transactions(logged) if by == int(server)]
        return Replayed(all(position.get(log, 0) >= place for log, place in own), position)

    def error_code(self, error: BaseException) -> str | None:
        code = error.args[0] if error.args else None
        return str(code) if isinstance(code, int) and not isinstance(error, OSError) else None

    def classify(self, error: BaseException, statement: Any) -> Failure | None:
        if isinstance(error, OSError | EOFError):
            return Failure(ConnectionLostError)
        code = error.args[0] if error.args else None
        if not isinstance(code, int) or code == _NO_CODE:
            # The driver's own: it is not connected, or the server's packets have come out of turn.
            is_lost = type(error).__name__ in ("InterfaceError", "InternalError")
            return Failure(ConnectionLostError) if is_lost else None
        message = str(error.args[1]) if len(error.args) > 1 else ""
        if code == _LOCK_WAIT_TIMEOUT and getattr(statement, "lock", None) == "nowait":
            return Failure(LockNotAvailableError)  # MariaDB has no code of its own for NOWAIT
        if getattr(statement, "guards_upsert", False):
            if code == _SUBQUERY_RETURNS_MORE_THAN_ONE_ROW:
                return Failure(DuplicateKeyError)
            if code == _WRONG_VALUE and (taken := _KEY_MARK.search(message)):
                columns = _unique_keys(statement.table)[int(taken[1])]
                return Failure(DuplicateKeyError, columns=tuple(column.name for column in columns))
        kind = _BY_CODE.get(code)
        if kind is None:
            return None
        if kind is DuplicateKeyError:
            return Failure(kind, _last_quoted(message).rpartition(".")[2])
        if code in (_BAD_NULL, _NO_DEFAULT, _TOO_LONG, _OUT_OF_RANGE):
            return Failure(kind, columns=(_first_quoted(message),))
        return Failure(kind)

    def text_operand(self, operator: Operator, text: str | None) -> str | None:
        return super().text_operand(operator, text) if operator is Operator.STARTS_WITH else text

    def text_search(self, operator: Operator, column: Any, operand: Any) -> Any:
        # As bytes: the column's collation would also match other case and other accents.
        if operator is Operator.STARTS_WITH:
            return _bytes(column).like(_bytes(operand), escape="\\")
        if operator is Operator.ICONTAINS:
            column, operand = sa.func.lower(column), sa.func.lower(operand)
        return sa.func.locate(_bytes(operand), _bytes(column)) > 0

    def upsert(
        self, table: sa.Table, row: Mapping[Any, Any], on: Sequence[str], written: Sequence[str], version: str | None
    ) -> Any:
        insert = mysql.insert(table).values(row)
        same = sa.and_(*[table.columns[name].op("<=>")(_inserted(insert, name)) for name in on])
        guarded = table.columns[on[0]]
        # ON DUPLICATE KEY takes any unique key for a match. Where it is not the one that was meant, the guard
        # makes the statement fail, so that another row is never overwritten. A text that strict mode takes for no
        # number brings into the error which key it was.
        refusal: Any = sa.literal_column(_TWO_ROWS)
        met = [
            (
                sa.and_(*[column == _inserted(insert, column.key) for column in columns]),
                sa.cast(sa.literal_column(f"'upsert met key {place}'"), sa.Integer) + refusal,
            )
            for place, columns in enumerate(_unique_keys(table))
        ]
        guard = sa.func.if_(same, guarded, sa.case(*met, else_=refusal))
        changes: list[tuple[str, Any]] = [(guarded.key, guard)]
        changes += [(name, _inserted(insert, name)) for name in written]
        if version is not None:
            changes.append((version, table.columns[version] + sa.literal_column("1")))
        return insert.on_duplicate_key_update(changes)

    def estimate(self, table: sa.Table) -> Any:
        schema = ":schema" if table.schema else "DATABASE()"
        query = sa.text(
            "SELECT table_rows FROM information_schema.tables "  # noqa: S608 - the schema is a parameter
            f"WHERE table_schema = {schema} AND table_name = :name"
        )
        return query.bindparams(name=table.name, **({"schema": table.schema} if table.schema else {}))


def _transactions(text: str) -> list[tuple[int, int, int]]:
    """Return the domain, server and number of each of some GTIDs: https://mariadb.com/kb/en/gtid/."""
    parts = [gtid.strip().split("-") for gtid in text.split(",") if gtid.strip()]
    return [(int(domain), int(server), int(number)) for domain, server, number in parts]


def _position(text: str) -> dict[int, int]:
    return {domain: number for domain, _, number in _transactions(text)}


def _unique_keys(table: sa.Table) -> list[list[sa.Column[Any]]]:
    """Return the columns of every unique key, in an order that is always the same."""
    constraints: list[Any] = [item for item in table.constraints if isinstance(item, sa.UniqueConstraint)]
    indexes = [
        index
        for index in table.indexes
        if index.unique and all(isinstance(part, sa.Column) for part in index.expressions)
    ]
    groups = [list(item.columns) for item in [*constraints, *indexes]]
    return [list(table.primary_key.columns), *sorted(groups, key=lambda group: [column.name for column in group])]


def _inserted(insert: mysql.Insert, name: str) -> Any:
    """Return what an upsert would have inserted into a column."""
    column = insert.inserted[name]
    if "%" not in column.name:
        return column
    # SQLAlchemy doubles the percent sign of such a column twice: the database would look for another one.
    quoted = column.name.replace("`", "``")
    return sa.literal_column(f"VALUES(`{quoted}`)", column.type)


def _bytes(text: Any) -> Any:
    return sa.type_coerce(sa.cast(text, sa.LargeBinary), sa.String)


def _first_quoted(message: str) -> str:
    return message.partition("'")[2].partition("'")[0]


def _last_quoted(message: str) -> str:
    return message.rstrip("'").rpartition("'")[2]


def _text_literal(value: str) -> str:
    if "\\" in value or "'" in value:
        value = value.replace("\\", "\\\\").replace("'", "''")
    return f"'{value}'"


def _moment_literal(value: datetime) -> str:
    return f"'{value.replace(tzinfo=None).isoformat(' ')}'"


_LITERALS: dict[type, Callable[[Any], str]] = {
    type(None): lambda _: "NULL",
    bool: lambda value: "1" if value else "0",
    int: int.__repr__,
    str: _text_literal,
    datetime: _moment_literal,
    # Not as a float, unless it is one that nobody would write out.
    Decimal: lambda value: format(value, "f") if -64 <= value.adjusted() <= 64 else str(value),
}
_WITHOUT_ESCAPES: dict[type, Callable[[Any], str]] = {
    **_LITERALS,
    str: lambda value: "'" + value.replace("'", "''") + "'",
    bytes: lambda value: f"_binary X'{value.hex()}'",
}


def _literals(driver: Any, values: Sequence[Any]) -> tuple[str, ...]:
    """Return values as SQL, the frequent kinds quicker than the driver does."""
    # Connections are set up with escapes on, but a statement of the service's own may have changed that.
    known = _WITHOUT_ESCAPES if driver.server_status & _SERVER_STATUS_NO_BACKSLASH_ESCAPES else _LITERALS
    return tuple([known[kind](value) if (kind := type(value)) in known else driver.literal(value) for value in values])


@lru_cache(maxsize=1024)
def _bulk_parts(sql: str) -> tuple[str, str, str] | None:
    """Split an INSERT into what comes before one row's values, the row, and the rest; None where it cannot be."""
    found = _INSERT.fullmatch(sql)
    return (found[1] % (), found[2], found[3] % ()) if found and "%s" not in found[3] else None


class AiomysqlDialect(MySQLDialect):
    """MySQL and MariaDB on the driver's own connection, without a cursor where none is needed."""

    async def fetch(self, connection: PooledConnection, statement: Any, arguments: Any) -> Sequence[Row]:
        driver = connection.driver
        await driver.query(statement.sql % _literals(driver, arguments))
        return driver._result.rows or ()

    async def execute(self, connection: PooledConnection, statement: Any, arguments: Any) -> int:
        driver = connection.driver
        await driver.query(statement.sql % _literals(driver, arguments))
        return driver._result.affected_rows  # type: ignore[no-any-return]

    async def insert(self, connection: PooledConnection, statement: Any, arguments: Any) -> Any:
        driver = connection.driver
        await driver.query(statement.sql % _literals(driver, arguments))
        return driver._result.insert_id

    async def execute_many(self, connection: PooledConnection, statement: Any, rows: Sequence[Row]) -> int:
        touched, turn = 0, connection.turn
        for row in rows:
            connection.next_statement(turn)
            touched += await self.execute(connection, statement, row)
        return touched

    async def insert_many(self, connection: PooledConnection, statement: Any, rows: Any) -> int:
        parts = _bulk_parts(statement.sql)
        if parts is None:
            await self.execute_many(connection, statement, rows)
            return len(rows)
        driver = connection.driver
        head, row_of, tail = parts
        pieces: list[str] = []
        size, turn = 0, connection.turn
        for row in rows:
            piece = row_of % _literals(driver, row)
            size += len(piece)
            if size > _LONGEST_STATEMENT and pieces:
                await driver.query(f"{head}{','.join(pieces)}{tail}")
                connection.next_statement(turn)
                pieces, size = [], len(piece)
            pieces.append(piece)
        await driver.query(f"{head}{','.join(pieces)}{tail}")
        return len(rows)

    async def upsert_many(self, connection: PooledConnection, statement: Any, rows: Sequence[Row]) -> int:
        return await self.insert_many(connection, statement, rows)

    async def command(self, connection: PooledConnection, sql: str) -> None:
        await connection.driver.query(sql)

    async def batches(
        self, connection: PooledConnection, statement: Any, arguments: tuple[Any, int]
    ) -> AsyncGenerator[Sequence[Row], None]:
        values, size = arguments
        cursor = await connection.driver.cursor(self._streaming_cursor(connection))
        await cursor.execute(statement.sql, values)
        try:
            while rows := await cursor.fetchmany(size):
                yield rows
        except GeneratorExit:
            if connection.valid:  # given up meanwhile, it is closed
                await cursor.close()  # reads what is left: the protocol has no other way to stop
            raise

    def _streaming_cursor(self, connection: PooledConnection) -> Any:
        return connection.dbapi.SSCursor


class AsyncmyDialect(AiomysqlDialect):
    """MySQL and MariaDB on asyncmy's connection, which has aiomysql's methods and its own cursors."""

    def _streaming_cursor(self, connection: PooledConnection) -> Any:
        return connection.dbapi.asyncmy.cursors.SSCursor


def _let_go_of_cursor(connection: str, context: ExceptionContext) -> None:
    """Have a cursor whose read was cancelled closed without a word; its connection is given up as well.

    The drivers would read on in the middle of an answer, and SQLAlchemy log as an error what comes of that.
    """
    execution: Any = context.execution_context
    if execution is not None and not isinstance(context.original_exception, Exception):
        setattr(execution.cursor._cursor, connection, None)
