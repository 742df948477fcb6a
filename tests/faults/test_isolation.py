"""T10: the anomalies of Hermitage (https://github.com/ept/hermitage), through our transactions, at every level.

Its summary table is ``PUBLISHED`` below, and each anomaly follows its scripts for PostgreSQL and MySQL, step by step.
MariaDB 10.11 and PostgreSQL 15 behave as it says for MySQL 5.6 and PostgreSQL 9.3. Beyond it:

- MariaDB has ``innodb_snapshot_isolation``, a variable of the session, on by default since 11.6: REPEATABLE READ is then
  snapshot isolation, like PostgreSQL's. It is tried too, on and off, whatever the server's default.
- SQLite is not in the table. A unit of work that may write takes the write lock as it begins, so that nothing else runs.
"""

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from fastapi_building_blocks.domain import TransientError, field
from fastapi_building_blocks.infrastructure import SQLAlchemyRepository, SQLAlchemySession, UnitOfWork
from fastapi_building_blocks.testing import assert_connections_sound
from tests.faults.databases import name_of

ANOMALIES = ("G0", "G1a", "G1b", "G1c", "OTV", "PMP", "P4", "G-single", "G2-item", "G2")
# ✓ prevented, — allowed, R/O prevented for reads, while a write may meet it.
PUBLISHED = """
postgresql  READ COMMITTED    ✓ ✓ ✓ ✓ ✓ —   — —   — —
postgresql  REPEATABLE READ   ✓ ✓ ✓ ✓ ✓ ✓   ✓ ✓   — —
postgresql  SERIALIZABLE      ✓ ✓ ✓ ✓ ✓ ✓   ✓ ✓   ✓ ✓
mysql       READ UNCOMMITTED  ✓ — — — — —   — —   — —
mysql       READ COMMITTED    ✓ ✓ ✓ ✓ ✓ —   — —   — —
mysql       REPEATABLE READ   ✓ ✓ ✓ ✓ ✓ R/O — R/O — —
mysql       SERIALIZABLE      ✓ ✓ ✓ ✓ ✓ ✓   ✓ ✓   ✓ ✓
"""
BEYOND = """
mysql       SNAPSHOT          ✓ ✓ ✓ ✓ ✓ ✓   ✓ ✓   — —
sqlite      SERIALIZABLE      ✓ ✓ ✓ ✓ ✓ ✓   ✓ ✓   ✓ ✓
"""


def _expected(*tables: str) -> dict[str, dict[str, dict[str, str]]]:
    """Return the verdicts by database, level and anomaly."""
    rows: dict[str, dict[str, dict[str, str]]] = {}
    for line in "".join(tables).split("\n"):
        if words := line.split():
            level = " ".join(words[1 : -len(ANOMALIES)])
            rows.setdefault(words[0], {})[level] = dict(zip(ANOMALIES, words[-len(ANOMALIES) :], strict=True))
    return rows


EXPECTED = _expected(PUBLISHED, BEYOND)

metadata = sa.MetaData()


@dataclasses.dataclass
class Row:
    id: int
    value: int


class Rows(SQLAlchemyRepository[Row]):
    table = sa.Table(
        "t10_test",
        metadata,
        sa.Column("id", sa.Integer(), primary_key=True, autoincrement=False),
        sa.Column("value", sa.Integer(), nullable=False),
    )


class RollBack(Exception):
    pass


Step = Callable[[UnitOfWork], Awaitable[Any]]


class Actor:
    """One transaction, whose steps run in their order; a step that the database blocks holds up its own only."""

    def __init__(self, stage: "Stage") -> None:
        self._stage = stage
        self._steps: asyncio.Queue[tuple[Step, asyncio.Future[Any]] | None] = asyncio.Queue()
        self._end: type[Exception] | None = None
        self.committed = False
        self.thread = 0
        self.task = asyncio.create_task(self._play())

    async def does(self, step: Step) -> "asyncio.Future[Any]":
        """Have the step done; return when it is, or when the database makes it wait. Its future has the answer."""
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        await self._steps.put((step, answer))
        await self._stage.settled(self, answer)
        return answer

    async def reads(self, *criteria: Any) -> "asyncio.Future[dict[int, int]]":
        return await self.does(lambda unit: _read(unit, *criteria))

    async def sets(self, number: int, value: int) -> None:
        await self.does(lambda unit: Rows(unit).update_where({"value": value}, field("id") == number))

    async def commits(self) -> None:
        await self._finish(None)

    async def rolls_back(self) -> None:
        await self._finish(RollBack)

    async def _finish(self, end: type[Exception] | None) -> None:
        self._end = end
        await self._steps.put(None)
        await self._stage.settled(self, self.task)

    async def _play(self) -> None:
        stage = self._stage
        with suppress(TransientError, RollBack):
            async with stage.session.transaction(isolation=stage.isolation) as unit:
                while (turn := await self._steps.get()) is not None:
                    step, answer = turn
                    if not self.thread:
                        self.thread = await stage.prepare(unit)
                    answer.set_result(await step(unit))
                if self._end is not None:
                    raise self._end
            self.committed = True

    def saw(self, answer: "asyncio.Future[Any]") -> Any:
        """Return what the step answered, if the transaction has committed; what an aborted one has seen is void."""
        return answer.result() if self.committed else None


