"""What is measured: how each operation is prepared, run, checked and tidied up after."""

import asyncio
import random
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .accounts import COLUMNS, STATUSES, Account, account, accounts
from .contestants import Contestant
from .databases import PEERS, Housekeeping
from .ours import OursHandMapped
from .raw_postgres import BarePostgres

TASKS = 64
UNIT_SIZE = 10
BATCH_SIZE = 1_000
_SAMPLE = 100
_NOT_IN_LONG_WRITES = (*PEERS, BarePostgres, OursHandMapped)


class WrongAnswerError(Exception):
    """A contestant answered something else than what is stored, or stored something else than it was given."""


def values_of(answer: Any) -> tuple[Any, ...]:
    """Return an answered account's values in column order."""
    if isinstance(answer, Mapping):
        return tuple(answer[name] for name in COLUMNS)
    return tuple(getattr(answer, name) for name in COLUMNS)


def require_same(answer: Any, expected: Account | None) -> None:
    """Compare an answered account with the right one, types and time zone included."""
    if answer is None or expected is None:
        if answer is not expected:
            raise WrongAnswerError(f"{answer!r} instead of {expected!r}")
        return
    for name, value, right in zip(COLUMNS, values_of(answer), values_of(expected), strict=True):
        is_same = value == right and isinstance(value, type(right))  # asyncpg's UUIDs are of a subclass
        if not is_same or (name == "created_at" and value.utcoffset() != right.utcoffset()):
            raise WrongAnswerError(f"{name} of account {expected.id} is {value!r} instead of {right!r}")


def require_all_same(answers: Sequence[Any], expected: Sequence[Account]) -> None:
    if len(answers) != len(expected):
        raise WrongAnswerError(f"{len(answers)} accounts instead of {len(expected)}")
    for answer, right in zip(answers, expected, strict=True):
        require_same(answer, right)


@dataclass(frozen=True)
class Operation:
    """One operation: ``calls`` of it are prepared, then timed together, then tidied up after."""

    name: str
    title: str
    method: str
    calls_at_least: int = 1
    is_long: bool = False
    """Takes seconds: three rounds of one call, for which the check is warm-up enough."""
    without: tuple[type[Contestant], ...] = ()
    statements: int = 1
    """In a call: times are per statement."""

    def takes_part(self, contestant: Contestant) -> bool:
        return contestant.takes_part(self.method) and not isinstance(contestant, self.without)

    async def prepare(self, contestant: Contestant, house: Housekeeping, calls: int) -> list[Any]:
        """Return one argument for each call."""
        raise NotImplementedError

    async def run(self, contestant: Contestant, arguments: list[Any]) -> None:
        """Do what is timed."""
        method = getattr(contestant, self.method)
        for argument in arguments:
            await method(argument)

    async def tidy(self, house: Housekeeping) -> None:
        """Take back what the calls wrote."""

    async def check(self, contestant: Contestant, house: Housekeeping) -> None:
        """Compare the contestant's answers with what is right.

        Raises:
            WrongAnswerError: they differ.
        """
        raise NotImplementedError


