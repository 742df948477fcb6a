"""Column types that keep the same value on every database, and what plain SQLAlchemy types need to do so.

A service declares its tables with these and with plain ``sa.Uuid``, ``sa.JSON``, ``sa.Boolean``, ``sa.LargeBinary``,
``sa.Numeric`` and ``sa.DateTime``. Plain ``sa.String`` keeps the database's own collation: on MariaDB and MySQL that
usually means equality without regard to case and accents, on SQL Server without regard to case, on PostgreSQL an order
by language. ``BinaryString`` compares and orders by code point everywhere.
"""

from collections.abc import Callable
from datetime import datetime
from decimal import ROUND_DOWN, Context, Decimal, Inexact, InvalidOperation
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import mssql, mysql, sqlite
from sqlalchemy.engine.interfaces import Dialect
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.types import TypeDecorator, TypeEngine

from fastapi_building_blocks.infrastructure.database.plain_types import (
    Processor,
    adapt_dialect,
    exact_decimal,
    utc_from_aware,
    utc_from_text,
    utc_from_wall_clock,
    utc_to_aware,
    utc_to_text,
    utc_to_wall_clock,
)

__all__ = [
    "BinaryString",
    "ExactDecimal",
    "UtcDateTime",
    "adapt_dialect",
    "timestamp_columns",
    "utc_now",
    "version_column",
]


_UTC_BIND: dict[str, Processor] = {"postgresql": utc_to_aware, "sqlite": utc_to_text}
_UTC_RESULT: dict[str, Processor] = {"postgresql": utc_from_aware, "sqlite": utc_from_text}


class UtcDateTime(TypeDecorator[datetime]):
    """An instant: aware in, aware UTC out, with microseconds on every database.

    PostgreSQL stores ``TIMESTAMP WITH TIME ZONE``; MySQL and MariaDB ``DATETIME(6)``, SQL Server ``DATETIME2(6)`` and
    SQLite text of fixed width, all in UTC, so that the stored order is the order in time.

    Raises:
        InvalidInputError: a naive datetime is bound.
    """

    impl = sa.DateTime
    cache_ok = True

    def __init__(self) -> None:
        super().__init__(timezone=True)

    def __repr__(self) -> str:
        return "UtcDateTime()"

    @property
    def python_type(self) -> type[datetime]:
        """What a value is in Python."""
        return datetime

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        """Return what the database stores."""
        if dialect.name in ("mysql", "mariadb"):
            return dialect.type_descriptor(mysql.DATETIME(fsp=6))
        if dialect.name == "mssql":
            return dialect.type_descriptor(mssql.DATETIME2(precision=6))  # type: ignore[no-untyped-call]
        if dialect.name == "sqlite":
            return dialect.type_descriptor(sqlite.DATETIME())  # type: ignore[no-untyped-call]
        return dialect.type_descriptor(sa.DateTime(timezone=True))

    def bind_processor(self, dialect: Dialect) -> Processor:
        """Return what makes a parameter of a value."""
        return _UTC_BIND.get(dialect.name, utc_to_wall_clock)

    def literal_processor(self, dialect: Dialect) -> Callable[[Any], str]:
        """Return what makes SQL text of a value."""
        bind = self.bind_processor(dialect)
        return lambda value: f"'{bind(value)}'"

    def result_processor(self, dialect: Dialect, coltype: object) -> Processor:
        """Return what makes a value of the driver's answer."""
        return _UTC_RESULT.get(dialect.name, utc_from_wall_clock)


