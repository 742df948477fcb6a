"""The consistency header: what a request has written, and what it was told, travels on, signed."""

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from fastapi import FastAPI, HTTPException, WebSocket
from fastapi.responses import StreamingResponse
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from fastapi_building_blocks.api import (
    CONSISTENCY_HEADER,
    ConsistencyMiddleware,
    database_lifespan,
    install_problem_details,
)
from fastapi_building_blocks.infrastructure import SQLAlchemySession, current_consistency_token
from fastapi_building_blocks.infrastructure.database.consistency import ConsistencyTokens, Mark, current_scope
from tests.guarantees.ledger import Accounts, account, opened

SECRET = "a secret of some length"
TOKENS = ConsistencyTokens(SECRET)
PRIMARY, REPLICA = 1, 2


@pytest.fixture
def app(tmp_path: Path) -> FastAPI:
    """One file is the primary, another its replica; each says which it is."""
    urls = [f"sqlite+aiosqlite:///{tmp_path / name}" for name in ("primary.db", "replica.db")]

    async def fill() -> None:
        for url, balance in zip(urls, (PRIMARY, REPLICA), strict=True):
            async with opened(url) as one:
                await Accounts(one).add(account(1, balance))

    asyncio.run(fill())
    session = SQLAlchemySession(urls[0], replica_urls=urls[1:], max_lag=30)
    app = FastAPI(lifespan=database_lifespan(session))
    install_problem_details(app)
    app.add_middleware(ConsistencyMiddleware, secret=SECRET)

    @app.get("/")
    async def where() -> int:
        return (await Accounts(session).get(1)).balance

    @app.post("/")
    async def write() -> int:
        await Accounts(session).upsert(account(5))
        return await where()

    @app.post("/failing")
    async def failing() -> None:
        await Accounts(session).upsert(account(5))
        raise HTTPException(409, "after the write")

    @app.post("/streaming")
    async def streaming() -> StreamingResponse:
        await Accounts(session).upsert(account(5))

        async def parts() -> AsyncIterator[str]:
            for _ in range(3):
                yield f"{(await Accounts(session).get(1)).balance}\n"

        return StreamingResponse(parts(), headers={CONSISTENCY_HEADER: "of the endpoint"})

    @app.post("/onward")
    async def onward() -> list[str | None]:
        before = await current_consistency_token()
        await Accounts(session).upsert(account(5))
        return [before, await current_consistency_token()]

    @app.post("/sync")
    def in_a_thread() -> bool:
        return current_scope.get() is not None

    @app.websocket("/socket")
    async def socket(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.send_json(await where())
        await Accounts(session).upsert(account(5))
        await websocket.send_json(await where())
        await websocket.close()

    return app


@pytest.fixture
def client(app: FastAPI):  # type: ignore[no-untyped-def]
    with TestClient(app) as client:
        yield client


def token_of(response) -> str:  # type: ignore[no-untyped-def]
    assert len(response.headers.get_list(CONSISTENCY_HEADER)) == 1
    return str(response.headers[CONSISTENCY_HEADER])


def test_who_has_read_only_gets_no_token_and_the_replica(client: TestClient) -> None:
    response = client.get("/")
    assert response.json() == REPLICA
    assert CONSISTENCY_HEADER not in response.headers


def test_who_brings_the_token_of_a_write_sees_it_and_others_need_not(client: TestClient) -> None:
    written = client.post("/")
    assert written.json() == PRIMARY
    brought = client.get("/", headers={CONSISTENCY_HEADER: token_of(written)})
    assert brought.json() == PRIMARY
    assert TOKENS.open(token_of(brought).encode()).keys() == TOKENS.open(token_of(written).encode()).keys()
    assert client.get("/").json() == REPLICA


def test_an_answer_that_says_no_has_the_token_as_well(client: TestClient) -> None:
    response = client.post("/failing")
    assert (response.status_code, response.headers["content-type"]) == (409, "application/problem+json")
    assert client.get("/", headers={CONSISTENCY_HEADER: token_of(response)}).json() == PRIMARY


def test_a_stream_is_not_held_up_and_keeps_its_scope_to_its_end(client: TestClient) -> None:
    response = client.post("/streaming")
    assert response.text == f"{PRIMARY}\n" * 3
    assert TOKENS.open(token_of(response).encode())


async def test_nothing_is_buffered() -> None:
    sent: list[str] = []

    async def inner(scope: object, receive: object, send: object) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})  # type: ignore[operator]
        assert sent == ["http.response.start"]
        await send({"type": "http.response.body", "body": b"1", "more_body": True})  # type: ignore[operator]
        assert sent[1:] == ["http.response.body"]

    async def send(message: dict[str, str]) -> None:
        sent.append(message["type"])

    middleware = ConsistencyMiddleware(inner, SECRET)  # type: ignore[arg-type]
    await middleware({"type": "http", "headers": []}, None, send)  # type: ignore[arg-type]
    assert current_scope.get() is None


