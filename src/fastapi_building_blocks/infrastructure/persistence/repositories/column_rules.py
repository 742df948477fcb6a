"""What a column takes: one set of rules for SQL and in-memory repositories, so that bad input is the same error everywhere.

Databases differ in what they refuse: SQLite stores a text of any length, MariaDB drops a UTC offset, PostgreSQL alone
minds NUL. The rules are checked before a statement is sent and are those of the strictest. One rule for each type: they
stay in one file so that none is missed in the table at its end.
"""

import enum
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, date, datetime, time, timedelta
from decimal import ROUND_DOWN, Context, Decimal, Inexact, InvalidOperation
from functools import lru_cache
from typing import Any
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.types import TypeDecorator, TypeEngine

from fastapi_building_blocks.domain.errors import ConstraintError, InvalidInputError, InvalidQueryError
from fastapi_building_blocks.domain.query import MOST_VALUES, Operator
from fastapi_building_blocks.infrastructure.database.plain_types import exact_decimal, to_utc
from fastapi_building_blocks.infrastructure.database.types import BinaryString, ExactDecimal, UtcDateTime

Rule = Callable[[Any], Any]
"""Takes a value that is not None, returns the value to store, or raises ``InvalidInputError`` without naming a field."""

# MariaDB's JSON functions refuse documents nested deeper than 32 levels; the others go further.
_DEEPEST_JSON = 31
_LARGE_INTEGER = 2**63
# SQLite takes patterns of up to 50,000 bytes, once special characters are escaped.
_LONGEST_SEARCH = 10_000
_EPOCH = datetime(1970, 1, 1)  # noqa: DTZ001 - a wall clock
_TEXT_OPERATORS = frozenset({Operator.CONTAINS, Operator.ICONTAINS, Operator.STARTS_WITH})
_LIST_OPERATORS = frozenset({Operator.IN, Operator.NOT_IN, Operator.BETWEEN})


def check_value(column: sa.Column[Any], value: Any) -> Any:
    """Return the value to store: plain, in the column's own type and scale; None passes.

    Raises:
        InvalidInputError: the column cannot hold it; the error names the field.
    """
    if value is None:
        return None
    try:
        return _rule(column.type)(value)
    except InvalidInputError as error:
        raise InvalidInputError(f"{column.key}: {error.detail}", fields=(column.key,)) from error


def check_not_null(column: sa.Column[Any], value: Any) -> None:
    """Refuse None where the column is NOT NULL, as a database does.

    Raises:
        ConstraintError: the column is NOT NULL; the error names the field.
    """
    if value is None and not column.nullable:
        raise ConstraintError(f"{column.key}: a value is required", fields=(column.key,))


def check_operand(column: sa.Column[Any], operator: Operator, value: Any) -> Any:
    """Return what a filter compares the column with, converted as ``check_value`` does; None passes.

    A text may be longer than the column: it matches nothing. IN takes a tuple, BETWEEN a pair, IS_NULL a bool.

    Raises:
        InvalidQueryError: the operator or the value does not suit the column; the error names the field.
    """
    try:
        return _operand(column, operator, value)
    except InvalidInputError as error:
        raise InvalidQueryError(f"{column.key}: {error.detail}", fields=(column.key,)) from error


def _operand(column: sa.Column[Any], operator: Operator, value: Any) -> Any:
    kind = column.type
    if operator is Operator.IS_NULL:
        if not isinstance(value, bool):
            raise InvalidInputError("is_null takes true or false")
        return value
    if isinstance(kind, sa.JSON):
        raise InvalidInputError("a JSON field can only be asked whether it is null")
    if operator in _TEXT_OPERATORS:
        if not _is_text(kind):
            raise InvalidInputError(f"{operator} is for text fields")
        if isinstance(value, str) and len(value) > _LONGEST_SEARCH:
            raise InvalidInputError(f"at most {_LONGEST_SEARCH} characters can be searched for")
    check = _operand_rule(kind)
    if operator in _LIST_OPERATORS:
        return tuple(None if item is None else check(item) for item in _listed(operator, value))
    return None if value is None else check(value)


def _listed(operator: Operator, value: Any) -> Sequence[Any]:
    if not isinstance(value, tuple | list):
        raise _wrong("a list of values", value)
    if operator is Operator.BETWEEN and len(value) != 2:
        raise InvalidInputError("between takes a low and a high value")
    if len(value) > MOST_VALUES:
        raise InvalidInputError(f"at most {MOST_VALUES} values in one list")
    return value


