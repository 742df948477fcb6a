"""What an in-memory session promises beyond the repository contract: isolation, locks, references, its own state."""

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from typing import Any

import pytest
import sqlalchemy as sa

from fastapi_building_blocks.domain import (
    DeadlockError,
    DuplicateKeyError,
    ForeignKeyError,
    SerializationError,
    UnsupportedOperationError,
    field,
)
from fastapi_building_blocks.infrastructure.database.in_memory_session import InMemorySession
from fastapi_building_blocks.infrastructure.persistence.repositories.base import BaseRepository
from fastapi_building_blocks.infrastructure.persistence.unit_of_work import UnitOfWork

metadata = sa.MetaData()
teams = sa.Table(
    "teams", metadata, sa.Column("id", sa.Integer(), primary_key=True), sa.Column("name", sa.String(), unique=True)
)
players = sa.Table(
    "players",
    metadata,
    sa.Column("id", sa.Integer(), primary_key=True),
    sa.Column("team_id", sa.ForeignKey("teams.id")),
    sa.Column("mentor_id", sa.ForeignKey("players.id", ondelete="SET NULL")),
)
shirts = sa.Table(
    "shirts",
    metadata,
    sa.Column("id", sa.Integer(), primary_key=True),
    sa.Column("player_id", sa.ForeignKey("players.id", ondelete="CASCADE"), nullable=False),
)


@dataclasses.dataclass
class Team:
    id: int | None
    name: str | None = None


@dataclasses.dataclass
class Player:
    id: int | None
    team_id: int | None = None
    mentor_id: int | None = None


@dataclasses.dataclass
class Shirt:
    id: int | None
    player_id: int


class Teams(BaseRepository[Team]):
    table = teams


class Players(BaseRepository[Player]):
    table = players


class Shirts(BaseRepository[Shirt]):
    table = shirts


@pytest.fixture
async def session() -> AsyncIterator[InMemorySession]:
    async with InMemorySession() as session:
        yield session


async def until(condition: Any) -> None:
    """Let other tasks run until something is so."""
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0)
    raise AssertionError("it never came true")


def waiters(session: InMemorySession) -> int:
    return sum(len(held.waiters) for held in session._locks._held.values())


# Its own state


async def test_a_session_that_is_not_open_says_connect() -> None:
    session = InMemorySession()
    repository = Teams(session)
    for call in (repository.count(), session.ping(), repository.add(Team(1)), anext(repository.stream())):
        with pytest.raises(RuntimeError, match=r"connect\(\)"):
            await call
    with pytest.raises(RuntimeError, match=r"connect\(\)"):
        session.pool_status()
    with pytest.raises(RuntimeError, match=r"connect\(\)"):
        async with session.transaction():
            pass


async def test_a_disconnected_session_says_connect_and_keeps_its_data() -> None:
    session = InMemorySession()
    await session.connect()
    await Teams(session).add(Team(1))
    await session.disconnect()
    with pytest.raises(RuntimeError, match=r"connect\(\)"):
        await Teams(session).count()
    await session.connect()
    assert await Teams(session).count() == 1


async def test_disconnecting_rolls_back_what_is_open_and_wakes_who_waits(session: InMemorySession) -> None:
    await Teams(session).add(Team(1))
    with pytest.raises(RuntimeError, match=r"connect\(\)"):
        async with session.transaction() as unit:
            await Teams(unit).patch(1, {"name": "one"})
            waiting = asyncio.create_task(Teams(session).patch(1, {"name": "two"}))
            await until(lambda: waiters(session) == 1)
            await session.disconnect()
            with pytest.raises(RuntimeError, match=r"connect\(\)"):
                await waiting
    await session.connect()
    assert await Teams(session).get(1) == Team(1)
    assert session._locks._held == {}


async def test_pool_status_counts_open_transactions(session: InMemorySession) -> None:
    async with session.transaction() as unit:
        assert session.pool_status().checked_out == 0, "nothing is begun before the first statement"
        await Teams(unit).count()
        status = session.pool_status()
        assert (status.size, status.checked_out, status.idle, status.waiting) == (1, 1, 0, 0)
    assert session.pool_status().checked_out == 0
    assert session.dialect_name == "memory"


