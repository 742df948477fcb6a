"""P4: no connection is free. Whoever waits is told in time, served in turn, and no response keeps a connection."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Annotated

import httpx2
import pytest
import sqlalchemy as sa
from fastapi import Depends, FastAPI
from fastapi.responses import StreamingResponse

from fastapi_building_blocks.api import install_problem_details, unit_of_work
from fastapi_building_blocks.domain import PoolTimeoutError
from fastapi_building_blocks.infrastructure import SQLAlchemySession, UnitOfWork
from fastapi_building_blocks.testing import assert_connections_sound
from tests.api.serving import serving
from tests.faults.breaking import ending_of, private_database
from tests.guarantees.ledger import Accounts, account, opened
from tests.server_view import until


@pytest.fixture(params=["asyncpg", "aiomysql", "sqlite"])
def url(request: pytest.FixtureRequest, sqlite_url: str) -> Iterator[str]:
    """An empty database by each driver in turn, SQLite as well: nothing happens to a server here."""
    if request.param == "sqlite":
        yield sqlite_url
        return
    server = request.getfixturevalue("postgresql" if request.param == "asyncpg" else "mariadb")
    with private_database(server, request.param) as database:
        yield database.url


@asynccontextmanager
async def exhausted(session: SQLAlchemySession, size: int) -> AsyncIterator[AsyncExitStack]:
    """Hold all connections of the pool; closing what is yielded returns them."""
    async with AsyncExitStack() as holders:
        for _ in range(size):
            unit = await holders.enter_async_context(session.transaction(read_only=True))
            await Accounts(unit).exists()
        assert session.pool_status().checked_out == size
        yield holders


async def read(session: SQLAlchemySession) -> None:
    assert (await Accounts(session).get(3)).balance == 3


async def write(session: SQLAlchemySession) -> None:
    async with session.transaction() as unit:
        await Accounts(unit).patch(3, {"owner": "x"})


async def stream(session: SQLAlchemySession) -> None:
    assert [one.id async for one in Accounts(session).stream()] == [3]


async def execute(session: SQLAlchemySession) -> None:
    await session.execute(sa.text("SELECT 1"))


CALLS: list[Callable[[SQLAlchemySession], Awaitable[None]]] = [read, write, stream, execute]


async def test_p4_whoever_waits_is_told_at_the_pool_timeout(
    url: str, effort: Callable[[int, int], int], shown: Callable[..., None]
) -> None:
    timeout, waits = 1.0, list[float]()
    async with opened(url, pool_size=2, max_overflow=1, pool_timeout=timeout) as session:
        await Accounts(session).add(account(3, 3))
        for _ in range(effort(1, 5)):
            async with exhausted(session, 3) as holders:
                waiters = [asyncio.create_task(ending_of(call(session))) for call in CALLS * 10]
                endings = await asyncio.gather(*waiters)
                for ending in endings:
                    assert isinstance(ending.error, PoolTimeoutError), ending
                waits += [ending.seconds for ending in endings]
                # Others waited for less than the timeout when a connection came back: they are served at once.
                late = [asyncio.create_task(ending_of(call(session))) for call in CALLS]
                await until(lambda: session.pool_status().waiting == len(CALLS))
                returned = time.monotonic()
                await holders.aclose()
                assert [ending.error for ending in await asyncio.gather(*late)] == [None] * len(CALLS)
                recovery = time.monotonic() - returned
            assert recovery < timeout / 2
            await assert_connections_sound(session, within=5)
    assert 0.9 * timeout <= min(waits)
    assert max(waits) <= 1.1 * timeout
    shown(
        "P4",
        f"pool exhausted, {sa.make_url(url).drivername}, pool_timeout {timeout} s",
        tries=len(waits),
        waited=f"{min(waits):.3f} to {max(waits):.3f} s",
        recovered_in=f"{recovery * 1000:.0f} ms",
    )


async def test_p4_whoever_came_first_is_served_first(
    url: str, effort: Callable[[int, int], int], shown: Callable[..., None]
) -> None:
    waiting, tries = 100, effort(2, 20)
    async with opened(url, pool_size=1, max_overflow=0, pool_timeout=30) as session:
        await Accounts(session).add(account(3, 3))
        for turn in range(tries):
            served: list[int] = []

            async def wait(number: int, served: list[int] = served) -> None:
                async with session.transaction() as unit:
                    await Accounts(unit).exists()
                    served.append(number)
                await CALLS[number % len(CALLS)](session)  # behind all who wait already

            async with exhausted(session, 1):
                waiters = []
                for number in range(waiting):
                    waiters.append(asyncio.create_task(wait(number)))
                    while session.pool_status().waiting == number:
                        await asyncio.sleep(0)
                # Those who give up leave the order of the others as it is.
                given_up = list(range(turn, waiting, 10))
                for number in given_up:
                    waiters[number].cancel()
            await asyncio.gather(*waiters, return_exceptions=True)
            assert served == [number for number in range(waiting) if number not in given_up]
    shown("P4", f"first come first served, {sa.make_url(url).drivername}", tries=tries * waiting, out_of_turn=0)


async def test_p4_over_http_it_is_a_504(url: str) -> None:
    async with opened(url, pool_size=1, max_overflow=0, pool_timeout=0.3) as session:
        await Accounts(session).add(account(3, 3))
        app = FastAPI()
        install_problem_details(app)

        @app.get("/accounts/{number}")
        async def show(number: int) -> int:
            return (await Accounts(session).get(number)).balance

        async with serving(app) as address, httpx2.AsyncClient(base_url=address, timeout=10) as client:
            async with exhausted(session, 1):
                answer = await client.get("/accounts/3")
                assert (answer.status_code, answer.json()["code"]) == (504, "pool_timeout")
            assert (await client.get("/accounts/3")).json() == 3


async def test_p4_a_connection_is_released_before_a_response_streams(url: str, shown: Callable[..., None]) -> None:
    async with opened(url, pool_size=1, max_overflow=0, pool_timeout=0.5) as session:
        await Accounts(session).add(account(3, 3))
        app = FastAPI()
        install_problem_details(app)
        go_on = asyncio.Event()

        async def slowly(found: list[int]) -> AsyncIterator[str]:
            for number in found:
                yield f"{json.dumps(number)}\n"
                await go_on.wait()
                yield "the end\n"

        @app.get("/read")
        async def after_reading() -> StreamingResponse:
            return StreamingResponse(slowly([one.id for one in await Accounts(session).get_all()]))

        @app.get("/unit")
        async def after_a_unit(
            unit: Annotated[UnitOfWork, Depends(unit_of_work(session), scope="function")],
        ) -> StreamingResponse:
            return StreamingResponse(slowly([one.id for one in await Accounts(unit).get_all()]))

        @app.get("/stream")
        async def after_a_stream() -> StreamingResponse:
            return StreamingResponse(slowly([one.id async for one in Accounts(session).stream()]))

        others = 0
        async with serving(app) as address, httpx2.AsyncClient(base_url=address, timeout=10) as client:
            for path in ("/read", "/unit", "/stream"):
                go_on.clear()
                async with client.stream("GET", path) as response:
                    lines = response.aiter_lines()
                    assert (response.status_code, await anext(lines)) == (200, "3")
                    assert session.pool_status().checked_out == 0
                    for _ in range(10):
                        await asyncio.gather(*[read(session), write(session)])
                        others += 2
                    go_on.set()
                    assert [line async for line in lines] == ["the end"]
    shown(
        "P4",
        f"responses that stream, {sa.make_url(url).drivername}, pool of one",
        tries=3,
        others_served=others,
        held=0,
    )
