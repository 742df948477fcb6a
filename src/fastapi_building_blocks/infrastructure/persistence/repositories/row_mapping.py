"""Mappers between rows and entities, derived from table and class and generated as source once per repository class.

Positional generated code costs a fraction of ``row.name`` or ``dataclasses.asdict``: the speed of a page of rows is
decided here. What is generated trusts the database when it loads (no validation, but ``__post_init__`` runs) and checks
every value by the column rules when it writes.
"""

import keyword
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Final, Generic, Self, TypeVar

import sqlalchemy as sa
from sqlalchemy.types import TypeDecorator

from fastapi_building_blocks.domain.errors import InvalidInputError
from fastapi_building_blocks.infrastructure.database.plain_types import INLINED, INLINED_NAMES
from fastapi_building_blocks.infrastructure.database.types import BinaryString, ExactDecimal, UtcDateTime
from fastapi_building_blocks.infrastructure.persistence.repositories.column_rules import check_value, inline_check
from fastapi_building_blocks.infrastructure.persistence.repositories.entity_classes import (
    EntityField,
    Names,
    construction_source,
    matching_fields,
    read_source,
)
from fastapi_building_blocks.infrastructure.persistence.repositories.field_conversions import (
    Conversion,
    annotations_of,
    conversion_for,
)

T = TypeVar("T")

Processor = Callable[[Any], Any]


class _Missing:
    """The type of ``MISSING``."""

    def __repr__(self) -> str:
        return "MISSING"

    # It is known by its identity: a copy is the same one.

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: Any) -> Self:
        return self

    def __reduce__(self) -> str:
        return "MISSING"


MISSING: Final = _Missing()
"""Stands in a dumped row for a field that a hand-written ``_entity_to_dict`` left out."""


