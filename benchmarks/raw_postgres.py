"""asyncpg with hand-written SQL: on its own pool, and on a queue of connections that nobody resets."""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
from sqlalchemy import make_url

from .accounts import COLUMNS, PAGE_SIZE, Account
from .contestants import POOL_SIZE, Contestant

_NAMES = ", ".join(COLUMNS)
_MARKS = ", ".join(f"${number}" for number in range(1, len(COLUMNS) + 1))
_CHANGES = ", ".join(f"{name} = ${number}" for number, name in enumerate(COLUMNS, 1) if name != "id")

GET = f"SELECT {_NAMES} FROM accounts WHERE id = $1"
GET_MANY = f"SELECT {_NAMES} FROM accounts WHERE id = ANY($1::int[])"
PAGE = f"SELECT {_NAMES} FROM accounts WHERE status = $1 ORDER BY created_at DESC, id DESC LIMIT {PAGE_SIZE}"
COUNT = "SELECT count(*) FROM accounts WHERE status = $1"
STREAM = f"SELECT {_NAMES} FROM accounts ORDER BY id"
ADD = f"INSERT INTO accounts ({_NAMES}) VALUES ({_MARKS})"
UPDATE = f"UPDATE accounts SET {_CHANGES} WHERE id = $1"
UPSERT = (
    f"{ADD} ON CONFLICT (id) DO UPDATE SET {', '.join(f'{name} = excluded.{name}' for name in COLUMNS if name != 'id')}"
)
DELETE = "DELETE FROM accounts WHERE id = $1"


def _values(account: Account) -> tuple[Any, ...]:
    return (
        account.id,
        account.public_id,
        account.email,
        account.name,
        account.status,
        account.balance,
        account.is_active,
        account.note,
        account.login_count,
        account.created_at,
    )


def _dsn(url: str) -> str:
    return make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)


class RawPostgres(Contestant):
    """asyncpg and its pool, which resets a connection with a query each time it comes back."""

    name = "raw asyncpg"
    _pool: Any

    async def setup(self, url: str) -> None:
        self._pool = await asyncpg.create_pool(_dsn(url), min_size=POOL_SIZE, max_size=POOL_SIZE)

    async def teardown(self) -> None:
        await self._pool.close()

    def _connection(self) -> Any:
        return self._pool.acquire()

    async def get(self, number: int) -> Account | None:
        async with self._connection() as connection:
            row = await connection.fetchrow(GET, number)
        return Account(*row) if row else None

    async def page(self, status: str) -> Sequence[Account]:
        async with self._connection() as connection:
            rows = await connection.fetch(PAGE, status)
        return [Account(*row) for row in rows]

    async def get_many(self, numbers: list[int]) -> Sequence[Account]:
        async with self._connection() as connection:
            rows = await connection.fetch(GET_MANY, numbers)
        return [Account(*row) for row in rows]

    async def count(self, status: str) -> int:
        async with self._connection() as connection:
            return int(await connection.fetchval(COUNT, status))

    async def unit(self, numbers: list[int]) -> Sequence[Account]:
        async with self._connection() as connection, connection.transaction():
            return [Account(*await connection.fetchrow(GET, number)) for number in numbers]

    async def stream(self, take: Callable[[Account], object]) -> None:
        async with self._connection() as connection, connection.transaction():
            cursor = await connection.cursor(STREAM)
            while rows := await cursor.fetch(1000):
                for row in rows:
                    take(Account(*row))

    async def add(self, account: Account) -> Account:
        async with self._connection() as connection:
            await connection.execute(ADD, *_values(account))
        return account

    async def update(self, account: Account) -> bool:
        async with self._connection() as connection:
            return bool(await connection.execute(UPDATE, *_values(account)) == "UPDATE 1")

    async def delete(self, number: int) -> bool:
        async with self._connection() as connection:
            return bool(await connection.execute(DELETE, number) == "DELETE 1")

    async def add_many(self, accounts: list[Account]) -> None:
        async with self._connection() as connection:
            await connection.copy_records_to_table(
                "accounts", records=[_values(account) for account in accounts], columns=COLUMNS
            )

    async def upsert_many(self, accounts: list[Account]) -> None:
        async with self._connection() as connection:
            await connection.executemany(UPSERT, [_values(account) for account in accounts])

    async def update_many(self, accounts: list[Account]) -> None:
        async with self._connection() as connection:
            await connection.executemany(UPDATE, [_values(account) for account in accounts])


class BarePostgres(RawPostgres):
    """asyncpg's connections in a plain queue: nothing is reset, nothing is checked."""

    name = "bare asyncpg"

    async def setup(self, url: str) -> None:
        self._idle: asyncio.Queue[Any] = asyncio.Queue()
        for _ in range(POOL_SIZE):
            self._idle.put_nowait(await asyncpg.connect(_dsn(url)))

    async def teardown(self) -> None:
        while not self._idle.empty():
            await self._idle.get_nowait().close()

    @asynccontextmanager
    async def _connection(self) -> Any:
        connection = await self._idle.get()
        try:
            yield connection
        finally:
            self._idle.put_nowait(connection)
