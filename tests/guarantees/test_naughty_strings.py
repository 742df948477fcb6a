"""E3 at the repository: whatever is given, the answer is the value itself or an error that names the field."""

import asyncio
import dataclasses
import itertools
import math
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pytest
import sqlalchemy as sa

from fastapi_building_blocks.domain import (
    CursorRequest,
    InvalidInputError,
    InvalidQueryError,
    PageRequest,
    Sort,
    UnsupportedOperationError,
    field,
)
from fastapi_building_blocks.infrastructure import (
    BaseRepository,
    BinaryString,
    ExactDecimal,
    InMemorySession,
    SQLAlchemyRepository,
    SQLAlchemySession,
    UtcDateTime,
)

# After the families of the Big List of Naughty Strings.
TEXTS = [
    "",
    " ",
    "a ",
    "\0",
    "a\0b",
    "\ud800",
    "\udfff\ud800",
    "\ufeff",
    "\uffff",
    "\u200b",
    "\u202etest\u202c",
    "\x01\x1b[31m\x7f\x85",
    "\r\n\t",
    "NULL",
    "NaN",
    "9223372036854775808",
    "½٣",
    "Ω≈ç田中",
    "İıſKß",
    "e\u0301é",
    "👩‍👩‍👧‍👦🏳️‍🌈",
    "' OR '1'='1",
    "'; DROP TABLE e3_things; --",
    '"; SELECT pg_sleep(9) --',
    "/*!50000 SLEEP(9) */",
    "\\'; --",
    "\\",
    "\\\\",
    "%",
    "_",
    "%s %(x)s %%",
    ":name",
    "?",
    "$1",
    "{0.__class__}",
    "*[a-z]?",
    "`id`",
    '"id"',
    "id",
    "__class__",
    "x" * 61,
    "*" * 10_001,
]
OTHERS: list[Any] = [
    None,
    True,
    0,
    -1,
    2**31,
    2**63 - 1,
    2**63,
    -(2**63) - 1,
    10**400,
    0.1,
    math.nan,
    math.inf,
    -0.0,
    Decimal("NaN"),
    Decimal("sNaN"),
    Decimal("Infinity"),
    Decimal("1E+9999"),
    Decimal("0.001"),
    b"",
    b"\xff\0'\\",
    datetime(2026, 1, 1),  # noqa: DTZ001 - naive on purpose
    datetime(2026, 1, 1, tzinfo=UTC),
    datetime.max.replace(tzinfo=UTC),
    [],
    ["a"],
    (),
    {},
    {"a": math.nan},
    {"\0": 1},
    {1: 2},
    object(),
    int,
    sa.text("1=1"),
]
VALUES = [*TEXTS, *OTHERS]
SQL = re.compile(r"SELECT .* FROM|INSERT INTO|UPDATE \w+ SET|e3_things|\[SQL|sqlalche\.me|asyncpg|pymysql|sqlite3")

metadata = sa.MetaData()
things = sa.Table(
    "e3_things",
    metadata,
    sa.Column("id", sa.Integer(), primary_key=True, autoincrement=False),
    sa.Column("name", BinaryString(60)),
    sa.Column("word", sa.String(60)),
    sa.Column("large", sa.BigInteger()),
    sa.Column("amount", ExactDecimal(12, 2)),
    sa.Column("ratio", sa.Float()),
    sa.Column("moment", UtcDateTime()),
    sa.Column("blob", sa.LargeBinary()),
    sa.Column("flag", sa.Boolean()),
    sa.Column("document", sa.JSON()),
)
FIELDS = [column.key for column in things.columns]


@dataclasses.dataclass
class Thing:
    id: Any
    name: Any = None
    word: Any = None
    large: Any = None
    amount: Any = None
    ratio: Any = None
    moment: Any = None
    blob: Any = None
    flag: Any = None
    document: Any = None


class Things(SQLAlchemyRepository[Thing]):
    table = things


class InMemoryThings(BaseRepository[Thing]):
    table = things


STORES = ["sqlite_url", "postgres_url", "postgres_url portable", "mysql_url", "mysql_url portable", "memory"]


@pytest.fixture(params=STORES)
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


async def refused(call: Awaitable[Any], named: str | None = None, kind: type[Exception] = InvalidInputError) -> bool:
    """Say whether a call was refused, in words that hold nothing of SQL."""
    [error] = await asyncio.gather(call, return_exceptions=True)
    if not isinstance(error, BaseException):
        return False
    assert isinstance(error, kind), repr(error)
    assert isinstance(error, InvalidInputError)
    assert not SQL.search(f"{error} {error.detail}"), error
    assert named is None or error.fields == (named,), (error, named)
    return True


