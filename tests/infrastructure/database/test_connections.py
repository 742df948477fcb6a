"""What the pool promises: a cap, fairness, and that no connection is lost, shared or returned unsound."""

import asyncio
import gc
import logging
import random
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack, suppress
from contextvars import ContextVar
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import make_url
from sqlalchemy.util import await_

from fastapi_building_blocks.domain import (
    BuildingBlocksError,
    CommitOutcomeUnknownError,
    ConnectionLostError,
    PoolTimeoutError,
    StatementTimeoutError,
)
from fastapi_building_blocks.infrastructure import PoolStatus, SQLAlchemySession, deadline
from fastapi_building_blocks.infrastructure.database import connections as pool_module
from fastapi_building_blocks.testing import FaultProxy
from tests.backends import Backends
from tests.guarantees.ledger import Accounts, account, accounts, metadata, opened
from tests.server_view import connections, kill_connections, open_transactions, until

on_servers = pytest.mark.parametrize("database_url", ["postgres", "mysql", "asyncmy"], indirect=True)


@pytest.fixture(params=["sqlite", "postgres", "mysql", "asyncmy"])
def database_url(request: pytest.FixtureRequest, backends: Backends, sqlite_url: str) -> Iterator[str]:
    """An empty database of this test alone, on each database by each of its drivers."""
    with backends.database_by_driver(request.param, sqlite_url) as url:
        yield url


@on_servers
async def test_200_tasks_never_open_more_than_pool_size_and_overflow(database_url: str) -> None:
    async with opened(database_url, pool_size=2, max_overflow=3, pool_timeout=30) as session:
        repository = Accounts(session)
        await repository.add(account(1))
        most = 0

        async def work() -> None:
            async with session.transaction() as unit:
                await Accounts(unit).get(1)
            await repository.get(1)

        async def watch() -> None:
            nonlocal most
            while True:
                most = max(most, await asyncio.to_thread(lambda: len(connections(database_url))))

        watcher = asyncio.create_task(watch())
        await asyncio.gather(*[work() for _ in range(200)])
        watcher.cancel()
        most = max(most, await asyncio.to_thread(lambda: len(connections(database_url))))
        assert 1 <= most <= 5
        assert session.pool_status() == PoolStatus(size=2, checked_out=0, idle=5, waiting=0)


async def test_whoever_waits_longest_is_served_first(sqlite_url: str) -> None:
    async with opened(sqlite_url, pool_size=1, max_overflow=0) as session:
        served: list[int] = []

        async def wait(place: int) -> None:
            async with session.engine.connect():
                served.append(place)
                await asyncio.sleep(0)

        holder = session._pool.take()
        assert holder is not None
        waiting = []
        for place in range(20):
            waiting.append(asyncio.create_task(wait(place)))
            await asyncio.sleep(0)
        await until(lambda: session.pool_status().waiting == 20)
        session._pool.release(holder)
        await asyncio.gather(*waiting)
        assert served == list(range(20))


async def test_a_newcomer_does_not_overtake_those_who_wait(sqlite_url: str) -> None:
    async with opened(sqlite_url, pool_size=1, max_overflow=0) as session:
        order: list[str] = []

        async def read(name: str) -> None:
            await session.execute(sa.text("SELECT 1"))
            order.append(name)

        holder = session._pool.take()
        first = asyncio.create_task(read("waiter"))
        await until(lambda: session.pool_status().waiting == 1)
        session._pool.release(holder)  # handed over, before the waiter runs
        await asyncio.gather(read("newcomer"), first)
        assert order == ["waiter", "newcomer"]


async def test_p4_waiting_ends_at_the_pool_timeout_and_recovers_at_once(database_url: str) -> None:
    async with opened(database_url, pool_size=1, max_overflow=0, pool_timeout=0.2) as session:
        async with session.transaction() as unit:
            await unit.execute(sa.text("SELECT 1"))
            before = asyncio.get_running_loop().time()
            with pytest.raises(PoolTimeoutError, match=r"0\.2 seconds"):
                await session.execute(sa.text("SELECT 1"))
            assert 0.18 <= asyncio.get_running_loop().time() - before <= 0.5
            with pytest.raises(PoolTimeoutError):
                async with session.transaction() as other:
                    await other.execute(sa.text("SELECT 1"))
            with pytest.raises(PoolTimeoutError):
                [row async for row in session.stream(sa.text("SELECT 1"))]
            with pytest.raises(PoolTimeoutError):
                await session.ping()
            assert session.pool_status() == PoolStatus(1, 1, 0, 0)
        await session.ping()


async def test_a_waiter_that_is_cancelled_loses_no_connection(database_url: str) -> None:
    async with opened(database_url, pool_size=1, max_overflow=0) as session:
        pool = session._pool
        for served_first in (False, True):
            holder = pool.take()
            assert holder is not None
            waiter = asyncio.create_task(session.ping())
            await until(lambda: session.pool_status().waiting == 1)
            if served_first:
                pool.release(holder)
                waiter.cancel()
            else:
                waiter.cancel()
                pool.release(holder)
            with pytest.raises(asyncio.CancelledError):
                await waiter
            await until(lambda: session.pool_status() == PoolStatus(1, 0, 1, 0))
        await session.ping()


