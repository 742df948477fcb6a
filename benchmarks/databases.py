"""Where the databases are, a private one on each server, and the housekeeping that no contestant is timed for."""

import os
import secrets
import socket
import tempfile
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, closing
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy import URL, make_url
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from fastapi_building_blocks.infrastructure import SQLAlchemySession

from .accounts import PAGE_SIZE, STATUSES, Account, account, accounts, table
from .contestants import Contestant
from .core import Core, CoreWithSQLiteDefaults, TunedCore
from .ours import Ours, OursHandMapped, OursOnAsyncmy
from .peers import AdvancedAlchemy, FastCrud, SqlModel
from .raw_mysql import RawAsyncmy, RawMySQL
from .raw_postgres import BarePostgres, RawPostgres
from .raw_sqlite import RawSQLite

PEERS: tuple[type[Contestant], ...] = (AdvancedAlchemy, FastCrud, SqlModel)
CONTESTANTS: dict[str, tuple[type[Contestant], ...]] = {
    "postgres": (RawPostgres, BarePostgres, Core, TunedCore, Ours, OursHandMapped, *PEERS),
    "mysql": (RawMySQL, Core, TunedCore, Ours, OursHandMapped, RawAsyncmy, OursOnAsyncmy, *PEERS),
    "sqlite": (RawSQLite, Core, CoreWithSQLiteDefaults, TunedCore, Ours, OursHandMapped, *PEERS),
}
_SERVERS = {
    "postgres": ("POSTGRES_URL", "postgresql+asyncpg", "postgresql+asyncpg://postgres@127.0.0.1:5432/test"),
    "mysql": ("MYSQL_URL", "mysql+aiomysql", "mysql+aiomysql://root@127.0.0.1:3306/test"),
}
_TIDY = {"postgres": "VACUUM accounts", "sqlite": "PRAGMA wal_checkpoint(TRUNCATE)"}
_ENOUGH_TO_TIDY = 5_000
_CHUNK = 10_000


def find_server(name: str) -> URL | None:
    """Return the URL of a server: from the environment, or where it listens by default."""
    variable, drivername, default = _SERVERS[name]
    if given := os.environ.get(variable):
        return make_url(given).set(drivername=drivername)
    url = make_url(default)
    try:
        with closing(socket.create_connection((url.host or "", url.port or 0), 1)):
            return url
    except OSError:
        return None


@asynccontextmanager
async def private_database(name: str) -> AsyncIterator[str | None]:
    """Give the URL of an empty database that nobody else uses and that is gone afterwards; None without a server."""
    if name == "sqlite":
        with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
            yield f"sqlite+aiosqlite:///{Path(folder) / 'accounts.db'}"
        return
    server = find_server(name)
    if server is None:
        yield None
        return
    database = f"benchmark_{os.getpid()}_{secrets.token_hex(4)}"
    engine = create_async_engine(server, isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)
    charset, force = (" CHARACTER SET utf8mb4", "") if name == "mysql" else ("", " WITH (FORCE)")
    async with engine.connect() as connection:
        await connection.execute(sa.text(f"CREATE DATABASE {database}{charset}"))
    try:
        yield server.set(database=database).render_as_string(hide_password=False)
    finally:
        async with engine.connect() as connection:
            await connection.execute(sa.text(f"DROP DATABASE {database}{force}"))
        await engine.dispose()


class Housekeeping:
    """Creates and fills the table, knows what is in it, and puts it back after writes."""

    def __init__(self, name: str, url: str, rows: int) -> None:
        self.name = name
        self.rows = rows
        self.newest: dict[str, list[Account]] = {status: [] for status in STATUSES}
        self.counts = dict.fromkeys(STATUSES, 0)
        self._url = url
        self._raw = CONTESTANTS[name][0]()
        self._engine: AsyncEngine = create_async_engine(url, isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)
        self._used = self._used_when_tidy = rows
        self._generation = 0

    async def setup(self) -> None:
        async with SQLAlchemySession(self._url) as session:
            await session.create_tables(table.metadata)
        if self.name == "postgres":
            await self._execute("ALTER TABLE accounts SET (autovacuum_enabled = false)")
        await self._raw.setup(self._url)
        for start in range(1, self.rows + 1, _CHUNK):
            chunk = accounts(range(start, min(start + _CHUNK, self.rows + 1)))
            await self._raw.add_many(chunk)
            self._remember(chunk)
        for statement in {"mysql": ["ANALYZE TABLE accounts"], "postgres": ["VACUUM ANALYZE accounts"]}.get(
            self.name, ["ANALYZE", "PRAGMA wal_checkpoint(TRUNCATE)"]
        ):
            await self._execute(statement)

    async def teardown(self) -> None:
        await self._raw.teardown()
        await self._engine.dispose()

    def _remember(self, chunk: Iterable[Account]) -> None:
        by_status: dict[str, list[Account]] = {status: [] for status in STATUSES}
        for item in chunk:
            by_status[item.status].append(item)
        for status, found in by_status.items():
            self.counts[status] += len(found)
            newest = [*self.newest[status], *found]
            self.newest[status] = sorted(newest, key=lambda item: (item.created_at, item.id), reverse=True)[:PAGE_SIZE]

    def unused(self, count: int) -> range:
        """Return numbers that no account has had yet."""
        self._used += count
        return range(self._used - count + 1, self._used + 1)

    def next_generation(self) -> int:
        """Return a generation that no account is of, so that an update always changes something."""
        self._generation += 1
        return self._generation

    async def stored(self, number: int) -> Account | None:
        found: Account | None = await self._raw.get(number)
        return found

    async def added(self) -> int:
        """Return how many accounts there are beyond those of the beginning."""
        return int(await self._value(f"SELECT count(*) FROM accounts WHERE id > {self.rows}"))

    async def add(self, numbers: Iterable[int]) -> None:
        await self._raw.add_many(accounts(numbers))

    async def restore(self, numbers: Iterable[int]) -> None:
        """Write accounts as they were at the beginning."""
        await self._raw.upsert_many([account(number) for number in numbers])

    async def remove_added(self) -> None:
        """Delete what was added, and let the database tidy up now rather than while the next one is timed."""
        await self._execute(f"DELETE FROM accounts WHERE id > {self.rows}")
        if self._used - self._used_when_tidy >= _ENOUGH_TO_TIDY and self.name in _TIDY:
            await self._execute(_TIDY[self.name])
            self._used_when_tidy = self._used

    async def _execute(self, statement: str) -> None:
        async with self._engine.connect() as connection:
            await connection.execute(sa.text(statement))

    async def _value(self, query: str) -> str:
        async with self._engine.connect() as connection:
            return str((await connection.execute(sa.text(query))).scalar_one())

    async def version(self) -> str:
        """Return product and version of the database."""
        query = {"postgres": "SHOW server_version", "mysql": "SELECT version()"}.get(
            self.name, "SELECT sqlite_version()"
        )
        number = await self._value(query)
        if self.name == "mysql":
            return f"{'MariaDB' if 'MariaDB' in number else 'MySQL'} {number.partition('-')[0]}"
        return f"{'PostgreSQL' if self.name == 'postgres' else 'SQLite'} {number.partition(' ')[0]}"
