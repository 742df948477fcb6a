"""Text of a query string as a field's value, strictly: what is not plainly meant is refused."""

import enum
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, date, datetime, time
from decimal import Decimal
from functools import partial
from typing import Any
from uuid import UUID

from fastapi_building_blocks.domain.query import Operator

Parse = Callable[[str], Any]

_SMALLEST, _LARGEST = -(2**63), 2**63 - 1
_WHOLE = re.compile(r"-?[0-9]{1,19}")
_NUMBER = re.compile(r"-?[0-9]{1,40}(\.[0-9]{1,40})?([eE][+-]?[0-9]{1,4})?")
_MOST_DIGITS = 65  # what MySQL's DECIMAL holds, the least of the databases
_BOOLEANS = {"true": True, "1": True, "false": False, "0": False}

_EQUAL = (Operator.EQ, Operator.NE, Operator.IN, Operator.NOT_IN, Operator.IS_NULL)
_ORDERED = (*_EQUAL, Operator.LT, Operator.LE, Operator.GT, Operator.GE, Operator.BETWEEN)
_TEXTUAL = (*_ORDERED, Operator.CONTAINS, Operator.ICONTAINS, Operator.STARTS_WITH)


@dataclass(frozen=True, slots=True)
class ValueKind:
    """How values of one Python type are read and described over HTTP.

    ``parse`` raises ``ValueError`` for what it does not take; ``expected`` completes "expected ...".
    """

    parse: Parse
    expected: str
    schema: dict[str, Any]
    operators: tuple[Operator, ...]


def parse_boolean(text: str) -> bool:
    """Read ``true`` or ``false``, also ``1`` or ``0``."""
    try:
        return _BOOLEANS[text.lower()]
    except KeyError:
        raise ValueError("not a boolean") from None


def parse_whole_number(text: str) -> int:
    """Read a whole number of at most 64 bits."""
    if not _WHOLE.fullmatch(text):
        raise ValueError("not a whole number")
    number = int(text)
    if not _SMALLEST <= number <= _LARGEST:
        raise ValueError("beyond 64 bits")
    return number


def parse_text(text: str) -> str:
    """Read text without NUL characters, which PostgreSQL cannot hold."""
    if "\0" in text:
        raise ValueError("holds a NUL character")
    return text


def _parse_float(text: str) -> float:
    number = float(_number(text))
    if not math.isfinite(number):
        raise ValueError("not finite")
    return number


def _parse_decimal(text: str) -> Decimal:
    number = Decimal(_number(text))
    exponent = number.as_tuple().exponent
    # A short exponent may stand for megabytes of digits.
    if not isinstance(exponent, int) or max(len(number.as_tuple().digits), abs(exponent)) > _MOST_DIGITS:
        raise ValueError("too many digits")
    return number


def _number(text: str) -> str:
    if not _NUMBER.fullmatch(text):
        raise ValueError("not a number")
    return text


def _parse_timestamp(text: str) -> datetime:
    if "T" in text:
        text = text.replace(" ", "+")  # in a query string an unescaped + means a space
    moment = datetime.fromisoformat(text)
    if moment.tzinfo is None:
        raise ValueError("without an offset")
    try:
        return moment.astimezone(UTC)
    except OverflowError:
        raise ValueError("beyond the calendar") from None


def _parse_member(members: dict[str, enum.Enum], text: str) -> enum.Enum:
    try:
        return members[text]
    except KeyError:
        raise ValueError("not a member") from None


TEXT_SCHEMA: dict[str, Any] = {"type": "string", "pattern": "^[^\\u0000]*$"}
TEXT = ValueKind(parse_text, "text without NUL characters", TEXT_SCHEMA, _TEXTUAL)
BOOLEAN = ValueKind(parse_boolean, "true or false", {"type": "boolean"}, (Operator.EQ, Operator.NE, Operator.IS_NULL))

_KINDS: dict[type, ValueKind] = {
    bool: BOOLEAN,
    int: ValueKind(
        parse_whole_number,
        "a whole number of at most 64 bits",
        {"type": "integer", "minimum": _SMALLEST, "maximum": _LARGEST},
        _ORDERED,
    ),
    float: ValueKind(_parse_float, "a finite number", {"type": "number"}, _ORDERED),
    Decimal: ValueKind(_parse_decimal, f"a number of at most {_MOST_DIGITS} digits", {"type": "number"}, _ORDERED),
    datetime: ValueKind(
        _parse_timestamp, "a timestamp with its offset (RFC 3339)", {"type": "string", "format": "date-time"}, _ORDERED
    ),
    date: ValueKind(date.fromisoformat, "a date (YYYY-MM-DD)", {"type": "string", "format": "date"}, _ORDERED),
    time: ValueKind(time.fromisoformat, "a time of day (HH:MM:SS)", {"type": "string"}, _ORDERED),
    UUID: ValueKind(UUID, "a UUID", {"type": "string", "format": "uuid"}, _EQUAL),
    str: TEXT,
}


def kind_of(python_type: type) -> ValueKind | None:
    """Return how values of a type are read, or None for types that have no plain text, such as JSON and bytes."""
    if issubclass(python_type, enum.Enum):
        members = {str(member.value): member for member in python_type}
        names = list(members)
        return ValueKind(
            partial(_parse_member, members), f"one of {', '.join(names)}", {"type": "string", "enum": names}, _EQUAL
        )
    return next((_KINDS[base] for base in python_type.__mro__ if base in _KINDS), None)
