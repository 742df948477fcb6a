"""What a unit of work promises on every store: whole or absent, one task at a time, hooks after COMMIT only."""

import asyncio
import dataclasses
import logging
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import pytest
import sqlalchemy as sa

from fastapi_building_blocks.domain import (
    BuildingBlocksError,
    DeadlockError,
    DuplicateKeyError,
    SerializationError,
    UnsupportedOperationError,
)
from fastapi_building_blocks.infrastructure import (
    BaseRepository,
    InMemorySession,
    SQLAlchemySession,
    UnitOfWork,
)
from tests.guarantees.ledger import Account, Accounts, account, accounts, metadata
from tests.server_view import until


class AccountsInMemory(BaseRepository[Account]):
    table = accounts


@dataclasses.dataclass
class Store:
    session: Any
    repository: Any


class LeaveTheBlock(Exception):
    pass


@pytest.fixture(params=["memory", "sqlite", "sqlite-memory", "postgres", "mysql", "portable"])
async def store(request: pytest.FixtureRequest, sqlite_url: str) -> AsyncIterator[Store]:
    if request.param == "memory":
        async with InMemorySession() as memory:
            yield Store(memory, AccountsInMemory)
        return
    url = sqlite_url if request.param == "sqlite" else "sqlite+aiosqlite:///:memory:"
    if request.param in ("postgres", "mysql", "portable"):
        url = request.getfixturevalue("postgres_url" if request.param == "portable" else f"{request.param}_url")
    async with SQLAlchemySession(url, portable=request.param == "portable") as session:
        await session.create_tables(metadata)
        yield Store(session, Accounts)
        async with session.engine.begin() as connection:
            await connection.run_sync(metadata.drop_all)


async def ids(store: Store) -> list[int]:
    return [found.id for found in await store.repository(store.session).get_all(sort="id")]


async def test_it_commits_on_a_clean_exit_and_rolls_back_on_an_exception(store: Store) -> None:
    async with UnitOfWork(store.session) as unit:
        await store.repository(unit).add(account(1))
    with pytest.raises(LeaveTheBlock):
        async with UnitOfWork(store.session) as unit:
            await store.repository(unit).add(account(2))
            raise LeaveTheBlock
    assert await ids(store) == [1]


async def test_a_unit_that_does_nothing_takes_no_connection(store: Store) -> None:
    called = []
    async with store.session.transaction() as unit:
        unit.on_commit(lambda: called.append(True))
        assert store.session.pool_status().checked_out == 0
    assert called == [True]


async def test_after_rollback_statements_raise_and_leaving_is_quiet(store: Store) -> None:
    async with store.session.transaction() as unit:
        repository = store.repository(unit)
        await repository.add(account(1))
        await unit.rollback()
        for call in (repository.count, unit.rollback):
            with pytest.raises(RuntimeError, match="has ended"):
                await call()
        with pytest.raises(RuntimeError, match="has ended"):
            unit.on_commit(print)
        with pytest.raises(RuntimeError, match="has ended"):
            async with unit.savepoint():
                pass
    assert await ids(store) == []


async def test_it_is_used_under_async_with_and_once(store: Store) -> None:
    unit = store.session.transaction()
    for call in (store.repository(unit).count, unit.rollback):
        with pytest.raises(RuntimeError, match="async with"):
            await call()
    async with unit:
        pass
    with pytest.raises(RuntimeError, match="used once"):
        async with unit:
            pass
    with pytest.raises(RuntimeError, match="has ended"):
        await store.repository(unit).count()


async def test_a_unit_is_a_session_but_not_one_to_connect_or_replay(store: Store) -> None:
    async with store.session.transaction() as unit:
        await unit.ping()
        assert unit.dialect_name == store.session.dialect_name
        assert unit.root is store.session
        for call in (unit.connect, unit.disconnect, lambda: unit.run(lambda inner: None)):
            with pytest.raises(RuntimeError):
                await call()
        with pytest.raises(RuntimeError):
            unit.open_transaction(None, False)
        with pytest.raises(ValueError, match="takes its isolation"):
            UnitOfWork(unit, "SERIALIZABLE")


