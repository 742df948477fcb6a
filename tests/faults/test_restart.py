"""P2: the server is killed (SIGKILL) and starts again under load, and nothing that it acknowledged is lost.

MariaDB has a server of the test's own for each driver: what it does after a kill depends on all that its log holds, and the
other tests' servers are not to be explained by what this one did to theirs.
"""

import asyncio
import itertools
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import sqlalchemy as sa

from fastapi_building_blocks.domain import CommitOutcomeUnknownError
from fastapi_building_blocks.infrastructure import SQLAlchemySession
from fastapi_building_blocks.testing import DatabaseServer, MariaDBServer, assert_connections_sound
from tests.faults.breaking import HONEST, Database
from tests.faults.conftest import running
from tests.guarantees.ledger import Accounts, account, opened
from tests.server_view import until

WRITERS, READERS = 16, 8
TRANSFERRED = range(10)
TOTAL = 1000
SERVED = 2.0
"""Seconds after the server takes connections."""


@pytest.fixture
def mariadb() -> Iterator[DatabaseServer]:
    yield from running(MariaDBServer({"max-connections": 300}), "mysql")


@dataclass
class Load:
    """Writers and readers, what they were told, and when they were served last."""

    session: SQLAlchemySession
    numbers: Any = field(default_factory=lambda: itertools.count(100, 10))
    kept: list[int] = field(default_factory=list)
    """The first of each pair of rows whose write was acknowledged; only rows of units come in pairs."""
    pairs: set[int] = field(default_factory=set)
    unknown: set[int] = field(default_factory=set)
    refused: set[int] = field(default_factory=set)
    errors: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    answers: int = 0
    written_at: float = 0.0
    read_at: float = 0.0
    over: bool = False

    async def write(self) -> None:
        """Add rows, one alone or two in a unit of work, and note for each what became of it."""
        chance = random.Random()
        while not self.over:
            number, kind = next(self.numbers), chance.randrange(3)
            begun = time.monotonic()
            try:
                if kind == 0:
                    await Accounts(self.session).add(account(number, number))
                elif kind == 1:
                    self.pairs.add(number)
                    await self._add_pair(number)
                else:
                    self.pairs.add(number)
                    await self._add_pair_and_transfer(number, *chance.sample(TRANSFERRED, 2))
            except CommitOutcomeUnknownError as error:
                self.unknown.add(number)
                self._note(error)
            except HONEST as error:
                self.refused.add(number)
                self._note(error)
            except Exception as error:  # noqa: BLE001 - any other is a wrong answer
                self.wrong.append(f"a write of kind {kind} ended with {error!r}")
            else:
                self.kept.append(number)
                self.answers += 1
                self.written_at = max(self.written_at, begun)
            await asyncio.sleep(0.001)

    async def _add_pair(self, number: int) -> None:
        async with self.session.transaction() as unit:
            await Accounts(unit).add(account(number, number))
            await Accounts(unit).add(account(number + 1, number + 1))

    async def _add_pair_and_transfer(self, number: int, source: int, target: int) -> None:
        """Move money as well, whole or not at all; replayed if the accounts are somebody else's meanwhile."""

        async def work(unit: Any) -> None:
            await Accounts(unit).add(account(number, number))
            for holder, change in ((source, -1), (target, 1)):
                moved = {"balance": Accounts.table.c.balance + change}
                await unit.execute(sa.update(Accounts.table).where(Accounts.table.c.id == holder).values(moved))
            await Accounts(unit).add(account(number + 1, number + 1))

        await self.session.run(work, attempts=5)

    async def read(self) -> None:
        """Read what was acknowledged, and the total of what is moved."""
        chance = random.Random()
        while not self.over:
            begun = time.monotonic()
            try:
                if self.kept and chance.random() < 0.8:
                    number = chance.choice(self.kept)
                    found = await Accounts(self.session).get_many([number, number + 1])
                    expected = [number, number + 1] if number in self.pairs else [number]
                    if [(one.id, one.balance) for one in found] != [(one, one) for one in expected]:
                        self.wrong.append(f"asked for {expected}, answered {found}")
                else:
                    result = await self.session.execute(sa.text("SELECT sum(balance) FROM accounts WHERE id < 10"))
                    if (total := int(result.scalar_one())) != TOTAL:
                        self.wrong.append(f"the total was {total}")
            except HONEST as error:
                self._note(error)
            except Exception as error:  # noqa: BLE001 - any other is a wrong answer
                self.wrong.append(f"a read ended with {error!r}")
            else:
                self.answers += 1
                self.read_at = max(self.read_at, begun)
            await asyncio.sleep(0.001)

    def _note(self, error: Exception) -> None:
        self.errors[type(error).__name__] += 1

    def served_since(self, moment: float) -> bool:
        """Whether a write and a read that began after this moment were answered."""
        return min(self.written_at, self.read_at) > moment


async def test_p2_nothing_acknowledged_is_lost_when_the_server_is_killed(
    database: Database, effort: Callable[[int, int], int], shown: Callable[..., None]
) -> None:
    server, kills = database.server, effort(2, 20)
    chance = random.Random()
    longest = 0.0
    async with opened(
        database.url, pool_size=10, max_overflow=5, statement_timeout=5, connect_timeout=2, pool_timeout=2
    ) as session:
        await Accounts(session).add_many([account(number, TOTAL // 10) for number in TRANSFERRED])
        load = Load(session)
        async with asyncio.TaskGroup() as group:
            for work in [load.write] * WRITERS + [load.read] * READERS:
                group.create_task(work())
            try:
                for _ in range(kills):
                    now = time.monotonic()
                    await until(lambda now=now: load.served_since(now))
                    await asyncio.sleep(chance.uniform(0, 0.3))
                    server.kill()
                    await asyncio.sleep(chance.uniform(0, 0.3))
                    await asyncio.to_thread(server.start)
                    started = time.monotonic()
                    await until(lambda started=started: load.served_since(started), SERVED)
                    longest = max(longest, time.monotonic() - started)
            finally:
                load.over = True
        assert not load.wrong, f"{len(load.wrong)} wrong answers: " + "; ".join(load.wrong[:10])
        lost, half, undead = await _differences(session, load)
        assert not lost, "acknowledged, and lost"
        assert not half, "half a unit of work was kept"
        assert not undead, "refused, and kept all the same: that is CommitOutcomeUnknownError"
        assert load.errors["CommitOutcomeUnknownError"] + load.errors["ConnectionLostError"] >= kills
        await assert_connections_sound(session, within=5)
    shown(
        "P2",
        f"server killed and restarted under load, {sa.make_url(database.url).drivername}",
        tries=f"{kills} kills, {load.answers} answers",
        serving_again_after=f"{longest:.2f} s",
        unknown=len(load.unknown),
        refused=sum(load.errors.values()) - len(load.unknown),
        wrong=0,
        lost=0,
    )


async def _differences(session: SQLAlchemySession, load: Load) -> tuple[set[int], set[int], set[int]]:
    """Return what was acknowledged and is not there, what is there by half, and what is there though it was refused."""
    there = {one.id: one.balance async for one in Accounts(session).stream()}
    assert sum(there.pop(number) for number in TRANSFERRED) == TOTAL
    assert all(number == balance for number, balance in there.items())
    lost = {number for number in load.kept if number not in there}
    half = {number for number in load.pairs if (number in there) != (number + 1 in there)}
    return lost, half, load.refused & there.keys()
