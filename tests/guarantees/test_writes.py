"""W1, W5 and W6 of the guarantees: colliding, large and round-trip writes on every database and path."""

import asyncio
import dataclasses
import enum
import uuid
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastapi_building_blocks.domain import (
    BuildingBlocksError,
    ConstraintError,
    DuplicateKeyError,
    InvalidInputError,
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
from tests.guarantees.ledger import Account, Accounts, account, metadata, opened

PATHS = ["driver", "portable", "without returning"]


@pytest.fixture(params=PATHS)
async def session(request: pytest.FixtureRequest, database_url: str) -> AsyncIterator[SQLAlchemySession]:
    if request.param == "without returning" and "mysql" not in database_url:
        pytest.skip("MySQL alone is without RETURNING")
    async with opened(database_url, portable=request.param == "portable", pool_timeout=60) as session:
        if request.param == "without returning":
            session.dialect.insert_returning = False
        yield session


# Upserts that meet another row


async def test_an_upsert_that_collides_on_another_key_overwrites_nothing(session: SQLAlchemySession) -> None:
    repository = Accounts(session)
    stored = [account(1, 10), account(2, 20)]
    await repository.add_many(stored)
    collisions: list[tuple[Account, Any]] = [
        (Account(3, "A1", 99), None),  # a new key, another row's number
        (Account(2, "A1", 99), None),  # both keys exist, on different rows
        (Account(2, "A1", 99), ["number"]),
        (Account(1, "A3", 99), ["number"]),  # a new number, another row's key
    ]
    for entity, on in collisions:
        with pytest.raises(DuplicateKeyError):
            await repository.upsert(entity, on=on)
        with pytest.raises(DuplicateKeyError):
            await repository.upsert_many([account(7), entity], on=on)
        with pytest.raises(DuplicateKeyError):
            async with session.transaction() as unit:
                await Accounts(unit).upsert(entity, on=on)
        assert await repository.get_all(sort="id") == stored
    assert await repository.upsert(Account(9, "A2", 99), on=["number"]) == Account(2, "A2", 99)
    assert await repository.upsert(Account(2, "A2", 98), on=["number"]) == Account(2, "A2", 98)
    assert await repository.get_all(sort="id") == [account(1, 10), Account(2, "A2", 98)]


# Bulk writes

wide = sa.Table(
    "wide",
    metadata,
    sa.Column("id", sa.Integer(), primary_key=True, autoincrement=False),
    *[sa.Column(f"n{place}", sa.Integer(), nullable=False) for place in range(1, 9)],
    sa.Column("code", sa.String(20), nullable=False, unique=True),
)


@dataclasses.dataclass
class Wide:
    id: int
    n1: int
    n2: int
    n3: int
    n4: int
    n5: int
    n6: int
    n7: int
    n8: int
    code: Any


class Wides(SQLAlchemyRepository[Wide]):
    table = wide


def wides(count: int, last: Any = None) -> Iterator[Wide]:
    for number in range(count):
        code = last if last is not None and number == count - 1 else f"c{number}"
        yield Wide(number, *[number] * 8, code=code)


@pytest.mark.parametrize("path", ["driver", "portable"])
async def test_w5_40000_rows_of_10_columns_are_written_all_or_none(database_url: str, path: str) -> None:
    count, some = (40_000, 6_000) if path == "driver" else (5_200, 5_100)
    async with opened(database_url, portable=path == "portable", statement_timeout=60) as session:
        repository = Wides(session)
        bad_here, bad_there = wides(count, last=17), wides(count, last="c0")
        with pytest.raises(InvalidInputError) as refused:
            await repository.add_many(bad_here)
        assert refused.value.fields == ("code",)
        with pytest.raises(DuplicateKeyError):
            await repository.add_many(bad_there)
        assert await repository.count() == 0
        assert session.pool_status().checked_out == 0
        assert await repository.add_many(wides(count)) == count
        assert await repository.count() == count
        assert (await repository.get(count - 1)).n8 == count - 1
        changed = (dataclasses.replace(one, n1=-1) for one in wides(some))
        assert await repository.upsert_many(changed) == some
        assert await repository.count(wide.c.n1 == -1) == some
        with pytest.raises(DuplicateKeyError):
            await repository.upsert_many([*wides(some), Wide(-5, *[0] * 8, code="c3")])
        assert await repository.update_many(dataclasses.replace(one, n2=-2) for one in wides(some)) == some
        with pytest.raises(BuildingBlocksError):
            await repository.update_many([*wides(some), Wide(count + 1, *[0] * 8, code="x")])
        assert await repository.count(wide.c.n2 == -2) == some


async def test_w5_a_generator_that_fails_leaves_nothing(database_url: str) -> None:
    def broken() -> Iterator[Wide]:
        yield from wides(7000)
        raise ZeroDivisionError

    async with opened(database_url) as session:
        for write in (Wides(session).add_many, Wides(session).upsert_many):
            with pytest.raises(ZeroDivisionError):
                await write(broken())
        async with session.transaction() as unit:
            with pytest.raises(ZeroDivisionError):
                await Wides(unit).add_many(broken())
            await Accounts(unit).add(account(1))
        assert await Wides(session).count() == 0
        assert await Accounts(session).count() == 1
        assert await Wides(session).add_many([]) == 0


# What goes in comes out the same


class Colour(enum.Enum):
    RED = "red"
    GREEN = "green"


values = sa.Table(
    "everything",
    metadata,
    sa.Column("id", sa.Uuid(), primary_key=True),
    sa.Column("moment", UtcDateTime()),
    sa.Column("wall_clock", sa.DateTime()),
    sa.Column("amount", ExactDecimal(38, 10)),
    sa.Column("price", ExactDecimal(12, 2)),
    sa.Column("flag", sa.Boolean()),
    sa.Column("document", sa.JSON()),
    sa.Column("text", sa.Text()),
    sa.Column("name", BinaryString(100)),
    sa.Column("big", sa.BigInteger()),
    sa.Column("blob", sa.LargeBinary()),
    sa.Column("colour", sa.Enum(Colour)),
    sa.Column("span", sa.Interval()),
    sa.Column("day", sa.Date()),
    sa.Column("hour", sa.Time()),
    sa.Column("ratio", sa.Float()),
)


@dataclasses.dataclass
class Everything:
    id: uuid.UUID
    moment: datetime | None = None
    wall_clock: datetime | None = None
    amount: Decimal | None = None
    price: Decimal | None = None
    flag: bool | None = None
    document: Any = None
    text: str | None = None
    name: str | None = None
    big: int | None = None
    blob: bytes | None = None
    colour: Colour | None = None
    span: timedelta | None = None
    day: date | None = None
    hour: time | None = None
    ratio: float | None = None


class Everythings(SQLAlchemyRepository[Everything]):
    table = values


class EverythingsInMemory(BaseRepository[Everything]):
    table = values


ROWS = {field.name: field for field in dataclasses.fields(Everything)}
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=100)
offsets = st.integers(-14 * 60, 14 * 60).map(lambda minutes: timezone(timedelta(minutes=minutes)))
leaves = st.none() | st.booleans() | st.integers(-(2**53) + 1, 2**53 - 1) | texts
STRATEGIES: dict[str, st.SearchStrategy[Any]] = {
    "moment": st.datetimes(datetime(1900, 1, 2), datetime(9000, 1, 1), timezones=offsets),  # noqa: DTZ001
    "wall_clock": st.datetimes(datetime(1900, 1, 2), datetime(9000, 1, 1)),  # noqa: DTZ001
    "amount": st.decimals(Decimal(-(10**27)), Decimal(10**27), places=10),
    "price": st.decimals(Decimal(-(10**9)), Decimal(10**9), places=2),
    "flag": st.booleans(),
    "document": st.dictionaries(texts, st.lists(leaves, max_size=3), max_size=3) | st.lists(leaves, max_size=3) | texts,
    "text": texts | st.sampled_from(["", "🦀🇦🇶", "' OR 1=1 --", "%s %(x)s :x ? $1", "\\", "\\'", "a\tb\nc\rd"]),
    "name": texts | st.sampled_from(["", " ", "a ", "ß", "É"]),
    "big": st.integers(-(2**63), 2**63 - 1) | st.sampled_from([2**63 - 1, -(2**63)]),
    "blob": st.binary(max_size=300) | st.just(bytes(range(256))),
    "colour": st.sampled_from(Colour),
    "span": st.timedeltas(timedelta(days=-10000), timedelta(days=10000)),
    "day": st.dates(date(1000, 1, 1)),
    "hour": st.times(),
    "ratio": st.floats(allow_nan=False, allow_infinity=False, min_value=-1e300, max_value=1e300),
}
rows = st.builds(Everything, id=st.uuids(), **{name: st.none() | strategy for name, strategy in STRATEGIES.items()})


