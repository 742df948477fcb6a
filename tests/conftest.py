"""Fixtures that give tests private databases on real servers, and the summary of which servers took part."""

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from fastapi_building_blocks.infrastructure.database import sqlalchemy_session
from tests.backends import SERVERS, Backends, Missing, Server, required_backends

BACKENDS = pytest.StashKey[Backends]()

# A slow answer of a busy server is not a falsified property.
hypothesis.settings.register_profile("servers", deadline=None, print_blob=True)
hypothesis.settings.load_profile("servers")


@pytest.fixture(scope="module", autouse=True)
def garbage_is_told_where_it_was_made() -> Iterator[None]:
    """Collect what a module's tests left in cycles, so that what is unclosed there fails them, and not a later module's."""
    yield
    gc.collect()


@pytest.fixture(scope="session")
def backends(pytestconfig: pytest.Config) -> Backends:
    """The servers of this run; ``with backends.database("postgres") as url`` for one more private database."""
    return pytestconfig.stash[BACKENDS]


@pytest.fixture(scope="session")
def postgres_url(backends: Backends) -> Iterator[str]:
    """A private PostgreSQL database for all tests of this process, dropped at the end."""
    with backends.database("postgres") as url:
        yield url


@pytest.fixture(scope="session")
def mysql_url(backends: Backends) -> Iterator[str]:
    """A private MySQL or MariaDB database (utf8mb4) for all tests of this process, dropped at the end."""
    with backends.database("mysql") as url:
        yield url


@pytest.fixture(scope="session")
def redis_url(backends: Backends) -> Iterator[str]:
    """A Redis database number that nobody else uses, flushed at the end."""
    with backends.database("redis") as url:
        yield url


@pytest.fixture(scope="session")
def mssql_url(backends: Backends) -> Iterator[str]:
    """A private SQL Server database, where ``MSSQL_URL`` names a server."""
    with backends.database("mssql") as url:
        yield url


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    """An SQLite file of this test alone."""
    return f"sqlite+aiosqlite:///{tmp_path / 'test.db'}"


@pytest.fixture(params=["sqlite", "postgres", "mysql"])
def database_url(request: pytest.FixtureRequest, backends: Backends, sqlite_url: str) -> Iterator[str]:
    """An empty database of this test alone, on each database in turn.

    ``@pytest.mark.parametrize("database_url", ["postgres"], indirect=True)`` asks for one of them only.
    """
    with backends.database_by_driver(request.param, sqlite_url) as url:
        yield url


# The promises of GUARANTEES: what was tried, and what came of it, a line each at the end of the run.


@pytest.fixture
def shown(record_property: Callable[[str, object], None]) -> Callable[..., None]:
    """Report what a test of a promise has measured: ``shown("T5", "32 tasks, 10 accounts", tries=1000, lost=0)``.

    The first argument is the promise, the second the fault and where; the figures follow by name, with their units.
    """

    def show(promise: str, what: str, **figures: object) -> None:
        figure = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in figures.items())
        record_property("promise", f"{promise}\t{what}\t{figure}")

    return show


@pytest.fixture
def effort(pytestconfig: pytest.Config) -> Callable[[int, int], int]:
    """How often to try: ``effort(short, full)`` is the second number under ``--full``, as `make test-faults` runs it."""
    full = pytestconfig.getoption("--full")
    return lambda short, thorough: thorough if full else short


def promises(terminalreporter: pytest.TerminalReporter) -> list[tuple[str, str, str]]:
    """Return what tests have shown: the promise, the fault, and the figures or that the test failed."""
    rows = []
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, []):
            for name, value in getattr(report, "user_properties", ()):
                if name == "promise" and report.when == "call":
                    promise, what, figure = str(value).split("\t")
                    rows.append((promise, what, figure if outcome == "passed" else f"FAILED: {figure}"))
    return sorted(rows, key=lambda row: (row[0][0], int(row[0][1:]), *row[1:]))


# Under xdist the controller looks for the servers once, so that workers share a container and agree on what is
# missing; each worker creates its own databases and reports back what it used.


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="try faults as often as promised, not only a few times")
    parser.addoption("--portable", action="store_true", help="run every session on SQLAlchemy's adapted cursors")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--portable"):
        for item in items:
            if mark := item.get_closest_marker("fast_path"):
                item.add_marker(pytest.mark.skip(reason=f"of the fast path alone: {mark.args[0]}"))
    if not config.getoption("--full"):
        left_out = [item for item in items if item.get_closest_marker("full")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("full")]


@pytest.fixture(autouse=True)
def portable_path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With ``--portable``, no session takes the fast path of its driver, whatever the test asks for."""
    if request.config.getoption("--portable"):
        chosen = sqlalchemy_session.dialect_for
        monkeypatch.setattr(
            sqlalchemy_session,
            "dialect_for",
            lambda url, timeouts, **how: chosen(url, timeouts, **how | {"portable": True}),
        )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes ten seconds or more")
    config.addinivalue_line("markers", "fast_path(what): skipped under --portable, which promises no such thing")
    config.addinivalue_line("markers", "full: under --full only: long, and for the most part tried by others")
    given = getattr(config, "workerinput", {}).get("backends", {})
    found = {name: Server(*entry) if len(entry) == 2 else Missing(*entry) for name, entry in given.items()}
    config.stash[BACKENDS] = Backends(required_backends(), found)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    backends = node.config.stash[BACKENDS]
    node.workerinput["backends"] = {name: tuple(backends.server(name)) for name in SERVERS}


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        backends = session.config.stash[BACKENDS]
        session.config.workeroutput["backends"] = (backends.ran, backends.skipped)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    # A worker that crashed has no output.
    ran, skipped = getattr(node, "workeroutput", {}).get("backends", ({}, {}))
    backends = node.config.stash[BACKENDS]
    backends.ran.update(ran)
    backends.skipped.update(skipped)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    rows = promises(terminalreporter)
    if rows:
        terminalreporter.section("promises")
        width = max(len(what) for _, what, _ in rows)
        for promise, what, figure in rows:
            terminalreporter.write_line(f"{promise:<4} {what:<{width}}  {figure}")
    terminalreporter.section("backends")
    for line in terminalreporter.config.stash[BACKENDS].report():
        terminalreporter.write_line(line)


def pytest_unconfigure(config: pytest.Config) -> None:
    if BACKENDS in config.stash:
        config.stash[BACKENDS].close()
