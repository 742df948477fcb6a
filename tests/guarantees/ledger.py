"""The tables that the guarantees are tried on: accounts with a version, and transfers that reference them."""

import dataclasses
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import sqlalchemy as sa

from fastapi_building_blocks.infrastructure import BinaryString, SQLAlchemyRepository, SQLAlchemySession

metadata = sa.MetaData()

accounts = sa.Table(
    "accounts",
    metadata,
    sa.Column("id", sa.Integer(), primary_key=True, autoincrement=False),
    sa.Column("number", BinaryString(40), nullable=False, unique=True),
    sa.Column("owner", sa.String(100)),
    sa.Column("balance", sa.Integer(), nullable=False),
    sa.CheckConstraint("balance >= -1000000", name="ck_accounts_balance"),
)


@dataclasses.dataclass
class Account:
    id: int
    number: str
    balance: int = 0
    owner: str | None = None


class Accounts(SQLAlchemyRepository[Account]):
    table = accounts


def account(number: int, balance: int = 0, owner: str | None = None) -> Account:
    return Account(number, f"A{number}", balance, owner)


@asynccontextmanager
async def opened(url: str, **knobs: Any) -> AsyncIterator[SQLAlchemySession]:
    """Yield a session whose tables exist."""
    async with SQLAlchemySession(url, **knobs) as session:
        await session.create_tables(metadata)
        yield session