async def test_it_does_not_run_sql(session: InMemorySession) -> None:
    with pytest.raises(UnsupportedOperationError):
        await session.execute(sa.text("SELECT 1"))
    with pytest.raises(UnsupportedOperationError):
        await anext(aiter(session.stream(sa.select(teams))))
    with pytest.raises(UnsupportedOperationError, match=r"field\(\)"):
        await Teams(session).get_all(teams.c.id == 1)


@pytest.mark.parametrize("arguments", [{"isolation": "SNAPSHOT"}, {"isolation": ""}])
async def test_an_unknown_isolation_level_is_refused(session: InMemorySession, arguments: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="SERIALIZABLE"):
        async with session.transaction(**arguments):
            pass
    with pytest.raises(ValueError, match="lock_timeout"):
        InMemorySession(lock_timeout=0)


@pytest.mark.parametrize("isolation", [1, b"SERIALIZABLE", ["SERIALIZABLE"]])
async def test_an_isolation_level_is_a_string(session: InMemorySession, isolation: Any) -> None:
    with pytest.raises(TypeError, match="SERIALIZABLE"):
        async with session.transaction(isolation):
            pass


@pytest.mark.parametrize("steps", range(5))
async def test_t7_a_cancelled_call_leaves_no_transaction_behind(session: InMemorySession, steps: int) -> None:
    async def in_a_unit() -> None:
        async with session.transaction("REPEATABLE READ") as unit:
            await Teams(unit).add(Team(2))

    async def streamed() -> None:
        async for _ in Teams(session).stream():
            pass

    for call in (Teams(session).count(), Teams(session).add(Team(1)), in_a_unit(), streamed()):
        task = asyncio.create_task(call)
        for _ in range(steps):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        assert session.pool_status().checked_out == 0


async def test_a_cancelled_waiter_leaves_nothing_locked(session: InMemorySession) -> None:
    await Teams(session).add(Team(1))
    async with session.transaction() as unit:
        await Teams(unit).patch(1, {"name": "one"})
        waiting = asyncio.create_task(Teams(session).patch(1, {"name": "two"}))
        await until(lambda: waiters(session) == 1)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert waiters(session) == 0
    assert session.pool_status().checked_out == 0
    assert session._locks._held == {}


# Isolation


async def test_nobody_sees_what_is_not_committed(session: InMemorySession) -> None:
    await Teams(session).add(Team(1, "one"))
    async with session.transaction() as unit:
        await Teams(unit).patch(1, {"name": "changed"})
        await Teams(unit).add(Team(2))
        assert await Teams(session).get_all() == [Team(1, "one")]
    assert await Teams(session).get_all() == [Team(1, "changed"), Team(2)]


async def test_read_committed_sees_what_others_commit_meanwhile(session: InMemorySession) -> None:
    await Teams(session).add(Team(1, "one"))
    async with session.transaction() as unit:
        assert (await Teams(unit).get(1)).name == "one"
        await Teams(session).patch(1, {"name": "changed"})
        assert (await Teams(unit).get(1)).name == "changed"


async def test_a_waiting_update_where_looks_again_at_what_it_waited_for(session: InMemorySession) -> None:
    await Teams(session).add_many([Team(1, "x"), Team(2, "y")])
    async with session.transaction() as unit:
        await Teams(unit).patch(1, {"name": "no longer"})
        waiting = asyncio.create_task(Teams(session).update_where({"name": None}, field("name") == "x"))
        await until(lambda: waiters(session) == 1)
    assert await waiting == 0
    assert (await Teams(session).get(1)).name == "no longer"


@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
async def test_a_snapshot_is_of_its_first_statement(session: InMemorySession, level: str) -> None:
    await Teams(session).add_many([Team(1, "one"), Team(2, "two")])
    async with session.transaction(level) as unit:
        await Teams(session).patch(1, {"name": "before the first statement"})
        assert (await Teams(unit).get(1)).name == "before the first statement"
        await Teams(session).patch(1, {"name": "later"})
        await Teams(session).delete(2)
        await Teams(session).add(Team(3, "three"))
        assert [team.name for team in await Teams(unit).get_all()] == ["before the first statement", "two"]
        assert [team.id async for team in Teams(unit).stream()] == [1, 2]
    assert await Teams(session).count() == 2


@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
async def test_of_two_writers_on_snapshots_the_first_to_commit_wins(session: InMemorySession, level: str) -> None:
    await Teams(session).add(Team(1, "one"))
    with pytest.raises(SerializationError):
        async with session.transaction(level) as unit:
            await Teams(unit).get(1)
            await Teams(session).patch(1, {"name": "other"})
            await Teams(unit).patch(1, {"name": "mine"})
    assert (await Teams(session).get(1)).name == "other"