async def _read(unit: UnitOfWork, *criteria: Any) -> dict[int, int]:
    return {row.id: row.value for row in await Rows(unit).get_all(*criteria, sort="id")}


class Stage:
    """A database with two rows, on which actors play one anomaly after the other."""

    def __init__(self, session: SQLAlchemySession, level: str) -> None:
        self.session = session
        self.isolation = "REPEATABLE READ" if level == "SNAPSHOT" else level
        self._snapshot = level == "SNAPSHOT"
        self._waiting: set[int] = set()
        self._looks = self._looks_begun = 0

    async def prepare(self, unit: UnitOfWork) -> int:
        """Set what the level needs beside its name, and return the connection's number on the server."""
        if self.session.dialect_name == "sqlite":
            return 1
        if self.session.dialect_name == "postgresql":
            return int((await unit.execute(sa.text("SELECT pg_backend_pid()"))).scalar_one())
        if (await unit.execute(sa.text("SHOW VARIABLES LIKE 'innodb_snapshot_isolation'"))).first() is not None:
            await unit.execute(sa.text(f"SET SESSION innodb_snapshot_isolation = {int(self._snapshot)}"))
        return int((await unit.execute(sa.text("SELECT CONNECTION_ID()"))).scalar_one())

    async def settled(self, actor: Actor, end: "asyncio.Future[Any]") -> None:
        """Return once a step has ended, or its transaction, or the server has said since then that it waits."""
        begun = self._looks_begun
        while not (end.done() or actor.task.done() or (self._looks > begun and actor.thread in self._waiting)):
            await asyncio.wait({end, actor.task}, timeout=0.01, return_when=asyncio.FIRST_COMPLETED)
        if actor.task.done():
            await actor.task

    @asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        """Ask the server all the while which transactions wait for a lock."""
        watcher = asyncio.create_task(self._watch())
        try:
            yield
        finally:
            watcher.cancel()
            await asyncio.wait([watcher])

    async def _watch(self) -> None:
        if self.session.dialect_name == "sqlite":
            self._waiting = {0, 1}  # all but the first to begin wait, and nobody says so
            while True:
                self._looks_begun += 1
                await asyncio.sleep(0.02)
                self._looks = self._looks_begun
        postgresql = self.session.dialect_name == "postgresql"
        query = sa.text(
            "SELECT pid FROM pg_locks WHERE NOT granted"
            if postgresql
            else "SELECT trx_mysql_thread_id FROM information_schema.innodb_trx WHERE trx_state = 'LOCK WAIT'"
        )
        # InnoDB shows the same again to whoever asks more often than every 0.1 s.
        pause = 0.02 if postgresql else 0.11
        engine = create_async_engine(self.session.engine.url, poolclass=NullPool, isolation_level="AUTOCOMMIT")
        try:
            async with engine.connect() as connection:
                while True:
                    self._looks_begun += 1
                    self._waiting = {row[0] for row in await connection.execute(query)}
                    self._looks = self._looks_begun
                    await asyncio.sleep(pause)
        finally:
            await engine.dispose()

    async def plays(self, anomaly: Callable[..., Awaitable[bool]], actors: int) -> bool:
        """Return whether the anomaly has come about."""
        await Rows(self.session).delete_where(everything=True)
        await Rows(self.session).add_many([Row(1, 10), Row(2, 20)])
        return await anomaly(self, *[Actor(self) for _ in range(actors)])

    async def ended(self, *actors: Actor) -> dict[int, int]:
        """Let all transactions end, and return the rows that are left."""
        async with asyncio.timeout(20):
            await asyncio.gather(*[actor.task for actor in actors])
        return {row.id: row.value for row in await Rows(self.session).get_all()}


# Each answers whether the anomaly was seen: by transactions that have committed, since what others saw is void.

VALUE = Rows.table.c.value
BY_THREE = VALUE % 3 == 0


async def write_cycle(stage: Stage, one: Actor, two: Actor) -> bool:
    await one.sets(1, 11)
    await two.sets(1, 12)
    await one.sets(2, 21)
    await one.commits()
    await two.sets(2, 22)
    await two.commits()
    return await stage.ended(one, two) not in ({1: 11, 2: 21}, {1: 12, 2: 22})


