"""Statements that are compiled once per repository class, database and shape, and then run on the driver.

SQLAlchemy's own compiler writes the SQL and its types supply the processors of parameters and results; what is
left for each call is to put the parameters in the driver's order.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine.interfaces import Dialect
from sqlalchemy.types import TypeDecorator

from fastapi_building_blocks.infrastructure.database.plain_types import CHECKED
from fastapi_building_blocks.infrastructure.database.types import ExactDecimal, UtcDateTime

Values = Sequence[Any]

_PREFIX = "arg__"
_MOST_SHAPES = 512
_NUMERIC_OID = 1700
_FLOAT_OID = 701


class Statement:
    """Compiled SQL with the function that turns values into the driver's parameters."""

    __slots__ = ("bind", "columns", "guards_upsert", "lock", "name", "on", "reads", "sql", "table")

    def __init__(
        self,
        sql: str,
        table: sa.Table,
        bind: Callable[[Values], tuple[Any, ...]],
        *,
        shape: str = "statement",
        reads: bool = False,
        lock: str | None = None,
        guards_upsert: bool = False,
        columns: Sequence[sa.Column[Any]] = (),
        on: Sequence[str] = (),
    ) -> None:
        self.sql = sql
        self.table = table
        self.bind = bind
        self.name = f"{table.name} {shape}"
        """What observers tell it apart by: there are as many as repositories have methods, not one for each filter."""
        self.reads = reads
        """Whether it may be sent again when its connection turns out to be dead."""
        self.lock = lock
        self.guards_upsert = guards_upsert
        """Whether it fails on purpose where an upsert meets another unique key than its own."""
        self.columns = columns
        """The columns of a bulk INSERT, in the order of its rows."""
        self.on = on
        """The keys of those columns by which an upsert finds the row that is there."""


class CoreRead:
    """A query that SQLAlchemy runs itself, with what a session must know of it, as a ``Statement`` says it."""

    __slots__ = ("core", "lock", "reads")

    def __init__(self, core: Any, lock: str | None) -> None:
        self.core = core
        self.lock = lock
        self.reads = lock is None


class Placeholders:
    """Makes numbered placeholders, for a statement that is compiled once."""

    def __init__(self) -> None:
        self._count = 0

    def __call__(self, kind: Any) -> Any:
        placeholder = sa.bindparam(f"{_PREFIX}{self._count}", type_=kind)
        self._count += 1
        return placeholder


class Literals:
    """Hands out the values themselves, for a statement that SQLAlchemy runs."""

    def __init__(self, values: Values) -> None:
        self._values = iter(values)

    def __call__(self, kind: Any) -> Any:
        return sa.bindparam(None, next(self._values), type_=kind, unique=True)


class StatementCache:
    """The statements of one repository class on one database, by shape; the oldest go when there are too many."""

    def __init__(self, dialect: Dialect) -> None:
        self._dialect = dialect
        self._statements: dict[Hashable, Statement] = {}

    def clear(self) -> None:
        """Forget all of them."""
        self._statements.clear()

    def get(self, key: Hashable) -> Statement | None:
        """Return the statement of a shape, if it was compiled before."""
        return self._statements.get(key)

    def put(self, key: Hashable, core: Any, table: sa.Table, **facts: Any) -> Statement:
        """Compile a Core statement that was made with ``Placeholders`` and keep it."""
        if len(self._statements) >= _MOST_SHAPES:
            del self._statements[next(iter(self._statements))]
        statement = self._statements[key] = compile_statement(core, table, self._dialect, **facts)
        return statement


def compile_statement(core: Any, table: sa.Table, dialect: Dialect, **facts: Any) -> Statement:
    """Return the driver's SQL of a Core statement that was made with ``Placeholders``."""
    compiled = core.compile(dialect=dialect)
    if compiled.positiontup is None:
        raise TypeError(f"the driver {dialect.driver} does not take its parameters by position")
    bind = _binder(compiled, dialect)
    return Statement(compiled.string, table, bind, **facts)


def _binder(compiled: Any, dialect: Dialect) -> Callable[[Values], tuple[Any, ...]]:
    """Generate the function from values, in the order of their placeholders, to parameters in the driver's order."""
    names: dict[str, Any] = {}
    parts = []
    # SQLAlchemy would compute a column's default for each execution; compiled once, it would stay None for ever.
    computed = {column.key for column in (*compiled.insert_prefetch, *compiled.update_prefetch)}
    if computed:
        raise TypeError(f"the statement leaves {', '.join(sorted(computed))} to a default of Python's")
    for place, name in enumerate(compiled.positiontup):
        kind = compiled.binds[name].type
        processor = bind_processor(kind, dialect)
        if not name.startswith(_PREFIX):
            value = compiled.params[name]
            names[f"c{place}"] = value if processor is None or value is None else processor(value)
            parts.append(f"c{place}")
            continue
        value = f"v[{int(name.removeprefix(_PREFIX))}]"
        if processor is None:
            parts.append(value)
        else:
            names[f"p{place}"] = processor
            parts.append(
                f"p{place}({value})" if maps_none(kind) else f"(None if {value} is None else p{place}({value}))"
            )
    exec(f"def bind(v): return ({''.join(f'{part}, ' for part in parts)})", names)  # noqa: S102 - from numbers only
    bind: Callable[[Values], tuple[Any, ...]] = names["bind"]
    return bind


def bind_processor(kind: Any, dialect: Dialect) -> Callable[[Any], Any] | None:
    """Return what turns a Python value into the driver's, or None where it is the same.

    The value has passed the column rules, which leave little to do for the types that those know.
    """
    if type(kind) is sa.Boolean:
        return None  # every driver takes True and False
    if type(kind) is ExactDecimal:
        return kind.checked_bind_processor(dialect)
    processor: Callable[[Any], Any] | None = kind.dialect_impl(dialect).bind_processor(dialect)
    if isinstance(kind, TypeDecorator) and type(kind) is not UtcDateTime:
        return processor  # a service's own: no rule is known for its values
    return CHECKED.get(processor, processor)


def result_processor(kind: Any, dialect: Dialect) -> Callable[[Any], Any] | None:
    """Return what turns a driver's value into the Python value, or None where it is the same."""
    code = _FLOAT_OID if isinstance(kind, sa.Float) else _NUMERIC_OID  # asked for by numbers on PostgreSQL only
    processor: Callable[[Any], Any] | None = kind.dialect_impl(dialect).result_processor(dialect, code)
    return processor


def maps_none(kind: Any) -> bool:
    """Whether a type has a value of its own for None; plain ``sa.JSON`` would write ``null`` instead of NULL."""
    return isinstance(kind, TypeDecorator) and type(kind).__module__.partition(".")[0] != __name__.partition(".")[0]
