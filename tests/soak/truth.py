"""What a database should hold, by what the writers were told, and how it is compared with what it holds."""

import asyncio
import dataclasses
import itertools
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from enum import Enum
from typing import Any

import sqlalchemy as sa

from fastapi_building_blocks.domain import BuildingBlocksError, CommitOutcomeUnknownError, DeadlineExceededError
from fastapi_building_blocks.infrastructure import SQLAlchemyRepository, SQLAlchemySession

metadata = sa.MetaData()
BASE = 1000
"""Rows that nobody changes."""
FIRST = 10_000
LARGEST = 500
"""Rows of the largest group."""
HOLDERS = 10
TOTAL = 10_000


@dataclasses.dataclass
class Row:
    id: int
    value: int
    text: str


class Rows(SQLAlchemyRepository[Row]):
    table = sa.Table(
        "soak_rows",
        metadata,
        sa.Column("id", sa.BigInteger(), primary_key=True, autoincrement=False),
        sa.Column("value", sa.Integer(), nullable=False),
        sa.Column("text", sa.String(200), nullable=False),
    )


holders = sa.Table(
    "soak_holders",
    metadata,
    sa.Column("id", sa.Integer(), primary_key=True, autoincrement=False),
    sa.Column("balance", sa.Integer(), nullable=False),
)
"""Of a bank: what one gives another one gets, so their total stays the same."""


def row(number: int) -> Row:
    return Row(number, number % 997, f"row {number}")


class State(Enum):
    KEPT = "acknowledged"
    UNKNOWN = "unknown"


@dataclasses.dataclass
class Group:
    """Rows that were written together, and are there as a whole or not at all."""

    number: int
    size: int
    state: State = State.UNKNOWN

    @property
    def ids(self) -> range:
        first = FIRST + self.number * LARGEST
        return range(first, first + self.size)

    @property
    def rows(self) -> list[Row]:
        return [row(number) for number in self.ids]


class Truth:
    """The groups of one database that may be there. A group that was refused or deleted is in none of them."""

    def __init__(self) -> None:
        self.groups: dict[int, Group] = {}
        self._numbers = itertools.count()

    def new(self, size: int) -> Group:
        return Group(next(self._numbers), size)

    @asynccontextmanager
    async def adding(self, group: Group) -> AsyncIterator[None]:
        """Note what becomes of a group, by how the block that adds it ends."""
        self.groups[group.number] = group
        try:
            yield
        except BaseException as error:
            if _kept_nothing(error):
                del self.groups[group.number]
            raise
        group.state = State.KEPT

    @asynccontextmanager
    async def deleting(self, group: Group) -> AsyncIterator[None]:
        """The same for a block that deletes it."""
        before, group.state = group.state, State.UNKNOWN
        try:
            yield
        except BaseException as error:
            if _kept_nothing(error):
                group.state = before
            raise
        del self.groups[group.number]

    def differences(self, there: set[int]) -> tuple[list[str], list[str]]:
        """Compare with the ids that are there; return what is wrong, and what was acknowledged and is lost."""
        wrong, lost = [], []
        for group in self.groups.values():
            found = len(there.intersection(group.ids))
            if found == 0 and group.state is State.KEPT:
                lost.append(f"group {group.number} of {group.size} rows")
            elif found not in (0, group.size):
                wrong.append(f"{found} of {group.size} rows of group {group.number} ({group.state.value})")
            there = there.difference(group.ids)
        if there:
            wrong.append(f"{len(there)} rows that were refused or deleted, {min(there)} among them")
        return wrong, lost


def _kept_nothing(error: BaseException) -> bool:
    """Whether a write that ended with this error is known to have changed nothing."""
    return isinstance(error, BuildingBlocksError) and not isinstance(
        error, CommitOutcomeUnknownError | DeadlineExceededError
    )


async def prepare(session: SQLAlchemySession) -> None:
    """Make the tables, and fill them with what stays."""
    await session.create_tables(metadata)
    await Rows(session).add_many(row(number) for number in range(BASE))
    balances = [{"id": number, "balance": TOTAL // HOLDERS} for number in range(HOLDERS)]
    await session.execute(sa.insert(holders), balances)


async def audit(session: SQLAlchemySession, truth: Truth) -> tuple[list[str], list[str]]:
    """Read everything, compare it with the truth, and delete what does not stay; nobody else may use the session."""
    there = set()
    wrong = []
    async with asyncio.timeout(60):
        async for found in Rows(session).stream():
            there.add(found.id)
            if found != row(found.id):
                wrong.append(f"row {found.id} holds {found}")
        if not there.issuperset(range(BASE)):
            wrong.append("rows that nobody changes are gone")
        more, lost = truth.differences(there.difference(range(BASE)))
        if (total := await total_of(session)) != TOTAL:
            wrong.append(f"the bank has {total}, not {TOTAL}")
        truth.groups.clear()
        await Rows(session).delete_where(Rows.table.c.id >= FIRST)
    return wrong + more, lost


async def total_of(session: Any) -> int:
    return int((await session.execute(sa.select(sa.func.sum(holders.c.balance)))).scalar_one())


def kept_by(groups: list[Group]) -> Iterator[Group]:
    """Those of the groups that are known to be there."""
    return (group for group in groups if group.state is State.KEPT)