async def aborted_read(stage: Stage, one: Actor, two: Actor) -> bool:
    await one.sets(1, 101)
    reads = [await two.reads()]
    await one.rolls_back()
    reads.append(await two.reads())
    await two.commits()
    await stage.ended(one, two)
    return two.committed and any(read.result()[1] == 101 for read in reads)


async def intermediate_read(stage: Stage, one: Actor, two: Actor) -> bool:
    await one.sets(1, 101)
    reads = [await two.reads()]
    await one.sets(1, 11)
    await one.commits()
    reads.append(await two.reads())
    await two.commits()
    await stage.ended(one, two)
    return two.committed and any(read.result()[1] == 101 for read in reads)


async def circular_information_flow(stage: Stage, one: Actor, two: Actor) -> bool:
    await one.sets(1, 11)
    await two.sets(2, 22)
    of_two = await one.reads(field("id") == 2)
    of_one = await two.reads(field("id") == 1)
    await one.commits()
    await two.commits()
    await stage.ended(one, two)
    return one.saw(of_two) == {2: 22} and two.saw(of_one) == {1: 11}


async def observed_transaction_vanishes(stage: Stage, one: Actor, two: Actor, three: Actor) -> bool:
    await one.sets(1, 11)
    await one.sets(2, 19)
    await two.sets(1, 12)
    await one.commits()
    reads = [await three.reads()]
    await two.sets(2, 18)
    reads.append(await three.reads())
    await two.commits()
    reads.append(await three.reads())
    await three.commits()
    await stage.ended(one, two, three)
    in_order = [{1: 10, 2: 20}, {1: 11, 2: 19}, {1: 12, 2: 18}]
    if not three.committed:
        return False
    seen = [read.result() for read in reads]
    return any(read not in in_order for read in seen) or seen != sorted(seen, key=in_order.index)


async def predicate_many_preceders(stage: Stage, one: Actor, two: Actor) -> bool:
    before = await one.reads(VALUE == 30)
    await two.does(lambda unit: Rows(unit).add(Row(3, 30)))
    await two.commits()
    after = await one.reads(BY_THREE)
    await one.commits()
    await stage.ended(one, two)
    return one.saw(before) == {} and one.saw(after) == {3: 30}


async def predicate_many_preceders_of_a_write(stage: Stage, one: Actor, two: Actor) -> bool:
    await one.does(lambda unit: unit.execute(sa.update(Rows.table).values(value=VALUE + 10)))
    before = await two.reads(VALUE == 20)
    await two.does(lambda unit: Rows(unit).delete_where(field("value") == 20))
    await one.commits()
    after = await two.reads(VALUE == 20)
    await two.commits()
    left = await stage.ended(one, two)
    # What was found and what was deleted by the same condition are not the same rows.
    return two.committed and (bool(after.result()) or set(before.result()) & set(left) != set())


async def lost_update(stage: Stage, one: Actor, two: Actor) -> bool:
    of_one = await one.reads(field("id") == 1)
    of_two = await two.reads(field("id") == 1)
    await one.sets(1, 11)
    await two.sets(1, 12)
    await one.commits()
    await two.commits()
    await stage.ended(one, two)
    return one.saw(of_one) == two.saw(of_two) == {1: 10}


async def read_skew(stage: Stage, one: Actor, two: Actor) -> bool:
    first = await one.reads(field("id") == 1)
    await two.reads()
    await two.sets(1, 12)
    await two.sets(2, 18)
    await two.commits()
    second = await one.reads(field("id") == 2)
    await one.commits()
    await stage.ended(one, two)
    return one.saw(first) == {1: 10} and one.saw(second) == {2: 18}


async def read_skew_by_predicate(stage: Stage, one: Actor, two: Actor) -> bool:
    await one.reads(VALUE % 5 == 0)
    await two.does(lambda unit: Rows(unit).update_where({"value": 12}, field("value") == 10))
    await two.commits()
    after = await one.reads(BY_THREE)
    await one.commits()
    await stage.ended(one, two)
    return bool(one.saw(after))


async def read_skew_of_a_write(stage: Stage, one: Actor, two: Actor) -> bool:
    first = await one.reads(field("id") == 1)
    await two.reads()
    await two.sets(1, 12)
    await two.sets(2, 18)
    await two.commits()
    deleted = await one.does(lambda unit: Rows(unit).delete_where(field("value") == 20))
    await one.commits()
    await stage.ended(one, two)
    return one.saw(first) == {1: 10} and one.saw(deleted) == 0


