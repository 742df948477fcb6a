"""Rows as bytes come back exactly, or not at all."""

import enum
import math
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from typing import Any
from uuid import UUID
from zoneinfo import ZoneInfo

import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st

from fastapi_building_blocks.infrastructure.database.types import BinaryString, ExactDecimal, UtcDateTime
from fastapi_building_blocks.infrastructure.persistence.repositories.row_codec import (
    RowCodec,
    has_exact_equality,
    key_text,
)


class Colour(enum.Enum):
    RED = "r"
    BLUE = 2


COLUMNS = [sa.Column("any", sa.JSON()), sa.Column("colour", sa.Enum(Colour)), sa.Column("more", sa.JSON())]
codec = RowCodec(COLUMNS)

texts = st.text(st.characters(exclude_categories=()))  # lone surrogates included
offsets = st.integers(-1439, 1439).map(lambda minutes: timezone(timedelta(minutes=minutes)))


def without_fold(value: Any) -> Any:
    return value.replace(fold=0)


plain = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([2**63 - 1, -(2**63), 2**63, 10**400])
    | st.floats()
    | texts
)
documents = st.recursive(plain, lambda inner: st.lists(inner) | st.dictionaries(texts, inner), max_leaves=20)
scalars = (
    plain
    | st.binary()
    | st.uuids()
    | st.decimals()
    | st.sampled_from([Decimal("1.0"), Decimal("1.00"), Decimal("-0"), Decimal("1E+2"), Decimal("NaN")])
    | st.dates()
    | st.times(timezones=st.none() | offsets).map(without_fold)
    | st.datetimes(timezones=st.none() | st.just(UTC) | offsets).map(without_fold)
    | st.timedeltas()
)
values = st.recursive(scalars, lambda inner: st.lists(inner) | st.lists(inner).map(tuple), max_leaves=10) | documents


def is_exactly(one: Any, other: Any) -> bool:
    """The same value of the same type, all the way down; NaN is itself, and 1.0 is not 1.00."""
    if type(one) is not type(other):
        return False
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(is_exactly, one, other))
    if isinstance(one, dict):
        return list(one) == list(other) and all(is_exactly(one[key], other[key]) for key in one)
    if isinstance(one, float):
        return repr(one) == repr(other)
    if isinstance(one, Decimal):
        return one.as_tuple() == other.as_tuple()
    if isinstance(one, datetime | time):
        return one.isoformat() == other.isoformat() and type(one.tzinfo) is type(other.tzinfo)
    return bool(one == other)


@given(values, st.none() | st.sampled_from(Colour), values)
def test_every_value_comes_back_exactly(first: Any, colour: Any, last: Any):
    row = (first, colour, last)
    data = codec.encode(row)
    assert data is not None
    back = codec.decode(data)
    assert back is not None
    assert is_exactly(back, list(row))


@given(values, st.data())
def test_changed_bytes_are_no_row(value: Any, data: Any):
    encoded = codec.encode((value, None, None)) or b""
    place = data.draw(st.integers(0, len(encoded) - 1))
    bit = 1 << data.draw(st.integers(0, 7))
    assert codec.decode(encoded[:place] + bytes([encoded[place] ^ bit]) + encoded[place + 1 :]) is None
    assert codec.decode(encoded[:place]) is None


@given(st.binary())
def test_bytes_of_others_are_no_row(data: bytes):
    assert codec.decode(data) is None


@pytest.mark.parametrize(
    "body",
    [
        "[]",
        "{}",
        "null",
        "[[1,2],[]]",
        "[[1,2,3],[[9,'u']]]",
        '[[1,2,3],[[0,"?"]]]',
        '[[1,"GREEN",3],[[1,"e"]]]',
        "[" * 5000,
    ],
)
def test_what_others_have_written_in_json_is_no_row(body: str):
    import zlib

    assert codec.decode(zlib.crc32(body.encode()).to_bytes(4, "big") + body.encode()) is None


class Loud(str):
    __slots__ = ()


@pytest.mark.parametrize(
    "value",
    [
        pytest.param(10**5000, id="too long"),
        object(),
        {1: "a key that JSON would make a text"},
        {"a": datetime(2026, 1, 1, tzinfo=UTC)},
        frozenset("a"),
        Loud("text"),
        Colour.RED,
        datetime(2026, 1, 1, tzinfo=ZoneInfo("Europe/Paris")),
        datetime(2026, 1, 1, fold=1),  # noqa: DTZ001 - that is what is tried
        time(1, tzinfo=timezone(timedelta(hours=1), "CET")),
        bytearray(b"a"),
    ],
)
def test_what_would_come_back_otherwise_is_not_written(value: Any):
    assert codec.encode((value, None, None)) is None


def test_what_nests_too_deep_is_not_written():
    value: Any = []
    for _ in range(100_000):
        value = [value]
    assert codec.encode((value, None, None)) is None


@pytest.mark.parametrize(
    "column",
    [
        sa.Column("other", sa.Integer()),
        sa.Column("any", sa.String(20)),
        sa.Column("any", sa.Enum("a", "b")),
        sa.Column("any", sa.Enum("a", "c")),
        sa.Column("any", sa.Numeric(10, 2)),
        sa.Column("any", sa.Numeric(10, 3)),
        sa.Column("any", sa.DateTime()),
        sa.Column("any", UtcDateTime()),
        sa.Column("any", sa.Uuid()),
        sa.Column("any", sa.Uuid(as_uuid=False)),
    ],
)
def test_another_shape_is_another_version(column: Any):
    def version(*columns: Any) -> bytes:
        return RowCodec(columns).version

    assert version(column) == version(column._copy())
    assert version(column) != version(sa.Column("any", sa.Integer()))
    assert version(column) != version(column._copy(), sa.Column("more", sa.Integer()))


@given(st.lists(st.tuples(st.integers() | texts | st.binary() | st.uuids(), texts), unique=True))
def test_no_two_keys_are_the_same_text(keys: list[Any]):
    assert len({key_text(key) for key in keys}) == len(keys)
    for key in keys:
        key_text(key).encode()


def test_keys_that_the_database_may_spell_otherwise():
    def exact(kind: Any, dialect: str) -> bool:
        return has_exact_equality(sa.Column("x", kind), dialect)

    for dialect in ("postgresql", "mariadb", "mysql", "sqlite", "mssql", "memory"):
        assert exact(sa.BigInteger(), dialect)
        assert exact(sa.Uuid(), dialect)
        assert not exact(sa.Uuid(as_uuid=False), dialect)
        assert not exact(sa.Float(), dialect)
        assert not exact(ExactDecimal(10, 2), dialect)
        assert exact(BinaryString(10), dialect) is (dialect != "mssql")
        assert exact(sa.String(10), dialect) is (dialect in ("postgresql", "sqlite", "memory"))
        assert not exact(sa.String(10, collation="NOCASE"), dialect)


def test_nan_is_nobodys_key():
    from fastapi_building_blocks.infrastructure.persistence.repositories.row_codec import is_same

    assert not is_same(math.nan, math.nan)
    assert not is_same(1, True)
    assert is_same(UUID(int=1), UUID(int=1))
    assert is_same(date(2026, 1, 1), date(2026, 1, 1))
