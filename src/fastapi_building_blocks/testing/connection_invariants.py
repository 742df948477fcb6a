"""What has to hold for a session's connections when nobody uses them, whatever happened before."""

import asyncio
import secrets
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import URL, make_url
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from fastapi_building_blocks.infrastructure.database.connections import ConnectionPool
from fastapi_building_blocks.infrastructure.database.sqlalchemy_session import SQLAlchemySession

# How many connections clients have to a database, and how many of them rest inside a transaction.
_SEEN_BY = {
    "postgresql": sa.text(
        "SELECT count(*), count(*) FILTER (WHERE state LIKE 'idle in transaction%') FROM pg_stat_activity"
        " WHERE datname = :name AND pid <> pg_backend_pid() AND backend_type = 'client backend'"
    ),
    "mysql": sa.text(
        "SELECT count(*), coalesce(sum(command = 'Sleep' AND id IN"
        " (SELECT trx_mysql_thread_id FROM information_schema.innodb_trx)), 0)"
        " FROM information_schema.processlist WHERE db = :name AND id <> connection_id()"
    ),
}
_LOOK_AGAIN = 0.15
"""Seconds. InnoDB shows the same innodb_trx again to whoever asks more often than every 0.1 s."""
_ANSWER = 10.0
"""Seconds that the server may take for anything that is asked here."""


async def assert_connections_sound(session: SQLAlchemySession, within: float = 2.0, *, server_url: str = "") -> None:
    """Fail unless nothing is left of what the session's connections were used for.

    - No connection is lent, and nobody waits for one.
    - On the server, PostgreSQL or MySQL and MariaDB, no connection rests inside a transaction, and there are no more
      than ``pool_size + max_overflow``. A transaction of InnoDB shows once it has read or written a row.
    - As many reads at once as the pool has connections answer each its own value: no connection was put back with an
      answer on it that somebody else had asked for.

    The server is asked about the session's database as a whole: give the test a database of its own. The user has to
    see the connections of others (PROCESS on MySQL, pg_read_all_stats on PostgreSQL), unless they are its own.

    Args:
        session: open, and used by nobody.
        within: seconds that connections may take to settle.
        server_url: where the server itself is, if the session reaches it through a proxy or a pooler.

    Raises:
        AssertionError: says all that is wrong.
    """
    pool: Any = session.engine.sync_engine.pool
    assert isinstance(pool, ConnectionPool)
    most = pool.limit
    address = make_url(server_url) if server_url else session.engine.url
    await _assert_settled(session, address, most, within)
    wrong = await _crossed_answers(session)
    assert not wrong, "reads at once after the pool had settled: " + "; ".join(wrong)
    await _assert_settled(session, address, most, within)


async def _assert_settled(session: SQLAlchemySession, address: URL, most: int, within: float) -> None:
    """Look until nothing is wrong or the time is over."""
    seen_by = _SEEN_BY.get("mysql" if address.get_backend_name() == "mariadb" else address.get_backend_name())
    engine = create_async_engine(address, poolclass=NullPool, isolation_level="AUTOCOMMIT")
    give_up = asyncio.get_running_loop().time() + within
    try:
        while True:
            on_server: list[str] = []
            if seen_by is not None:
                async with asyncio.timeout(_ANSWER), engine.connect() as observer:
                    row = (await observer.execute(seen_by, {"name": address.database})).one()
                on_server = _wrong_on_server(int(row[0]), int(row[1]), most)
            wrong = _wrong_in_pool(session) + on_server  # as it is now: the server may have taken its time
            if not wrong:
                return
            assert asyncio.get_running_loop().time() < give_up, f"after {within} s: " + "; ".join(wrong)
            await asyncio.sleep(_LOOK_AGAIN)
    finally:
        await engine.dispose()


def _wrong_in_pool(session: SQLAlchemySession) -> list[str]:
    status = session.pool_status()
    wrong = []
    if status.checked_out:
        wrong.append(f"{status.checked_out} connections are still lent")
    if status.waiting:
        wrong.append(f"{status.waiting} callers still wait for a connection")
    return wrong


def _wrong_on_server(connections: int, in_transaction: int, most: int) -> list[str]:
    wrong = []
    if in_transaction:
        wrong.append(f"{in_transaction} connections are idle in transaction on the server")
    if connections > most:
        wrong.append(f"the server has {connections} connections, and the pool may open {most}")
    return wrong


async def _crossed_answers(session: SQLAlchemySession) -> list[str]:
    """Read a different value on each connection of the pool at once, twice, and return what went wrong."""
    status = session.pool_status()
    wrong = []
    for _ in range(2):
        values = [secrets.randbelow(2**31) for _ in range(max(status.size, status.idle, 1))]
        answers = await asyncio.gather(*(_read(session, value) for value in values), return_exceptions=True)
        for value, answer in zip(values, answers, strict=True):
            if isinstance(answer, BaseException):
                wrong.append(f"{type(answer).__name__}: {answer}")
            elif answer != value:
                wrong.append(f"asked for {value}, answered {answer}")
    return wrong


async def _read(session: SQLAlchemySession, value: int) -> Any:
    async with asyncio.timeout(_ANSWER):
        result = await session.execute(sa.select(sa.literal(value, sa.Integer())))
    return result.scalar_one()
