"""What plain SQLAlchemy types need to keep their values on every database, applied to an engine's dialect."""

from collections.abc import Callable
from datetime import UTC, datetime
from decimal import Context, Decimal, Inexact, InvalidOperation
from typing import Any, cast
from uuid import UUID, SafeUUID

import sqlalchemy as sa
from sqlalchemy.dialects import mysql, postgresql, sqlite
from sqlalchemy.engine.interfaces import Dialect

from fastapi_building_blocks.domain.errors import BuildingBlocksError, InvalidInputError

Processor = Callable[[Any], Any]

# The difference to an epoch moves between aware and naive ten times as fast as datetime.replace().
_UTC_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_WALL_CLOCK_EPOCH = datetime(1970, 1, 1)  # noqa: DTZ001


def adapt_dialect(dialect: Dialect) -> None:
    """Make plain SQLAlchemy types keep their values on the database of this dialect, in DDL and in statements.

    To be called once on the ``Dialect`` of every new engine, before its first statement: by sessions, and by an Alembic
    environment that makes an engine of its own.

    - PostgreSQL (asyncpg): ``sa.Uuid`` answers plain ``uuid.UUID`` objects; no codec is needed.
    - MySQL, MariaDB: ``sa.Uuid`` is CHAR(32) (MariaDB's own type sorts by swapped segments), ``sa.DateTime`` and
      ``sa.Time`` keep microseconds, ``sa.Float`` is DOUBLE, ``sa.Text`` and ``sa.LargeBinary`` hold more than 64 KiB,
      ``sa.Numeric`` without a precision keeps 30 digits after the point.
    - SQLite: ``sa.Numeric`` is kept as long as its 15 digits suffice and refused beyond, never rounded.
    - SQL Server: ``sa.DateTime`` is DATETIME2, whose precision is microseconds rather than 3 ms; ``sa.String``, ``sa.Text``
      and ``sa.Enum`` are NVARCHAR, since VARCHAR turns what is not in the database's code page into question marks.
    - ``sa.DateTime(timezone=True)`` is an instant in UTC, as ``UtcDateTime``, where the database knows no time zones.
    """
    adapt = {
        "postgresql": _adapt_postgresql,
        "mysql": _adapt_mysql,
        "mariadb": _adapt_mysql,
        "sqlite": _adapt_sqlite,
        "mssql": _adapt_mssql,
    }.get(dialect.name)
    if adapt is not None:
        adapt(dialect)


# Instants and decimals


def to_utc(value: Any) -> datetime:
    """Return an aware ``datetime`` as the same instant in UTC.

    Raises:
        InvalidInputError: it has no UTC offset, is not a datetime, or lies outside the years 1 to 9999 in UTC.
    """
    if type(value) is datetime and value.tzinfo is UTC:
        return value
    if not isinstance(value, datetime):
        raise InvalidInputError(f"expected a date and time, got {type(value).__name__}")
    if value.utcoffset() is None:
        raise InvalidInputError("expected a date and time with a UTC offset, got a naive one")
    try:
        moment = value.astimezone(UTC)
    except OverflowError as error:
        raise InvalidInputError("the date and time lies outside the years 1 to 9999 in UTC") from error
    if type(moment) is datetime:
        return moment
    return datetime.combine(moment.date(), moment.time(), UTC)


def utc_to_wall_clock(value: Any) -> datetime | None:
    """Return an instant as a naive datetime in UTC, for databases without time zones."""
    return None if value is None else _WALL_CLOCK_EPOCH + (to_utc(value) - _UTC_EPOCH)


def utc_to_text(value: Any) -> str | None:
    """Return an instant as text in UTC, of fixed width, so that the texts sort as the instants do."""
    if value is None:
        return None
    return (_WALL_CLOCK_EPOCH + (to_utc(value) - _UTC_EPOCH)).isoformat(" ", "microseconds")


def utc_to_aware(value: Any) -> datetime | None:
    """Return an instant in UTC, for databases with time zones."""
    return None if value is None else to_utc(value)


def _checked_to_wall_clock(value: datetime) -> datetime:
    return value.replace(tzinfo=None)


def _checked_to_text(value: datetime) -> str:
    return value.isoformat(" ", "microseconds")[:26]


CHECKED: dict[Any, Processor | None] = {
    utc_to_aware: None,
    utc_to_wall_clock: _checked_to_wall_clock,
    utc_to_text: _checked_to_text,
}
"""What replaces a bind processor for values that ``to_utc`` has answered."""


