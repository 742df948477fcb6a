"""What a database does with a table's definition, for rows in memory: keys, references, defaults.

Where no table is declared, one is derived from the entity class.
"""

import enum
import inspect
import json
import re
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from types import NoneType
from typing import Any, Literal, get_args, get_origin
from uuid import UUID, uuid4

import pydantic
import sqlalchemy as sa

from fastapi_building_blocks.domain.errors import UnsupportedOperationError
from fastapi_building_blocks.infrastructure.database.in_memory_session import Collection, Reference
from fastapi_building_blocks.infrastructure.database.types import UtcDateTime, utc_now
from fastapi_building_blocks.infrastructure.persistence.repositories.field_conversions import (
    annotations_of,
    conversion_for,
    core_type,
)

_NOW = re.compile(
    r"\(*\s*(now|current_timestamp|utc_timestamp|sysutcdatetime|localtimestamp)\s*(\(\d*\))?\s*\)*", re.IGNORECASE
)
_TODAY = re.compile(r"\(*\s*(current_date|curdate)\s*(\(\))?\s*\)*", re.IGNORECASE)
_RANDOM_UUID = re.compile(r"\(*\s*(gen_random_uuid|uuid_generate_v4|uuid)\s*\(\s*\)\s*\)*", re.IGNORECASE)
_LITERAL = re.compile(
    r"\(?\s*(?:'((?:[^']|'')*)'|(-?\d+(?:\.\d+)?)|(true|false)|(null))\s*(?:::[\w ]+)?\)?", re.IGNORECASE
)


def collection_of(table: sa.Table, unique_keys: tuple[tuple[str, ...], ...]) -> Collection:
    """Return what an ``InMemorySession`` has to know of a table."""
    return Collection(
        name=table.fullname,
        fields=tuple(column.key for column in table.columns),
        unique_keys=unique_keys,
        references=tuple(
            _reference(constraint)
            for constraint in sorted(table.foreign_key_constraints, key=lambda constraint: str(constraint.column_keys))
        ),
    )


def _reference(constraint: sa.ForeignKeyConstraint) -> Reference:
    targets = [element.target_fullname.rpartition(".") for element in constraint.elements]
    on_delete = (constraint.ondelete or "").upper()
    return Reference(
        fields=tuple(element.parent.key for element in constraint.elements),
        target=targets[0][0],
        target_fields=tuple(name for _, _, name in targets),
        on_delete="CASCADE" if on_delete == "CASCADE" else "SET NULL" if on_delete == "SET NULL" else "RESTRICT",
    )


# Defaults


def database_default(column: sa.Column[Any], default: Any) -> Any:
    """Return what a database would compute for a column: a constant, its clock, a random UUID.

    Args:
        default: the column's ``server_default``, or a ``default`` or ``onupdate`` that is an expression.

    Raises:
        UnsupportedOperationError: it takes a database to compute that.
    """
    argument = getattr(default, "arg", None)
    if isinstance(argument, str):
        return _read(column, argument)
    text = argument.text if isinstance(argument, sa.TextClause) else str(argument).strip()
    if isinstance(argument, utc_now) or _NOW.fullmatch(text):
        now = datetime.now(UTC)
        return now if getattr(column.type, "timezone", False) else now.replace(tzinfo=None)
    if _TODAY.fullmatch(text):
        return datetime.now(UTC).date()
    if _RANDOM_UUID.fullmatch(text):
        return uuid4()
    found = _LITERAL.fullmatch(text)
    if argument is None or found is None:
        raise UnsupportedOperationError(
            f"{column.key}: it takes a database to compute its default; in memory, give it a value",
            fields=(column.key,),
        )
    quoted, number, truth, _ = found.groups()
    literal = number or truth if quoted is None else quoted.replace("''", "'")
    return None if literal is None else _read(column, literal)


_READERS: dict[type, Callable[[str], Any]] = {
    str: str,
    int: int,
    float: float,
    Decimal: Decimal,
    bool: lambda text: text.lower() in ("1", "true", "t"),
    datetime: datetime.fromisoformat,
    date: date.fromisoformat,
    time: time.fromisoformat,
    UUID: UUID,
}


