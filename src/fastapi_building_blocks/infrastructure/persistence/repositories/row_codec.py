"""Rows as bytes and back: exactly the same values of exactly the same types, or none at all.

JSON with a list of what is no JSON in it. Reading runs no code that the bytes choose, as pickle would; what is not
readable, or was changed on its way, is no row.
"""

import base64
import enum
import json
import math
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from hashlib import blake2b
from typing import Any, Final
from uuid import UUID

import sqlalchemy as sa

from fastapi_building_blocks.infrastructure.database.types import BinaryString

_FORMAT: Final = "1"
"""Grows when the same row would become other bytes."""
_PLAIN: Final = frozenset({type(None), bool, int, float, str})
_DEEPEST: Final = 200
_read_json: Final = json.JSONDecoder().decode


class _Unencodable(Exception):  # noqa: N818 - a signal of this module
    """The value is of a type, or in a form, that would not come back the same."""


class RowCodec:
    """Encodes the rows of one table.

    ``version`` is another one for a table of another shape: what one program writes, another that knows the table with
    other columns or types must not read.
    """

    def __init__(self, columns: Sequence[sa.Column[Any]]) -> None:
        self._width = len(columns)
        self._enums: Mapping[int, type[enum.Enum]] = {
            place: column.type.enum_class
            for place, column in enumerate(columns)
            if isinstance(column.type, sa.Enum) and column.type.enum_class is not None
        }
        shape = "\n".join(f"{column.key} {_type_text(column.type)}" for column in columns)
        self.version = blake2b(f"{_FORMAT}\n{shape}".encode(), digest_size=8).digest()

    def encode(self, row: Sequence[Any]) -> bytes | None:
        """Return the row as bytes, or None where a value would not come back the same."""
        try:
            body = json.dumps(self._dump(row, self._enums, 0), separators=(",", ":")).encode()
        except (_Unencodable, ValueError, RecursionError):
            return None
        return zlib.crc32(body).to_bytes(4, "big") + body

    def decode(self, data: bytes) -> list[Any] | None:
        """Return the row of such bytes, or None where they are anything else."""
        body = data[4:]
        if zlib.crc32(body).to_bytes(4, "big") != data[:4]:
            return None
        try:
            values, marks = _read_json(body.decode("ascii"))
            for place, kind in marks:
                values[place] = self._enums[place][values[place]] if kind == "e" else _LOADERS[kind](values[place])
        except (ValueError, TypeError, KeyError, IndexError, ArithmeticError, RecursionError):
            return None
        return values if type(values) is list and len(values) == self._width else None

    def _dump(self, row: Sequence[Any], enums: Mapping[int, type[enum.Enum]], depth: int) -> list[Any]:
        values: list[Any] = []
        marks: list[tuple[int, str]] = []
        for place, value in enumerate(row):
            kind = type(value)
            if kind in _PLAIN:
                values.append(value)
            elif kind in _DUMPERS:
                mark, dump = _DUMPERS[kind]
                values.append(dump(value))
                marks.append((place, mark))
            elif place in enums and kind is enums[place]:
                values.append(value.name)
                marks.append((place, "e"))
            elif _is_json(value, depth):
                values.append(value)
            elif kind in (list, tuple) and depth < _DEEPEST:
                values.append(self._dump(value, {}, depth + 1))
                marks.append((place, "l" if kind is list else "t"))
            else:
                raise _Unencodable
        return [values, marks]


def _is_json(value: Any, depth: int) -> bool:
    """Whether ``json.loads`` answers the same document, types and the order of keys included."""
    kind = type(value)
    if kind in _PLAIN:
        return True
    if depth > _DEEPEST:
        return False
    if kind is list:
        return all(_is_json(item, depth + 1) for item in value)
    return kind is dict and all(type(key) is str and _is_json(item, depth + 1) for key, item in value.items())


def _zone(value: datetime | time) -> str:
    # Other zones have a history, which an offset forgets; a fold is not written down.
    if value.fold or not (value.tzinfo is None or type(value.tzinfo) is timezone):
        raise _Unencodable
    if value.tzinfo is not None and value.tzinfo != UTC and value.tzinfo.tzname(None)[:3] != "UTC":
        raise _Unencodable  # a name of its own
    return value.isoformat()


def _load_nested(encoded: Any) -> list[Any]:
    values, marks = encoded
    for place, kind in marks:
        values[place] = _LOADERS[kind](values[place])
    if type(values) is not list:
        raise ValueError
    return values


_DUMPERS: Final[Mapping[type, tuple[str, Callable[[Any], Any]]]] = {
    UUID: ("u", lambda value: value.hex),
    datetime: ("d", _zone),
    date: ("a", date.isoformat),
    time: ("i", _zone),
    timedelta: ("s", lambda value: [value.days, value.seconds, value.microseconds]),
    Decimal: ("n", str),
    bytes: ("b", lambda value: base64.b64encode(value).decode()),
}
_LOADERS: Final[Mapping[str, Callable[[Any], Any]]] = {
    "u": lambda value: UUID(int=int(value, 16)),
    "d": datetime.fromisoformat,
    "a": date.fromisoformat,
    "i": time.fromisoformat,
    "s": lambda value: timedelta(*value),
    "n": Decimal,
    "b": lambda value: base64.b64decode(value, validate=True),
    "l": _load_nested,
    "t": lambda value: tuple(_load_nested(value)),
}


def key_text(values: Sequence[Any]) -> str:
    """Return checked values of a key as text that no other values of the same columns have."""
    text = ",".join([value.hex if type(value) is UUID else repr(value) for value in values])
    if len(text) <= 100:
        return text
    return blake2b(text.encode(errors="surrogatepass"), digest_size=20).hexdigest()


def has_exact_equality(column: sa.Column[Any], dialect_name: str) -> bool:
    """Whether the database holds equal, in a WHERE, just those values of the column that are equal in Python.

    Not so for text under a collation that ignores case or trailing spaces, as MariaDB's, MySQL's and SQL Server's do,
    nor for CHAR, which PostgreSQL pads.
    """
    kind = column.type
    if isinstance(kind, sa.Uuid):
        return kind.as_uuid
    if isinstance(kind, BinaryString):
        return dialect_name != "mssql"
    if isinstance(kind, sa.CHAR | sa.NCHAR):
        return False
    if isinstance(kind, sa.String):
        plain = kind.collation is None and type(kind).__module__.startswith("sqlalchemy.sql")
        return plain and dialect_name in ("postgresql", "sqlite", "memory")
    return isinstance(kind, sa.Integer | sa.LargeBinary | sa.Boolean)


def _type_text(kind: Any) -> str:
    members = [(member.name, member.value) for member in kind.enum_class] if getattr(kind, "enum_class", None) else ""
    text = re.sub(r" at 0x[0-9a-f]+", "", repr(kind))
    return f"{type(kind).__module__}.{type(kind).__qualname__} {text} {members}"


def is_same(found: Any, wanted: Any) -> bool:
    """Whether two values of a column are one, types included."""
    return type(found) is type(wanted) and found == wanted and not (isinstance(found, float) and math.isnan(found))
