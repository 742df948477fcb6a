"""A storm of cancellations: many calls, each cancelled at a random point."""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from anyio import move_on_after


@dataclass
class StormReport:
    """How the calls of a storm ended."""

    finished: int = 0
    """Calls that answered, because they were quicker than their cancellation."""
    cancelled: int = 0
    """Calls that ended as cancelled."""
    failed: Counter[type[BaseException]] = field(default_factory=Counter)
    """Calls that raised something else, by exception class."""
    hung: int = 0
    """Calls that had not ended ``patience`` seconds after their cancellation."""
    slowest_end: float = 0.0
    """The longest time (seconds) that a call went on after its cancellation."""

    @property
    def total(self) -> int:
        """How many calls were made."""
        return self.finished + self.cancelled + self.failed.total() + self.hung


async def storm(
    make_call: Callable[[int], Awaitable[Any]],
    times: int,
    longest_delay: float,
    concurrency: int,
    *,
    anyio: bool = False,
    seed: int = 0,
    patience: float = 10.0,
) -> StormReport:
    """Make calls, cancel each after a random delay, and report how they ended.

    Args:
        make_call: makes the call with this number, from 0.
        times: how many calls.
        longest_delay: seconds; the delays are spread evenly from 0 to this. About as long as an undisturbed call.
        concurrency: how many calls run at once.
        anyio: cancel by an anyio scope, which cancels again at every ``await`` until the call has ended, as Starlette
            does; otherwise by ``Task.cancel``, once.
        seed: the same seed gives every call the same delay again.
        patience: seconds that a cancelled call may take to end before it counts as hung and is left alone.
    """
    if concurrency < 1:
        raise ValueError(f"concurrency is 1 or more, not {concurrency}")
    report = StormReport()
    chosen = random.Random(seed)  # noqa: S311 - reproducible, not secret
    delays = [chosen.uniform(0, longest_delay) for _ in range(times)]
    calls = enumerate(delays)
    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(_cancel_in_turn(make_call, calls, report, patience, in_scope=anyio))
    return report


async def _cancel_in_turn(
    make_call: Callable[[int], Awaitable[Any]],
    calls: Iterator[tuple[int, float]],
    report: StormReport,
    patience: float,
    *,
    in_scope: bool,
) -> None:
    for number, delay in calls:
        started = time.monotonic()
        if in_scope:
            task = asyncio.create_task(_within(delay, make_call, number))
        else:
            task = asyncio.create_task(_plainly(make_call, number))
        try:
            done, _ = await asyncio.wait({task}, timeout=delay)
            if not done and not in_scope:
                task.cancel()
            await asyncio.wait({task}, timeout=patience)
        finally:
            if not task.done():
                task.cancel()
        if not task.done():
            report.hung += 1
            continue
        report.slowest_end = max(report.slowest_end, time.monotonic() - started - delay)
        if task.cancelled():
            report.cancelled += 1
        elif error := task.exception():
            report.failed[type(error)] += 1
        elif task.result():
            report.finished += 1
        else:
            report.cancelled += 1


async def _plainly(make_call: Callable[[int], Awaitable[Any]], number: int) -> bool:
    """Make the call, and answer True when it has answered."""
    await make_call(number)
    return True


async def _within(delay: float, make_call: Callable[[int], Awaitable[Any]], number: int) -> bool:
    """Make the call in an anyio scope, and answer whether it has answered."""
    with move_on_after(delay) as scope:
        await make_call(number)
    return not scope.cancelled_caught
