"""T3, T4, T8 and T9 by chance and in numbers: savepoints, foreign transactions, two tasks on one unit, hooks."""

import asyncio
import dataclasses
import itertools
import logging
import random
from collections import Counter
from collections.abc import Callable
from typing import Annotated, Any

import httpx2
import pytest
import sqlalchemy as sa
from fastapi import Depends, FastAPI

from fastapi_building_blocks.api import install_problem_details, unit_of_work
from fastapi_building_blocks.domain import DuplicateKeyError, field
from fastapi_building_blocks.infrastructure import UnitOfWork
from fastapi_building_blocks.testing import assert_connections_sound, storm
from tests.api.serving import serving
from tests.faults.databases import name_of, on_every_driver
from tests.guarantees.ledger import Accounts, account, accounts, opened


class LeaveTheBlock(Exception):
    pass


# T3


class _Programs:
    """Units of random writes, savepoints within savepoints, and, where that is transactional, tables made in them."""

    def __init__(self, seed: str, *, ddl: bool) -> None:
        self._chance = random.Random(seed)
        self._ddl = ddl
        self._numbers = itertools.count(1)
        self.savepoints = 0

    async def run(self, unit: UnitOfWork, rows: set[int], tables: set[str], depth: int = 0) -> None:
        """Run a program, and do in ``rows`` and ``tables`` what it should do."""
        for _ in range(self._chance.randint(1, 4)):
            kind = self._chance.choice(("add", "add", "remove", "nest", "nest", "collide", "table"))
            if kind == "add":
                rows.add(number := next(self._numbers))
                await Accounts(unit).add(account(number))
            elif kind == "remove" and rows:
                rows.remove(number := self._chance.choice(sorted(rows)))
                await Accounts(unit).delete(number)
            elif kind == "collide" and rows:
                with pytest.raises(DuplicateKeyError):
                    async with unit.savepoint():
                        await Accounts(unit).add(account(next(self._numbers)))
                        await Accounts(unit).add(account(min(rows)))
            elif kind == "table" and self._ddl:
                tables.add(name := f"t3_{next(self._numbers)}")
                await unit.execute(sa.text(f"CREATE TABLE {name} (id INTEGER)"))
            elif kind == "nest" and depth < 4:
                self.savepoints += 1
                await self._nest(unit, rows, tables, depth + 1)

    async def _nest(self, unit: UnitOfWork, rows: set[int], tables: set[str], depth: int) -> None:
        inner_rows, inner_tables = set(rows), set(tables)
        if self._chance.random() < 0.5:
            async with unit.savepoint():
                await self.run(unit, inner_rows, inner_tables, depth)
            rows.clear()
            rows |= inner_rows
            tables |= inner_tables
        else:
            with pytest.raises(LeaveTheBlock):
                async with UnitOfWork(unit) as inner:
                    await self.run(inner, inner_rows, inner_tables, depth)
                    raise LeaveTheBlock


async def test_t3_savepoints_within_savepoints_keep_what_was_released_and_undo_the_rest(
    database_url: str, effort: Callable[[int, int], int], shown: Callable[..., None]
) -> None:
    tries, wrong = effort(10, 300), 0
    async with opened(database_url, pool_size=2, max_overflow=0) as session:
        # MySQL and MariaDB commit at every CREATE TABLE.
        programs = _Programs(name_of(database_url), ddl=session.dialect_name != "mysql")
        rows: set[int] = set()
        tables: set[str] = set()
        for number in range(tries):
            new_rows, new_tables = set(rows), set(tables)
            async with session.transaction() as unit:
                await programs.run(unit, new_rows, new_tables)
                inside = {one.id for one in await Accounts(unit).get_all()}
                if number % 2:
                    await unit.rollback()
            wrong += inside != new_rows
            if not number % 2:
                rows, tables = new_rows, new_tables
            wrong += {one.id for one in await Accounts(session).get_all()} != rows
        async with session.engine.connect() as connection:
            names = await connection.run_sync(lambda sync: sa.inspect(sync).get_table_names())
        await assert_connections_sound(session)
    shown(
        "T3",
        f"random units with savepoints: {name_of(database_url)}",
        units=tries,
        savepoints=programs.savepoints,
        tables_made=len(tables),
        wrong=wrong,
    )
    assert wrong == 0
    assert {name for name in names if name.startswith("t3_")} == tables


# T4

WRITES: dict[str, Callable[[Accounts, int], Any]] = {
    "add": lambda inside, number: inside.add(account(number)),
    "add_many": lambda inside, number: inside.add_many([account(number + place) for place in range(50)]),
    "upsert": lambda inside, number: inside.upsert(account(number)),
    "upsert_many": lambda inside, number: inside.upsert_many([account(number + place) for place in range(50)]),
    "get_or_add": lambda inside, number: inside.get_or_add(account(number), on=["number"]),
    "core": lambda inside, number: inside._session.execute(
        accounts.insert(), [{"id": number + place, "number": f"A{number + place}", "balance": 0} for place in range(3)]
    ),
}


