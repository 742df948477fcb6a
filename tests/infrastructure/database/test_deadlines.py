"""Deadlines: of a statement, and of a piece of work with all of its calls; what a late call leaves behind."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, suppress
from typing import Any

import pytest
import sqlalchemy as sa

from fastapi_building_blocks.domain import (
    CommitOutcomeUnknownError,
    DeadlineExceededError,
    DeadlockError,
    PoolTimeoutError,
    StatementTimeoutError,
    field,
)
from fastapi_building_blocks.infrastructure import (
    BaseRepository,
    InMemorySession,
    SQLAlchemySession,
    StatementEvent,
    deadline,
    time_left,
)
from fastapi_building_blocks.infrastructure.database import connections
from fastapi_building_blocks.infrastructure.database.connections import PooledConnection
from tests.guarantees.ledger import Account, Accounts, account, accounts, opened
from tests.server_view import until

SLEEP = {"postgresql": "SELECT pg_sleep(5)", "mysql": "SELECT SLEEP(5)"}
COUNT = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 30000000) SELECT count(*) FROM n"


def slow(session: SQLAlchemySession) -> sa.TextClause:
    return sa.text(SLEEP.get(session.dialect_name, COUNT))


async def in_a_unit(session: SQLAlchemySession) -> None:
    async with session.transaction() as unit:
        await unit.execute(slow(session))


async def as_a_stream(session: SQLAlchemySession) -> None:
    async with aclosing(session.stream(slow(session))) as rows:  # type: ignore[type-var]
        async for _ in rows:
            pass


CALLS: dict[str, Callable[[SQLAlchemySession], Awaitable[object]]] = {
    "execute": lambda session: session.execute(slow(session)),
    "unit": in_a_unit,
    "stream": as_a_stream,
}


@pytest.fixture(params=CALLS)
def call(request: pytest.FixtureRequest) -> Callable[[SQLAlchemySession], Awaitable[object]]:
    return CALLS[request.param]


@pytest.fixture
async def session(database_url: str) -> AsyncIterator[SQLAlchemySession]:
    async with opened(database_url, pool_size=2, max_overflow=0) as session:
        await Accounts(session).add(account(1))
        yield session


async def test_a_deadline_ends_a_statement(
    session: SQLAlchemySession, call: Callable[[SQLAlchemySession], Awaitable[object]]
) -> None:
    started = time.monotonic()
    with pytest.raises(DeadlineExceededError), deadline(0.3):
        await call(session)
    assert 0.25 < time.monotonic() - started < 0.8
    current = asyncio.current_task()
    assert current is not None
    assert not current.cancelling(), "nothing is left of the cancellation"
    await asyncio.sleep(0)
    assert (await Accounts(session).get(1)).id == 1
    await until(lambda: session.pool_status().checked_out == 0)


async def cut_short(connection: PooledConnection, statement: Any, arguments: Any) -> str:
    """An answer that comes at the moment when its call is cancelled; asyncio.wait_for does so on Python 3.11."""
    with suppress(asyncio.CancelledError):
        await asyncio.sleep(5)
    if arguments:
        raise arguments[0]
    return "the answer"


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
@pytest.mark.parametrize("in_unit", [False, True], ids=["alone", "in a unit"])
@pytest.mark.parametrize("error", [None, ValueError("the driver's own")], ids=["answer", "error"])
async def test_a_late_call_that_ends_by_itself_leaves_no_cancellation_behind(
    session: SQLAlchemySession, in_unit: bool, error: Exception | None
) -> None:
    """Whoever counts cancellations, as asyncio.timeout does, would take its own for somebody else's."""
    arguments = (error,) if error else ()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(1.5):
            with suppress(ValueError):
                if in_unit:
                    async with session.transaction() as unit:
                        with deadline(0.1):
                            assert await unit.perform(cut_short, None, arguments) == "the answer"
                else:
                    with deadline(0.1):
                        assert await session.perform(cut_short, None, arguments) == "the answer"
            await asyncio.sleep(5)
    current = asyncio.current_task()
    assert current is not None
    assert not current.cancelling()
    assert await Accounts(session).count() == 1


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
async def test_what_follows_a_late_statement_of_the_same_call_has_its_time_as_well(session: SQLAlchemySession) -> None:
    async def in_two_parts(connection: PooledConnection, statement: Any, arguments: Any) -> None:
        turn = connection.turn
        await cut_short(connection, statement, ())
        connection.next_statement(turn)
        await asyncio.sleep(60)

    session._patience = 0.1
    async with asyncio.timeout(5):
        with pytest.raises(StatementTimeoutError):
            await session.perform(in_two_parts, sa.select(sa.literal(1)), ())
    current = asyncio.current_task()
    assert current is not None
    assert not current.cancelling()


