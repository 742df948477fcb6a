"""What criteria promise on every database and in memory: one meaning, whatever they are combined of."""

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastapi_building_blocks.domain import CursorRequest, InvalidQueryError, Sort, field
from fastapi_building_blocks.infrastructure import (
    BaseRepository,
    BinaryString,
    InMemorySession,
    SQLAlchemyRepository,
    SQLAlchemySession,
)

metadata = sa.MetaData()
things = sa.Table(
    "things",
    metadata,
    sa.Column("id", sa.Integer(), primary_key=True, autoincrement=False),
    sa.Column("name", BinaryString(20)),
    sa.Column("size", sa.Integer()),
    sa.Column("kind", sa.Integer(), nullable=False),
)


@dataclasses.dataclass
class Thing:
    id: int
    name: str | None
    size: int | None
    kind: int


class Things(SQLAlchemyRepository[Thing]):
    table = things


class ThingsInMemory(BaseRepository[Thing]):
    table = things


NAMES = [None, "", "a", "A", "ab", "a%", "a_b", "a\\b", "[a]", "a*", "ä", "Ä", "z🦀", "'", "%s", " "]
STOCK = [
    Thing(number, NAMES[number % len(NAMES)], None if number % 7 == 0 else number % 5 - 2, number % 3)
    for number in range(64)
]
sizes = st.integers(-3, 3)
texts = st.sampled_from([name for name in NAMES if name is not None])
comparisons = st.one_of(
    *[
        st.tuples(st.just(name), st.sampled_from(["__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__"]), values)
        for name, values in (("size", sizes), ("kind", sizes), ("name", texts))
    ],
    st.tuples(st.just("size"), st.sampled_from(["is_in", "not_in"]), st.lists(sizes, max_size=4)),
    st.tuples(st.just("name"), st.sampled_from(["is_in", "not_in"]), st.lists(texts, max_size=3)),
    st.tuples(st.just("name"), st.sampled_from(["contains", "starts_with", "icontains"]), texts),
    st.tuples(st.sampled_from(["size", "name"]), st.sampled_from(["is_null", "is_not_null"]), st.none()),
    st.tuples(st.just("size"), st.just("between"), st.tuples(sizes, sizes)),
)


def criterion(part: tuple[str, str, Any]) -> Any:
    name, operator, value = part
    ask = getattr(field(name), operator)
    if operator in ("is_null", "is_not_null"):
        return ask()
    return ask(*value) if operator == "between" else ask(value)


criteria = st.recursive(
    comparisons.map(criterion),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map(lambda pair: pair[0] & pair[1]),
        st.tuples(inner, inner).map(lambda pair: pair[0] | pair[1]),
        inner.map(lambda one: ~one),
    ),
    max_leaves=5,
)
sorts = st.lists(
    st.builds(
        Sort,
        st.sampled_from(["name", "size", "kind", "id"]),
        st.booleans(),
        st.sampled_from([None, "first", "last"]),
    ),
    max_size=3,
)


@pytest.fixture(params=["sqlite", "postgres", "mysql", "postgres portable"])
async def both(request: pytest.FixtureRequest, sqlite_url: str) -> AsyncIterator[tuple[Things, ThingsInMemory]]:
    name, _, path = request.param.partition(" ")
    url = sqlite_url if name == "sqlite" else request.getfixturevalue(f"{name}_url")
    async with SQLAlchemySession(url, portable=bool(path)) as session, InMemorySession() as memory:
        await session.create_tables(metadata)
        await Things(session).add_many(STOCK)
        await ThingsInMemory(memory).add_many(STOCK)
        yield Things(session), ThingsInMemory(memory)
        async with session.engine.begin() as connection:
            await connection.run_sync(metadata.drop_all)


async def test_any_criterion_and_any_order_answer_as_in_memory(both: tuple[Things, ThingsInMemory]) -> None:
    loop = asyncio.get_running_loop()
    stored, memory = both

    async def compare(asked: Any, order: list[Sort]) -> None:
        want = [thing.id for thing in await memory.get_all(asked, sort=order)]
        assert [thing.id for thing in await stored.get_all(asked, sort=order)] == want
        assert await stored.count(asked) == len(want)
        assert await stored.exists(asked) == bool(want)

    @settings(max_examples=120, suppress_health_check=list(HealthCheck))
    @given(asked=criteria, order=sorts)
    def law(asked: Any, order: list[Sort]) -> None:
        asyncio.run_coroutine_threadsafe(compare(asked, order), loop).result(30)

    await asyncio.to_thread(law)


async def test_r2_keyset_pages_in_any_order_skip_and_repeat_nothing(both: tuple[Things, ThingsInMemory]) -> None:
    loop = asyncio.get_running_loop()
    stored, memory = both

    async def walk(asked: Any, order: list[Sort], limit: int) -> None:
        want = [thing.id for thing in await memory.get_all(asked, sort=order)]
        forwards: list[int] = []
        page = await stored.paginate_by_cursor(CursorRequest(limit), asked, sort=order)
        assert page.prev_cursor is None
        while True:
            forwards += [thing.id for thing in page.items]
            if page.next_cursor is None:
                break
            page = await stored.paginate_by_cursor(CursorRequest(limit, page.next_cursor), asked, sort=order)
        assert forwards == want
        backwards = [thing.id for thing in page.items]
        while page.prev_cursor is not None:
            page = await stored.paginate_by_cursor(CursorRequest(limit, page.prev_cursor), asked, sort=order)
            backwards = [thing.id for thing in page.items] + backwards
        assert backwards == want

    @settings(max_examples=40, suppress_health_check=list(HealthCheck))
    @given(asked=criteria, order=sorts, limit=st.integers(3, 40))
    def law(asked: Any, order: list[Sort], limit: int) -> None:
        asyncio.run_coroutine_threadsafe(walk(asked, order, limit), loop).result(60)

    await asyncio.to_thread(law)


@pytest.mark.parametrize(
    "asked",
    [
        field("nothing") == 1,
        field("size") == "many",
        field("size") > 2**63,
        field("name") == "\0",
        field("name") == "\ud800",
        field("size").contains("1"),
        (field("size") == 1) & ~((field("size") == 2) | (field("hidden") == 3)),
    ],
)
async def test_r5_a_bad_criterion_names_its_field(both: tuple[Things, ThingsInMemory], asked: Any) -> None:
    for repository in both:
        with pytest.raises(InvalidQueryError) as caught:
            await repository.get_all(asked)
        assert caught.value.fields
