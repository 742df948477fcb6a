"""The repository on any SQL database: Core tables in, entities out, at the driver's speed."""

import asyncio
import copy
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from datetime import datetime
from itertools import groupby, islice
from operator import itemgetter
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import sqlalchemy as sa

from fastapi_building_blocks.domain.errors import (
    BuildingBlocksError,
    ConstraintError,
    DeadlockError,
    DuplicateKeyError,
    InvalidInputError,
    TransientError,
)
from fastapi_building_blocks.domain.query import Criterion, CursorPage, CursorRequest, Page, PageRequest
from fastapi_building_blocks.domain.repository import Lock, SortKeys
from fastapi_building_blocks.infrastructure.database.consistency import reads_from_primary
from fastapi_building_blocks.infrastructure.database.session import DatabaseSession, Transaction
from fastapi_building_blocks.infrastructure.database.sqlalchemy_session import SQLAlchemySession
from fastapi_building_blocks.infrastructure.database.streams import StreamReader
from fastapi_building_blocks.infrastructure.persistence.repositories.declared_repository import DeclaredRepository
from fastapi_building_blocks.infrastructure.persistence.repositories.row_mapping import MISSING
from fastapi_building_blocks.infrastructure.persistence.repositories.sqlalchemy_statements import (
    CoreRead,
    Literals,
    Statement,
)
from fastapi_building_blocks.infrastructure.persistence.repositories.table_statements import Query, TableStatements

T = TypeVar("T")
Answer = TypeVar("Answer")

Condition = Criterion | sa.ColumnElement[bool]
Values = list[Any]

_BATCH = 5_000
"""Entities of a bulk write that are in memory at once."""
_LONGEST_KEY_LIST = 256
_HEAD = 1_000
"""Entities that are checked before the first of them is sent."""
_LONGEST_RUN = 2.0
"""Seconds that one INSERT may go on while entities are read: its statement timeout is running."""
_TURN = 256
"""Entities that are read before other tasks have their turn."""
_NO_PLACES: frozenset[int] = frozenset()
_UPSERT_ATTEMPTS = 10
"""How often an upsert that is a transaction of its own is tried when it meets deadlocks."""
_DEADLOCKED = 2.0
"""Seconds after which it is not tried again."""


