"""The repositories: what the service adds to the library's."""

import asyncio

import pytest
import sqlalchemy as sa

from example_service.app.api.dependencies import user_repository
from example_service.app.domain.user import User, UserStatus
from example_service.app.infrastructure.repositories.postgres_user_repository import PostgresUserRepository
from example_service.app.infrastructure.repositories.user_repository import UserRepository
from fastapi_building_blocks.infrastructure import SQLAlchemySession, UnitOfWork


async def test_a_user_is_found_by_email_in_whatever_case(users: UserRepository):
    alice = await users.add(User.register(email="Alice@Test.com", username="alice"))
    assert await users.get_by_email("aLICE@tEST.COM") == alice
    assert await users.get_by_email("alice") is None


async def test_a_user_is_found_by_exact_username(users: UserRepository):
    alice = await users.add(User.register(email="alice@test.com", username="alice"))
    assert await users.get_by_username("alice") == alice
    assert await users.get_by_username("Alice") is None
    assert await users.get_by_username("alice ") is None


async def test_active_users_are_listed_by_username(users: UserRepository):
    for username, status in (("carol", "active"), ("bob", "suspended"), ("alice", "active"), ("dan", "inactive")):
        await users.add(User(email=f"{username}@test.com", username=username, status=UserStatus(status)))
    assert [user.username for user in await users.get_active_users()] == ["alice", "carol"]


async def test_the_wiring_picks_by_dialect(session: SQLAlchemySession):
    expected = PostgresUserRepository if session.dialect_name == "postgresql" else UserRepository
    assert type(user_repository(session)) is expected
    async with UnitOfWork(session) as unit:
        assert type(user_repository(unit)) is expected


@pytest.mark.parametrize("migrated_url", ["postgres"], indirect=True)
async def test_search_on_postgresql_has_the_same_answers(session: SQLAlchemySession):
    names = ["Äpfel", "äpfel", "Apfel", "100%", "a_b", "aXb", "back\\slash", "ÉCOLE", "O'Neill", "日本", "x", ""]
    users = UserRepository(session)
    for number, name in enumerate(names):
        await users.add(User.register(email=f"u{number}@test.com", username=f"user{number}", full_name=name))
    special = PostgresUserRepository(session)
    for text in (*names, "ÄPF", "école", "%", "_", "\\", "%_", "USER1", "@TEST", "u1@", "'", "a", "本"):
        portable = await users.get_all(users.search(text), sort="username")
        assert await special.get_all(special.search(text), sort="username") == portable, text


@pytest.mark.parametrize("migrated_url", ["postgres"], indirect=True)
async def test_search_on_postgresql_uses_the_trigram_index(session: SQLAlchemySession):
    users = PostgresUserRepository(session)
    query = sa.select(users.table.c.id).where(users.search("needle"))
    text = str(query.compile(session.engine.sync_engine, compile_kwargs={"literal_binds": True}))
    async with UnitOfWork(session) as unit:
        await unit.execute(sa.text("SET LOCAL enable_seqscan = off"))
        plan = (await unit.execute(sa.text(f"EXPLAIN {text}"))).scalars().all()
    assert sum("ix_users_search" in line for line in plan) == 3, plan


async def test_two_writers_of_one_version_cannot_both_win(users: UserRepository):
    alice = await users.add(User.register(email="alice@test.com", username="alice"))
    outcomes = await asyncio.gather(
        *(users.patch(alice.id, {"bio": str(number)}, version=alice.version) for number in range(10)),
        return_exceptions=True,
    )
    assert sum(isinstance(outcome, User) for outcome in outcomes) == 1
    assert (await users.get(alice.id)).version == 2
