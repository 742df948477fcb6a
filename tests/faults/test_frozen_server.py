"""P1: the server stands still (SIGSTOP), and every call ends all the same."""

import asyncio
import dataclasses
import itertools
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, AsyncExitStack, asynccontextmanager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import httpx2
import pytest
import sqlalchemy as sa
from fastapi import FastAPI

from fastapi_building_blocks.api import database_lifespan, health_router, install_problem_details
from fastapi_building_blocks.domain import DeadlineExceededError, PageRequest, PoolTimeoutError
from fastapi_building_blocks.infrastructure import SQLAlchemySession, UnitOfWork, deadline
from fastapi_building_blocks.testing import DatabaseServer, assert_connections_sound
from tests.api.serving import serving
from tests.faults.breaking import Database, Ending, Lag, ending_of, loop_lag
from tests.guarantees.ledger import Account, Accounts, account, accounts, opened
from tests.server_view import kill_connections, until

GRACE = 0.5
"""Seconds that a call may take beyond its deadline."""
MOST_LAG = 0.05
"""Seconds."""
ACCOUNTS = 3000
POOL = 22


@contextmanager
def frozen(server: DatabaseServer) -> Iterator[None]:
    server.freeze()
    try:
        yield
    finally:
        server.thaw()


@dataclass
class Freeze:
    """The moment of the freeze at which one call goes on, or begins."""

    bound: Callable[[], AbstractContextManager[None]]
    """What puts a deadline around the call; nothing where the session's own timeouts are to do."""
    is_awaited: bool = False
    _begun: asyncio.Event = field(default_factory=asyncio.Event)
    _at: float = 0.0

    async def begun(self) -> None:
        self.is_awaited = True
        await self._begun.wait()

    def begin(self) -> None:
        self._at = time.monotonic()
        self._begun.set()

    async def ending_of(self, call: Awaitable[Any]) -> Ending:
        """Await a call that waits for this moment, and say how long it took from then on."""
        ending = await ending_of(call)
        return Ending(time.monotonic() - self._at, ending.answer, ending.error)


_numbers = itertools.count(10_000)


def fresh() -> Account:
    """Return an account that nobody has tried to add: what a frozen server has in hand may be done after the thaw."""
    return account(next(_numbers))


Call = Callable[[SQLAlchemySession, Freeze], Awaitable[Any]]


def whole(call: Callable[[SQLAlchemySession], Awaitable[Any]]) -> Call:
    """Make a call that begins when the server is frozen."""

    async def begin_frozen(session: SQLAlchemySession, freeze: Freeze) -> Any:
        await freeze.begun()
        with freeze.bound():
            return await call(session)

    return begin_frozen


async def streamed(session: SQLAlchemySession) -> int:
    return len([one async for one in Accounts(session).stream()])


async def on_the_engine(session: SQLAlchemySession) -> int:
    try:
        connection = await session.engine.connect()
    except TimeoutError as error:
        raise DeadlineExceededError("what cannot be opened raises the driver's own errors there") from error
    try:
        return (await connection.execute(sa.select(sa.func.count()).select_from(accounts))).scalar_one()
    finally:
        await connection.close()


async def begun_on_the_engine(session: SQLAlchemySession, freeze: Freeze, *, commits: bool) -> None:
    async with session.engine.connect() as connection:
        add = sa.insert(accounts)
        await connection.execute(add, dataclasses.asdict(fresh()))
        await freeze.begun()
        with freeze.bound():
            await (connection.commit() if commits else connection.execute(add, dataclasses.asdict(fresh())))


async def unit_of_work(session: SQLAlchemySession) -> None:
    async with session.transaction() as unit:
        await Accounts(unit).add(fresh())


async def replayed_unit(session: SQLAlchemySession) -> None:
    await session.run(lambda unit: Accounts(unit).add(fresh()))


@asynccontextmanager
async def begun_unit(session: SQLAlchemySession) -> AsyncIterator[UnitOfWork]:
    """Yield a unit of work with one row added; the block ends it."""
    unit = session.transaction()
    await unit.__aenter__()
    await Accounts(unit).add(fresh())
    try:
        yield unit
    except BaseException as error:
        await unit.__aexit__(type(error), error, error.__traceback__)
        raise


async def statement_in_a_unit(session: SQLAlchemySession, freeze: Freeze) -> None:
    async with begun_unit(session) as unit:
        await freeze.begun()
        with freeze.bound():
            await Accounts(unit).add(fresh())


async def commit(session: SQLAlchemySession, freeze: Freeze) -> None:
    async with begun_unit(session) as unit:
        await freeze.begun()
        with freeze.bound():
            await unit.__aexit__(None, None, None)


