"""T7 over HTTP: clients that go at any point leave no connection behind and no half of a transaction."""

import asyncio
import gc
import json
import logging
import random
import socket
import struct
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from typing import Annotated, Any

import pytest
import sqlalchemy as sa
from fastapi import Depends, FastAPI, Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

from fastapi_building_blocks.api import (
    BodyLimitMiddleware,
    RequestIdMiddleware,
    database,
    install_problem_details,
    unit_of_work,
)
from fastapi_building_blocks.infrastructure import DatabaseSession, SQLAlchemySession, UnitOfWork
from fastapi_building_blocks.testing import assert_connections_sound
from tests.api.serving import serving
from tests.faults.databases import name_of, on_every_driver
from tests.guarantees.ledger import Accounts, account
from tests.guarantees.mixed_work import Items, items, loaded, losses

CLIENTS = 6
POINTS = {"in the request", "before the answer", "in the answer"}
ROWS = 1500
PAIR, BATCH = "/pairs/{}", "/batches/{}"
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


class Pair(BaseModel):
    owner: str


def application(session: SQLAlchemySession, *, layered: bool) -> FastAPI:
    app = FastAPI()
    install_problem_details(app)
    if layered:
        app.add_middleware(BodyLimitMiddleware)
        app.add_middleware(RequestIdMiddleware)

        @app.middleware("http")  # Starlette's own runs what is below it in a task that it cancels
        async def layer(request: Request, call_next: Callable[[Request], Any]) -> Any:
            return await call_next(request)

    Unit = Annotated[UnitOfWork, Depends(unit_of_work(session), scope="function")]  # noqa: N806
    Reads = Annotated[DatabaseSession, Depends(database(session))]  # noqa: N806

    @app.post(PAIR.format("{number}"), status_code=201)
    async def add_pair(number: int, body: Pair, unit: Unit) -> None:
        await Accounts(unit).add(account(number * 2, owner=body.owner))
        async with unit.savepoint():
            await Accounts(unit).add(account(number * 2 + 1, owner=body.owner))

    @app.post(BATCH.format("{number}"), status_code=201)
    async def add_batch(number: int, body: Pair, unit: Unit) -> None:
        await Items(unit).add_many(items(number))

    @app.get("/accounts")
    async def stream(reads: Reads) -> StreamingResponse:
        async def lines() -> AsyncIterator[str]:
            async for one in Accounts(reads).stream(sort="id", batch_size=50):
                yield f"{one.id} {one.number} {'.' * 200}\n"

        return StreamingResponse(lines())

    @app.get("/rows")
    async def stream_rows(reads: Reads) -> StreamingResponse:
        async def lines() -> AsyncIterator[str]:
            async for row in reads.stream(sa.select(Accounts.table)):
                yield f"{row.id} {row.number} {'.' * 200}\n"

        return StreamingResponse(lines())

    @app.get("/accounts/{number}")
    async def show(number: int, reads: Reads) -> str:
        return (await Accounts(reads).get(number)).number

    return app


class Visits:
    """Requests whose clients go at a random point: before all of it is sent, before the answer, in it or after it."""

    def __init__(self, port: int, seed: str) -> None:
        self._port = port
        self._chance = random.Random(seed)
        self.left: Counter[str] = Counter()
        """How far clients came."""
        self.refused: Counter[str] = Counter()
        """Status lines other than a success."""
        self.acknowledged: set[int] = set()
        self.acknowledged_batches: set[int] = set()

    async def visit(self, number: int) -> None:
        kind = self._chance.choices(("pair", "batch", "/accounts", "/rows", "/accounts/3"), (40, 10, 25, 15, 10))[0]
        received = await self._until_it_goes(*self._request(kind, number))
        status = received.partition(b"\r\n")[0].decode()
        if status and not status.startswith("HTTP/1.1 20"):
            self.refused[status] += 1
        elif status and kind == "pair":
            self.acknowledged |= {number * 2, number * 2 + 1}
        elif status and kind == "batch":
            self.acknowledged_batches.add(number)

    def _request(self, kind: str, number: int) -> tuple[bytes, float]:
        """Return a request, and the seconds that its answer may be read at most."""
        if kind.startswith("/"):
            return f"GET {kind} HTTP/1.1\r\nHost: here\r\nConnection: close\r\n\r\n".encode(), 0.08
        body = json.dumps({"owner": "x" * 80})
        path = (PAIR if kind == "pair" else BATCH).format(number)
        head = f"POST {path} HTTP/1.1\r\nHost: here\r\nConnection: close\r\nContent-Type: application/json\r\n"
        return f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode(), 0.02 if kind == "pair" else 0.08

    async def _until_it_goes(self, request: bytes, longest: float) -> bytes:
        loop, chance = asyncio.get_running_loop(), self._chance
        received = b""
        with socket.socket() as client:
            client.setblocking(False)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)  # or all of an answer would be on its way
            await loop.sock_connect(client, ("127.0.0.1", self._port))
            if chance.random() < 0.1:
                await loop.sock_sendall(client, request[: chance.randrange(1, len(request))])
                await asyncio.sleep(chance.uniform(0, 0.005))
                self.left["in the request"] += 1
            else:
                await loop.sock_sendall(client, request)
                ended = False
                with suppress(TimeoutError):
                    async with asyncio.timeout(chance.uniform(0, longest)):
                        while data := await loop.sock_recv(client, 4096):
                            received += data
                        ended = True
                self.left["after it" if ended else "in the answer" if received else "before the answer"] += 1
            if chance.random() < 0.5:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        return received


@pytest.fixture
def without_garbage_collection() -> Iterator[None]:
    """What comes back at the next full collection has leaked until then."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("without_garbage_collection")
@pytest.mark.parametrize("layered", [False, True], ids=["bare", "middleware"])
@on_every_driver
async def test_t7_clients_that_go_leave_nothing_behind(
    database_url: str,
    layered: bool,
    effort: Callable[[int, int], int],
    shown: Callable[..., None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    wanted = effort(20, 500)
    async with loaded(database_url, pool_size=3, max_overflow=2) as session:
        await Accounts(session).add_many([account(-number) for number in range(1, ROWS)])
        async with serving(application(session, layered=layered)) as url:
            visits = Visits(int(url.rpartition(":")[2]), name_of(database_url))
            numbers = iter(range(100, 100 + 10 * wanted))

            async def client() -> None:
                while visits.left.total() - visits.left["after it"] < wanted or not set(visits.left) >= POINTS:
                    await visits.visit(next(numbers))

            await asyncio.gather(*[client() for _ in range(CLIENTS)])
            await assert_connections_sound(session, within=5)
        await assert_connections_sound(session)
        losses_seen = await losses(session, visits.acknowledged, visits.acknowledged_batches)
        leaked = session.pool_status().checked_out
    errors = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
    gone = visits.left.total() - visits.left["after it"]
    points = ", ".join(f"{count} {point}" for point, count in sorted(visits.left.items()) if point != "after it")
    shown(
        "T7",
        f"HTTP clients that go{', below middleware' if layered else ''}: {name_of(database_url)}",
        gone=f"{gone} ({points})",
        answers_5xx=sum(count for status, count in visits.refused.items() if " 5" in status),
        errors_logged=len(errors),
        leaked=leaked,
        **losses_seen,
    )
    assert not visits.refused
    assert errors == []
    assert losses_seen == {"lost": 0, "torn": 0}
    assert leaked == 0
    assert set(visits.left) >= POINTS