class Row:
    """A row for a hand-written ``_row_to_entity``: ``row.name``, ``row["name"]``, ``row[0]``, ``dict(row)``."""

    __slots__ = ()
    _names: ClassVar[tuple[str, ...]] = ()
    _slots: ClassVar[Mapping[str, str]] = {}

    def __getitem__(self, key: str | int) -> Any:
        if isinstance(key, str):
            return getattr(self, self._slots[key])
        return getattr(self, self._slots[self._names[key]])

    def __iter__(self) -> Iterator[Any]:
        return (getattr(self, self._slots[name]) for name in self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __repr__(self) -> str:
        return f"Row({dict(zip(self._names, self, strict=True))!r})"

    def keys(self) -> tuple[str, ...]:
        """Return the names of the columns in table order."""
        return self._names


class RowMapping(Generic[T]):
    """Turns entities into rows and rows into entities, both ways derived unless written by hand.

    Args:
        entity_class: a dataclass, a Pydantic model or an attrs class; anything at all with both mappers.
        table: must have a primary key.
        row_to_entity: takes a ``Row``; derived where None.
        entity_to_dict: answers column key to value, may leave columns out; derived where None.

    Raises:
        ValueError: the table has no primary key.
        TypeError: the fields of the class and the columns of the table differ; the message names both sides.
    """

    def __init__(
        self,
        entity_class: type[T],
        table: sa.Table,
        row_to_entity: Callable[[Any], T] | None = None,
        entity_to_dict: Callable[[T], Mapping[str, Any]] | None = None,
    ) -> None:
        self.table = table
        self.columns: tuple[sa.Column[Any], ...] = tuple(table.columns)
        self.names: tuple[str, ...] = tuple(column.key for column in self.columns)
        self.key_names: tuple[str, ...] = tuple(column.key for column in table.primary_key.columns)
        if not self.key_names:
            raise ValueError(f"table {table.name!r} has no primary key, so its rows cannot be told apart")
        self.key_indexes: tuple[int, ...] = tuple(self.names.index(name) for name in self.key_names)
        self._entity_class = entity_class
        self._row_to_entity = row_to_entity
        self._entity_to_dict = entity_to_dict
        self._fields: dict[str, EntityField] = {}
        self._conversions: dict[str, Conversion] = {}
        if row_to_entity is None or entity_to_dict is None:
            self._derive()
        self._row_class = _row_class(self.names) if row_to_entity is not None else None
        self._load: Callable[[Iterable[Any]], T] | None = None
        self.dump: Callable[[T], tuple[Any, ...]] = self._make_dump()
        """Return the checked values of an entity in column order.

        Raises:
            InvalidInputError: a column cannot hold its value; the error names the field.
        """
        self.key_of: Callable[[T], Any] = self._make_key_of()
        """Return the checked key of an entity: a scalar, or a tuple where it is composite."""
        self._checks = {name: self._make_check(name) for name in self.names}

    def load(self, row: Iterable[Any]) -> T:
        """Return the derived entity of a row in Python values, for a hand-written ``_row_to_entity`` that extends it.

        Raises:
            TypeError: the fields of the class and the columns of the table differ.
        """
        if self._load is None:
            self._derive()
            names, body = self._converted_source()
            lines = ["def load(row):", f" {self._targets()} = row", *(f" {line}" for line in body), " return e"]
            self._load = _generated("load", lines, names)
        return self._load(row)

    def to_dict(self, entity: T) -> dict[str, Any]:
        """Return the derived column values of an entity, for a hand-written ``_entity_to_dict`` that extends it.

        Raises:
            TypeError: the fields of the class and the columns of the table differ.
        """
        self._derive()
        values = {}
        for name, field in self._fields.items():
            value = getattr(entity, field.attribute)
            conversion = self._conversions.get(name)
            values[name] = value if value is None or conversion is None else conversion.dump(value)
        return values

    def _derive(self) -> None:
        if not self._fields:
            self._fields = matching_fields(self._entity_class, self.table)
            self._conversions = _conversions(self._entity_class, self._fields, self.table)

    def check(self, name: str, value: Any) -> Any:
        """Return the value to store in one column, for a partial update.

        Raises:
            InvalidInputError: there is no such field, or it cannot hold the value.
        """
        try:
            check = self._checks[name]
        except (KeyError, TypeError):
            raise InvalidInputError(f"{name}: there is no such field", fields=(str(name),)) from None
        return check(value)

    def loader(self, processors: Sequence[Processor | None]) -> Callable[[Iterable[Sequence[Any]]], list[T]]:
        """Return a function from positional rows, in column order, to entities.

        Args:
            processors: SQLAlchemy's result processor of each column; None where the driver answers the value itself.
        """
        names, body = self._load_source(processors)
        lines = [
            "def load(rows):",
            " entities = []",
            " add = entities.append",
            f" for {self._targets()} in rows:",
            *(f"  {line}" for line in body),
            "  add(e)",
            " return entities",
        ]
        load: Callable[[Iterable[Sequence[Any]]], list[T]] = _generated("load", lines, names)
        return load

    def one(self, processors: Sequence[Processor | None]) -> Callable[[Sequence[Any]], T]:
        """Return the same as ``loader`` for a single row."""
        names, body = self._load_source(processors)
        lines = ["def load(row):", f" {self._targets()} = row", *(f" {line}" for line in body), " return e"]
        load: Callable[[Sequence[Any]], T] = _generated("load", lines, names)
        return load

    def values(self, processors: Sequence[Processor | None]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
        """Return a function from a positional row to its Python values, of which ``one([None, ...])`` makes the entity."""
        names, body = self._process_source(processors)
        result = self._targets()
        lines = ["def values(row):", f" {result} = row", *(f" {line}" for line in body), f" return ({result})"]
        values: Callable[[Sequence[Any]], tuple[Any, ...]] = _generated("values", lines, names)
        return values

    # Writing

    def _make_dump(self) -> Callable[[T], tuple[Any, ...]]:
        names, lines = self._dump_source(self.names)
        result = "".join(f"v{self.names.index(name)}, " for name in self.names)
        dump: Callable[[T], tuple[Any, ...]] = _generated(
            "dump", ["def dump(e):", *lines, f" return ({result})"], names
        )
        return dump

    def _make_key_of(self) -> Callable[[T], Any]:
        names, lines = self._dump_source(self.key_names)
        places = [f"v{index}" for index in self.key_indexes]
        result = places[0] if len(places) == 1 else f"({', '.join(places)})"
        key_of: Callable[[T], Any] = _generated("key_of", ["def key_of(e):", *lines, f" return {result}"], names)
        return key_of

    def _make_check(self, name: str) -> Callable[[Any], Any]:
        names, lines = self._check_source(name, "v is not None")
        check: Callable[[Any], Any] = _generated("check", ["def check(v):", *lines, " return v"], names)
        return check

    def _dump_source(self, wanted: Iterable[str]) -> tuple[Names, list[str]]:
        """Return the lines that leave the checked value of each wanted column in ``v<index>``."""
        names: Names = {}
        lines: list[str] = []
        derived = self._entity_to_dict is None
        if not derived:
            names |= {"to_dict": self._entity_to_dict, "MISSING": MISSING, "known": frozenset(self.names)}
            names["refuse"] = self._refuse_unknown
            lines += [" d = to_dict(e)", " if not known.issuperset(d): refuse(d)"]
        for name in wanted:
            if derived:
                lines.append(f" v = {read_source(self._fields[name].attribute)}")
            else:
                lines += [f" try: v = d[{name!r}]", " except KeyError: v = MISSING"]
            needed, checks = self._check_source(
                name, "v is not None" if derived else "v is not None and v is not MISSING"
            )
            names |= needed
            lines += [*checks, f" v{self.names.index(name)} = v"]
        return names, lines

    def _check_source(self, name: str, guard: str) -> tuple[Names, list[str]]:
        """Return the lines that convert and check ``v``, a value of one column, where ``guard`` is true."""
        index = self.names.index(name)
        column = self.columns[index]
        names: Names = {"check_value": check_value, f"c{index}": column}
        lines = []
        conversion = self._conversions.get(name) if self._entity_to_dict is None else None
        if conversion is not None:
            names[f"k{index}"] = conversion.dump
            lines.append(f" if {guard}: v = k{index}(v)")
        inline = inline_check(column)
        if inline is not None:
            expression, needed = inline
            names |= needed
            guard = f"not ({expression}) and {guard}"
        lines.append(f" if {guard}: v = check_value(c{index}, v)")
        return names, lines

    def _refuse_unknown(self, values: Mapping[str, Any]) -> None:
        unknown = sorted(str(name) for name in set(values) - set(self.names))
        raise TypeError(
            f"_entity_to_dict() of {self._entity_class.__name__} answers {', '.join(unknown)}, "
            f"which table {self.table.name!r} has no columns for (it has {', '.join(self.names)})"
        )

    # Loading

    def _targets(self) -> str:
        return "".join(f"v{index}, " for index in range(len(self.columns))).rstrip()

    def _process_source(self, processors: Sequence[Processor | None]) -> tuple[Names, list[str]]:
        """Return the lines that make Python values of the driver's in ``v0``, ``v1``..."""
        names: Names = {}
        lines: list[str] = []
        for index, (column, processor) in enumerate(zip(self.columns, processors, strict=True)):
            place = f"v{index}"
            if processor is None:
                continue
            if processor in INLINED:
                names |= INLINED_NAMES
                lines.append(f"if {place} is not None:")
                lines += [f" {line.format(v=place)}" for line in INLINED[processor]]
            else:
                names[f"p{index}"] = processor
                always = not column.nullable or _maps_none(column)
                lines.append(f"{'' if always else f'if {place} is not None: '}{place} = p{index}({place})")
        return names, lines

    def _load_source(self, processors: Sequence[Processor | None]) -> tuple[Names, list[str]]:
        """Return the lines that make the entity ``e`` of ``v0``, ``v1``..."""
        names, lines = self._process_source(processors)
        if self._row_class is None:
            more, made = self._converted_source()
            return names | more, lines + made
        names |= {"new": object.__new__, "R": self._row_class, "to_entity": self._row_to_entity}
        lines.append("r = new(R)")
        for index, name in enumerate(self.names):
            slot = self._row_class._slots[name]
            if keyword.iskeyword(slot):
                names[f"put{index}"] = vars(self._row_class)[slot].__set__
                lines.append(f"put{index}(r, v{index})")
            else:
                lines.append(f"r.{slot} = v{index}")
        lines.append("e = to_entity(r)")
        return names, lines

    def _converted_source(self) -> tuple[Names, list[str]]:
        """Return the lines that make the derived entity ``e`` of Python values in ``v0``, ``v1``..."""
        names: Names = {}
        lines: list[str] = []
        attributes = {}
        for index, column in enumerate(self.columns):
            place = f"v{index}"
            attributes[self._fields[column.key].attribute] = place
            conversion = self._conversions.get(column.key)
            if conversion is not None:
                names[f"k{index}"] = conversion.load
                called = f"k{index}[{place}]" if isinstance(conversion.load, dict) else f"k{index}({place})"
                lines.append(f"{f'if {place} is not None: ' if column.nullable else ''}{place} = {called}")
        late = [field.attribute for field in self._fields.values() if not field.init]
        made, more = construction_source(self._entity_class, attributes, late)
        return names | more, lines + made


def _generated(name: str, lines: list[str], names: Names) -> Any:
    exec(compile("\n".join(lines), f"<generated {name}>", "exec"), names)  # noqa: S102 - from identifiers only
    return names[name]


_OWN_TYPES = (UtcDateTime, ExactDecimal, BinaryString)


def _maps_none(column: sa.Column[Any]) -> bool:
    """Whether NULL means something else to the column's type, which only a service's own decorator decides.

    All others have None for NULL; ``sa.JSON`` too, which would otherwise write None as the document ``null``.
    """
    return isinstance(column.type, TypeDecorator) and not isinstance(column.type, _OWN_TYPES)


def _row_class(names: tuple[str, ...]) -> type[Row]:
    slots = {
        name: name
        if name.isidentifier() and not name.startswith("__") and not hasattr(Row, name)
        else f"column_{index}_"
        for index, name in enumerate(names)
    }
    return type("Row", (Row,), {"__slots__": tuple(slots.values()), "_names": names, "_slots": slots})


def _conversions(entity_class: type[Any], fields: Mapping[str, EntityField], table: sa.Table) -> dict[str, Conversion]:
    annotations = annotations_of(entity_class)
    found = {}
    for name, field in fields.items():
        conversion = conversion_for(name, annotations.get(field.attribute, Any), table.columns[name])
        if conversion is not None:
            found[name] = conversion
    return found