async def rollback(session: SQLAlchemySession, freeze: Freeze) -> None:
    async with begun_unit(session) as unit:
        await freeze.begun()
        with freeze.bound():
            await unit.rollback()
        raise DeadlineExceededError("nothing was kept, and nobody has to be told that the server did not say so")


async def savepoint(session: SQLAlchemySession, freeze: Freeze) -> None:
    async with begun_unit(session) as unit:
        await freeze.begun()
        with freeze.bound():
            async with unit.savepoint():
                await Accounts(unit).add(fresh())


async def stream_midway(session: SQLAlchemySession, freeze: Freeze) -> int:
    """More than the buffers between server and client hold."""
    read = 0
    # A row of the stream is read before the deadline begins: it counts for every call under it, not from the first.
    stream = session.stream(sa.text("SELECT id, repeat('x', 8000) AS text FROM accounts"))
    async for _ in stream:
        read += 1
        break
    await freeze.begun()
    with freeze.bound():
        async for _ in stream:
            read += 1
    return read


BEGUN_FROZEN: dict[str, Call] = {
    "get": whole(lambda session: Accounts(session).get(3)),
    "get_many": whole(lambda session: Accounts(session).get_many([3, 4])),
    "page": whole(lambda session: Accounts(session).paginate(PageRequest(limit=5), sort="id")),
    "count": whole(lambda session: Accounts(session).count()),
    "add": whole(lambda session: Accounts(session).add(fresh())),
    "update": whole(lambda session: Accounts(session).update(account(3, 3))),
    "upsert": whole(lambda session: Accounts(session).upsert(account(4, 4))),
    "delete": whole(lambda session: Accounts(session).delete(5)),
    "add_many": whole(lambda session: Accounts(session).add_many([fresh() for _ in range(200)])),
    "stream": whole(streamed),
    "unit of work": whole(unit_of_work),
    "run": whole(replayed_unit),
    "execute": whole(lambda session: session.execute(sa.text("SELECT 1"))),
    "ping": whole(lambda session: session.ping()),
    "engine": whole(on_the_engine),
}
BEGUN_BEFORE: dict[str, Call] = {
    "statement in a unit": statement_in_a_unit,
    "COMMIT": commit,
    "ROLLBACK": rollback,
    "savepoint": savepoint,
    "statement on the engine": partial(begun_on_the_engine, commits=False),
    "COMMIT on the engine": partial(begun_on_the_engine, commits=True),
    "stream midway": stream_midway,  # asyncmy has read all of it by then, and answers
}
OWN_TIME = {"ROLLBACK": 2.0}
"""Seconds, whatever the deadline: a unit of work that failed because its time was over has to be undone after that."""


@dataclass
class Fixture:
    """A session, what bounds its calls, and the calls that it is tried with."""

    session: SQLAlchemySession
    bound: Callable[[], AbstractContextManager[None]]
    calls: dict[str, Call]
    name: str


async def test_p1_every_call_ends_by_its_deadline(
    databases: list[Database], effort: Callable[[int, int], int], shown: Callable[..., None]
) -> None:
    server, driver = databases[0].server, sa.make_url(databases[0].url).drivername
    seconds = 0.5 if effort(0, 1) == 0 else 1.0
    by_session = {"statement_timeout": seconds, "pool_timeout": seconds, "connect_timeout": seconds}
    async with AsyncExitStack() as stack:
        subjects = []
        for place, (temperature, how) in zip(databases, KINDS, strict=True):
            knobs = by_session if how == "statement_timeout" else {}
            session = await stack.enter_async_context(
                opened(place.url, pool_size=POOL, max_overflow=0, connect_attempts=1, **knobs)
            )
            await Accounts(session).add_many([account(number, number) for number in range(ACCOUNTS)])
            bound = nullcontext if how == "statement_timeout" else partial(deadline, seconds)
            calls = BEGUN_FROZEN | BEGUN_BEFORE if temperature == "warm" else BEGUN_FROZEN
            subjects.append(Fixture(session, bound, calls, f"{temperature} pool, {how}"))

        tries, longest = 0, 0.0
        lags: list[float] = []
        while goes_on(lags, effort(1, 5)):
            for subject, place in zip(subjects, databases, strict=True):
                if "warm" in subject.name:
                    barrier = asyncio.Barrier(POOL)
                    await asyncio.gather(*[_held(subject.session, barrier) for _ in range(POOL)])
                else:
                    kill_connections(place.url)
                    await asyncio.sleep(0.05)  # the farewells are read
            endings, late = await _endings_of_a_freeze(server, subjects)
            wrong = [
                f"{subject}, {name}: {ending}"
                for (subject, name), ending in endings.items()
                if not (ending.is_honest or ending.answer == ACCOUNTS)
                or ending.seconds > OWN_TIME.get(name, seconds) + GRACE + late.held_up
            ]
            assert not wrong, f"of {len(endings)} calls:\n" + "\n".join(wrong)
            lags.append(late.longest)
            tries += len(endings)
            longest = max(longest, *[ending.seconds for (_, name), ending in endings.items() if name not in OWN_TIME])
            for subject, place in zip(subjects, databases, strict=True):
                async with asyncio.timeout(1):
                    assert (await Accounts(subject.session).get(7)).balance == 7, "serving again at once"
                await assert_connections_sound(subject.session, within=5)
                assert await Accounts(subject.session).count() >= ACCOUNTS - 1, place
                await Accounts(subject.session).delete_where(Accounts.table.c.id >= 10_000)
                await Accounts(subject.session).upsert(account(5, 5))
        shown(
            "P1",
            f"server frozen, {driver}, warm and cold pools, calls bounded to {seconds} s",
            tries=tries,
            longest_wait=f"{longest:.2f} s",
            loop_lag=ordinary(lags),
            leaked=0,
        )


