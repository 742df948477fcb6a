"""What a repository declares about its entity and its table, checked once per class, on every store.

A declaration and the checks, orders and pages that follow from it stay in one place, so that no store has its own.
"""

import copy
import enum
import sys
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from typing import Any, ClassVar, Final, ForwardRef, Generic, Literal, Self, TypeVar, get_args, get_origin
from uuid import UUID

import sqlalchemy as sa

from fastapi_building_blocks.domain.errors import (
    InvalidInputError,
    InvalidQueryError,
    MultipleResultsError,
    NotFoundError,
    StaleVersionError,
    UnsupportedOperationError,
)
from fastapi_building_blocks.domain.query import (
    And,
    Comparison,
    Criterion,
    CursorPage,
    CursorRequest,
    Not,
    Or,
    Page,
    PageRequest,
    Sort,
    decode_cursor,
    encode_cursor,
    sorts,
)
from fastapi_building_blocks.domain.repository import Lock, Repository, SortKeys
from fastapi_building_blocks.infrastructure.database.session import DatabaseSession
from fastapi_building_blocks.infrastructure.persistence.repositories.field_conversions import annotations_of, core_type
from fastapi_building_blocks.infrastructure.persistence.repositories.row_mapping import RowMapping

T = TypeVar("T")

Fill = Literal["now", "database"] | Callable[[], Any]
"""What fills a column that an entity leaves None: the clock, the database, or a default of Python's."""
IMMUTABLE: Final = frozenset({type(None), bool, int, float, str, bytes, Decimal, UUID, datetime, date, time, timedelta})
"""Types whose values may be shared."""


@dataclass(frozen=True)
class Declaration(Generic[T]):
    """A repository class as its attributes declare it: what can be known before there is a session."""

    entity_class: type[T]
    table: sa.Table
    mapping: RowMapping[T]
    """The mappers; what is written by hand is left to the repository: rows in place of entities, dicts likewise."""
    reads_by_hand: bool
    """Whether ``_row_to_entity`` is overridden, so that ``mapping`` loads named rows for it."""
    writes_by_hand: bool
    """Whether ``_entity_to_dict`` is overridden, so that ``mapping`` dumps what it answers."""
    key: tuple[str, ...]
    unique_keys: tuple[tuple[str, ...], ...]
    """The primary key first, then every unique constraint and unique index on plain columns."""
    field_types: Mapping[str, type]
    """What may be filtered and sorted, with its Python type."""
    kept_by_update: frozenset[str]
    """Columns that ``update`` never takes from the entity: key, version, creation time, those never written."""
    never_written: frozenset[str]
    """Columns that the database alone writes: computed ones, and ``Identity(always=True)`` outside the key."""
    fills: tuple[tuple[int, "Fill"], ...]
    """The places of columns that ``add`` may leave to be filled, and by what."""
    update_fills: Mapping[str, Callable[[], Any]]
    """What computes the columns that change with every update, unless given."""
    mutable: tuple[int, ...]
    """The places of columns whose values a caller could change from outside."""
    deleted_flag: bool
    """Whether ``soft_delete_column`` is a boolean instead of a nullable timestamp."""


@dataclass(frozen=True, slots=True)
class Position:
    """Where a keyset page begins: behind the row with these sort keys, or before it; without any, at that end."""

    values: tuple[Any, ...]
    backwards: bool