def expected(entity: Everything) -> Everything:
    moment = entity.moment.astimezone(UTC) if entity.moment else None
    return dataclasses.replace(entity, moment=moment)


def typed(entity: Everything) -> list[tuple[type, Any]]:
    pairs = [(type(getattr(entity, name)), getattr(entity, name)) for name in ROWS]
    return [(kind, str(value) if kind is Decimal else value) for kind, value in pairs]


@pytest.fixture(
    params=["memory", "sqlite", "postgres", "mysql", "sqlite portable", "postgres portable", "mysql portable"]
)
async def everything(request: pytest.FixtureRequest, tmp_path: Any) -> AsyncIterator[Any]:
    name, _, path = request.param.partition(" ")
    if name == "memory":
        async with InMemorySession() as memory:
            yield EverythingsInMemory(memory)
        return
    url = f"sqlite+aiosqlite:///{tmp_path / 'x.db'}" if name == "sqlite" else request.getfixturevalue(f"{name}_url")
    async with opened(url, portable=bool(path)) as session:
        yield Everythings(session)
        async with session.engine.begin() as connection:
            await connection.run_sync(metadata.drop_all)


async def round_trip(repository: Any, entity: Everything) -> None:
    wanted = typed(expected(entity))
    await repository.delete_where(everything=True)
    assert typed(await repository.add(entity)) == wanted
    assert typed(await repository.get(entity.id)) == wanted
    assert typed((await repository.get_many([entity.id]))[0]) == wanted
    assert [typed(one) async for one in repository.stream()] == [wanted]
    await repository.delete(entity.id)
    assert await repository.add_many([entity]) == 1
    assert typed(await repository.get(entity.id)) == wanted
    empty = Everything(entity.id)
    assert typed(await repository.update(empty)) == typed(empty)
    assert typed(await repository.upsert(entity)) == wanted
    assert typed(await repository.get(entity.id)) == wanted
    await repository.update_many([empty])
    changes = {name: getattr(entity, name) for name in ROWS if name != "id"}
    assert typed(await repository.patch(entity.id, changes)) == wanted
    for name in STRATEGIES:
        value = getattr(entity, name)
        if name != "document":
            asked = field(name).is_null() if value is None else field(name) == value
            assert await repository.count(asked) == 1, name