def utc_from_wall_clock(value: datetime | None) -> datetime | None:
    """Return the instant that ``utc_to_wall_clock`` was given."""
    return None if value is None else _UTC_EPOCH + (value - _WALL_CLOCK_EPOCH)


def utc_from_aware(value: datetime | None) -> datetime | None:
    """Return an instant in UTC; PostgreSQL's ``infinity`` comes from asyncpg as the naive last moment of all."""
    if value is None or value.tzinfo is UTC:
        return value
    return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


def utc_from_text(value: str | None) -> datetime | None:
    """Return the instant that ``utc_to_text`` was given."""
    return None if value is None else datetime.fromisoformat(value + "+00:00")


def moment_from_iso(value: str | None) -> datetime | None:
    """Return the instant in UTC that PostgreSQL has written as text, in whatever time zone."""
    try:
        return None if value is None else utc_from_aware(datetime.fromisoformat(value))
    except (ValueError, OverflowError):
        text = value or ""
        return _moment_at_an_edge(text) or moment_from_unusual(text).replace(tzinfo=UTC)


_EDGES = (("10000-01-01", "2000-01-01", 1999, 9999), ("0001-12-31", "2000-12-31", 2001, 1))


def _moment_at_an_edge(text: str) -> datetime | None:
    """Return the instant of the year 9999 or 1 that is of another year in the server's time zone."""
    for shown, shifted, year, meant in _EDGES:
        if text.startswith(shown) and text.endswith(" BC") is (meant == 1):
            moment = datetime.fromisoformat(shifted + text[len(shown) :].removesuffix(" BC")).astimezone(UTC)
            if moment.year == year:
                return moment.replace(year=meant)
    return None


def wall_clock_from_iso(value: str | None) -> datetime | None:
    """Return the naive date and time that PostgreSQL has written as text."""
    try:
        return None if value is None else datetime.fromisoformat(value)
    except ValueError:
        return moment_from_unusual(value or "")


def moment_from_unusual(text: str) -> datetime:
    """Return what stands for ``infinity``, as asyncpg has it.

    Raises:
        BuildingBlocksError: it is before the year 1 or after 9999, or a statement has set another DateStyle than ISO.
    """
    if text.endswith("infinity"):
        return datetime.min if text.startswith("-") else datetime.max  # noqa: DTZ901
    raise BuildingBlocksError(
        "a date and time is outside the years 1 to 9999, or not written in ISO 8601: leave PostgreSQL's DateStyle alone"
    )


def exact_decimal(value: Any, unit: Decimal, context: Context) -> Decimal:
    """Return ``value`` as a multiple of ``unit`` that fits the context's precision, never rounded.

    Raises:
        InvalidInputError: it is no finite decimal or whole number, or has more digits than fit.
    """
    if isinstance(value, bool) or not isinstance(value, Decimal | int):
        raise InvalidInputError(f"expected a decimal, got {type(value).__name__}")
    number = Decimal(value)
    if not number.is_finite():
        raise InvalidInputError("expected a finite decimal")
    try:
        number = number.quantize(unit, context=context)
    except (InvalidOperation, Inexact) as error:
        scale = -cast("int", unit.as_tuple().exponent)
        raise InvalidInputError(
            f"the decimal has more digits than fit: {context.prec} in all, {scale} after the point"
        ) from error
    return number or number.copy_abs()


# Dialects


def _specialise(dialect: Any, specs: dict[type[Any], type[Any]], compiler: type[Any] | None = None) -> None:
    """Give one dialect object its own types, and a type compiler that ``compiler`` is mixed into."""
    dialect.colspecs = {**dialect.colspecs, **specs}
    dialect._type_memos.clear()
    if compiler is not None and not isinstance(dialect.type_compiler_instance, compiler):
        kind = type(dialect.type_compiler_instance)
        adapted = type(f"Adapted{kind.__name__}", (compiler, kind), {})(dialect)
        dialect.type_compiler_instance = dialect.type_compiler = adapted


_set_int = UUID.__dict__["int"].__set__
_set_is_safe = UUID.__dict__["is_safe"].__set__
_new = object.__new__
_unknown = SafeUUID.unknown


def _uuid(number: int) -> UUID:
    """Return the UUID of a number; the class's own constructor parses and checks, which costs four times as much."""
    uuid = _new(UUID)
    _set_int(uuid, number)
    _set_is_safe(uuid, _unknown)
    return uuid


