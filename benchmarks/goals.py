"""How fast the library means to be, as ratios within one run."""

from collections.abc import Iterator
from typing import NamedTuple

from .measure import Result


class Goal(NamedTuple):
    """A bound of the ratio of one contestant's time to another's."""

    operation: str
    of: str
    to: str
    limit: float
    at_least: bool = False
    clock: str = "wall"

    def describe(self) -> str:
        clock = "CPU, " if self.clock == "cpu" else ""
        return f"{clock}{self.of} / {self.to}"

    def is_met(self, ratio: float) -> bool:
        # A ratio is as exact as it is printed.
        return round(ratio, 2) >= self.limit if self.at_least else round(ratio, 2) <= self.limit


_RAW = {"postgres": "raw asyncpg", "mysql": "raw aiomysql", "sqlite": "raw aiosqlite"}

_OPERATIONS: dict[tuple[str, ...], dict[str, tuple[float, float | None]]] = {
    ("get", "get64"): {"postgres": (0.20, 1.0), "mysql": (0.35, 1.2), "sqlite": (0.25, 1.35)},
    ("page",): {"postgres": (0.33, 1.0), "mysql": (0.70, 1.1), "sqlite": (0.35, 1.0)},
    ("add", "update", "delete"): {"postgres": (0.50, 1.0), "mysql": (0.55, 1.45), "sqlite": (0.20, 1.7)},
    ("add_many",): {"postgres": (0.45, 1.3), "sqlite": (0.62, 1.35)},
    ("add_50k",): {"postgres": (0.25, 1.35), "sqlite": (0.50, 1.2)},
    ("upsert_many",): {"postgres": (0.75, None), "sqlite": (0.62, 1.35)},
    ("stream",): {"postgres": (0.20, 1.0), "mysql": (0.45, 1.0), "sqlite": (0.25, 1.4)},
}
"""Ours to hand-written Core, and to the driver with its own pool."""

_CPU = {"mysql": {"add_many": 0.80, "add_50k": 0.70, "upsert_many": 0.80}}
"""CPU of ours to that of Core, where the server takes most of the time."""

_BARE = 1.35
_PEERS: dict[str, dict[str, tuple[float, float, float]]] = {
    "postgres": {"get64": (6, 14, 5), "page": (3.5, 5, 3.5), "add": (5, 5, 2.5)},
    "sqlite": {"add": (12, 12, 5)},
}
"""How many times faster than advanced-alchemy, FastCRUD and SQLModel."""

_HAND_MAPPED = 1.6
_IN_A_UNIT = 1.3


def goals(database: str) -> Iterator[Goal]:
    """Return the goals for one database, most important first."""
    for operations, limits in _OPERATIONS.items():
        if database in limits:
            to_core, to_raw = limits[database]
            for operation in operations:
                yield Goal(operation, "ours", "core", to_core)
                if to_raw is not None:
                    yield Goal(operation, "ours", _RAW[database], to_raw)
                if database == "postgres" and operation in ("get", "get64"):
                    yield Goal(operation, "ours", "bare asyncpg", _BARE)
    for operation, limit in _CPU.get(database, {}).items():
        yield Goal(operation, "ours", "core", limit, clock="cpu")
    yield Goal("unit", "ours", _RAW[database], _IN_A_UNIT)
    for operation, factors in _PEERS.get(database, {}).items():
        for peer, factor in zip(("advanced-alchemy", "FastCRUD", "SQLModel"), factors, strict=True):
            yield Goal(operation, peer, "ours", factor, at_least=True)
    for operation in ("get", "page", "stream", "add", "add_many"):
        yield Goal(operation, "ours, mapped by hand", "ours", _HAND_MAPPED)


def judged(result: Result) -> Iterator[tuple[Goal, float, float | None]]:
    """Return each goal that was measured, with its ratio, and the one that the driver alone would have in our place."""
    raw = _RAW[result.database]
    for goal in goals(result.database):
        ratio = result.ratio(goal.operation, goal.of, goal.to, goal.clock)
        if ratio is None:
            continue
        drivers = None
        if goal.to == "core":
            drivers = result.ratio(goal.operation, raw, "core", goal.clock)
        elif goal.at_least:
            drivers = result.ratio(goal.operation, goal.of, raw, goal.clock)
        yield goal, ratio, drivers