def inline_check(column: sa.Column[Any]) -> tuple[str, Mapping[str, Any]] | None:
    """Return an expression of ``v`` that is true where the value can be stored as it is, with the names it needs.

    Generated code asks it first and calls ``check_value`` only where it is false. None: always call.
    """
    kind = column.type
    for base, inline in _INLINE:
        if isinstance(kind, base):
            return inline(kind)
    return None


# Rules by type


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, enum.Enum) else value


def _wrong(expected: str, value: Any) -> InvalidInputError:
    return InvalidInputError(f"expected {expected}, got {type(value).__name__}")


def _text(value: Any) -> str:
    value = _plain(value)
    if not isinstance(value, str):
        raise _wrong("text", value)
    text = value if type(value) is str else str.__str__(value)
    if "\0" in text:
        raise InvalidInputError("text may not contain the NUL character")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidInputError("text may not contain a lone surrogate") from error
    return text


def _text_rule(kind: TypeEngine[Any]) -> Rule:
    longest: int | None = getattr(kind, "length", None)
    if longest is None:
        return _text

    def check(value: Any) -> str:
        text = _text(value)
        if len(text) > longest:
            raise InvalidInputError(f"at most {longest} characters, got {len(text)}")
        return text

    return check


def _integer_bounds(kind: TypeEngine[Any]) -> tuple[int, int]:
    bits = 15 if isinstance(kind, sa.SmallInteger) else 63 if isinstance(kind, sa.BigInteger) else 31
    return -(2**bits), 2**bits - 1


def _integer_rule(kind: TypeEngine[Any]) -> Rule:
    least, most = _integer_bounds(kind)

    def check(value: Any) -> int:
        number = _plain(value)
        if isinstance(number, bool) or not isinstance(number, int):
            raise _wrong("a whole number", number)
        if not least <= number <= most:
            raise InvalidInputError(f"a whole number from {least} to {most}")
        return int(number)

    return check


def _boolean(value: Any) -> bool:
    if value is not True and value is not False:
        raise _wrong("true or false", value)
    return value