def _read(column: sa.Column[Any], text: str) -> Any:
    if isinstance(column.type, sa.JSON):
        return json.loads(text)
    kind = column.type.python_type
    if issubclass(kind, enum.Enum):
        return kind[text]
    return _READERS.get(kind, str)(text)


# Tables of entities that have none

_COLUMN_TYPES: dict[type, Callable[[], sa.types.TypeEngine[Any]]] = {
    str: sa.String,
    bool: sa.Boolean,
    int: sa.BigInteger,
    float: sa.Double,
    Decimal: sa.Numeric,
    datetime: UtcDateTime,
    date: sa.Date,
    time: sa.Time,
    timedelta: sa.Interval,
    UUID: sa.Uuid,
    bytes: sa.LargeBinary,
}


class AnyValue(sa.types.TypeDecorator[Any]):
    """Holds a value of a class that has no column type of its own; it is copied, and not compared but for equality."""

    impl = sa.LargeBinary
    cache_ok = True

    @property
    def python_type(self) -> type[Any]:
        return object


def derived_table(entity_class: type, id_field: str, unique: Iterable[tuple[str, ...]]) -> sa.Table:
    """Return a table for the fields of an entity class; an optional field is a nullable column.

    Raises:
        TypeError: the class declares no fields, or not the ones that the keys name.
    """
    annotations = _fields_of(entity_class)
    unique_keys = [tuple(names) for names in unique]
    for name in (id_field, *(name for names in unique_keys for name in names)):
        if name not in annotations:
            raise TypeError(
                f"{entity_class.__name__} has no field {name!r}; its fields are {', '.join(annotations) or 'none'}. "
                "Say id_field and unique, or give the repository a table"
            )
    columns = [_column(name, annotation, name == id_field) for name, annotation in annotations.items()]
    return sa.Table(
        entity_class.__qualname__, sa.MetaData(), *columns, *(sa.UniqueConstraint(*names) for names in unique_keys)
    )


def _fields_of(entity_class: type) -> Mapping[str, Any]:
    found = annotations_of(entity_class)
    attributes: Any = getattr(entity_class, "__attrs_attrs__", None)
    if attributes is not None:
        return {attribute.alias: found.get(attribute.name, Any) for attribute in attributes}
    if found or entity_class.__init__ is object.__init__:  # type: ignore[misc]
        return {name: annotation for name, annotation in found.items() if "ClassVar" not in str(annotation)}
    # A class with mappers written by hand has at least a constructor.
    parameters = list(inspect.signature(entity_class).parameters.values())
    return {
        parameter.name: Any if parameter.annotation is parameter.empty else parameter.annotation
        for parameter in parameters
    }


def _column(name: str, annotation: Any, is_key: bool) -> sa.Column[Any]:
    optional = annotation is Any or annotation is None or NoneType in get_args(annotation)
    kind = _column_type(core_type(annotation))
    column: sa.Column[Any] = sa.Column(name, kind, primary_key=is_key, nullable=optional and not is_key)
    try:
        conversion_for(name, annotation, column)
    except TypeError:
        return sa.Column(name, AnyValue(), primary_key=is_key, nullable=optional and not is_key)
    return column


def _column_type(core: Any) -> sa.types.TypeEngine[Any]:
    if get_origin(core) is Literal:
        core = type(get_args(core)[0])
    if not isinstance(core, type):
        return AnyValue() if core is Any else sa.JSON()
    if issubclass(core, enum.Enum):
        kinds = {type(member.value) for member in core}
        return _COLUMN_TYPES.get(kinds.pop(), AnyValue)() if len(kinds) == 1 else AnyValue()
    if core is pydantic.EmailStr or issubclass(core, pydantic.SecretStr):
        return sa.String()
    for kind, column_type in _COLUMN_TYPES.items():
        if issubclass(core, kind) and not (kind is date and issubclass(core, datetime)):
            return column_type()
    return AnyValue() if core is object else sa.JSON()