def _plain_uuid(value: Any) -> UUID | None:
    if value is None:
        return None
    uuid = _new(UUID)  # as in _uuid(): this runs for every row of most tables
    _set_int(uuid, value.int)
    _set_is_safe(uuid, _unknown)
    return uuid


def _uuid_of_hex(value: str | None) -> UUID | None:
    return None if value is None else _uuid(int(value if len(value) == 32 else value.replace("-", ""), 16))


INLINED: dict[Any, tuple[str, ...]] = {
    utc_from_aware: ("if {v}.tzinfo is not UTC: {v} = utc_from_aware({v})",),
    moment_from_iso: (
        "try:",
        " {v} = read_iso({v})",
        " if {v}.tzinfo is not UTC: {v} = utc_from_aware({v})",
        "except (ValueError, OverflowError): {v} = moment_from_iso({v})",
    ),
    wall_clock_from_iso: ("try: {v} = read_iso({v})", "except ValueError: {v} = wall_clock_from_iso({v})"),
    utc_from_text: ('{v} = read_iso({v} + "+00:00")',),
    _plain_uuid: ("u = new_uuid(UUID)", "set_int(u, {v}.int)", "set_is_safe(u, unknown)", "{v} = u"),
}
"""Result processors as lines of a mapper that is generated, for a value ``{v}`` that is not None.

A call for each value would cost as much as what it does.
"""
INLINED_NAMES: dict[str, Any] = {
    "UTC": UTC,
    "UUID": UUID,
    "moment_from_iso": moment_from_iso,
    "new_uuid": _new,
    "read_iso": datetime.fromisoformat,
    "set_int": _set_int,
    "set_is_safe": _set_is_safe,
    "unknown": _unknown,
    "utc_from_aware": utc_from_aware,
    "wall_clock_from_iso": wall_clock_from_iso,
}
"""What the lines of ``INLINED`` name."""


class _PostgresUuid(postgresql.UUID[Any]):
    """asyncpg answers a subclass of ``uuid.UUID``."""

    render_bind_cast = True
    render_literal_cast = True

    def result_processor(self, dialect: Dialect, coltype: Any) -> Any:
        return _plain_uuid if self.as_uuid else super().result_processor(dialect, coltype)  # type: ignore[no-untyped-call]


class _HexUuid(sa.Uuid[Any]):
    """CHAR(32): the order of the texts is that of the UUIDs."""

    def result_processor(self, dialect: Dialect, coltype: Any) -> Any:
        return _uuid_of_hex if self.as_uuid else super().result_processor(dialect, coltype)  # type: ignore[no-untyped-call]


class _PostgresDateTime(sa.DateTime):
    """A wall clock, or an instant in UTC."""

    render_bind_cast = True

    def result_processor(self, dialect: Dialect, coltype: Any) -> Any:
        return utc_from_aware if self.timezone else super().result_processor(dialect, coltype)


def _adapt_postgresql(dialect: Any) -> None:
    _specialise(dialect, {sa.Uuid: _PostgresUuid, sa.DateTime: _PostgresDateTime})


class _MySQLDateTime(mysql.DATETIME):
    """A wall clock, or an instant in UTC, with microseconds."""

    def bind_processor(self, dialect: Dialect) -> Any:
        return utc_to_wall_clock if self.timezone else super().bind_processor(dialect)

    def result_processor(self, dialect: Dialect, coltype: Any) -> Any:
        return utc_from_wall_clock if self.timezone else super().result_processor(dialect, coltype)


class _MySQLTypeNames:
    """What MySQL calls the plain types, where its own default would lose something."""

    def visit_datetime(self, type_: Any, **_: Any) -> str:
        return "DATETIME(6)"

    def visit_time(self, type_: Any, **_: Any) -> str:
        return "TIME(6)"

    def visit_float(self, type_: Any, **kwargs: Any) -> Any:
        return "DOUBLE" if type_.precision is None else super().visit_float(type_, **kwargs)  # type: ignore[misc]

    def visit_text(self, type_: Any, **kwargs: Any) -> Any:
        return "LONGTEXT" if type_.length is None else super().visit_text(type_, **kwargs)  # type: ignore[misc]

    visit_unicode_text = visit_text

    def visit_numeric(self, type_: Any, **kwargs: Any) -> Any:
        # MySQL takes NUMERIC for NUMERIC(10, 0); this is the widest that it has.
        return "NUMERIC(65, 30)" if type_.precision is None else super().visit_numeric(type_, **kwargs)  # type: ignore[misc]

    def visit_large_binary(self, type_: Any, **kwargs: Any) -> Any:
        return "LONGBLOB" if type_.length is None else super().visit_large_binary(type_, **kwargs)  # type: ignore[misc]


