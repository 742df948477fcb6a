import enum
import json
import math
import uuid
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st

from fastapi_building_blocks.domain import ConstraintError, InvalidInputError, InvalidQueryError, Operator
from fastapi_building_blocks.infrastructure.database.types import BinaryString, ExactDecimal, UtcDateTime
from fastapi_building_blocks.infrastructure.persistence.repositories.column_rules import (
    check_not_null,
    check_operand,
    check_value,
    inline_check,
)


class Status(enum.StrEnum):
    ACTIVE = "active"
    GONE = "gone"


class Level(enum.IntEnum):
    LOW = 1


class Colour(enum.Enum):
    RED = "r"


class Name(str):
    __slots__ = ()


NAIVE = datetime(2026, 1, 2, 3, 4, 5, 6)  # noqa: DTZ001
INDIA = timezone(timedelta(hours=5, minutes=30))


def column(kind: Any, **options: Any) -> sa.Column[Any]:
    return sa.Column("field", kind, **options)


def nested(levels: int) -> Any:
    document: Any = 1
    for _ in range(levels):
        document = [document]
    return document


def numbered(cases: list[Any]) -> list[str]:
    return [f"{number}-{type(case[0]).__name__}" for number, case in enumerate(cases)]


GOOD = [
    (sa.String(3), "äöü", "äöü"),
    (sa.String(3), "😀😀😀", "😀😀😀"),
    (sa.String(3), "", ""),
    (sa.String(10), Name("Ada"), "Ada"),
    (sa.String(10), Status.ACTIVE, "active"),
    (sa.String(10), Colour.RED, "r"),
    (sa.Text(), "x" * 100_000, "x" * 100_000),
    (BinaryString(2), "a ", "a "),
    (sa.SmallInteger(), -(2**15), -(2**15)),
    (sa.Integer(), 2**31 - 1, 2**31 - 1),
    (sa.Integer(), Level.LOW, 1),
    (sa.BigInteger(), 2**63 - 1, 2**63 - 1),
    (sa.BigInteger().with_variant(sa.Integer(), "sqlite"), 2**40, 2**40),
    (sa.Boolean(), False, False),
    (sa.Float(), 1.5, 1.5),
    (sa.Float(), 3, 3.0),
    (sa.Numeric(5, 2), Decimal("1.5"), Decimal("1.50")),
    (sa.Numeric(5), 12, Decimal(12)),
    (sa.Numeric(), Decimal("1.23456789"), Decimal("1.23456789")),
    (sa.Numeric(5, 2, asdecimal=False), 1.5, 1.5),
    (ExactDecimal(5, 2), 7, Decimal("7.00")),
    (ExactDecimal(5, 2), Decimal("-0"), Decimal("0.00")),
    (sa.LargeBinary(), bytearray(b"\0\xff"), b"\0\xff"),
    (sa.LargeBinary(2), b"ab", b"ab"),
    (UtcDateTime(), datetime(2026, 1, 1, 5, 30, tzinfo=INDIA), datetime(2026, 1, 1, tzinfo=UTC)),
    (sa.DateTime(timezone=True), datetime(2026, 1, 1, 5, 30, tzinfo=INDIA), datetime(2026, 1, 1, tzinfo=UTC)),
    (sa.DateTime(), NAIVE, NAIVE),
    (sa.Date(), date(2026, 1, 2), date(2026, 1, 2)),
    (sa.Time(), time(1, 2, 3, 4), time(1, 2, 3, 4)),
    (sa.Interval(), timedelta(days=-3), timedelta(days=-3)),
    (sa.Uuid(), uuid.UUID(int=7), uuid.UUID(int=7)),
    (sa.Uuid(as_uuid=False), "00000000000000000000000000000007", "00000000-0000-0000-0000-000000000007"),
    (sa.Enum(Status), Status.ACTIVE, Status.ACTIVE),
    (sa.Enum(Status), "active", Status.ACTIVE),
    (sa.Enum(Colour), "RED", Colour.RED),
    (sa.Enum("a", "b", name="letter"), "a", "a"),
    (sa.JSON(), {"a": [1, 1.5, True, None, "é😀"]}, {"a": [1, 1.5, True, None, "é😀"]}),
    (sa.JSON(), (1, 2), [1, 2]),
    (sa.JSON(), {"status": Status.ACTIVE}, {"status": "active"}),
    (sa.JSON(), [2**63 - 1, -(2**63)], [2**63 - 1, -(2**63)]),
    (sa.JSON(), "\\ud800 is an escape written out", "\\ud800 is an escape written out"),
    (sa.JSON(), nested(31), nested(31)),
    (sa.PickleType(), object, object),
]

