"""SQLAlchemy Core written by hand, as its documentation does: `engine.connect()`, `select()`, `row.name`."""

from collections.abc import Callable, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import mysql, postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from .accounts import COLUMNS, PAGE_SIZE, Account, plain_table
from .contestants import POOL_SIZE, Contestant
from .raw_sqlite import PRAGMAS

_REST = [name for name in COLUMNS if name != "id"]


def make_engine(url: str, *, defaults: bool = False) -> AsyncEngine:
    """Return an engine with default settings but the pool's size, and on SQLite the pragmas that all contestants have."""
    engine = create_async_engine(url, pool_size=POOL_SIZE, max_overflow=0)
    if engine.dialect.name == "sqlite" and not defaults:

        @sa.event.listens_for(engine.sync_engine, "connect")
        def set_up(connection: Any, _record: Any) -> None:
            cursor = connection.cursor()
            for pragma in PRAGMAS:
                cursor.execute(pragma)
            cursor.close()

    return engine


def _values(account: Account) -> dict[str, Any]:
    return {
        "id": account.id,
        "public_id": account.public_id,
        "email": account.email,
        "name": account.name,
        "status": account.status,
        "balance": account.balance,
        "is_active": account.is_active,
        "note": account.note,
        "login_count": account.login_count,
        "created_at": account.created_at,
    }


def _account(row: Any) -> Account:
    return Account(
        id=row.id,
        public_id=row.public_id,
        email=row.email,
        name=row.name,
        status=row.status,
        balance=row.balance,
        is_active=row.is_active,
        note=row.note,
        login_count=row.login_count,
        created_at=row.created_at,
    )


def page_of(status: str) -> Any:
    """Return the query for the newest accounts with this status."""
    query = sa.select(plain_table).where(plain_table.c.status == status)
    return query.order_by(plain_table.c.created_at.desc(), plain_table.c.id.desc()).limit(PAGE_SIZE)


class Core(Contestant):
    """SQLAlchemy Core by hand."""

    name = "core"

    async def setup(self, url: str) -> None:
        self._engine = make_engine(url)

    async def teardown(self) -> None:
        await self._engine.dispose()

    async def get(self, number: int) -> Account | None:
        async with self._engine.connect() as connection:
            result = await connection.execute(sa.select(plain_table).where(plain_table.c.id == number))
            row = result.one_or_none()
        return _account(row) if row else None

    async def page(self, status: str) -> Sequence[Account]:
        async with self._engine.connect() as connection:
            return [_account(row) for row in await connection.execute(page_of(status))]

    async def get_many(self, numbers: list[int]) -> Sequence[Account]:
        async with self._engine.connect() as connection:
            result = await connection.execute(sa.select(plain_table).where(plain_table.c.id.in_(numbers)))
            return [_account(row) for row in result]

    async def count(self, status: str) -> int:
        query = sa.select(sa.func.count()).select_from(plain_table).where(plain_table.c.status == status)
        async with self._engine.connect() as connection:
            return (await connection.execute(query)).scalar_one()

    async def unit(self, numbers: list[int]) -> Sequence[Account]:
        found = []
        async with self._engine.begin() as connection:
            for number in numbers:
                result = await connection.execute(sa.select(plain_table).where(plain_table.c.id == number))
                found.append(_account(result.one()))
        return found

    async def stream(self, take: Callable[[Account], object]) -> None:
        async with (
            self._engine.connect() as connection,
            connection.stream(sa.select(plain_table).order_by(plain_table.c.id)) as result,
        ):
            async for row in result:
                take(_account(row))

    async def add(self, account: Account) -> Account:
        async with self._engine.begin() as connection:
            await connection.execute(sa.insert(plain_table).values(**_values(account)))
        return account

    async def update(self, account: Account) -> bool:
        values = _values(account)
        statement = sa.update(plain_table).where(plain_table.c.id == values.pop("id")).values(**values)
        async with self._engine.begin() as connection:
            return (await connection.execute(statement)).rowcount == 1

    async def delete(self, number: int) -> bool:
        async with self._engine.begin() as connection:
            result = await connection.execute(sa.delete(plain_table).where(plain_table.c.id == number))
            return result.rowcount == 1

    async def add_many(self, accounts: list[Account]) -> None:
        async with self._engine.begin() as connection:
            await connection.execute(sa.insert(plain_table), [_values(account) for account in accounts])

    async def upsert_many(self, accounts: list[Account]) -> None:
        statement: Any
        if self._engine.dialect.name == "mysql":
            insert = mysql.insert(plain_table)
            statement = insert.on_duplicate_key_update({name: insert.inserted[name] for name in _REST})
        else:
            dialect = postgresql if self._engine.dialect.name == "postgresql" else sqlite
            on_conflict = dialect.insert(plain_table)
            statement = on_conflict.on_conflict_do_update(
                index_elements=["id"], set_={name: on_conflict.excluded[name] for name in _REST}
            )
        async with self._engine.begin() as connection:
            await connection.execute(statement, [_values(account) for account in accounts])

    async def update_many(self, accounts: list[Account]) -> None:
        statement = (
            sa.update(plain_table)
            .where(plain_table.c.id == sa.bindparam("key"))
            .values({name: sa.bindparam(name) for name in _REST})
        )
        rows = [_values(account) for account in accounts]
        for row in rows:
            row["key"] = row.pop("id")
        async with self._engine.begin() as connection:
            await connection.execute(statement, rows)


class CoreWithSQLiteDefaults(Core):
    """The same with SQLite's own settings, which wait for the disk at every commit; where that matters most."""

    name = "core, SQLite's defaults"

    def takes_part(self, method: str) -> bool:
        return method in ("add", "update", "delete")

    async def setup(self, url: str) -> None:
        self._engine = make_engine(url, defaults=True)


class TunedCore(Core):
    """Reads as somebody writes them who knows where Core's time goes: autocommit, rows by position, rows in batches."""

    name = "core, tuned"

    def takes_part(self, method: str) -> bool:
        return method in ("get", "page", "stream")

    async def setup(self, url: str) -> None:
        self._engine = make_engine(url).execution_options(isolation_level="AUTOCOMMIT")
        self._streaming = make_engine(url)

    async def teardown(self) -> None:
        await self._engine.dispose()
        await self._streaming.dispose()

    async def get(self, number: int) -> Account | None:
        async with self._engine.connect() as connection:
            result = await connection.execute(sa.select(plain_table).where(plain_table.c.id == number))
            row = result.one_or_none()
        return Account(*row) if row else None

    async def page(self, status: str) -> Sequence[Account]:
        async with self._engine.connect() as connection:
            return [Account(*row) for row in await connection.execute(page_of(status))]

    async def stream(self, take: Callable[[Account], object]) -> None:
        async with (
            self._streaming.connect() as connection,
            connection.stream(sa.select(plain_table).order_by(plain_table.c.id)) as result,
        ):
            async for rows in result.partitions(1000):
                for row in rows:
                    take(Account(*row))