async def test_a_connection_whose_opening_was_cancelled_is_kept(database_url: str) -> None:
    async with opened(database_url, pool_size=3, max_overflow=0) as session:
        holder = session._pool.take()
        for _ in range(2):
            opening = asyncio.create_task(session.ping())
            await asyncio.sleep(0)
            opening.cancel()
            with pytest.raises(asyncio.CancelledError):
                await opening
        session._pool.release(holder)
        await until(lambda: session.pool_status() == PoolStatus(3, 0, 3, 0))
        if "sqlite" not in database_url:
            assert len(connections(database_url)) == 3


async def test_spare_connections_are_closed_once_they_were_idle_for_a_while(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_module, "_SPARE_LINGER", 0.05)
    async with opened(database_url, pool_size=1, max_overflow=4) as session:
        pool = session._pool
        held = [pool.take() or await pool.acquire() for _ in range(5)]
        for connection in held:
            pool.release(connection)
        assert session.pool_status() == PoolStatus(1, 0, 5, 0)
        await until(lambda: session.pool_status() == PoolStatus(1, 0, 1, 0))
        assert pool.overflow() == 0
        if "sqlite" not in database_url:
            await until(lambda: len(connections(database_url)) == 1)
        await session.ping()


async def test_spare_connections_in_use_are_not_closed(sqlite_url: str) -> None:
    async with opened(sqlite_url, pool_size=1, max_overflow=2) as session:
        pool = session._pool
        held = [pool.take() or await pool.acquire() for _ in range(3)]
        for connection in held:
            pool.release(connection)
        busy = [pool.take(), pool.take()]
        for connection in busy:
            pool.release(connection)
        pool._trim()
        assert session.pool_status().idle == 2, "one was idle all the time, two were needed"
        pool._trim()
        assert session.pool_status().idle == 1


@on_servers
async def test_p3_killed_idle_connections_are_no_error_for_a_single_read(database_url: str) -> None:
    async with opened(database_url, pool_size=6, max_overflow=0) as session:
        repository = Accounts(session)
        await repository.add(account(1))
        pool = session._pool
        held = [pool.take() or await pool.acquire() for _ in range(6)]
        for connection in held:
            pool.release(connection)
        assert await asyncio.to_thread(kill_connections, database_url) == 6
        answers = await asyncio.gather(*[repository.get(1) for _ in range(12)])
        assert answers == [account(1)] * 12
        await session.ping()
        await until(lambda: session.pool_status().checked_out == 0)


