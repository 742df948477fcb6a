"""P5 and P8: a service that starts before its database, that stops under load, and whose database stands still."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import pytest
import sqlalchemy as sa
from sqlalchemy import make_url

from example_service.app.infrastructure.tables import users_table
from fastapi_building_blocks.infrastructure import SQLAlchemySession
from fastapi_building_blocks.testing import DatabaseServer, MariaDBServer, MissingServer, PostgreSQLServer
from fastapi_building_blocks.testing.fault_proxy import free_port
from tests.backends import required_backends
from tests.server_view import connections, until

ROOT = Path(__file__).parents[2]
COMMAND = ["-m", "example_service.app.main"]
USERS = "/api/v1/users/"
CLIENTS = 20

Shown = Callable[..., None]
Effort = Callable[[int, int], int]


@pytest.fixture(scope="module", params=["postgres", "mysql"])
def own_server(request: pytest.FixtureRequest) -> Iterator[DatabaseServer]:
    """A server of this file's own, which a test may stop and leaves running; one of them in the short run."""
    if request.param != "postgres" and not request.config.getoption("--full"):
        pytest.skip("only under --full: starting services takes its time")
    server: DatabaseServer = PostgreSQLServer() if request.param == "postgres" else MariaDBServer()
    try:
        server.start()
    except MissingServer as missing:
        if request.param in required_backends():
            pytest.fail(str(missing), pytrace=False)
        pytest.skip(str(missing))
    yield server
    server.close()


def name_of(server: DatabaseServer) -> str:
    return type(server).__name__.removesuffix("Server")


class Service:
    """A service in a process of its own."""

    def __init__(self, command: list[str], log: Path, **environment: object) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._log = log
        settings = {name: str(value) for name, value in environment.items()}
        path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, *(part.format(port=self.port) for part in command)],
                cwd=ROOT,
                env=os.environ | {"HOST": "127.0.0.1", "PORT": str(self.port), "PYTHONPATH": path} | settings,
                stdout=output,
                stderr=output,
            )

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    async def status(self, path: str) -> int | None:
        """Return the status of an answer on a connection of its own; None: there is none."""
        try:
            async with asyncio.timeout(5):
                reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
                try:
                    writer.write(f"GET {path} HTTP/1.1\r\nHost: test\r\n\r\n".encode())
                    return int((await reader.readuntil(b"\r\n")).split()[1])
                finally:
                    writer.close()
        except (OSError, EOFError):
            return None

    async def answers(self, path: str, status: int, seconds: float = 30.0) -> float:
        """Wait for this status, and return when it came."""
        async with asyncio.timeout(seconds):
            while await self.status(path) != status:
                assert self.process.poll() is None, self.log
                await asyncio.sleep(0.02)
        return time.monotonic()

    async def ends(self, seconds: float) -> float:
        """Wait until the process has ended, and return when that was."""
        await asyncio.to_thread(self.process.wait, seconds)
        return time.monotonic()


@contextmanager
def running(command: list[str], log: Path, **environment: object) -> Iterator[Service]:
    service = Service(command, log, **environment)
    try:
        yield service
    finally:
        service.process.kill()
        service.process.wait()


# Starting


async def test_p5_a_service_starts_before_its_database_and_serves_once_that_is_there(
    own_server: DatabaseServer, tmp_path: Path, shown: Shown, effort: Effort
) -> None:
    latest = 0.0
    for turn in range(effort(1, 3)):
        own_server.stop()
        with running(COMMAND, tmp_path / f"log {turn}", DATABASE_URL=own_server.url) as service:
            await service.answers("/health/live", 200)
            assert await service.status("/health/ready") == 503
            async with httpx2.AsyncClient(base_url=service.url) as client:
                response = await client.get(USERS)
                assert (response.status_code, response.json()["code"]) == (503, "unavailable")
                assert response.headers["retry-after"] == "1"
            await until(lambda: "attempt 4, next in" in service.log)
            said = re.findall(r"does not answer \((.+?)\); attempt (\d), next in (\d\.\d) s", service.log)
            assert [int(attempt) for _, attempt, _ in said] == [*range(1, len(said) + 1)]
            assert all(reason and float(delay) <= 2 for reason, _, delay in said)

            await asyncio.to_thread(own_server.start)
            begun = time.monotonic()
            latest = max(latest, await service.answers("/health/ready", 200) - begun)
            assert await service.status(USERS) == 200
            assert "is there, at attempt" in service.log
            assert "Traceback" not in service.log
            service.process.terminate()
            await service.ends(10)
            assert service.process.returncode == 0
    shown("P5", f"service before {name_of(own_server)}", ready_after=f"{latest:.1f} s", starts=turn + 1)
    assert latest < 4, "two seconds to notice at most, and the migration"