def _adapt_mysql(dialect: Any) -> None:
    def specialise() -> None:
        dialect.supports_native_uuid = False
        specs: dict[type[Any], type[Any]] = {sa.DateTime: _MySQLDateTime, sa.TIMESTAMP: mysql.TIMESTAMP}
        _specialise(dialect, {**specs, sa.Uuid: _HexUuid}, _MySQLTypeNames)

    specialise()
    initialize = dialect.initialize

    def initialize_and_specialise(connection: Any) -> None:
        initialize(connection)  # the first connection tells MariaDB from MySQL, and chooses its types anew
        specialise()

    dialect.initialize = initialize_and_specialise


class _SQLiteDateTime(sqlite.DATETIME):
    """A wall clock, or an instant in UTC, as text."""

    def bind_processor(self, dialect: Dialect) -> Any:
        return utc_to_text if self.timezone else super().bind_processor(dialect)

    def result_processor(self, dialect: Dialect, coltype: Any) -> Any:
        return utc_from_text if self.timezone else super().result_processor(dialect, coltype)


class _SQLiteNumeric(sa.Numeric[Any]):
    """SQLite keeps decimals as binary floats, which are exact to 15 digits."""

    def bind_processor(self, dialect: Dialect) -> Any:
        def bind(value: Any) -> float | None:
            if value is None:
                return None
            if (
                isinstance(value, Decimal)
                and len(value.as_tuple().digits) > 15
                and Decimal(repr(float(value))) != value
            ):
                raise InvalidInputError("SQLite keeps 15 digits of a decimal; a column of type ExactDecimal keeps all")
            return float(value)

        return bind

    def result_processor(self, dialect: Dialect, coltype: Any) -> Any:
        if not self.asdecimal:
            return None
        if self.precision is None and self.scale is None:
            return lambda value: None if value is None else Decimal(repr(value))
        form = f".{self.scale or 0}f"
        return lambda value: None if value is None else Decimal(format(value, form))


class _SQLiteFloat(sa.Float[Any]):
    """RETURNING of an upsert answers a float without a fraction as an integer."""

    def result_processor(self, dialect: Dialect, coltype: Any) -> Any:
        if self.asdecimal:
            return super().result_processor(dialect, coltype)  # type: ignore[no-untyped-call]
        return lambda value: None if value is None else float(value)


def _adapt_sqlite(dialect: Any) -> None:
    _specialise(
        dialect,
        {sa.Uuid: _HexUuid, sa.DateTime: _SQLiteDateTime, sa.Numeric: _SQLiteNumeric, sa.Float: _SQLiteFloat},
    )


_LONGEST_NVARCHAR = 4000


class _MSSQLTypeNames:
    """What SQL Server calls the plain types, where its own default would lose something."""

    def visit_datetime(self, type_: Any, **kwargs: Any) -> Any:
        return super().visit_datetime(type_, **kwargs) if type_.timezone else "DATETIME2(6)"  # type: ignore[misc]

    def visit_string(self, type_: Any, **kwargs: Any) -> Any:
        if type_.collation and type_.collation.endswith("_UTF8"):  # as BinaryString: VARCHAR holds everything there
            return self.visit_VARCHAR(type_, **kwargs)  # type: ignore[attr-defined]
        if type_.length is not None and type_.length > _LONGEST_NVARCHAR:
            type_ = sa.Unicode(collation=type_.collation)
        return self.visit_NVARCHAR(type_, **kwargs)  # type: ignore[attr-defined]

    def visit_text(self, type_: Any, **kwargs: Any) -> Any:
        return self.visit_NVARCHAR(sa.Unicode(collation=type_.collation), **kwargs)  # type: ignore[attr-defined]

    def visit_enum(self, type_: Any, **kwargs: Any) -> Any:
        return self.visit_string(type_, **kwargs)

    def visit_numeric(self, type_: Any, **kwargs: Any) -> Any:
        return "NUMERIC(38, 12)" if type_.precision is None else super().visit_numeric(type_, **kwargs)  # type: ignore[misc]


def _adapt_mssql(dialect: Any) -> None:
    _specialise(dialect, {}, _MSSQLTypeNames)