async def test_one_deadline_is_for_all_calls_of_the_work_and_shrinks(session: SQLAlchemySession) -> None:
    with deadline(0.3):
        first = time_left()
        await Accounts(session).get(1)
        await asyncio.sleep(0.05)
        second = time_left()
        assert first is not None
        assert second is not None
        assert second < first - 0.04
        with deadline(5), pytest.raises(DeadlineExceededError):
            await session.execute(slow(session))  # the earlier of two deadlines counts
        with pytest.raises(DeadlineExceededError):
            await Accounts(session).add(account(2))
    assert time_left() is None
    assert await Accounts(session).count() == 1


async def test_work_that_was_late_is_not_committed(session: SQLAlchemySession) -> None:
    with deadline(0.1), pytest.raises(DeadlineExceededError):
        async with session.transaction() as unit:
            await Accounts(unit).add(account(2))
            await asyncio.sleep(0.15)
    assert await Accounts(session).count() == 1
    await until(lambda: session.pool_status().checked_out == 0)


async def test_a_deadline_bounds_the_wait_for_a_connection(database_url: str) -> None:
    async with opened(database_url, pool_size=1, max_overflow=0, pool_timeout=30) as session:
        async with session.transaction() as unit:
            await Accounts(unit).count()
            started = time.monotonic()
            for ask in (Accounts(session).count, lambda: in_a_unit(session), session.ping):
                with pytest.raises(PoolTimeoutError, match="deadline"), deadline(0.1):
                    await ask()
            assert time.monotonic() - started < 1
        assert await Accounts(session).count() == 0


async def test_a_task_that_is_cancelled_meanwhile_stays_cancelled(session: SQLAlchemySession) -> None:
    async def work() -> None:
        with deadline(0.2):
            await session.execute(slow(session))

    for after in (0.1, 0.19, 0.2, 0.21):
        task = asyncio.create_task(work())
        await asyncio.sleep(after)
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled() or isinstance(task.exception(), DeadlineExceededError)
    await until(lambda: session.pool_status().checked_out == 0)
    assert (await Accounts(session).get(1)).id == 1


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
async def test_what_sqlite_is_asked_to_stop_leaves_its_transaction_usable(database_url: str) -> None:
    async with opened(database_url, statement_timeout=0.2) as session, session.transaction() as unit:
        await Accounts(unit).add(account(1))
        with pytest.raises(StatementTimeoutError):
            async with unit.savepoint():
                await unit.execute(slow(session))
        await Accounts(unit).add(account(2))
        assert await Accounts(unit).count() == 2


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
async def test_a_deadline_ends_the_wait_for_sqlites_lock(database_url: str) -> None:
    async with opened(database_url) as session, session.transaction() as unit:
        await Accounts(unit).add(account(1))
        started = time.monotonic()
        with pytest.raises(CommitOutcomeUnknownError), deadline(0.2):
            await Accounts(session).add(account(2))  # SQLite's own patience is 5 s
        assert time.monotonic() - started < 0.7


@pytest.mark.parametrize("database_url", ["postgres", "mysql"], indirect=True)
async def test_whether_a_write_that_was_late_is_kept_is_unknown(database_url: str) -> None:
    """It is, if the server only takes its time; sent once more, it would be done twice."""
    async with opened(database_url) as session, opened(database_url) as other:
        await Accounts(session).add(account(1))
        async with other.transaction() as unit:
            await Accounts(unit).get_by_id(1, lock="update")
            with pytest.raises(CommitOutcomeUnknownError) as caught, deadline(0.2):
                await Accounts(session).update_where({"balance": 5}, field("id") == 1)
            assert caught.value.retry_after is None
            with pytest.raises(DeadlineExceededError), deadline(0.2):
                async with session.transaction() as late:
                    await Accounts(late).patch(1, {"balance": 5})  # of a unit nothing is kept


@pytest.mark.parametrize("database_url", ["postgres"], indirect=True)
async def test_so_it_is_where_a_select_stands_on_a_write(database_url: str) -> None:
    async with opened(database_url) as session, opened(database_url) as other:
        await Accounts(session).add(account(1))
        changed = sa.update(accounts).values(balance=5).returning(accounts.c.id).cte()
        async with other.transaction() as unit:
            await Accounts(unit).get_by_id(1, lock="update")
            with pytest.raises(CommitOutcomeUnknownError), deadline(0.2):
                await session.execute(sa.select(changed.c.id))


@pytest.mark.parametrize("portable", [False, True])
async def test_the_statement_timeout_is_for_each_statement_of_a_bulk_write(database_url: str, portable: bool) -> None:
    async with opened(database_url, portable=portable, statement_timeout=0.3) as session:
        rows = [account(number) for number in range(3000)]
        assert await Accounts(session).add_many(rows) == 3000
        assert await Accounts(session).update_many(account(number, 1) for number in range(3000)) == 3000
        assert await Accounts(session).upsert_many([*rows, *rows[:10]]) == 3010


