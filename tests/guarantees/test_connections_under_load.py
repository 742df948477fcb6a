"""T4 and P7 under load: what the server sees of the pool."""

import asyncio
import itertools
import random
import threading
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import aiomysql
import asyncpg
import pytest
import sqlalchemy as sa
from sqlalchemy import make_url

from fastapi_building_blocks.domain import PageRequest, TransientError
from fastapi_building_blocks.infrastructure import SQLAlchemySession, UnitOfWork
from tests.backends import Backends, str_of
from tests.guarantees.ledger import Accounts, account, opened
from tests.guarantees.mixed_work import BULK, Items, MixedWork, items, loaded
from tests.server_view import connections, until

on_every_path = pytest.mark.parametrize(
    ("database_url", "portable"),
    [("postgres", False), ("postgres", True), ("mysql", False), ("mysql", True), ("asyncmy", False)],
    ids=["postgres", "postgres-portable", "mysql", "mysql-portable", "asyncmy"],
    indirect=["database_url"],
)


@pytest.fixture(params=["sqlite", "postgres", "mysql", "asyncmy"])
def database_url(request: pytest.FixtureRequest, backends: Backends, sqlite_url: str) -> Iterator[str]:
    """An empty database of this test alone, on each database by each of its drivers."""
    with backends.database_by_driver(request.param, sqlite_url) as url:
        yield url


# Server connections


@asynccontextmanager
async def observer(url: str) -> AsyncIterator[Callable[[], Awaitable[int]]]:
    """Yield what counts the server's connections to the database of ``url``, on one connection of its own."""
    place = make_url(url)
    if place.get_backend_name() == "postgresql":
        connection = await asyncpg.connect(str_of(place.set(drivername="postgresql", database="postgres")))
        statement = "SELECT count(*) FROM pg_stat_activity WHERE datname = $1 AND backend_type = 'client backend'"

        async def count() -> int:
            return int(await connection.fetchval(statement, place.database))

        try:
            yield count
        finally:
            await connection.close()
    else:
        connection = await aiomysql.connect(
            host=place.host, port=place.port or 3306, user=place.username, password=place.password or ""
        )

        async def count() -> int:
            # SHOW PROCESSLIST would bring other tests' statements along, cut in the middle of a character.
            cursor = await connection.cursor()
            await cursor.execute("SELECT COUNT(*) FROM information_schema.processlist WHERE db = %s", (place.database,))
            return int((await cursor.fetchone())[0])

        try:
            yield count
        finally:
            await connection.ensure_closed()


@contextmanager
def observed(url: str) -> Iterator[Counter[int]]:
    """Count the server's connections all the while, in a thread; yield how often each number was seen."""
    seen: Counter[int] = Counter()
    stop = threading.Event()

    async def watch() -> None:
        async with observer(url) as count:
            while not stop.is_set():
                seen[await count()] += 1
                await asyncio.sleep(0.001)

    thread = threading.Thread(target=lambda: asyncio.run(watch()))
    thread.start()
    try:
        yield seen
    finally:
        stop.set()
        thread.join()


@on_every_path
async def test_the_server_never_sees_more_than_pool_size_and_overflow(database_url: str, portable: bool) -> None:
    chance = random.Random(11)
    async with loaded(database_url, pool_size=3, max_overflow=3, portable=portable) as session:
        mixed = MixedWork(session, 11, bulk=0.02)
        cancelled = 0

        async def work() -> None:
            nonlocal cancelled
            for _ in range(2):
                task = asyncio.create_task(mixed.once())
                if chance.random() < 0.5:
                    await until(lambda: session.pool_status().waiting < 150)
                    await asyncio.sleep(chance.random() / 10)
                    task.cancel()
                await asyncio.wait([task])
                cancelled += task.cancelled()
                if not task.cancelled():
                    task.result()

        with observed(database_url) as seen:
            await asyncio.gather(*[work() for _ in range(200)])
            await until(lambda: session.pool_status().checked_out == 0)
        assert max(seen) == 6, f"connections seen, and how often: {sorted(seen.items())}"
        assert seen.total() > 50, "the observer looked all the while"
        assert cancelled > 50