async def write_skew(stage: Stage, one: Actor, two: Actor) -> bool:
    of_one = await one.reads(field("id").is_in([1, 2]))
    of_two = await two.reads(field("id").is_in([1, 2]))
    await one.sets(1, 11)
    await two.sets(2, 21)
    await one.commits()
    await two.commits()
    await stage.ended(one, two)
    return one.saw(of_one) == two.saw(of_two) == {1: 10, 2: 20}


async def write_skew_by_predicate(stage: Stage, one: Actor, two: Actor) -> bool:
    of_one = await one.reads(BY_THREE)
    of_two = await two.reads(BY_THREE)
    await one.does(lambda unit: Rows(unit).add(Row(3, 30)))
    await two.does(lambda unit: Rows(unit).add(Row(4, 42)))
    await one.commits()
    await two.commits()
    await stage.ended(one, two)
    return one.saw(of_one) == two.saw(of_two) == {}


async def two_edges(stage: Stage, one: Actor, two: Actor, three: Actor) -> bool:
    """The read-only anomaly of Fekete, O'Neil and O'Neil."""
    of_one = await one.reads()
    await two.does(lambda unit: unit.execute(sa.update(Rows.table).where(Rows.table.c.id == 2).values(value=VALUE + 5)))
    await two.commits()
    of_three = await three.reads()
    await three.commits()
    await one.sets(1, 0)
    await one.commits()
    await stage.ended(one, two, three)
    return two.committed and one.saw(of_one) == {1: 10, 2: 20} and three.saw(of_three) == {1: 10, 2: 25}


# Of each anomaly, what shows it to reads, and what shows it to writes only; and how many transactions that takes.
SCRIPTS: dict[str, list[tuple[Callable[..., Awaitable[bool]], int, bool]]] = {
    "G0": [(write_cycle, 2, False)],
    "G1a": [(aborted_read, 2, False)],
    "G1b": [(intermediate_read, 2, False)],
    "G1c": [(circular_information_flow, 2, False)],
    "OTV": [(observed_transaction_vanishes, 3, False)],
    "PMP": [(predicate_many_preceders, 2, False), (predicate_many_preceders_of_a_write, 2, True)],
    "P4": [(lost_update, 2, False)],
    "G-single": [
        (read_skew, 2, False),
        (read_skew_by_predicate, 2, False),
        (read_skew_of_a_write, 2, True),
    ],
    "G2-item": [(write_skew, 2, False)],
    "G2": [(write_skew_by_predicate, 2, False), (two_edges, 3, False)],
}


async def test_t10_hermitages_anomalies_are_prevented_or_allowed_as_published(
    database_url: str, effort: Callable[[int, int], int], shown: Callable[..., None]
) -> None:
    rounds, every_level = effort(1, 3), effort(0, 1)
    all_differing = {}
    async with SQLAlchemySession(database_url, pool_size=4, max_overflow=0) as session:
        await session.create_tables(metadata)
        for level, expected in EXPECTED[session.dialect_name].items():
            if not every_level and level not in (session.dialect.default_isolation, "SERIALIZABLE"):
                continue
            if level == "SNAPSHOT" and not await _has_snapshots(session):
                continue
            found = await _play_all(Stage(session, level), rounds)
            differing = {anomaly: verdicts for anomaly, verdicts in found.items() if verdicts != {expected[anomaly]}}
            prevented, for_reads = (
                " ".join(anomaly for anomaly, verdicts in found.items() if verdicts == {verdict}) or "none"
                for verdict in ("✓", "R/O")
            )
            shown(
                "T10",
                f"Hermitage's 10 anomalies at {level}: {name_of(database_url)}",
                rounds=rounds,
                prevented=prevented,
                for_reads_only=for_reads,
                not_as_published=differing or "none",
            )
            all_differing.update({(level, anomaly): verdicts for anomaly, verdicts in differing.items()})
        await assert_connections_sound(session, within=5)
    assert not all_differing


async def _play_all(stage: Stage, rounds: int) -> dict[str, set[str]]:
    """Return for each anomaly what came of it."""
    found: dict[str, set[str]] = {anomaly: set() for anomaly in ANOMALIES}
    async with stage.watched():
        for _ in range(rounds):
            for anomaly, scripts in SCRIPTS.items():
                seen = [(writes, await stage.plays(script, actors)) for script, actors, writes in scripts]
                found[anomaly].add(_verdict(seen))
    return found


def _verdict(seen: list[tuple[bool, bool]]) -> str:
    if any(occurred for writes, occurred in seen if not writes):
        return "—"
    return "R/O" if any(occurred for _, occurred in seen) else "✓"


async def _has_snapshots(session: SQLAlchemySession) -> bool:
    found = await session.execute(sa.text("SHOW VARIABLES LIKE 'innodb_snapshot_isolation'"))
    return found.first() is not None