class DeclaredRepository(Repository[T]):
    """The part of a repository that follows from its declaration and is the same on every store.

    A subclass names its entity and its table, ``class UserRepository(SQLAlchemyRepository[User])`` with
    ``table = users``. A declaration that contradicts itself is a ``TypeError`` when the class is made, or at
    first use where the entity class is not known before.
    """

    table: ClassVar[sa.Table]
    """The table whose columns are the entity's fields."""

    _declared: ClassVar[Declaration[Any]]

    def __init__(self, session: DatabaseSession) -> None:
        if not isinstance(session, DatabaseSession):
            raise TypeError(
                f"{type(self).__name__} runs on a session or a unit of work, not on {type(session).__name__}"
            )
        self._session = session
        self._deleted_too = False
        self._declaration: Declaration[T] = self.declaration()
        self._mapping: RowMapping[T] = self._declaration.mapping

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if isinstance(getattr(cls, "table", None), sa.Table) and cls._entity_class(at_first_use=False) is not None:
            cls.declaration()

    # Mappers

    def _row_to_entity(self, row: Any) -> T:
        """Return the entity of a row, readable as ``row.name`` and ``row["name"]``; override to map by hand."""
        return self._declaration.mapping.load(row)

    def _entity_to_dict(self, entity: T) -> dict[str, Any]:
        """Return the column values of an entity; override to map by hand."""
        return self._declaration.mapping.to_dict(entity)

    def _dump(self, entity: T) -> tuple[Any, ...]:
        """Return the checked values of an entity in column order."""
        declaration = self._declaration
        return declaration.mapping.dump(self._entity_to_dict(entity) if declaration.writes_by_hand else entity)  # type: ignore[arg-type]

    def _entity(self, loaded: T) -> T:
        """Return the entity of what the mapping loaded: that itself, or a row to be mapped by hand."""
        return self._row_to_entity(loaded) if self._declaration.reads_by_hand else loaded

    def _entities(self, loaded: list[T]) -> list[T]:
        """Return ``_entity`` of each."""
        return [self._row_to_entity(row) for row in loaded] if self._declaration.reads_by_hand else loaded

    # The declaration

    @classmethod
    def declaration(cls) -> Declaration[Any]:
        """Return what this class declares.

        Raises:
            TypeError: it contradicts itself: an attribute names no column, the entity does not match the table.
        """
        if "_declared" not in cls.__dict__:
            entity_class = cls._entity_class(at_first_use=True)
            cls._declared = cls._declare(entity_class, cls._table_for(entity_class))
        return cls._declared

    @classmethod
    def field_types(cls) -> Mapping[str, type]:
        return cls.declaration().field_types

    @classmethod
    def _table_for(cls, entity_class: type) -> sa.Table:  # noqa: ARG003 - a store without tables derives one from it
        table = getattr(cls, "table", None)
        if not isinstance(table, sa.Table):
            raise TypeError(f"{cls.__name__}.table must be a SQLAlchemy Table")
        return table

    @classmethod
    def _entity_class(cls, at_first_use: bool) -> Any:
        argument = _entity_argument(cls)
        if isinstance(argument, type):
            return argument
        origin = get_origin(argument)
        if isinstance(origin, type):
            return origin
        if all(cls._by_hand()):
            return object
        if not at_first_use:
            return None
        base = next(base.__name__ for base in cls.__mro__ if base.__module__ != cls.__module__)
        raise TypeError(f"{cls.__name__} does not say what it stores: derive it from {base}[YourEntity]")

    @classmethod
    def _declare(cls, entity_class: type, table: sa.Table) -> Declaration[Any]:
        columns = {column.key: column for column in table.columns}
        key = tuple(column.key for column in table.primary_key.columns)
        if not key:
            raise TypeError(f"{cls.__name__}: table {table.name!r} has no primary key")
        cls._check_attributes(columns)
        cls._check_column_kinds(columns)
        hidden = frozenset(cls.hidden_columns)
        reads, writes = cls._by_hand()
        annotations = annotations_of(entity_class)
        mapping: RowMapping[Any] = RowMapping(entity_class, table, _same if reads else None, _same if writes else None)
        never_written = frozenset(
            name
            for name, column in columns.items()
            if column.computed is not None
            or (name not in key and column.identity is not None and column.identity.always)
        )
        kept = {*key, cls.version_column, cls.created_at_column, *never_written}
        return Declaration(
            entity_class=entity_class,
            table=table,
            mapping=mapping,
            reads_by_hand=reads,
            writes_by_hand=writes,
            fills=cls._fills(mapping),
            update_fills={
                name: _python_default(mapping, column, column.onupdate)
                for name, column in columns.items()
                if column.onupdate is not None and not _in_sql(column.onupdate)
            },
            mutable=tuple(place for place, column in enumerate(mapping.columns) if is_mutable(column)),
            key=key,
            unique_keys=_unique_keys(table, key),
            field_types={
                name: _field_type(column, annotations.get(name))
                for name, column in columns.items()
                if name not in hidden
            },
            kept_by_update=frozenset(name for name in kept if name),
            never_written=never_written,
            deleted_flag=cls.soft_delete_column is not None
            and isinstance(columns[cls.soft_delete_column].type, sa.Boolean),
        )

    @classmethod
    def _by_hand(cls) -> tuple[bool, bool]:
        """Say which of the two mappers is overridden: reading, writing."""
        return (
            cls._row_to_entity is not DeclaredRepository._row_to_entity,
            cls._entity_to_dict is not DeclaredRepository._entity_to_dict,
        )

    @classmethod
    def _fills(cls, mapping: RowMapping[Any]) -> tuple[tuple[int, "Fill"], ...]:
        automatic = mapping.table.autoincrement_column
        fills: list[tuple[int, Fill]] = []
        for place, column in enumerate(mapping.columns):
            if column.key in (cls.created_at_column, cls.updated_at_column):
                fills.append((place, "now"))
            elif column.key == cls.version_column:
                fills.append((place, lambda: 1))
            elif column.default is not None and not _in_sql(column.default):
                fills.append((place, _python_default(mapping, column, column.default)))
            elif column.key == cls.soft_delete_column:
                mark = False if isinstance(column.type, sa.Boolean) else None
                fills.append((place, _constant(mark)))
            elif (
                column.default is not None
                or column.server_default is not None
                or column.computed is not None
                or column.identity is not None
                or column is automatic
            ):
                fills.append((place, "database"))
        return tuple(fills)

    @classmethod
    def _check_attributes(cls, columns: Mapping[str, sa.Column[Any]]) -> None:
        named: dict[str, Collection[str]] = {"hidden_columns": cls.hidden_columns}
        for attribute in ("version_column", "soft_delete_column", "created_at_column", "updated_at_column"):
            name = getattr(cls, attribute)
            named[attribute] = () if name is None else (name,)
        for attribute in ("filterable_fields", "sortable_fields", "search_fields"):
            named[attribute] = getattr(cls, attribute) or ()
        for attribute, names in named.items():
            if isinstance(names, str):
                raise TypeError(f"{cls.__name__}.{attribute} is a collection of names, not one string")
            for name in names:
                if name not in columns:
                    raise TypeError(
                        f"{cls.__name__}.{attribute} names {name!r}, which is not one of the columns {list(columns)}"
                    )
                if attribute.endswith("_fields") and name in cls.hidden_columns:
                    raise TypeError(f"{cls.__name__}.{attribute} names {name!r}, which hidden_columns hides")

    @classmethod
    def _check_column_kinds(cls, columns: Mapping[str, sa.Column[Any]]) -> None:
        if cls.version_column and not isinstance(columns[cls.version_column].type, sa.Integer):
            raise TypeError(f"{cls.__name__}.version_column names {cls.version_column!r}, which is not an integer")
        for attribute in ("soft_delete_column", "created_at_column", "updated_at_column"):
            name = getattr(cls, attribute)
            if name is None:
                continue
            kind = _python_type(columns[name])
            flag = attribute == "soft_delete_column" and kind is bool
            if not flag and not (kind is datetime and getattr(columns[name].type, "timezone", False)):
                raise TypeError(f"{cls.__name__}.{attribute} names {name!r}, which is no timestamp with a UTC offset")
            if attribute == "soft_delete_column" and not flag and not columns[name].nullable:
                raise TypeError(f"{cls.__name__}.{attribute} names {name!r}, which must be nullable")

    # What the methods of every store share

    async def get(self, id: Any) -> T:
        entity = await self.get_by_id(id)
        if entity is None:
            raise self._missing()
        return entity

    async def find_one(self, *criteria: Any, lock: Lock | None = None) -> T | None:
        found = await self.get_all(*criteria, limit=2, lock=lock)
        if len(found) > 1:
            raise MultipleResultsError(f"more than one {self._declaration.entity_class.__name__} matches")
        return found[0] if found else None

    def including_deleted(self) -> Self:
        view = copy.copy(self)
        view._deleted_too = True
        return view

    # What a cache in front of a repository keeps: rows as Python values, which are plain, whatever the entity is

    @abstractmethod
    async def _rows_by(self, names: tuple[str, ...], keys: Sequence[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
        """Return the rows with these values of a unique key, in any order, soft-deleted ones included.

        Args:
            names: the primary key, or another unique key as the declaration spells it.
            keys: checked values; of another key than the primary one, a single key.
        """

    @abstractmethod
    def _entity_of(self, row: Sequence[Any]) -> T:
        """Return a new entity of a row of Python values, which nobody else holds."""

    def _missing(self) -> NotFoundError:
        return NotFoundError(f"no {self._declaration.entity_class.__name__} has this key", fields=self._declaration.key)

    def _stale(self) -> StaleVersionError:
        return StaleVersionError(
            f"the {self._declaration.entity_class.__name__} has changed since this version of it was read",
            fields=(self.version_column or "",),
        )

    def _key_values(self, id: Any) -> tuple[Any, ...]:
        """Return a key, as ``get_by_id`` takes it, as checked values in the order of the key's columns."""
        key = self._declaration.key
        values = (id,) if len(key) == 1 else id
        if not isinstance(values, tuple) or len(values) != len(key):
            raise TypeError(
                f"a key of {self._declaration.table.name} is a tuple of {len(key)} values: {', '.join(key)}"
            )
        return tuple(self._mapping.check(name, value) for name, value in zip(key, values, strict=True))

    def _order(self, sort: SortKeys) -> tuple[Sort, ...]:
        """Return a total order: what was asked for, each field once, closed by the primary key."""
        order: dict[str, Sort] = {}
        for key in sorts(sort):
            self._require_field(key.field)
            if isinstance(self._declaration.table.columns[key.field].type, sa.JSON):
                raise InvalidQueryError(f"{key.field}: a JSON field has no order", fields=(key.field,))
            order.setdefault(key.field, key)
        # In the direction of the last key: an index on that, with the primary key behind it, then answers both.
        descending = bool(order) and next(reversed(order.values())).descending
        for name in self._declaration.key:
            order.setdefault(name, Sort(name, descending))
        return tuple(order.values())

    def _require_field(self, name: str) -> None:
        if name not in self._declaration.field_types:
            # A hidden field is answered like one that does not exist: it is nobody's business.
            raise InvalidQueryError(f"there is no field {name!r} to filter or sort by", fields=(str(name),))

    def _require_fields(self, criterion: Criterion) -> None:
        """Check that every field of a criterion is known and not hidden."""
        if isinstance(criterion, Comparison):
            self._require_field(criterion.field)
        elif isinstance(criterion, And | Or):
            for part in criterion.parts:
                self._require_fields(part)
        elif isinstance(criterion, Not):
            self._require_fields(criterion.part)

    def _require_criteria(self, criteria: Sequence[Any], everything: bool) -> None:
        if not criteria and not everything:
            raise ValueError("without criteria this would touch every entity: say everything=True if that is meant")

    def _require_transaction(self, lock: Lock | None) -> None:
        if lock not in (None, "update", "nowait", "skip_locked"):
            raise ValueError("lock is 'update', 'nowait' or 'skip_locked'")
        if lock is not None and not self._session.in_transaction:
            raise RuntimeError("a lock ends with its transaction: ask for it inside a unit of work")
        if lock is not None and self._session.read_only:
            raise UnsupportedOperationError("a read-only transaction takes no locks")

    def _require_window(self, limit: int | None, offset: int) -> None:
        """Check ``limit`` and ``offset`` as ``get_all`` takes them: zero is fine, unlike in a page."""
        for name, value in (("limit", limit), ("offset", offset)):
            if value is None and name == "limit":
                continue
            if type(value) is not int or not 0 <= value < 2**63:
                raise InvalidQueryError(f"{name} must be a whole number from 0", fields=(name,))

    def _changes(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return what ``patch`` and ``update_where`` are to write, checked; the version and timestamp not yet in it."""
        if not isinstance(values, Mapping):
            raise TypeError(f"the values to write are a dict of field name to value, not {type(values).__name__}")
        if not values:
            raise InvalidInputError("there is nothing to change")
        fixed = {*self._declaration.key, self.version_column}
        columns = self._declaration.table.columns
        for name in values:
            if not isinstance(name, str) or name not in columns or name in self._declaration.never_written:
                raise InvalidInputError(f"there is no field {name!r} to write", fields=(str(name),))
            if name in fixed:
                raise InvalidInputError(f"{name} cannot be changed", fields=(name,))
        return {name: self._mapping.check(name, value) for name, value in values.items()}

    def _conflict_key(self, on: Sequence[str] | None) -> tuple[str, ...]:
        """Return the unique key that ``on`` names, in its declared order; None: the primary key."""
        if on is None:
            return self._declaration.key
        if isinstance(on, str):
            raise TypeError("on= is a list of field names, not one string")
        for unique in self._declaration.unique_keys:
            if set(unique) == set(on):
                return unique
        raise ValueError(f"on={list(on)} is no unique key of {self._declaration.table.name}")

    def _require_soft_delete(self) -> str:
        if self.soft_delete_column is None:
            raise TypeError(f"{type(self).__name__} declares no soft_delete_column, so nothing can be restored")
        return self.soft_delete_column

    def _deleted_mark(self, deleted: bool) -> Any:
        """Return what ``soft_delete_column`` holds for a deleted entity, or for one that is not."""
        if self._declaration.deleted_flag:
            return deleted
        return self._now() if deleted else None

    def _now(self) -> datetime:
        return datetime.now(UTC)

    # Pages

    def _page(self, request: PageRequest, found: list[T], counted: int | None) -> Page[T]:
        """Assemble a page.

        Args:
            found: up to ``limit + 1`` entities from the offset on; the one too many says that there is a next page.
            counted: the count by the request's mode; up to ``count_cap + 1`` where it is capped.
        """
        seen = request.offset + len(found) if found else 0
        capped = request.count == "capped" and counted is not None and counted > request.count_cap
        total = request.count_cap if capped else counted
        if request.count == "estimated" and total is not None:
            total = max(total, seen)
        return Page(
            items=found[: request.limit],
            total=total,
            limit=request.limit,
            offset=request.offset,
            has_next=len(found) > request.limit,
            has_prev=request.offset > 0,
            total_is_capped=capped,
        )

    def _position(self, request: CursorRequest, order: Sequence[Sort], query: str) -> Position | None:
        """Return where the page begins; None: at the start. ``query`` is text that identifies the query."""
        if request.cursor is None:
            return None
        values, backwards = decode_cursor(request.cursor, query=query, width=len(order))
        checked = tuple(
            None if value is None else self._cursor_value(key.field, value)
            for key, value in zip(order, values, strict=bool(values))
        )
        return Position(checked, backwards)

    def _cursor_value(self, name: str, value: Any) -> Any:
        try:
            return self._mapping.check(name, value)
        except InvalidInputError as error:
            raise InvalidQueryError("the cursor is not one that this list has given out", fields=("cursor",)) from error

    def _cursor_page(
        self,
        request: CursorRequest,
        position: Position | None,
        found: list[tuple[T, tuple[Any, ...]]],
        query: str,
    ) -> CursorPage[T]:
        """Assemble a keyset page.

        Args:
            found: up to ``limit + 1`` entities in the direction of reading, each with its sort keys.
        """
        more = len(found) > request.limit
        found = found[: request.limit]
        backwards = position is not None and position.backwards
        if backwards:
            found.reverse()
        inner = position is not None and bool(position.values)
        has_prev, has_next = (more, inner) if backwards else (inner, more)
        if not found and inner:
            # Everything beyond the cursor was deleted meanwhile: the way back begins at that end of the list.
            end = encode_cursor((), query=query, backwards=not backwards)
            return CursorPage([], end, None) if backwards else CursorPage([], None, end)
        if not found:
            return CursorPage([], None, None)
        return CursorPage(
            items=[entity for entity, _ in found],
            next_cursor=encode_cursor(found[-1][1], query=query, backwards=False) if has_next else None,
            prev_cursor=encode_cursor(found[0][1], query=query, backwards=True) if has_prev else None,
        )

    # mypy and readers see here that a store has still to supply the rest of the contract.
    @abstractmethod
    async def get_by_id(self, id: Any, *, lock: Lock | None = None) -> T | None: ...


def _same(value: Any) -> Any:
    return value


def _in_sql(default: Any) -> bool:
    """Whether a column's default is computed by the database, as part of the statement."""
    return bool(default.is_clause_element or default.is_sequence)


def _python_default(mapping: RowMapping[Any], column: sa.Column[Any], default: Any) -> Callable[[], Any]:
    name = column.key
    if default.is_callable:
        return lambda: mapping.check(name, default.arg(None))
    return _constant(mapping.check(name, default.arg))


def _constant(value: Any) -> Callable[[], Any]:
    return lambda: value


def is_mutable(column: sa.Column[Any]) -> bool:
    """Say whether a column's values could be changed by whoever holds them."""
    try:
        return column.type.python_type not in IMMUTABLE
    except NotImplementedError:
        return True


def _entity_argument(cls: type) -> Any:
    """Return what a repository class was parametrised with, through generic classes in between."""
    if cls is DeclaredRepository:
        return T
    for base in cls.__dict__.get("__orig_bases__", cls.__bases__):
        origin = get_origin(base) or base
        if not (isinstance(origin, type) and issubclass(origin, DeclaredRepository)):
            continue
        found = _entity_argument(origin)
        if isinstance(found, TypeVar) and get_args(base):
            found = get_args(base)[origin.__parameters__.index(found)]  # type: ignore[attr-defined]
        if isinstance(found, ForwardRef):
            found = vars(sys.modules[cls.__module__]).get(found.__forward_arg__)
        return found
    return None


def _unique_keys(table: sa.Table, key: tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
    found = {key: None}
    groups: list[Iterable[Any]] = [
        constraint.columns for constraint in table.constraints if isinstance(constraint, sa.UniqueConstraint)
    ]
    for index in table.indexes:
        partial = any(name.endswith("_where") and value is not None for name, value in index.dialect_kwargs.items())
        plain = all(isinstance(expression, sa.Column) for expression in index.expressions)
        if index.unique and plain and not partial:
            groups.append(index.columns)
    for group in sorted((tuple(column.key for column in group) for group in groups), key=str):
        found.setdefault(group)
    return tuple(found)


def _field_type(column: sa.Column[Any], annotation: Any) -> type:
    """Return a field's Python type: the entity's where that is an enum, else the column's."""
    core = core_type(annotation)
    return core if isinstance(core, type) and issubclass(core, enum.Enum) else _python_type(column)


def _python_type(column: sa.Column[Any]) -> type:
    try:
        return column.type.python_type
    except NotImplementedError:
        return object
