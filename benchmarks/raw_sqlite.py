"""aiosqlite with hand-written SQL: a queue of connections, and one hop to the connection's thread per statement."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any
from uuid import UUID

import aiosqlite
from sqlalchemy import make_url

from .accounts import COLUMNS, PAGE_SIZE, Account
from .contestants import POOL_SIZE, Contestant

PRAGMAS = (
    "PRAGMA journal_mode = WAL",
    "PRAGMA synchronous = NORMAL",
    "PRAGMA foreign_keys = ON",
    "PRAGMA busy_timeout = 5000",
)
"""The library's own."""

_NAMES = ", ".join(COLUMNS)
_REST = [name for name in COLUMNS if name != "id"]

GET = f"SELECT {_NAMES} FROM accounts WHERE id = ?"
PAGE = f"SELECT {_NAMES} FROM accounts WHERE status = ? ORDER BY created_at DESC, id DESC LIMIT {PAGE_SIZE}"
COUNT = "SELECT count(*) FROM accounts WHERE status = ?"
STREAM = f"SELECT {_NAMES} FROM accounts ORDER BY id"
ADD = f"INSERT INTO accounts ({_NAMES}) VALUES ({', '.join('?' * len(COLUMNS))})"
UPDATE = f"UPDATE accounts SET {', '.join(f'{name} = ?' for name in _REST)} WHERE id = ?"
UPSERT = f"{ADD} ON CONFLICT (id) DO UPDATE SET {', '.join(f'{name} = excluded.{name}' for name in _REST)}"
DELETE = "DELETE FROM accounts WHERE id = ?"


def _values(account: Account) -> tuple[Any, ...]:
    return (
        account.id,
        account.public_id.hex,
        account.email,
        account.name,
        account.status,
        int(account.balance.scaleb(2)),
        account.is_active,
        account.note,
        account.login_count,
        account.created_at.replace(tzinfo=None).isoformat(" ", "microseconds"),
    )


def _key_last(account: Account) -> tuple[Any, ...]:
    key, *rest = _values(account)
    return (*rest, key)


def _account(row: Sequence[Any]) -> Account:
    number, public_id, email, name, status, cents, is_active, note, login_count, created_at = row
    return Account(
        number,
        UUID(public_id),
        email,
        name,
        status,
        Decimal(cents).scaleb(-2),
        bool(is_active),
        note,
        login_count,
        datetime.fromisoformat(created_at).replace(tzinfo=UTC),
    )


class RawSQLite(Contestant):
    """aiosqlite in autocommit, with the library's pragmas."""

    name = "raw aiosqlite"

    async def setup(self, url: str) -> None:
        self._idle: asyncio.Queue[aiosqlite.Connection] = asyncio.Queue()
        for _ in range(POOL_SIZE):
            connection = await aiosqlite.connect(make_url(url).database or "", isolation_level=None)
            for pragma in PRAGMAS:
                await connection.execute_fetchall(pragma)
            self._idle.put_nowait(connection)

    async def teardown(self) -> None:
        while not self._idle.empty():
            await self._idle.get_nowait().close()

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator[aiosqlite.Connection]:
        connection = await self._idle.get()
        try:
            yield connection
        finally:
            self._idle.put_nowait(connection)

    async def get(self, number: int) -> Account | None:
        async with self._connection() as connection:
            rows: Any = await connection.execute_fetchall(GET, (number,))
        return _account(rows[0]) if rows else None

    async def page(self, status: str) -> Sequence[Account]:
        async with self._connection() as connection:
            rows: Any = await connection.execute_fetchall(PAGE, (status,))
        return [_account(row) for row in rows]

    async def get_many(self, numbers: list[int]) -> Sequence[Account]:
        sql = f"SELECT {_NAMES} FROM accounts WHERE id IN ({', '.join('?' * len(numbers))})"
        async with self._connection() as connection:
            rows: Any = await connection.execute_fetchall(sql, numbers)
        return [_account(row) for row in rows]

    async def count(self, status: str) -> int:
        async with self._connection() as connection:
            rows: Any = await connection.execute_fetchall(COUNT, (status,))
        return int(rows[0][0])

    async def unit(self, numbers: list[int]) -> Sequence[Account]:
        found = []
        async with self._connection() as connection:
            await connection.execute("BEGIN IMMEDIATE")
            for number in numbers:
                rows: Any = await connection.execute_fetchall(GET, (number,))
                found.append(_account(rows[0]))
            await connection.execute("COMMIT")
        return found

    async def stream(self, take: Callable[[Account], object]) -> None:
        async with self._connection() as connection, connection.execute(STREAM) as cursor:
            while rows := await cursor.fetchmany(1000):
                for row in rows:
                    take(_account(row))

    async def add(self, account: Account) -> Account:
        async with self._connection() as connection:
            await connection.execute(ADD, _values(account))
        return account

    async def update(self, account: Account) -> bool:
        async with self._connection() as connection:
            return (await connection.execute(UPDATE, _key_last(account))).rowcount == 1

    async def delete(self, number: int) -> bool:
        async with self._connection() as connection:
            return (await connection.execute(DELETE, (number,))).rowcount == 1

    async def add_many(self, accounts: list[Account]) -> None:
        await self._execute_many(ADD, [_values(account) for account in accounts])

    async def upsert_many(self, accounts: list[Account]) -> None:
        await self._execute_many(UPSERT, [_values(account) for account in accounts])

    async def update_many(self, accounts: list[Account]) -> None:
        await self._execute_many(UPDATE, [_key_last(account) for account in accounts])

    async def _execute_many(self, sql: str, rows: list[tuple[Any, ...]]) -> None:
        async with self._connection() as connection:
            await connection.execute("BEGIN IMMEDIATE")
            await connection.executemany(sql, rows)
            await connection.execute("COMMIT")
