"""R2, R6 and W6: a column of any type can be paged by cursor and filtered, with its extremes, ties and NULLs."""

import dataclasses
import enum
from collections.abc import AsyncIterator
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest
import sqlalchemy as sa

from fastapi_building_blocks.domain import CursorRequest, Sort, field
from fastapi_building_blocks.infrastructure import (
    BaseRepository,
    BinaryString,
    ExactDecimal,
    InMemorySession,
    SQLAlchemyRepository,
    SQLAlchemySession,
    UtcDateTime,
)


class Size(enum.Enum):
    SMALL = 1
    LARGE = 2


MOMENT = datetime(2026, 3, 29, 1, 30, 0, 123456, UTC)
COLUMNS: dict[str, tuple[Any, list[Any]]] = {
    "uuid": (sa.Uuid(), [UUID(int=0), UUID(int=2**127), UUID(int=2**128 - 1), UUID(int=0xFF << 64)]),
    "moment": (
        UtcDateTime(),
        [
            MOMENT,
            MOMENT + timedelta(microseconds=1),
            MOMENT.astimezone(timezone(timedelta(hours=-11, minutes=-30))) - timedelta(microseconds=1),
            datetime(1, 1, 1, tzinfo=UTC),
            datetime.max.replace(tzinfo=UTC),
        ],
    ),
    "wall_clock": (sa.DateTime(), [MOMENT.replace(tzinfo=None), datetime(1970, 1, 1)]),  # noqa: DTZ001
    "zoned": (sa.DateTime(timezone=True), [MOMENT, MOMENT - timedelta(microseconds=1)]),
    "amount": (ExactDecimal(38, 10), [Decimal(text) for text in ("0", "-1E-10", "1E-10", "-9E27", "9E27", "10", "9")]),
    "price": (ExactDecimal(12, 2), [Decimal(text) for text in ("0.10", "-0.01", "9999999999.99", "2", "10")]),
    "plain": (sa.Numeric(10, 3), [Decimal(text) for text in ("0.001", "-0.1", "1234567.891")]),
    "flag": (sa.Boolean(), [True, False]),
    "code": (BinaryString(40), ["", " ", "a", "a ", "A", "Z", "ä", "é", "e\u0301", "👩‍👩‍👧", "\uffff", "%_\\'\""]),
    "large": (sa.BigInteger(), [0, 2**63 - 1, -(2**63), 2**53 + 1]),
    "small": (sa.SmallInteger(), [0, 2**15 - 1, -(2**15)]),
    "size": (sa.Enum(Size), list(Size)),
    "size_as_text": (sa.Enum(Size, native_enum=False), list(Size)),
    "day": (sa.Date(), [date(1, 1, 1), date(9999, 12, 31), date(2026, 2, 28)]),
    "hour": (sa.Time(), [time(0), time(23, 59, 59, 999999), time(12, 0, 0, 1)]),
    "ratio": (sa.Float(), [0.1 + 0.2, 0.3, -1.5, 1e300, 5e-324]),
    "blob": (sa.LargeBinary(300), [b"", b"\0", bytes(range(256)), b"\\'%s"]),
    "span": (sa.Interval(), [timedelta(0), timedelta(days=-3, microseconds=1), timedelta(days=400)]),
}
metadata = sa.MetaData()
things = sa.Table(
    "keyset_things",
    metadata,
    sa.Column("id", sa.Integer(), primary_key=True, autoincrement=False),
    *[sa.Column(name, kind) for name, (kind, _) in COLUMNS.items()],
)
Thing = dataclasses.make_dataclass("Thing", [("id", Any), *[(name, Any, None) for name in COLUMNS]])


class Things(SQLAlchemyRepository[Thing]):  # type: ignore[valid-type]
    table = things


class InMemoryThings(BaseRepository[Thing]):  # type: ignore[valid-type]
    table = things