def goes_on(lags: list[float], rounds: int) -> bool:
    """Whether to freeze once more: to the promised number, and while the loop was too late more often than not.

    What a busy machine does to the loop comes and goes; what a frozen server does to it would come every time.
    """
    return len(lags) < rounds or (statistics.median_low(lags) > MOST_LAG and len(lags) < rounds + 4)


def ordinary(lags: list[float]) -> str:
    """Return the lag of the loop as a figure, and fail if it was too late more often than not."""
    assert statistics.median_low(lags) <= MOST_LAG, f"the loop was late by {lags} s"
    return f"{statistics.median_low(lags) * 1000:.0f} ms"


KINDS = [(temperature, how) for temperature in ("warm", "cold") for how in ("statement_timeout", "deadline")]


async def _held(session: SQLAlchemySession, barrier: asyncio.Barrier) -> None:
    """Use a connection until all the others are in use as well."""
    async with session.transaction() as unit:
        await unit.execute(sa.text("SELECT 1"))
        await barrier.wait()


async def _endings_of_a_freeze(
    server: DatabaseServer, subjects: list[Fixture]
) -> tuple[dict[tuple[str, str], Ending], Lag]:
    """Make every call of every subject at once, freeze the server meanwhile, and say how they ended and the loop's lag."""
    freezes, tasks = {}, {}
    for subject in subjects:
        for name, call in subject.calls.items():
            freeze = freezes[subject.name, name] = Freeze(subject.bound)
            tasks[subject.name, name] = asyncio.create_task(freeze.ending_of(call(subject.session, freeze)))
    await until(lambda: all(freeze.is_awaited for freeze in freezes.values()))
    with frozen(server):
        async with loop_lag() as lag:
            # Not all in one turn of the loop: to begin to open a connection takes asyncpg 5 ms.
            for freeze in freezes.values():
                freeze.begin()
                await asyncio.sleep(0)
            done, hung = await asyncio.wait(tasks.values(), timeout=10)
    for task in hung:
        task.cancel()
    never = Ending(10.0, error=AssertionError("it had not ended"))
    return {name: task.result() if task in done else never for name, task in tasks.items()}, lag


@pytest.mark.parametrize("how", ["pool_timeout", "deadline"])
async def test_p1_whoever_waits_for_a_connection_ends_too(database: Database, how: str) -> None:
    knobs = {"pool_timeout": 0.4} if how == "pool_timeout" else {}
    async with opened(database.url, pool_size=1, max_overflow=0, **knobs) as session, session.transaction() as unit:
        await Accounts(unit).count()
        with frozen(database.server), nullcontext() if how == "pool_timeout" else deadline(0.4):
            ending = await ending_of(session.ping())
        assert isinstance(ending.error, PoolTimeoutError if how == "pool_timeout" else DeadlineExceededError)
        assert 0.3 < ending.seconds < 0.4 + GRACE
        await Accounts(unit).count()


async def test_p1_connecting_and_disconnecting_end(database: Database, shown: Callable[..., None]) -> None:
    knobs: dict[str, Any] = {
        "connect_timeout": 0.5,
        "statement_timeout": 0.5,
        "connect_attempts": 1,
        "shutdown_timeout": 0.5,
    }
    new = SQLAlchemySession(database.url, **knobs)
    async with opened(database.url, **knobs) as session:
        await asyncio.gather(*[session.ping() for _ in range(5)])
        with frozen(database.server):
            async with loop_lag() as lag:
                connecting = await ending_of(new.connect())
                assert (await ending_of(session.ping())).is_honest
                disconnecting = await ending_of(session.disconnect())
        assert connecting.is_honest, connecting
        assert connecting.seconds < 0.5 + GRACE
        assert disconnecting.error is None
        assert disconnecting.seconds < 0.5 + GRACE
        assert lag.longest <= MOST_LAG
    async with new:
        await assert_connections_sound(new, within=5)
    shown(
        "P1",
        f"server frozen, {sa.make_url(database.url).drivername}, connect and disconnect",
        tries=2,
        longest_wait=f"{max(connecting.seconds, disconnecting.seconds):.2f} s",
        loop_lag=f"{lag.longest * 1000:.0f} ms",
    )


