"""PostgreSQL, at its best with asyncpg."""

import math
import re
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from decimal import Decimal
from functools import lru_cache
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql
from sqlalchemy.engine import URL
from sqlalchemy.types import TypeDecorator, TypeEngine

from fastapi_building_blocks.domain.errors import (
    BuildingBlocksError,
    ConflictError,
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
from fastapi_building_blocks.infrastructure.database.plain_types import (
    moment_from_iso,
    utc_from_aware,
    wall_clock_from_iso,
)
from fastapi_building_blocks.infrastructure.database.types import BinaryString, ExactDecimal, UtcDateTime

from .portable import Failure, PortableDialect, Processor, Replayed, Row, on_conflict

# https://www.postgresql.org/docs/current/errcodes-appendix.html
_BY_CODE: dict[str, type[BuildingBlocksError]] = {
    "23505": DuplicateKeyError,
    "23503": ForeignKeyError,
    "23001": ForeignKeyError,
    "23502": ConstraintError,
    "23514": ConstraintError,
    "23P01": ConflictError,
    "22001": ConstraintError,
    "22003": ConstraintError,
    "25006": UnsupportedOperationError,
    "40001": SerializationError,
    "40P01": DeadlockError,
    "55P03": LockNotAvailableError,
    "57014": StatementTimeoutError,
    "57P01": ConnectionLostError,
    "57P02": ConnectionLostError,
    "57P03": ConnectionLostError,
    "53300": ConnectionLostError,
    "25P03": ConnectionLostError,
}
_BY_CLASS: dict[str, type[BuildingBlocksError]] = {"08": ConnectionLostError, "22": InvalidInputError}

_REFUSALS = {
    "3D000": "the database does not exist",
    "28P01": "the login was refused",
    "28000": "the login was refused",
    "42501": "the user may not connect to this database",
    "53300": "the server has too many connections",
    "57P03": "the server is starting up or shutting down",
}
_NEEDS_PGBOUNCER = "PgBouncer takes no such start-up parameter: set pgbouncer=True, or DATABASE_PGBOUNCER=true"
_PIPELINE = 1_000
"""Statements that are sent without waiting for the answer to each."""
_BATCH = 5_000
"""Rows of a bulk INSERT that are in memory at once, where COPY cannot take them."""


_PAGE, _PAGE_HEADER = 8192, 24
_SEGMENT, _SEGMENT_HEADER = 1 << 20, 40
"""Bytes of the log; a segment is one or more of these."""


class _Written:
    """The question how far a primary is. Not what is flushed: with synchronous_commit=off a commit is not, at first."""

    sql = "SELECT CASE WHEN NOT pg_is_in_recovery() THEN pg_current_wal_insert_lsn()::text END"
    name = "position"
    reads = True


class _Replayed:
    """The question how far a replica is, and whether it is one."""

    sql = "SELECT CASE WHEN pg_is_in_recovery() THEN 1 ELSE 0 END, pg_last_wal_replay_lsn()::text"
    name = "replica position"
    reads = True


class _Cluster:
    """The question which cluster a server belongs to: a primary and its replicas answer the same number."""

    sql = "SELECT system_identifier FROM pg_control_system()"
    name = "cluster"
    reads = True


class PostgreSQLDialect(PortableDialect):
    """PostgreSQL through any driver's adapted cursor."""

    name = "postgresql"
    installs = "postgres"
    default_port = 5432
    needs_database_name = True
    refusals = _REFUSALS
    migration_lock = "SELECT CASE WHEN pg_try_advisory_lock(7233015562034) THEN 1 ELSE 0 END"
    insert_returning = True
    update_returning = True
    upsert_style = "on conflict"
    nulls_sort_low = False
    nulls_clause = True
    row_values = True
    streams_in_transaction = True
    transactional_ddl = True
    native_enums = True
    array_parameters = True
    largest_statement = 32_767
    default_isolation = "READ COMMITTED"

    def engine_arguments(self, url: URL) -> dict[str, Any]:
        if url.get_driver_name() != "asyncpg":
            return {}
        settings = {"datestyle": "ISO"}
        if self.timeouts.statement is not None:
            settings["statement_timeout"] = str(math.ceil(self.timeouts.statement * 1000))
        return {"connect_args": {"timeout": self.timeouts.connect, "server_settings": settings}}

    async def begin(self, connection: PooledConnection, isolation: str | None, read_only: bool) -> None:
        level = f" ISOLATION LEVEL {isolation}" if isolation else ""
        await self.command(connection, f"BEGIN{level}{' READ ONLY' if read_only else ''}")

    async def batches(
        self, connection: PooledConnection, statement: Any, arguments: tuple[Any, int]
    ) -> AsyncGenerator[Sequence[Row], None]:
        # A cursor lives in a transaction; outside one the stream has its own, ended with it.
        own = not self.in_transaction(connection)
        if own:
            await self.begin(connection, None, True)
        async for rows in self._read(connection, statement, arguments):
            yield rows
        if own:
            await self.commit(connection)

    def _read(
        self, connection: PooledConnection, statement: Any, arguments: tuple[Any, int]
    ) -> AsyncGenerator[Sequence[Row], None]:
        return super().batches(connection, statement, arguments)

    def in_transaction(self, connection: PooledConnection) -> bool:
        driver = connection.driver
        return not driver.is_closed() and bool(driver.is_in_transaction())  # what the driver dropped cannot be asked

    def is_dead(self, driver: Any) -> bool:
        return bool(driver.is_closed())

    async def recover(self, connection: PooledConnection) -> bool:
        # asyncpg has asked the server to cancel what was interrupted, and waits for that before the next command.
        if connection.driver.is_closed():
            return False
        await connection.driver.execute("ROLLBACK" if connection.driver.is_in_transaction() else "SELECT 1")
        # A BEGIN of SQLAlchemy's that was cancelled leaves asyncpg's mark: the next one would be a savepoint.
        return not connection.driver.is_in_transaction() and connection.driver._top_xact is None

    @property
    def tells_positions(self) -> bool:
        return True

    async def written(self, connection: PooledConnection, statement: Any, arguments: Any) -> Position | None:
        [[place]] = await self.fetch(connection, _Written, ())
        return _position(await self._cluster(connection), place)

    async def replayed(self, connection: PooledConnection, statement: Any, arguments: Any) -> Replayed:
        [[is_replica, place]] = await self.fetch(connection, _Replayed, ())
        return Replayed(bool(is_replica), _position(await self._cluster(connection), place))

    async def _cluster(self, connection: PooledConnection) -> int:
        """Return the number of the cluster, asked once on each connection; 0 where that may not be asked."""
        known: int | None = connection.info.get("cluster")
        if known is None:
            known = 0
            try:
                [[known]] = await self.fetch(connection, _Cluster, ())
            except Exception as error:
                if self.error_code(getattr(error, "orig", None) or error) is None:
                    raise
            connection.info["cluster"] = known
        return known

    def error_code(self, error: BaseException) -> str | None:
        return getattr(error, "sqlstate", None)

    def is_answer(self, error: BaseException) -> bool:
        # What asyncpg itself refuses, a value of another type say, leaves the statement described and not ended: the
        # locks of its tables are held until the next one.
        return getattr(getattr(error, "driver_exception", None) or error, "severity", None) is not None

    def refusal(self, error: BaseException) -> str | None:
        return _NEEDS_PGBOUNCER if _is_pgbouncers(error) else super().refusal(error)

    def classify(self, error: BaseException, statement: Any) -> Failure | None:
        code = getattr(error, "sqlstate", None)
        if not code:
            return Failure(ConnectionLostError) if isinstance(error, OSError) or _is_closed(error) else None
        if _is_pgbouncers(error):
            return None  # it will refuse the next attempt as well
        if self.plan_is_stale(error):
            return Failure(SerializationError)
        kind = _BY_CODE.get(code) or _BY_CLASS.get(code[:2])
        if kind is None:
            return None
        column = getattr(error, "column_name", None)
        columns = (column,) if column else _columns_in(getattr(error, "detail", None)) if code == "23505" else ()
        return Failure(kind, getattr(error, "constraint_name", None), columns)

    def plan_is_stale(self, error: BaseException) -> bool:
        return type(error).__name__ == "InvalidCachedStatementError"  # its code means any feature not supported

    def read(self, column: sa.Column[Any], processor: Processor | None) -> tuple[Any, Processor | None]:
        # asyncpg takes five times as long to make these of PostgreSQL's binary form as Python does of the text, and fails
        # without a word of ours where Python has no such moment.
        quick: Processor
        if processor is utc_from_aware:
            quick = moment_from_iso
        elif processor is None and isinstance(column.type, sa.DateTime):
            quick = wall_clock_from_iso
        elif processor is None and isinstance(column.type, ExactDecimal | sa.Numeric):
            quick = Decimal
        else:
            return column, processor
        return sa.cast(column, sa.Text).label(column.name), quick

    def text_search(self, operator: Operator, column: Any, operand: Any) -> Any:
        if operator is Operator.ICONTAINS:
            if isinstance(column.type, BinaryString):
                # Its collation "C" knows the case of ASCII letters only.
                column = sa.collate(column, "default")
            return column.ilike(operand, escape="\\")
        return column.like(operand, escape="\\")

    def upsert(
        self, table: sa.Table, row: Mapping[Any, Any], on: Sequence[str], written: Sequence[str], version: str | None
    ) -> Any:
        return on_conflict(postgresql.insert(table).values(row), row, on, written, version)

    def estimate(self, table: sa.Table) -> Any:
        quoted = ".".join(f'"{name}"' for name in (table.schema, table.name) if name)
        return sa.text("SELECT reltuples::bigint FROM pg_class WHERE oid = to_regclass(:name)").bindparams(name=quoted)


def _position(cluster: int, place: str | None) -> Position | None:
    """Return a place in the log (LSN) as a position. A timeline is none of its own: the log goes on where it forked."""
    if place is None:
        return None
    high, low = place.split("/")
    number = (int(high, 16) << 32) + int(low, 16)
    # Where a page has just begun, the next record is after its header, and the last one ends before.
    if number % _SEGMENT == _SEGMENT_HEADER:
        number -= _SEGMENT_HEADER
    elif number % _PAGE == _PAGE_HEADER:
        number -= _PAGE_HEADER
    return {cluster: number}


def _is_closed(error: BaseException) -> bool:
    """Whether asyncpg refuses a connection that is closed, or that the server is about to close.

    It has no codes of its own: one class for every misuse, and one for a message that came out of turn, as the
    server's farewell does.
    """
    name = type(error).__name__
    return name == "InternalClientError" or (name == "InterfaceError" and "closed" in str(error))


def _is_pgbouncers(error: BaseException) -> bool:
    """Whether PgBouncer refused what only PostgreSQL itself sets at the start; it has one code for all refusals."""
    return getattr(error, "sqlstate", None) == "08P01" and "startup parameter" in str(error)


def _columns_in(detail: str | None) -> tuple[str, ...]:
    """Return the columns that ``Key (a, b)=(1, 2) already exists.`` names, where they are plain columns."""
    if not detail or not detail.startswith("Key ("):
        return ()
    names = detail[len("Key (") :].partition(")=")[0].split(", ")
    return tuple(name.strip('"') for name in names)


_VALUES = re.compile(r"(INSERT INTO [^$]+? )VALUES \(([^$]*\$.+?)\)( ON CONFLICT [^$]+)", re.DOTALL)
_VALUE = re.compile(r"\$(\d+)::([A-Z][A-Z ]*(?:\(\d+(?:, \d+)?\))?)")


@lru_cache(maxsize=1024)
def _by_arrays(sql: str) -> str | None:
    """Return an upsert of one row as one of many, whose parameters are the columns; None where there is no such."""
    found = _VALUES.fullmatch(sql)
    if found is None:
        return None
    head, values, tail = found.groups()
    types = [kind for _, kind in _VALUE.findall(values)]
    if values != ", ".join(f"${place}::{kind}" for place, kind in enumerate(types, 1)):
        return None
    arrays = ", ".join(f"${place}::{kind}[]" for place, kind in enumerate(types, 1))
    return f"{head}SELECT * FROM unnest({arrays}){tail}"  # noqa: S608 - of what SQLAlchemy compiled


_EQUAL_AS_IN_PYTHON = (sa.Integer, sa.Uuid, BinaryString, UtcDateTime)
"""Types whose values are equal to PostgreSQL if they are to Python, whatever the collation."""


def _are_distinct(statement: Any, rows: Sequence[Row]) -> bool:
    """Whether no two rows are known to be for the same stored one."""
    places = [place for place, column in enumerate(statement.columns) if column.key in statement.on]
    if not all(isinstance(statement.columns[place].type, _EQUAL_AS_IN_PYTHON) for place in places):
        return False
    return len({tuple([row[place] for place in places]) for row in rows}) == len(rows)


def _parts(connection: PooledConnection, rows: Sequence[Row]) -> Iterator[Sequence[Row]]:
    """Cut rows into what goes through the pipeline at once; the time of a statement is not meant for all of them."""
    turn = connection.turn
    for start in range(0, len(rows), _PIPELINE):
        connection.next_statement(turn)
        yield rows[start : start + _PIPELINE]


def _bound_by_sql(column: sa.Column[Any]) -> bool:
    """Whether a value goes through an SQL function on its way into the column, which COPY cannot call."""
    kind: Any = column.type
    while isinstance(kind, TypeDecorator) and type(kind).bind_expression is TypeDecorator.bind_expression:
        kind = kind.impl
    return type(kind).bind_expression is not TypeEngine.bind_expression


class AsyncpgDialect(PostgreSQLDialect):
    """PostgreSQL on asyncpg's own connection: prepared statements by SQL text, COPY, pipelined batches."""

    counts_by_returning = True
    streams_inserts = True

    async def fetch(self, connection: PooledConnection, statement: Any, arguments: Any) -> Sequence[Row]:
        return await connection.driver.fetch(statement.sql, *arguments)  # type: ignore[no-any-return]

    async def execute(self, connection: PooledConnection, statement: Any, arguments: Any) -> int:
        status: str = await connection.driver.execute(statement.sql, *arguments)
        count = status.rpartition(" ")[2]
        return int(count) if count.isdigit() else 0

    async def execute_many(self, connection: PooledConnection, statement: Any, rows: Sequence[Row]) -> int:
        # The statement has RETURNING: asyncpg pipelines it for all rows, and what comes back is what was touched.
        touched = 0
        for part in _parts(connection, rows):
            touched += len(await connection.driver.fetchmany(statement.sql, part))
        return touched

    async def upsert_many(self, connection: PooledConnection, statement: Any, rows: Sequence[Row]) -> int:
        # Arrays cost a quarter less, but one statement may meet a row once only: of two with one key the later wins.
        sql = _by_arrays(statement.sql)
        if sql is not None and _are_distinct(statement, rows):
            await connection.driver.execute(sql, *zip(*rows, strict=True))
        else:
            for part in _parts(connection, rows):
                await connection.driver.executemany(statement.sql, part)
        return len(rows)

    async def insert_many(self, connection: PooledConnection, statement: Any, rows: Any) -> int:
        # COPY would take no columns for all of them, and calls no functions.
        if not statement.columns or any(map(_bound_by_sql, statement.columns)):
            return await self._insert_one_by_one(connection, statement.sql, rows)
        table = statement.table
        status: str = await connection.driver.copy_records_to_table(
            table.name, records=rows, columns=[column.name for column in statement.columns], schema_name=table.schema
        )
        return int(status.rpartition(" ")[2])

    async def _insert_one_by_one(self, connection: PooledConnection, sql: str, rows: Any) -> int:
        if isinstance(rows, list):
            for part in _parts(connection, rows):
                await connection.driver.executemany(sql, part)
            return len(rows)
        batch: list[Row] = []
        count, turn = 0, connection.turn
        async for row in rows:
            batch.append(row)
            if len(batch) == _BATCH:
                connection.check_turn(turn)
                count += await self._insert_one_by_one(connection, sql, batch)
                batch = []
        connection.check_turn(turn)
        return count + await self._insert_one_by_one(connection, sql, batch)

    async def command(self, connection: PooledConnection, sql: str) -> None:
        await connection.driver.execute(sql)

    async def _read(
        self, connection: PooledConnection, statement: Any, arguments: tuple[Any, int]
    ) -> AsyncGenerator[Sequence[Row], None]:
        values, size = arguments
        cursor = await connection.driver.cursor(statement.sql, *values)
        while rows := await cursor.fetch(size):
            yield rows