def entities(name: str) -> list[Any]:
    """Every value twice, and two NULLs, in an order that is none."""
    values = [*COLUMNS[name][1], None]
    return [Thing(place * 7 % 101, **{name: values[place % len(values)]}) for place in range(1, 2 * len(values) + 1)]


@pytest.fixture(params=["sqlite_url", "postgres_url", "postgres_url portable", "mysql_url", "memory"])
async def repository(request: pytest.FixtureRequest) -> AsyncIterator[Any]:
    if request.param == "memory":
        async with InMemorySession() as in_memory:
            yield InMemoryThings(in_memory)
        return
    fixture, _, portable = request.param.partition(" ")
    async with SQLAlchemySession(request.getfixturevalue(fixture), portable=bool(portable)) as session:
        await session.create_tables(metadata)
        await session.execute(things.delete())
        yield Things(session)


def by_value(name: str, stored: list[Any], sort: Sort) -> list[int]:
    """Return the keys in the order that the contract states: by value, NULL as the largest, then by key alike."""

    def rank(entity: Any) -> Any:
        value = getattr(entity, name)
        return value.value if isinstance(value, enum.Enum) else value

    some = sorted((one for one in stored if rank(one) is not None), key=lambda one: (rank(one), one.id))
    nulls = sorted((one for one in stored if rank(one) is None), key=lambda one: one.id)
    if sort.descending:
        some.reverse()
        nulls.reverse()
    return [one.id for one in ([*some, *nulls] if sort.nulls_last else [*nulls, *some])]


@pytest.mark.parametrize("name", COLUMNS)
async def test_w6_a_page_by_any_column_goes_there_and_back_in_the_same_order_on_every_store(
    repository: Any, name: str
) -> None:
    given = entities(name)
    await repository.add_many(given)
    stored = await repository.get_all()
    assert sorted(one.id for one in stored) == sorted(one.id for one in given)
    for sort in (Sort(name), Sort(name, descending=True), Sort(name, nulls="first"), Sort(name, True, "last")):
        order = by_value(name, stored, sort)
        assert [one.id for one in await repository.get_all(sort=sort)] == order
        forth: list[int] = []
        request = CursorRequest(3)
        while True:
            page = await repository.paginate_by_cursor(request, sort=sort)
            forth += [one.id for one in page.items]
            if page.next_cursor is None:
                break
            request = CursorRequest(3, page.next_cursor)
        assert forth == order
        back = [one.id for one in page.items]
        while page.prev_cursor is not None:
            page = await repository.paginate_by_cursor(CursorRequest(3, page.prev_cursor), sort=sort)
            back = [*[one.id for one in page.items], *back]
        assert back == order


@pytest.mark.parametrize("name", COLUMNS)
async def test_w6_every_operator_compares_a_value_of_any_type_as_python_does(repository: Any, name: str) -> None:
    await repository.add_many(entities(name))
    stored = [one for one in await repository.get_all() if getattr(one, name) is not None]
    asked = field(name)

    def rank(value: Any) -> Any:
        return value.value if isinstance(value, enum.Enum) else value

    for value in COLUMNS[name][1]:
        pivot = rank(value)
        expected = {
            asked == value: [one.id for one in stored if rank(getattr(one, name)) == pivot],
            asked != value: [one.id for one in stored if rank(getattr(one, name)) != pivot],
            asked < value: [one.id for one in stored if rank(getattr(one, name)) < pivot],
            asked >= value: [one.id for one in stored if rank(getattr(one, name)) >= pivot],
            asked.is_in([value, None]): [one.id for one in stored if rank(getattr(one, name)) == pivot],
            asked.between(value, value): [one.id for one in stored if rank(getattr(one, name)) == pivot],
        }
        for criterion, ids in expected.items():
            assert [one.id for one in await repository.get_all(criterion, sort="id")] == sorted(ids), criterion
    assert await repository.count(asked.is_null()) == 2
