"""SQL Server, with aioodbc, on the portable path."""

import math
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import URL
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler

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
    UnavailableError,
    UnsupportedOperationError,
)
from fastapi_building_blocks.domain.query import Operator
from fastapi_building_blocks.infrastructure.database.connections import PooledConnection

from .portable import Failure, PortableDialect

# https://learn.microsoft.com/sql/relational-databases/errors-events/database-engine-events-and-errors
_BY_CODE: dict[int, type[BuildingBlocksError]] = {
    2627: DuplicateKeyError,
    2601: DuplicateKeyError,
    547: ForeignKeyError,
    515: ConstraintError,
    2628: ConstraintError,
    8152: ConstraintError,
    220: ConstraintError,
    8115: ConstraintError,
    241: InvalidInputError,
    245: InvalidInputError,
    8114: InvalidInputError,
    8169: InvalidInputError,
    1205: DeadlockError,
    1222: DeadlockError,
    3960: SerializationError,
    650: UnsupportedOperationError,
    3906: UnsupportedOperationError,
    3952: UnsupportedOperationError,
    596: ConnectionLostError,
    6005: ConnectionLostError,
    40613: ConnectionLostError,
    701: UnavailableError,
    1105: UnavailableError,
    1204: UnavailableError,
    9002: UnavailableError,
}
_REFUSALS = {"4060": "the database does not exist, or the user may not use it", "18456": "the login was refused"}
_LOCK_TIMEOUT = 1222
_CONFLICT = 547
_CLIENT_TIMEOUT = "HYT00"
_NATIVE_CODE = re.compile(r"\((\d+)\) \((SQL\w+)\)")
"""pyodbc gives the server's error number in the message only, followed by the function that it called."""
_SUBJECT = re.compile(r"""(?:constraint|index|column) (?:'([^']+)'|"([^"]+)")""")
_LOCK_HINTS = {
    "share": "WITH (HOLDLOCK, ROWLOCK)",
    "update": "WITH (UPDLOCK, ROWLOCK)",
    "nowait": "WITH (UPDLOCK, ROWLOCK, NOWAIT)",
    "skip_locked": "WITH (UPDLOCK, ROWLOCK, READPAST)",
}
_BY_CODE_POINT = "Latin1_General_100_BIN2_UTF8"
"""Without ``_UTF8`` a VARCHAR column would be squeezed through code page 1252 before it is compared."""