BAD = [
    (sa.String(3), "abcd"),
    (sa.String(3), 1),
    (sa.String(3), b"a"),
    (sa.String(3), Level.LOW),
    (sa.String(9), "a\0b"),
    (sa.String(9), "\ud800"),
    (sa.Text(), "a\0b"),
    (BinaryString(2), "abc"),
    (sa.SmallInteger(), 2**15),
    (sa.Integer(), 2**31),
    (sa.Integer(), -(2**31) - 1),
    (sa.Integer(), True),
    (sa.Integer(), 1.0),
    (sa.Integer(), "1"),
    (sa.BigInteger(), 2**63),
    (sa.Boolean(), 1),
    (sa.Boolean(), "true"),
    (sa.Float(), math.nan),
    (sa.Float(), -math.inf),
    (sa.Float(), True),
    (sa.Float(), "1.5"),
    (sa.Float(), 10**400),
    (sa.Float(), 2**53 + 1),
    (sa.Numeric(5, 2), Decimal("NaN")),
    (sa.Numeric(5, 2), Decimal("sNaN")),
    (sa.Numeric(5, 2), Decimal("Infinity")),
    (sa.Numeric(5, 2), Decimal(1000)),
    (sa.Numeric(5, 2), Decimal("1.005")),
    (sa.Numeric(5, 2), Decimal("1E+999999")),
    (sa.Numeric(5, 2), 1.5),
    (sa.Numeric(5, 2), True),
    (sa.Numeric(), Decimal("NaN")),
    (sa.Numeric(), "1"),
    (sa.Float(asdecimal=True), Decimal("NaN")),
    (ExactDecimal(5, 2), Decimal("NaN")),
    (ExactDecimal(5, 2), 1.5),
    (ExactDecimal(5, 2), Decimal("999.991")),
    (sa.LargeBinary(), "text"),
    (sa.LargeBinary(2), b"abc"),
    (UtcDateTime(), NAIVE),
    (UtcDateTime(), date(2026, 1, 1)),
    (UtcDateTime(), "2026-01-01T00:00:00Z"),
    (UtcDateTime(), datetime.max.replace(tzinfo=timezone(-timedelta(hours=1)))),
    (sa.DateTime(timezone=True), NAIVE),
    (sa.DateTime(), NAIVE.replace(tzinfo=UTC)),
    (sa.DateTime(), date(2026, 1, 1)),
    (sa.Date(), NAIVE),
    (sa.Date(), "2026-01-01"),
    (sa.Time(), time(1, tzinfo=UTC)),
    (sa.Time(), "01:00"),
    (sa.Interval(), 5),
    (sa.Interval(), timedelta.max),
    (sa.Uuid(), "00000000000000000000000000000007"),
    (sa.Uuid(), 7),
    (sa.Uuid(as_uuid=False), "seven"),
    (sa.Uuid(as_uuid=False), uuid.UUID(int=7)),
    (sa.Enum(Status), "unknown"),
    (sa.Enum(Status), Colour.RED),
    (sa.Enum("a", "b", name="letter"), "c"),
    (sa.JSON(), math.nan),
    (sa.JSON(), {"a": [math.inf]}),
    (sa.JSON(), {"a": {1, 2}}),
    (sa.JSON(), object()),
    (sa.JSON(), {1: "a"}),
    (sa.JSON(), {"a\0": 1}),
    (sa.JSON(), ["a\0"]),
    (sa.JSON(), [{"a": "\udfff"}]),
    (sa.JSON(), [2**63]),
    (sa.JSON(), 10**5000),
    (sa.JSON(), nested(32)),
    (sa.JSON(), nested(100_000)),
]


@pytest.mark.parametrize(("kind", "value", "stored"), GOOD, ids=numbered(GOOD))
def test_a_value_that_fits_is_stored_plain(kind: Any, value: Any, stored: Any) -> None:
    answer = check_value(column(kind), value)
    assert answer == stored
    assert type(answer) is type(stored)
    assert str(answer) == str(stored)


@pytest.mark.parametrize(("kind", "value"), BAD, ids=numbered(BAD))
def test_a_value_that_does_not_fit_is_refused_by_name(kind: Any, value: Any) -> None:
    with pytest.raises(InvalidInputError) as refusal:
        check_value(column(kind), value)
    assert refusal.value.fields == ("field",)
    assert refusal.value.detail.startswith("field: ")
    assert len(refusal.value.detail) < 200


@pytest.mark.parametrize(("kind", "value"), BAD, ids=numbered(BAD))
def test_the_cheap_check_never_lets_a_bad_value_through(kind: Any, value: Any) -> None:
    inline = inline_check(column(kind))
    if inline is not None:
        expression, names = inline
        assert not eval(expression, {**names, "v": value})


@pytest.mark.parametrize(("kind", "value", "stored"), GOOD, ids=numbered(GOOD))
def test_the_cheap_check_only_passes_what_needs_no_change(kind: Any, value: Any, stored: Any) -> None:
    inline = inline_check(column(kind))
    if inline is not None:
        expression, names = inline
        assert not eval(expression, {**names, "v": None})
        if eval(expression, {**names, "v": value}):
            assert check_value(column(kind), value) is value


