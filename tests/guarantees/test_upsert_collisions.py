"""W1: an upsert that meets another unique key than its own is an error that names it, on every store."""

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from typing import Any

import pytest
import sqlalchemy as sa

from fastapi_building_blocks.domain import DuplicateKeyError, InvalidInputError
from fastapi_building_blocks.infrastructure import (
    BaseRepository,
    BinaryString,
    InMemorySession,
    SQLAlchemyRepository,
    SQLAlchemySession,
    version_column,
)

metadata = sa.MetaData()
members = sa.Table(
    "w1_members",
    metadata,
    sa.Column("id", sa.Integer(), primary_key=True, autoincrement=False),
    sa.Column("email", BinaryString(60), nullable=False, unique=True),
    sa.Column("login", BinaryString(60)),
    sa.Column("site", sa.Integer(), nullable=False),
    sa.Column("badge", sa.Integer(), nullable=False),
    sa.Column("name", BinaryString(60)),
    version_column(),
    sa.UniqueConstraint("site", "badge", name="uq_w1_members_badge"),
    sa.Index("ix_w1_members_login", "login", unique=True),
)


@dataclasses.dataclass
class Member:
    id: int
    email: str
    login: str | None
    badge: int
    name: str | None = None
    site: int = 1
    version: int | None = None


class Members(SQLAlchemyRepository[Member]):
    table = members
    version_column = "version"


class InMemoryMembers(BaseRepository[Member]):
    table = members
    version_column = "version"


STORES = ["sqlite_url", "postgres_url", "mysql_url", "mysql_url portable", "mysql_url without RETURNING", "memory"]


@pytest.fixture(params=STORES)
async def store(request: pytest.FixtureRequest) -> AsyncIterator[tuple[Any, Any]]:
    """A session with the repository for it; MySQL has no RETURNING, so MariaDB is also told that it has none."""
    if request.param == "memory":
        async with InMemorySession() as in_memory:
            yield in_memory, InMemoryMembers
        return
    fixture, _, how = request.param.partition(" ")
    async with SQLAlchemySession(request.getfixturevalue(fixture), portable=how == "portable") as session:
        session.dialect.insert_returning &= how != "without RETURNING"
        await session.create_tables(metadata)
        await session.execute(members.delete())
        yield session, Members


async def test_w1_80_upserts_of_one_value_under_80_keys_all_succeed_and_leave_one_row(store: tuple[Any, Any]) -> None:
    session, repository = store
    answers = await asyncio.gather(
        *[
            repository(session).upsert(Member(number, "ada@example.org", None, number, str(number)), on=["email"])
            for number in range(80)
        ]
    )
    [stored] = await repository(session).get_all()
    assert {answer.id for answer in answers} == {stored.id}, "the row that was found keeps its key"
    assert sorted(answer.version for answer in answers) == list(range(1, 81)), "each answers what it wrote"
    assert stored in answers


ADA = Member(1, "ada@example.org", "ada", 1, "Ada", version=1)
BOB = Member(2, "bob@example.org", "bob", 2, "Bob", version=1)
COLLISIONS: dict[str, tuple[Member, list[str] | None, tuple[str, ...]]] = {
    "a new key with a taken value": (Member(3, "ada@example.org", "new", 3), None, ("email",)),
    "a new key with a value taken by an index": (Member(3, "new@example.org", "bob", 3), None, ("login",)),
    "a new key with a taken pair": (Member(3, "new@example.org", "new", 1), None, ("site", "badge")),
    "a known key with another row's value": (Member(1, "bob@example.org", "ada", 1), None, ("email",)),
    "a known value under another row's key": (Member(2, "ada@example.org", "new", 3), ["email"], ("id",)),
    "a new value under a known key": (Member(2, "new@example.org", "new", 3), ["email"], ("id",)),
    "a known value with another row's value": (Member(3, "ada@example.org", "bob", 1), ["email"], ("login",)),
    "a known pair with another row's value": (Member(3, "bob@example.org", "ada", 1), ["site", "badge"], ("email",)),
}


@pytest.mark.parametrize("within", [False, True], ids=["session", "unit"])
@pytest.mark.parametrize("many", [False, True], ids=["upsert", "upsert_many"])
async def test_w1_an_upsert_that_collides_on_another_key_overwrites_nothing_and_names_it(
    store: tuple[Any, Any], many: bool, within: bool
) -> None:
    session, repository = store
    await repository(session).add_many([ADA, BOB])

    for case, (colliding, on, fields) in COLLISIONS.items():

        async def collide(inside: Any, colliding: Member = colliding, on: Any = on) -> None:
            if many:
                await inside.upsert_many([Member(7, "g@example.org", "g", 7, "G"), colliding], on=on)
            else:
                await inside.upsert(colliding, on=on)

        with pytest.raises(DuplicateKeyError) as caught:
            if within:
                async with session.transaction() as unit:
                    await collide(repository(unit))
            else:
                await collide(repository(session))
        assert caught.value.fields == fields, case
        assert await repository(session).get_all() == [ADA, BOB], case


async def test_w1_a_get_or_add_that_collides_on_another_key_names_it_and_takes_what_is_there_first(
    store: tuple[Any, Any],
) -> None:
    session, repository = store
    await repository(session).add_many([ADA, BOB])
    with pytest.raises(DuplicateKeyError) as caught:
        await repository(session).get_or_add(Member(3, "new@example.org", "bob", 3), on=["email"])
    assert caught.value.fields == ("login",)
    async with session.transaction() as unit:
        inside = repository(unit)
        assert await inside.get_or_add(Member(3, "ada@example.org", "bob", 2), on=["email"]) == (ADA, False)
        with pytest.raises(DuplicateKeyError):
            async with unit.savepoint():
                await inside.get_or_add(Member(2, "new@example.org", "new", 3), on=["email"])
    assert await repository(session).get_all() == [ADA, BOB]


@pytest.mark.parametrize("write", ["add_many", "upsert_many", "update_many"])
async def test_w5_a_unit_survives_a_row_that_was_refused_before_it_was_sent(store: tuple[Any, Any], write: str) -> None:
    session, repository = store
    await repository(session).add_many([ADA, BOB])
    news = Member(3, "new@example.org", "new", 3)
    changed = dataclasses.replace(ADA, name="changed")
    bad = dataclasses.replace(BOB, name="x" * 61)
    async with session.transaction() as unit:
        inside = repository(unit)
        await inside.add(news)
        with pytest.raises(InvalidInputError) as caught:
            await getattr(inside, write)(iter([changed, bad]))
        assert caught.value.fields == ("name",)
        await inside.patch(3, {"name": "still open"})
    kept = await repository(session).get_all()
    assert kept[:2] == [ADA, BOB]
    assert kept[2].name == "still open"