async def write_skew(session: InMemorySession, level: str) -> list[Any]:
    """Two doctors go off duty, each because the other one is on (G2-item of Hermitage)."""
    await Teams(session).add_many([Team(1, "on"), Team(2, "on-call")])
    barrier = asyncio.Barrier(2)

    async def leave(me: int) -> None:
        async with UnitOfWork(session, level) as unit:
            on_duty = await Teams(unit).count(field("name").starts_with("on"))
            await barrier.wait()
            if on_duty == 2:
                await Teams(unit).patch(me, {"name": None})

    return await asyncio.gather(leave(1), leave(2), return_exceptions=True)


async def test_serializable_refuses_write_skew(session: InMemorySession) -> None:
    answers = await write_skew(session, "SERIALIZABLE")
    assert [type(answer) for answer in answers].count(SerializationError) == 1
    assert await Teams(session).count(field("name").is_not_null()) == 1


async def test_repeatable_read_is_documented_to_allow_write_skew(session: InMemorySession) -> None:
    assert await write_skew(session, "REPEATABLE READ") == [None, None]


async def test_serializable_refuses_phantoms(session: InMemorySession) -> None:
    with pytest.raises(SerializationError):
        async with session.transaction("SERIALIZABLE") as unit:
            assert not await Teams(unit).exists(field("name") == "new")
            await Teams(session).add(Team(1, "new"))
            await Teams(unit).add(Team(2, "mine"))
    assert [team.id for team in await Teams(session).get_all()] == [1]


async def test_serializable_lets_unrelated_changes_pass_and_readers_never_fail(session: InMemorySession) -> None:
    await Teams(session).add_many([Team(1, "a"), Team(2, "b")])
    async with session.transaction("SERIALIZABLE") as unit:
        await Teams(unit).get(1)
        await Teams(session).patch(2, {"name": "elsewhere"})
        await Teams(unit).patch(1, {"name": "mine"})
    async with session.transaction("SERIALIZABLE") as unit:
        await Teams(unit).get_all()
        await Teams(session).patch(2, {"name": "again"})
    assert [team.name for team in await Teams(session).get_all()] == ["mine", "again"]


# Locks


async def test_whoever_closes_a_circle_of_waiting_is_the_victim(session: InMemorySession) -> None:
    await Teams(session).add_many([Team(1), Team(2)])
    both_hold = asyncio.Barrier(2)

    async def work(first: int, second: int) -> None:
        async with session.transaction() as unit:
            await Teams(unit).patch(first, {"name": f"{first} by {first}"})
            await both_hold.wait()
            await Teams(unit).patch(second, {"name": f"{second} by {first}"})

    answers = await asyncio.gather(work(1, 2), work(2, 1), return_exceptions=True)
    assert sorted(type(answer).__name__ for answer in answers) == ["DeadlockError", "NoneType"]
    survivor = answers.index(None) + 1
    assert {team.name for team in await Teams(session).get_all()} == {f"1 by {survivor}", f"2 by {survivor}"}


async def test_waiters_are_served_first_come_first_served(session: InMemorySession) -> None:
    await Teams(session).add(Team(1))
    order: list[int] = []

    async def wait(number: int) -> None:
        async with session.transaction() as unit:
            await Teams(unit).get_by_id(1, lock="update")
            order.append(number)

    async with session.transaction() as unit:
        await Teams(unit).get_by_id(1, lock="update")
        tasks = []
        for number in range(5):
            tasks.append(asyncio.create_task(wait(number)))
            await until(lambda number=number: waiters(session) == number + 1)
    await asyncio.gather(*tasks)
    assert order == [0, 1, 2, 3, 4]


async def test_a_lock_is_waited_for_no_longer_than_the_timeout() -> None:
    async with InMemorySession(lock_timeout=0.01) as session:
        await Teams(session).add(Team(1))
        async with session.transaction() as unit:
            await Teams(unit).get_by_id(1, lock="update")
            with pytest.raises(DeadlockError, match="too long"):
                await Teams(session).patch(1, {"name": "never"})
        assert await Teams(session).get(1) == Team(1)


