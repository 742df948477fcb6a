"""P7: sessions behind PgBouncer in transaction mode, many more of their connections than it has to the server."""

import asyncio
import dataclasses
import enum
import itertools
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import asyncpg
import pytest
import sqlalchemy as sa
from sqlalchemy import make_url

from fastapi_building_blocks.domain import (
    ConnectionLostError,
    DuplicateKeyError,
    InvalidInputError,
    PageRequest,
    StatementTimeoutError,
    UnsupportedOperationError,
    field,
)
from fastapi_building_blocks.infrastructure import (
    BinaryString,
    DatabaseSettings,
    SQLAlchemyRepository,
    SQLAlchemySession,
    UtcDateTime,
)
from fastapi_building_blocks.infrastructure.database.migrations import upgrade
from fastapi_building_blocks.testing import (
    DatabaseServer,
    MissingServer,
    PgBouncerServer,
    PostgreSQLServer,
    StormReport,
    assert_connections_sound,
    storm,
)
from tests.backends import required_backends, run_apart, str_of
from tests.contracts.sample_entities import TicketContract
from tests.contracts.sample_entities import metadata as sample_metadata

SERVER_CONNECTIONS = 3
CLIENTS = 4
"""Sessions at once, each with up to six connections of its own."""
BULK = 300

Effort = Callable[[int, int], int]
Shown = Callable[..., None]

metadata = sa.MetaData()


class Mood(enum.Enum):
    FINE = "fine"
    BAD = "bad"


@dataclasses.dataclass
class Account:
    id: int
    number: str
    balance: int = 0
    owner: str | None = None
    mood: Mood = Mood.FINE
    seen_at: datetime = datetime(2026, 3, 4, 5, 6, 7, 89, tzinfo=UTC)


class Accounts(SQLAlchemyRepository[Account]):
    """With a type of PostgreSQL's own, which the driver has to look up on each connection."""

    table = sa.Table(
        "accounts",
        metadata,
        sa.Column("id", sa.BigInteger(), primary_key=True, autoincrement=False),
        sa.Column("number", BinaryString(40), nullable=False, unique=True),
        sa.Column("balance", sa.Integer(), nullable=False),
        sa.Column("owner", sa.String(100)),
        sa.Column("mood", sa.Enum(Mood), nullable=False),
        sa.Column("seen_at", UtcDateTime(), nullable=False),
    )


@dataclasses.dataclass
class Item:
    id: int
    batch: int


class Items(SQLAlchemyRepository[Item]):
    """Rows that are written by the hundred."""

    table = sa.Table(
        "items",
        metadata,
        sa.Column("id", sa.BigInteger(), primary_key=True, autoincrement=False),
        sa.Column("batch", sa.Integer(), nullable=False),
    )


def account(number: int) -> Account:
    return Account(number, f"A{number}", number)


@contextmanager
def running(server: DatabaseServer) -> Iterator[Any]:
    """Yield the server, or skip where it cannot run and is not required."""
    try:
        server.start()
    except MissingServer as missing:
        if "postgres" in required_backends():
            pytest.fail(str(missing), pytrace=False)
        pytest.skip(str(missing))
    try:
        yield server
    finally:
        server.close()


@pytest.fixture(scope="module")
def postgresql() -> Iterator[PostgreSQLServer]:
    with running(PostgreSQLServer()) as server:
        run_apart(_create_tables(server.url))
        yield server


async def _create_tables(url: str) -> None:
    async with SQLAlchemySession(url) as session:
        await session.create_tables(metadata)
        await session.create_tables(sample_metadata)


@pytest.fixture(scope="module")
def bouncer(postgresql: PostgreSQLServer) -> Iterator[PgBouncerServer]:
    with running(PgBouncerServer(postgresql, {"default_pool_size": SERVER_CONNECTIONS})) as server:
        yield server


