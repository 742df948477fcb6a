"""What a database server itself says about the connections of a test, seen through a connection of its own."""

import asyncio
from typing import Any

import asyncpg
import pymysql
from sqlalchemy import make_url

from tests.backends import run_apart

_POSTGRES = "FROM pg_stat_activity WHERE datname = $1 AND pid <> pg_backend_pid() AND backend_type = 'client backend'"
_MYSQL = "FROM information_schema.processlist WHERE db = %s AND id <> connection_id()"


def connections(url: str) -> list[int]:
    """Return the server's ids of all client connections to the database of ``url``."""
    if url.startswith("postgresql"):
        return [row[0] for row in _postgres(url, f"SELECT pid {_POSTGRES}", make_url(url).database)]
    return [row[0] for row in _mysql(url, f"SELECT id {_MYSQL}", make_url(url).database)]


def open_transactions(url: str) -> int:
    """Return how many of them are in a transaction."""
    if url.startswith("postgresql"):
        return len(_postgres(url, f"SELECT pid {_POSTGRES} AND xact_start IS NOT NULL", make_url(url).database))
    query = "SELECT 1 FROM information_schema.innodb_trx WHERE trx_mysql_thread_id IN (SELECT id " + _MYSQL + ")"
    return len(_mysql(url, query, make_url(url).database))


def kill_connections(url: str) -> int:
    """End all of them, as an administrator would, and return how many there were."""
    ids = connections(url)
    for number in ids:
        if url.startswith("postgresql"):
            _postgres(url, "SELECT pg_terminate_backend($1)", number)
        else:
            _mysql(url, f"KILL {number}")
    return len(ids)


async def until(condition: Any, seconds: float = 10.0) -> None:
    """Wait for what a server or another task does in its own time."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.02)


def _postgres(url: str, sql: str, *parameters: Any) -> list[Any]:
    async def fetch() -> Any:
        dsn = make_url(url).set(drivername="postgresql", database="postgres").render_as_string(hide_password=False)
        connection = await asyncpg.connect(dsn)
        try:
            # As tuples: asyncpg keeps a freed row for reuse by the thread that frees it, which would have to be this one.
            return [tuple(row) for row in await connection.fetch(sql, *parameters)]
        finally:
            await connection.close()

    return run_apart(fetch())


def _mysql(url: str, sql: str, *parameters: Any) -> list[Any]:
    place = make_url(url)
    connection = pymysql.connect(
        host=place.host, port=place.port or 3306, user=place.username, password=place.password or ""
    )
    with connection, connection.cursor() as cursor:
        cursor.execute(sql, parameters)
        return list(cursor.fetchall())
