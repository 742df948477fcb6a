"""SQL Server, with aioodbc, on the portable path."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import mssql
from sqlalchemy.engine import URL

from fastapi_building_blocks.domain.errors import (
    BuildingBlocksError,
    ConnectionLostError,
    ConstraintError,
    DeadlockError,
    DuplicateKeyError,
    ForeignKeyError,
    LockNotAvailableError,
    SerializationError,
    StatementTimeoutError,
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
    1205: DeadlockError,
    1222: DeadlockError,
    3960: SerializationError,
    3906: UnsupportedOperationError,
}
_BY_STATE: dict[str, type[BuildingBlocksError]] = {"HYT00": StatementTimeoutError, "HYT01": ConnectionLostError}
_LOCK_TIMEOUT = 1222
_NATIVE_CODE = re.compile(r"\((\d+)\) \(SQL")
"""pyodbc gives the server's error number in the message only."""
_LOCK_HINTS = {
    "update": "WITH (UPDLOCK, ROWLOCK)",
    "nowait": "WITH (UPDLOCK, ROWLOCK, NOWAIT)",
    "skip_locked": "WITH (UPDLOCK, ROWLOCK, READPAST)",
}
_BINARY = "Latin1_General_100_BIN2"


class SQLServerDialect(PortableDialect):
    """SQL Server through the adapted cursor."""

    name = "mssql"
    installs = "mssql"
    insert_returning = True
    update_returning = True
    upsert_style = "merge"
    paging_needs_order = True
    largest_statement = 2_099
    isolation_levels = PortableDialect.isolation_levels | {"SNAPSHOT"}

    def engine_arguments(self, url: URL) -> dict[str, Any]:
        return {"connect_args": {"timeout": int(self.timeouts.connect)}}

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

    def classify(self, error: BaseException, statement: Any) -> Failure | None:
        state, message = (*map(str, error.args[:2]), "", "")[:2]
        found = _NATIVE_CODE.search(message)
        code = int(found[1]) if found else 0
        if code == _LOCK_TIMEOUT and getattr(statement, "lock", None) == "nowait":
            return Failure(LockNotAvailableError)
        if code == 547 and "CHECK constraint" in message:
            return Failure(ConstraintError)
        kind = _BY_CODE.get(code) or _BY_STATE.get(state) or (ConnectionLostError if state.startswith("08") else None)
        if kind is None:
            return None
        names = re.findall(r"(?:constraint|index|column) '([^']+)'", message)
        if kind is ConstraintError:
            return Failure(kind, columns=tuple(names[:1]))
        return Failure(kind, names[0] if names else None)

    def text_search(self, operator: Operator, column: Any, operand: Any) -> Any:
        if operator is Operator.ICONTAINS:
            column, operand = sa.func.lower(column), sa.func.lower(operand)
        return sa.collate(column, _BINARY).like(operand, escape="\\")

    def text_operand(self, operator: Operator, text: str | None) -> str | None:
        pattern = super().text_operand(operator, text)
        return pattern.replace("[", "\\[") if pattern is not None else None

    def upsert(
        self, table: sa.Table, row: Mapping[Any, Any], on: Sequence[str], written: Sequence[str], version: str | None
    ) -> Any:
        # HOLDLOCK keeps others from inserting the same key between the look-up and the INSERT.
        # https://learn.microsoft.com/sql/t-sql/statements/merge-transact-sql
        preparer = mssql.dialect().identifier_preparer

        def name(column: Any) -> str:
            return preparer.format_column(column)

        columns = list(row)
        source = ", ".join(name(column) for column in columns)
        changes = [f"target.{name(table.columns[key])} = source.{name(table.columns[key])}" for key in written]
        if version is not None:
            changes.append(f"target.{name(table.columns[version])} = target.{name(table.columns[version])} + 1")
        matched = f"WHEN MATCHED THEN UPDATE SET {', '.join(changes)} " if changes else ""
        match = " AND ".join(f"target.{name(table.columns[key])} = source.{name(table.columns[key])}" for key in on)
        return sa.text(
            f"MERGE INTO {preparer.format_table(table)} WITH (HOLDLOCK) AS target "
            f"USING (VALUES ({', '.join(f':{item.key}' for item in row.values())})) AS source ({source}) ON {match} "
            f"{matched}WHEN NOT MATCHED THEN INSERT ({source}) "
            f"VALUES ({', '.join(f'source.{name(column)}' for column in columns)});"
        ).bindparams(*row.values())

    def returning_upsert(self, upsert: Any, columns: Sequence[Any]) -> Any:
        preparer = mssql.dialect().identifier_preparer
        inserted = ", ".join(f"inserted.{preparer.format_column(column)}" for column in columns)
        text = f"{upsert.text.removesuffix(';')} OUTPUT {inserted};"
        return sa.text(text).bindparams(*upsert._bindparams.values())

    def lock(self, query: Any, table: sa.Table, lock: str) -> Any:
        return query.with_hint(table, _LOCK_HINTS[lock], "mssql")

    def estimate(self, table: sa.Table) -> Any:
        name = f"{table.schema or 'dbo'}.{table.name}"
        return sa.text(
            "SELECT SUM(rows) FROM sys.partitions WHERE object_id = OBJECT_ID(:name) AND index_id IN (0, 1)"
        ).bindparams(name=name)