@asynccontextmanager
async def clients(url: str, count: int = CLIENTS, **knobs: Any) -> AsyncIterator[list[SQLAlchemySession]]:
    """Yield sessions of as many services, and ten accounts."""
    async with AsyncExitStack() as stack:
        arguments = {"pool_size": 3, "max_overflow": 3, "pool_timeout": 60, "pgbouncer": True} | knobs
        sessions = [await stack.enter_async_context(SQLAlchemySession(url, **arguments)) for _ in range(count)]
        async with sessions[0].transaction() as unit:
            await unit.execute(sa.delete(Accounts.table))
            await unit.execute(sa.delete(Items.table))
            await Accounts(unit).add_many([account(number) for number in range(10)])
        yield sessions


# Every way to use a session. What is written to accounts, is written in pairs of an even number and its successor, and
# items by the hundred: half of either would show.

Work = Callable[[SQLAlchemySession, int], Awaitable[Any]]


async def read(session: SQLAlchemySession, number: int) -> None:
    found = await Accounts(session).get(number % 10)
    assert (found.number, found.mood, found.seen_at) == (f"A{number % 10}", Mood.FINE, account(0).seen_at)


async def page(session: SQLAlchemySession, number: int) -> None:
    found = await Accounts(session).paginate(PageRequest(limit=5), field("id") < 10, sort="id")
    assert [one.id for one in found.items] == [0, 1, 2, 3, 4]
    assert found.total == 10


async def write(session: SQLAlchemySession, number: int) -> None:
    assert await Items(session).upsert(Item(-number, -number)) == Item(-number, -number)
    assert (await Items(session).patch(-number, {"batch": -1})).batch == -1
    with pytest.raises(DuplicateKeyError):
        await Items(session).add(Item(-number, 0))
    assert await Items(session).delete(-number)


async def unit_of_work(session: SQLAlchemySession, number: int) -> None:
    async with session.transaction() as unit:
        await Accounts(unit).add(account(2 * number))
        with suppress(DuplicateKeyError):
            async with unit.savepoint():
                await Accounts(unit).add(account(2 * number))
        assert await Accounts(unit).get_by_id(2 * number, lock="update") == account(2 * number)
        await Accounts(unit).add(account(2 * number + 1))


async def isolated(session: SQLAlchemySession, number: int) -> None:
    async with session.transaction("SERIALIZABLE", read_only=True) as unit:
        level = await unit.execute(sa.text("SELECT current_setting('transaction_isolation')"))
        assert level.scalar_one() == "serializable"
        await page(unit, number)  # type: ignore[arg-type]


async def replayed(session: SQLAlchemySession, number: int) -> None:
    async def transfer(unit: Any) -> None:
        giver = await Accounts(unit).get(number % 10)
        taker = await Accounts(unit).get((number + 1) % 10)
        await Accounts(unit).patch(giver.id, {"balance": giver.balance - 1})
        await Accounts(unit).patch(taker.id, {"balance": taker.balance + 1})

    await session.run(transfer, attempts=50, isolation="SERIALIZABLE")


async def stream(session: SQLAlchemySession, number: int) -> None:
    async for one in Accounts(session).stream(batch_size=3):
        assert one.number == f"A{one.id}"
    async for row in session.stream(sa.text("SELECT id, number FROM accounts WHERE id < :most"), {"most": 10}):
        assert row.number == f"A{row.id}"


async def bulk(session: SQLAlchemySession, number: int) -> None:
    items = [Item(number * BULK + place, number) for place in range(BULK)]
    assert await Items(session).add_many(items) == BULK
    assert await Items(session).upsert_many([Item(item.id, number) for item in items[:20]]) == 20
    assert await Items(session).update_many(items[:20]) == 20


async def core(session: SQLAlchemySession, number: int) -> None:
    table = Accounts.table
    found = await session.execute(sa.select(table.c.number).where(table.c.id == number % 10))
    assert found.scalar_one() == f"A{number % 10}"
    rows = [_row(2 * number), _row(2 * number + 1)]
    await session.execute(sa.insert(table), rows)


async def engine(session: SQLAlchemySession, number: int) -> None:
    table = Accounts.table
    async with session.engine.begin() as connection:
        await connection.execute(sa.insert(table), [_row(2 * number)])
        assert (await connection.execute(sa.text("SELECT :it + 0"), {"it": number})).scalar_one() == number
        await connection.execute(sa.insert(table), [_row(2 * number + 1)])
    async with session.engine.connect() as connection:
        autocommit = await connection.execution_options(isolation_level="AUTOCOMMIT")
        assert (await autocommit.execute(sa.text("SELECT :it + 0"), {"it": number})).scalar_one() == number