async def test_a_rolled_back_savepoint_gives_its_locks_back(session: InMemorySession) -> None:
    await Teams(session).add(Team(1))
    async with session.transaction() as unit:
        with pytest.raises(LookupError):
            async with unit.savepoint():
                await Teams(unit).patch(1, {"name": "mine"})
                raise LookupError
        await Teams(session).patch(1, {"name": "other"})
    assert (await Teams(session).get(1)).name == "other"


async def test_a_pending_unique_value_is_waited_for_and_free_again_after_a_rollback(session: InMemorySession) -> None:
    async def add(number: int) -> None:
        await Teams(session).add(Team(number, "wanted"))

    async with session.transaction() as unit:
        await Teams(unit).add(Team(1, "wanted"))
        waiting = asyncio.create_task(add(2))
        await until(lambda: waiters(session) == 1)
        await unit.rollback()
    await waiting
    async with session.transaction() as unit:
        await Teams(unit).delete(2)
        waiting = asyncio.create_task(add(3))
        await until(lambda: waiters(session) == 1)
    await waiting
    with pytest.raises(DuplicateKeyError):
        await add(4)
    assert [team.id for team in await Teams(session).get_all()] == [3]


async def test_upserts_and_deletes_of_one_key_never_deadlock(session: InMemorySession) -> None:
    calls = [
        Teams(session).delete(1) if number % 2 else Teams(session).upsert(Team(1, f"n{number}")) for number in range(60)
    ]
    answers = await asyncio.gather(*calls, return_exceptions=True)
    assert [answer for answer in answers if isinstance(answer, BaseException)] == []


# References


async def test_a_reference_needs_what_it_refers_to(session: InMemorySession) -> None:
    await Teams(session).add(Team(1))
    await Players(session).add(Player(1, team_id=1))
    await Players(session).add(Player(2, team_id=None))
    with pytest.raises(ForeignKeyError) as caught:
        await Players(session).add(Player(3, team_id=9))
    assert caught.value.fields == ("team_id",)
    with pytest.raises(ForeignKeyError):
        await Players(session).patch(1, {"team_id": 9})
    with pytest.raises(ForeignKeyError):
        await Teams(session).delete(1)
    await Players(session).patch(1, {"team_id": None})
    assert await Teams(session).delete(1)


async def test_a_deleted_row_takes_its_dependents_along_or_leaves_them_null(session: InMemorySession) -> None:
    await Players(session).add_many([Player(1), Player(2, mentor_id=1), Player(3, mentor_id=2)])
    await Shirts(session).add_many([Shirt(1, 1), Shirt(2, 1), Shirt(3, 2)])
    with pytest.raises(LookupError):
        async with session.transaction() as unit:
            assert await Players(unit).delete(1)
            raise LookupError
    assert await Shirts(session).count() == 3
    assert await Players(session).delete(1)
    assert await Players(session).get_all() == [Player(2), Player(3, mentor_id=2)]
    assert await Shirts(session).get_all() == [Shirt(3, 2)]


async def test_a_row_may_refer_to_itself(session: InMemorySession) -> None:
    await Players(session).add(Player(1, mentor_id=1))
    assert await Players(session).delete(1)


async def test_a_referenced_row_cannot_go_while_a_reference_is_pending(session: InMemorySession) -> None:
    await Teams(session).add(Team(1))
    async with session.transaction() as unit:
        await Players(unit).add(Player(1, team_id=1))
        await Players(session).add(Player(2, team_id=1))  # references share
        deleting = asyncio.create_task(Teams(session).delete(1))
        await until(lambda: waiters(session) == 1)
    with pytest.raises(ForeignKeyError):
        await deleting


async def test_a_reference_counts_only_between_repositories_of_the_session(session: InMemorySession) -> None:
    await Players(session).add(Player(1, team_id=9))
    assert await Players(session).count() == 1


async def test_two_repositories_that_disagree_on_a_table_are_an_error(session: InMemorySession) -> None:
    @dataclasses.dataclass
    class Other:
        id: int

    class Others(BaseRepository[Other]):
        table = sa.Table("teams", sa.MetaData(), sa.Column("id", sa.Integer(), primary_key=True))

    Teams(session)
    with pytest.raises(TypeError, match="teams"):
        Others(session)


async def test_tables_need_no_making_but_an_open_session() -> None:
    async with InMemorySession() as session:
        await session.create_tables(sa.MetaData())
    with pytest.raises(RuntimeError, match=r"connect\(\)"):
        await session.create_tables(sa.MetaData())