async def test_a_failed_statement_dooms_the_unit(store: Store) -> None:
    with pytest.raises(RuntimeError, match=r"DuplicateKeyError.*nothing was kept.*savepoint") as caught:
        async with store.session.transaction() as unit:
            repository = store.repository(unit)
            await repository.add(account(1))
            with pytest.raises(DuplicateKeyError):
                await repository.add(account(1))
            with pytest.raises(RuntimeError, match="no further statement"):
                await repository.count()
            with pytest.raises(RuntimeError, match="no further statement"):
                async with unit.savepoint():
                    pass
    assert isinstance(caught.value.__cause__, DuplicateKeyError)
    assert await ids(store) == []


async def test_a_failed_statement_dooms_only_its_savepoint(store: Store) -> None:
    async with store.session.transaction() as unit:
        repository = store.repository(unit)
        await repository.add(account(1))
        with pytest.raises(DuplicateKeyError):
            async with unit.savepoint():
                await repository.add(account(2))
                await repository.add(account(1))
        with pytest.raises(RuntimeError, match="nothing since the savepoint"):
            async with unit.savepoint():
                await repository.add(account(3))
                with pytest.raises(DuplicateKeyError):
                    await repository.add(account(1))
        with pytest.raises(LeaveTheBlock):
            async with unit.savepoint():
                async with unit.savepoint():
                    await repository.add(account(4))
                raise LeaveTheBlock
        async with unit.savepoint():
            await repository.add(account(5))
    assert await ids(store) == [1, 5]


async def test_a_unit_inside_another_one_is_a_savepoint_of_it(store: Store) -> None:
    hooks: list[str] = []
    async with UnitOfWork(store.session) as outer:
        await store.repository(outer).add(account(1))
        with pytest.raises(LeaveTheBlock):
            async with UnitOfWork(outer) as inner:
                inner.on_commit(lambda: hooks.append("undone"))
                await store.repository(inner).add(account(2))
                raise LeaveTheBlock
        async with outer.transaction() as inner:
            await store.repository(inner).add(account(3))
            await inner.rollback()
            with pytest.raises(RuntimeError, match="has ended"):
                await store.repository(inner).count()
        async with UnitOfWork(outer) as inner:
            inner.on_commit(lambda: hooks.append("inner"))
            async with inner.savepoint():
                await store.repository(inner).add(account(4))
            async with UnitOfWork(inner) as innermost:
                assert await store.repository(innermost).count() == 2
                assert len([one async for one in store.repository(innermost).stream()]) == 2
        outer.on_commit(lambda: hooks.append("outer"))
    assert await ids(store) == [1, 4]
    assert hooks == ["inner", "outer"]


async def test_t8_gather_on_a_unit_is_an_error_that_says_so(store: Store) -> None:
    async with store.session.transaction() as unit:
        repository = store.repository(unit)
        await repository.add(account(1))
        outcomes = await asyncio.gather(*[repository.count() for _ in range(5)], return_exceptions=True)
        refused = [one for one in outcomes if isinstance(one, RuntimeError)]
        assert all("one task at a time" in str(one) for one in refused)
        assert len(refused) == 4
        assert await repository.count() == 1, "the one that was first has not been harmed"
    assert await ids(store) == [1]


async def test_a_stream_owns_its_transaction(store: Store) -> None:
    await store.repository(store.session).add_many([account(number) for number in range(50)])
    async with store.session.transaction() as unit:
        repository = store.repository(unit)
        async with aclosing(repository.stream(sort="id", batch_size=10)) as stream:
            assert (await anext(stream)).id == 0
            with pytest.raises(RuntimeError, match="a stream owns it"):
                await repository.count()
            with pytest.raises(RuntimeError, match="a stream owns it"):
                await unit.rollback()
            with pytest.raises(RuntimeError, match="a stream owns it"):
                async with unit.savepoint():
                    pass
        assert await repository.count() == 50
        await repository.add(account(99))
    assert 99 in await ids(store)


async def test_leaving_with_a_stream_open_keeps_nothing_and_ends_the_stream(store: Store) -> None:
    await store.repository(store.session).add_many([account(number) for number in range(50)])
    with pytest.raises(RuntimeError, match="stream was open"):
        async with store.session.transaction() as unit:
            await store.repository(unit).add(account(99))
            stream = store.repository(unit).stream(batch_size=10)
            await anext(stream)
    with pytest.raises(RuntimeError, match="has ended"):
        async for _ in stream:
            pass
    await until(lambda: store.session.pool_status().checked_out == 0)
    assert len(await ids(store)) == 50