def _row(number: int) -> dict[str, Any]:
    return dataclasses.asdict(account(number))


WORK: tuple[Work, ...] = (read, page, write, unit_of_work, isolated, replayed, stream, bulk, core, engine)


async def assert_whole(session: SQLAlchemySession) -> None:
    """Fail unless every pair and every batch is there whole, or not at all."""
    stored = {one.id for one in await Accounts(session).get_all(field("id") >= 20)}
    assert stored == {number ^ 1 for number in stored}
    batches = await session.execute(
        sa.select(sa.func.count()).where(Items.table.c.id >= 0).group_by(Items.table.c.batch)
    )
    assert set(batches.scalars()) <= {BULK}
    balances = await Accounts(session).get_all(field("id") < 10)
    assert sum(one.balance for one in balances) == sum(range(10))


@pytest.mark.parametrize("portable", [False, True], ids=["driver", "portable"])
async def test_p7_every_way_to_use_a_session_works_on_shared_server_connections(
    bouncer: PgBouncerServer, postgresql: PostgreSQLServer, shown: Shown, effort: Effort, portable: bool
) -> None:
    rounds = effort(0, 1) if portable else effort(1, 2)
    if not rounds:
        pytest.skip("under --full only")
    tasks = CLIENTS * effort(2, 3)
    numbers = itertools.count(10)
    statements: Counter[str] = Counter()
    servers: Counter[int] = Counter()
    async with clients(bouncer.url, portable=portable) as sessions:
        for session in sessions:
            session.observe(lambda event: statements.update([event.name]))

        async def use(session: SQLAlchemySession, works: Iterator[Work]) -> None:
            for work in works:
                await work(session, next(numbers))
                servers.update([(await session.execute(sa.text("SELECT pg_backend_pid()"))).scalar_one()])

        async with asyncio.TaskGroup() as group:
            for place, session in enumerate(itertools.islice(itertools.cycle(sessions), tasks)):
                turned = (*WORK[place % len(WORK) :], *WORK[: place % len(WORK)])
                group.create_task(use(session, iter(turned * rounds)))
        await assert_whole(sessions[0])
        assert len(servers) == SERVER_CONNECTIONS
        for session in sessions:
            await assert_connections_sound(session, server_url=postgresql.url)
    what = f"PgBouncer, transaction mode, {'portable' if portable else 'driver'}"
    shown("P7", what, clients=tasks, server_connections=len(servers), statements=statements.total(), errors=0)


COLUMN = ("ALTER TABLE accounts ADD COLUMN extra INTEGER", "ALTER TABLE accounts DROP COLUMN extra")
TYPE = ("ALTER TABLE accounts ALTER COLUMN balance TYPE real", "ALTER TABLE accounts ALTER COLUMN balance TYPE integer")


async def test_p7_alter_table_under_load_is_nobodys_error(
    bouncer: PgBouncerServer, postgresql: PostgreSQLServer, shown: Shown, effort: Effort
) -> None:
    changes = (*COLUMN, *TYPE) * effort(2, 5)
    altered = asyncio.Event()
    calls: Counter[str] = Counter()
    numbers = itertools.count(10)

    async def everything(session: SQLAlchemySession, number: int) -> None:
        found = await session.execute(sa.text("SELECT * FROM accounts WHERE id = :id"), {"id": number % 10})
        row = found.one()
        # Of a width that is the same for both types: an older description would make another number of it.
        assert (row.number, float(row.balance)) == (f"A{number % 10}", float(number % 10))

    async with clients(bouncer.url) as sessions:

        async def use(session: SQLAlchemySession, work: Work) -> None:
            while not altered.is_set():
                await work(session, next(numbers))
                calls[work.__name__] += 1

        async with asyncio.TaskGroup() as group:
            for session in sessions[1:]:
                for work in (read, page, unit_of_work, stream, core, everything):
                    group.create_task(use(session, work))
            for change in changes:
                await sessions[0].execute(sa.text(change))
                await asyncio.sleep(0.05)
            altered.set()
        await assert_whole(sessions[0])
        for session in sessions:
            await assert_connections_sound(session, server_url=postgresql.url)
    shown("P7", "PgBouncer, ALTER TABLE under load", changes=len(changes), calls=calls.total(), errors=0)