async def test_w6_what_goes_in_comes_out_the_same(everything: Any) -> None:
    loop = asyncio.get_running_loop()

    @settings(max_examples=25, suppress_health_check=list(HealthCheck))
    @given(entity=rows)
    def law(entity: Everything) -> None:
        asyncio.run_coroutine_threadsafe(round_trip(everything, entity), loop).result(60)

    await asyncio.to_thread(law)


async def test_w6_none_is_null_and_the_empty_is_not(everything: Any) -> None:
    for entity in (
        Everything(uuid.uuid4(), text="", name="", blob=b"", document={}),
        Everything(uuid.uuid4(), text=None, document={"a": None}),
        Everything(uuid.uuid4(), document=[]),
        Everything(uuid.uuid4(), document=0, flag=False, big=0, ratio=0.0, span=timedelta(0), hour=time(0)),
    ):
        await round_trip(everything, entity)
        null = sum(getattr(entity, name) is None for name in STRATEGIES)
        assert null == len([name for name in STRATEGIES if getattr(await everything.get(entity.id), name) is None])
    if isinstance(everything, Everythings):
        await everything.add(Everything(uuid.uuid4()))
        session = everything._session
        nulls = sa.select(sa.func.count()).select_from(values).where(values.c.document.is_(sa.null()))
        assert (await session.execute(nulls)).scalar() == 1, "None is NULL, not the document null"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("moment", datetime(2020, 1, 1)),  # noqa: DTZ001
        ("big", 2**63),
        ("big", -(2**63) - 1),
        ("amount", Decimal("NaN")),
        ("amount", Decimal("1e-11")),
        ("price", Decimal(10**11)),
        ("text", "nul\0"),
        ("text", "\ud800"),
        ("name", "x" * 101),
        ("document", {"a": object()}),
        ("ratio", float("nan")),
        ("colour", "blue"),
    ],
)
async def test_w6_what_cannot_be_kept_is_refused_by_name_everywhere(everything: Any, name: str, value: Any) -> None:
    entity = dataclasses.replace(Everything(uuid.uuid4()), **{name: value})
    await everything.delete_where(everything=True)
    for call in (
        lambda: everything.add(entity),
        lambda: everything.add_many([entity]),
        lambda: everything.upsert(entity),
        lambda: everything.patch(entity.id, {name: value}),
    ):
        with pytest.raises((InvalidInputError, ConstraintError)) as caught:
            await call()
        assert caught.value.fields == (name,)
    assert await everything.count() == 0


async def test_the_key_0_is_kept_where_a_database_would_generate_one(database_url: str) -> None:
    numbered = sa.Table("numbered", sa.MetaData(), sa.Column("id", sa.Integer(), primary_key=True))

    @dataclasses.dataclass
    class Numbered:
        id: int | None

    class Numbereds(SQLAlchemyRepository[Numbered]):
        table = numbered

    async with opened(database_url) as session:
        await session.create_tables(numbered.metadata)
        assert await Numbereds(session).add(Numbered(0)) == Numbered(0)
        assert (await Numbereds(session).add(Numbered(None))).id in (1, 2)
        assert await Numbereds(session).get(0) == Numbered(0)