class SQLServerDialect(PortableDialect):
    """SQL Server 2019 and later through the adapted cursor."""

    name = "mssql"
    installs = "mssql"
    default_port = 1433
    refusals = _REFUSALS
    migration_lock = (
        "SET NOCOUNT ON; DECLARE @answer INT; EXEC @answer = sp_getapplock @Resource = 'migration', "
        "@LockMode = 'Exclusive', @LockOwner = 'Session', @LockTimeout = 0; "
        "SELECT CASE WHEN @answer >= 0 THEN 1 ELSE 0 END"
    )
    insert_returning = True
    update_returning = True
    upsert_style = "merge"
    paging_needs_order = True
    largest_statement = 2_099
    isolation_levels = PortableDialect.isolation_levels | {"SNAPSHOT"}
    _threads = 1

    def pool_size(self, url: URL, pool_size: int, max_overflow: int) -> tuple[int, int]:
        # A call that was cancelled goes on in its thread, so there are threads to spare.
        self._threads = 2 * (pool_size + max_overflow)
        return pool_size, max_overflow

    def engine_arguments(self, url: URL) -> dict[str, Any]:
        # In the loop's own executor, callers that wait for a lock could take all threads from the one that holds it.
        threads = ThreadPoolExecutor(self._threads, "mssql")
        return {"connect_args": {"timeout": math.ceil(self.timeouts.connect), "executor": threads}}

    def prepare(self, engine: AsyncEngine) -> None:
        limit = self.timeouts.statement
        if limit is None:
            return

        @sa.event.listens_for(engine.sync_engine, "connect")
        def set_up(dbapi_connection: Any, record: Any) -> None:  # noqa: ARG001
            dbapi_connection.driver_connection._conn.timeout = math.ceil(limit)

    async def begin(self, connection: PooledConnection, isolation: str | None, read_only: bool) -> None:
        if read_only:
            raise UnsupportedOperationError("SQL Server has no read-only transactions")
        connection.info["in_transaction"] = True
        level = isolation or self.default_isolation
        await self.command(connection, f"SET TRANSACTION ISOLATION LEVEL {level}; BEGIN TRANSACTION")

    async def commit(self, connection: PooledConnection) -> None:
        await self._end(connection, "COMMIT TRANSACTION")

    async def rollback(self, connection: PooledConnection) -> None:
        await self._end(connection, "IF @@TRANCOUNT > 0 ROLLBACK TRANSACTION")

    async def _end(self, connection: PooledConnection, how: str) -> None:
        # An isolation level outlives its transaction here, so it is set back in the same batch.
        await self.command(connection, f"{how}; SET TRANSACTION ISOLATION LEVEL {self.default_isolation}")
        connection.info.pop("in_transaction", None)

    async def savepoint(self, connection: PooledConnection, name: str) -> None:
        await self.command(connection, f"SAVE TRANSACTION {name}")

    async def release_savepoint(self, connection: PooledConnection, name: str) -> None:
        """Do nothing: SQL Server has no RELEASE, a savepoint ends with its transaction."""

    async def rollback_to_savepoint(self, connection: PooledConnection, name: str) -> None:
        await self.command(connection, f"ROLLBACK TRANSACTION {name}")

    def in_transaction(self, connection: PooledConnection) -> bool:
        return bool(connection.info.get("in_transaction"))

    def error_code(self, error: BaseException) -> str | None:
        codes = _NATIVE_CODE.findall(str(error.args[1])) if len(error.args) > 1 else []
        return str(codes[-1][0]) if codes else None

    def classify(self, error: BaseException, statement: Any) -> Failure | None:
        state, message = (*map(str, error.args[:2]), "", "")[:2]
        # The last one: the message may quote values, and they anything. What it is about stands before them.
        code, function = (_NATIVE_CODE.findall(message) or [("0", "")])[-1]
        number = int(code)
        found = _SUBJECT.search(message)
        subject = found[1] or found[2] if found else None
        if number == _LOCK_TIMEOUT and getattr(statement, "lock", None) == "nowait":
            return Failure(LockNotAvailableError)
        if number == _CONFLICT and "CHECK constraint" in message.partition('"')[0]:
            return Failure(ConstraintError, subject)
        kind = _BY_CODE.get(number) or _by_state(state, function)
        if kind is ConstraintError:
            return Failure(kind, columns=(subject,) if subject else ())
        return Failure(kind, subject) if kind is not None else None

    def text_search(self, operator: Operator, column: Any, operand: Any) -> Any:
        if operator is Operator.ICONTAINS:
            column, operand = sa.func.lower(column), sa.func.lower(operand)
        return sa.collate(column, _BY_CODE_POINT).like(operand, escape="\\")

    def text_operand(self, operator: Operator, text: str | None) -> str | None:
        pattern = super().text_operand(operator, text)
        return pattern.replace("[", "\\[") if pattern is not None else None

    def insert_row(self, table: sa.Table, row: Mapping[Any, Any]) -> Any:
        return _IdentityInsert(table).values(row) if _identity(table) in row else super().insert_row(table, row)

    def upsert(
        self, table: sa.Table, row: Mapping[Any, Any], on: Sequence[str], written: Sequence[str], version: str | None
    ) -> Any:
        return _Merge(table, row, on, written, version)

    def lock(self, query: Any, table: sa.Table, lock: str) -> Any:
        return query.with_hint(table, _LOCK_HINTS[lock], "mssql")

    def estimate(self, table: sa.Table) -> Any:
        name = ".".join(f"[{part.replace(']', ']]')}]" for part in (table.schema, table.name) if part)
        return sa.text(
            "SELECT SUM(rows) FROM sys.partitions WHERE object_id = OBJECT_ID(:name) AND index_id IN (0, 1)"
        ).bindparams(name=name)


def _by_state(state: str, function: str) -> type[BuildingBlocksError] | None:
    if state == _CLIENT_TIMEOUT and function != "SQLDriverConnect":
        return StatementTimeoutError
    return ConnectionLostError if state.startswith("08") or state in (_CLIENT_TIMEOUT, "HYT01") else None


