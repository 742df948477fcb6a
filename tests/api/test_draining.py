import asyncio
import signal
import time
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from fastapi import FastAPI

from fastapi_building_blocks.api import DrainMiddleware, database_lifespan, health_router
from fastapi_building_blocks.infrastructure.database.in_memory_session import InMemorySession
from tests.api.serving import serving


@pytest.fixture(autouse=True)
def no_signal_is_left_to_us() -> Iterator[None]:
    """uvicorn raises the signals that it has handled once more."""
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    yield
    signal.signal(signal.SIGTERM, before)


def application(seconds: float) -> FastAPI:
    session = InMemorySession()
    app = FastAPI(lifespan=database_lifespan(session))
    app.add_middleware(DrainMiddleware, seconds=seconds)
    app.include_router(health_router(session))

    @app.get("/slow")
    async def slow() -> None:
        await asyncio.sleep(0.2)

    return app


async def ended(client: httpx2.AsyncClient) -> float:
    """Wait until nobody listens, and return when that was."""
    async with asyncio.timeout(5):
        while True:
            try:
                await client.get("/health/live")
            except httpx2.TransportError:
                return time.monotonic()
            await asyncio.sleep(0.01)


async def test_p8_after_sigterm_it_serves_on_not_ready_and_says_goodbye_to_connections() -> None:
    async with serving(application(0.5)) as url, httpx2.AsyncClient(base_url=url) as client:
        response = await client.get("/health/ready")
        assert response.status_code == 200
        assert "connection" not in response.headers
        in_flight = asyncio.create_task(client.get("/slow"))
        await asyncio.sleep(0.05)
        begun = time.monotonic()
        signal.raise_signal(signal.SIGTERM)
        await asyncio.sleep(0)
        response = await client.get("/health/ready")
        assert response.status_code == 503
        assert response.json()["detail"] == "the service is shutting down"
        assert response.headers["connection"] == "close"
        for path in ("/health/live", "/slow"):
            response = await client.get(path)
            assert response.status_code == 200
            assert response.headers["connection"] == "close"
        assert (await in_flight).headers["connection"] == "close", "it had begun before the signal"
        assert 0.5 <= await ended(client) - begun < 1.5


async def test_a_second_sigterm_and_ctrl_c_do_not_wait() -> None:
    for second in (signal.SIGTERM, signal.SIGINT):
        ours = signal.signal(signal.SIGINT, lambda *_: None)
        async with serving(application(30)) as url, httpx2.AsyncClient(base_url=url) as client:
            await client.get("/health/live")
            begun = time.monotonic()
            signal.raise_signal(signal.SIGTERM)
            await asyncio.sleep(0.05)
            signal.raise_signal(second)
            assert await ended(client) - begun < 2
        signal.signal(signal.SIGINT, ours)


async def test_an_application_that_is_served_again_is_ready_again() -> None:
    app = application(0.1)
    for _ in range(2):
        async with serving(app) as url, httpx2.AsyncClient(base_url=url) as client:
            assert (await client.get("/health/ready")).status_code == 200
            signal.raise_signal(signal.SIGTERM)
            await ended(client)


async def test_without_seconds_it_does_nothing() -> None:
    async with serving(application(0)) as url, httpx2.AsyncClient(base_url=url) as client:
        await client.get("/health/live")
        begun = time.monotonic()
        signal.raise_signal(signal.SIGTERM)
        assert await ended(client) - begun < 1


async def test_the_servers_handler_is_back_after_the_lifespan() -> None:
    def servers_own(*_: Any) -> None:
        """Shut down."""

    signal.signal(signal.SIGTERM, servers_own)

    async def wrapped(scope: Any, receive: Any, send: Any) -> None:
        assert signal.getsignal(signal.SIGTERM) is not servers_own

    await DrainMiddleware(wrapped, seconds=1)({"type": "lifespan"}, None, None)  # type: ignore[arg-type]
    assert signal.getsignal(signal.SIGTERM) is servers_own


def test_a_drain_that_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="0 seconds or more"):
        DrainMiddleware(FastAPI(), seconds=-1)