def test_none_passes_and_not_null_is_a_check_of_its_own() -> None:
    required = column(sa.String(3), nullable=False)
    assert check_value(required, None) is None
    with pytest.raises(ConstraintError) as refusal:
        check_not_null(required, None)
    assert refusal.value.fields == ("field",)
    check_not_null(required, "")
    check_not_null(column(sa.String(3)), None)


def test_a_json_document_is_not_shared_with_the_caller() -> None:
    document = {"tags": ["a"]}
    stored = check_value(column(sa.JSON()), document)
    document["tags"].append("b")
    assert stored == {"tags": ["a"]}


documents = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(), children, max_size=4),
    max_leaves=20,
)


@given(documents)
def test_every_json_document_is_stored_as_it_is_or_refused_for_its_text(document: Any) -> None:
    text = json.dumps(document, ensure_ascii=False)
    try:
        stored = check_value(column(sa.JSON()), document)
    except InvalidInputError:
        assert "\\u0000" in json.dumps(document) or any(0xD800 <= ord(letter) <= 0xDFFF for letter in text)
    else:
        assert stored == document


class TestOperands:
    def test_a_text_longer_than_the_column_is_a_fine_question(self) -> None:
        assert check_operand(column(sa.String(2)), Operator.EQ, "abc") == "abc"
        assert check_operand(column(sa.LargeBinary(2)), Operator.EQ, b"abc") == b"abc"

    @pytest.mark.parametrize("operator", [Operator.EQ, Operator.LT, Operator.CONTAINS])
    def test_none_passes_as_sql_null(self, operator: Operator) -> None:
        assert check_operand(column(sa.String(2)), operator, None) is None
        assert check_operand(column(sa.String(2)), Operator.IN, (None, "a")) == (None, "a")

    def test_lists_and_ranges_are_checked_item_by_item(self) -> None:
        status = column(sa.String(9))
        assert check_operand(status, Operator.IN, (Status.ACTIVE, "x")) == ("active", "x")
        assert check_operand(column(ExactDecimal(5, 2)), Operator.BETWEEN, (1, None)) == (Decimal("1.00"), None)
        for operator, value in [
            (Operator.IN, ("a", 1)),
            (Operator.NOT_IN, "a"),
            (Operator.BETWEEN, ("a", 1)),
            (Operator.BETWEEN, ("a",)),
            (Operator.BETWEEN, 1),
        ]:
            with pytest.raises(InvalidQueryError) as refusal:
                check_operand(status, operator, value)
            assert refusal.value.fields == ("field",)

    @pytest.mark.parametrize("operator", [Operator.CONTAINS, Operator.ICONTAINS, Operator.STARTS_WITH])
    @pytest.mark.parametrize("kind", [sa.Integer(), sa.Uuid(), sa.JSON(), sa.Enum(Status), sa.LargeBinary()], ids=repr)
    def test_only_text_can_be_searched(self, operator: Operator, kind: Any) -> None:
        with pytest.raises(InvalidQueryError):
            check_operand(column(kind), operator, "a")
        assert check_operand(column(BinaryString(1)), operator, "a%b") == "a%b"

    def test_a_json_field_is_only_asked_whether_it_is_null(self) -> None:
        assert check_operand(column(sa.JSON()), Operator.IS_NULL, False) is False
        with pytest.raises(InvalidQueryError):
            check_operand(column(sa.JSON()), Operator.EQ, {})

    def test_is_null_takes_a_bool(self) -> None:
        with pytest.raises(InvalidQueryError):
            check_operand(column(sa.Integer()), Operator.IS_NULL, 1)

    @pytest.mark.parametrize(
        ("kind", "value"),
        [
            pytest.param(sa.String(5), "\0", id="NUL"),
            pytest.param(sa.String(5), "\ud800", id="surrogate"),
            pytest.param(sa.Integer(), 2**31, id="range"),
            pytest.param(sa.BigInteger(), 2**63, id="64 bits"),
            pytest.param(sa.Integer(), "1", id="type"),
            pytest.param(UtcDateTime(), NAIVE, id="naive"),
            pytest.param(sa.Float(), math.nan, id="NaN"),
            pytest.param(sa.Enum(Status), "unknown", id="enum"),
        ],
    )
    def test_what_no_row_could_hold_is_a_bad_query(self, kind: Any, value: Any) -> None:
        with pytest.raises(InvalidQueryError) as refusal:
            check_operand(column(kind), Operator.EQ, value)
        assert refusal.value.fields == ("field",)


def test_a_list_to_compare_with_has_a_largest_length() -> None:
    assert len(check_operand(column(sa.Integer()), Operator.IN, tuple(range(10_000)))) == 10_000
    for operator in (Operator.IN, Operator.NOT_IN):
        with pytest.raises(InvalidQueryError) as caught:
            check_operand(column(sa.Integer()), operator, list(range(10_001)))
        assert caught.value.fields == ("field",)