def _identity(table: sa.Table) -> Any:
    """Return the column whose values the database counts up, or None."""
    return next((column for column in table.columns if column.identity is not None), table.autoincrement_column)


class _Merge(sa.Executable, sa.ClauseElement):
    """An atomic upsert of one row: https://learn.microsoft.com/sql/t-sql/statements/merge-transact-sql."""

    inherit_cache = False

    def __init__(
        self, table: sa.Table, row: Mapping[Any, Any], on: Sequence[str], written: Sequence[str], version: str | None
    ) -> None:
        self.table = table
        self.row = row
        self.on = on
        self.written = written
        self.version = version
        self.answer: Sequence[Any] = ()

    def returning(self, *columns: Any) -> "_Merge":
        merge = _Merge(self.table, self.row, self.on, self.written, self.version)
        merge.answer = columns
        return merge


@compiles(_Merge)
def _compile_merge(merge: _Merge, compiler: SQLCompiler, **kwargs: Any) -> str:
    columns, row = merge.table.columns, merge.row
    table, identity = compiler.preparer.format_table(merge.table), _identity(merge.table)

    def name(column: Any) -> str:
        return str(compiler.preparer.format_column(column))

    def value(column: Any) -> str:
        return compiler.process(row[column], **kwargs)

    # The values stand where their columns are, not in a source table: there each takes the column's type and
    # collation, NULL included. HOLDLOCK keeps others from inserting the same key in between.
    match = " AND ".join(f"target.{name(columns[key])} = {value(columns[key])}" for key in merge.on)
    changes = [f"target.{name(columns[key])} = {value(columns[key])}" for key in merge.written]
    if merge.version is not None:
        version = name(columns[merge.version])
        changes.append(f"target.{version} = target.{version} + 1")
    keys = list(merge.table.primary_key.columns)
    if not {key.key for key in keys}.intersection(merge.on) and all(key in row for key in keys):
        # As ``on_conflict`` has it: the row keeps its key, unless the new key is another row's; then they collide.
        taken = " AND ".join(f"other.{name(key)} = {value(key)}" for key in keys)
        taken = f"EXISTS (SELECT 1 FROM {table} AS other WHERE {taken})"  # noqa: S608 - names are quoted, values parameters
        changes += [
            f"target.{name(key)} = CASE WHEN {taken} THEN {value(key)} ELSE target.{name(key)} END"
            for key in keys
            if key is not identity
        ]
    if not changes:  # without an update there would be no row to answer
        kept = next(name(column) for column in columns if column is not identity and column.computed is None)
        changes = [f"target.{kept} = target.{kept}"]
    answer = f" OUTPUT {', '.join(f'inserted.{name(column)}' for column in merge.answer)}" if merge.answer else ""
    sql = (  # names are quoted, values are parameters
        f"MERGE INTO {table} WITH (HOLDLOCK) AS target USING (VALUES (1)) AS source (one) ON {match} "  # noqa: S608
        f"WHEN MATCHED THEN UPDATE SET {', '.join(changes)} "
        f"WHEN NOT MATCHED THEN INSERT ({', '.join(name(column) for column in row)}) "
        f"VALUES ({', '.join(value(column) for column in row)}){answer};"
    )
    return _giving_identity(sql, merge.table, compiler) if identity in row else sql


class _IdentityInsert(sa.Insert):
    """An INSERT that gives the key which the database would count up."""

    inherit_cache = False


@compiles(_IdentityInsert)
def _compile_identity_insert(insert: _IdentityInsert, compiler: SQLCompiler, **kwargs: Any) -> str:
    return _giving_identity(compiler.visit_insert(insert, **kwargs), insert.table, compiler)  # type: ignore[no-untyped-call]


def _giving_identity(sql: str, table: Any, compiler: SQLCompiler) -> str:
    """Return the batch that lets a statement write the column which the database counts up."""
    switch = f"SET IDENTITY_INSERT {compiler.preparer.format_table(table)}"
    return f"{switch} ON; {sql.removesuffix(';')}; {switch} OFF"
