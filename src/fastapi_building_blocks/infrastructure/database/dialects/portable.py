"""What any database can do through SQLAlchemy's adapted cursor; a database's own file says what it does better.

A dialect answers four questions: how a statement runs on a connection, how a transaction begins and ends,
what its errors mean, and which SQL it needs where databases differ.
"""

import asyncio
import math
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import sqlalchemy as sa
from sqlalchemy.engine import URL
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.util import greenlet_spawn

from fastapi_building_blocks.domain.errors import BuildingBlocksError, ConnectionLostError, UnsupportedOperationError
from fastapi_building_blocks.domain.query import Operator
from fastapi_building_blocks.infrastructure.database.connections import PooledConnection
from fastapi_building_blocks.infrastructure.database.consistency import Position

Row = Sequence[Any]
Processor = Callable[[Any], Any]
UpsertStyle = Literal["on conflict", "on duplicate key", "merge"]

_HEAD_START = 0.2
"""Seconds in which the database may end a statement by its own timeout, before the session does."""
_ESCAPE = "\\"
_LIKE_SPECIALS = str.maketrans({"\\": r"\\", "%": r"\%", "_": r"\_"})


_ISOLATION_LEVELS = frozenset({"READ UNCOMMITTED", "READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE", "SNAPSHOT"})


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds; None: no bound."""

    connect: float
    statement: float | None


@dataclass(frozen=True, slots=True)
class Failure:
    """What a driver's error means: the domain's error, and what the database said it is about."""

    error: type[BuildingBlocksError]
    constraint: str | None = None
    """The name of the constraint or index, as the database has it."""
    columns: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Replayed:
    """What a server says of itself as a replica."""

    is_replica: bool
    """Whether it replays what another server has written; False once it was promoted."""
    position: Position | None
    """How far it is; None: it does not say."""


class _IsThere:
    """The question whether a server answers."""

    sql = "SELECT 1"
    name = "replica"
    reads = True


class PortableDialect:
    """The portable path, and what standard SQL says."""

    name: ClassVar[str] = "any"
    installs: ClassVar[str] = "all"
    """The extra that brings the driver."""
    default_port: ClassVar[int | None] = None
    needs_database_name = False
    """Whether a URL that names no database is a mistake."""
    in_memory = False
    """Whether the database is in the session's own connections, and nowhere else."""
    refusals: ClassVar[Mapping[str, str]] = {}
    """Why a connection was not opened, in words, by ``error_code``."""
    migration_lock: ClassVar[str | None] = None
    """The query that answers 1 once its connection alone may migrate the database, and 0 at once if it may not."""

    insert_returning = False
    update_returning = False
    upsert_style: UpsertStyle = "merge"
    nulls_sort_low = True
    """Whether NULL is smaller than every value where ORDER BY does not say."""
    nulls_clause = False
    """Whether ORDER BY understands NULLS FIRST and NULLS LAST."""
    row_values = False
    """Whether ``(a, b) > (x, y)`` is understood, and answered from an index."""
    native_enums = False
    """Whether an enumeration is a type of its own, ordered and compared as it is declared."""
    array_parameters = False
    """Whether a list may be one parameter: ``= ANY(:values)``."""
    streams_inserts = False
    """Whether ``insert_many`` takes rows from an asynchronous iterator while they are made."""
    streams_in_transaction = False
    """Whether a cursor lives in a transaction only."""
    keeps_sessions = True
    """Whether a connection stays with one session of the server, so that what it sets and locks there lasts."""
    transactional_ddl = False
    """Whether a transaction ends by COMMIT and ROLLBACK only, and the driver knows whether it is open."""
    counts_by_returning = False
    """Whether ``execute_many`` counts the rows that RETURNING answers, since the driver does not count."""
    paging_needs_order = False
    """Whether OFFSET is needed wherever rows are limited, and ORDER BY with it."""
    ends_statements = True
    """Whether the database itself ends a statement that takes longer than its timeout."""
    largest_statement = 2000
    """How many parameters one statement may have."""
    isolation_levels: ClassVar[frozenset[str]] = frozenset(
        {"READ UNCOMMITTED", "READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"}
    )
    default_isolation = "READ COMMITTED"

    def __init__(self, timeouts: Timeouts) -> None:
        self.timeouts = timeouts
        limit = math.inf if timeouts.statement is None else timeouts.statement
        self.patience = limit + (_HEAD_START if self.ends_statements else 0.0)
        """Seconds until the session ends a call itself."""

    # Connecting

    def engine_arguments(self, url: URL) -> dict[str, Any]:
        """Return what ``create_async_engine`` is given for this database."""
        return {}

    def pool_size(self, url: URL, pool_size: int, max_overflow: int) -> tuple[int, int]:
        """Return the size and overflow of the pool that this database can use."""
        return pool_size, max_overflow

    def prepare(self, engine: AsyncEngine) -> None:
        """Register what every new connection needs."""

    def learn(self, engine: AsyncEngine) -> None:
        """Note what the first connection has told of the server."""

    # Statements

    async def spawn(self, connection: PooledConnection, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call what runs a statement on SQLAlchemy's side of the connection."""
        return await greenlet_spawn(function, *arguments)

    async def fetch(self, connection: PooledConnection, statement: Any, arguments: Any) -> Sequence[Row]:
        """Run a query and return all rows."""
        rows: Sequence[Row] = await self.spawn(connection, self._run, connection, statement.sql, arguments, _fetch_all)
        return rows

    async def execute(self, connection: PooledConnection, statement: Any, arguments: Any) -> int:
        """Run a statement and return how many rows it touched."""
        touched: int = await self.spawn(connection, self._run, connection, statement.sql, arguments, _row_count)
        return touched

    async def insert(self, connection: PooledConnection, statement: Any, arguments: Any) -> Any:
        """Run an INSERT and return the key that the database generated, where it can say."""
        return await self.spawn(connection, self._run, connection, statement.sql, arguments, _last_key)

    async def execute_many(self, connection: PooledConnection, statement: Any, rows: Sequence[Row]) -> int:
        """Run a statement once for each row of arguments and return how many rows that touched together."""
        touched: int = await self.spawn(connection, self._run_many, connection, statement.sql, rows)
        return touched

    async def insert_many(self, connection: PooledConnection, statement: Any, rows: Any) -> int:
        """Insert rows of values in the order of ``statement.columns``, by the fastest way the driver has."""
        return await self.execute_many(connection, statement, rows)

    async def upsert_many(self, connection: PooledConnection, statement: Any, rows: Sequence[Row]) -> int:
        """Run an upsert once for each row of arguments, in their order, and return how many there were."""
        await self.execute_many(connection, statement, rows)
        return len(rows)

    async def batches(
        self, connection: PooledConnection, statement: Any, arguments: tuple[Any, int]
    ) -> AsyncGenerator[Sequence[Row], None]:
        """Run a query and yield its rows in batches; the arguments are those of the query and the batch size."""
        values, size = arguments
        cursor = await self.spawn(connection, self._open_cursor, connection, statement.sql, values)
        try:
            while rows := await self.spawn(connection, cursor.fetchmany, size):
                yield rows
        except asyncio.CancelledError:
            raise  # closing would wait for what was interrupted
        except BaseException:
            await self.spawn(connection, cursor.close)
            raise
        await self.spawn(connection, cursor.close)

    async def command(self, connection: PooledConnection, sql: str) -> None:
        """Run a statement without parameters or answer."""
        await self.spawn(connection, self._run, connection, sql, None, _nothing)

    def _run(self, connection: PooledConnection, sql: str, arguments: Any, answer: Callable[[Any], Any]) -> Any:
        cursor = connection.cursor()
        try:
            if arguments is None:
                cursor.execute(sql)
            else:
                cursor.execute(sql, arguments)
            result = answer(cursor)
        except Exception:  # after a cancellation, closing would wait for what was interrupted
            cursor.close()
            raise
        cursor.close()
        return result

    def _run_many(self, connection: PooledConnection, sql: str, rows: Sequence[Row]) -> int:
        touched, turn = 0, connection.turn
        for row in rows:
            connection.next_statement(turn)
            touched += self._run(connection, sql, row, _row_count)
        return touched

    def _open_cursor(self, connection: PooledConnection, sql: str, arguments: Any) -> Any:
        cursor = connection.cursor(server_side=True)
        cursor.execute(sql, arguments)
        return cursor

    # Transactions

    async def begin(self, connection: PooledConnection, isolation: str | None, read_only: bool) -> None:
        """Begin a transaction."""
        await self.command(connection, "BEGIN")

    async def commit(self, connection: PooledConnection) -> None:
        """End the transaction and keep it."""
        await self.command(connection, "COMMIT")

    async def rollback(self, connection: PooledConnection) -> None:
        """End the transaction and keep nothing."""
        await self.command(connection, "ROLLBACK")

    async def savepoint(self, connection: PooledConnection, name: str) -> None:
        """Set a savepoint."""
        await self.command(connection, f"SAVEPOINT {name}")

    async def release_savepoint(self, connection: PooledConnection, name: str) -> None:
        """Merge a savepoint into what surrounds it."""
        await self.command(connection, f"RELEASE SAVEPOINT {name}")

    async def rollback_to_savepoint(self, connection: PooledConnection, name: str) -> None:
        """Undo everything since a savepoint."""
        await self.command(connection, f"ROLLBACK TO SAVEPOINT {name}")

    def in_transaction(self, connection: PooledConnection) -> bool:
        """Whether the driver knows of an open transaction; asked without a round trip."""
        return False

    def is_dead(self, driver: Any) -> bool:
        """Whether the driver knows that the connection is gone; asked without a round trip."""
        return False

    async def recover(self, connection: PooledConnection) -> bool:
        """Make a connection whose call was interrupted sound again, or answer False: it is closed."""
        return False

    def interrupt(self, connection: PooledConnection) -> bool:
        """Ask what runs on a connection to end with an error of its own; answer whether that is possible."""
        return False

    def is_abandoned(self, connection: PooledConnection) -> bool:
        """Whether the server may still run a statement for a connection that the driver has closed."""
        return False

    async def end_abandoned(self, connection: PooledConnection, helper: PooledConnection) -> None:
        """Have the server end that statement and the connection, by a command on another one."""

    # Replicas

    @property
    def tells_positions(self) -> bool:
        """Whether a primary and its replicas say how far they are; otherwise replicas are trusted after a time."""
        return False

    async def written(self, connection: PooledConnection, statement: Any, arguments: Any) -> Position | None:
        """Return how far the primary has written; None: it is none, or does not say."""
        return None

    async def replayed(self, connection: PooledConnection, statement: Any, arguments: Any) -> Replayed:
        """Return how far a replica is."""
        await self.fetch(connection, _IsThere, ())
        return Replayed(True, None)

    # Errors

    def error_code(self, error: BaseException) -> str | None:
        """Return the database's own code of a driver's error."""
        return None

    def is_answer(self, error: BaseException) -> bool:
        """Whether an error of the driver's is the database's answer, after which the connection is at rest."""
        return True

    def refusal(self, error: BaseException) -> str | None:
        """Say in words why a connection was not opened, where a driver's error tells."""
        return self.refusals.get(self.error_code(error) or "")

    def may_open_later(self, failure: Exception) -> bool:
        """Whether another attempt may open the connection that failed with this error of the domain."""
        return isinstance(failure, ConnectionLostError)

    def classify(self, error: BaseException, statement: Any) -> Failure | None:
        """Say what a driver's error means, by its code; None: it is not known."""
        return None

    def plan_is_stale(self, error: BaseException) -> bool:
        """Whether a driver's error says that nothing was done, because the statement was prepared before its table changed.

        Other connections may have prepared it then, too.
        """
        return False

    def columns_of(self, constraint: str, table: sa.Table) -> tuple[str, ...]:
        """Return the columns of a unique constraint by the name that the database reports."""
        named: Iterable[Any] = (*table.constraints, *table.indexes)
        for item in named:
            if item.name and str(item.name) == constraint:
                return tuple(column.key for column in item.columns)
        if constraint.lower() in ("primary", f"{table.name}_pkey"):
            return tuple(column.key for column in table.primary_key)
        # An unnamed constraint has a name of the database's making: it begins with, or holds, its first columns.
        for item in table.constraints:
            if isinstance(item, sa.UniqueConstraint) and item.name is None:
                names = [column.name for column in item.columns]
                if constraint in (names[0], f"{table.name}_{'_'.join(names)}_key"):
                    return tuple(column.key for column in item.columns)
        return tuple(column.key for column in table.columns if column.name == constraint)

    # SQL

    def text_operand(self, operator: Operator, text: str | None) -> str | None:
        """Return the parameter of a text search: ``text`` taken literally."""
        if text is None:
            return None
        pattern = text.translate(_LIKE_SPECIALS)
        return f"{pattern}%" if operator is Operator.STARTS_WITH else f"%{pattern}%"

    def text_search(self, operator: Operator, column: Any, operand: Any) -> Any:
        """Return the clause of a text search for what ``text_operand`` answered."""
        if operator is Operator.ICONTAINS:
            return sa.func.lower(column).like(sa.func.lower(operand), escape=_ESCAPE)
        return column.like(operand, escape=_ESCAPE)

    def order(self, column: Any, *, descending: bool, nulls_last: bool) -> list[Any]:
        """Return the ORDER BY clauses of one sort key."""
        key = column.desc() if descending else column.asc()
        natural = nulls_last is (descending if self.nulls_sort_low else not descending)
        if not column.nullable or natural:
            return [key]
        if self.nulls_clause:
            return [key.nulls_last() if nulls_last else key.nulls_first()]
        null, other = ("1", "0") if nulls_last else ("0", "1")
        return [sa.case((column.is_(None), sa.literal_column(null)), else_=sa.literal_column(other)), key]

    def read(self, column: sa.Column[Any], processor: Processor | None) -> tuple[Any, Processor | None]:
        """Return what is selected for a column, and what makes a Python value of it; None: it is one.

        Args:
            processor: SQLAlchemy's own for the column's type.
        """
        return column, processor

    def insert_row(self, table: sa.Table, row: Mapping[Any, Any]) -> Any:
        """Return the INSERT of ``row``: column to placeholder, the key included or left to the database."""
        return sa.insert(table).values(row)

    def upsert(
        self, table: sa.Table, row: Mapping[Any, Any], on: Sequence[str], written: Sequence[str], version: str | None
    ) -> Any:
        """Return the statement that inserts ``row``, or writes it to the one with the same ``on``, atomically.

        Args:
            row: column to placeholder.
            on: the names of a unique key.
            written: the names of the columns that an existing row takes over.
            version: the name of the column that counts an existing row's changes.
        """
        raise UnsupportedOperationError(f"{self.name} has no upsert")

    def lock(self, query: Any, table: sa.Table, lock: str) -> Any:
        """Return the query with a row lock.

        Raises:
            UnsupportedOperationError: the database has no such lock.
        """
        return query.with_for_update(read=lock == "share", nowait=lock == "nowait", skip_locked=lock == "skip_locked")

    def estimate(self, table: sa.Table) -> Any | None:
        """Return the query for the table's size by the database's statistics, or None: it keeps none."""
        return None

    def check_isolation(self, isolation: str | None) -> str | None:
        """Return the isolation level as SQL spells it, or None for the default.

        Raises:
            ValueError: there is no such level at all.
            UnsupportedOperationError: the database does not have it.
        """
        if isolation is None:
            return None
        level = isolation.upper().replace("_", " ")
        if level not in _ISOLATION_LEVELS:
            raise ValueError(f"isolation is one of {', '.join(sorted(_ISOLATION_LEVELS))}, not {isolation!r}")
        if level not in self.isolation_levels:
            raise UnsupportedOperationError(f"{self.name} has no isolation level {isolation!r}")
        return level


def on_conflict(
    insert: Any, row: Mapping[Any, Any], on: Sequence[str], written: Sequence[str], version: str | None
) -> Any:
    """Return an INSERT with ON CONFLICT DO UPDATE, as PostgreSQL and SQLite spell it."""
    table: sa.Table = insert.table
    changes: dict[Any, Any] = {table.columns[name]: insert.excluded[name] for name in written}
    if version is not None:
        changes[table.columns[version]] = table.columns[version] + sa.literal_column("1")
    key = list(table.primary_key.columns)
    if not {column.key for column in key}.intersection(on) and all(column in row for column in key):
        # The row that is found keeps its key. That the new key is another row's is a collision all the same, which
        # only writing it brings to light.
        other = table.alias()
        taken = sa.exists().where(*[other.columns[column.key] == row[column] for column in key])
        changes |= {column: sa.case((taken, row[column]), else_=column) for column in key}
    if not changes:
        changes[table.columns[on[0]]] = table.columns[on[0]]  # DO NOTHING would answer no row
    return insert.on_conflict_do_update(index_elements=[table.columns[name] for name in on], set_=changes)


def lower_case(text: str) -> str:
    """Return the text in lower case as databases have it: character by character, none of them becoming two."""
    return text.lower() if text.isascii() else "".join([character.lower()[0] for character in text])


def _fetch_all(cursor: Any) -> Any:
    return cursor.fetchall()


def _row_count(cursor: Any) -> Any:
    return cursor.rowcount


def _last_key(cursor: Any) -> Any:
    return cursor.lastrowid


def _nothing(_cursor: Any) -> None:
    return None
