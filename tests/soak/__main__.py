"""The command line: ``python -m tests.soak --minutes 10``."""

import argparse
import asyncio
import sys

from .soak import DATABASES, soak


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.soak",
        description="Use PostgreSQL, MariaDB and SQLite in every way at once while servers and connections are broken, "
        "and compare what they hold with what was acknowledged. SIGINT and SIGTERM end it early, with the summary. "
        "Exit code 1: an answer was wrong, an acknowledged write was lost, a connection was not sound, or memory leaks.",
    )
    parser.add_argument("--minutes", type=float, default=10, help="default %(default)s")
    parser.add_argument("--db", default=",".join(DATABASES), help="some of %(default)s")
    parser.add_argument("--workers", type=int, default=8, help="for each database; default %(default)s")
    parser.add_argument("--seed", type=int, default=None, help="the same chances as in another run")
    parsed = parser.parse_args()
    parsed.db = parsed.db.split(",")
    if unknown := set(parsed.db) - set(DATABASES):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(DATABASES)}")
    return parsed


if __name__ == "__main__":
    given = arguments()
    sys.exit(asyncio.run(soak(given.db, given.minutes * 60, given.workers, given.seed)))
