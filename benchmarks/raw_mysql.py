"""aiomysql and asyncmy with hand-written SQL, each on its own pool."""

from collections.abc import Callable, Sequence
from datetime import UTC
from typing import Any
from uuid import UUID

import aiomysql
import asyncmy
import asyncmy.cursors
from sqlalchemy import make_url

from .accounts import COLUMNS, PAGE_SIZE, Account
from .contestants import POOL_SIZE, Contestant

_NAMES = ", ".join(COLUMNS)
_REST = [name for name in COLUMNS if name != "id"]

GET = f"SELECT {_NAMES} FROM accounts WHERE id = %s"
PAGE = f"SELECT {_NAMES} FROM accounts WHERE status = %s ORDER BY created_at DESC, id DESC LIMIT {PAGE_SIZE}"
COUNT = "SELECT count(*) FROM accounts WHERE status = %s"
STREAM = f"SELECT {_NAMES} FROM accounts ORDER BY id"
ADD = f"INSERT INTO accounts ({_NAMES}) VALUES ({', '.join(['%s'] * len(COLUMNS))})"
UPDATE = f"UPDATE accounts SET {', '.join(f'{name} = %s' for name in _REST)} WHERE id = %s"
UPSERT = f"{ADD} ON DUPLICATE KEY UPDATE {', '.join(f'{name} = VALUES({name})' for name in _REST)}"
DELETE = "DELETE FROM accounts WHERE id = %s"


def _values(account: Account) -> tuple[Any, ...]:
    return (
        account.id,
        account.public_id.hex,
        account.email,
        account.name,
        account.status,
        account.balance,
        account.is_active,
        account.note,
        account.login_count,
        account.created_at.replace(tzinfo=None),
    )


def _key_last(account: Account) -> tuple[Any, ...]:
    key, *rest = _values(account)
    return (*rest, key)


def _account(row: Sequence[Any]) -> Account:
    number, public_id, email, name, status, balance, is_active, note, login_count, created_at = row
    return Account(
        number,
        UUID(public_id),
        email,
        name,
        status,
        balance,
        bool(is_active),
        note,
        login_count,
        created_at.replace(tzinfo=UTC),
    )


class RawMySQL(Contestant):
    """aiomysql and its pool, in autocommit."""

    name = "raw aiomysql"
    _create_pool: Callable[..., Any] = staticmethod(aiomysql.create_pool)
    _streaming_cursor: Any = aiomysql.SSCursor
    _pool: Any

    async def setup(self, url: str) -> None:
        parts = make_url(url)
        self._pool = await self._create_pool(
            host=parts.host,
            port=parts.port or 3306,
            user=parts.username,
            password=parts.password or "",
            db=parts.database,
            charset="utf8mb4",
            autocommit=True,
            minsize=POOL_SIZE,
            maxsize=POOL_SIZE,
        )

    async def teardown(self) -> None:
        self._pool.close()
        await self._pool.wait_closed()

    async def get(self, number: int) -> Account | None:
        async with self._pool.acquire() as connection, connection.cursor() as cursor:
            await cursor.execute(GET, (number,))
            row = await cursor.fetchone()
        return _account(row) if row else None

    async def page(self, status: str) -> Sequence[Account]:
        async with self._pool.acquire() as connection, connection.cursor() as cursor:
            await cursor.execute(PAGE, (status,))
            rows = await cursor.fetchall()
        return [_account(row) for row in rows]

    async def get_many(self, numbers: list[int]) -> Sequence[Account]:
        sql = f"SELECT {_NAMES} FROM accounts WHERE id IN ({', '.join(['%s'] * len(numbers))})"
        async with self._pool.acquire() as connection, connection.cursor() as cursor:
            await cursor.execute(sql, numbers)
            rows = await cursor.fetchall()
        return [_account(row) for row in rows]

    async def count(self, status: str) -> int:
        async with self._pool.acquire() as connection, connection.cursor() as cursor:
            await cursor.execute(COUNT, (status,))
            (number,) = await cursor.fetchone()
        return int(number)

    async def unit(self, numbers: list[int]) -> Sequence[Account]:
        found = []
        async with self._pool.acquire() as connection:
            await connection.begin()
            async with connection.cursor() as cursor:
                for number in numbers:
                    await cursor.execute(GET, (number,))
                    found.append(_account(await cursor.fetchone()))
            await connection.commit()
        return found

    async def stream(self, take: Callable[[Account], object]) -> None:
        async with self._pool.acquire() as connection, connection.cursor(self._streaming_cursor) as cursor:
            await cursor.execute(STREAM)
            while rows := await cursor.fetchmany(1000):
                for row in rows:
                    take(_account(row))

    async def add(self, account: Account) -> Account:
        async with self._pool.acquire() as connection, connection.cursor() as cursor:
            await cursor.execute(ADD, _values(account))
        return account

    async def update(self, account: Account) -> bool:
        async with self._pool.acquire() as connection, connection.cursor() as cursor:
            return bool(await cursor.execute(UPDATE, _key_last(account)) == 1)

    async def delete(self, number: int) -> bool:
        async with self._pool.acquire() as connection, connection.cursor() as cursor:
            return bool(await cursor.execute(DELETE, (number,)) == 1)

    async def add_many(self, accounts: list[Account]) -> None:
        await self._execute_many(ADD, [_values(account) for account in accounts])

    async def upsert_many(self, accounts: list[Account]) -> None:
        await self._execute_many(UPSERT, [_values(account) for account in accounts])

    async def update_many(self, accounts: list[Account]) -> None:
        await self._execute_many(UPDATE, [_key_last(account) for account in accounts])

    async def _execute_many(self, sql: str, rows: list[tuple[Any, ...]]) -> None:
        async with self._pool.acquire() as connection:
            await connection.begin()
            async with connection.cursor() as cursor:
                await cursor.executemany(sql, rows)
            await connection.commit()


class RawAsyncmy(RawMySQL):
    """asyncmy and its pool, in autocommit."""

    name = "raw asyncmy"
    _create_pool: Callable[..., Any] = staticmethod(asyncmy.create_pool)
    _streaming_cursor: Any = asyncmy.cursors.SSCursor