async def test_t4_whatever_a_unit_begins_with_nobody_sees_it_before_the_commit_and_nobody_after_a_rollback(
    database_url: str, effort: Callable[[int, int], int], shown: Callable[..., None]
) -> None:
    tries, seen = effort(12, 600), 0
    chance = random.Random(4)
    async with opened(database_url, pool_size=4, max_overflow=0, pool_timeout=60) as session:
        numbers = itertools.count(100, 100)

        async def unit_of_work() -> None:
            nonlocal seen
            number = next(numbers)
            write = WRITES[chance.choice(list(WRITES))]
            with pytest.raises(LeaveTheBlock):
                async with session.transaction() as unit:
                    await write(Accounts(unit), number)
                    seen += await Accounts(session).count(field("id").between(number, number + 99))
                    assert await Accounts(unit).count(field("id").between(number, number + 99))
                    raise LeaveTheBlock

        for _ in range(0, tries, 2):
            await asyncio.gather(unit_of_work(), unit_of_work())
        kept = await Accounts(session).count()
        await assert_connections_sound(session)
    shown(
        "T4",
        f"units that begin with any write, and roll back: {name_of(database_url)}",
        units=tries,
        seen_by_others=seen,
        rows_kept=kept,
    )
    assert (seen, kept) == (0, 0)


# T8


async def test_t8_of_tasks_at_once_on_a_unit_one_is_served_and_the_others_are_told_why(
    database_url: str, effort: Callable[[int, int], int], shown: Callable[..., None]
) -> None:
    tries, outcomes = effort(10, 200), Counter[str]()
    async with opened(database_url, pool_size=2, max_overflow=0) as session:
        calls: list[Callable[[UnitOfWork, int], Any]] = [
            lambda unit, number: Accounts(unit).add(account(number)),
            lambda unit, number: Accounts(unit).add_many([account(number), account(-number)]),
            lambda unit, number: Accounts(unit).count(),
            lambda unit, number: unit.execute(sa.text("SELECT 1")),
            lambda unit, number: anext(Accounts(unit).stream(batch_size=1), None),
            lambda unit, number: unit.rollback(),
        ]
        chance = random.Random(8)
        for first in range(1000, 1000 + tries * 10, 10):
            async with session.transaction() as unit:
                await Accounts(unit).add(account(first))
                answers = await asyncio.gather(
                    Accounts(unit).add(account(first + 1)),
                    *[chance.choice(calls)(unit, first + place) for place in range(2, 6)],
                    return_exceptions=True,
                )
                for answer in answers:
                    if not isinstance(answer, BaseException):
                        outcomes["served"] += 1
                    elif isinstance(answer, RuntimeError) and "one task at a time may use a transaction" in str(answer):
                        outcomes["told"] += 1
                    else:
                        outcomes[f"{type(answer).__name__}: {answer}"] += 1
                assert await Accounts(unit).count() >= 2, "the unit goes on"
            stored = {one.id for one in await Accounts(session).get_all(field("id").between(first, first + 9))}
            assert stored == {first, first + 1}
        await assert_connections_sound(session, within=5)
    told, served = outcomes.pop("told"), outcomes.pop("served")
    shown(
        "T8",
        f"five tasks at once on one unit: {name_of(database_url)}",
        tries=tries,
        served=served,
        told=told,
        other_errors=outcomes.total(),
    )
    assert (served, told) == (tries, 4 * tries)
    assert not outcomes


@pytest.mark.parametrize("in_memory", [False, True], ids=["", "in memory"])
async def test_t8_a_unit_that_ends_while_another_task_uses_it_keeps_nothing_of_either(
    database_url: str, in_memory: bool, effort: Callable[[int, int], int], shown: Callable[..., None]
) -> None:
    """What the other task still had to send is sent to nobody, neither on its own nor within another's transaction."""
    if in_memory:
        if "sqlite" not in database_url:
            pytest.skip("SQLite alone has databases in memory")
        database_url = "sqlite+aiosqlite:///:memory:"
    tries = effort(24, 600)
    late: list[Callable[[UnitOfWork, int], Any]] = [
        lambda unit, number: Accounts(unit).add(account(number)),
        lambda unit, number: Accounts(unit).add_many([account(number), account(number + 1), account(number + 2)]),
        lambda unit, number: Accounts(unit).add_many(account(number + place) for place in range(2500)),
        lambda unit, number: unit.execute(sa.insert(accounts).values(dataclasses.asdict(account(number)))),
    ]
    async with opened(database_url, pool_size=1, max_overflow=0) as session:
        for turn in range(tries):
            number = turn * 3000
            with pytest.raises(RuntimeError, match="ended while a statement or a stream was open; nothing was kept"):
                async with session.transaction() as unit:
                    if turn % 8 < 4:  # otherwise the other task begins the transaction
                        await Accounts(unit).add(account(number))
                    other = asyncio.create_task(late[turn % len(late)](unit, number + 1))
                    for _ in range(1 + turn % 3):
                        await asyncio.sleep(0)
                    assert not other.done()
            async with session.transaction() as unit:
                await Accounts(unit).add(account(-1 - number))
                await asyncio.wait([other])
            other.exception()
        kept = await Accounts(session).count(field("id") >= 0)
        of_the_next = await Accounts(session).count(field("id") < 0)
        await assert_connections_sound(session, within=5)
    shown(
        "T8",
        f"a unit left while another task uses it: {name_of(database_url)}{', in memory' if in_memory else ''}",
        tries=tries,
        rows_kept=kept,
        of_the_next_unit_lost=tries - of_the_next,
    )
    assert (kept, of_the_next) == (0, tries)