async def test_e3_a_value_is_kept_as_it_is_or_refused_by_the_name_of_its_field(repository: Any) -> None:
    numbers = itertools.count(1)
    kept = 0
    for name, value in itertools.product(FIELDS[1:], VALUES):
        if isinstance(value, sa.ClauseElement):
            continue
        entity = Thing(next(numbers), **{name: value})
        if await refused(repository.add(entity), name):
            for write in (repository.add_many, repository.upsert_many):
                assert await refused(write([entity]), name)
            assert await refused(repository.upsert(entity), name)
            continue
        stored = await repository.get(entity.id)
        kept += 1
        assert getattr(stored, name) == (list(value) if isinstance(value, tuple) else value)
        assert isinstance(value, int | float | Decimal | tuple) or type(getattr(stored, name)) is type(value)
        assert await repository.patch(entity.id, {name: value}) == stored
    assert await repository.count() == kept > 140


async def test_e3_a_filter_finds_what_it_names_or_is_refused_by_that_name(repository: Any) -> None:
    found = 0
    texts = [text for text in TEXTS if len(text) <= 60 and "\0" not in text and not re.search("[\ud800-\udfff]", text)]
    await repository.add_many(Thing(number, name=text, word=text) for number, text in enumerate(texts))
    for name, value in itertools.product(FIELDS, VALUES):
        asked = field(name)
        for criterion in (asked == value, asked != value, asked < value, asked >= value, asked.between(value, value)):
            await refused(repository.count(criterion), name, InvalidQueryError)
        await refused(repository.exists(asked.is_in([value, value])), name, InvalidQueryError)
        await refused(repository.get_all(asked.not_in([value]), limit=1), name, InvalidQueryError)
        if isinstance(value, str):
            for criterion in (asked.contains(value), asked.icontains(value), asked.starts_with(value)):
                await refused(repository.paginate(PageRequest(1), criterion), name, InvalidQueryError)
    for text in texts:
        assert [one.name for one in await repository.get_all(field("name") == text)] == [text]
        for criterion, expected in (
            (field("name").contains(text), [one for one in texts if text in one]),
            (field("word").contains(text), [one for one in texts if text in one]),
            (field("name").starts_with(text), [one for one in texts if one.startswith(text)]),
            (field("word").starts_with(text), [one for one in texts if one.startswith(text)]),
        ):
            assert [one.name for one in await repository.get_all(criterion, sort="id")] == expected, text
            found += len(expected)
    assert found > 4 * len(texts)
    assert await repository.count() == len(texts)


async def test_e3_a_field_that_does_not_exist_is_refused_by_its_name_wherever_it_is_given(repository: Any) -> None:
    await repository.add(Thing(1))
    for name in TEXTS:
        if name in FIELDS:
            continue
        asks: list[Callable[[], Awaitable[Any]]] = [
            lambda name=name: repository.get_all(field(name) == 1),
            lambda name=name: repository.get_all(sort=Sort(name)),
            lambda name=name: repository.get_all(sort=["id", Sort(name, descending=True)]),
            lambda name=name: repository.paginate_by_cursor(CursorRequest(), sort=Sort(name)),
            lambda name=name: repository.patch(1, {name: 1}),
            lambda name=name: repository.update_where({name: 1}, everything=True),
        ]
        for ask in asks:
            with pytest.raises(InvalidInputError) as caught:
                await ask()
            assert caught.value.fields == (name,)
    assert await repository.get_all() == [Thing(1)]


async def test_e3_a_key_of_any_kind_is_unknown_or_refused(repository: Any) -> None:
    for value in VALUES:
        if isinstance(value, tuple | sa.ClauseElement):
            continue
        for call in (
            lambda value=value: repository.get_by_id(value),
            lambda value=value: repository.get_many([value]),
            lambda value=value: repository.delete(value),
        ):
            assert await refused(call(), "id") or (type(value) is int and -(2**31) <= value < 2**31) or value is None


async def test_e3_a_cursor_that_somebody_made_up_is_refused(repository: Any) -> None:
    await repository.add_many(Thing(number, name=str(number)) for number in range(5))
    good = (await repository.paginate_by_cursor(CursorRequest(2), sort="name")).next_cursor
    assert good is not None
    broken = [text for text in TEXTS if text] + [good[:-1], good[1:], good + "A", good.swapcase(), good * 2]
    for cursor in broken:
        with pytest.raises(InvalidQueryError) as caught:
            await repository.paginate_by_cursor(CursorRequest(2, cursor), sort="name")
        assert caught.value.fields == ("cursor",)
    assert len((await repository.paginate_by_cursor(CursorRequest(9, good), sort="name")).items) == 3


async def test_e3_sql_among_values_is_refused_or_taken_as_text_and_never_run(repository: Any) -> None:
    await repository.add(Thing(1, name="kept"))
    for value in (sa.text("1=1"), sa.func.now(), things.c.name):
        assert await refused(repository.add(Thing(2, name=value)), "name")
        assert await refused(repository.patch(1, {"name": value}), "name")
        assert await refused(repository.count(field("name") == value), "name", InvalidQueryError)
    if isinstance(repository, InMemoryThings):
        with pytest.raises(UnsupportedOperationError):
            await repository.count(things.c.name == "kept")
    assert await repository.get_all() == [Thing(1, name="kept")]
