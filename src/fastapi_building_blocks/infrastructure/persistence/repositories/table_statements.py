"""Every statement that a repository sends, built with SQLAlchemy Core for its table and compiled once a shape."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import sqlalchemy as sa
from sqlalchemy.engine.interfaces import Dialect

from fastapi_building_blocks.domain.query import Sort
from fastapi_building_blocks.infrastructure.database.dialects import PortableDialect
from fastapi_building_blocks.infrastructure.persistence.repositories.declared_repository import Declaration
from fastapi_building_blocks.infrastructure.persistence.repositories.row_mapping import RowMapping
from fastapi_building_blocks.infrastructure.persistence.repositories.sqlalchemy_query import Placeholder, QueryClauses
from fastapi_building_blocks.infrastructure.persistence.repositories.sqlalchemy_statements import (
    Placeholders,
    Statement,
    StatementCache,
    result_processor,
)

T = TypeVar("T")


class Query(NamedTuple):
    """The shape of a read; also its key among the compiled statements."""

    shape: tuple[Any, ...] = ()
    order: tuple[Sort, ...] = ()
    nulls: tuple[bool, ...] | None = None
    """For a keyset position, which of its sort keys are NULL."""
    limit: bool = False
    offset: bool = False
    lock: str | None = None
    deleted_too: bool = False
    what: Literal["rows", "count", "capped count", "exists"] = "rows"


class TableStatements(Generic[T]):
    """The statements of one repository class on one database.

    Values of an entity come as a list in the order of the table's columns; ``arg__3`` in a statement is the
    value of the fourth column.
    """

    def __init__(
        self,
        declaration: Declaration[T],
        mapping: RowMapping[T],
        dialect: PortableDialect,
        compiler: Dialect,
        markers: Mapping[str, str | None],
    ) -> None:
        self.table = declaration.table
        self.dialect = dialect
        self.compiler = compiler
        self.mapping = mapping
        self.clauses = QueryClauses(declaration, dialect)
        self._declaration = declaration
        self._cache = StatementCache(compiler)
        self._columns = mapping.columns
        self._places = {name: place for place, name in enumerate(mapping.names)}
        self._version = markers["version"]
        self._soft_delete = markers["soft_delete"]
        self._created_at = markers["created_at"]
        read = [dialect.read(column, result_processor(column.type, compiler)) for column in self._columns]
        self._selected = [expression for expression, _ in read]
        self._processors = processors = [processor for _, processor in read]
        self.load = mapping.loader(processors)
        """From the driver's rows to entities."""
        self.one = mapping.one(processors)
        """From one of the driver's rows to an entity."""
        self.key_values = self._picker([self._places[name] for name in declaration.key], True)
        """From one of the driver's rows to its key as Python values."""
        self.load_values = mapping.loader([None] * len(processors))
        """From rows of Python values to entities."""
        self.values = mapping.values(processors)
        """From one of the driver's rows to its Python values."""
        self.one_of_values = mapping.one([None] * len(processors))
        """From a row of Python values to an entity."""
        self.always_written = tuple(name for name in mapping.names if name not in declaration.kept_by_update)
        self.never_written = frozenset(self._places[name] for name in declaration.never_written)
        """The places of the columns that no statement writes."""
        self.key_places = tuple(self._places[name] for name in declaration.key)
        self.changed_by_database = bool(self._created_at or self.never_written) or any(
            column.server_onupdate is not None for column in self._columns
        )
        """Whether an UPDATE leaves values behind that only the database knows."""

    def _cached(self, key: Any, build: Callable[[], Any], **facts: Any) -> Statement:
        return self._cache.get(key) or self._cache.put(key, build(), self.table, shape=key[0], **facts)

    def forget(self) -> None:
        """Compile every statement anew: more is known of the server."""
        self._cache.clear()

    def place(self, name: str) -> int:
        """Return the position of a column in a list of values."""
        return self._places[name]

    # Reads

    def select(self, query: Query) -> Statement:
        """Return the compiled statement of a read; its values: criteria, position, limit, offset."""
        statement = self._cache.get(query)
        if statement is None:
            core = self.select_core(query, Placeholders())
            statement = self._cache.put(
                query, core, self.table, shape=query.what, reads=query.lock is None, lock=query.lock
            )
        return statement

    def select_core(self, query: Query, placeholder: Placeholder, expressions: Sequence[Any] = ()) -> Any:
        """Return a read as a Core statement, with SQLAlchemy expressions among its conditions."""
        conditions = [*self.visible(query.deleted_too), *self.clauses.clauses(query.shape, placeholder), *expressions]
        if query.nulls is not None:
            conditions.append(self.clauses.position(query.nulls, query.order, placeholder))
        if query.what == "count":
            return sa.select(sa.func.count()).select_from(self.table).where(*conditions)
        ones = query.what in ("capped count", "exists")
        core = (
            sa.select(sa.literal_column("1").label("one")).select_from(self.table)
            if ones
            else sa.select(*(self._columns if expressions else self._selected))
        )
        core = core.where(*conditions)
        if query.order:
            core = core.order_by(*self.clauses.order(query.order, query.nulls))
        elif query.limit and self.dialect.paging_needs_order:
            core = core.order_by(*self.table.primary_key.columns)
        if query.limit:
            core = core.limit(placeholder(sa.BigInteger()))
        if query.what == "capped count" and query.offset:
            core = core.offset(0)  # SQLAlchemy writes ORDER BY in SQL Server's subqueries for a known number only
        elif query.offset:
            core = core.offset(placeholder(sa.BigInteger()))
        if query.lock is not None:
            core = self.dialect.lock(core, self.table, query.lock)
        if query.what == "capped count":
            return sa.select(sa.func.count()).select_from(core.subquery())
        return core

    def by_key(self, lock: str | None, deleted_too: bool) -> Statement:
        """Return the SELECT of one row; its values: the key."""
        return self._cached(
            ("by key", lock, deleted_too),
            lambda: self._locked(
                sa.select(*self._selected).where(*self._key_is(Placeholders()), *self.visible(deleted_too)), lock
            ),
            reads=lock is None,
            lock=lock,
        )

    def by_fields(self, names: tuple[str, ...], lock: str | None, deleted_too: bool) -> Statement:
        """Return the SELECT of the row with these values of a unique key; its values: those."""

        def build() -> Any:
            placeholder = Placeholders()
            columns = [self.table.columns[name] for name in names]
            where = [column == placeholder(column.type) for column in columns]
            return self._locked(sa.select(*self._selected).where(*where, *self.visible(deleted_too)), lock)

        return self._cached(("by fields", names, lock, deleted_too), build, reads=lock is None, lock=lock)

    def by_keys(self, count: int, deleted_too: bool) -> Statement:
        """Return the SELECT of many rows; its values: ``count`` keys one after the other, or one list of them."""

        def build() -> Any:
            placeholder = Placeholders()
            keys = list(self.table.primary_key.columns)
            if len(keys) > 1:
                where = sa.or_(*[sa.and_(*[key == placeholder(key.type) for key in keys]) for _ in range(count)])
            elif self.dialect.array_parameters:
                where = keys[0] == sa.any_(placeholder(sa.ARRAY(keys[0].type)))
            else:
                where = keys[0].in_([placeholder(keys[0].type) for _ in range(count)])
            return sa.select(*self._selected).where(where, *self.visible(deleted_too))

        return self._cached(("by keys", count, deleted_too), build, reads=True)

    def visible(self, deleted_too: bool) -> list[Any]:
        """Return the condition that leaves soft-deleted rows out, where there is one."""
        if self._soft_delete is None or deleted_too:
            return []
        column = self.table.columns[self._soft_delete]
        return [column == sa.false() if self._declaration.deleted_flag else column.is_(None)]

    def sort_values(self, order: Sequence[Sort], raw: bool) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
        """Return a function from a row to its sort keys as Python values; ``raw`` rows are the driver's."""
        return self._picker([self._places[key.field] for key in order], raw)

    def _picker(self, places: Sequence[int], raw: bool) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
        picks = [(place, self._processors[place] if raw else None) for place in places]

        def pick(row: Sequence[Any]) -> tuple[Any, ...]:
            return tuple(
                row[place] if processor is None or row[place] is None else processor(row[place])
                for place, processor in picks
            )

        return pick

    # Writes

    def insert(self, omitted: frozenset[int], returning: bool) -> Statement:
        """Return the INSERT of a row without some columns; its values: the row."""
        key = ("insert", omitted, returning)
        known = self._cache.get(key)
        if known is not None:
            return known
        columns = [column for place, column in enumerate(self._columns) if place not in omitted]

        def build() -> Any:
            core = self.dialect.insert_row(self.table, self._row(omitted))
            return core.returning(*self._selected) if returning else core.inline()

        return self._cached(key, build, columns=columns)

    def update(
        self, names: tuple[str, ...], version: bool, deleted_too: bool, answer: Literal["row", "mark", ""]
    ) -> Statement:
        """Return the UPDATE of one row by its key; its values: the row, then the version that it must have."""

        def build() -> Any:
            changes = {self.table.columns[name]: self._at(self._places[name]) for name in names}
            core = sa.update(self.table).where(*[column == self._at(self._places[column.key]) for column in self._key])
            if version:
                column = self.table.columns[self._version or ""]
                changes[column] = self._at(self._places[column.key])
                core = core.where(column == sa.bindparam(f"arg__{len(self._columns)}", type_=column.type))
            if not changes:
                changes[self._key[0]] = self._key[0]  # nothing but the key, yet whether it exists is asked
            core = core.where(*self.visible(deleted_too)).values(changes)
            if answer == "row":
                return core.returning(*self._selected)
            return core.returning(sa.literal_column("1")) if answer == "mark" else core

        return self._cached(("update", names, version, deleted_too, answer), build)

    def patch(self, names: tuple[str, ...], version: bool, deleted_too: bool, returning: bool) -> Statement:
        """Return the UPDATE of some columns; its values: theirs, the key, then the version that it must have."""

        def build() -> Any:
            placeholder = Placeholders()
            changes = self._changes(names, placeholder)
            core = sa.update(self.table).where(*self._key_is(placeholder), *self.visible(deleted_too))
            if version:
                column = self.table.columns[self._version or ""]
                core = core.where(column == placeholder(column.type))
            core = core.values(changes)
            return core.returning(*self._selected) if returning else core

        return self._cached(("patch", names, version, deleted_too, returning), build)

    def update_where(self, names: tuple[str, ...], query: Query) -> Statement:
        """Return the UPDATE of all rows of a shape; its values: the columns', then the criteria's."""
        return self._cached(
            ("update where", names, query), lambda: self.update_where_core(names, query, Placeholders())
        )

    def update_where_core(
        self, names: tuple[str, ...], query: Query, placeholder: Placeholder, expressions: Sequence[Any] = ()
    ) -> Any:
        """Return an UPDATE by criteria as a Core statement."""
        changes = self._changes(names, placeholder)
        conditions = [*self.visible(query.deleted_too), *self.clauses.clauses(query.shape, placeholder), *expressions]
        return sa.update(self.table).where(*conditions).values(changes)

    def delete_where(self, query: Query) -> Statement:
        """Return the DELETE of all rows of a shape."""
        return self._cached(("delete where", query), lambda: self.delete_where_core(query, Placeholders()))

    def delete_where_core(self, query: Query, placeholder: Placeholder, expressions: Sequence[Any] = ()) -> Any:
        """Return a DELETE by criteria as a Core statement."""
        conditions = [*self.visible(query.deleted_too), *self.clauses.clauses(query.shape, placeholder), *expressions]
        return sa.delete(self.table).where(*conditions)

    def delete(self, deleted_too: bool) -> Statement:
        """Return the DELETE of one row; its values: the key."""
        return self._cached(
            ("delete", deleted_too),
            lambda: sa.delete(self.table).where(*self._key_is(Placeholders()), *self.visible(deleted_too)),
        )

    def restore(self, names: tuple[str, ...]) -> Statement:
        """Return the UPDATE that unmarks one deleted row; its values: the columns', then the key."""

        def build() -> Any:
            placeholder = Placeholders()
            changes = self._changes(names, placeholder)
            column = self.table.columns[self._soft_delete or ""]
            deleted = column == sa.true() if self._declaration.deleted_flag else column.is_not(None)
            return sa.update(self.table).where(*self._key_is(placeholder), deleted).values(changes)

        return self._cached(("restore", names), build)

    def upsert(
        self, omitted: frozenset[int], defaulted: frozenset[int], on: tuple[str, ...], returning: bool
    ) -> Statement:
        """Return the statement that inserts a row or updates the one with the same ``on``; its values: the row.

        Args:
            defaulted: places whose value is a default, for a new row only: an existing one keeps what it has.
        """

        def build() -> Any:
            written = [
                name
                for name, place in self._places.items()
                if place not in omitted | defaulted and name not in (*on, *self._declaration.kept_by_update)
            ]
            core = self.dialect.upsert(self.table, self._row(omitted), on, written, self._version)
            return core.returning(*self._selected) if returning else core

        return self._cached(
            ("upsert", omitted, defaulted, on, returning),
            build,
            guards_upsert=True,
            on=on,
            columns=[column for place, column in enumerate(self._columns) if place not in omitted],
        )

    @property
    def _key(self) -> list[Any]:
        return list(self.table.primary_key.columns)

    def _key_is(self, placeholder: Placeholder) -> list[Any]:
        return [column == placeholder(column.type) for column in self._key]

    def _at(self, place: int) -> Any:
        return sa.bindparam(f"arg__{place}", type_=self._columns[place].type)

    def _row(self, omitted: frozenset[int]) -> dict[Any, Any]:
        return {column: self._at(place) for place, column in enumerate(self._columns) if place not in omitted}

    def _changes(self, names: tuple[str, ...], placeholder: Placeholder) -> dict[Any, Any]:
        changes: dict[Any, Any] = {
            self.table.columns[name]: placeholder(self.table.columns[name].type) for name in names
        }
        if self._version is not None:
            version = self.table.columns[self._version]
            changes[version] = version + sa.literal_column("1")
        return changes

    def _locked(self, core: Any, lock: str | None) -> Any:
        return core if lock is None else self.dialect.lock(core, self.table, lock)