# T9


@on_every_driver
async def test_t9_hooks_run_once_for_each_commit_and_never_without_one_whoever_is_cancelled(
    database_url: str, effort: Callable[[int, int], int], shown: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    calls = effort(60, 1200)
    ran: Counter[int] = Counter()
    unseen: set[int] = set()
    acknowledged: set[int] = set()
    failing = 0
    chance = random.Random(9)
    async with opened(database_url, pool_size=4, max_overflow=2, pool_timeout=60) as session:
        await Accounts(session).add(account(-1))

        async def call(number: int, how: str) -> None:
            nonlocal failing

            async def hook() -> None:
                ran[number] += 1
                if await Accounts(session).get_by_id(number) is None:
                    unseen.add(number)

            def broken() -> None:
                nonlocal failing
                failing += 1
                raise ZeroDivisionError

            async with session.transaction() as unit:
                await Accounts(unit).add(account(number))
                unit.on_commit(broken)
                unit.on_commit(hook)
                if how == "raise":
                    raise LeaveTheBlock
                if how == "roll back":
                    await unit.rollback()
                    return
                if how == "fail":
                    await Accounts(unit).add(account(-1))
            acknowledged.add(number)

        numbers = itertools.count()

        async def any_call(_: int) -> None:
            await call(next(numbers), chance.choices(("commit", "raise", "roll back", "fail"), (6, 1, 1, 1))[0])

        cancelled = 0
        with caplog.at_level(logging.CRITICAL):  # every unit has a hook that fails: not all of them are worth keeping
            for anyio in (False, True):
                report = await storm(any_call, calls // 2, longest_delay=0.04, concurrency=6, anyio=anyio)
                assert set(report.failed) <= {LeaveTheBlock, DuplicateKeyError}
                assert report.hung == 0
                cancelled += report.cancelled
            await assert_connections_sound(session, within=5)
            async with asyncio.timeout(5):  # a hook of a cancelled caller runs after the connection is back
                while ran.total() != failing:
                    await asyncio.sleep(0.01)
        stored = {one.id for one in await Accounts(session).get_all(field("id") >= 0)}
    shown(
        "T9",
        f"hooks under cancellation: {name_of(database_url)}",
        units=calls,
        cancelled=cancelled,
        commits=len(stored),
        hooks_missed=len(stored - ran.keys()),
        without_a_commit=len(ran.keys() - stored),
        twice=sum(count > 1 for count in ran.values()),
        failing_hooks=failing,
    )
    assert set(ran) == stored
    assert set(ran.values()) == {1}
    assert unseen == set(), "a hook sees what was committed"
    assert acknowledged <= stored


async def test_t9_a_failing_hook_is_logged_and_the_request_is_answered_as_committed(
    database_url: str, effort: Callable[[int, int], int], shown: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    tries = effort(3, 100)
    async with opened(database_url) as session:
        app = FastAPI()
        install_problem_details(app)

        async def broken() -> None:
            await asyncio.sleep(0)
            raise ZeroDivisionError

        @app.post("/accounts/{number}", status_code=201)
        async def add(
            number: int, unit: Annotated[UnitOfWork, Depends(unit_of_work(session), scope="function")]
        ) -> None:
            await Accounts(unit).add(account(number))
            unit.on_commit(broken)

        async with serving(app) as url, httpx2.AsyncClient(base_url=url) as client:
            statuses = Counter([(await client.post(f"/accounts/{number}")).status_code for number in range(tries)])
        stored = await Accounts(session).count()
    logged = sum(record.getMessage() == "an after-commit hook failed" for record in caplog.records)
    shown(
        "T9",
        f"requests whose hook fails: {name_of(database_url)}",
        requests=tries,
        answers_201=statuses[201],
        logged=logged,
        rows=stored,
    )
    assert (statuses[201], logged, stored) == (tries, tries, tries)
