"""Laws of the query vocabulary in memory: three-valued logic, and pages that are the list, cut."""

import asyncio
import dataclasses
from functools import reduce
from operator import and_, or_
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st

from fastapi_building_blocks.domain import Criterion, CursorRequest, InvalidQueryError, PageRequest, Sort, field
from fastapi_building_blocks.domain.query import And, Comparison, Not, Or
from fastapi_building_blocks.infrastructure.database.in_memory_session import InMemorySession
from fastapi_building_blocks.infrastructure.persistence.repositories.base import BaseRepository


@dataclasses.dataclass(frozen=True)
class Item:
    id: int
    number: int | None
    text: str | None


class Items(BaseRepository[Item]):
    pass


numbers = st.one_of(st.none(), st.integers(-2, 2))
texts = st.one_of(st.none(), st.sampled_from(["", "a", "A", "b%", "é"]))
item_lists = st.lists(st.tuples(numbers, texts), max_size=12).map(
    lambda values: [Item(index, *value) for index, value in enumerate(values)]
)
sorts = st.lists(
    st.builds(Sort, st.sampled_from(["number", "text", "id"]), st.booleans(), st.sampled_from([None, "first", "last"])),
    max_size=3,
)
comparisons: st.SearchStrategy[Criterion] = st.one_of(
    numbers.map(lambda value: field("number") == value),
    numbers.map(lambda value: field("number") != value),
    numbers.map(lambda value: field("number") < value),
    numbers.map(lambda value: field("number") >= value),
    st.lists(numbers, max_size=3).map(lambda values: field("number").is_in(values)),
    st.lists(numbers, max_size=3).map(lambda values: field("number").not_in(values)),
    st.tuples(numbers, numbers).map(lambda pair: field("number").between(*pair)),
    st.sampled_from(["a", "", "%"]).map(lambda value: field("text").icontains(value)),
    st.just(field("text").is_null()),
)
criteria = st.recursive(
    comparisons,
    lambda inner: st.one_of(
        inner.map(lambda part: ~part),
        st.tuples(inner, inner).map(lambda parts: parts[0] & parts[1]),
        st.tuples(inner, inner).map(lambda parts: parts[0] | parts[1]),
    ),
    max_leaves=5,
)


def in_memory(items: list[Item], check: Any) -> None:
    async def run() -> None:
        async with InMemorySession() as session:
            repository = Items(session)
            await repository.add_many(items)
            await check(repository)

    asyncio.run(run())


@hypothesis.given(items=item_lists, order=sorts, limit=st.integers(1, 5), criterion=criteria)
def test_r2_pages_of_either_kind_are_the_list_cut_into_pieces(
    items: list[Item], order: list[Sort], limit: int, criterion: Criterion
) -> None:
    async def check(repository: Items) -> None:
        everything = await repository.get_all(criterion, sort=order)
        found: list[Item] = []
        request = CursorRequest(limit=limit)
        while True:
            page = await repository.paginate_by_cursor(request, criterion, sort=order)
            found += page.items
            offset = await repository.paginate(PageRequest(limit, len(found) - len(page.items)), criterion, sort=order)
            assert list(offset.items) == list(page.items)
            assert (offset.total, offset.has_next) == (len(everything), page.next_cursor is not None)
            if page.next_cursor is None:
                break
            request = CursorRequest(limit, page.next_cursor)
        assert found == everything
        while page.prev_cursor is not None:
            found = found[: -len(page.items)]
            page = await repository.paginate_by_cursor(CursorRequest(limit, page.prev_cursor), criterion, sort=order)
            assert found[-len(page.items) :] == list(page.items)
        assert found == list(page.items)

    in_memory(items, check)


def truth(criterion: Any, item: Item) -> bool | None:
    """Evaluate a criterion by the truth tables of SQL, written a second time."""
    name = type(criterion).__name__
    if name == "Not":
        inner = truth(criterion.part, item)
        return None if inner is None else not inner
    if name in ("And", "Or"):
        parts = [truth(part, item) for part in criterion.parts]
        decisive = name == "Or"
        return decisive if decisive in parts else None if None in parts else not decisive
    stored, given = getattr(item, criterion.field), criterion.value
    match criterion.operator.value:
        case "is_null":
            return (stored is None) is given
        case "in" | "not_in":
            if not given:
                return criterion.operator.value == "not_in"
            unknown = stored is None or (None in given and stored not in given)
            return None if unknown else (stored in given) is (criterion.operator.value == "in")
        case "between":
            low = truth(field(criterion.field) >= given[0], item)
            high = truth(field(criterion.field) <= given[1], item)
            return False if False in (low, high) else None if None in (low, high) else True
    if stored is None or given is None:
        return None
    return {
        "eq": lambda: stored == given,
        "ne": lambda: stored != given,
        "lt": lambda: stored < given,
        "le": lambda: stored <= given,
        "ge": lambda: stored >= given,
        "icontains": lambda: given.lower() in stored.lower(),
    }[criterion.operator.value]()


@hypothesis.given(items=item_lists, criterion=criteria)
def test_criteria_follow_sqls_three_valued_logic(items: list[Item], criterion: Criterion) -> None:
    async def check(repository: Items) -> None:
        assert await repository.get_all(criterion) == [item for item in items if truth(criterion, item) is True]
        assert await repository.get_all(~criterion) == [item for item in items if truth(criterion, item) is False]

    in_memory(items, check)


def test_a_chain_of_criteria_is_flat_on_either_side() -> None:
    one, two, three, four = (field("id") == number for number in range(4))
    assert (one & two) & (three & four) == And((one, two, three, four))
    assert one | (two | three) | four == Or((one, two, three, four))
    assert (one | two) & three == And((Or((one, two)), three))
    assert ~~one == one
    assert ~~~one == Not(one)


def test_criteria_are_refused_when_they_are_built_too_deep_or_too_long() -> None:
    one = field("id") == 1
    alternating = reduce(lambda part, level: part & one if level % 2 else part | one, range(64), one)
    for combine in (lambda: alternating & one | one, lambda: ~alternating):
        with pytest.raises(InvalidQueryError, match="deep"):
            combine()
    for join in (and_, or_):
        with pytest.raises(InvalidQueryError, match="comparisons"):
            reduce(join, [one] * 5000)
    with pytest.raises(InvalidQueryError, match="values"):
        field("id").is_in(range(6000)) | field("id").is_in(range(6000))


@pytest.mark.parametrize("kind", [And, Or])
def test_a_combination_of_nothing_is_refused_where_it_is_made(kind: type[And | Or]) -> None:
    with pytest.raises(InvalidQueryError, match="at least one"):
        kind(tuple(field("id") == number for number in []))


def test_an_operator_by_its_spelling_is_the_operator() -> None:
    assert Comparison("n", "eq", 1) == (field("n") == 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="like"):
        Comparison("n", "like", 1)  # type: ignore[arg-type]
