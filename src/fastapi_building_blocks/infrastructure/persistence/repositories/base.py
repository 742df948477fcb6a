"""The repository in memory: the same contract as on a database, for tests, demos and small data.

One class implements one contract, method by method as the SQL repository does: its length is the contract's.
"""

import asyncio
import copy
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar, Final, TypeVar

import sqlalchemy as sa

from fastapi_building_blocks.domain.errors import (
    ConstraintError,
    DuplicateKeyError,
    InvalidInputError,
    SerializationError,
)
from fastapi_building_blocks.domain.query import (
    Criterion,
    CursorPage,
    CursorRequest,
    Page,
    PageRequest,
    Sort,
    extent_of,
)
from fastapi_building_blocks.domain.repository import Lock, SortKeys
from fastapi_building_blocks.infrastructure.database.in_memory_session import (
    Collection,
    InMemorySession,
    InMemoryTransaction,
    Key,
    Row,
)
from fastapi_building_blocks.infrastructure.database.session import DatabaseSession
from fastapi_building_blocks.infrastructure.database.streams import StreamReader
from fastapi_building_blocks.infrastructure.persistence.repositories.column_rules import check_not_null, check_value
from fastapi_building_blocks.infrastructure.persistence.repositories.declared_repository import (
    DeclaredRepository,
)
from fastapi_building_blocks.infrastructure.persistence.repositories.in_memory_query import InMemoryQuery
from fastapi_building_blocks.infrastructure.persistence.repositories.in_memory_table import (
    collection_of,
    database_default,
    derived_table,
)
from fastapi_building_blocks.infrastructure.persistence.repositories.row_mapping import MISSING

T = TypeVar("T")

Work = Callable[[InMemoryTransaction], Awaitable[Any]]

_STALE: Final = object()
_UNDOABLE: Final = "undoable"
"""The savepoint of a bulk write that may miss an entity without dooming its unit of work."""


