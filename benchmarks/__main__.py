"""The command line: ``python -m benchmarks --help``."""

import argparse
import asyncio
import shlex
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

# advanced-alchemy's mixins use a decorator that SQLAlchemy 2.1 deprecates.
warnings.filterwarnings("ignore", message="The declarative_mixin decorator")

from . import report  # noqa: E402
from .databases import CONTESTANTS, private_database  # noqa: E402
from .http_load import run_http  # noqa: E402
from .layers import Layers, measure_layers, plot_layers  # noqa: E402
from .measure import Result, measure_database  # noqa: E402
from .operations import OPERATIONS, WrongAnswerError  # noqa: E402
from .scaling import run_scaling  # noqa: E402

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "build" / "benchmarks.json"
PAGE = ROOT / "docs" / "benchmarks.md"
PICTURE = ROOT / "docs" / "benchmarks.svg"
LAYERS_PICTURE = ROOT / "docs" / "layers.svg"
ROUNDS = 7
HTTP = "http"
SCALING = "scaling"
HTTP_ROUNDS = 5
PARTS = (*OPERATIONS, HTTP, SCALING)


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure raw drivers, SQLAlchemy Core by hand, this library, advanced-alchemy, FastCRUD and SQLModel "
        "in one interleaved run. PostgreSQL and MariaDB or MySQL are found by POSTGRES_URL and MYSQL_URL or on their "
        "default local ports, and each gets a private database that is dropped afterwards.",
        epilog=f"Operations: {', '.join(PARTS)}. Everything that was measured is left in build/benchmarks.json.",
    )
    parser.add_argument("--db", type=_some_of(CONTESTANTS), default=list(CONTESTANTS), help="postgres,mysql,sqlite")
    parser.add_argument("--ops", type=_some_of(PARTS), default=[*PARTS], help="get,page")
    parser.add_argument(
        "--rounds", type=int, default=ROUNDS, help="default %(default)s; of the longest operations at most 3"
    )
    parser.add_argument("--rows", type=int, default=200_000, help="in the table; default %(default)s")
    parser.add_argument("--seconds", type=float, default=0.1, help="for a contestant in a round; default %(default)s")
    parser.add_argument("--write", action="store_true", help="write docs/benchmarks.md and .svg from a partial run too")
    return parser.parse_args(argv)


def _some_of(known: Iterable[str]) -> Callable[[str], list[str]]:
    def names(text: str) -> list[str]:
        chosen = text.split(",")
        if unknown := set(chosen) - set(known):
            raise argparse.ArgumentTypeError(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
        return [name for name in known if name in chosen]

    return names


def logger() -> Callable[[str], None]:
    started = time.perf_counter()

    def log(line: str) -> None:
        print(f"{time.perf_counter() - started:6.0f} s  {line}", flush=True)

    return log


async def measure_http(
    options: argparse.Namespace, log: Callable[[str], None]
) -> tuple[dict[str, Any], dict[str, Layers]]:
    """Return requests per second by database, operation and contestant, and where the time of reads goes."""
    results: dict[str, Any] = {}
    layers: dict[str, Layers] = {}
    for name in options.db if HTTP in options.ops else ():
        async with private_database(name) as url:
            if url is not None:
                results |= await run_http({name: url}, min(options.rounds, HTTP_ROUNDS), log, rows=options.rows)
                layers[name] = await measure_layers(url)
    return results, layers


async def measure(options: argparse.Namespace, log: Callable[[str], None]) -> list[Result]:
    results = []
    chosen = [OPERATIONS[operation] for operation in options.ops if operation in OPERATIONS]
    for name in options.db if chosen else ():
        result = await measure_database(
            name,
            chosen,
            rows=options.rows,
            rounds=options.rounds,
            seconds=options.seconds,
            log=log,
        )
        if result is None:
            log(f"no {name} here: skipped")
        else:
            results.append(result)
    return results


def main() -> None:
    options = arguments()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the private databases are dropped then too
    try:
        log = logger()
        results = asyncio.run(measure(options, log))
        over_http, layers = asyncio.run(measure_http(options, log))
        wanted = SCALING in options.ops and "postgres" in options.db
        scaling = run_scaling(options.rounds, options.seconds, log) if wanted else None
    except WrongAnswerError as error:
        raise SystemExit(f"A wrong answer, so nothing is measured: {error}") from error
    report.save([*results, *([] if scaling is None else [scaling])], RESULTS)
    for result in results:
        print(f"\n{report.terminal(result)}")
    for title, table in report.http_tables(over_http):
        print(f"\n=== {title}\n\n{table.text()}")
    for title, table in report.scaling_tables(scaling) if scaling is not None else ():
        print(f"\n=== Scaling reads: {title}\n\n{table.text()}")
    whole = len(results) == len(CONTESTANTS) and options == arguments([])
    if options.write or whole:
        from .plot import plot  # noqa: PLC0415 - a large import, after everything was timed

        more = report.http_sections(over_http) + ([] if scaling is None else report.scaling_section(scaling))
        command = "make bench" if whole else f"python -m benchmarks {shlex.join(sys.argv[1:])}"
        PAGE.write_text(report.page(results, command, PICTURE.name, more))
        plot(report.panels(results), "time as a multiple of this library's (left of 1x is faster)", PICTURE)
        if layers:
            plot_layers(layers, LAYERS_PICTURE)
        print(f"\nWritten: {PAGE.relative_to(ROOT)} and its pictures")


if __name__ == "__main__":
    main()