@on_servers
async def test_p3_killed_idle_connections_are_no_error_when_nobody_noticed_yet(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(database_url, pool_size=4, max_overflow=0) as session:
        repository = Accounts(session)
        await repository.add(account(1))
        pool = session._pool
        held = [pool.take() or await pool.acquire() for _ in range(4)]
        for connection in held:
            pool.release(connection)
        monkeypatch.setattr(pool, "is_dead", lambda driver: False)
        await asyncio.to_thread(kill_connections, database_url)
        assert await repository.get(1) == account(1)
        assert session.pool_status().idle == 1, "the others were opened before the one that broke, and are gone"
        await asyncio.to_thread(kill_connections, database_url)
        async with session.transaction() as unit:  # begins on another connection
            assert await Accounts(unit).get(1) == account(1)
        await asyncio.to_thread(kill_connections, database_url)
        with pytest.raises(CommitOutcomeUnknownError):
            await repository.add(account(2))  # a write is never sent twice
        await repository.add(account(2))


@on_servers
async def test_p3_a_connection_killed_within_a_unit_is_a_503_and_nothing_is_kept(database_url: str) -> None:
    async with opened(database_url) as session:
        with pytest.raises(ConnectionLostError):
            async with session.transaction() as unit:
                await Accounts(unit).add(account(1))
                await asyncio.to_thread(kill_connections, database_url)
                await Accounts(unit).add(account(2))
        assert await Accounts(session).count() == 0
        with pytest.raises(BuildingBlocksError):
            async with session.transaction() as unit:
                await Accounts(unit).add(account(1))
                await asyncio.to_thread(kill_connections, database_url)
        assert await Accounts(session).count() == 0
        await until(lambda: session.pool_status().checked_out == 0)


async def test_what_is_in_use_while_disconnecting_may_finish_and_its_connection_is_closed(database_url: str) -> None:
    session = SQLAlchemySession(database_url, pool_size=1, max_overflow=0)
    await session.connect()
    async with session.transaction() as unit:
        await unit.execute(sa.text("SELECT 1"))
        waiting = asyncio.create_task(session.ping())
        await until(lambda: session.pool_status().waiting == 1)
        disconnecting = asyncio.gather(session.disconnect(), session.disconnect())
        with pytest.raises(RuntimeError, match="disconnected"):
            await waiting
        assert (await unit.execute(sa.text("SELECT 7"))).scalar() == 7
        assert session.pool_status().checked_out == 1
        assert not disconnecting.done()
    async with asyncio.timeout(5):
        await disconnecting
    assert session.pool_status() == PoolStatus(1, 0, 0, 0)
    if "sqlite" not in database_url:
        await until(lambda: not connections(database_url))
    with pytest.raises(RuntimeError, match=r"connect\(\)"):
        await session.ping()
    await session.disconnect()  # again is quiet
    await session.connect()
    await session.ping()
    await session.disconnect()


async def test_what_does_not_finish_within_the_shutdown_timeout_is_ended(
    database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    session = SQLAlchemySession(database_url, shutdown_timeout=0.2)
    await session.connect()
    await session.create_tables(metadata)
    held = asyncio.Event()
    go_on = asyncio.Event()

    async def forget_to_end() -> None:
        async with session.transaction() as unit:
            await Accounts(unit).add(account(1))
            held.set()
            await go_on.wait()
            await Accounts(unit).count()

    holding = asyncio.create_task(forget_to_end())
    await held.wait()
    begun = asyncio.get_running_loop().time()
    await session.disconnect()
    assert 0.2 <= asyncio.get_running_loop().time() - begun < 1.2
    assert "1 connections to" in caplog.text
    if "sqlite" not in database_url:
        await until(lambda: not connections(database_url))
    go_on.set()
    with pytest.raises(BuildingBlocksError):
        await holding
    await until(lambda: session.pool_status().checked_out == 0)
    async with session:
        assert await Accounts(session).count() == 0


@pytest.mark.parametrize("portable", [False, True])
async def test_a_unit_that_was_cut_off_says_so_when_it_ends_and_gives_its_place_back(
    database_url: str, portable: bool
) -> None:
    session = SQLAlchemySession(database_url, shutdown_timeout=0.1, portable=portable)
    await session.connect()
    await session.create_tables(metadata)
    with pytest.raises(ConnectionLostError, match="disconnected before the unit of work ended; nothing was kept"):
        async with session.transaction() as unit:
            await Accounts(unit).add(account(1))
            await session.disconnect()
    with pytest.raises(RuntimeError, match="nothing was kept"):
        async with session, session.transaction() as unit:
            await Accounts(unit).add(account(1))
            await session.disconnect()
            with pytest.raises(ConnectionLostError):
                await anext(Accounts(unit).stream())
    await until(lambda: session.pool_status().checked_out == 0)
    async with session:
        assert await Accounts(session).count() == 0


@on_servers
async def test_a_statement_that_runs_when_the_shutdown_timeout_is_over_fails(database_url: str) -> None:
    session = SQLAlchemySession(database_url, shutdown_timeout=0.2)
    await session.connect()
    sleep = "SELECT pg_sleep(8)" if "postgres" in database_url else "SELECT SLEEP(8)"
    running = asyncio.create_task(session.execute(sa.text(sleep)))
    await until(lambda: session.pool_status().checked_out == 1)
    async with asyncio.timeout(1.2):
        await session.disconnect()
    async with asyncio.timeout(1):
        with pytest.raises((BuildingBlocksError, RuntimeError)):
            await running


@on_servers
async def test_whoever_waits_for_a_first_answer_while_the_session_is_disconnected_is_not_taken_for_cancelled(
    database_url: str,
) -> None:
    place = make_url(database_url)
    async with FaultProxy(place.host or "", place.port or 0) as proxy:
        session = SQLAlchemySession(proxy.url(database_url), shutdown_timeout=0.1, connect_timeout=10.0)
        await session.connect()
        async with session.transaction() as unit:
            await unit.execute(sa.text("SELECT 1"))
            proxy.blackhole()
            opening = asyncio.create_task(session.ping())
            await until(lambda: session.pool_status().checked_out == 2)
            await session.disconnect()
            with pytest.raises(RuntimeError, match="the session was disconnected"):
                await opening
            await unit.rollback()
        assert session.pool_status().checked_out == 0


@pytest.mark.parametrize("within", [None, 0.3], ids=["statement timeout", "deadline"])
@on_servers
async def test_p1_calls_of_the_engine_end_though_the_server_is_silent(database_url: str, within: float | None) -> None:
    place = make_url(database_url)
    one = sa.text("SELECT 1")
    knobs = {"statement_timeout": 0.6, "connect_timeout": 1.0, "shutdown_timeout": 0.1}
    async with FaultProxy(place.host or "", place.port or 0) as proxy:

        async def in_time(call: Any, kind: type[Exception]) -> None:
            started = time.monotonic()
            proxy.blackhole()
            with pytest.raises(kind), deadline(within or 30.0):
                await call
            assert time.monotonic() - started < (within or 0.8) + 0.5

        async with opened(proxy.url(database_url), **knobs) as session, AsyncExitStack() as held:
            begun, running = [await held.enter_async_context(session.engine.connect()) for _ in range(2)]
            await begun.execute(one)
            await running.execute(one)
            await session.ping()
            await in_time(session.create_tables(metadata), StatementTimeoutError)
            await in_time(running.execute(one), StatementTimeoutError)
            await in_time(begun.commit(), CommitOutcomeUnknownError)
            await held.aclose()
            proxy.heal()
            await until(lambda: session.pool_status().checked_out == 0)


@pytest.fixture
def no_error_logged(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """SQLAlchemy logs an error for each connection that it has to leave to the garbage collector."""
    yield
    gc.collect()
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


@pytest.mark.parametrize("end", ["statement timeout", "deadline", "cancel"])
@pytest.mark.parametrize("of_engine", [False, True])
@pytest.mark.usefixtures("no_error_logged")
@on_servers
async def test_p1_setting_an_isolation_level_ends_though_the_server_is_silent(
    database_url: str, of_engine: bool, end: str
) -> None:
    place = make_url(database_url)
    knobs = {"pool_size": 1, "max_overflow": 0, "statement_timeout": 0.6, "shutdown_timeout": 0.1}
    level = {"isolation_level": "SERIALIZABLE"}
    async with (
        FaultProxy(place.host or "", place.port or 0) as proxy,
        opened(proxy.url(database_url), **knobs) as session,
    ):

        async def work() -> None:
            engine = session.engine.execution_options(**level) if of_engine else session.engine
            if of_engine:
                proxy.blackhole()
            with deadline(0.3 if end == "deadline" else 30.0):
                async with engine.connect() as connection:
                    proxy.blackhole()
                    await connection.execution_options(**level)
                    await connection.execute(sa.text("SELECT 1"))

        task = asyncio.create_task(work())
        if end == "cancel":
            await asyncio.sleep(0.1)
            task.cancel()
        with pytest.raises(asyncio.CancelledError if end == "cancel" else StatementTimeoutError):
            await task
        proxy.heal()
        await until(lambda: session.pool_status().checked_out == 0)
        await session.ping()


@pytest.mark.parametrize("cancels", [False, True])
@pytest.mark.parametrize("database_url", ["mysql", "asyncmy"], indirect=True)
@pytest.mark.usefixtures("no_error_logged")
async def test_p1_returning_a_users_connection_ends_though_the_server_is_silent(
    database_url: str, cancels: bool
) -> None:
    place = make_url(database_url)
    knobs = {"pool_size": 1, "max_overflow": 0, "statement_timeout": 0.6, "shutdown_timeout": 0.1}
    async with (
        FaultProxy(place.host or "", place.port or 0) as proxy,
        opened(proxy.url(database_url), **knobs) as session,
    ):
        connection = await session.engine.connect()
        proxy.blackhole()
        task = asyncio.create_task(connection.close())
        if cancels:
            await asyncio.sleep(0.1)
            task.cancel()
        await asyncio.wait([task], timeout=2)
        assert task.cancelled() == cancels
        if not cancels:
            await task  # the work on it is done: that it was not reset is nobody's failure
        proxy.heal()
        await until(lambda: session.pool_status().checked_out == 0)
        await session.ping()


@pytest.mark.usefixtures("no_error_logged")
async def test_an_isolation_level_that_is_refused_costs_no_place_and_no_transaction(database_url: str) -> None:
    one = sa.text("SELECT 1")
    async with opened(database_url, pool_size=1, max_overflow=0, pool_timeout=2.0) as session:
        for _ in range(2):
            with pytest.raises(sa.exc.ArgumentError, match="NONE"):
                async with session.engine.execution_options(isolation_level="NONE").connect():
                    pass
        async with session.engine.connect() as connection:
            with pytest.raises(sa.exc.ArgumentError, match="NONE"):
                await connection.execution_options(isolation_level="NONE")
            await connection.execute(sa.insert(accounts), {"id": 1, "number": "A1", "balance": 0})
            with pytest.raises(sa.exc.InvalidRequestError, match="already"):
                await connection.execution_options(isolation_level="SERIALIZABLE")
            await connection.commit()
            await connection.execution_options(isolation_level="SERIALIZABLE")
            await connection.execute(one)
        assert await Accounts(session).count() == 1
        await until(lambda: session.pool_status().checked_out == 0)


@on_servers
async def test_disposing_of_the_engine_does_not_wait_for_a_silent_server(
    database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    place = make_url(database_url)
    async with FaultProxy(place.host or "", place.port or 0) as proxy, opened(proxy.url(database_url)) as session:
        proxy.blackhole()
        async with asyncio.timeout(3):
            await session.engine.dispose()
        assert session.pool_status().checked_out == 0
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


@on_servers
async def test_disposing_of_the_engine_costs_no_place_whoever_is_cancelled(database_url: str) -> None:
    async with opened(database_url, pool_size=1, max_overflow=0, pool_timeout=3.0) as session:
        for ticks in range(12):
            await session.ping()
            disposing = asyncio.create_task(session.engine.dispose())
            for _ in range(ticks):
                await asyncio.sleep(0)
            disposing.cancel()
            await asyncio.wait([disposing])
            await until(lambda: session.pool_status().checked_out == 0)
        await session.ping()
        await session.engine.dispose()
        assert session.pool_status() == PoolStatus(1, 0, 0, 0)


async def test_the_engine_shares_the_pool_and_returns_connections_clean(database_url: str) -> None:
    async with opened(database_url, pool_size=1, max_overflow=0) as session:
        insert = sa.text("INSERT INTO accounts (id, number, balance) VALUES (1, 'A1', 0)")
        async with session.engine.connect() as connection:
            await connection.execute(insert)
            assert session.pool_status() == PoolStatus(1, 1, 0, 0)
            assert connection.in_transaction()
        assert await Accounts(session).count() == 0, "closed without commit: rolled back"
        with pytest.raises(ZeroDivisionError):
            async with session.engine.begin() as connection:
                await connection.execute(insert)
                raise ZeroDivisionError
        assert await Accounts(session).count() == 0
        async with session.engine.begin() as connection:
            await connection.execute(insert)
        assert await Accounts(session).count() == 1
        async with session.engine.connect() as connection:
            raw = await connection.get_raw_connection()
            assert raw.driver_connection is not None
        assert session.pool_status() == PoolStatus(1, 0, 1, 0)
        await Accounts(session).add(account(2))  # still in autocommit
        assert await Accounts(session).count() == 2
        assert "0 lent, 1 idle" in session._pool.status()


async def test_a_transaction_left_open_by_a_raw_statement_is_rolled_back_on_return(database_url: str) -> None:
    begin = "BEGIN" if "mysql" not in database_url else "START TRANSACTION"
    async with opened(database_url, pool_size=1, max_overflow=0) as session:
        await session.execute(sa.text(begin))
        await Accounts(session).add(account(1))
        await until(lambda: session.pool_status().checked_out == 0)
        assert await Accounts(session).count() == 1
        if "sqlite" not in database_url:
            assert open_transactions(database_url) == 0


@pytest.mark.parametrize("streams", [False, True])
@on_servers
async def test_the_server_ends_what_a_cancelled_task_ran_on_the_engine(database_url: str, streams: bool) -> None:
    """Otherwise it goes on with its locks, and its connection counts on the server and no more in the pool."""
    slow = sa.text("SELECT pg_sleep(30)" if "postgres" in database_url else "SELECT SLEEP(30)")

    async def on_the_engine() -> None:
        async with session.engine.connect() as connection:
            if streams:
                await connection.stream(slow)
            else:
                await connection.execute(slow)

    async with opened(database_url, pool_size=2, max_overflow=0) as session:
        for _ in range(3):
            task = asyncio.create_task(on_the_engine())
            await until(lambda: session.pool_status().checked_out == 1)
            await asyncio.sleep(0.05)
            task.cancel()
            await asyncio.wait([task])
        await until(lambda: session.pool_status().checked_out == 0, 2.0)
        await until(lambda: len(connections(database_url)) <= 2, 2.0)


async def test_a_cancelled_core_statement_of_the_engine_gives_its_place_back(database_url: str) -> None:
    slow = {
        "p": "SELECT pg_sleep(10)",
        "m": "SELECT SLEEP(10)",
        "s": "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n WHERE i > 99999999999",
    }[database_url[0]]
    async with opened(database_url, pool_size=1, max_overflow=0, statement_timeout=1) as session:
        # SQLAlchemy's own engine waits for SQLite's thread, so only what the session runs can be stopped there.
        for run in (session.execute,) if "sqlite" in database_url else (session.execute, _through(session)):
            task = asyncio.create_task(run(sa.text(slow)))
            await asyncio.sleep(0.1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await until(lambda: session.pool_status().checked_out == 0)
            await session.ping()


def _through(session: SQLAlchemySession) -> Any:
    async def run(statement: Any) -> None:
        async with session.engine.connect() as connection:
            await connection.execute(statement)

    return run


async def test_memory_is_one_connection_taken_in_turn() -> None:
    async with opened("sqlite+aiosqlite:///:memory:") as session:
        repository = Accounts(session)
        assert session.pool_status() == PoolStatus(1, 0, 1, 0)
        await asyncio.gather(*[repository.add(account(number)) for number in range(50)])

        async def move(number: int) -> None:
            async with session.transaction() as unit:
                found = await Accounts(unit).get(number)
                await asyncio.sleep(0)
                await Accounts(unit).patch(number, {"balance": found.balance + 1})

        await asyncio.gather(*[move(number % 10) for number in range(50)])
        assert sum(found.balance for found in await repository.get_all()) == 50
        task = asyncio.create_task(repository.count())
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert await repository.count() == 50, "a cancelled call does not cost the database"


@pytest.mark.parametrize("portable", [False, True])
async def test_t8_a_core_statement_of_many_rows_sends_nothing_once_its_unit_has_ended(portable: bool) -> None:
    """SQLAlchemy makes several statements of it, and in memory the next unit runs on the same connection."""
    rows = [{"id": number, "number": f"A{number}", "balance": 0} for number in range(5000)]
    async with opened("sqlite+aiosqlite:///:memory:", portable=portable) as session:
        driver = session._pool._idle[0].driver
        before = driver.total_changes
        with pytest.raises(RuntimeError, match="nothing was kept"):
            async with session.transaction() as unit:
                late = asyncio.create_task(unit.execute(sa.insert(accounts).returning(accounts.c.id), rows))
                async with asyncio.timeout(5):
                    while driver.total_changes == before:
                        await asyncio.sleep(0)
        async with session.transaction() as unit:
            await Accounts(unit).add(account(-1))
            await asyncio.wait([late])
        with pytest.raises(RuntimeError, match="has ended"):
            await late
        assert await Accounts(session).count() == 1


@pytest.mark.parametrize("place", ["file", "memory"])
async def test_a_cancelled_write_of_sqlite_leaves_no_lock_whoever_holds_its_cursor(sqlite_url: str, place: str) -> None:
    """Cancelled between INSERT and the reading of its RETURNING, the statement is under way, outside of a transaction too."""
    url = sqlite_url if place == "file" else "sqlite+aiosqlite:///:memory:"
    insert = sa.insert(accounts).returning(accounts.c.id)
    held: list[Any] = []

    async def interrupted(call: Any) -> None:
        try:
            await call
        except asyncio.CancelledError as cancelled:
            held.append(cancelled)  # with its traceback, and so with the cursor
            raise

    async def on_the_engine(number: int) -> None:
        async with session.engine.begin() as connection:
            await connection.execute(insert, {"id": number, "number": f"A{number}", "balance": 0})

    async with opened(url, pool_size=2, portable=True) as session:
        for ticks in range(1, 12):
            writes = [session.execute(insert, {"id": -1 - ticks, "number": f"-{ticks}", "balance": 0})]
            writes += [on_the_engine(-100 - ticks)] if place == "file" else []
            for call in [*writes, Accounts(session).add(account(-200 - ticks))]:
                task = asyncio.create_task(interrupted(call))
                for _ in range(ticks):
                    await asyncio.sleep(0)
                    time.sleep(0.002)  # noqa: ASYNC251 - so that SQLite's thread is always quicker
                task.cancel()
                await asyncio.wait([task])
                with deadline(1.0):
                    async with session.transaction() as unit:
                        await Accounts(unit).add(account(len(held) + 1000 * (ticks + 1)))
                        await Accounts(unit).delete_where(accounts.c.id > 0)


async def test_closing_that_fails_is_logged_and_frees_the_place(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with opened(sqlite_url, pool_size=1, max_overflow=0) as session:
        connection = session._pool.take()
        assert connection is not None
        kind = type(connection.record)
        real = kind.close

        def close(record: Any) -> None:
            real(record)
            raise OSError("broken pipe")

        monkeypatch.setattr(kind, "close", close)
        with caplog.at_level(logging.DEBUG, logger=pool_module.__name__):
            session._pool.discard(connection)
            await until(lambda: session.pool_status().checked_out == 0)
        assert "did not close cleanly" in caplog.text
        monkeypatch.undo()
        await session.ping()


async def _random_work(session: SQLAlchemySession, number: int) -> None:
    """One of the ways to use a session; whatever it writes for ``number``, it writes two rows or none."""
    repository = Accounts(session)
    pair = [account(number * 2 + 10), account(number * 2 + 11)]
    kind = number % 7
    if kind == 0:
        await repository.get_all(limit=20)
    elif kind == 1:
        async with session.transaction() as unit:
            for one in pair:
                await Accounts(unit).add(one)
    elif kind == 2:
        async for _ in repository.stream(batch_size=5):
            await asyncio.sleep(0)
    elif kind == 3:
        await repository.add_many(pair)
    elif kind == 4:
        await repository.upsert_many(pair)
    elif kind == 5:
        async with session.transaction() as unit, unit.savepoint():
            await Accounts(unit).add_many(pair)
            await unit.execute(sa.text("SELECT 1"))
            async for _ in Accounts(unit).stream(batch_size=5):
                pass
    else:
        async for _ in session.stream(sa.text("SELECT id FROM accounts")):
            await asyncio.sleep(0)


@pytest.mark.parametrize("portable", [False, True], ids=["driver", "portable"])
async def test_t7_random_cancellations_lose_nothing_and_leave_every_transaction_whole_or_absent(
    database_url: str, portable: bool
) -> None:
    chance = random.Random(2026)
    async with opened(database_url, pool_size=3, max_overflow=3, pool_timeout=60, portable=portable) as session:
        await Accounts(session).add_many([account(number) for number in range(10)])
        for start in range(0, 350, 25):
            tasks = [asyncio.create_task(_random_work(session, number)) for number in range(start, start + 25)]
            for _ in range(chance.randrange(25)):
                await asyncio.sleep(chance.random() / 300)
                chance.choice(tasks).cancel()
            outcomes = await asyncio.gather(*tasks, return_exceptions=True)
            failures = [one for one in outcomes if isinstance(one, BaseException)]
            assert all(isinstance(one, asyncio.CancelledError) for one in failures), failures
        await until(lambda: session.pool_status().checked_out == 0)
        if "sqlite" not in database_url:
            await until(lambda: open_transactions(database_url) == 0)
        stored = {found.id for found in await Accounts(session).get_all() if found.id >= 10}
        assert all(number ^ 1 in stored for number in stored)
        assert len(stored) >= 50
        await session.ping()


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize("database_url", ["postgres"], indirect=True)
async def test_a_value_that_the_driver_refuses_leaves_no_lock_behind(database_url: str, portable: bool) -> None:
    async with (
        opened(database_url, pool_size=1, portable=portable) as session,
        opened(database_url, pool_size=1, statement_timeout=2.0) as other,
    ):
        with pytest.raises(BuildingBlocksError):
            await session.execute(sa.text("UPDATE accounts SET balance = :much"), {"much": "much"})
        await other.execute(sa.text("ALTER TABLE accounts ADD COLUMN extra INTEGER"))
        assert await Accounts(session).count() == 0


async def test_an_old_connection_is_not_lent_after_a_pause(database_url: str) -> None:
    async with opened(database_url, pool_size=1, max_overflow=0, recycle=0.3) as session:
        await Accounts(session).count()
        [before] = session._pool._connections
        await asyncio.sleep(0.4)  # nothing is lent, so nobody looks around
        await Accounts(session).count()
        [after] = session._pool._connections
        assert after is not before


async def test_a_database_in_memory_does_not_grow_old() -> None:
    async with SQLAlchemySession("sqlite+aiosqlite://", recycle=0.1) as session:
        await session.execute(sa.text("CREATE TABLE kept (id INTEGER PRIMARY KEY)"))
        await asyncio.sleep(0.25)
        for _ in range(2):
            assert (await session.execute(sa.text("SELECT count(*) FROM kept"))).scalar() == 0


def test_a_session_ends_late_calls_in_a_second_event_loop_too(postgres_url: str) -> None:
    session = SQLAlchemySession(postgres_url, statement_timeout=2.0)

    async def refused() -> None:
        with pytest.raises(RuntimeError, match="not connected"):
            await session.execute(sa.text("SELECT 1"))

    async def late() -> float:
        async with session:
            started = time.monotonic()
            with pytest.raises(StatementTimeoutError), deadline(0.2):
                await session.execute(sa.text("SELECT pg_sleep(2)"))
            return time.monotonic() - started

    asyncio.run(refused())
    assert asyncio.run(late()) < 0.7


@pytest.mark.parametrize("database_url", ["mysql", "asyncmy"], indirect=True)
async def test_a_users_connection_that_dies_is_returned_even_if_it_cannot_be_reset(database_url: str) -> None:
    """SQLAlchemy sets the isolation level back by a statement, and takes the connection for returned if that fails."""
    async with opened(database_url, pool_size=2, max_overflow=0, pool_timeout=1.0) as session:
        for _ in range(3):
            async with session.engine.connect() as connection:
                await connection.execute(sa.text("SELECT 1"))
                await connection.rollback()
                await asyncio.to_thread(kill_connections, database_url)
        await until(lambda: session.pool_status().checked_out == 0)
        assert await Accounts(session).count() == 0


# The lifecycle, while connections are in use


async def test_connecting_again_leaves_a_busy_session_alone(database_url: str) -> None:
    async with opened(database_url, pool_size=1, max_overflow=0, pool_timeout=0.2) as session:
        async with session.transaction() as unit:
            await Accounts(unit).add(account(1))
            await session.connect()
        assert await Accounts(session).count() == 1


async def test_a_session_that_is_disconnected_while_it_connects_stays_so(database_url: str) -> None:
    session = SQLAlchemySession(database_url)
    connecting = asyncio.create_task(session.connect())
    await asyncio.sleep(0)
    await session.disconnect()
    with pytest.raises(RuntimeError, match="the session was disconnected"):
        await connecting
    assert not session.is_connected
    with pytest.raises(RuntimeError, match=r"await session\.connect\(\) first"):
        await session.ping()


async def test_who_waits_for_connect_has_what_it_comes_to(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    session, opens = SQLAlchemySession(database_url), 0
    open_first = session._open_first

    async def fail_once() -> None:
        nonlocal opens
        opens += 1
        await asyncio.sleep(0.01)
        if opens == 1:
            raise ValueError("a wrong setting")
        await open_first()

    monkeypatch.setattr(session, "_open_first", fail_once)
    first, *others = await asyncio.gather(*[session.connect() for _ in range(3)], return_exceptions=True)
    assert isinstance(first, ConnectionLostError)
    assert others == [None, None]
    assert opens == 2
    await session.ping()
    await session.disconnect()


async def test_connections_that_were_cut_off_leave_their_places(database_url: str) -> None:
    session = SQLAlchemySession(database_url, pool_size=1, max_overflow=0, pool_timeout=0.5, shutdown_timeout=0.05)
    go_on = asyncio.Event()

    async def hold() -> None:
        async with session.transaction() as unit:
            await unit.execute(sa.text("SELECT 1"))
            await go_on.wait()

    for _ in range(2):
        await session.connect()
        holder = asyncio.create_task(hold())
        await until(lambda: session.pool_status().checked_out == 1)
        await session.disconnect()
        assert session.pool_status().checked_out == 0
        await session.connect()
        go_on.set()
        with pytest.raises(ConnectionLostError, match="nothing was kept"):
            await holder
        go_on.clear()
        await session.ping()
        assert session.pool_status() == PoolStatus(size=1, checked_out=0, idle=1, waiting=0)
        await session.disconnect()


NEVER_ENDING = sa.text("WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT max(i) FROM n")


async def test_a_session_that_connects_while_its_last_calls_end_keeps_its_own_time(sqlite_url: str) -> None:
    session = SQLAlchemySession(sqlite_url, statement_timeout=0.8)
    await session.connect()

    async def hold() -> None:
        async with session.transaction(read_only=True) as unit:
            await unit.execute(sa.text("SELECT 1"))
            await asyncio.sleep(0.3)

    holder = asyncio.create_task(hold())
    await until(lambda: session.pool_status().checked_out == 1)
    leaving = asyncio.create_task(session.disconnect())
    await asyncio.sleep(0)
    await session.connect()
    async with asyncio.timeout(5):
        with pytest.raises(StatementTimeoutError):
            await session.execute(NEVER_ENDING)
    async with asyncio.timeout(2):
        await asyncio.gather(holder, leaving)
    assert session.pool_status() == PoolStatus(size=5, checked_out=0, idle=1, waiting=0)
    await session.disconnect()


def opens_slowly(session: SQLAlchemySession, seconds: float) -> None:
    @sa.event.listens_for(session.engine.sync_engine, "connect")
    def wait(_connection: Any, _record: Any) -> None:
        await_(asyncio.sleep(seconds))


async def test_whoever_has_a_connection_opened_while_the_session_is_disconnected_is_told(database_url: str) -> None:
    session = SQLAlchemySession(database_url, shutdown_timeout=5)
    await session.connect()
    async with session.transaction() as unit:
        await unit.execute(sa.text("SELECT 1"))
        opens_slowly(session, 0.5)
        late = asyncio.create_task(session.execute(sa.text("SELECT 1")))
        await until(lambda: session.pool_status().checked_out == 2)
    await session.disconnect()
    with pytest.raises(RuntimeError, match="the session was disconnected"):
        await late
    assert session.pool_status() == PoolStatus(size=5, checked_out=0, idle=0, waiting=0)


async def test_a_connection_that_was_doubted_while_it_was_opened_is_not_lent_again(sqlite_url: str) -> None:
    async with SQLAlchemySession(sqlite_url) as session, session.transaction(read_only=True) as unit:
        await unit.execute(sa.text("SELECT 1"))
        opens_slowly(session, 0.3)
        late = asyncio.create_task(session.execute(sa.text("SELECT 1")))
        await until(lambda: session.pool_status().checked_out == 2)
        session.pool.renew()
        await late
        await until(lambda: session.pool_status() == PoolStatus(size=5, checked_out=1, idle=0, waiting=0))


async def test_disconnecting_leaves_alone_what_a_session_that_connects_meanwhile_opens(sqlite_url: str) -> None:
    session = SQLAlchemySession(sqlite_url, shutdown_timeout=0.3)
    await session.connect()
    async with AsyncExitStack() as units:
        with suppress(ConnectionLostError):
            async with session.transaction() as unit:
                await unit.execute(sa.text("SELECT 1"))
                leaving = asyncio.create_task(session.disconnect())
                await asyncio.sleep(0.1)
                await session.connect()
                opens_slowly(session, 1.0)
                others = [await units.enter_async_context(session.transaction(read_only=True)) for _ in range(2)]
                await asyncio.gather(*[other.execute(sa.text("SELECT 1")) for other in others])
                await leaving
    await session.disconnect()


async def test_one_connection_that_cannot_be_looked_at_leaves_the_others_their_time(sqlite_url: str) -> None:
    request: ContextVar[str] = ContextVar("request")

    def name_request(record: logging.LogRecord) -> bool:
        record.request = request.get()  # nobody's: a LookupError
        return True

    told: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, what: told.append(what["exception"]))
    pool_module.logger.addFilter(name_request)
    try:
        async with SQLAlchemySession(sqlite_url, statement_timeout=0.5, leak_threshold=0.1) as session:
            async with session.transaction(read_only=True) as unit:
                await unit.execute(sa.text("SELECT 1"))
                await until(lambda: told)
            async with asyncio.timeout(10):
                with pytest.raises(StatementTimeoutError):
                    await session.execute(NEVER_ENDING)
    finally:
        pool_module.logger.removeFilter(name_request)
    assert [type(error) for error in told] == [LookupError]


@pytest.mark.parametrize("by", ["unit", "engine"])
async def test_disconnecting_ends_what_a_file_is_busy_with(sqlite_url: str, by: str) -> None:
    async with SQLAlchemySession(sqlite_url, shutdown_timeout=0.05) as session:
        await session.create_tables(metadata)
        begin = session.transaction if by == "unit" else session.engine.begin

        async def write() -> None:
            async with begin() as work:
                await work.execute(accounts.insert(), {"id": 1, "number": "A1", "balance": 1})
                await work.execute(NEVER_ENDING)

        task = asyncio.create_task(write())
        await asyncio.sleep(0.1)
        await session.disconnect()
        async with opened(sqlite_url) as other:  # creates the table, and waits for no lock
            assert await Accounts(other).count() == 0
        assert isinstance((await asyncio.gather(task, return_exceptions=True))[0], Exception)


@pytest.mark.parametrize("by", ["session", "unit", "engine"])
@pytest.mark.parametrize("in_memory", [False, True], ids=["file", "in memory"])
async def test_a_cancelled_statement_of_sqlite_ends_and_leaves_the_database(
    sqlite_url: str, by: str, in_memory: bool
) -> None:
    async with opened("sqlite+aiosqlite://" if in_memory else sqlite_url) as session:
        await Accounts(session).add(account(1))

        async def write() -> None:
            if by == "session":
                await session.execute(NEVER_ENDING)
            else:
                async with session.transaction() if by == "unit" else session.engine.begin() as work:
                    await work.execute(accounts.delete())
                    await work.execute(NEVER_ENDING)

        for _ in range(3):
            task = asyncio.create_task(write())
            await asyncio.sleep(0.1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            async with asyncio.timeout(2):
                await Accounts(session).upsert(account(2))
                assert await Accounts(session).count() == 2
        await until(lambda: session.pool_status().checked_out == 0)


@pytest.mark.parametrize("within", [None, 0.3], ids=["statement timeout", "deadline"])
async def test_a_slow_statement_of_the_engine_is_one_whoever_ends_it(database_url: str, within: float | None) -> None:
    slow = {"postgresql": sa.text("SELECT pg_sleep(30)"), "mysql": sa.text("SELECT SLEEP(30)"), "sqlite": NEVER_ENDING}
    async with SQLAlchemySession(database_url, statement_timeout=0.5) as session:
        async with session.engine.connect() as connection:
            with pytest.raises(StatementTimeoutError), deadline(within or 30.0):
                await connection.execute(slow[session.dialect_name])
        async with session.engine.connect() as connection:
            assert (await connection.execute(sa.text("SELECT 1"))).scalar() == 1
            with pytest.raises(sa.exc.DBAPIError):
                await connection.execute(sa.text("SELECT nothing FROM nowhere"))