def _float(value: Any) -> float:
    value = _plain(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _wrong("a number", value)
    try:
        number = float(value)
    except OverflowError as error:
        raise InvalidInputError("the number is too large") from error
    if not math.isfinite(number):
        raise InvalidInputError("expected a finite number")
    if number != value:
        raise InvalidInputError("the whole number is too large to be kept exactly")
    return number


def _float_rule(kind: TypeEngine[Any]) -> Rule:
    if not getattr(kind, "asdecimal", False):
        return _float

    def check(value: Any) -> Decimal | float:
        if not isinstance(value, Decimal):
            return _float(value)
        if not value.is_finite():
            raise InvalidInputError("expected a finite number")
        return value

    return check


def _numeric_rule(kind: Any) -> Rule:
    if not kind.asdecimal:
        return _float
    if kind.precision is None:

        def check(value: Any) -> Decimal:
            if isinstance(value, bool) or not isinstance(value, Decimal | int):
                raise _wrong("a decimal", value)
            number = Decimal(value)
            if not number.is_finite():
                raise InvalidInputError("expected a finite decimal")
            return number

        return check
    unit = Decimal((0, (1,), -(kind.scale or 0)))
    context = Context(prec=kind.precision, rounding=ROUND_DOWN, traps=[InvalidOperation, Inexact])
    return lambda value: exact_decimal(_plain(value), unit, context)


def _exact_decimal_rule(kind: Any) -> Rule:
    return lambda value: kind.exact(_plain(value))


def _bytes_rule(kind: TypeEngine[Any]) -> Rule:
    longest: int | None = getattr(kind, "length", None)

    def check(value: Any) -> bytes:
        if not isinstance(value, bytes | bytearray | memoryview):
            raise _wrong("bytes", value)
        if longest is not None and len(value) > longest:
            raise InvalidInputError(f"at most {longest} bytes, got {len(value)}")
        return bytes(value)

    return check


def _date_time_rule(kind: Any) -> Rule:
    if kind.timezone:
        return to_utc

    def check(value: Any) -> datetime:
        if not isinstance(value, datetime):
            raise _wrong("a date and time", value)
        if value.tzinfo is not None:
            raise InvalidInputError("expected a date and time without a UTC offset")
        if type(value) is datetime:
            return value
        return datetime.combine(value.date(), value.time())

    return check


def _date(value: Any) -> date:
    if not isinstance(value, date) or isinstance(value, datetime):
        raise _wrong("a date", value)
    return value if type(value) is date else date(value.year, value.month, value.day)


def _time_rule(kind: Any) -> Rule:
    def check(value: Any) -> time:
        if not isinstance(value, time):
            raise _wrong("a time of day", value)
        if (value.tzinfo is not None) is not kind.timezone:
            raise InvalidInputError(f"expected a time of day {'with' if kind.timezone else 'without'} a UTC offset")
        return value

    return check


def _interval(value: Any) -> timedelta:
    if not isinstance(value, timedelta):
        raise _wrong("a duration", value)
    try:
        _EPOCH + value  # what databases without intervals store
    except OverflowError as error:
        raise InvalidInputError("the duration is too long") from error
    return value if type(value) is timedelta else timedelta(value.days, value.seconds, value.microseconds)


def _uuid_rule(kind: Any) -> Rule:
    def check(value: Any) -> UUID | str:
        if kind.as_uuid:
            if not isinstance(value, UUID):
                raise _wrong("a UUID", value)
            return value if type(value) is UUID else UUID(int=value.int)
        if not isinstance(value, str):
            raise _wrong("a UUID as text", value)
        try:
            return str(UUID(value))
        except ValueError as error:
            raise InvalidInputError("expected a UUID as text") from error

    return check


def _enum_rule(kind: Any) -> Rule:
    members: type[enum.Enum] | None = kind.enum_class
    names = frozenset(kind.enums)

    def check(value: Any) -> Any:
        if members is None:
            value = _plain(value)
            if isinstance(value, str) and value in names:
                return str.__str__(value)
        else:
            if isinstance(value, members):
                return value
            if isinstance(value, enum.Enum):
                raise _wrong(f"one of {members.__name__}", value)
            try:
                return members(value)
            except ValueError:
                if isinstance(value, str) and value in members.__members__:
                    return members[value]
        raise InvalidInputError(f"expected one of {', '.join(kind.enums)}")

    return check


# JSON

_LONG_DIGITS = re.compile(r"\d{19}")


def _json(value: Any) -> Any:
    """Return the document as it comes back: tuples as lists, str and int subclasses plain."""
    try:
        text = json.dumps(value, allow_nan=False)
        if text.count("[") + text.count("{") > _DEEPEST_JSON or _LONG_DIGITS.search(text):
            _check_tree(value, _DEEPEST_JSON)
        document = json.loads(text)
    except RecursionError as error:
        raise InvalidInputError(f"JSON may be nested {_DEEPEST_JSON} levels deep") from error
    except (TypeError, ValueError) as error:
        raise InvalidInputError(
            "expected a value that JSON can express (no NaN, no infinity, no other types)"
        ) from error
    if "\\u0000" in text or "\\ud" in text:
        _check_texts(document)
    if document != value:
        _check_tree(value, _DEEPEST_JSON)
    return document


def _check_texts(document: Any) -> None:
    if isinstance(document, str):
        _text(document)
    elif isinstance(document, dict):
        for key, item in document.items():
            _text(key)
            _check_texts(item)
    elif isinstance(document, list):
        for item in document:
            _check_texts(item)


def _check_tree(value: Any, levels: int) -> None:
    if isinstance(value, dict | list | tuple):
        if levels == 0:
            raise InvalidInputError(f"JSON may be nested {_DEEPEST_JSON} levels deep")
        if isinstance(value, dict):
            for key in value:
                if not isinstance(key, str):
                    raise InvalidInputError("the keys of a JSON object are strings")
        for item in value.values() if isinstance(value, dict) else value:
            _check_tree(item, levels - 1)
    elif isinstance(value, int) and not -_LARGE_INTEGER <= value < _LARGE_INTEGER:
        raise InvalidInputError("a whole number in JSON may have 64 bits")


def _is_text(kind: TypeEngine[Any]) -> bool:
    return isinstance(kind, sa.String | BinaryString) and not isinstance(kind, sa.Enum)


def _anything(value: Any) -> Any:
    return value


# The first match counts: Enum is a String, Float a Numeric, and the decorators are none of them.
_RULES: tuple[tuple[type[Any], Callable[[Any], Rule]], ...] = (
    (UtcDateTime, lambda _: to_utc),
    (ExactDecimal, _exact_decimal_rule),
    (BinaryString, _text_rule),
    (sa.Interval, lambda _: _interval),
    (TypeDecorator, lambda _: _anything),
    (sa.Enum, _enum_rule),
    (sa.String, _text_rule),
    (sa.Boolean, lambda _: _boolean),
    (sa.Integer, _integer_rule),
    (sa.Float, _float_rule),
    (sa.Numeric, _numeric_rule),
    (sa.Uuid, _uuid_rule),
    (sa.JSON, lambda _: _json),
    (sa.DateTime, _date_time_rule),
    (sa.Date, lambda _: _date),
    (sa.Time, _time_rule),
    (sa.types._Binary, _bytes_rule),
)


@lru_cache(maxsize=4096)
def _rule(kind: TypeEngine[Any]) -> Rule:
    for base, make in _RULES:
        if isinstance(kind, base):
            return make(kind)
    return _anything


def _operand_rule(kind: TypeEngine[Any]) -> Rule:
    if _is_text(kind):
        return _text
    if isinstance(kind, sa.types._Binary):
        return _bytes_rule(sa.LargeBinary())
    return _rule(kind)


# The cheap half of the rules, as source


def _inline_text(kind: Any) -> tuple[str, Mapping[str, Any]]:
    limit = "" if kind.length is None else f" and len(v) <= {kind.length:d}"
    source = f"type(v) is str{limit} and '\\0' not in v and (v.isascii() or _is_encodable(v))"
    return source, {"_is_encodable": _is_encodable}


def _is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _inline_decimal(kind: Any) -> tuple[str, Mapping[str, Any]] | None:
    scale = kind.scale or 0
    is_own = isinstance(kind, ExactDecimal) and type(kind) is not ExactDecimal
    if kind.precision is None or not kind.asdecimal or scale < 0 or is_own:
        return None
    unit, bound = f"unit_{scale}", f"bound_{kind.precision}_{scale}"
    # Of the column's own scale, within its digits, and no negative zero.
    source = f"type(v) is Decimal and v.same_quantum({unit}) and -{bound} < v < {bound} and (v or not v.is_signed())"
    values = {unit: Decimal((0, (1,), -scale)), bound: Decimal(10) ** (kind.precision - scale)}
    return source, {"Decimal": Decimal, **values}


def _inline_integer(kind: Any) -> tuple[str, Mapping[str, Any]]:
    least, most = _integer_bounds(kind)
    return f"type(v) is int and {least} <= v <= {most}", {}


def _inline_date_time(kind: Any) -> tuple[str, Mapping[str, Any]]:
    zone = "UTC" if kind.timezone else "None"
    return f"type(v) is datetime and v.tzinfo is {zone}", {"datetime": datetime, "UTC": UTC}


def _inline_uuid(kind: Any) -> tuple[str, Mapping[str, Any]] | None:
    return ("type(v) is UUID", {"UUID": UUID}) if kind.as_uuid else None


def _inline_float(kind: Any) -> tuple[str, Mapping[str, Any]]:  # noqa: ARG001
    return "type(v) is float and v - v == 0.0", {}


_INLINE: tuple[tuple[type[Any], Callable[[Any], tuple[str, Mapping[str, Any]] | None]], ...] = (
    (UtcDateTime, lambda _: ("type(v) is datetime and v.tzinfo is UTC", {"datetime": datetime, "UTC": UTC})),
    (ExactDecimal, _inline_decimal),
    (BinaryString, _inline_text),
    (TypeDecorator, lambda _: None),
    (sa.Enum, lambda _: None),
    (sa.String, _inline_text),
    (sa.Boolean, lambda _: ("v is True or v is False", {})),
    (sa.Integer, _inline_integer),
    (sa.Float, _inline_float),
    (sa.Numeric, _inline_decimal),
    (sa.Uuid, _inline_uuid),
    (sa.DateTime, _inline_date_time),
    (sa.Date, lambda _: ("type(v) is date", {"date": date})),
)