@pytest.mark.parametrize("free", [1, 0], ids=["one is free", "none is free"])
@on_every_path
async def test_a_cancelled_statement_that_the_server_still_runs_costs_no_connection(
    database_url: str, portable: bool, free: int
) -> None:
    slow = sa.text("SELECT pg_sleep(20)" if "postgres" in database_url else "SELECT SLEEP(20)")
    async with loaded(database_url, pool_size=2, max_overflow=2, portable=portable) as session:

        async def through_the_engine() -> None:
            async with session.engine.connect() as connection:
                await connection.execute(slow)

        async def in_a_unit() -> None:
            async with session.transaction() as unit:
                await unit.execute(slow)

        if free:
            session.observe(lambda _event: None)  # what ends the others' statements is observed as well
        with observed(database_url) as seen:
            for _ in range(3):
                calls = (through_the_engine, in_a_unit, in_a_unit, through_the_engine)
                tasks = [asyncio.create_task(call()) for call in calls[free:]]
                await asyncio.sleep(0.05)
                for task in tasks:
                    task.cancel()
                await asyncio.wait(tasks)
                # A KILL takes MariaDB up to two seconds, where others ask for its processes just then, as is done here.
                async with asyncio.timeout(10):
                    found = await asyncio.gather(*[Accounts(session).get(number) for number in range(10)])
                    assert [one.id for one in found] == list(range(10))
                    await until(lambda: session.pool_status().checked_out == 0)
        # MySQL needs one connection to end what the others do.
        most = 4 if free or "postgres" in database_url else 5
        assert max(seen) <= most, f"connections seen, and how often: {sorted(seen.items())}"
        assert session.pool_status().idle <= 4


@pytest.mark.parametrize("database_url", ["mysql", "asyncmy"], indirect=True)
async def test_whoever_holds_a_connection_for_long_does_not_keep_the_others_waiting_for_a_cancelled_statement(
    database_url: str,
) -> None:
    async with opened(database_url, pool_size=2, max_overflow=0, pool_timeout=4) as session:
        await Accounts(session).add(account(1))
        async with session.transaction() as unit:
            await unit.execute(sa.text("SELECT 1"))
            task = asyncio.create_task(session.execute(sa.text("SELECT SLEEP(20)")))
            await asyncio.sleep(0.2)
            task.cancel()
            await asyncio.wait([task])
            assert (await Accounts(session).get(1)).id == 1
            await until(lambda: len(connections(database_url)) == 2)


# ALTER TABLE

TYPE_CHANGE = {
    "postgresql": (
        "ALTER TABLE accounts ALTER COLUMN owner TYPE text",
        "ALTER TABLE accounts ALTER COLUMN owner TYPE varchar(100)",
    ),
    "mysql": (
        "ALTER TABLE accounts MODIFY COLUMN owner LONGTEXT",
        "ALTER TABLE accounts MODIFY COLUMN owner VARCHAR(100)",
    ),
}
COLUMN = ("ALTER TABLE accounts ADD COLUMN extra INTEGER", "ALTER TABLE accounts DROP COLUMN extra")


async def _streamed(session: SQLAlchemySession) -> list[int]:
    return [row.id async for row in session.stream(sa.text("SELECT * FROM accounts ORDER BY id"))]


CALLS: dict[str, Callable[[Any], Awaitable[Any]]] = {
    "get": lambda session: Accounts(session).get(3),
    "page": lambda session: Accounts(session).paginate(PageRequest(limit=5), sort="id"),
    "get_many": lambda session: Accounts(session).get_many([3, 4]),
    "stream": lambda session: _collected(Accounts(session).stream(sort="id")),
    "patch": lambda session: Accounts(session).patch(1, {"owner": "x"}),
    "upsert": lambda session: Accounts(session).upsert(account(2, 2)),
    "upsert_many": lambda session: Accounts(session).upsert_many([account(2, 2), account(5, 5)]),
    "update_many": lambda session: Accounts(session).update_many([account(2, 2), account(5, 5)]),
    "execute": lambda session: session.execute(sa.text("SELECT * FROM accounts WHERE id = 3")),
    "execute many": lambda session: session.execute(
        sa.text("UPDATE accounts SET owner = :owner WHERE id = :id"), [{"owner": "x", "id": 6}, {"owner": "y", "id": 7}]
    ),
    "stream of rows": _streamed,
}


def calls_during(changes: tuple[str, str]) -> dict[str, Callable[[Any], Awaitable[Any]]]:
    # In a transaction of its own, upsert_many has every column returned: what a change of type makes stale there, its
    # caller has to replay.
    return CALLS if changes is COLUMN else {name: call for name, call in CALLS.items() if name != "upsert_many"}