async def test_a_savepoint_left_with_a_stream_open_dooms_the_unit(store: Store) -> None:
    await store.repository(store.session).add_many([account(number) for number in range(50)])
    with pytest.raises(RuntimeError, match="nothing was kept"):
        async with store.session.transaction() as unit:
            with pytest.raises(LeaveTheBlock):
                async with unit.savepoint():
                    await store.repository(unit).add(account(99))
                    stream = store.repository(unit).stream(batch_size=10)
                    await anext(stream)
                    raise LeaveTheBlock
            await stream.aclose()
            with pytest.raises(RuntimeError):
                await store.repository(unit).count()
    await until(lambda: store.session.pool_status().checked_out == 0)
    assert len(await ids(store)) == 50
    with pytest.raises(RuntimeError, match="a stream owns it"):
        async with store.session.transaction() as unit, unit.savepoint():
            stream = store.repository(unit).stream(batch_size=10)
            await anext(stream)
    await stream.aclose()
    await until(lambda: store.session.pool_status().checked_out == 0)


async def test_a_call_that_outlives_its_unit_cannot_bring_it_back(store: Store) -> None:
    if isinstance(store.session, InMemorySession):
        pytest.skip("a call in memory is over before another task runs")
    async with store.session.transaction() as unit:
        await unit.execute(sa.text("SELECT 1"))
        late = asyncio.create_task(unit.execute(sa.text("SELECT 1")))
        await asyncio.sleep(0)
        with pytest.raises(RuntimeError, match="statement or a stream was open"):
            await unit.__aexit__(None, None, None)
    await asyncio.gather(late, return_exceptions=True)
    with pytest.raises(RuntimeError, match="has ended"):
        await unit.execute(sa.text("SELECT 1"))
    await until(lambda: store.session.pool_status().checked_out == 0)
    assert await ids(store) == []


