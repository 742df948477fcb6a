"""T7: whatever a cancelled task was doing, it leaves no connection behind and no half of a transaction."""

from collections import Counter
from collections.abc import Callable

import pytest

from fastapi_building_blocks.testing import assert_connections_sound, storm
from tests.faults.databases import name_of, on_every_driver
from tests.guarantees.mixed_work import MixedWork, loaded

STEPS = {"read", "write", "unit", "commit", "stream", "bulk"}


@pytest.mark.parametrize("how", ["task", "scope"])
@on_every_driver
async def test_t7_a_storm_of_cancellations_leaves_nothing_behind(
    database_url: str, how: str, effort: Callable[[int, int], int], shown: Callable[..., None]
) -> None:
    wanted, at_once = effort(20, 1000), effort(40, 100)
    calls = cancelled = hung = 0
    slowest = 0.0
    failed: Counter[type[BaseException]] = Counter()
    async with loaded(database_url, pool_size=4, max_overflow=4) as session:
        work = MixedWork(session, f"{how} {database_url[:12]}")
        rounds = 0
        while cancelled < wanted and rounds < wanted:
            report = await storm(
                work.once, times=at_once, longest_delay=0.06, concurrency=6, anyio=how == "scope", seed=rounds
            )
            rounds += 1
            calls += report.total
            cancelled += report.cancelled
            hung += report.hung
            failed += report.failed
            slowest = max(slowest, report.slowest_end)
        await assert_connections_sound(session, within=5)
        losses = await work.losses()
        status = session.pool_status()
    points = ", ".join(f"{work.interrupted[step]} in {step}" for step in sorted(STEPS))
    shown(
        "T7",
        f"{'tasks' if how == 'task' else 'anyio scopes'} cancelled: {name_of(database_url)}",
        cancelled=f"{cancelled} of {calls} ({points})",
        failed=failed.total(),
        leaked=status.checked_out,
        slowest_end=f"{slowest:.2f} s",
        **losses,
    )
    assert not failed
    assert hung == 0
    assert losses == {"lost": 0, "torn": 0}
    assert status.checked_out == 0
    if wanted > 500:
        assert set(work.interrupted) == STEPS, "each step was interrupted"