async def _collected(stream: AsyncIterator[Any]) -> list[Any]:
    return [one async for one in stream]


@on_every_path
async def test_p7_a_statement_prepared_before_alter_table_is_replayed(database_url: str, portable: bool) -> None:
    async with (
        loaded(database_url, pool_size=1, max_overflow=0, portable=portable) as session,
        opened(database_url, pool_size=1) as other,
    ):
        for changes in (COLUMN, TYPE_CHANGE[session.dialect_name]):
            for name, call in calls_during(changes).items():
                for change in changes:
                    await call(session)
                    await other.execute(sa.text(change))
                    try:
                        await call(session)
                    except Exception as error:
                        raise AssertionError(f"{name} after {change}") from error
                    async with session.transaction() as unit:
                        await call(unit)
                await until(lambda: session.pool_status().checked_out == 0)


@on_every_path
async def test_p7_within_a_transaction_it_is_an_error_that_run_replays(database_url: str, portable: bool) -> None:
    async with (
        loaded(database_url, pool_size=1, max_overflow=0, portable=portable) as session,
        opened(database_url, pool_size=1) as other,
    ):
        failed = set()
        for changes in (COLUMN, TYPE_CHANGE[session.dialect_name]):
            for name, call in calls_during(changes).items():
                await call(session)
                await other.execute(sa.text(changes[0]))
                try:
                    async with session.transaction() as unit:
                        await call(unit)
                except TransientError:
                    failed.add(name)
                async with session.transaction() as unit:
                    await call(unit)
                await other.execute(sa.text(changes[1]))
                attempts = 0

                async def work(unit: UnitOfWork, call: Any = call) -> None:
                    nonlocal attempts
                    attempts += 1
                    await Items(unit).count()  # the transaction's snapshot is older than the change
                    if attempts == 1:
                        await other.execute(sa.text(changes[0]))  # noqa: B023
                    await call(unit)

                await session.run(work)
                await other.execute(sa.text(changes[1]))
        if session.dialect_name == "postgresql":
            assert {"execute", "stream of rows"} <= failed, "the plan was stale"


@on_every_path
async def test_alter_table_under_load_is_no_error_outside_a_transaction(database_url: str, portable: bool) -> None:
    async with (
        loaded(database_url, pool_size=4, max_overflow=4, portable=portable) as session,
        opened(database_url, pool_size=1) as other,
    ):
        altered = asyncio.Event()
        calls: Counter[str] = Counter()

        async def use(name: str, call: Any) -> None:
            while not altered.is_set():
                await call(session)
                calls[name] += 1

        async def unit_of_work(unit: UnitOfWork) -> None:
            await Items(unit).count()
            await unit.execute(sa.text("SELECT * FROM accounts"))
            await Accounts(unit).patch(8, {"owner": "z"})

        for changes in (COLUMN, TYPE_CHANGE[session.dialect_name]):
            altered.clear()
            users = [asyncio.create_task(use(name, call)) for name, call in calls_during(changes).items()]
            users.append(asyncio.create_task(use("unit", lambda session: session.run(unit_of_work, attempts=10))))
            for change in changes * 4:
                await asyncio.sleep(0.04)
                await other.run(lambda unit, change=change: unit.execute(sa.text(change)), attempts=20)
            altered.set()
            await asyncio.gather(*users)
        assert set(calls) == {*CALLS, "unit"}
        await until(lambda: session.pool_status().checked_out == 0)


# Bulk writes


class LeaveTheBlock(Exception):
    pass


@pytest.mark.parametrize("first", [True, False], ids=["first statement", "after another one"])
async def test_t4_bulk_rows_are_undone_with_the_unit(database_url: str, first: bool) -> None:
    async with loaded(database_url, pool_size=1, max_overflow=0) as session:
        with pytest.raises(LeaveTheBlock):
            async with session.transaction() as unit:
                if not first:
                    await Accounts(unit).get(3)
                assert await Items(unit).add_many(itertools.chain(items(0), items(1), items(2))) == 3 * BULK
                assert await Items(unit).count() == 3 * BULK
                raise LeaveTheBlock
        assert await Items(session).count() == 0
        async with session.transaction() as unit:
            await Items(unit).add_many(items(0))
            await unit.rollback()
        assert await Items(session).count() == 0
        async with session.transaction() as unit:
            await Items(unit).add_many(items(0))
        assert await Items(session).count() == BULK