async def test_p7_cancelled_statements_end_and_disturb_nobody_else(
    bouncer: PgBouncerServer, postgresql: PostgreSQLServer, shown: Shown, effort: Effort
) -> None:
    times = effort(200, 800)
    numbers = itertools.count(10)
    undisturbed = 0
    stopped = asyncio.Event()
    async with clients(bouncer.url) as sessions:
        *disturbed, calm = sessions

        async def reads() -> None:
            nonlocal undisturbed
            while not stopped.is_set():
                await read(calm, undisturbed)
                await page(calm, undisturbed)
                undisturbed += 2

        def storms(session: SQLAlchemySession, seed: int) -> Awaitable[StormReport]:
            async def call(number: int) -> None:
                await WORK[number % len(WORK)](session, next(numbers))
                await session.execute(sa.text("SELECT pg_sleep(0.002)"))

            share = times // len(disturbed)
            return storm(call, share, longest_delay=0.1, concurrency=2, anyio=seed % 2 == 1, seed=seed)

        cancelled = 0
        async with asyncio.TaskGroup() as group:
            group.create_task(reads())
            for _ in range(5):  # on a busy machine most calls of a storm end before they are cancelled
                reports = await asyncio.gather(*[storms(session, seed) for seed, session in enumerate(disturbed)])
                assert not any(report.failed or report.hung for report in reports)
                cancelled += sum(report.cancelled for report in reports)
                if cancelled > times // 4:
                    break
            stopped.set()
        for session in sessions:
            await assert_connections_sound(session, server_url=postgresql.url)
        await assert_whole(calm)
        assert await state_of_servers(bouncer) == await state_of_a_new_connection(postgresql)
    assert cancelled > times // 4
    shown("P7", "PgBouncer, calls cancelled", cancelled=cancelled, others_undisturbed=undisturbed, errors=0)


# What is left on server connections

STATE = """
    SELECT current_setting('default_transaction_isolation'), current_setting('default_transaction_read_only'),
        current_setting('statement_timeout'), current_setting('jit'), current_setting('DateStyle'),
        current_setting('client_encoding'), current_setting('search_path'),
        (SELECT count(*) FROM pg_prepared_statements WHERE name <> ''),
        (SELECT count(*) FROM pg_locks WHERE locktype = 'advisory')
"""


async def state_of_servers(bouncer: PgBouncerServer) -> Any:
    """Return the state of each server connection, as a client without a session of ours meets it."""
    async with AsyncExitStack() as stack:
        states = []
        for _ in range(SERVER_CONNECTIONS):
            connection = await raw(stack, bouncer.url, statement_cache_size=0)
            await stack.enter_async_context(connection.transaction())
            states.append(tuple(await connection.fetchrow(STATE)))
    assert len(set(states)) == 1, states
    return states[0]


async def state_of_a_new_connection(server: PostgreSQLServer) -> Any:
    async with AsyncExitStack() as stack:
        return tuple(await (await raw(stack, server.url, statement_cache_size=0)).fetchrow(STATE))


async def raw(stack: AsyncExitStack, url: str, **arguments: Any) -> Any:
    dsn = str_of(make_url(url).set(drivername="postgresql"))
    connection = await asyncpg.connect(dsn, timeout=10, server_settings={"client_encoding": "UTF8"}, **arguments)
    stack.callback(connection.terminate)
    return connection