def test_what_was_told_travels_on_with_what_is_known(client: TestClient) -> None:
    foreign = TOKENS.seal({"ffffffff": Mark({0: 99}, time.monotonic())})
    assert foreign is not None
    read = client.get("/", headers={CONSISTENCY_HEADER: foreign})
    assert read.json() == REPLICA, "it is about another database"
    assert TOKENS.open(token_of(read).encode())["ffffffff"].position == {0: 99}
    written = client.post("/", headers={CONSISTENCY_HEADER: foreign})
    both = TOKENS.open(token_of(written).encode())
    assert len(both) == 2
    assert both["ffffffff"].position == {0: 99}


def test_a_request_to_another_service_takes_the_token_along(client: TestClient) -> None:
    before, after = client.post("/onward").json()
    assert before is None
    assert client.get("/", headers={CONSISTENCY_HEADER: after}).json() == PRIMARY


def test_an_endpoint_in_a_thread_is_in_the_scope(client: TestClient) -> None:
    assert client.post("/sync").json() is True


def test_a_socket_sees_its_own_writes(client: TestClient) -> None:
    with client.websocket_connect("/socket") as socket:
        assert [socket.receive_json(), socket.receive_json()] == [REPLICA, PRIMARY]


NONSENSE = [b"", b"x", b"=" * 40, b"x" * 5000, "é".encode(), b"e30=.e30="]


@pytest.mark.parametrize("token", NONSENSE)
def test_what_cannot_be_verified_reads_from_the_primary(client: TestClient, token: bytes) -> None:
    response = client.get("/", headers=[(CONSISTENCY_HEADER.encode(), token)])
    assert (response.status_code, response.json()) == (200, PRIMARY)
    assert CONSISTENCY_HEADER not in response.headers


def test_a_token_of_another_secret_and_two_at_once_read_from_the_primary(client: TestClient) -> None:
    stranger = ConsistencyTokens("another secret of some length").seal({"a": Mark({0: 1}, time.monotonic())})
    own = TOKENS.seal({"a": Mark({0: 1}, time.monotonic())})
    assert stranger is not None
    assert own is not None
    assert client.get("/", headers={CONSISTENCY_HEADER: stranger}).json() == PRIMARY
    twice = [(CONSISTENCY_HEADER.encode(), own.encode())] * 2
    assert client.get("/", headers=twice).json() == PRIMARY


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(token=st.binary(max_size=300).filter(lambda token: not set(token) & {0, 10, 13}))
def test_any_header_is_answered(client: TestClient, token: bytes) -> None:
    assert client.get("/", headers=[(CONSISTENCY_HEADER.encode(), token)]).status_code == 200


def test_a_secret_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CONSISTENCY_SECRET", raising=False)
    with pytest.raises(ValueError, match="CONSISTENCY_SECRET"):
        ConsistencyMiddleware(FastAPI())
