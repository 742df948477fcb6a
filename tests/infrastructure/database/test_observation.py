"""Statements are observable on both paths, and an observer can do no harm."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextvars import ContextVar

import pytest
import sqlalchemy as sa

from fastapi_building_blocks.domain import DuplicateKeyError, StatementTimeoutError
from fastapi_building_blocks.infrastructure import SQLAlchemySession, StatementEvent
from tests.guarantees.ledger import Account, Accounts, account, opened

request_id = ContextVar("request_id", default="")


@pytest.fixture(params=["driver", "portable"])
async def session(request: pytest.FixtureRequest, database_url: str) -> AsyncIterator[SQLAlchemySession]:
    async with opened(database_url, portable=request.param == "portable", statement_timeout=0.5) as session:
        yield session


SLOW = {
    "postgresql": "SELECT pg_sleep(5)",
    "mysql": "SELECT SLEEP(5)",
    "sqlite": "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 9000000) SELECT count(*) FROM n",
}


@pytest.fixture
def events(session: SQLAlchemySession) -> list[StatementEvent]:
    seen: list[StatementEvent] = []
    session.observe(seen.append)
    return seen


def names(events: list[StatementEvent]) -> list[str]:
    found = [event.name for event in events]
    events.clear()
    return found


async def test_each_statement_of_a_repository_is_told_by_name_text_rows_and_seconds(
    session: SQLAlchemySession, events: list[StatementEvent]
) -> None:
    repository = Accounts(session)
    await repository.add(account(1, 5))
    await repository.get(1)
    await repository.get_all(sort="id")
    await repository.count()
    await repository.delete(1)
    await repository.get_by_id(1)
    table = Accounts.table.name
    assert [(event.name, event.rows) for event in events] == [
        (f"{table} insert", 1),
        (f"{table} by key", 1),
        (f"{table} rows", 1),
        (f"{table} count", 1),
        (f"{table} delete", 1),
        (f"{table} by key", 0),
    ]
    assert all(table in event.sql and event.seconds > 0 and event.error is None for event in events)
    assert events[1].sql == events[5].sql
    assert "A1" not in "".join(map(repr, events)), "no parameters"


async def test_units_savepoints_bulk_writes_and_streams_are_told(
    session: SQLAlchemySession, events: list[StatementEvent]
) -> None:
    table = Accounts.table.name
    async with session.transaction() as unit, unit.savepoint():
        await Accounts(unit).count()
        await Accounts(unit).add_many([account(number) for number in range(1, 1001)])
    inside = names(events)
    bulk = ["SAVEPOINT", f"{table} insert", "RELEASE SAVEPOINT"]
    assert inside == ["BEGIN", "SAVEPOINT", f"{table} count", *bulk, "RELEASE SAVEPOINT", "COMMIT"]
    async for _ in Accounts(session).stream(batch_size=100):
        pass
    [streamed] = [event for event in events if event.name == f"{table} rows"]
    assert streamed.rows == 1000
    events.clear()
    async with session.transaction() as unit:
        await Accounts(unit).delete(1)
        await unit.rollback()
    assert names(events) == ["BEGIN", f"{table} delete", "ROLLBACK"]
    await Accounts(session).update_many([account(number, 7) for number in range(1, 4)])
    [written] = [event for event in events if event.name.startswith(table)]
    assert (written.name, written.rows) == (f"{table} update", 3)


async def test_what_sqlalchemy_runs_is_told_too(session: SQLAlchemySession, events: list[StatementEvent]) -> None:
    await Accounts(session).add(account(1))
    events.clear()
    await session.execute(sa.select(sa.func.count()).select_from(Accounts.table))
    assert await Accounts(session).count(Accounts.table.c.balance > 3) == 0
    async with session.engine.connect() as connection:
        await connection.execute(sa.text("SELECT 1"))
    told = [event for event in events if event.name == "core"]
    assert len(told) == 3
    assert "count" in told[0].sql
    with pytest.raises(Exception, match="refused"):
        await session.execute(sa.text("SELECT no_such_column"))
    assert events[-1].name == "core"
    assert events[-1].error is not None


async def test_a_stream_of_sqlalchemys_is_told_once_it_runs_with_no_rows_yet(
    session: SQLAlchemySession, events: list[StatementEvent]
) -> None:
    await Accounts(session).add_many([account(number) for number in range(1, 4)])
    events.clear()
    async for _ in session.stream(sa.select(Accounts.table)):
        [told] = [event for event in events if event.name == "core"]
        assert (told.rows, told.seconds > 0, told.error) == (0, True, None)


async def test_a_failure_is_told_as_callers_see_it(session: SQLAlchemySession, events: list[StatementEvent]) -> None:
    await Accounts(session).add(account(1))
    with pytest.raises(DuplicateKeyError):
        await Accounts(session).add(Account(1, "other", 0))
    [_, failed] = [event for event in events if event.name.endswith("insert")]
    assert isinstance(failed.error, DuplicateKeyError)
    assert failed.error.fields == ("id",)
    assert (failed.rows, failed.seconds > 0) == (0, True)


async def test_an_observer_that_fails_is_logged_and_harms_nobody(
    session: SQLAlchemySession, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[tuple[str, str]] = []
    session.observe(lambda _event: 1 / 0)
    session.observe(lambda event: seen.append((event.name, request_id.get())))
    request_id.set("r1")
    with caplog.at_level(logging.ERROR):
        await session.ping()
        await session.execute(sa.select(1))
    assert seen == [("ping", "r1"), ("core", "r1")], "in the context of the task that sent it"
    assert [record.message for record in caplog.records] == [
        "an observer of statements failed; the statement did not"
    ] * 2


@pytest.mark.parametrize("database_url", ["postgres"], indirect=True)
async def test_a_cancelled_call_and_a_timeout_are_told(
    session: SQLAlchemySession, events: list[StatementEvent]
) -> None:
    with pytest.raises(StatementTimeoutError):
        await session.execute(sa.text("SELECT pg_sleep(5)"))
    assert isinstance(events[-1].error, StatementTimeoutError)
    assert events[-1].seconds >= 0.4
    events.clear()
    async with session.transaction() as unit:
        await Accounts(unit).add(account(1))
        task = asyncio.create_task(Accounts(session).add(account(1)))  # waits for the unit
        await asyncio.sleep(0.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    [_, cancelled] = [event for event in events if event.name.endswith("insert")]
    assert isinstance(cancelled.error, InterruptedError)


async def test_a_cancelled_call_of_the_engine_is_told_and_stays_cancelled(
    session: SQLAlchemySession, events: list[StatementEvent]
) -> None:
    async def work() -> None:
        async with session.engine.connect() as connection:
            await connection.execute(sa.text("SELECT 1"))
            reached.set()
            await connection.execute(sa.text(SLOW[session.dialect_name]))

    reached = asyncio.Event()
    task = asyncio.create_task(work())
    await reached.wait()
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert isinstance(events[-1].error, InterruptedError)