class BaseRepository(DeclaredRepository[T]):
    """Entities in an ``InMemorySession``; what it answers and refuses is what ``SQLAlchemyRepository`` does.

    With ``table`` it takes its key, unique and foreign keys, defaults and nullability from there; a foreign key
    counts where a repository of the table it refers to was made on the same session. Without one, ``id_field`` and
    ``unique`` say what is unique, the fields of the entity class what there is, and a whole number that is None
    as ``id`` is generated. CHECK constraints, computed columns and indexes on expressions need a database.

    Text compares and sorts by code point; NULLs never collide in a unique key.
    """

    id_field: ClassVar[str] = "id"
    """The key, where there is no ``table``."""
    unique: ClassVar[Sequence[tuple[str, ...]]] = ()
    """Unique keys, each a tuple of fields, where there is no ``table``."""

    def __init__(self, session: DatabaseSession) -> None:
        super().__init__(session)
        if not isinstance(session.root, InMemorySession):
            raise TypeError(
                f"{type(self).__name__} keeps entities in memory: it runs on an InMemorySession, "
                f"not on a {session.dialect_name} session"
            )
        declaration = self._declaration
        self._collection: Collection = collection_of(declaration.table, declaration.unique_keys)
        self._name = self._collection.name
        self._columns = dict(zip(self._mapping.names, self._mapping.columns, strict=True))
        self._query = InMemoryQuery(self._columns)
        session.root.register(self._collection)

    @classmethod
    def _table_for(cls, entity_class: type) -> sa.Table:
        if getattr(cls, "table", None) is not None:
            return super()._table_for(entity_class)
        return derived_table(entity_class, cls.id_field, cls.unique)

    @cached_property
    def _load(self) -> Callable[[Row], T]:
        mutable = self._declaration.mutable
        load = self._mapping.one([copy.deepcopy if place in mutable else None for place in range(len(self._columns))])
        return lambda row: self._entity(load(row))

    # How a call reaches the store

    async def _perform(self, work: Work) -> Any:
        return await self._session.perform(_operation, work, None)

    def _matches(self, criteria: Sequence[Criterion]) -> Callable[[Row], bool]:
        """Return what tells whether a row is seen by this repository and meets the criteria."""
        test = self._query.test(self._checked(criteria))
        return lambda row: self._is_visible(row) and test(row) is True

    def _checked(self, criteria: Sequence[Criterion]) -> Sequence[Criterion]:
        extent_of(criteria)
        for criterion in criteria:
            self._require_fields(criterion)
        return criteria

    def _is_visible(self, row: Row) -> bool:
        return self._deleted_too or not self._is_deleted(row)

    def _is_deleted(self, row: Row) -> bool:
        if self.soft_delete_column is None:
            return False
        mark = row[self._collection.positions[self.soft_delete_column]]
        return bool(mark) if self._declaration.deleted_flag else mark is not None

    async def _locked(self, connection: InMemoryTransaction, key: Key, mode: str = "update") -> Row | None:
        """Lock a row that this repository sees and return it as it is then; None: there is none, or it was skipped."""
        row = connection.row(self._name, key)
        if row is None or not self._is_visible(row) or not await connection.lock(self._name, key, mode):
            return None
        row = connection.row(self._name, key, newest=True)
        return row if row is not None and self._is_visible(row) else None

    # Reads

    async def get_by_id(self, id: Any, *, lock: Lock | None = None) -> T | None:
        self._require_transaction(lock)
        key = self._key_values(id)

        async def read(connection: InMemoryTransaction) -> Row | None:
            if lock is not None:
                return await self._locked(connection, key, lock)
            row = connection.row(self._name, key)
            return row if row is not None and self._is_visible(row) else None

        row = await self._perform(read)
        return None if row is None else self._load(row)

    async def get_many(self, ids: Iterable[Any]) -> list[T]:
        keys = [self._key_values(id) for id in ids]

        async def read(connection: InMemoryTransaction) -> list[Row | None]:
            return [connection.row(self._name, key) for key in keys]

        return [self._load(row) for row in await self._perform(read) if row is not None and self._is_visible(row)]

    async def _rows_by(self, names: tuple[str, ...], keys: Sequence[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
        primary = names == self._declaration.key

        async def read(connection: InMemoryTransaction) -> list[Row]:
            found = keys if primary else [connection.owner(self._name, names, key) for key in keys]
            rows = [connection.row(self._name, key) for key in found if key is not None]
            return [row for row in rows if row is not None]

        rows: list[tuple[Any, ...]] = await self._perform(read)
        return rows

    def _entity_of(self, row: Sequence[Any]) -> T:
        return self._load(tuple(row))

    async def get_all(
        self,
        *criteria: Criterion,
        sort: SortKeys = (),
        limit: int | None = None,
        offset: int = 0,
        lock: Lock | None = None,
    ) -> list[T]:
        self._require_transaction(lock)
        self._require_window(limit, offset)
        order, matches = self._order(sort), self._matches(criteria)
        if limit == 0:
            return []
        end = None if limit is None else offset + limit

        async def read(connection: InMemoryTransaction) -> list[Row]:
            rows = self._sorted(connection, matches, order)
            if lock is not None:
                rows = await self._lock_all(connection, rows, matches, end, lock)
            return rows[offset:end]

        return [self._load(row) for row in await self._perform(read)]

    def _sorted(
        self, connection: InMemoryTransaction, matches: Callable[[Row], bool], order: Sequence[Sort]
    ) -> list[Row]:
        return self._query.sort((row for _, row in connection.rows(self._name, matches)), order)

    async def _lock_all(
        self,
        connection: InMemoryTransaction,
        rows: list[Row],
        matches: Callable[[Row], bool],
        enough: int | None,
        lock: Lock,
    ) -> list[Row]:
        found: list[Row] = []
        for row in rows:
            if len(found) == enough:
                break
            current = await self._locked(connection, self._collection.key(row), lock)
            if current is not None and matches(current):
                found.append(current)
        return found

    async def paginate(self, request: PageRequest, *criteria: Criterion, sort: SortKeys = ()) -> Page[T]:
        order, matches = self._order(sort), self._matches(criteria)

        async def read(connection: InMemoryTransaction) -> list[Row]:
            return self._sorted(connection, matches, order)

        rows = await self._perform(read)
        counted = {"none": None, "capped": min(len(rows), request.count_cap + 1)}.get(request.count, len(rows))
        window = rows[request.offset : request.offset + request.limit + 1]
        return self._page(request, [self._load(row) for row in window], counted)

    async def paginate_by_cursor(
        self, request: CursorRequest, *criteria: Criterion, sort: SortKeys = ()
    ) -> CursorPage[T]:
        order, matches = self._order(sort), self._matches(criteria)
        query = f"{self._name} {order!r} {criteria!r} {self._deleted_too}"
        position = self._position(request, order, query)
        direction = order
        is_behind: Callable[[Row], bool] | None = None
        if position is not None:
            direction = tuple(key.reversed for key in order) if position.backwards else order
            is_behind = self._query.behind(direction, position.values) if position.values else None

        async def read(connection: InMemoryTransaction) -> list[Row]:
            rows = (row for _, row in connection.rows(self._name, matches))
            return self._query.sort(rows if is_behind is None else filter(is_behind, rows), direction)

        rows = (await self._perform(read))[: request.limit + 1]
        return self._cursor_page(
            request, position, [(self._load(row), self._query.keys(row, order)) for row in rows], query
        )

    def stream(self, *criteria: Criterion, sort: SortKeys = (), batch_size: int = 1000) -> AsyncGenerator[T, None]:
        if type(batch_size) is not int or batch_size < 1:
            raise ValueError("batch_size must be at least 1")
        order, matches = self._order(sort), self._matches(criteria)

        async def batches(connection: InMemoryTransaction, *_: Any) -> AsyncGenerator[list[Row], None]:
            await asyncio.sleep(0)
            rows = self._sorted(connection, matches, order)
            for start in range(0, len(rows), batch_size):
                yield rows[start : start + batch_size]
                await asyncio.sleep(0)

        return self._streamed(batches)

    async def _streamed(self, batches: Any) -> AsyncGenerator[T, None]:
        async with StreamReader(self._session.iterate(batches, None, None)) as opened:
            async for batch in opened:
                for row in batch:
                    yield self._load(row)

    async def count(self, *criteria: Criterion) -> int:
        matches = self._matches(criteria)

        async def read(connection: InMemoryTransaction) -> int:
            return sum(1 for _ in connection.rows(self._name, matches))

        counted: int = await self._perform(read)
        return counted

    async def exists(self, *criteria: Criterion) -> bool:
        matches = self._matches(criteria)

        async def read(connection: InMemoryTransaction) -> bool:
            return next(iter(connection.rows(self._name, matches)), None) is not None

        found: bool = await self._perform(read)
        return found

    # Rows to write

    def _given(self, entity: T) -> dict[str, Any]:
        """Return the checked values of an entity; what a hand-written mapper leaves out is not in it."""
        values = list(self._dump(entity))
        for place in self._declaration.mutable:
            values[place] = copy.deepcopy(values[place])
        never_written = self._declaration.never_written
        given = zip(self._mapping.names, values, strict=True)
        return {name: value for name, value in given if value is not MISSING and name not in never_written}

    def _new_values(self, entity: T) -> dict[str, Any]:
        """Return what an entity supplies for a new row: None is left out where something else fills it."""
        filled = {self._mapping.names[place] for place, _ in self._declaration.fills}
        given = self._given(entity).items()
        values = {name: value for name, value in given if value is not None or name not in filled}
        for name in self._declaration.key:
            if values.get(name) is None and name not in filled:
                raise ConstraintError(f"{name}: a value is required", fields=(name,))
        return values

    def _upserted_values(self, entity: T) -> dict[str, Any]:
        given = self._new_values(entity)
        if self.updated_at_column is not None:
            given.pop(self.updated_at_column, None)  # set to now, as by every change
        return given

    def _new_row(self, connection: InMemoryTransaction, given: Mapping[str, Any]) -> Row:
        values: dict[str, Any] = {**dict.fromkeys(self._columns), **given}
        now = self._now()
        for place, fill in self._declaration.fills:
            column = self._mapping.columns[place]
            if column.key in given:
                continue
            if fill == "now":
                values[column.key] = check_value(column, now)
            elif fill == "database":
                values[column.key] = self._generated(connection, column)
            else:
                values[column.key] = copy.deepcopy(fill())
        automatic = self._declaration.table.autoincrement_column
        if automatic is not None and isinstance(values[automatic.key], int):
            connection.skip_numbers(self._name, automatic.key, values[automatic.key])
        return self._row(values)

    def _generated(self, connection: InMemoryTransaction, column: sa.Column[Any]) -> Any:
        if column is self._declaration.table.autoincrement_column or column.identity is not None:
            return connection.next_number(self._name, column.key)
        return check_value(column, database_default(column, column.default or column.server_default))

    def _changed_row(self, row: Row, changes: Mapping[str, Any]) -> Row:
        """Return a row with these changes, its version and timestamp moved on."""
        values = dict(zip(self._mapping.names, row, strict=True))
        for name, column in self._columns.items():
            if column.onupdate is not None and name not in changes:
                known = self._declaration.update_fills.get(name)
                values[name] = known() if known else check_value(column, database_default(column, column.onupdate))
        values.update(changes)
        if self.version_column is not None:
            values[self.version_column] = row[self._collection.positions[self.version_column]] + 1
        if self.updated_at_column is not None:
            values[self.updated_at_column] = check_value(self._columns[self.updated_at_column], self._now())
        return self._row(values)

    def _row(self, values: Mapping[str, Any]) -> Row:
        for name, column in self._columns.items():
            check_not_null(column, values[name])
        return tuple(values[name] for name in self._mapping.names)

    # Writes

    async def add(self, entity: T) -> T:
        given = self._new_values(entity)

        async def write(connection: InMemoryTransaction) -> Row:
            connection.require_writable()
            row = self._new_row(connection, given)
            await connection.insert(self._name, row)
            return row

        return self._load(await self._perform(write))

    async def add_many(self, entities: Iterable[T]) -> int:
        rows = [self._new_values(entity) for entity in entities]

        async def write(connection: InMemoryTransaction) -> None:
            connection.require_writable()
            for given in rows:
                await connection.insert(self._name, self._new_row(connection, given))

        await self._perform(write)
        return len(rows)

    async def update(self, entity: T) -> T:
        key, version, changes = self._update_of(entity)
        return self._stored(await self._perform(lambda connection: self._change(connection, key, version, changes)))

    async def patch(self, id: Any, values: Mapping[str, Any], version: int | None = None) -> T:
        key = self._key_values(id)
        changes = self._own_changes(values)
        if version is not None:
            self._checked_version(version)
        return self._stored(await self._perform(lambda connection: self._change(connection, key, version, changes)))

    def _update_of(self, entity: T) -> tuple[Key, int | None, dict[str, Any]]:
        given = self._given(entity)
        key = tuple(given.get(name) for name in self._declaration.key)
        if None in key:
            raise InvalidInputError("the entity has no key", fields=self._declaration.key)
        version = None if self.version_column is None else self._checked_version(given.get(self.version_column))
        changes = {name: value for name, value in given.items() if name not in self._declaration.kept_by_update}
        return key, version, changes

    def _checked_version(self, version: Any) -> int:
        if self.version_column is None:
            raise ValueError(f"{type(self).__name__} has no version_column to compare a version with")
        if version is None:
            raise InvalidInputError(
                f"{self.version_column}: the version that was read is required", fields=(self.version_column,)
            )
        try:
            return int(self._mapping.check(self.version_column, version))
        except InvalidInputError:
            if type(version) is int:
                raise self._stale() from None  # a number that the column cannot hold is nobody's version
            raise

    def _own_changes(self, values: Mapping[str, Any]) -> dict[str, Any]:
        return {name: copy.deepcopy(value) for name, value in self._changes(values).items()}

    async def _change(
        self, connection: InMemoryTransaction, key: Key, version: int | None, changes: Mapping[str, Any]
    ) -> Any:
        """Write changes to one row; answer the row, None where there is none, ``_STALE`` where it has moved on."""
        connection.require_writable()
        row = await self._locked(connection, key)
        if row is None:
            return None
        if version is not None and row[self._collection.positions[self.version_column or ""]] != version:
            return _STALE
        changed = self._changed_row(row, changes)
        await connection.replace(self._name, key, changed)
        return changed

    def _stored(self, outcome: Any) -> T:
        if outcome is None:
            raise self._missing()
        if outcome is _STALE:
            raise self._stale()
        return self._load(outcome)

    async def update_where(self, values: Mapping[str, Any], *criteria: Criterion, everything: bool = False) -> int:
        self._require_criteria(criteria, everything)
        matches = self._matches(criteria)
        changes = self._own_changes(values)

        async def change(connection: InMemoryTransaction, key: Key, row: Row) -> None:
            await connection.replace(self._name, key, self._changed_row(row, changes))

        return await self._for_each(matches, change)

    async def _for_each(
        self,
        matches: Callable[[Row], bool],
        write_row: Callable[[InMemoryTransaction, Key, Row], Awaitable[None]],
    ) -> int:
        async def write(connection: InMemoryTransaction) -> int:
            connection.require_writable()
            touched = 0
            for key, _ in list(connection.rows(self._name, matches)):
                row = await self._locked(connection, key)
                if row is not None and matches(row):
                    await write_row(connection, key, row)
                    touched += 1
            return touched

        answered: int = await self._perform(write)
        return answered

    async def update_many(self, entities: Iterable[T]) -> int:
        updates = [self._update_of(entity) for entity in entities]

        async def write(connection: InMemoryTransaction) -> Any:
            connection.require_writable()
            await connection.savepoint(_UNDOABLE)
            for update in updates:
                outcome = await self._change(connection, *update)
                if outcome is None or outcome is _STALE:
                    await connection.rollback_to_savepoint(_UNDOABLE)
                    return outcome
            await connection.release_savepoint(_UNDOABLE)
            return len(updates)

        outcome = await self._perform(write)
        if not isinstance(outcome, int):
            raise self._stale() if outcome is _STALE else self._missing()
        return len(updates)

    async def upsert(self, entity: T, on: Sequence[str] | None = None) -> T:
        names, given = self._conflict_key(on), self._upserted_values(entity)
        self._conflict_values(names, given)
        return self._load(await self._perform(lambda connection: self._upsert(connection, names, given)))

    async def upsert_many(self, entities: Iterable[T], on: Sequence[str] | None = None) -> int:
        names = self._conflict_key(on)
        rows = [self._upserted_values(entity) for entity in entities]
        for given in rows:
            self._conflict_values(names, given)

        async def write(connection: InMemoryTransaction) -> None:
            connection.require_writable()
            for given in rows:
                await self._upsert(connection, names, given)

        await self._perform(write)
        return len(rows)

    def _conflict_values(self, names: tuple[str, ...], given: Mapping[str, Any]) -> tuple[Any, ...]:
        """Return the values that an upsert finds its entity by."""
        for name in names:
            if given.get(name) is None:
                raise InvalidInputError(f"{name}: a value is required to find the entity by", fields=(name,))
        return tuple(given[name] for name in names)

    async def _upsert(self, connection: InMemoryTransaction, names: tuple[str, ...], given: Mapping[str, Any]) -> Row:
        connection.require_writable()
        values = self._conflict_values(names, given)
        while True:
            key = await self._holder(connection, names, values)
            if key is None:
                row = self._new_row(connection, given)
                await connection.insert(self._name, row)
                return row
            await connection.lock(self._name, key)
            before = connection.row(self._name, key, newest=True)
            if before is not None and self._collection.values(before, names) == values:
                break
        own = self._declaration.key
        another = tuple(given.get(name) for name in own)
        if another != key and connection.row(self._name, another, newest=True) is not None:
            raise DuplicateKeyError(f"{' and '.join(own)} is already taken", fields=own)
        changes = {name: value for name, value in given.items() if name not in self._declaration.kept_by_update}
        if self.soft_delete_column is not None:
            changes.setdefault(self.soft_delete_column, self._deleted_mark(False))
        # The database's upsert is an INSERT, to which SQLAlchemy applies no onupdate: what is not given stays.
        kept = dict(zip(self._mapping.names, before, strict=True))
        changed = self._changed_row(before, {**kept, **changes})
        await connection.replace(self._name, key, changed)
        return changed

    async def _holder(
        self, connection: InMemoryTransaction, names: tuple[str, ...], values: tuple[Any, ...]
    ) -> Key | None:
        """Return the key of the row with these values; where there is none, they are claimed for this transaction."""
        return connection.owner(self._name, names, values) or await connection.contend(self._name, names, values)

    async def get_or_add(self, entity: T, on: Sequence[str] | None = None) -> tuple[T, bool]:
        names, given = self._conflict_key(on), self._new_values(entity)
        values = self._conflict_values(names, given)

        async def write(connection: InMemoryTransaction) -> tuple[Row, bool]:
            key = connection.owner(self._name, names, values)
            if key is None:
                connection.require_writable()
                key = await connection.contend(self._name, names, values)
            if key is None:
                row = self._new_row(connection, given)
                await connection.insert(self._name, row)
                return row, True
            found = connection.row(self._name, key)
            if found is None:
                raise SerializationError("another transaction added it after this one began")
            if not self._is_visible(found):
                raise DuplicateKeyError(f"{', '.join(names)} is taken by a deleted entity", fields=names)
            return found, False

        row, created = await self._perform(write)
        return self._load(row), created

    async def delete(self, id: Any) -> bool:
        key = self._key_values(id)

        async def write(connection: InMemoryTransaction) -> bool:
            connection.require_writable()
            row = await self._locked(connection, key)
            if row is not None:
                await self._remove(connection, key, row)
            return row is not None

        deleted: bool = await self._perform(write)
        return deleted

    async def _remove(self, connection: InMemoryTransaction, key: Key, row: Row) -> None:
        if self.soft_delete_column is None or self._deleted_too:
            await connection.remove(self._name, key)
        else:
            await connection.replace(self._name, key, self._marked(row, deleted=True))

    def _marked(self, row: Row, *, deleted: bool) -> Row:
        column = self.soft_delete_column or ""
        mark = check_value(self._columns[column], self._deleted_mark(deleted))
        return self._changed_row(row, {column: mark})

    async def delete_where(self, *criteria: Criterion, everything: bool = False) -> int:
        self._require_criteria(criteria, everything)
        return await self._for_each(self._matches(criteria), self._remove)

    async def restore(self, id: Any) -> bool:
        self._require_soft_delete()
        key = self._key_values(id)

        async def write(connection: InMemoryTransaction) -> bool:
            connection.require_writable()
            row = connection.row(self._name, key)
            if row is None or not self._is_deleted(row) or not await connection.lock(self._name, key):
                return False
            row = connection.row(self._name, key, newest=True)
            if row is None or not self._is_deleted(row):
                return False
            await connection.replace(self._name, key, self._marked(row, deleted=False))
            return True

        restored: bool = await self._perform(write)
        return restored


async def _operation(connection: InMemoryTransaction, work: Work, arguments: Any) -> Any:  # noqa: ARG001
    # As on a network, other tasks run between a call and its answer: what interleaves there interleaves here.
    await asyncio.sleep(0)
    return await work(connection)
