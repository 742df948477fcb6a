import asyncio
import logging
import time

import httpx2
import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from fastapi_building_blocks.api import database_lifespan, health, health_router, install_problem_details
from fastapi_building_blocks.domain import ConnectionLostError
from fastapi_building_blocks.infrastructure.database.in_memory_session import InMemorySession
from tests.api.serving import serving


class LostSession(InMemorySession):
    async def ping(self) -> None:
        raise ConnectionLostError("cannot reach db.example.org:5432")


class FrozenSession(InMemorySession):
    """Does not answer, and does not react to a cancellation for a while either."""

    async def ping(self) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.2)


def client_of(session: InMemorySession, *, connected: bool = True, problems: bool = True) -> TestClient:
    app = FastAPI(lifespan=database_lifespan(session) if connected else None)
    if problems:
        install_problem_details(app)
    app.include_router(health_router(session, deadline=0.1))
    return TestClient(app)


@pytest.mark.parametrize("path", ["/health", "/health/live", "/health/ready"])
def test_a_healthy_service_is_ok(path: str) -> None:
    with client_of(InMemorySession()) as client:
        response = client.get(path)
        assert (response.status_code, response.json()) == (200, {"status": "ok"})


@pytest.mark.parametrize(("session", "ready"), [(InMemorySession(), 200), (LostSession(), 503)])
def test_head_is_answered_like_get(session: InMemorySession, ready: int) -> None:
    with client_of(session) as client:
        for path, status in (("/health", 200), ("/health/live", 200), ("/health/ready", ready)):
            assert client.head(path).status_code == status


@pytest.mark.parametrize("session", [LostSession(), FrozenSession()])
def test_without_its_database_a_service_lives_but_is_not_ready(session: InMemorySession) -> None:
    with client_of(session) as client:
        assert client.get("/health").json() == {"status": "ok"}
        assert client.get("/health/live").json() == {"status": "ok"}
        response = client.get("/health/ready")
        assert response.status_code == 503
        assert response.headers["content-type"] == "application/problem+json"
        assert response.headers["retry-after"] == "1"
        assert response.json()["code"] == "unavailable"


def test_a_service_whose_session_is_not_connected_is_not_ready() -> None:
    assert client_of(InMemorySession(), connected=False).get("/health/ready").status_code == 503


def test_a_frozen_database_delays_the_answer_by_the_deadline_only() -> None:
    with client_of(FrozenSession()) as client:
        seconds = []
        for _ in range(5):
            begun = time.monotonic()
            client.get("/health/ready")
            seconds.append(time.monotonic() - begun)
        assert min(seconds) < 0.19, "a busy machine is late, but not every time"


def test_readiness_is_a_problem_even_without_problem_details_installed() -> None:
    with client_of(LostSession(), problems=False) as client:
        assert client.get("/health/ready").headers["content-type"] == "application/problem+json"


def test_health_is_documented() -> None:
    app = client_of(InMemorySession()).app
    assert isinstance(app, FastAPI)
    paths = app.openapi()["paths"]
    assert set(paths) == {"/health", "/health/live", "/health/ready"}
    responses = paths["/health/ready"]["get"]["responses"]
    assert list(responses["503"]["content"]) == ["application/problem+json"]
    assert list(responses["200"]["content"]) == ["application/json"]


class FreezableSession(InMemorySession):
    """Counts its pings, and answers them while it is not frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.thawed = asyncio.Event()
        self.pings = 0

    async def ping(self) -> None:
        self.pings += 1
        await self.thawed.wait()


async def test_probes_of_a_frozen_database_share_a_ping_and_the_log_has_a_line_for_each_turn(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    session = FreezableSession()
    app = FastAPI()
    app.include_router(health_router(session, deadline=0.1))
    async with serving(app) as url, httpx2.AsyncClient(base_url=url) as client:

        async def probe(path: str = "/health/ready") -> int:
            return int((await client.get(path)).status_code)

        def turns() -> list[str]:
            return [record.getMessage() for record in caplog.records if record.name == health.__name__]

        for _ in range(2):
            assert await asyncio.gather(*[probe() for _ in range(20)], probe("/health/live")) == [*[503] * 20, 200]
        assert session.pings == 1
        assert turns() == ["not ready: the database did not answer in time"]
        session.thawed.set()
        assert await asyncio.gather(*[probe() for _ in range(20)]) == [200] * 20
        assert await probe() == 200
        assert turns()[1:] == ["ready again"]
        assert 2 <= session.pings <= 21


async def test_a_ping_that_was_lost_on_the_way_is_sent_again() -> None:
    session = FreezableSession()
    app = FastAPI()
    app.include_router(health_router(session, deadline=0.02))
    async with serving(app) as url, httpx2.AsyncClient(base_url=url) as client:
        async with asyncio.timeout(5):
            while session.pings < 3:
                assert (await client.get("/health/ready")).status_code == 503
        session.thawed.set()
