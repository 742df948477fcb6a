"""Where the time of a read goes: the parts of one, measured apart, of this library's and of hand-written Core's."""

import statistics
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from fastapi_building_blocks.domain import Sort, field
from fastapi_building_blocks.infrastructure.persistence.repositories.table_statements import Query

from .accounts import PAGE_SIZE, STATUSES, plain_table
from .core import Core, _account, page_of
from .ours import AccountRepository, Ours

LAYERS = ("statement", "connection, transaction, cursor", "driver and server", "rows to entities")
ROUNDS = 7
_STATUS = STATUSES[0]
_ORDER = [Sort("created_at", descending=True)]

Layers = dict[str, dict[str, dict[str, float]]]
"""Seconds by what was read, who read it and layer."""


async def measure_layers(url: str, calls: int = 300) -> Layers:
    """Return where the time of a get and of a page goes, for a database that has the accounts."""
    ours, core = Ours(), Core()
    await ours.setup(url)
    await core.setup(url)
    try:
        return {
            "get_by_id": await _parts(ours, core, "get", calls),
            f"page of {PAGE_SIZE}": await _parts(ours, core, "page", max(calls // 10, 1)),
        }
    finally:
        await ours.teardown()
        await core.teardown()


def _bind_get(repository: Any) -> tuple[Any, Any]:
    statement = repository._sql.by_key(None, False)
    return statement, statement.bind(repository._key_values(7))


def _build_get() -> Any:
    return sa.select(plain_table).where(plain_table.c.id == 7)


def _bind_page(repository: Any) -> tuple[Any, Any]:
    values: list[Any] = []
    shape, _ = repository._shape([field("status") == _STATUS], values)
    query = repository._window(Query(shape, repository._order(_ORDER)), values, PAGE_SIZE + 1, 0)
    statement = repository._sql.select(query)
    return statement, statement.bind(values)


def _build_page() -> Any:
    return page_of(_STATUS)


async def _parts(ours: Ours, core: Core, what: str, calls: int) -> dict[str, dict[str, float]]:
    repository: Any = AccountRepository(ours._session)
    sql, dialect = repository._sql, repository._sql.dialect
    argument: Any = 7 if what == "get" else _STATUS
    statement_of, query_of = (_bind_get, _build_get) if what == "get" else (_bind_page, _build_page)

    async def bind() -> tuple[Any, Any]:
        return statement_of(repository)

    async def build() -> Any:
        return query_of()

    statement, bound = await bind()
    connection = await ours._session._pool.acquire()
    rows = await dialect.fetch(connection, statement, bound)
    async with core._engine.connect() as opened:
        core_rows = (await opened.execute(await build())).all()

    async def load() -> None:
        sql.load(rows)

    async def load_by_name() -> None:
        for row in core_rows:
            _account(row)

    timed: dict[str, Callable[[], Awaitable[Any]]] = {
        "ours": lambda: getattr(ours, what)(argument),
        "bind": bind,
        "driver": lambda: dialect.fetch(connection, statement, bound),
        "load": load,
        "core": lambda: getattr(core, what)(argument),
        "build": build,
        "load by name": load_by_name,
    }
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(ROUNDS):
        for name, call in timed.items():
            seconds[name].append(await _seconds(call, calls))
    ours._session._pool.release(connection)
    took = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "SQLAlchemy Core by hand": _layers(took["core"], took["build"], took["driver"], took["load by name"]),
        "repository": _layers(took["ours"], took["bind"], took["driver"], took["load"]),
    }


def _layers(whole: float, statement: float, driver: float, entities: float) -> dict[str, float]:
    between = max(whole - statement - driver - entities, 0.0)
    return dict(zip(LAYERS, (statement, between, driver, entities), strict=True))


async def _seconds(call: Callable[[], Awaitable[Any]], calls: int) -> float:
    begin = time.perf_counter()
    for _ in range(calls):
        await call()
    return (time.perf_counter() - begin) / calls


def plot_layers(databases: dict[str, Layers], path: Path) -> None:
    """Draw a stacked bar for each read and reader, a row for each database. The same values give the same bytes."""
    import matplotlib as mpl  # noqa: PLC0415 - large, and needed after everything was timed
    from matplotlib import pyplot as plt  # noqa: PLC0415

    from .plot import COLORS, TEXT  # noqa: PLC0415

    colored = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), TEXT)
    settings: dict[Any, Any] = {"svg.hashsalt": "layers", "svg.fonttype": "none", **colored}
    with mpl.rc_context(settings):
        size = (9, 1.2 + 1.25 * len(databases))
        figure, axes = plt.subplots(len(databases), 2, figsize=size, squeeze=False, layout="constrained", sharey=True)
        for line, (title, reads) in zip(axes, databases.items(), strict=True):
            for axis, (read, readers) in zip(line, reads.items(), strict=True):
                for place, layers in enumerate(readers.values()):
                    left = 0.0
                    for color, (layer, seconds) in zip(COLORS, layers.items(), strict=False):
                        axis.barh(place, seconds * 1e6, left=left, color=color, label=layer if place == 0 else None)
                        left += seconds * 1e6
                axis.set_title(f"{title}: {read}", loc="left", fontsize=10)
                axis.set_yticks(range(len(readers)), list(readers))
                axis.invert_yaxis()
                axis.patch.set_alpha(0)
                for side in ("top", "right", "left"):
                    axis.spines[side].set_visible(False)
        for axis in axes[-1]:
            axis.set_xlabel("microseconds")
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False)
        figure.savefig(path, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        plt.close(figure)
