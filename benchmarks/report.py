"""Tables as text and Markdown, and the pages made of them."""

import json
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from os import cpu_count
from pathlib import Path
from typing import Any, NamedTuple

from .goals import judged
from .measure import Result
from .operations import OPERATIONS

PACKAGES = (
    "SQLAlchemy",
    "asyncpg",
    "aiomysql",
    "asyncmy",
    "aiosqlite",
    "advanced-alchemy",
    "fastcrud",
    "sqlmodel",
)


class Table(NamedTuple):
    """Rows of text under headings; the first column is a label, the others align to the right."""

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]

    def text(self) -> str:
        lines = [self.headings, *self.rows]
        widths = [max(len(line[place]) for line in lines) for place in range(len(self.headings))]
        lines.insert(1, ["-" * width for width in widths])
        return "\n".join(
            "  ".join(
                value.rjust(width) if place else value.ljust(width)
                for place, (value, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        )

    def markdown(self) -> str:
        rule = ["---", *["---:"] * (len(self.headings) - 1)]
        return "\n".join(f"| {' | '.join(line)} |" for line in (self.headings, rule, *self.rows))


def duration(seconds: float | None) -> str:
    """Return a time with three digits and its unit."""
    if seconds is None:
        return ""
    value, unit = (seconds * 1e6, "µs") if seconds < 1e-3 else (seconds * 1e3, "ms") if seconds < 1 else (seconds, "s")
    return f"{value:.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"


# What was measured, as tables


def contestants_of(result: Result) -> list[str]:
    """Return the names of everybody who took part in something, in their order."""
    return list(dict.fromkeys(name for cells in result.cells.values() for name in cells))


def times(result: Result, clock: str = "wall") -> Table:
    """Return the median time per call of everybody; of a unit of work, per statement."""
    everybody = contestants_of(result)
    return Table(
        ["operation", *everybody],
        [
            [OPERATIONS[name].title, *(duration(result.median(name, one, clock)) for one in everybody)]
            for name in result.cells
        ],
    )


def ratios(result: Result, to: str = "ours") -> Table:
    """Return the time of everybody as a multiple of ours, or of another one's."""
    everybody = [name for name in contestants_of(result) if name != to]
    return Table(
        ["operation", *everybody],
        [
            [
                OPERATIONS[name].title,
                *(
                    "" if ratio is None else f"{ratio:.2f}"
                    for ratio in (result.ratio(name, one, to) for one in everybody)
                ),
            ]
            for name in result.cells
        ],
    )


def verdicts(result: Result) -> Table:
    """Return every goal that was measured, and whether it is met."""
    return Table(
        ["operation", "ratio", "goal", "ours", "", "the driver alone"],
        [
            [
                OPERATIONS[goal.operation].title,
                goal.describe(),
                f"{'≥' if goal.at_least else '≤'} {goal.limit:g}",
                f"{ratio:.2f}",
                "met" if goal.is_met(ratio) else "MISSED",
                "" if drivers is None else f"{drivers:.2f}{'' if goal.is_met(drivers) else ', missed as well'}",
            ]
            for goal, ratio, drivers in judged(result)
        ],
    )


def panels(results: Sequence[Result]) -> dict[str, dict[str, dict[str, float]]]:
    """Return what the plot shows: everybody's time as a multiple of ours."""
    return {
        result.version: {
            OPERATIONS[name].title: {
                series: ratio
                for one in contestants_of(result)
                if (series := _series(one)) and (ratio := result.ratio(name, one, "ours")) is not None
            }
            for name in result.cells
        }
        for result in results
    }


def _series(contestant: str) -> str | None:
    """Return by which name a contestant is in the plot; None for those that are in the tables only."""
    if contestant in ("ours", "ours on asyncmy", "raw asyncmy", "core, SQLite's defaults"):
        return None
    named = {"core": "SQLAlchemy Core by hand", "bare asyncpg": "driver without pool reset"}
    if contestant.startswith("raw "):
        return "driver with its pool"
    return named.get(contestant, contestant)


def environment() -> Table:
    """Return what it was measured on, and with which versions."""
    rows = [["Python", platform.python_version()], ["processor", f"{_processor()}, {cpu_count()} cores"]]
    for package in PACKAGES:
        try:
            rows.append([package, version(package)])
        except PackageNotFoundError:
            continue
    return Table(["what", "which"], rows)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.machine())


def terminal(result: Result) -> str:
    """Return all tables about one database as text."""
    missed = sum(not goal.is_met(ratio) for goal, ratio, _ in judged(result))
    return "\n\n".join(
        [
            f"=== {result.version}, {result.rows:,} rows: wall time per call, median",
            times(result).text(),
            "--- CPU time of this process per call, median",
            times(result, "cpu").text(),
            "--- wall time as a multiple of ours",
            ratios(result).text(),
            f"--- goals ({missed} missed)",
            verdicts(result).text(),
        ]
    )


def page(results: Sequence[Result], command: str, picture: str, more: Sequence[str] = ()) -> str:
    """Return docs/benchmarks.md; ``more`` is Markdown about what else was measured."""
    today = datetime.now(UTC).date()
    parts = [
        "# Benchmarks",
        f"Written by `{command}` on {today}. The command measures again, on your machine.",
        f"![Time of each operation as a multiple of this library's]({picture})",
        _ABOUT,
        environment().markdown(),
    ]
    for result in results:
        parts += [
            f"## {result.version}",
            f"{result.rows:,} rows. Wall time per call:",
            times(result).markdown(),
            "CPU time of the process per call:",
            times(result, "cpu").markdown(),
            "Wall time as a multiple of ours:",
            ratios(result).markdown(),
            "Goals:",
            verdicts(result).markdown(),
        ]
    return "\n\n".join([*parts, *more]) + "\n"


def http_tables(results: Mapping[str, Any]) -> Iterator[tuple[str, Table]]:
    """Return requests per second of every application on each database, and their multiples of Core's."""
    for database, operations in results.items():
        everybody = list(dict.fromkeys(name for cells in operations.values() for name in cells))
        rows = []
        for operation, cells in operations.items():
            rate = {name: f"{cell['median']['requests_per_second']:,.0f}" for name, cell in cells.items()}
            times = {name: f"{cell['times_core']:.2f}" for name, cell in cells.items() if "times_core" in cell}
            cpu = {name: f"{cell['median']['cpu_microseconds']:.0f} µs" for name, cell in cells.items()}
            for what, row in (("requests/s", rate), ("times Core's", times), ("server's CPU a request", cpu)):
                rows.append([f"{operation}, {what}", *(row.get(name, "") for name in everybody)])
        yield f"HTTP on {database}", Table(["", *everybody], rows)


def http_sections(results: Mapping[str, Any]) -> list[str]:
    """Return the same as Markdown."""
    sections = [part for title, table in http_tables(results) for part in (f"### {title}", table.markdown())]
    return ["## Over HTTP", _ABOUT_HTTP, *sections] if sections else []


def scaling_tables(result: Result) -> Iterator[tuple[str, Table]]:
    """Return what a read costs on replicas and from a cache."""
    yield "Wall time per call", times(result)
    yield "CPU time of the process per call", times(result, "cpu")
    yield "Wall time as a multiple of that with one server", ratios(result, "one server")


def scaling_section(result: Result) -> list[str]:
    """Return the same as Markdown."""
    tables = [part for title, table in scaling_tables(result) for part in (f"{title}:", table.markdown())]
    return ["## Scaling reads", f"{result.version}. {_ABOUT_SCALING}", *tables]


_ABOUT_SCALING = """\
A repository's `get_by_id` of a thousand accounts, on one server, on two replicas, and behind a
`CachedRepository` that has all of them. *Old rows allowed* is without causal routing (`eventual_reads()`); *own write replayed*
is a context that has written what both replicas are known to have: the goal is 1.1 times the former at most. Here all servers
and the process share the same cores, so replicas cannot show what they are for, more readers than one server answers."""

_ABOUT_HTTP = """\
One uvicorn process for each application, with uvloop and httptools as `uvicorn[standard]` brings them, 32 connections that are kept alive, and a load generator on the
other core. One row is `GET /accounts/{id}`, 100 rows a filtered and sorted page as a response model. *FastAPI alone* answers
constants: what is left where a database costs nothing."""

_ABOUT = """\
Everything runs in one process on one core, interleaved: in each round every contestant once, in random order. Times are medians over
the rounds, ratios are medians of the ratios within each round. Before anything is timed, the answers of every contestant
are compared with what is stored, types included.

- *raw* is the driver with its own pool and hand-written SQL (for aiosqlite a queue of connections, with the library's
  pragmas); *bare asyncpg* is a queue of connections that nobody resets.
- *core* is SQLAlchemy Core written by hand: `engine.connect()`, `select()`, `row.name`. On SQLite all contestants have the
  library's pragmas, so that all wait for the disk equally; *core, SQLite's defaults* has not, and waits at each commit.
- *core, tuned* reads in autocommit, takes rows by position, and streams in batches of 1,000: what an expert would write
  after profiling. Goals are against *core*.
- *ours* is `SQLAlchemyRepository`; *mapped by hand* has both mappers overridden.
- advanced-alchemy, FastCRUD and SQLModel are used as their documentation shows: one session and one commit per call.
- Goals are ratios that prototypes reached on another machine. *The driver alone* is the ratio that it has in our place,
  without any library: where it misses the goal as well, no library on that driver could meet it here.
- All have pools of the same size. Keys are given, not generated. Pages have no count. Times of a unit of work are per
  statement. `add_many` takes the driver's best (COPY on PostgreSQL)."""


def save(results: Sequence[Result], path: Path) -> None:
    """Write everything that was measured as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "date": datetime.now(UTC).isoformat(),
        "arguments": sys.argv[1:],
        "environment": environment().rows,
        "results": [asdict(result) for result in results],
    }
    path.write_text(json.dumps(content, indent=1))