@pytest.mark.parametrize("how", ["task cancelled", "asyncio.timeout"])
async def test_p1_a_caller_who_gives_up_is_let_go(database: Database, how: str) -> None:
    async with opened(database.url, pool_size=POOL, max_overflow=0) as session:
        await Accounts(session).add(account(3, 3))

        async def given_up(call: Call) -> None:
            freeze = Freeze(nullcontext)
            freeze.begin()
            task = asyncio.create_task(call(session, freeze))  # type: ignore[arg-type]
            if how == "task cancelled":
                await asyncio.wait({task}, timeout=0.2)
                task.cancel()
                await asyncio.wait({task})
            else:
                async with asyncio.timeout(0.2):
                    await task

        async with loop_lag() as lag:
            with frozen(database.server):
                endings = await asyncio.gather(*[ending_of(given_up(call)) for call in BEGUN_FROZEN.values()])
        assert not [
            f"{name}: {ending}"
            for name, ending in zip(BEGUN_FROZEN, endings, strict=True)
            if ending.seconds - lag.starved > 0.2 + GRACE
        ]
        await Accounts(session).get(3)
        await assert_connections_sound(session, within=5)


@pytest.mark.parametrize("database", ["asyncpg", "aiomysql"], indirect=True)
async def test_p1_a_service_says_503_or_504_and_stays_alive(
    database: Database, effort: Callable[[int, int], int], shown: Callable[..., None]
) -> None:
    session = SQLAlchemySession(database.url, statement_timeout=0.5, pool_timeout=0.5, connect_timeout=0.5)
    app = FastAPI(lifespan=database_lifespan(session))
    install_problem_details(app)
    app.include_router(health_router(session))

    @app.get("/accounts/{number}")
    async def read(number: int) -> dict[str, int]:
        return {"balance": (await Accounts(session).get(number)).balance}

    @app.put("/accounts/{number}")
    async def write(number: int) -> None:
        async with session.transaction() as unit:
            await Accounts(unit).patch(number, {"owner": "x"})

    async with opened(database.url) as direct:
        await Accounts(direct).add(account(3, 3))
    unready, slowest, requests = 0.0, 0.0, 0
    lags: list[float] = []
    async with serving(app) as url, httpx2.AsyncClient(base_url=url, timeout=10) as client:
        assert (await client.get("/health/ready")).status_code == 200
        while goes_on(lags, effort(1, 5)):
            with frozen(database.server):
                async with loop_lag() as lag:
                    ready = asyncio.create_task(ending_of(client.get("/health/ready")))
                    calls = [client.get("/accounts/3") for _ in range(10)] + [
                        client.put("/accounts/3") for _ in range(10)
                    ]
                    answers = asyncio.gather(*[ending_of(call) for call in calls])
                    lives = [await ending_of(client.get("/health/live")) for _ in range(10)]
                    endings = await answers
                    readiness = await ready
            assert {ending.answer.status_code for ending in lives} == {200}
            assert max(ending.seconds for ending in lives) < 0.5 + lag.held_up
            assert readiness.answer.status_code == 503
            assert readiness.seconds < 2 + lag.held_up
            for ending in endings:
                assert ending.error is None, ending
                assert ending.answer.status_code in (503, 504), ending
                assert ending.answer.headers["content-type"] == "application/problem+json"
                # Three bounds in a row at most: for a place in the pool, its connection, and the statement.
                assert ending.seconds < 3 * 0.5 + GRACE + lag.held_up
            lags.append(lag.longest)
            begun = time.monotonic()
            assert (await client.get("/accounts/3")).json() == {"balance": 3}
            assert (await client.get("/health/ready")).status_code == 200
            assert time.monotonic() - begun < 1
            await assert_connections_sound(session, within=5)
            requests += len(endings) + len(lives) + 1
            unready = max(unready, readiness.seconds)
            slowest = max(slowest, *[ending.seconds for ending in endings])
    shown(
        "P1",
        f"server frozen, {session.dialect_name} over HTTP: 503 or 504, alive, not ready",
        tries=requests,
        longest_wait=f"{slowest:.2f} s",
        not_ready_after=f"{unready:.2f} s",
        loop_lag=ordinary(lags),
    )