class ExactDecimal(TypeDecorator[Decimal]):
    """A decimal that no database rounds: compared and ordered exactly in SQL, with all digits of its scale.

    SQLite has no decimals. There a value is the whole number of its smallest unit (``1.50`` is 150) up to 18 digits,
    and beyond that a text of fixed width that sorts like the number; arithmetic on such a column belongs into Python.

    Args:
        precision: digits in all, at most 38 (what every database holds).
        scale: digits after the point, at most 30.
    """

    impl = sa.Numeric
    cache_ok = True

    def __init__(self, precision: int, scale: int) -> None:
        if not 1 <= precision <= 38:
            raise ValueError("precision is a number of digits from 1 to 38, what every database can hold")
        if not 0 <= scale <= min(precision, 30):
            raise ValueError("scale is a number of digits from 0 to the precision, and at most 30")
        super().__init__(precision, scale)
        self.asdecimal = True
        self.precision = precision
        self.scale = scale
        self._unit = Decimal((0, (1,), -scale))
        self._context = Context(prec=precision, rounding=ROUND_DOWN, traps=[InvalidOperation, Inexact])

    def __repr__(self) -> str:
        return f"ExactDecimal(precision={self.precision}, scale={self.scale})"

    def exact(self, value: Any) -> Decimal:
        """Return the value with all digits of the scale.

        Raises:
            InvalidInputError: it is no finite decimal or whole number, or has more digits than fit.
        """
        return exact_decimal(value, self._unit, self._context)

    @property
    def python_type(self) -> type[Decimal]:
        """What a value is in Python."""
        return Decimal

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        """Return what the database stores."""
        if dialect.name != "sqlite":
            return dialect.type_descriptor(sa.Numeric(self.precision, self.scale))
        if self.precision <= 18:
            return dialect.type_descriptor(sa.BigInteger())
        return dialect.type_descriptor(sa.String(self.precision + 1))

    def bind_processor(self, dialect: Dialect) -> Processor:
        """Return what makes a parameter of a value."""
        exact = self.exact
        if dialect.name != "sqlite":
            return lambda value: None if value is None else exact(value)

        def scaled(value: Any) -> int | None:
            return None if value is None else int(f"{exact(value):f}".replace(".", ""))

        if self.precision <= 18:
            return scaled
        # Shifted by the largest value, all are positive and of one width: the order of the texts is the numbers'.
        shift, width = 10**self.precision, self.precision + 1

        def sortable(value: Any) -> str | None:
            number = scaled(value)
            return None if number is None else f"{number + shift:0{width}d}"

        return sortable

    def checked_bind_processor(self, dialect: Dialect) -> Processor | None:
        """Return the same for values that ``exact`` has answered."""
        if dialect.name != "sqlite":
            return None
        scale, context = self.scale, self._context
        return self.bind_processor(dialect) if self.precision > 18 else lambda value: int(value.scaleb(scale, context))

    def literal_processor(self, dialect: Dialect) -> Callable[[Any], str]:
        """Return what makes SQL text of a value."""
        bind = self.bind_processor(dialect)
        quote = "'" if dialect.name == "sqlite" and self.precision > 18 else ""
        return lambda value: f"{quote}{bind(value)}{quote}"

    def result_processor(self, dialect: Dialect, coltype: object) -> Processor | None:
        """Return what makes a value of the driver's answer, or None where it is one already."""
        if dialect.name != "sqlite":
            return None
        exponent = f"E-{self.scale}"
        if self.precision <= 18:
            return lambda value: None if value is None else Decimal(f"{value}{exponent}")
        shift = 10**self.precision
        return lambda value: None if value is None else Decimal(f"{int(value) - shift}{exponent}")


class BinaryString(TypeDecorator[str]):
    """Text compared and ordered by code point on every database, trailing spaces included.

    PostgreSQL collates it as ``"C"``, MariaDB as ``utf8mb4_nopad_bin``, MySQL 8 as ``utf8mb4_0900_bin``, SQL Server as
    ``Latin1_General_100_BIN2_UTF8`` (which pads with spaces in comparisons, as its standard demands), SQLite as BINARY.

    Args:
        length: in code points.
    """

    impl = sa.String
    cache_ok = True

    def __init__(self, length: int) -> None:
        if length < 1:
            raise ValueError("length is a number of code points, at least 1")
        super().__init__(length)
        self.length = length

    def __repr__(self) -> str:
        return f"BinaryString(length={self.length})"

    @property
    def python_type(self) -> type[str]:
        """What a value is in Python."""
        return str

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        """Return what the database stores."""
        if dialect.name == "postgresql":
            return dialect.type_descriptor(sa.String(self.length, collation="C"))
        if dialect.name in ("mysql", "mariadb"):
            collation = "utf8mb4_nopad_bin" if getattr(dialect, "is_mariadb", False) else "utf8mb4_0900_bin"
            return dialect.type_descriptor(mysql.VARCHAR(self.length, charset="utf8mb4", collation=collation))
        if dialect.name == "mssql":
            # A length in bytes: UTF-8 takes up to four for a code point.
            size: Any = self.length * 4 if self.length <= 2000 else "max"
            return dialect.type_descriptor(mssql.VARCHAR(size, collation="Latin1_General_100_BIN2_UTF8"))
        return dialect.type_descriptor(sa.String(self.length))


class utc_now(FunctionElement[datetime]):  # noqa: N801 - reads as the SQL function it is
    """The database's clock as a ``UtcDateTime``, for ``server_default`` and in statements."""

    type = UtcDateTime()
    inherit_cache = True


@compiles(utc_now)
def _utc_now(element: utc_now, compiler: SQLCompiler, **kwargs: Any) -> str:  # noqa: ARG001
    return {
        # SQLite's clock has milliseconds; the width is that of all other values.
        "sqlite": "(strftime('%Y-%m-%d %H:%M:%f', 'now') || '000')",
        "mysql": "(UTC_TIMESTAMP(6))",
        "mariadb": "(UTC_TIMESTAMP(6))",
        "mssql": "(SYSUTCDATETIME())",
    }.get(compiler.dialect.name, "CURRENT_TIMESTAMP")


def timestamp_columns() -> tuple[sa.Column[datetime], sa.Column[datetime]]:
    """Return ``created_at`` (indexed) and ``updated_at``, to be spread into a table's columns."""
    return (
        sa.Column("created_at", UtcDateTime(), nullable=False, server_default=utc_now(), index=True),
        sa.Column("updated_at", UtcDateTime(), nullable=False, server_default=utc_now()),
    )


def version_column(name: str = "version") -> sa.Column[int]:
    """Return the column that optimistic concurrency counts in, beginning with 1."""
    return sa.Column(name, sa.Integer(), nullable=False, default=1, server_default="1")