class SQLAlchemyRepository(DeclaredRepository[T]):
    """Entities as rows of ``table``.

    A subclass needs no more than the table, where the entity's fields are its columns; ``_row_to_entity`` and
    ``_entity_to_dict`` map by hand where they are not. Criteria are those of the query vocabulary, or any
    SQLAlchemy expression.
    """

    def __init__(self, session: DatabaseSession) -> None:
        super().__init__(session)
        root = session.root
        if not isinstance(root, SQLAlchemySession):
            raise TypeError(f"{type(self).__name__} runs on a SQLAlchemySession, not on {type(root).__name__}")
        self._sql: TableStatements[T] = root.statements.get(type(self)) or self._prepare(root)
        self._execute_on = root.execute_on

    def _prepare(self, root: SQLAlchemySession) -> TableStatements[T]:
        statements: TableStatements[T] = TableStatements(
            self._declaration,
            self._declaration.mapping,
            root.dialect,
            root.engine.dialect,
            {
                "version": self.version_column,
                "soft_delete": self.soft_delete_column,
                "created_at": self.created_at_column,
            },
        )
        if root.is_connected:
            root.statements[type(self)] = statements
        else:
            root.unlearned.add(statements)  # what the server can do is not known yet
        return statements

    # Reads

    async def get_by_id(self, id: Any, *, lock: Lock | None = None) -> T | None:
        if lock is not None:
            self._require_transaction(lock)
        sql = self._sql
        statement = sql.by_key(lock, self._deleted_too)
        arguments = statement.bind(self._key_values(id))
        rows = await self._session.perform(sql.dialect.fetch, statement, arguments)
        return self._entity(sql.one(rows[0])) if rows else None

    async def get_many(self, ids: Iterable[Any]) -> list[T]:
        wanted = [self._key_values(id) for id in ids]
        distinct = list(dict.fromkeys(wanted))
        found: dict[tuple[Any, ...], T] = {}
        key_of = self._sql.key_values
        for rows in await self._rows_by_keys(distinct, self._deleted_too):
            found.update(zip(map(key_of, rows), self._entities(self._sql.load(rows)), strict=True))
        answers = [found[key] for key in wanted if key in found]
        if len(wanted) != len(distinct):
            answers = [copy.deepcopy(answer) for answer in answers]  # a repeat is an entity of its own
        return answers

    async def _rows_by_keys(self, distinct: Sequence[tuple[Any, ...]], deleted_too: bool) -> list[Sequence[Any]]:
        """Return the driver's rows with these primary keys, statement by statement."""
        answers: list[Sequence[Any]] = []
        single = len(self._declaration.key) == 1
        size = _BATCH if single and self._sql.dialect.array_parameters else _LONGEST_KEY_LIST
        for start in range(0, len(distinct), size):
            part = list(distinct[start : start + size])
            if single and self._sql.dialect.array_parameters:
                count, values = 0, [[key for (key,) in part]]
            else:
                count = 1 << (len(part) - 1).bit_length()
                part += [part[-1]] * (count - len(part))
                values = [value for key in part for value in key]
            statement = self._sql.by_keys(count, deleted_too)
            answers.append(await self._session.perform(self._sql.dialect.fetch, statement, statement.bind(values)))
        return answers

    async def _rows_by(self, names: tuple[str, ...], keys: Sequence[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
        sql = self._sql
        if len(keys) > 1:
            return [sql.values(row) for rows in await self._rows_by_keys(keys, True) for row in rows]
        statement = sql.by_key(None, True) if names == self._declaration.key else sql.by_fields(names, None, True)
        rows = await self._session.perform(sql.dialect.fetch, statement, statement.bind(keys[0]))
        return [sql.values(row) for row in rows]

    def _entity_of(self, row: Sequence[Any]) -> T:
        return self._entity(self._sql.one_of_values(row))

    async def get_all(
        self,
        *criteria: Condition,
        sort: SortKeys = (),
        limit: int | None = None,
        offset: int = 0,
        lock: Lock | None = None,
    ) -> list[T]:
        self._require_window(limit, offset)
        self._require_transaction(lock)
        values: Values = []
        shape, expressions = self._shape(criteria, values)
        query = Query(shape, self._order(sort), lock=lock, deleted_too=self._deleted_too)
        if limit == 0:
            return []
        query = self._window(query, values, limit, offset)
        rows, load, _ = await self._rows(query, values, expressions)
        return self._entities(load(rows))

    async def paginate(self, request: PageRequest, *criteria: Condition, sort: SortKeys = ()) -> Page[T]:
        values: Values = []
        shape, expressions = self._shape(criteria, values)
        query = Query(shape, self._order(sort), deleted_too=self._deleted_too)
        window = list(values)
        rows, load, _ = await self._rows(
            self._window(query, window, request.limit + 1, request.offset), window, expressions
        )
        found = self._entities(load(rows))
        counted: int | None = None
        if request.count != "none":
            whole = len(found) <= request.limit and (bool(found) or request.offset == 0)
            counted = request.offset + len(found) if whole else await self._count(request, query, values, expressions)
        return self._page(request, found, counted)

    async def _count(self, request: PageRequest, query: Query, values: Values, expressions: Sequence[Any]) -> int:
        if request.count == "estimated" and not query.shape and not expressions and not self.soft_delete_column:
            estimate = self._sql.dialect.estimate(self._sql.table)
            if estimate is not None:
                known = (await self._session.perform(self._read_core, CoreRead(estimate, None), None)).scalar()
                if known is not None and known >= 0:
                    return int(known)
        if request.count == "capped":
            query = self._window(query._replace(order=(), what="capped count"), values, request.count_cap + 1, 0)
        else:
            query = query._replace(order=(), what="count")
        rows, _, _ = await self._rows(query, values, expressions)
        return int(rows[0][0])

    async def paginate_by_cursor(
        self, request: CursorRequest, *criteria: Condition, sort: SortKeys = ()
    ) -> CursorPage[T]:
        values: Values = []
        shape, expressions = self._shape(criteria, values)
        order = self._order(sort)
        text = self._query_text(criteria, order)
        position = self._position(request, order, text)
        reading = tuple(key.reversed for key in order) if position is not None and position.backwards else order
        query = Query(shape, reading, deleted_too=self._deleted_too)
        if position is not None and position.values:
            query = query._replace(nulls=self._sql.clauses.position_shape(position, reading, values))
        query = self._window(query, values, request.limit + 1, 0)
        rows, load, raw = await self._rows(query, values, expressions)
        sort_values = self._sql.sort_values(order, raw)
        found = list(zip(self._entities(load(rows)), map(sort_values, rows), strict=True))
        return self._cursor_page(request, position, found, text)

    def stream(self, *criteria: Condition, sort: SortKeys = (), batch_size: int = 1000) -> AsyncGenerator[T, None]:
        if type(batch_size) is not int or batch_size < 1:
            raise ValueError("batch_size must be at least 1")
        values: Values = []
        shape, expressions = self._shape(criteria, values)
        query = Query(shape, self._order(sort), deleted_too=self._deleted_too)
        batches: AsyncGenerator[Any, None]
        if expressions:
            load: Callable[..., list[T]] = self._sql.load_values
            core = CoreRead(self._sql.select_core(query, Literals(values), expressions), None)
            batches = self._session.iterate(self._stream_core, core, None)
        else:
            load = self._sql.load
            statement = self._sql.select(query)
            batches = self._session.iterate(self._sql.dialect.batches, statement, (statement.bind(values), batch_size))
        return self._stream(batches, load)

    async def _stream(
        self, batches: AsyncGenerator[Any, None], load: Callable[..., list[T]]
    ) -> AsyncGenerator[T, None]:
        async with StreamReader(batches) as reader:
            async for rows in reader:
                for entity in self._entities(load(rows)):
                    yield entity

    async def count(self, *criteria: Condition) -> int:
        values: Values = []
        shape, expressions = self._shape(criteria, values)
        query = Query(shape, deleted_too=self._deleted_too, what="count")
        rows, _, _ = await self._rows(query, values, expressions)
        return int(rows[0][0])

    async def exists(self, *criteria: Condition) -> bool:
        values: Values = []
        shape, expressions = self._shape(criteria, values)
        query = self._window(Query(shape, deleted_too=self._deleted_too, what="exists"), values, 1, 0)
        rows, _, _ = await self._rows(query, values, expressions)
        return bool(rows)

    # Writes: one entity

    async def add(self, entity: T) -> T:
        values, omitted, _ = self._new_row(self._dump(entity))
        try:
            if not omitted:
                statement = self._sql.insert(omitted, False)
                await self._session.perform(self._sql.dialect.execute, statement, statement.bind(values))
                return self._stored(values)
            return await self._insert_and_read(values, omitted)
        except DeadlockError:
            # InnoDB ends some of those that insert a key which was just deleted: not for being duplicates, as they are.
            if self._session.in_transaction:
                raise
            return await self._unclashed(lambda: self._insert(values, omitted))

    async def _insert_and_read(self, values: Values, omitted: frozenset[int]) -> T:
        sql = self._sql
        if sql.dialect.insert_returning:
            statement = sql.insert(omitted, True)
            rows = await self._session.perform(sql.dialect.fetch, statement, statement.bind(values))
            return self._entity(sql.one(rows[0]))
        async with self._atomic() as unit:
            statement = sql.insert(omitted, False)
            generated = await unit.perform(sql.dialect.insert, statement, statement.bind(values))
            key = tuple(
                generated if place in omitted else values[place]
                for place in (sql.place(name) for name in self._declaration.key)
            )
            entity = await self._read(unit, key)
        return self._present(entity)

    async def update(self, entity: T) -> T:
        values = list(self._dump(entity))
        key = self._key_in(values)
        names = self._written(values)
        arguments = self._versioned(values)
        versioned = self.version_column is not None
        if not self._sql.changed_by_database and not self._is_partial(values):
            statement = self._sql.update(names, versioned, self._deleted_too, "")
            touched = await self._session.perform(self._sql.dialect.execute, statement, statement.bind(arguments))
            if not touched:
                raise await self._explain_miss(self._session, key, versioned)
            return self._stored(values)
        return await self._change_and_read(
            lambda returning: self._sql.update(names, versioned, self._deleted_too, "row" if returning else ""),
            arguments,
            key,
            versioned,
        )

    async def patch(self, id: Any, values: Mapping[str, Any], version: int | None = None) -> T:
        changes = self._touched(self._changes(values))
        key = self._key_values(id)
        arguments = [*changes.values(), *key]
        if version is not None:
            arguments.append(self._expected_version(version))
        names = tuple(changes)
        return await self._change_and_read(
            lambda returning: self._sql.patch(names, version is not None, self._deleted_too, returning),
            arguments,
            key,
            version is not None,
        )

    async def _change_and_read(
        self, statement_for: Callable[[bool], Statement], values: Sequence[Any], key: tuple[Any, ...], versioned: bool
    ) -> T:
        sql = self._sql
        if sql.dialect.update_returning:
            statement = statement_for(True)
            rows = await self._session.perform(sql.dialect.fetch, statement, statement.bind(values))
            if not rows:
                raise await self._explain_miss(self._session, key, versioned)
            return self._entity(sql.one(rows[0]))
        async with self._atomic() as unit:
            statement = statement_for(False)
            touched = await unit.perform(sql.dialect.execute, statement, statement.bind(values))
            entity = await self._read(unit, key) if touched else None
            if entity is None:
                raise await self._explain_miss(unit, key, versioned)
        return entity

    async def delete(self, id: Any) -> bool:
        key = self._key_values(id)
        if self.soft_delete_column is None or self._deleted_too:
            statement = self._sql.delete(self._deleted_too)
            arguments = statement.bind(key)
        else:
            changes = self._touched({self.soft_delete_column: self._deleted_mark(True)})
            statement = self._sql.patch(tuple(changes), False, False, False)
            arguments = statement.bind([*changes.values(), *key])
        return bool(await self._session.perform(self._sql.dialect.execute, statement, arguments))

    async def restore(self, id: Any) -> bool:
        changes = self._touched({self._require_soft_delete(): self._deleted_mark(False)})
        statement = self._sql.restore(tuple(changes))
        arguments = statement.bind([*changes.values(), *self._key_values(id)])
        return bool(await self._session.perform(self._sql.dialect.execute, statement, arguments))

    # Writes: by criteria

    async def update_where(self, values: Mapping[str, Any], *criteria: Condition, everything: bool = False) -> int:
        self._require_criteria(criteria, everything)
        return await self._change_where(self._touched(self._changes(values)), criteria)

    async def _change_where(self, changes: Mapping[str, Any], criteria: Sequence[Condition]) -> int:
        names = tuple(changes)
        arguments: Values = list(changes.values())
        shape, expressions = self._shape(criteria, arguments)
        query = Query(shape, deleted_too=self._deleted_too)
        if expressions:
            core = self._sql.update_where_core(names, query, Literals(arguments), expressions)
            return int((await self._session.perform(self._execute_on, core, None)).rowcount)
        statement = self._sql.update_where(names, query)
        return int(await self._session.perform(self._sql.dialect.execute, statement, statement.bind(arguments)))

    async def delete_where(self, *criteria: Condition, everything: bool = False) -> int:
        self._require_criteria(criteria, everything)
        if self.soft_delete_column is not None and not self._deleted_too:
            return await self._change_where(
                self._touched({self.soft_delete_column: self._deleted_mark(True)}), criteria
            )
        arguments: Values = []
        shape, expressions = self._shape(criteria, arguments)
        query = Query(shape, deleted_too=self._deleted_too)
        if expressions:
            core = self._sql.delete_where_core(query, Literals(arguments), expressions)
            return int((await self._session.perform(self._execute_on, core, None)).rowcount)
        statement = self._sql.delete_where(query)
        return int(await self._session.perform(self._sql.dialect.execute, statement, statement.bind(arguments)))

    # Upserts

    async def upsert(self, entity: T, on: Sequence[str] | None = None) -> T:
        keys = self._conflict_key(on)
        row = self._upserted_row(entity)
        self._require_conflict_values(keys, row.values, row.omitted)
        if not self._session.in_transaction:
            # PostgreSQL may meet a racing insert of the same entity on another key than ``on``; next time it is there.
            with suppress(DuplicateKeyError):
                return await self._unclashed(lambda: self._upsert(keys, row))
        try:
            return await self._unclashed(lambda: self._upsert(keys, row))
        except DuplicateKeyError as error:
            raise await self._explain_collision(error, keys, row.values) from error.__cause__

    async def _upsert(self, keys: tuple[str, ...], row: "_NewRow") -> T:
        sql = self._sql
        if sql.dialect.insert_returning:
            statement = sql.upsert(row.omitted, row.defaulted, keys, True)
            rows = await self._session.perform(sql.dialect.fetch, statement, statement.bind(row.values))
            return self._entity(sql.one(rows[0]))
        async with self._atomic() as unit:
            statement = sql.upsert(row.omitted, row.defaulted, keys, False)
            await unit.perform(sql.dialect.execute, statement, statement.bind(row.values))
            found = await self._find(unit, keys, row.values)
        return self._present(found)

    async def get_or_add(self, entity: T, on: Sequence[str] | None = None) -> tuple[T, bool]:
        keys = self._conflict_key(on)
        values, omitted, _ = self._new_row(self._dump(entity))
        self._require_conflict_values(keys, values, omitted)
        return await self._unclashed(lambda: self._get_or_add(keys, values, omitted))

    async def _get_or_add(self, keys: tuple[str, ...], values: Values, omitted: frozenset[int]) -> tuple[T, bool]:
        found = await self._find(self._session, keys, values, deleted_too=self._deleted_too)
        if found is not None:
            return found, False
        try:
            async with self._undoable():
                return await self._insert(values, omitted), True
        except BuildingBlocksError as error:
            if isinstance(error, DuplicateKeyError):
                # Someone was faster. In a transaction a locking read sees that row, an older snapshot would not.
                lock = "share" if self._session.in_transaction else None
                found = await self._find(self._session, keys, values, deleted_too=self._deleted_too, lock=lock)
            if found is None:
                if isinstance(self._session, Transaction):
                    self._session.doom(error)  # only the step back was ours: the statement has failed
                raise
            return found, False

    async def _insert(self, values: Values, omitted: frozenset[int]) -> T:
        if omitted:
            return await self._insert_and_read(values, omitted)
        statement = self._sql.insert(omitted, False)
        await self._session.perform(self._sql.dialect.execute, statement, statement.bind(values))
        return self._stored(values)

    async def _find(
        self,
        session: DatabaseSession,
        keys: tuple[str, ...],
        values: Sequence[Any],
        *,
        deleted_too: bool = True,
        lock: str | None = None,
    ) -> T | None:
        statement = self._sql.by_fields(keys, lock, deleted_too)
        arguments = statement.bind([values[self._sql.place(name)] for name in keys])
        with reads_from_primary():  # it decides about a write
            rows = await session.perform(self._sql.dialect.fetch, statement, arguments)
        return self._entity(self._sql.one(rows[0])) if rows else None

    async def _unclashed(self, work: Callable[[], Awaitable[Answer]]) -> Answer:
        """Await an atomic step; on a session, where it is a transaction of its own, a deadlock repeats it.

        A deadlock is found at once. What has waited long for a lock, and in vain, does not wait again.
        """
        if self._session.in_transaction:
            return await work()
        give_up = time.monotonic() + _DEADLOCKED
        for _ in range(_UPSERT_ATTEMPTS - 1):
            try:
                return await work()
            except TransientError:
                if time.monotonic() > give_up:
                    raise
        return await work()

    async def _explain_collision(
        self, error: DuplicateKeyError, keys: tuple[str, ...], values: Sequence[Any]
    ) -> DuplicateKeyError:
        """Return the error with the fields of the key that is taken, where the database did not say."""
        if error.fields or self._session.in_transaction:
            return error
        for unique in self._declaration.unique_keys:
            incomplete = any(values[self._sql.place(name)] in (None, MISSING) for name in unique)
            if unique != keys and not incomplete and await self._find(self._session, unique, values) is not None:
                return DuplicateKeyError(f"{' and '.join(unique)} is already taken", fields=unique)
        return error

    # Writes: many entities

    async def add_many(self, entities: Iterable[T]) -> int:
        if self._sql.dialect.streams_inserts:
            return await self._add_streamed(entities)

        statements: dict[frozenset[int], Statement] = {}

        def prepare(entity: T) -> tuple[Any, Statement]:
            values, omitted, _ = self._new_row(self._dump(entity))
            statement = statements.get(omitted)
            if statement is None:
                statement = statements[omitted] = self._sql.insert(omitted, False)
            return statement.bind(values), statement  # bound here, the values of a batch need not be kept

        async def write(unit: DatabaseSession, rows: list[tuple[Any, Statement]]) -> None:
            for statement, group in _grouped(rows):
                await unit.perform(self._sql.dialect.insert_many, statement, group)

        return await self._in_batches(entities, prepare, write)

    async def _add_streamed(self, entities: Iterable[T]) -> int:
        """Write entities while they are read and checked, so that the database works meanwhile."""
        timeout = self._sql.dialect.timeouts.statement
        longest = _LONGEST_RUN if timeout is None else min(_LONGEST_RUN, timeout / 4)
        run: _Run[T] = _Run(entities, lambda entity: self._new_row(self._dump(entity)), longest)
        if not run.read_on():
            return 0
        async with self._atomic() as unit, unit.all_or_none() if self._session.in_transaction else _nothing():
            while run.read_on():
                statement = self._sql.insert(run.omitted, False)
                async with aclosing(run.rows(statement.bind)) as rows:
                    await unit.perform(self._sql.dialect.insert_many, statement, rows)
                if run.error is not None:
                    raise run.error
                for omitted, values in run.take_others():
                    statement = self._sql.insert(omitted, False)
                    bound = [statement.bind(row) for row in values]
                    await unit.perform(self._sql.dialect.insert_many, statement, bound)
        return run.count

    async def upsert_many(self, entities: Iterable[T], on: Sequence[str] | None = None) -> int:
        keys = self._conflict_key(on)

        def prepare(entity: T) -> tuple[Values, tuple[frozenset[int], frozenset[int]]]:
            values, omitted, defaulted = self._upserted_row(entity)
            self._require_conflict_values(keys, values, omitted)
            return values, (omitted, defaulted)

        async def write(unit: DatabaseSession, rows: list[tuple[Values, Any]]) -> None:
            for (omitted, defaulted), group in _runs(rows):
                statement = self._sql.upsert(omitted, defaulted, keys, False)
                bound = [statement.bind(values) for values in group]
                await unit.perform(self._sql.dialect.upsert_many, statement, bound)

        return await self._in_batches(entities, prepare, write)

    async def update_many(self, entities: Iterable[T]) -> int:
        versioned = self.version_column is not None

        def prepare(entity: T) -> tuple[Values, tuple[str, ...]]:
            values = list(self._dump(entity))
            return self._versioned(values), self._written(values)

        async def write(unit: DatabaseSession, rows: list[tuple[Values, tuple[str, ...]]]) -> None:
            for names, group in _runs(rows):
                answer: Literal["mark", ""] = "mark" if self._sql.dialect.counts_by_returning else ""
                statement = self._sql.update(names, versioned, self._deleted_too, answer)
                bound = [statement.bind(values) for values in group]
                touched = await unit.perform(self._sql.dialect.execute_many, statement, bound)
                if touched < len(group):
                    raise await self._first_miss(unit, group, versioned)

        return await self._in_batches(entities, prepare, write)

    async def _in_batches(
        self, entities: Iterable[T], prepare: Callable[[T], Any], write: Callable[[Any, list[Any]], Any]
    ) -> int:
        """Write entities batch by batch, all or none, and return how many."""
        remaining = iter(entities)
        done = 0
        batch = [prepare(entity) for entity in islice(remaining, _BATCH)]
        if not batch:
            return 0
        async with self._atomic() as unit, unit.all_or_none() if self._session.in_transaction else _nothing():
            while batch:
                await write(unit, batch)
                done += len(batch)
                batch = [prepare(entity) for entity in islice(remaining, _BATCH)]
        return done

    async def _first_miss(self, unit: DatabaseSession, rows: Sequence[Values], versioned: bool) -> Exception:
        for values in rows:
            stored = await self._read(unit, self._key_in(values))
            if stored is None:
                return self._missing()
        return self._stale() if versioned else self._missing()

    # What the methods share

    @staticmethod
    def _present(entity: T | None) -> T:
        """Return what the same transaction has just written."""
        if entity is None:
            raise RuntimeError("a trigger or rule of the database has removed the row that was written")
        return entity

    def _shape(self, criteria: Sequence[Any], values: Values) -> tuple[tuple[Any, ...], list[Any]]:
        """Return the shape of the domain's criteria, their values appended, and the SQLAlchemy expressions."""
        expressions = [item for item in criteria if isinstance(item, sa.ClauseElement)]
        own = [item for item in criteria if not isinstance(item, sa.ClauseElement)] if expressions else criteria
        return self._sql.clauses.shape(own, values), expressions

    def _window(self, query: Query, values: Values, limit: int | None, offset: int) -> Query:
        if limit is not None:
            values.append(limit)
        pages = offset > 0 or (limit is not None and self._sql.dialect.paging_needs_order)
        if pages:
            values.append(offset)
        return query._replace(limit=limit is not None, offset=pages)

    async def _rows(
        self, query: Query, values: Values, expressions: Sequence[Any]
    ) -> tuple[Sequence[Any], Callable[..., list[T]], bool]:
        """Return rows, what makes entities of them, and whether they are the driver's own."""
        sql = self._sql
        if not expressions:
            statement = sql.select(query)
            rows = await self._session.perform(sql.dialect.fetch, statement, statement.bind(values))
            return rows, sql.load, True
        core = CoreRead(sql.select_core(query, Literals(values), expressions), query.lock)
        result = await self._session.perform(self._read_core, core, None)
        return result.all(), sql.load_values, False

    async def _read_core(self, connection: Any, statement: CoreRead, parameters: Any) -> Any:
        return await self._execute_on(connection, statement.core, parameters)

    async def _stream_core(
        self, connection: Any, statement: CoreRead, parameters: Any
    ) -> AsyncGenerator[Sequence[Any], None]:
        async with aclosing(self._session.root.stream_on(connection, statement.core, parameters)) as batches:
            async for rows in batches:
                yield rows

    async def _read(self, session: DatabaseSession, key: tuple[Any, ...]) -> T | None:
        statement = self._sql.by_key(None, True)
        rows = await session.perform(self._sql.dialect.fetch, statement, statement.bind(key))
        return self._entity(self._sql.one(rows[0])) if rows else None

    def _query_text(self, criteria: Sequence[Any], order: Sequence[Any]) -> str:
        parts = []
        for item in criteria:
            if isinstance(item, sa.ClauseElement):
                compiled = item.compile(dialect=self._sql.compiler)
                parts.append(f"{compiled} {compiled.params!r}")
            else:
                parts.append(repr(item))
        return f"{self._sql.table.fullname}|{order!r}|{parts!r}|{self._deleted_too}"

    def _new_row(self, dumped: Sequence[Any]) -> "_NewRow":
        sql = self._sql
        values = list(dumped)
        left: list[int] = []
        defaulted: list[int] = []
        now: datetime | None = None
        for place, fill in self._declaration.fills:
            if values[place] is None or values[place] is MISSING:
                if fill == "now":
                    now = now or self._now()
                    values[place] = now
                elif fill == "database":
                    left.append(place)
                else:
                    values[place] = fill()
                    defaulted.append(place)
        if self._is_partial(values):
            left += [place for place, value in enumerate(values) if value is MISSING]
        omitted = sql.never_written.union(left) if left else sql.never_written
        for place in sql.key_places:
            if values[place] is None and place not in omitted:
                name = self._declaration.mapping.names[place]
                raise ConstraintError(f"{name}: a value is required", fields=(name,))
        if not defaulted:
            return _NewRow(values, omitted, _NO_PLACES)
        revived = None if self.soft_delete_column is None else sql.place(self.soft_delete_column)
        return _NewRow(values, omitted, frozenset(place for place in defaulted if place != revived))

    def _is_partial(self, values: Sequence[Any]) -> bool:
        """Whether a hand-written mapper has left columns out."""
        return self._declaration.writes_by_hand and any(value is MISSING for value in values)

    def _upserted_row(self, entity: T) -> "_NewRow":
        values = list(self._dump(entity))
        if self.updated_at_column is not None:
            values[self._sql.place(self.updated_at_column)] = None  # set to now, as by every change
        return self._new_row(values)

    def _stored(self, values: Values) -> T:
        """Return the entity that now stands in the database with these values."""
        for place in self._declaration.mutable:
            values[place] = copy.deepcopy(values[place])  # never shared with the caller's entity
        return self._entity(self._sql.load_values([values])[0])

    def _key_in(self, values: Sequence[Any]) -> tuple[Any, ...]:
        key = tuple([values[place] for place in self._sql.key_places])
        if any(value is None or value is MISSING for value in key):
            raise InvalidInputError("the entity has no key", fields=self._declaration.key)
        return key

    def _written(self, values: Values) -> tuple[str, ...]:
        """Return the names of the columns that an update writes; those that change by themselves get their value."""
        names = self._sql.always_written
        if not self._is_partial(values):
            return names
        for name, fill in self._declaration.update_fills.items():
            if values[self._sql.place(name)] is MISSING:
                values[self._sql.place(name)] = fill()
        return tuple(name for name in names if values[self._sql.place(name)] is not MISSING)

    def _versioned(self, values: Values) -> Values:
        """Set the update timestamp and the next version; return the values with the version expected behind them."""
        if self.updated_at_column is not None:
            values[self._sql.place(self.updated_at_column)] = self._now()
        if self.version_column is None:
            return values
        place = self._sql.place(self.version_column)
        expected = self._expected_version(values[place])
        values[place] = expected + 1
        return [*values, expected]

    def _expected_version(self, version: Any) -> int:
        if self.version_column is None:
            raise ValueError(f"{type(self).__name__} declares no version_column, so no version can be expected")
        if version is None or version is MISSING:
            raise InvalidInputError("the entity has no version", fields=(self.version_column,))
        try:
            return int(self._declaration.mapping.check(self.version_column, version))
        except InvalidInputError:
            if type(version) is int:
                raise self._stale() from None  # a number that the column cannot hold is nobody's version
            raise

    def _touched(self, changes: dict[str, Any]) -> dict[str, Any]:
        """Add the columns that change with every update to those that a caller changes."""
        for name, fill in self._declaration.update_fills.items():
            if name not in changes:
                changes[name] = fill()
        if self.updated_at_column is not None:
            changes[self.updated_at_column] = self._now()
        return changes

    def _require_conflict_values(self, keys: Sequence[str], values: Sequence[Any], omitted: frozenset[int]) -> None:
        for name in keys:
            place = self._sql.place(name)
            if place in omitted or values[place] is None:
                raise InvalidInputError(f"{name}: a value is required to find the entity by", fields=(name,))

    async def _explain_miss(self, session: DatabaseSession, key: tuple[Any, ...], versioned: bool) -> Exception:
        """Return why an update touched nothing."""
        if versioned:
            statement = self._sql.by_key(None, self._deleted_too)
            with reads_from_primary():
                if await session.perform(self._sql.dialect.fetch, statement, statement.bind(key)):
                    return self._stale()
        return self._missing()

    @asynccontextmanager
    async def _atomic(self) -> AsyncIterator[Any]:
        """Give the caller's transaction, or one of its own."""
        if self._session.in_transaction:
            yield self._session
        else:
            async with self._session.transaction() as unit:
                yield unit

    @asynccontextmanager
    async def _undoable(self) -> AsyncIterator[None]:
        """Let a statement fail without dooming the caller's transaction."""
        if self._session.in_transaction:
            async with self._session.savepoint():  # type: ignore[attr-defined]
                yield
        else:
            yield


class _NewRow(NamedTuple):
    """A row to insert."""

    values: Values
    """In column order, with defaults filled in."""
    omitted: frozenset[int]
    """The places that the database fills."""
    defaulted: frozenset[int]
    """The places that hold a default, which an upsert does not write over what is there."""


class _Run(Generic[T]):
    """Rows of one INSERT that is sent while its entities are read: those that the first one's statement fits.

    It ends after ``longest`` seconds, ``_BATCH`` rows after the first that needs another statement, or with the
    entities. An error of an entity ends it as well, and is left in ``error``: what the database has by then is
    undone by whoever began the transaction.
    """

    def __init__(self, entities: Iterable[T], prepare: Callable[[T], _NewRow], longest: float) -> None:
        self._prepared = (prepare(entity) for entity in entities)  # no map(): a StopIteration would end it silently
        self._longest = longest
        self._head: deque[_NewRow] = deque()
        self._others: dict[frozenset[int], list[Values]] = {}
        self.count = 0
        self.error: Exception | None = None

    def read_on(self) -> bool:
        """Check the first entities of the next run, and answer whether there are any."""
        self._head.extend(islice(self._prepared, _HEAD - len(self._head)))
        return bool(self._head)

    @property
    def omitted(self) -> frozenset[int]:
        """The places that the database fills in this run."""
        return self._head[0].omitted

    async def rows(self, bind: Callable[[Values], Any]) -> AsyncGenerator[Any, None]:
        """Yield the run's rows as the driver takes them, and let other tasks work in between."""
        omitted, mixed = self.omitted, 0
        end = time.monotonic() + self._longest
        try:
            while row := self._head.popleft() if self._head else next(self._prepared, None):
                self.count += 1
                if row.omitted == omitted:
                    yield bind(row.values)
                else:
                    self._others.setdefault(row.omitted, []).append(row.values)
                mixed += 1 if self._others else 0
                if mixed == _BATCH or time.monotonic() > end:
                    return
                if self.count % _TURN == 0:
                    await asyncio.sleep(0)
        except Exception as error:  # noqa: BLE001 - the caller's own as well; raised again outside of the driver
            self.error = error

    def take_others(self) -> Iterable[tuple[frozenset[int], list[Values]]]:
        """Return the rows that need other statements, by the places that the database fills."""
        others, self._others = self._others, {}
        return others.items()


@asynccontextmanager
async def _nothing() -> AsyncIterator[None]:
    yield


def _runs(rows: Iterable[tuple[Any, Any]]) -> Iterator[tuple[Any, list[Any]]]:
    """Group values by the statement that they need, in their own order: of two with one key the later must win."""
    for kind, run in groupby(rows, itemgetter(1)):
        yield kind, [values for values, _ in run]


def _grouped(rows: Iterable[tuple[Any, Any]]) -> Iterable[tuple[Any, list[Any]]]:
    """Group values by the statement that they need, in the order of its first use."""
    groups: dict[Any, list[Any]] = {}
    for values, kind in rows:
        groups.setdefault(kind, []).append(values)
    return groups.items()
