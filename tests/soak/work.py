"""The kinds of requests of a soak; each checks what it is answered."""

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa
from anyio import move_on_after

from fastapi_building_blocks.domain import (
    DeadlineExceededError,
    PageRequest,
    Sort,
    UnavailableError,
)
from fastapi_building_blocks.domain import (
    field as field_of,
)
from fastapi_building_blocks.infrastructure import SQLAlchemySession, UnitOfWork, deadline

from .truth import BASE, HOLDERS, LARGEST, TOTAL, Group, Rows, Truth, holders, kept_by, row, total_of

EXPECTED = (UnavailableError, DeadlineExceededError)
LONGEST = 30.0
"""Seconds after which a request counts as hung."""
MOST_GROUPS = 20
"""That one worker keeps; then it deletes some before it adds more."""


class WrongAnswerError(Exception):
    """The database, or the library, has answered something that is not so."""


@dataclass
class Tally:
    """What all workers of a soak were answered."""

    requests: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    cancelled: int = 0
    wrong: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    unsound: list[str] = field(default_factory=list)
    longest: Counter[str] = field(default_factory=Counter)
    """Seconds of the slowest request of each kind."""

    @property
    def failed(self) -> bool:
        return bool(self.wrong or self.lost or self.unsound)


class Worker:
    """One of those that use a session all the time; it reads the groups that it has written itself."""

    def __init__(self, session: SQLAlchemySession, truth: Truth, tally: Tally, chance: random.Random) -> None:
        self._session = session
        self._truth = truth
        self._tally = tally
        self._chance = chance
        self._groups: list[Group] = []

    async def request(self) -> None:
        """Make one request of any kind, and note how it ended."""
        kind = self._chance.choices(list(KINDS), [weight for _, weight in KINDS.values()])[0]
        loop = asyncio.get_running_loop()
        begun = loop.time()
        try:
            async with asyncio.timeout(LONGEST):
                await self._somehow(KINDS[kind][0](self))
        except EXPECTED as error:
            self._tally.errors[type(error).__name__] += 1
        except TimeoutError:
            self._tally.wrong.append(f"{kind}: no end within {LONGEST:.0f} s")
        except Exception as error:  # noqa: BLE001 - any other is a finding
            self._tally.wrong.append(f"{kind}: {type(error).__name__}: {error}")
        self._tally.requests[kind] += 1
        self._tally.longest[kind] = max(self._tally.longest[kind], loop.time() - begun)  # type: ignore[assignment]

    async def _somehow(self, call: Awaitable[None]) -> None:
        """Await the call; sometimes cancel it, once or as a scope does, or give it a deadline."""
        way = self._chance.random()
        if way < 0.05:
            task = asyncio.ensure_future(call)
            await asyncio.wait({task}, timeout=self._chance.uniform(0, 0.02))
            if task.cancel():
                self._tally.cancelled += 1
            await asyncio.wait({task})
            if not task.cancelled():
                task.result()
        elif way < 0.1:
            with move_on_after(self._chance.uniform(0, 0.02)) as scope:
                await call
            self._tally.cancelled += scope.cancelled_caught
        elif way < 0.2:
            with deadline(self._chance.uniform(0.005, 1)):
                await call
        else:
            await call

    # Reads

    async def get(self) -> None:
        number = self._chance.randrange(BASE)
        _check(await Rows(self._session).get(number), row(number))

    async def get_own(self) -> None:
        if groups := list(kept_by(self._groups)):
            group = self._chance.choice(groups)
            _check(await Rows(self._session).get_many(group.ids[:5]), group.rows[:5])

    async def page(self) -> None:
        offset = self._chance.randrange(BASE - 20)
        page = await Rows(self._session).paginate(
            PageRequest(limit=20, offset=offset), field_of("id") < BASE, sort="id"
        )
        _check(page.items, [row(number) for number in range(offset, offset + 20)])
        _check(page.total, BASE)

    async def last(self) -> None:
        found = await Rows(self._session).get_all(field_of("id") < BASE, sort=Sort("id", descending=True), limit=3)
        _check([one.id for one in found], [BASE - 1, BASE - 2, BASE - 3])

    async def stream(self) -> None:
        numbers = [one.id async for one in Rows(self._session).stream(field_of("id") < BASE, sort="id", batch_size=100)]
        _check(numbers, list(range(BASE)))

    async def stream_a_part(self) -> None:
        stream = Rows(self._session).stream(field_of("id") < BASE, sort="id", batch_size=10)
        wanted = self._chance.randrange(50)
        async for one in stream:
            if one.id == wanted:
                break
        await stream.aclose()  # type: ignore[attr-defined]

    async def core(self) -> None:
        value = self._chance.randrange(2**31)
        _check((await self._session.execute(sa.select(sa.literal(value, sa.Integer())))).scalar_one(), value)

    async def engine(self) -> None:
        # The user's own business: its errors are SQLAlchemy's or the driver's, but for those of calls that are late.
        value = self._chance.randrange(2**31)
        try:
            async with self._session.engine.connect() as connection:
                _check((await connection.execute(sa.select(sa.literal(value, sa.Integer())))).scalar_one(), value)
        except WrongAnswerError:
            raise
        except Exception as error:
            raise UnavailableError("on the engine") from error

    async def total(self) -> None:
        _check(await total_of(self._session), TOTAL)

    # Writes

    async def add(self) -> None:
        group = self._truth.new(1)
        async with self._truth.adding(group):
            await Rows(self._session).add(group.rows[0])
        self._groups.append(group)

    async def unit(self) -> None:
        group = self._truth.new(2)
        async with self._truth.adding(group), self._session.transaction() as unit:
            for one in group.rows:
                await Rows(unit).add(one)
            _check(await Rows(unit).get(group.ids[0]), group.rows[0])
        self._groups.append(group)

    async def undone(self) -> None:
        group = self._truth.new(2)
        async with self._session.transaction() as unit:
            await Rows(unit).add(group.rows[0])
            async with unit.savepoint():
                await Rows(unit).add(group.rows[1])
            await unit.rollback()

    async def bulk(self) -> None:
        group = self._truth.new(LARGEST)
        async with self._truth.adding(group):
            _check(await Rows(self._session).add_many(group.rows), group.size)
        await self._delete(group)

    async def transfer(self) -> None:
        source, target = self._chance.sample(range(HOLDERS), 2)
        amount = self._chance.randrange(10)

        async def work(unit: UnitOfWork) -> None:
            for holder, change in ((source, -amount), (target, amount)):
                statement = sa.update(holders).where(holders.c.id == holder)
                await unit.execute(statement.values(balance=holders.c.balance + change))

        await self._session.run(work, attempts=5)

    async def delete(self) -> None:
        if self._groups:
            await self._delete(self._groups.pop(self._chance.randrange(len(self._groups))))
        while len(self._groups) > MOST_GROUPS:
            await self._delete(self._groups.pop())

    async def _delete(self, group: Group) -> None:
        if group.number not in self._truth.groups:
            return  # the last audit has removed it
        was_kept = group in kept_by([group])
        async with self._truth.deleting(group):
            touched = await Rows(self._session).delete_where(field_of("id").is_in(list(group.ids)))
        if was_kept:
            _check(touched, group.size)

    def forget(self) -> None:
        """Know of no groups any more: an audit has removed them."""
        self._groups.clear()


def _check(answer: Any, expected: Any) -> None:
    if answer != expected:
        raise WrongAnswerError(f"answered {str(answer)[:200]}, expected {str(expected)[:200]}")


KINDS: dict[str, tuple[Callable[[Worker], Awaitable[None]], int]] = {
    "get": (Worker.get, 20),
    "get_many of its own": (Worker.get_own, 15),
    "page": (Worker.page, 8),
    "list": (Worker.last, 8),
    "stream": (Worker.stream, 2),
    "stream, left early": (Worker.stream_a_part, 2),
    "execute": (Worker.core, 10),
    "engine": (Worker.engine, 4),
    "total of the bank": (Worker.total, 6),
    "add": (Worker.add, 8),
    "unit of work": (Worker.unit, 6),
    "unit, rolled back": (Worker.undone, 3),
    "add_many": (Worker.bulk, 1),
    "bank transfer": (Worker.transfer, 6),
    "delete_where": (Worker.delete, 12),
}