async def test_p5_a_refused_login_fails_the_start_in_a_line(
    own_server: DatabaseServer, tmp_path: Path, shown: Shown
) -> None:
    wrong = make_url(own_server.url).set(username="nobody_known", password="hunter2")
    begun = time.monotonic()
    with running(COMMAND, tmp_path / "log", DATABASE_URL=wrong.render_as_string(hide_password=False)) as service:
        seconds = await service.ends(30) - begun
        assert service.process.returncode == 1
        assert re.search(r"cannot start: cannot connect to .+: the login was refused \(\w+\)", service.log)
        assert "hunter2" not in service.log
        assert "Traceback" not in service.log
    shown("P5", f"login refused by {name_of(own_server)}", exit_code=1, seconds=f"{seconds:.1f}")


# Stopping


@dataclass
class Load:
    """What clients with keep-alive connections have seen."""

    port: int
    statuses: Counter[int] = field(default_factory=Counter)
    added: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    in_flight: int = 0

    async def client(self, number: int) -> None:
        """Read and write, one request after the other, until the service says that the connection ends."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        requests = 0
        while True:
            requests += 1
            name = f"user_{self.port}_{number}_{requests}"
            body = json.dumps({"email": f"{name}@test.com", "username": name}).encode() if requests % 3 == 0 else b""
            self.in_flight += 1
            try:
                status, is_last = await self._ask(reader, writer, body)
            except (OSError, EOFError) as error:
                self.broken.append(f"{type(error).__name__} after {requests} requests")
                break
            finally:
                self.in_flight -= 1
            self.statuses[status] += 1
            if status == 201:
                self.added.append(name)
            if is_last:
                break
        writer.close()

    async def _ask(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, body: bytes) -> tuple[int, bool]:
        method = "POST" if body else "GET"
        head = f"{method} {USERS} HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        await writer.drain()
        answer = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        length = re.search(r"content-length: (\d+)", answer)
        assert length, answer
        await reader.readexactly(int(length[1]))
        return int(answer.split()[1]), "connection: close" in answer


async def test_p8_sigterm_under_load_finishes_what_is_in_flight_and_resets_nobody(
    own_server: DatabaseServer, tmp_path: Path, shown: Shown, effort: Effort
) -> None:
    drain, requests, slowest = 1.0, 0, 0.0
    for turn in range(effort(1, 5)):
        with running(COMMAND, tmp_path / f"log {turn}", DATABASE_URL=own_server.url, DRAIN_SECONDS=drain) as service:
            await service.answers("/health/ready", 200)
            load = Load(service.port)
            clients = [asyncio.create_task(load.client(number)) for number in range(CLIENTS)]
            await until(lambda: sum(load.statuses.values()) > 3 * CLIENTS, 30)  # noqa: B023 - awaited here
            assert load.in_flight == CLIENTS
            service.process.send_signal(signal.SIGTERM)
            begun = time.monotonic()
            noticed = await service.answers("/health/ready", 503) - begun
            assert await service.status(USERS) == 200, "it serves on while it is not ready"
            await asyncio.gather(*clients)
            seconds = await service.ends(drain + 15) - begun
            assert not load.broken
            assert set(load.statuses) == {200, 201}
            assert noticed < drain
            assert drain <= seconds < drain + 6
            assert service.process.returncode == 0
            assert "leaving: not ready any more" in service.log
            assert "Traceback" not in service.log
            assert not await asyncio.to_thread(connections, own_server.url)
            async with SQLAlchemySession(own_server.url) as session:
                mine = users_table.c.username.like(f"user_{service.port}_%")
                stored = (await session.execute(sa.select(users_table.c.username).where(mine))).scalars().all()
            assert sorted(stored) == sorted(load.added)
        requests, slowest = requests + sum(load.statuses.values()), max(slowest, seconds)
    shown(
        "P8",
        f"SIGTERM under {CLIENTS} clients, {name_of(own_server)}",
        requests=requests,
        reset=0,
        not_ready_after=f"{noticed:.2f} s",
        drain=f"{drain:g} s",
        seconds=f"{slowest:.1f}",
        connections_left=0,
    )


HOLDING = """
import asyncio
import os
from contextlib import asynccontextmanager