class Get(Operation):
    async def prepare(self, contestant: Contestant, house: Housekeeping, calls: int) -> list[Any]:
        return [random.randint(1, house.rows) for _ in range(calls)]

    async def check(self, contestant: Contestant, house: Housekeeping) -> None:
        for number in (1, 2, house.rows // 2, house.rows):
            require_same(await contestant.get(number), account(number))


class GetConcurrently(Get):
    async def run(self, contestant: Contestant, arguments: list[Any]) -> None:
        remaining = iter(arguments)

        async def work() -> None:
            for number in remaining:
                await contestant.get(number)

        await asyncio.gather(*(work() for _ in range(TASKS)))

    async def check(self, contestant: Contestant, house: Housekeeping) -> None:
        numbers = range(1, 2 * TASKS + 1)
        require_all_same(await asyncio.gather(*map(contestant.get, numbers)), accounts(numbers))


class Page(Operation):
    async def prepare(self, contestant: Contestant, house: Housekeeping, calls: int) -> list[Any]:
        return [random.choice(STATUSES) for _ in range(calls)]

    async def check(self, contestant: Contestant, house: Housekeeping) -> None:
        for status in STATUSES:
            require_all_same(await contestant.page(status), house.newest[status])


class Count(Page):
    async def check(self, contestant: Contestant, house: Housekeeping) -> None:
        for status in STATUSES:
            if (answer := await contestant.count(status)) != house.counts[status]:
                raise WrongAnswerError(f"{answer!r} instead of {house.counts[status]}")


@dataclass(frozen=True)
class GetSeveral(Operation):
    size: int = 100

    async def prepare(self, contestant: Contestant, house: Housekeeping, calls: int) -> list[Any]:
        return [random.sample(range(1, house.rows + 1), self.size) for _ in range(calls)]

    async def check(self, contestant: Contestant, house: Housekeeping) -> None:
        ((numbers),) = await self.prepare(contestant, house, 1)
        answers = await getattr(contestant, self.method)(numbers)
        require_all_same(sorted(answers, key=lambda answer: int(values_of(answer)[0])), accounts(sorted(numbers)))


class Stream(Operation):
    async def prepare(self, contestant: Contestant, house: Housekeeping, calls: int) -> list[Any]:
        return [deque(maxlen=1).append for _ in range(calls)]  # as cheap as taking can be

    async def check(self, contestant: Contestant, house: Housekeeping) -> None:
        expected = iter(range(1, house.rows + 1))

        def take(answer: Any) -> None:
            number = next(expected, None)
            if number is None or answer.id != number:
                raise WrongAnswerError(f"account {answer.id} instead of {number}")
            if number % 199 == 0:
                require_same(answer, account(number))

        await contestant.stream(take)
        if (missing := next(expected, None)) is not None:
            raise WrongAnswerError(f"the stream ends before account {missing}")


class Add(Operation):
    async def prepare(self, contestant: Contestant, house: Housekeeping, calls: int) -> list[Any]:
        return [contestant.native(account(number)) for number in house.unused(calls)]

    async def tidy(self, house: Housekeeping) -> None:
        await house.remove_added()

    async def check(self, contestant: Contestant, house: Housekeeping) -> None:
        for number in house.unused(2):
            answer = await contestant.add(contestant.native(account(number)))
            if hasattr(answer, "id"):
                require_same(answer, account(number))
            require_same(await house.stored(number), account(number))
        await self.tidy(house)


class Update(Operation):
    async def prepare(self, contestant: Contestant, house: Housekeeping, calls: int) -> list[Any]:
        generation = house.next_generation()
        numbers = random.sample(range(1, house.rows + 1), min(calls, house.rows))
        return [contestant.native(account(number, generation)) for number in numbers]

    async def check(self, contestant: Contestant, house: Housekeeping) -> None:
        generation = house.next_generation()
        for number in (1, house.rows):
            changed = account(number, generation)
            answer = await contestant.update(contestant.native(changed))
            if hasattr(answer, "id"):
                require_same(answer, changed)
            require_same(await house.stored(number), changed)
        await house.restore((1, house.rows))


class Delete(Operation):
    async def prepare(self, contestant: Contestant, house: Housekeeping, calls: int) -> list[Any]:
        numbers = house.unused(calls)
        await house.add(numbers)
        return [*numbers]

    async def tidy(self, house: Housekeeping) -> None:
        await house.remove_added()

    async def check(self, contestant: Contestant, house: Housekeeping) -> None:
        first, second = await self.prepare(contestant, house, 2)
        await contestant.delete(first)
        require_same(await house.stored(first), None)
        require_same(await house.stored(second), account(second))
        await self.tidy(house)


@dataclass(frozen=True)
class WriteMany(Operation):
    """Each call writes ``size`` accounts, of which ``existing`` are there already."""

    size: int = BATCH_SIZE
    existing: int = 0

    def _accounts(self, house: Housekeeping) -> list[Account]:
        numbers = random.sample(range(1, house.rows + 1), self.existing)
        return [
            *accounts(numbers, house.next_generation()),
            *accounts(house.unused(self.size - self.existing)),
        ]

    async def prepare(self, contestant: Contestant, house: Housekeeping, calls: int) -> list[Any]:
        return [list(map(contestant.native, self._accounts(house))) for _ in range(calls)]

    async def tidy(self, house: Housekeeping) -> None:
        if self.existing < self.size:
            await house.remove_added()

    async def check(self, contestant: Contestant, house: Housekeeping) -> None:
        written = self._accounts(house)
        await getattr(contestant, self.method)(list(map(contestant.native, written)))
        if (added := await house.added()) != self.size - self.existing:
            raise WrongAnswerError(f"{added} new rows instead of {self.size - self.existing}")
        for item in (written[0], *random.sample(written, min(_SAMPLE, self.size)), written[-1]):
            require_same(await house.stored(item.id), item)
        await self.tidy(house)
        await house.restore(item.id for item in written[: self.existing])


OPERATIONS: dict[str, Operation] = {
    operation.name: operation
    for operation in (
        Get("get", "get_by_id", "get"),
        GetConcurrently("get64", "get_by_id, 64 tasks", "get", calls_at_least=TASKS),
        Page("page", "page of 100", "page"),
        GetSeveral("get_many", "get_many(100)", "get_many"),
        Count("count", "count", "count"),
        GetSeveral("unit", "get_by_id in a unit of 10", "unit", size=UNIT_SIZE, statements=UNIT_SIZE),
        Add("add", "add", "add"),
        Update("update", "update", "update"),
        Delete("delete", "delete", "delete"),
        WriteMany("add_many", "add_many 1,000", "add_many"),
        WriteMany("upsert_many", "upsert_many 1,000", "upsert_many", existing=BATCH_SIZE // 2),
        WriteMany("update_many", "update_many 1,000", "update_many", existing=BATCH_SIZE),
        WriteMany("add_50k", "add_many 50,000", "add_many", size=50_000, is_long=True, without=_NOT_IN_LONG_WRITES),
        Stream("stream", "stream of all rows", "stream", is_long=True, without=(*PEERS, BarePostgres)),
    )
}
