"""Every way to use a session, mixed at random, with a record of what was acknowledged and where it was interrupted."""

import asyncio
import dataclasses
import itertools
import random
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import sqlalchemy as sa

from fastapi_building_blocks.domain import PageRequest
from fastapi_building_blocks.infrastructure import SQLAlchemyRepository, SQLAlchemySession
from tests.guarantees.ledger import Accounts, account, opened

BULK = 2000

bulk_metadata = sa.MetaData()


@dataclasses.dataclass
class Item:
    id: int
    batch: int


class Items(SQLAlchemyRepository[Item]):
    """Rows that are written by the thousand, apart from those that others read."""

    table = sa.Table(
        "items",
        bulk_metadata,
        sa.Column("id", sa.Integer(), primary_key=True, autoincrement=False),
        sa.Column("batch", sa.Integer(), nullable=False),
    )


def items(batch: int) -> Iterator[Item]:
    return (Item(batch * BULK + number, batch) for number in range(BULK))


@asynccontextmanager
async def loaded(url: str, **knobs: Any) -> AsyncIterator[SQLAlchemySession]:
    """Yield a session with ten accounts and no items."""
    async with opened(url, pool_timeout=60, **knobs) as session:
        await session.create_tables(bulk_metadata)
        await Accounts(session).add_many([account(number, number) for number in range(10)])
        yield session


@dataclasses.dataclass
class _Step:
    """What a call is doing."""

    name: str


class MixedWork:
    """Calls of every kind on one session; accounts are written in pairs within a unit of work, items by the thousand.

    Args:
        session: as ``loaded`` gives it.
        seed: the same seed chooses the same kinds of work.
        bulk: the share of the calls that write items.
    """

    FIRST = 100
    """Accounts of a pair have this number or a higher one."""

    def __init__(self, session: SQLAlchemySession, seed: int | str, bulk: float = 0.1) -> None:
        self.session = session
        self.chance = random.Random(seed)
        self.numbers = itertools.count(self.FIRST)
        self.acknowledged: set[int] = set()
        """Accounts whose call has answered."""
        self.acknowledged_batches: set[int] = set()
        self.interrupted: Counter[str] = Counter()
        """Cancelled calls, by what they were doing."""
        self._bulk = bulk
        self._kinds = (
            self._read,
            self._page,
            self._add,
            self._pair,
            self._pair_by_core,
            self._stream,
            self._stream_rows,
        )

    async def once(self, _call: int = 0) -> None:
        """Make one call, of a kind that chance decides."""
        kind = self._add_many if self.chance.random() < self._bulk else self.chance.choice(self._kinds)
        step = _Step("read")
        try:
            await kind(step)
        except asyncio.CancelledError:
            self.interrupted[step.name] += 1
            raise

    async def losses(self) -> dict[str, int]:
        """Count acknowledged rows and batches that are missing, and pairs and batches that are there in part."""
        return await losses(self.session, self.acknowledged, self.acknowledged_batches)

    async def _read(self, step: _Step) -> None:
        assert (await Accounts(self.session).get(3)).balance == 3

    async def _page(self, step: _Step) -> None:
        assert len((await Accounts(self.session).paginate(PageRequest(limit=5), sort="id")).items) == 5

    async def _add(self, step: _Step) -> None:
        step.name = "write"
        number = -next(self.numbers)
        await Accounts(self.session).add(account(number))
        self.acknowledged.add(number)

    async def _pair(self, step: _Step) -> None:
        step.name = "unit"
        number = next(self.numbers) * 2
        async with self.session.transaction() as unit:
            await Accounts(unit).add(account(number))
            assert (await Accounts(unit).get(3)).balance == 3
            await Accounts(unit).add(account(number + 1))
            step.name = "commit"
        self.acknowledged |= {number, number + 1}

    async def _pair_by_core(self, step: _Step) -> None:
        step.name = "unit"
        number = next(self.numbers) * 2
        rows = [{"id": one, "number": f"A{one}", "balance": 0} for one in (number, number + 1)]
        async with self.session.transaction() as unit:
            await unit.execute(sa.insert(Accounts.table), rows)
            assert (await unit.execute(sa.text("SELECT 7"))).scalar() == 7
            step.name = "commit"
        self.acknowledged |= {number, number + 1}

    async def _stream(self, step: _Step) -> None:
        step.name = "stream"
        async for one in Accounts(self.session).stream(batch_size=5):
            assert one.number == f"A{one.id}"

    async def _stream_rows(self, step: _Step) -> None:
        step.name = "stream"
        async for row in self.session.stream(sa.text("SELECT id, number FROM accounts")):
            assert row.number == f"A{row.id}"

    async def _add_many(self, step: _Step) -> None:
        step.name = "bulk"
        batch = next(self.numbers)
        await Items(self.session).add_many(items(batch))
        self.acknowledged_batches.add(batch)


async def losses(session: SQLAlchemySession, acknowledged: set[int], batches: set[int]) -> dict[str, int]:
    """Count acknowledged rows and batches that are missing, and pairs and batches that are there in part.

    A pair is an even number of at least ``MixedWork.FIRST`` and the next one; a batch is ``BULK`` items.
    """
    stored = {one.id async for one in Accounts(session).stream()}
    paired = {number for number in stored if number >= MixedWork.FIRST}
    query = sa.select(Items.table.c.batch, sa.func.count().label("written")).group_by(Items.table.c.batch)
    counts = {row.batch: row.written for row in await session.execute(query)}
    return {
        "lost": len(acknowledged - stored) + len(batches - counts.keys()),
        "torn": len(paired - {number ^ 1 for number in paired}) + sum(count != BULK for count in counts.values()),
    }