async def test_t9_hooks_run_in_order_after_the_commit_and_are_awaited(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[Any] = []

    async def look() -> None:
        await asyncio.sleep(0)
        seen.append(await store.repository(store.session).count())

    def fail() -> None:
        raise ZeroDivisionError("secret")

    with caplog.at_level(logging.ERROR):
        async with store.session.transaction() as unit:
            await store.repository(unit).add(account(1))
            unit.on_commit(look)
            unit.on_commit(fail)
            unit.on_commit(lambda: seen.append("last"))
            assert seen == []
    assert seen == [1, "last"]
    assert "an after-commit hook failed" in caplog.text


async def test_t9_hooks_never_run_on_a_rollback_and_go_with_their_savepoint(store: Store) -> None:
    seen: list[str] = []
    with pytest.raises(LeaveTheBlock):
        async with store.session.transaction() as unit:
            await store.repository(unit).add(account(1))
            unit.on_commit(lambda: seen.append("exception"))
            raise LeaveTheBlock
    async with store.session.transaction() as unit:
        unit.on_commit(lambda: seen.append("rollback"))
        await unit.rollback()
    with pytest.raises(LeaveTheBlock):
        async with store.session.transaction() as unit:
            unit.on_commit(lambda: seen.append("never begun"))
            raise LeaveTheBlock
    async with store.session.transaction() as unit:
        unit.on_commit(lambda: seen.append("before"))
        with pytest.raises(LeaveTheBlock):
            async with unit.savepoint():
                unit.on_commit(lambda: seen.append("in a savepoint that is undone"))
                async with unit.savepoint():
                    unit.on_commit(lambda: seen.append("deeper"))
                raise LeaveTheBlock
        async with unit.savepoint():
            unit.on_commit(lambda: seen.append("in a savepoint that is kept"))
    assert seen == ["before", "in a savepoint that is kept"]


async def test_t9_a_caller_that_is_cancelled_in_the_commit_gets_its_hooks(store: Store) -> None:
    seen: list[int] = []

    async def work() -> None:
        async with store.session.transaction() as unit:
            await store.repository(unit).add(account(1))
            unit.on_commit(lambda: seen.append(1))
            asyncio.get_running_loop().call_soon(task.cancel)

    task = asyncio.create_task(work())
    with pytest.raises(asyncio.CancelledError):
        await task
    await until(lambda: store.session.pool_status().checked_out == 0)
    await until(lambda: seen == [1])
    assert await ids(store) == [1]


async def test_a_cancelled_statement_dooms_its_unit_and_keeps_nothing(store: Store) -> None:
    if isinstance(store.session, InMemorySession):
        pytest.skip("a call in memory is over before it can be cancelled")
    with pytest.raises(RuntimeError, match="cancelled in the middle of a statement"):
        async with store.session.transaction() as unit:
            await store.repository(unit).add(account(1))
            call = asyncio.create_task(store.repository(unit).add(account(2)))
            await asyncio.sleep(0)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            with pytest.raises(RuntimeError, match="cancelled in the middle of a statement"):
                async with unit.savepoint():
                    pass
    await until(lambda: store.session.pool_status().checked_out == 0)
    assert await ids(store) == []


@pytest.mark.parametrize("level", ["READ UNCOMMITTED", "read committed", "REPEATABLE_READ", "SERIALIZABLE"])
async def test_every_isolation_level_is_taken_and_gone_afterwards(store: Store, level: str) -> None:
    async with store.session.transaction(isolation=level) as unit:
        await store.repository(unit).add(account(1))
        if store.session.dialect_name == "postgresql":
            shown = (await unit.execute(sa.text("SHOW transaction_isolation"))).scalar()
            assert shown == level.lower().replace("_", " ")
    if store.session.dialect_name == "postgresql":
        async with store.session.transaction() as unit:
            assert (await unit.execute(sa.text("SHOW transaction_isolation"))).scalar() == "read committed"
    assert await ids(store) == [1]


async def test_an_unknown_isolation_level_is_refused(store: Store) -> None:
    with pytest.raises((ValueError, UnsupportedOperationError), match="CHAOS"):
        async with store.session.transaction(isolation="CHAOS") as unit:
            await store.repository(unit).count()


async def test_repeatable_read_sees_one_moment(store: Store) -> None:
    if store.session.dialect_name == "sqlite":
        pytest.skip("a unit that may write holds SQLite's write lock, so nobody else changes anything")
    await store.repository(store.session).add(account(1))
    async with store.session.transaction(isolation="REPEATABLE READ") as unit:
        assert await store.repository(unit).count() == 1
        await store.repository(store.session).add(account(2))
        assert await store.repository(unit).count() == 1
    assert await ids(store) == [1, 2]


async def test_a_read_only_unit_reads_refuses_to_write_and_leaves_no_trace(store: Store) -> None:
    await store.repository(store.session).add(account(1))
    async with store.session.transaction(read_only=True) as unit:
        assert await store.repository(unit).count() == 1
    with pytest.raises(UnsupportedOperationError, match="read-only"):
        async with store.session.transaction(read_only=True, isolation="SERIALIZABLE") as unit:
            await store.repository(unit).add(account(2))
    for number in range(3, 9):
        await store.repository(store.session).add(account(number))
    assert len(await ids(store)) == 7


async def test_run_answers_what_the_work_answers_in_a_fresh_unit_each_time(store: Store) -> None:
    units: list[Any] = []

    async def work(unit: UnitOfWork) -> str:
        units.append(unit)
        await store.repository(unit).add(account(1))
        if len(units) == 1:
            raise DeadlockError("victim")
        if len(units) == 2:
            raise SerializationError("clash")
        return "kept"

    assert await store.session.run(work) == "kept"
    assert len(set(map(id, units))) == 3
    assert await ids(store) == [1]


@pytest.mark.parametrize("error", [BuildingBlocksError("other"), ZeroDivisionError(), DuplicateKeyError("taken")])
async def test_t5_run_replays_nothing_else(store: Store, error: Exception) -> None:
    attempts = 0

    async def work(unit: UnitOfWork) -> None:
        nonlocal attempts
        attempts += 1
        await store.repository(unit).add(account(1))
        raise error

    with pytest.raises(type(error)):
        await store.session.run(work, attempts=5)
    assert attempts == 1
    assert await ids(store) == []


async def test_t5_run_raises_the_last_error_when_attempts_are_used_up(store: Store) -> None:
    attempts = 0

    async def work(unit: UnitOfWork) -> None:
        nonlocal attempts
        attempts += 1
        raise DeadlockError(f"attempt {attempts}")

    with pytest.raises(DeadlockError, match="attempt 2"):
        await store.session.run(work, attempts=2)
    with pytest.raises(ValueError, match="at least 1"):
        await store.session.run(work, attempts=0)
