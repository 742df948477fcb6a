"""A million rows, out by a stream and in by a generator, take no more memory than some thousands."""

import asyncio
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from tests.guarantees.ledger import Account, Accounts, opened

ROWS = 1_000_000
MOST_MEGABYTES = 60


def peak() -> int:
    """The most memory that this process has ever had, in megabytes; Linux reports kilobytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


async def measure(url: str) -> None:
    """Print the growth of the peak by writing and by reading, after a small warm-up of both."""
    async with opened(url, statement_timeout=None) as session:
        repository = Accounts(session)
        for count in (1_000, ROWS):
            before = peak()
            given = (Account(number, f"number {number}", 0, "owner " * 10) for number in range(count))
            assert await repository.add_many(given) == count
            written = peak() - before
            read = 0
            async for one in repository.stream():
                read += 1 if one.balance == 0 else 0
            assert read == count
            if count == 1_000:
                assert await repository.delete_where(everything=True) == count
        sys.stdout.write(f"{written} {peak() - before}")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in other units elsewhere")
def test_a_million_rows_are_written_and_streamed_within_60_megabytes(database_url: str) -> None:
    root = Path(__file__).parents[2]
    run = subprocess.run(
        [sys.executable, "-m", "tests.guarantees.test_memory", database_url],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    written, both = map(int, run.stdout.split())
    assert written < MOST_MEGABYTES
    assert both < MOST_MEGABYTES


if __name__ == "__main__":
    asyncio.run(measure(sys.argv[1]))
