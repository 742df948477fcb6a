"""The benchmarks answer rightly and report what they measured; how fast anything is, is not tested."""

import warnings
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ROWS = 500


@pytest.fixture(scope="module")
def benchmarks() -> SimpleNamespace:
    """The modules, which need the packages that the library is compared with."""
    for package in ("advanced_alchemy", "fastcrud", "matplotlib", "sqlmodel"):
        pytest.importorskip(package, reason="needs the extra 'bench', which `make bench` installs")
    with warnings.catch_warnings(action="ignore"):  # the peers' own imports
        from benchmarks import __main__, databases, goals, measure, operations, plot, report, scaling
    return SimpleNamespace(
        main=__main__,
        databases=databases,
        goals=goals,
        measure=measure,
        operations=operations,
        plot=plot,
        report=report,
        scaling=scaling,
    )


@pytest.fixture
async def house(benchmarks: SimpleNamespace, tmp_path: Path) -> AsyncIterator[Any]:
    keeping = benchmarks.databases.Housekeeping("sqlite", sqlite_url(tmp_path), ROWS)
    await keeping.setup()
    yield keeping
    await keeping.teardown()


def sqlite_url(folder: Path) -> str:
    return f"sqlite+aiosqlite:///{folder / 'accounts.db'}"


def results(benchmarks: SimpleNamespace) -> list[Any]:
    """Ours takes one second a call, and everybody else one more than the one before."""
    found = []
    for database, kinds in benchmarks.databases.CONTESTANTS.items():
        names = ["ours", *(kind.name for kind in kinds if kind.name != "ours")]
        cells = {
            operation: {
                name: benchmarks.measure.Cell([float(place)] * 3, [place / 2] * 3, calls=1)
                for place, name in enumerate(names, 1)
            }
            for operation in benchmarks.operations.OPERATIONS
        }
        found.append(benchmarks.measure.Result(database, f"{database} 1.0", ROWS, cells))
    return found


async def test_every_contestant_answers_rightly(benchmarks: SimpleNamespace, house: Any, tmp_path: Path):
    contestants = [kind() for kind in benchmarks.databases.CONTESTANTS["sqlite"]]
    many = benchmarks.operations.WriteMany
    operations = [
        # A table this small has no thousand rows to update.
        replace(operation, size=60, existing=60 * operation.existing // operation.size)
        if isinstance(operation, many)
        else operation
        for operation in benchmarks.operations.OPERATIONS.values()
    ]
    try:
        for contestant in contestants:
            await contestant.setup(sqlite_url(tmp_path))
        await benchmarks.measure.check_answers(operations, contestants, house)
    finally:
        for contestant in contestants:
            await contestant.teardown()


async def test_a_wrong_answer_names_who_gave_it(benchmarks: SimpleNamespace, house: Any):
    class Forgetful(benchmarks.databases.Ours):
        name = "forgetful"

        async def get(self, number: int) -> None:
            return None

    operation = benchmarks.operations.OPERATIONS["get"]
    with pytest.raises(benchmarks.operations.WrongAnswerError, match=r"forgetful on sqlite, get_by_id.*None"):
        await benchmarks.measure.check_answers([operation], [Forgetful()], house)


@pytest.mark.parametrize(
    ("name", "value"),
    [("public_id", "text"), ("is_active", 1), ("balance", 1.5), ("created_at", None), ("note", ""), ("id", 2)],
)
def test_an_answer_of_another_type_or_value_is_wrong(benchmarks: SimpleNamespace, name: str, value: object):
    right = benchmarks.databases.account(1)
    wrong = {**vars(right), name: value}
    with pytest.raises(benchmarks.operations.WrongAnswerError, match=name):
        benchmarks.operations.require_same(wrong, right)
    benchmarks.operations.require_same(vars(right), right)


async def test_each_round_times_everybody_once(benchmarks: SimpleNamespace, monkeypatch: pytest.MonkeyPatch):
    kinds = [benchmarks.databases.RawSQLite, benchmarks.databases.CoreWithSQLiteDefaults, benchmarks.databases.Ours]
    monkeypatch.setitem(benchmarks.databases.CONTESTANTS, "sqlite", kinds)
    operations = [benchmarks.operations.OPERATIONS[name] for name in ("get", "add", "update")]
    lines: list[str] = []
    measured = await benchmarks.measure.measure_database(
        "sqlite", operations, rows=ROWS, rounds=2, seconds=0.001, log=lines.append
    )
    assert list(measured.cells) == ["get", "add", "update"]
    for operation, cells in measured.cells.items():
        assert set(cells) == {kind.name for kind in kinds if kind().takes_part(operation)}
        assert all(len(cell.wall) == len(cell.cpu) == 2 and min(cell.wall) > 0 for cell in cells.values())
    assert lines


@pytest.mark.slow
@pytest.mark.full
def test_reads_from_replicas_and_caches_are_measured(benchmarks: SimpleNamespace):
    lines: list[str] = []
    result = benchmarks.scaling.run_scaling(rounds=1, seconds=0.001, log=lines.append)
    if result is None:
        pytest.skip(lines[-1])
    names = {kind.name for kind in benchmarks.scaling.KINDS}
    assert {operation: set(cells) for operation, cells in result.cells.items()} == {"get": names, "get64": names}
    text = "\n".join(benchmarks.report.scaling_section(result))
    assert all(name in text for name in names)


def test_the_tables_say_which_goals_are_met(benchmarks: SimpleNamespace):
    for result in results(benchmarks):
        text = benchmarks.report.terminal(result)
        assert result.version in text
        assert "1 s" in text
        verdicts = benchmarks.report.verdicts(result).rows
        assert {row[-2] for row in verdicts} == {"met", "MISSED"}
        assert len(verdicts) == len(list(benchmarks.goals.goals(result.database)))


def test_a_ratio_is_the_median_of_the_rounds(benchmarks: SimpleNamespace):
    cell = benchmarks.measure.Cell
    result = benchmarks.measure.Result(
        "sqlite", "SQLite", ROWS, {"get": {"ours": cell([1, 2, 4], [1, 1, 1]), "core": cell([4, 4, 4], [2, 3, 9])}}
    )
    assert result.ratio("get", "ours", "core") == 0.5
    assert result.ratio("get", "core", "ours", "cpu") == 3
    assert result.ratio("get", "ours", "nobody") is None


def test_the_page_and_the_picture_are_the_same_for_the_same_figures(benchmarks: SimpleNamespace, tmp_path: Path):
    pictures = []
    for name in ("first.svg", "second.svg"):
        panels = benchmarks.report.panels(results(benchmarks))
        benchmarks.plot.plot(panels, "times ours", tmp_path / name)
        pictures.append((tmp_path / name).read_bytes())
    assert pictures[0] == pictures[1]
    page = benchmarks.report.page(results(benchmarks), "make bench", "benchmarks.svg")
    for result in results(benchmarks):
        assert f"## {result.version}" in page
        assert result.version.encode() in pictures[0]


def test_an_unknown_operation_is_refused(benchmarks: SimpleNamespace, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        benchmarks.main.arguments(["--ops", "get,nothing"])
    assert "nothing" in capsys.readouterr().err
    assert benchmarks.main.arguments(["--ops", "page,get"]).ops == ["get", "page"]
