"""What every contestant reads and writes: 200,000 accounts of ten columns, each a function of its number."""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

import sqlalchemy as sa

from fastapi_building_blocks.infrastructure import ExactDecimal, UtcDateTime

STATUSES = ("active", "invited", "suspended", "closed")
PAGE_SIZE = 100
COLUMNS = (
    "id",
    "public_id",
    "email",
    "name",
    "status",
    "balance",
    "is_active",
    "note",
    "login_count",
    "created_at",
)

_FIRST_DAY = datetime(2020, 1, 1, tzinfo=UTC)
_FIVE_YEARS = 5 * 365 * 86_400 * 1_000_000
_GOLDEN_RATIO = 0x9E3779B97F4A7C15F39CC0605CEDC835


@dataclass
class Account:
    """One row."""

    id: int
    public_id: UUID
    email: str
    name: str
    status: str
    balance: Decimal
    is_active: bool
    note: str | None
    login_count: int
    created_at: datetime


def account(number: int, generation: int = 0) -> Account:
    """Return account ``number``; another ``generation`` of it differs in what is not indexed, as an edit would."""
    mixed = number * _GOLDEN_RATIO % 2**128  # spreads the numbers evenly
    return Account(
        id=number,
        public_id=UUID(int=mixed),
        email=f"account-{number}@example.com",
        name=f"Zoë Ångström {number + generation}",
        status=STATUSES[(mixed >> 96) % len(STATUSES)],
        balance=Decimal((mixed >> 80) % 100_000_000 - 1_000_000 + generation).scaleb(-2),
        is_active=(mixed >> 72) % 10 > 0,
        note=None if number % 2 else f"A few words about account {number}, which somebody has written down.",
        login_count=(mixed >> 88) % 10_000 + generation,
        created_at=_FIRST_DAY + timedelta(microseconds=(mixed >> 64) % _FIVE_YEARS),
    )


def accounts(numbers: Iterable[int], generation: int = 0) -> list[Account]:
    return [account(number, generation) for number in numbers]


def _table(uuid: Any, decimal: Any, timestamp: Any) -> sa.Table:
    return sa.Table(
        "accounts",
        sa.MetaData(),
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("public_id", uuid, nullable=False),
        sa.Column("email", sa.String(255), nullable=False),
        sa.Column("name", sa.String(100), nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("balance", decimal, nullable=False),
        sa.Column("is_active", sa.Boolean, nullable=False),
        sa.Column("note", sa.Text),
        sa.Column("login_count", sa.Integer, nullable=False),
        sa.Column("created_at", timestamp, nullable=False),
        sa.Index("accounts_by_status", "status", "created_at", "id"),
    )


table = _table(sa.Uuid(), ExactDecimal(12, 2), UtcDateTime())
"""The table as a user of the library declares it, and as it is created."""


# What Core and the peers declare: SQLAlchemy's own types where they give the right values from what is stored, so that
# nothing of this library is in their way; elsewhere its types, which cost what any hand-written one would.
UUID_TYPE = sa.Uuid().with_variant(sa.Uuid(native_uuid=False), "mysql", "mariadb")
DECIMAL_TYPE = sa.Numeric(12, 2).with_variant(ExactDecimal(12, 2), "sqlite")
TIMESTAMP_TYPE = sa.DateTime(timezone=True).with_variant(UtcDateTime(), "mysql", "mariadb", "sqlite")

plain_table = _table(UUID_TYPE, DECIMAL_TYPE, TIMESTAMP_TYPE)
"""The same table for everybody else."""