import sqlalchemy as sa
from fastapi import FastAPI

from fastapi_building_blocks.api import DrainMiddleware, database_lifespan, health_router
from fastapi_building_blocks.infrastructure import SQLAlchemySession

session = SQLAlchemySession(os.environ["DATABASE_URL"], shutdown_timeout=1.0)


async def hold():
    async with session.transaction() as unit:
        await unit.execute(sa.text("SELECT 1"))
        print("held", flush=True)
        while True:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                print("cancelled", flush=True)
                raise


@asynccontextmanager
async def lifespan(app):
    async with database_lifespan(session)(app):
        holding = asyncio.create_task(hold())
        yield


app = FastAPI(lifespan=lifespan)
app.add_middleware(DrainMiddleware, seconds=0.3)
app.include_router(health_router(session))


@app.get("/hang")
async def hang() -> None:
    async with session.transaction() as unit:
        await unit.execute(sa.text("SELECT 1"))
        print("hanging", flush=True)
        await asyncio.Event().wait()
"""


async def test_p8_a_connection_that_never_returns_does_not_hold_up_the_end(
    own_server: DatabaseServer, tmp_path: Path, shown: Shown
) -> None:
    drain, graceful, shutdown_timeout = 0.3, 1.0, 1.0
    (tmp_path / "holding.py").write_text(HOLDING)
    command = ["-m", "uvicorn", "holding:app", "--app-dir", str(tmp_path), "--port", "{port}"]
    command += ["--timeout-graceful-shutdown", "1"]
    with running(command, tmp_path / "log", DATABASE_URL=own_server.url) as service:
        await service.answers("/health/ready", 200)
        await until(lambda: "held" in service.log)
        hanging = asyncio.create_task(service.status("/hang"))
        await until(lambda: "hanging" in service.log)
        service.process.send_signal(signal.SIGTERM)
        begun = time.monotonic()
        await service.answers("/health/ready", 503)
        seconds = await service.ends(15) - begun
        assert service.process.returncode == -signal.SIGTERM, "as uvicorn's command always ends"
        # One second more, and half a one for uvicorn's own looks at the clock and for Python's end.
        assert drain + graceful + shutdown_timeout < seconds < drain + graceful + shutdown_timeout + 1.5
        assert re.search(r"1 connections to .+ were still in use after 1 s, and are closed", service.log)
        assert await hanging in (500, None)
        await until(lambda: not connections(own_server.url))
    shown(
        "P8",
        f"a connection never returned, {name_of(own_server)}",
        drain_and_timeouts=f"{drain + graceful + shutdown_timeout:g} s",
        seconds=f"{seconds:.1f}",
        connections_left=0,
    )


# Readiness


async def test_p1_readiness_follows_a_server_that_stands_still_and_liveness_does_not(
    own_server: DatabaseServer, tmp_path: Path, shown: Shown, effort: Effort
) -> None:
    turned = back = slowest = 0.0
    probes = 20
    with running(COMMAND, tmp_path / "log", DATABASE_URL=own_server.url) as service:
        await service.answers("/health/ready", 200)
        before = len(connections(own_server.url))

        async def probe(path: str) -> tuple[int | None, float]:
            begun = time.monotonic()
            return await service.status(path), time.monotonic() - begun

        for _ in range(effort(1, 5)):
            begun = time.monotonic()
            own_server.freeze()
            try:
                turned = max(turned, await service.answers("/health/ready", 503) - begun)
                for _ in range(2):
                    answers: list[Any] = await asyncio.gather(*[probe("/health/ready") for _ in range(probes)])
                    assert {status for status, _ in answers} == {503}
                status, seconds = await probe("/health/live")
                assert status == 200
                slowest = max(slowest, seconds)
            finally:
                own_server.thaw()
            begun = time.monotonic()
            back = max(back, await service.answers("/health/ready", 200) - begun)
            more = len(connections(own_server.url)) - before
            assert more <= 2
        assert service.log.count("not ready: ") == service.log.count("ready again") == effort(1, 5)
    shown(
        "P1",
        f"readiness, {name_of(own_server)} frozen",
        not_ready_after=f"{turned:.1f} s",
        ready_after=f"{back:.1f} s",
        live_within=f"{slowest * 1000:.0f} ms",
        probes=probes,
        more_connections=more,
    )
    assert turned < 2
    assert back < 2
