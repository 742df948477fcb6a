"""A stream's connection goes back when its reader ends, closed or not, and a stream is never cut short in silence."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

import pytest
import sqlalchemy as sa

from fastapi_building_blocks.domain import DeadlineExceededError
from fastapi_building_blocks.infrastructure import BaseRepository, InMemorySession, SQLAlchemyRepository, deadline
from fastapi_building_blocks.testing import FaultProxy
from tests.faults.databases import address_of
from tests.guarantees.ledger import Account, Accounts, account, accounts, opened
from tests.server_view import until

ROWS = list(range(30))


class AccountsInMemory(BaseRepository[Account]):
    table = accounts


@pytest.fixture(params=["memory", "sqlite", "postgres", "mysql"])
async def store(request: pytest.FixtureRequest, sqlite_url: str, backends: Any) -> AsyncIterator[tuple[Any, Any]]:
    """A session with thirty accounts, and the repository for it."""
    if request.param == "memory":
        async with InMemorySession() as memory:
            await AccountsInMemory(memory).add_many([account(number) for number in ROWS])
            yield memory, AccountsInMemory
        return
    with backends.database_by_driver(request.param, sqlite_url) as url:
        async with opened(url, pool_size=1, max_overflow=0) as session:
            await Accounts(session).add_many([account(number) for number in ROWS])
            yield session, Accounts


async def first_of(stream: Any, then: Callable[[], Any]) -> None:
    """Read the first row, and do something else with the stream left open."""
    await anext(stream)
    await then()


async def cancelled(call: Any) -> None:
    task = asyncio.create_task(call)
    await asyncio.sleep(0.2)
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()


async def test_t7_the_stream_of_a_cancelled_task_gives_its_connection_back_while_it_is_referenced(
    store: tuple[Any, Any],
) -> None:
    session, repository = store
    stream = repository(session).stream(sort="id", batch_size=10)
    await cancelled(first_of(stream, asyncio.Event().wait))
    await until(lambda: session.pool_status().checked_out == 0)
    assert await repository(session).count() == len(ROWS)
    with pytest.raises(RuntimeError, match="the task that read it was cancelled"):
        [one async for one in stream]


async def test_t7_so_does_a_stream_of_rows(database_url: str) -> None:
    async with opened(database_url, pool_size=1, max_overflow=0) as session:
        await Accounts(session).add_many([account(number) for number in ROWS])
        stream = session.stream(sa.select(accounts))
        await cancelled(first_of(stream, asyncio.Event().wait))
        await until(lambda: session.pool_status().checked_out == 0)
        assert await Accounts(session).count() == len(ROWS)
        await stream.aclose()


async def test_a_stream_may_go_from_task_to_task(store: tuple[Any, Any]) -> None:
    session, repository = store
    stream = repository(session).stream(sort="id", batch_size=3)
    seen = []
    for _ in ROWS:
        one = await asyncio.create_task(anext(stream))
        seen.append(one.id)
    assert seen == ROWS
    assert await anext(stream, None) is None


async def test_whoever_reads_on_is_not_harmed_by_the_end_of_the_first_reader(store: tuple[Any, Any]) -> None:
    session, repository = store
    stream = repository(session).stream(sort="id", batch_size=3)
    handed_over = asyncio.Event()

    async def begin() -> None:
        await anext(stream)
        handed_over.set()
        await asyncio.Event().wait()

    beginner = asyncio.create_task(begin())
    await handed_over.wait()
    seen = [(await anext(stream)).id for _ in range(5)]
    beginner.cancel()
    await asyncio.wait([beginner])
    await asyncio.sleep(0.05)
    assert [0, *seen] + [one.id async for one in stream] == ROWS
    await until(lambda: session.pool_status().checked_out == 0)


@pytest.mark.parametrize("in_a_unit", [False, True], ids=["alone", "unit"])
@pytest.mark.parametrize("database_url", ["postgres", "mysql", "asyncmy"], indirect=True)
async def test_p1_whoever_leaves_a_stream_early_does_not_wait_for_a_silent_server(
    database_url: str, in_a_unit: bool
) -> None:
    knobs = {"pool_size": 1, "max_overflow": 0, "shutdown_timeout": 0.1}
    async with FaultProxy(*address_of(database_url)) as proxy, opened(proxy.url(database_url), **knobs) as session:
        await Accounts(session).add_many([account(number, owner="x" * 90) for number in range(60_000)])

        async def leave(place: Any) -> None:
            async with aclosing(Accounts(place).stream()) as stream:
                async for _ in stream:
                    proxy.blackhole()
                    break

        async def work() -> None:
            if in_a_unit:
                async with session.transaction() as unit:
                    await leave(unit)
                    await unit.rollback()
            else:
                await leave(session)

        started = time.monotonic()
        await asyncio.wait([task := asyncio.create_task(work())], timeout=6)
        assert task.done()
        assert time.monotonic() - started < 5
        proxy.heal()
        task.exception()
        await until(lambda: session.pool_status().checked_out == 0)


@pytest.mark.parametrize("database_url", ["sqlite", "postgres", "mysql", "asyncmy"], indirect=True)
async def test_t7_a_stream_that_is_cancelled_in_the_middle_of_an_answer_logs_no_error(
    database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with opened(database_url, pool_size=2, max_overflow=0) as session:
        await Accounts(session).add_many(Account(number, f"number {number}", 0, "owner") for number in range(5_000))
        cancelled = 0
        for attempt in range(60):
            task = asyncio.create_task(read_all(session.stream(sa.select(accounts))))
            await asyncio.wait({task}, timeout=attempt % 20 * 0.0005)
            cancelled += task.cancel()
            await asyncio.wait({task})
        assert cancelled > 5
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == []


async def read_all(stream: AsyncIterator[Any]) -> int:
    return len([row async for row in stream])


ENDLESS = sa.text(
    "CREATE VIEW endless AS SELECT id, number, owner, CASE WHEN id < 1100 THEN 0 ELSE "
    "(WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT max(i) FROM n) END AS balance FROM accounts"
)
"""Its second batch of a thousand rows never comes."""
endless = accounts.to_metadata(sa.MetaData(), name="endless")


class Endless(SQLAlchemyRepository[Account]):
    table = endless


@pytest.fixture(params=["file", "in memory"])
def place(request: pytest.FixtureRequest, sqlite_url: str) -> str:
    return sqlite_url if request.param == "file" else "sqlite+aiosqlite://"


@pytest.fixture(params=["repository", "portable repository", "Core"])
async def reader(request: pytest.FixtureRequest, place: str) -> AsyncIterator[tuple[Any, Any, list[Any]]]:
    """A session of SQLite, what reads the endless stream there or in a unit, and what that has read."""
    seen: list[Any] = []

    async def read(place: Any) -> None:
        stream = place.stream(sa.select(endless)) if request.param == "Core" else Endless(place).stream()
        async with aclosing(stream):
            async for row in stream:
                seen.append(row)  # noqa: PERF401 - the test looks at them meanwhile

    async with opened(place, portable=request.param.startswith("portable"), shutdown_timeout=0.1) as session:
        await Accounts(session).add_many([account(number) for number in range(1200)])
        await session.execute(ENDLESS)
        yield session, read, seen


async def assert_at_rest(session: Any) -> None:
    """Nothing of what was interrupted holds the write lock, and nothing of it was kept."""
    async with asyncio.timeout(2):
        await Accounts(session).add(account(3000))
        assert await Accounts(session).count() == 1201
        await until(lambda: session.pool_status().checked_out == 0)


@pytest.mark.parametrize("in_a_unit", [False, True], ids=["alone", "unit"])
async def test_t7_a_cancelled_stream_of_sqlite_does_not_wait_for_its_statement(
    reader: tuple[Any, Any, list[Any]], in_a_unit: bool
) -> None:
    session, read, seen = reader

    async def work() -> None:
        if not in_a_unit:
            await read(session)
        async with session.transaction() as unit:
            await Accounts(unit).add(account(2000))
            await read(unit)

    task = asyncio.create_task(work())
    await until(lambda: len(seen) == 1000)
    task.cancel()
    await asyncio.wait({task}, timeout=5)
    assert task.cancelled()
    await assert_at_rest(session)


async def test_t7_a_unit_of_sqlite_may_go_back_after_its_stream_was_cancelled(
    reader: tuple[Any, Any, list[Any]],
) -> None:
    session, read, seen = reader

    async def work() -> None:
        async with session.transaction() as unit:
            await Accounts(unit).add(account(2000))
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.5):
                    await read(unit)
            await unit.rollback()

    task = asyncio.create_task(work())
    await asyncio.wait({task}, timeout=5)
    assert task.done()
    await task
    assert len(seen) == 1000
    await assert_at_rest(session)


@pytest.mark.parametrize("in_a_unit", [False, True], ids=["alone", "unit"])
async def test_t7_nor_does_a_late_stream_of_sqlite_that_could_not_be_interrupted(
    reader: tuple[Any, Any, list[Any]], in_a_unit: bool
) -> None:
    session, read, seen = reader
    session.pool.interrupt = lambda _: False

    async def work() -> None:
        with deadline(0.5):
            if not in_a_unit:
                await read(session)
            async with session.transaction() as unit:
                await Accounts(unit).add(account(2000))
                await read(unit)

    task = asyncio.create_task(work())
    await asyncio.wait({task}, timeout=5)
    assert task.done()
    assert isinstance(task.exception(), DeadlineExceededError)
    assert len(seen) == 1000
    await assert_at_rest(session)
