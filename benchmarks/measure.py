"""The measuring itself: in each round every contestant once, in random order, in one process."""

import gc
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, field

from .contestants import Contestant
from .databases import CONTESTANTS, Housekeeping, private_database
from .operations import Operation, WrongAnswerError

Log = Callable[[str], None]

LONG_ROUNDS = 3
_CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def pin(place: int, process: int = 0) -> None:
    """Keep a process, with the threads that it starts from here on, on one core, where the system can do that.

    Whether the kernel puts a thread on the core of the one that waits for it makes a call to SQLite twice as long or
    not, which has nothing to do with who makes the call.
    """
    if _CORES:
        os.sched_setaffinity(process, {_CORES[place % len(_CORES)]})


@contextmanager
def on_one_core() -> Iterator[None]:
    """Have what is measured in this process on one core."""
    pin(0)
    try:
        yield
    finally:
        if _CORES:
            os.sched_setaffinity(0, _CORES)


@dataclass
class Cell:
    """What one contestant took for one operation: seconds per call, one value for each round."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    calls: int = 0
    """In each round."""

    def seconds(self, clock: str) -> list[float]:
        return self.cpu if clock == "cpu" else self.wall


@dataclass
class Result:
    """Everything about one database: ``cells[operation][contestant]``."""

    database: str
    version: str
    rows: int
    cells: dict[str, dict[str, Cell]] = field(default_factory=dict)

    def median(self, operation: str, contestant: str, clock: str = "wall") -> float | None:
        cell = self.cells.get(operation, {}).get(contestant)
        return statistics.median(cell.seconds(clock)) if cell else None

    def ratio(self, operation: str, of: str, to: str, clock: str = "wall") -> float | None:
        """Return the median of the rounds' ratios, or None where one of the two did not take part."""
        cells = self.cells.get(operation, {})
        if of not in cells or to not in cells:
            return None
        pairs = zip(cells[of].seconds(clock), cells[to].seconds(clock), strict=True)
        return statistics.median(one / other for one, other in pairs)


async def measure_database(
    name: str, operations: Sequence[Operation], *, rows: int, rounds: int, seconds: float, log: Log
) -> Result | None:
    """Measure operations on one database; None where there is no such server."""
    async with AsyncExitStack() as stack:
        url = await stack.enter_async_context(private_database(name))
        if url is None:
            return None
        stack.enter_context(on_one_core())
        house = Housekeeping(name, url, rows)
        await house.setup()
        stack.push_async_callback(house.teardown)
        result = Result(name, await house.version(), rows)
        log(f"{result.version}: {rows:,} rows")
        contestants = [kind() for kind in CONTESTANTS[name]]
        for contestant in contestants:
            await contestant.setup(url)
            stack.push_async_callback(contestant.teardown)
        await check_answers(operations, contestants, house)
        log(f"{result.version}: all answers are right")
        # What is there by now stays. Collections while something is timed look at its own garbage only, and not at
        # everything that the other contestants have imported.
        gc.collect()
        gc.freeze()
        stack.callback(gc.unfreeze)
        for operation in operations:
            started = time.perf_counter()
            taking_part = [contestant for contestant in contestants if operation.takes_part(contestant)]
            result.cells[operation.name] = await measure_operation(operation, taking_part, house, rounds, seconds)
            log(f"{result.version}: {operation.title} ({time.perf_counter() - started:.0f} s)")
        return result


async def check_answers(
    operations: Sequence[Operation], contestants: Sequence[Contestant], house: Housekeeping
) -> None:
    """Let every contestant do every operation once, and compare with what is right.

    Raises:
        WrongAnswerError: naming contestant and operation.
    """
    for operation in operations:
        for contestant in contestants:
            if operation.takes_part(contestant):
                try:
                    await operation.check(contestant, house)
                except Exception as error:
                    raise WrongAnswerError(
                        f"{contestant.name} on {house.name}, {operation.title}: {type(error).__name__}: {error}"
                    ) from error


async def measure_operation(
    operation: Operation, contestants: Sequence[Contestant], house: Housekeeping, rounds: int, seconds: float
) -> dict[str, Cell]:
    """Measure an operation: in each round every contestant once."""
    cells = {contestant.name: Cell() for contestant in contestants}
    for contestant in contestants:
        calls = 1 if operation.is_long else await _calls_in(seconds, operation, contestant, house)
        cells[contestant.name].calls = calls
    order = list(contestants)
    for _ in range(min(rounds, LONG_ROUNDS) if operation.is_long else rounds):
        random.shuffle(order)
        for contestant in order:
            cell = cells[contestant.name]
            wall, cpu = await _time(operation, contestant, house, cell.calls)
            cell.wall.append(wall / operation.statements)
            cell.cpu.append(cpu / operation.statements)
    return cells


async def _calls_in(seconds: float, operation: Operation, contestant: Contestant, house: Housekeeping) -> int:
    """Return how many calls take about this long; finding out warms everything up."""
    calls = operation.calls_at_least
    while True:
        wall, _ = await _time(operation, contestant, house, calls)
        if wall * calls >= seconds / 4:
            return max(operation.calls_at_least, round(seconds / wall))
        calls *= 8


async def _time(operation: Operation, contestant: Contestant, house: Housekeeping, calls: int) -> tuple[float, float]:
    """Return seconds and seconds of this process's CPU per call."""
    arguments = await operation.prepare(contestant, house, calls)
    gc.collect()
    cpu, wall = time.process_time(), time.perf_counter()
    await operation.run(contestant, arguments)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    await operation.tidy(house)
    return wall / len(arguments), cpu / len(arguments)