async def test_observers_are_told_of_the_time_out(session: SQLAlchemySession) -> None:
    seen: list[StatementEvent] = []
    session.observe(seen.append)
    with pytest.raises((StatementTimeoutError, CommitOutcomeUnknownError)), deadline(0.1):
        await Accounts(session).update_where({"balance": 1}, sa.text("0 < (" + slow_expression(session) + ")"))
    assert [type(event.error) for event in seen] == [StatementTimeoutError]


def slow_expression(session: SQLAlchemySession) -> str:
    expressions = {"postgresql": "SELECT 1 FROM pg_sleep(5)", "mysql": "SELECT 1 + SLEEP(5)"}
    return expressions.get(session.dialect_name, COUNT)


async def test_a_deadline_is_a_positive_number_of_seconds() -> None:
    for seconds in (0, -1, float("nan")):
        with pytest.raises(ValueError, match="seconds"), deadline(seconds):
            pass


class InMemoryAccounts(BaseRepository[Account]):
    table = Accounts.table


async def test_in_memory_it_is_the_same() -> None:
    async with InMemorySession() as session:
        await InMemoryAccounts(session).add(account(1))
        with deadline(0.05):
            await InMemoryAccounts(session).count()
            async with session.transaction() as holder:
                await InMemoryAccounts(holder).patch(1, {"balance": 1})
                with pytest.raises(StatementTimeoutError):
                    await InMemoryAccounts(session).patch(1, {"balance": 2})
                with pytest.raises(DeadlineExceededError):
                    await InMemoryAccounts(session).count()
                await holder.rollback()
        assert (await InMemoryAccounts(session).get(1)).balance == 0


async def test_run_does_not_wait_for_another_attempt_beyond_the_deadline(session: SQLAlchemySession) -> None:
    attempts = 0

    async def work(_unit: object) -> None:
        nonlocal attempts
        attempts += 1
        raise DeadlockError("again")

    started = time.monotonic()
    with pytest.raises((DeadlockError, DeadlineExceededError)), deadline(0.2):
        await session.run(work, attempts=1000)
    assert time.monotonic() - started < 0.5
    assert attempts > 1


# The look around


async def test_connections_are_replaced_when_they_are_old(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "_LOOK_AGAIN", 0.01)
    async with opened(database_url, pool_size=2, recycle=0.1) as session:
        async with session.transaction() as unit:
            await Accounts(unit).count()
            first = unit._connection
            await asyncio.sleep(0.15)
            await Accounts(unit).add(account(1))
        assert await Accounts(session).count() == 1
        await until(lambda: first not in session._pool._connections)
        assert session.pool_status().checked_out == 0


async def test_a_session_that_rests_has_no_timer(session: SQLAlchemySession) -> None:
    await Accounts(session).count()
    assert session._pool._watch is not None
    await until(lambda: session._pool._watch is None)
    await Accounts(session).count()
    assert session._pool._watch is not None


async def test_a_task_that_is_cancelled_in_the_moment_of_its_deadline_is_cancelled(
    session: SQLAlchemySession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session._pool, "interrupt", lambda _: False)
    cancel_call = PooledConnection.cancel_call

    async def work() -> None:
        with deadline(0.2):
            await session.execute(slow(session))

    task = asyncio.create_task(work())

    def cancel_both(connection: PooledConnection) -> None:
        task.cancel()
        cancel_call(connection)

    monkeypatch.setattr(PooledConnection, "cancel_call", cancel_both)
    with pytest.raises(asyncio.CancelledError):
        await task
    await until(lambda: session.pool_status().checked_out == 0)


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
async def test_a_write_that_sqlite_interrupts_undoes_the_whole_unit_and_is_still_a_timeout(
    session: SQLAlchemySession,
) -> None:
    # https://www.sqlite.org/c3ref/interrupt.html: the transaction is rolled back, its savepoints with it.
    many = sa.text(
        "INSERT INTO accounts (id, number, balance) "
        "WITH RECURSIVE n(i) AS (SELECT 10 UNION ALL SELECT i + 1 FROM n WHERE i < 30000000) SELECT i, i, 0 FROM n"
    )
    with pytest.raises(RuntimeError, match="StatementTimeoutError"):
        async with session.transaction() as unit:
            await Accounts(unit).add(account(2))
            with pytest.raises(StatementTimeoutError), deadline(0.2):
                async with unit.savepoint():
                    await unit.execute(many)
            await Accounts(unit).add(account(3))
    assert await Accounts(session).count() == 1