async def test_p7_nothing_is_left_behind_for_the_next_client(
    bouncer: PgBouncerServer, postgresql: PostgreSQLServer
) -> None:
    async with clients(bouncer.url, statement_timeout=7.5) as sessions:
        for number, work in enumerate(WORK, 10):
            await asyncio.gather(*[work(session, number * 10 + n) for n, session in enumerate(sessions)])
        async with sessions[0].transaction() as unit:
            limit = await unit.execute(sa.text("SELECT current_setting('statement_timeout')"))
            assert limit.scalar_one() == "7500ms"
        async with sessions[0].engine.begin() as connection:
            limit = await connection.execute(sa.text("SELECT current_setting('statement_timeout')"))
            assert limit.scalar_one() == "7500ms"
    assert await state_of_servers(bouncer) == await state_of_a_new_connection(postgresql)


async def test_p7_a_value_that_the_driver_refuses_holds_no_server_connection(bouncer: PgBouncerServer) -> None:
    wrong = sa.text("SELECT * FROM accounts WHERE id = CAST(:id AS integer)")
    async with clients(bouncer.url, 1) as [session]:
        for _ in range(2 * SERVER_CONNECTIONS):
            with pytest.raises(InvalidInputError):
                await session.execute(wrong, {"id": "three"})
        async with session.engine.connect() as connection:
            autocommit = await connection.execution_options(isolation_level="AUTOCOMMIT")
            with pytest.raises(sa.exc.DBAPIError):
                await autocommit.execute(wrong, {"id": "three"})
        # Between Parse and Sync it would hold the server connection and its lock on the table.
        async with clients(bouncer.url, 1, statement_timeout=2) as [other]:
            await asyncio.gather(*[read(other, number) for number in range(6)])
            for change in COLUMN:
                await other.execute(sa.text(change))


# Time


@pytest.fixture
def full(effort: Effort) -> None:
    if not effort(0, 1):
        pytest.skip("under --full only")


@pytest.mark.parametrize("portable", [False, True], ids=["driver", "portable"])
async def test_p7_the_statement_timeout_is_kept_alone_and_in_transactions(
    bouncer: PgBouncerServer, postgresql: PostgreSQLServer, shown: Shown, portable: bool
) -> None:
    slow = sa.text("SELECT pg_sleep(20)")
    limit = 0.1
    async with clients(bouncer.url, 1, statement_timeout=limit, portable=portable) as [session]:

        async def in_a_unit() -> None:
            async with session.transaction() as unit:
                await unit.execute(slow)

        async def on_the_engine() -> None:
            async with session.engine.begin() as connection:
                await connection.execute(slow)

        async def in_a_stream() -> None:
            async for _ in session.stream(slow):
                pass

        async def by_a_repository() -> None:
            await Accounts(session).count(sa.func.pg_sleep(20).is_(None))

        took = []
        for call in (lambda: session.execute(slow), by_a_repository, in_a_unit, on_the_engine, in_a_stream):
            begun = time.monotonic()
            with pytest.raises((StatementTimeoutError, sa.exc.DBAPIError)):
                await call()
            took.append(time.monotonic() - begun)
        assert min(took) >= limit
        assert max(took) < limit + 0.5
        await assert_connections_sound(session, server_url=postgresql.url)
    shown(
        "P7",
        f"PgBouncer, statement timeout {limit} s, {'portable' if portable else 'driver'}",
        slowest=f"{max(took):.2f} s",
    )


async def test_p7_who_waits_for_a_server_connection_ends_by_the_statement_timeout(
    bouncer: PgBouncerServer, postgresql: PostgreSQLServer
) -> None:
    patient = SQLAlchemySession(bouncer.url, pgbouncer=True)
    async with patient, SQLAlchemySession(bouncer.url, pgbouncer=True, statement_timeout=0.2) as session:
        async with AsyncExitStack() as stack:
            for _ in range(SERVER_CONNECTIONS):
                unit = await stack.enter_async_context(patient.transaction())
                await unit.execute(sa.text("SELECT 1"))
            begun = time.monotonic()
            with pytest.raises(StatementTimeoutError):
                await session.ping()
            with pytest.raises(StatementTimeoutError):
                async with session.transaction() as unit:
                    await unit.execute(sa.text("SELECT 1"))
            assert time.monotonic() - begun < 1
            async with asyncio.timeout(3):
                while session.pool_status().checked_out:
                    await asyncio.sleep(0.05)
        await assert_connections_sound(session, server_url=postgresql.url)


