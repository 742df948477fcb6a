"""Every statement that a repository can send, compiled for any database without one, with arguments bound."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple, get_args, get_type_hints
from uuid import UUID

import sqlalchemy as sa

from fastapi_building_blocks.domain import Criterion, InvalidQueryError, Sort, UnsupportedOperationError
from fastapi_building_blocks.domain.query import And, Comparison, Not, Operator, Or
from fastapi_building_blocks.domain.repository import Lock
from fastapi_building_blocks.infrastructure import SQLAlchemyRepository, UtcDateTime
from fastapi_building_blocks.infrastructure.database.dialects import Timeouts, dialect_for
from fastapi_building_blocks.infrastructure.database.plain_types import adapt_dialect
from fastapi_building_blocks.infrastructure.persistence.repositories.declared_repository import Position
from fastapi_building_blocks.infrastructure.persistence.repositories.sqlalchemy_statements import Statement
from fastapi_building_blocks.infrastructure.persistence.repositories.table_statements import Query, TableStatements
from tests.contracts.sample_entities import CONTRACTS

URLS = {
    "postgres": "postgresql+asyncpg://u:p@h/db",
    "mysql": "mysql+aiomysql://u:p@h/db",
    "sqlite": "sqlite+aiosqlite:///:memory:",
    "mssql": "mssql+aioodbc://u:p@h/db?driver=x",
}
SQL_SERVER_2022 = (16, 0, 4000)
LOCKS: tuple[Any, ...] = (None, *get_args(Lock))
WHATS = get_args(get_type_hints(Query)["what"])
ANSWERS = get_args(get_type_hints(TableStatements.update)["answer"])


@dataclasses.dataclass
class Pulse:
    id: int | None = None
    at: datetime | None = None


class Pulses(SQLAlchemyRepository[Pulse]):
    """Of a row that the database fills alone."""

    table = sa.Table(
        "pulses",
        sa.MetaData(),
        sa.Column("id", sa.Integer(), primary_key=True),
        sa.Column("at", UtcDateTime(), server_default=sa.func.now()),
    )


@dataclasses.dataclass
class Odd:
    key: int
    select: str
    big: bool | None = None
    when: str | None = None


class Odds(SQLAlchemyRepository[Odd]):
    """Of names that have to be quoted, and mean something to someone."""

    table = sa.Table(
        "or:der [by]",
        sa.MetaData(),
        sa.Column("k?y", sa.Integer(), primary_key=True, autoincrement=False, key="key"),
        sa.Column("select", sa.String(20), nullable=False, unique=True),
        sa.Column("so:big?", sa.Boolean(), key="big"),
        sa.Column("wh]en", sa.String(20), key="when"),
        schema="my schema",
    )


REPOSITORIES: tuple[Any, ...] = (*[contract.declare(SQLAlchemyRepository) for contract in CONTRACTS], Pulses, Odds)


class Emitted(NamedTuple):
    method: str
    statement: Statement
    arguments: tuple[Any, ...]
    query: Query | None = None


def statements_of(repository: Any, database: str) -> TableStatements[Any]:
    """Return the statements of a repository class as a session on this database would have them; no I/O, no driver."""
    url = sa.make_url(URLS[database])
    compiler = url.get_dialect()(**({"paramstyle": "qmark"} if database == "mssql" else {}))
    if database == "mssql":  # what the first connection would tell
        compiler.server_version_info = SQL_SERVER_2022
        compiler._setup_version_attributes()
    adapt_dialect(compiler)
    declaration = repository.declaration()
    return TableStatements(
        declaration,
        declaration.mapping,
        dialect_for(url, Timeouts(5.0, 30.0)),
        compiler,
        {
            "version": repository.version_column,
            "soft_delete": repository.soft_delete_column,
            "created_at": repository.created_at_column,
        },
    )


def every_statement(repository: Any, database: str) -> Iterator[Emitted]:
    """Yield each statement that the repository class can send, once in every form."""
    yield from _Catalogue(repository, database)


def statement_methods() -> set[str]:
    """Return the names of the public methods that answer a statement."""
    return {
        name
        for name, method in vars(TableStatements).items()
        if not name.startswith("_") and callable(method) and get_type_hints(method).get("return") is Statement
    }


class _Catalogue:
    def __init__(self, repository: Any, database: str) -> None:
        self.repository = repository
        self.sql = statements_of(repository, database)
        self.dialect = self.sql.dialect
        self.declaration = repository.declaration()
        self.table: sa.Table = repository.table
        self.names = tuple(self.declaration.mapping.names)
        self.row = [value_for(self.table.columns[name]) for name in self.names]
        self.key = [self.value(name) for name in self.declaration.key]
        self.fields = tuple(self.declaration.field_types)

    def __iter__(self) -> Iterator[Emitted]:
        yield from self.reads()
        yield from self.reads_by_key()
        yield from self.writes()
        yield from self.writes_by_criteria()
        yield from self.upserts()

    def value(self, name: str) -> Any:
        return value_for(self.table.columns[name])

    # Reads

    def reads(self) -> Iterator[Emitted]:
        for criteria in self.criteria():
            values: list[Any] = []
            yield self.select(Query(self.sql.clauses.shape(criteria, values)), values)
        for order in self.orders():
            yield self.select(Query(order=order), [])
            for nulls in itertools.product((False, True), repeat=len(order)):
                keys = list(zip(order, nulls, strict=True))
                if any(null and not self.table.columns[key.field].nullable for key, null in keys):
                    continue
                values = []
                position = Position(tuple(None if null else self.value(key.field) for key, null in keys), False)
                query = Query(order=order, nulls=self.sql.clauses.position_shape(position, order, values))
                yield self.windowed(query, values, limit=True, offset=False)
        order = next(self.orders())
        for what, limit, offset, deleted_too in itertools.product(WHATS, *[(True, False)] * 3):
            if what == "rows" or (limit and what != "count"):
                query = Query(order=order if what == "rows" else (), deleted_too=deleted_too, what=what)
                yield self.windowed(query, [], limit=limit, offset=offset)
        for lock, limit in itertools.product(LOCKS, (True, False)):
            with_lock = Query(order=order, lock=lock)
            yield from self.where_it_can(lambda query=with_lock, limit=limit: self.windowed(query, [], limit, False))

    def select(self, query: Query, values: Sequence[Any]) -> Emitted:
        statement = self.sql.select(query)
        return Emitted("select", statement, statement.bind(values), query)

    def windowed(self, query: Query, values: list[Any], limit: bool, offset: bool) -> Emitted:
        """A read as a repository's ``_window`` limits it."""
        pages = offset or (limit and self.dialect.paging_needs_order)
        return self.select(query._replace(limit=limit, offset=pages), [*values, *[7] * limit, *[3] * pages])

    def criteria(self) -> Iterator[list[Criterion]]:
        comparisons = [
            Comparison(name, operator, operand)
            for name, operator in itertools.product(self.fields, Operator)
            for operand in self.operands(name, operator)
            if self.is_answered(Comparison(name, operator, operand))
        ]
        one, other = comparisons[0], comparisons[-1]
        for comparison in comparisons:
            yield [comparison]
            yield [And((Not(comparison), one)), Or((other, Not(And((comparison, other)))))]

    def operands(self, name: str, operator: Operator) -> Sequence[Any]:
        value = self.value(name)
        if operator is Operator.IS_NULL:
            return (True, False)
        if operator in (Operator.IN, Operator.NOT_IN):
            return ((), (value,), (value, None, value))
        if operator is Operator.BETWEEN:
            return ((value, value),)
        return (value,)

    def is_answered(self, comparison: Comparison) -> bool:
        """Whether the repository takes it: no text search in numbers, no order of documents."""
        try:
            self.sql.clauses.shape([comparison], [])
        except InvalidQueryError:
            return False
        return True

    def orders(self) -> Iterator[tuple[Sort, ...]]:
        key = tuple(Sort(name) for name in self.declaration.key)
        yield key
        yield tuple(sort.reversed for sort in key)
        for name in self.fields:
            if name in self.declaration.key or isinstance(self.table.columns[name].type, sa.JSON):
                continue
            ends = (None, "first", "last") if self.table.columns[name].nullable else (None,)
            for descending, nulls in itertools.product((False, True), ends):
                yield (Sort(name, descending, nulls), *key)

    def reads_by_key(self) -> Iterator[Emitted]:
        def by_key(lock: Any, deleted_too: bool) -> Emitted:
            statement = self.sql.by_key(lock, deleted_too)
            return Emitted("by_key", statement, statement.bind(self.key))

        def by_fields(names: tuple[str, ...], lock: Any, deleted_too: bool) -> Emitted:
            statement = self.sql.by_fields(names, lock, deleted_too)
            return Emitted("by_fields", statement, statement.bind([self.value(name) for name in names]))

        for lock, deleted_too in itertools.product(LOCKS, (True, False)):
            yield from self.where_it_can(lambda lock=lock, too=deleted_too: by_key(lock, too))
            for unique in self.declaration.unique_keys:
                yield from self.where_it_can(
                    lambda unique=unique, lock=lock, too=deleted_too: by_fields(unique, lock, too)
                )
        for count, deleted_too in itertools.product((1, 4), (True, False)):
            array = self.dialect.array_parameters and len(self.key) == 1
            statement = self.sql.by_keys(0 if array else count, deleted_too)
            yield Emitted("by_keys", statement, statement.bind([self.key * count] if array else self.key * count))

    def where_it_can(self, emit: Callable[[], Emitted]) -> Iterator[Emitted]:
        try:
            yield emit()
        except UnsupportedOperationError:
            assert self.dialect.name == "sqlite"

    # Writes

    def omissions(self) -> Iterator[frozenset[int]]:
        """What an entity can leave to the database: nothing, each column that it fills, and all of these."""
        filled = [place for place, fill in self.declaration.fills if fill == "database"]
        yield frozenset()
        for place in filled:
            yield frozenset({place})
        yield frozenset(filled)

    def writes(self) -> Iterator[Emitted]:
        for omitted, returning in itertools.product(self.omissions(), (True, False)):
            statement = self.sql.insert(omitted, returning)
            yield Emitted("insert", statement, statement.bind(self.row))
        versions = (True, False) if self.repository.version_column else (False,)
        written = self.sql.always_written
        for version in versions:
            if written:
                for answer, deleted_too in itertools.product(ANSWERS, (True, False)):
                    statement = self.sql.update(written, version, deleted_too, answer)
                    yield Emitted("update", statement, statement.bind([*self.row, 1]))
            for name, returning, deleted_too in itertools.product(written, (True, False), (True, False)):
                statement = self.sql.patch((name,), version, deleted_too, returning)
                yield Emitted("patch", statement, statement.bind([self.value(name), *self.key, 1]))
        for deleted_too in (True, False):
            statement = self.sql.delete(deleted_too)
            yield Emitted("delete", statement, statement.bind(self.key))
        if self.repository.soft_delete_column:
            statement = self.sql.restore((self.repository.soft_delete_column,))
            yield Emitted("restore", statement, statement.bind([None, *self.key]))

    def writes_by_criteria(self) -> Iterator[Emitted]:
        for criteria in ([], *itertools.islice(self.criteria(), 0, None, 7)):
            for deleted_too in (True, False):
                for names in filter(None, (self.sql.always_written[:2],)):
                    values = [self.value(name) for name in names]
                    query = Query(self.sql.clauses.shape(criteria, values), deleted_too=deleted_too)
                    statement = self.sql.update_where(names, query)
                    yield Emitted("update_where", statement, statement.bind(values), query)
                values = []
                query = Query(self.sql.clauses.shape(criteria, values), deleted_too=deleted_too)
                statement = self.sql.delete_where(query)
                yield Emitted("delete_where", statement, statement.bind(values), query)

    def upserts(self) -> Iterator[Emitted]:
        for omitted, on, returning in itertools.product(self.omissions(), self.declaration.unique_keys, (True, False)):
            if omitted.isdisjoint(map(self.sql.place, on)):
                for defaulted in {frozenset[int](), self.defaulted() - omitted}:
                    statement = self.sql.upsert(omitted, defaulted, on, returning)
                    yield Emitted("upsert", statement, statement.bind(self.row))

    def defaulted(self) -> frozenset[int]:
        """The places that a default of Python's can fill."""
        return frozenset(place for place, fill in self.declaration.fills if callable(fill))


_VALUES: dict[type, Any] = {
    bool: True,
    int: 5,
    str: "text",
    UUID: UUID(int=5),
    datetime: datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC),
    object: {"a": [1]},
    dict: {"a": [1]},
}


def value_for(column: sa.Column[Any]) -> Any:
    """Return a value that the column holds."""
    return _VALUES[column.type.python_type]
