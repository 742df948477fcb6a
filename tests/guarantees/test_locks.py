"""R6: a row lock is what was asked for, or an error that says so; never less."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
import sqlalchemy as sa

from fastapi_building_blocks.domain import LockNotAvailableError, UnsupportedOperationError, field
from fastapi_building_blocks.domain.repository import Lock
from fastapi_building_blocks.infrastructure import BaseRepository, InMemorySession, UnitOfWork
from tests.guarantees.ledger import Account, Accounts, account, accounts, opened

on_servers = pytest.mark.parametrize("database_url", ["postgres", "mysql"], indirect=True)


class InMemoryAccounts(BaseRepository[Account]):
    table = accounts


@pytest.fixture(params=["sqlite_url", "postgres_url", "mysql_url", "memory"])
async def store(request: pytest.FixtureRequest) -> AsyncIterator[tuple[Any, Any]]:
    """A session with the repository for it."""
    if request.param == "memory":
        async with InMemorySession() as in_memory:
            yield in_memory, InMemoryAccounts
    else:
        async with opened(request.getfixturevalue(request.param)) as session:
            await session.execute(accounts.delete())
            yield session, Accounts


@pytest.mark.parametrize("lock", ["update", "nowait", "skip_locked"])
async def test_r6_a_lock_in_a_read_only_unit_is_refused_on_every_store(store: tuple[Any, Any], lock: Lock) -> None:
    session, repository = store
    await repository(session).add(account(1))
    async with session.transaction() as unit:
        assert not session.read_only
        assert not unit.read_only
    async with session.transaction(read_only=True) as unit, UnitOfWork(unit) as inner:
        for inside in (repository(unit), repository(inner)):
            for read in (
                inside.get_by_id(1, lock=lock),
                inside.get_by_id(404, lock=lock),
                inside.find_one(field("id") == 1, lock=lock),
                inside.get_all(lock=lock),
                inside.get_all(limit=0, lock=lock),
            ):
                with pytest.raises(UnsupportedOperationError, match="read-only"):
                    await read
            assert await inside.get_by_id(1) == account(1), "what was refused before it was sent dooms nothing"


@pytest.mark.parametrize("lock", ["nowait", "skip_locked"])
async def test_r6_sqlite_refuses_the_locks_that_it_does_not_have(sqlite_url: str, lock: Lock) -> None:
    async with opened(sqlite_url) as session:
        await Accounts(session).add(account(1))
        async with session.transaction() as unit:
            inside = Accounts(unit)
            for read in (
                inside.get_by_id(1, lock=lock),
                inside.get_all(lock=lock),
                inside.get_all(accounts.c.id == sa.literal(1), lock=lock),
            ):
                with pytest.raises(UnsupportedOperationError, match=lock):
                    await read
            assert await inside.get_by_id(1, lock="update") == account(1)


async def test_r6_an_update_lock_waits_for_its_holder_and_sees_what_that_wrote(database_url: str) -> None:
    async with opened(database_url) as session:
        await Accounts(session).add(account(1))
        asking = asyncio.Event()

        async def second() -> int:
            async with session.transaction() as unit:
                asking.set()
                found = await Accounts(unit).get_by_id(1, lock="update")
                assert found is not None
                return found.balance

        async with session.transaction() as unit:
            await Accounts(unit).get_by_id(1, lock="update")
            waiting = asyncio.create_task(second())
            await asking.wait()
            done, _ = await asyncio.wait([waiting], timeout=0.2)
            assert not done
            await Accounts(unit).patch(1, {"balance": 5})
        assert await waiting == 5


@on_servers
async def test_r6_workers_that_skip_locked_rows_share_a_queue_without_waiting(database_url: str) -> None:
    async with opened(database_url) as session:
        await Accounts(session).add_many([account(number) for number in range(30)])
        taken: list[int] = []
        all_hold_some = asyncio.Barrier(3)

        async def work(*criteria: Any) -> None:
            # Under REPEATABLE READ InnoDB also locks what it has only looked at.
            async with session.transaction(isolation="READ COMMITTED") as unit:
                inside = Accounts(unit)
                batch = await inside.get_all(*criteria, sort="id", limit=10, lock="skip_locked")
                await asyncio.wait_for(all_hold_some.wait(), 5)
                taken.extend(found.id for found in batch)
                for found in batch:
                    await inside.delete(found.id)

        async with asyncio.TaskGroup() as group:
            group.create_task(work())
            group.create_task(work(field("balance") == 0))
            group.create_task(work(accounts.c.balance == sa.literal(0)))
        assert sorted(taken) == list(range(30))
        assert await Accounts(session).count() == 0


NOWAIT: dict[str, Callable[[Accounts], Awaitable[Any]]] = {
    "by id": lambda inside: inside.get_by_id(1, lock="nowait"),
    "by field": lambda inside: inside.find_one(field("number") == "A1", lock="nowait"),
    "by expression": lambda inside: inside.get_all(accounts.c.id == sa.literal(1), lock="nowait"),
}


@on_servers
@pytest.mark.parametrize("how", NOWAIT)
async def test_r6_nowait_is_refused_at_once_never_replayed_and_a_savepoint_outlives_it(
    database_url: str, how: str
) -> None:
    async with opened(database_url) as session:
        await Accounts(session).add_many([account(1), account(2)])
        async with session.transaction() as holder:
            await Accounts(holder).get_by_id(1, lock="update")
            async with session.transaction() as unit:
                with pytest.raises(LockNotAvailableError):
                    async with unit.savepoint():
                        await NOWAIT[how](Accounts(unit))
                assert await Accounts(unit).get_by_id(2, lock="nowait") == account(2)
            calls = 0

            async def ask(unit: UnitOfWork) -> None:
                nonlocal calls
                calls += 1
                await NOWAIT[how](Accounts(unit))

            with pytest.raises(LockNotAvailableError):
                await session.run(ask, attempts=5)
            assert calls == 1