async def test_p7_server_connections_that_are_killed_cost_no_read(
    bouncer: PgBouncerServer, postgresql: PostgreSQLServer, shown: Shown
) -> None:
    kill = sa.text(
        "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity"
        " WHERE backend_type = 'client backend' AND state = 'idle' AND pid <> pg_backend_pid()"
    )
    killed = 0
    async with clients(bouncer.url) as sessions, SQLAlchemySession(postgresql.url, pool_size=1) as direct:
        for _ in range(3):
            await asyncio.gather(*[read(session, number) for session in sessions for number in range(3)])
            killed += (await direct.execute(kill)).scalar_one()
            await asyncio.gather(*[read(session, number) for session in sessions for number in range(3)])
    assert killed
    shown("P7", "PgBouncer, idle server connections killed", killed=killed, failed_reads=0)


# The preset itself


async def test_without_the_preset_the_refusal_says_what_to_set(bouncer: PgBouncerServer) -> None:
    session = SQLAlchemySession(bouncer.url)
    begun = time.monotonic()
    with pytest.raises(ConnectionLostError, match=r"set pgbouncer=True, or DATABASE_PGBOUNCER=true .* \(attempt 1\)"):
        await session.connect()
    assert time.monotonic() - begun < 2


async def test_the_preset_works_on_postgresql_itself_as_well(postgresql: PostgreSQLServer) -> None:
    async with clients(postgresql.url, 1) as [session]:
        for number, work in enumerate(WORK, 10):
            await work(session, number)


@pytest.mark.usefixtures("full")
async def test_timestamps_are_read_whatever_order_the_server_writes_dates_in(bouncer: PgBouncerServer) -> None:
    async with clients(bouncer.url, 1) as [session]:
        await session.execute(sa.text("CREATE DATABASE elsewhere"))
        await session.execute(sa.text("ALTER DATABASE elsewhere SET datestyle = 'SQL, DMY'"))
    url = str_of(make_url(bouncer.url).set(database="elsewhere"))
    async with SQLAlchemySession(url, pgbouncer=True) as session:
        await session.create_tables(metadata)
        await Accounts(session).upsert(account(1))
        for _ in range(3):
            await asyncio.gather(*[read(session, 1) for _ in range(6)])
        style = await session.execute(sa.text("SELECT current_setting('DateStyle')"))
        assert style.scalar_one() == "ISO, DMY"


async def test_migrations_are_refused_on_connections_that_hold_no_lock(
    bouncer: PgBouncerServer, tmp_path: Path
) -> None:
    async with SQLAlchemySession(bouncer.url, pgbouncer=True) as session:
        with pytest.raises(UnsupportedOperationError, match="the URL of PostgreSQL itself"):
            await upgrade(session, tmp_path)


@pytest.mark.parametrize(
    "url", ["sqlite+aiosqlite:///:memory:", "mysql+aiomysql://me@host/shop", "postgresql+psycopg_async://me@host/shop"]
)
def test_the_preset_is_refused_for_what_pgbouncer_does_not_serve(url: str) -> None:
    with pytest.raises(ValueError, match=r"pgbouncer=True goes with postgresql\+asyncpg:// only"):
        SQLAlchemySession(url, pgbouncer=True)


def test_the_preset_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql+asyncpg://me@host:6432/shop")
    monkeypatch.setenv("DATABASE_PGBOUNCER", "true")
    assert not SQLAlchemySession.from_settings(DatabaseSettings(_env_file=None)).dialect.keeps_sessions


# The contract of repositories


@pytest.mark.usefixtures("full")
class BehindPgBouncer:
    base = SQLAlchemyRepository

    @pytest.fixture
    async def session(self, bouncer: PgBouncerServer) -> AsyncIterator[SQLAlchemySession]:
        async with SQLAlchemySession(bouncer.url, pgbouncer=True) as session:
            async with session.transaction() as unit:
                for table in reversed(sample_metadata.sorted_tables):
                    await unit.execute(table.delete())
            yield session


class TestTickets(BehindPgBouncer, TicketContract):
    pass
