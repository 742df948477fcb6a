import asyncio
import logging
from collections.abc import AsyncIterator

import httpx2
import pytest
from fastapi import BackgroundTasks, FastAPI, Request, WebSocket
from starlette.responses import StreamingResponse
from starlette.testclient import TestClient

from fastapi_building_blocks.api import (
    BodyLimitMiddleware,
    DeadlineMiddleware,
    RequestIdFilter,
    RequestIdMiddleware,
    install_problem_details,
    request_id,
)
from fastapi_building_blocks.infrastructure import time_left
from tests.api.serving import serving


@pytest.fixture
def app() -> FastAPI:
    app = FastAPI()
    app.add_middleware(RequestIdMiddleware)

    @app.get("/")
    async def show(request: Request) -> dict[str, str | None]:
        return {"context": request_id(), "state": request.state.request_id}

    @app.get("/stream")
    async def stream() -> StreamingResponse:
        async def chunks() -> AsyncIterator[str]:
            for _ in range(3):
                yield f"{request_id()}\n"
                await asyncio.sleep(0)

        return StreamingResponse(chunks(), headers={"X-Request-Id": "of the endpoint"})

    @app.websocket("/socket")
    async def socket(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.send_text(str(request_id()))
        await websocket.close()

    return app


def test_a_sane_request_id_is_taken_and_answered(app: FastAPI) -> None:
    response = TestClient(app).get("/", headers={"X-Request-ID": "order-7/~!"})
    assert response.headers["x-request-id"] == "order-7/~!"
    assert response.json() == {"context": "order-7/~!", "state": "order-7/~!"}


@pytest.mark.parametrize("given", [b"", b"a b", b"\xe9t\xe9", b"x" * 129, b"tab\there", b"\x7f"])
def test_any_other_request_id_is_replaced(app: FastAPI, given: bytes) -> None:
    response = TestClient(app).get("/", headers=[(b"x-request-id", given)])
    made = response.headers["x-request-id"]
    assert len(made) == 32
    assert int(made, 16)
    assert response.json()["context"] == made


def test_requests_without_an_id_get_different_ones(app: FastAPI) -> None:
    client = TestClient(app)
    assert client.get("/").headers["x-request-id"] != client.get("/").headers["x-request-id"]


def test_a_streamed_response_keeps_one_id_to_its_end(app: FastAPI) -> None:
    response = TestClient(app).get("/stream", headers={"X-Request-ID": "s1"})
    assert response.text == "s1\n" * 3
    assert response.headers.get_list("x-request-id") == ["s1"]


async def test_nothing_is_buffered(app: FastAPI) -> None:
    sent: list[str] = []

    async def inner(scope: object, receive: object, send: object) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})  # type: ignore[operator]
        assert sent == ["http.response.start"]
        await send({"type": "http.response.body", "body": b"1", "more_body": True})  # type: ignore[operator]
        assert sent[1:] == ["http.response.body"]

    async def send(message: dict[str, str]) -> None:
        sent.append(message["type"])

    await RequestIdMiddleware(inner)({"type": "http", "headers": []}, None, send)  # type: ignore[arg-type]


def test_a_websocket_has_a_request_id(app: FastAPI) -> None:
    with TestClient(app).websocket_connect("/socket", headers={"X-Request-ID": "w1"}) as websocket:
        assert websocket.receive_text() == "w1"
        assert (b"x-request-id", b"w1") in (websocket.extra_headers or [])


def test_log_records_carry_the_request_id(app: FastAPI, caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("service")

    @app.get("/log")
    async def log() -> None:
        logger.warning("working")

    caplog.handler.addFilter(RequestIdFilter())
    TestClient(app).get("/log", headers={"X-Request-ID": "l1"})
    logger.warning("idle")
    assert [record.request_id for record in caplog.records] == ["l1", "-"]  # type: ignore[attr-defined]


def test_outside_of_a_request_there_is_no_id() -> None:
    assert request_id() is None


@pytest.fixture
def limited() -> FastAPI:
    app = FastAPI()
    install_problem_details(app)
    app.add_middleware(BodyLimitMiddleware, max_bytes=1000)
    app.add_middleware(RequestIdMiddleware)

    @app.post("/")
    async def count(body: list[int]) -> int:
        return len(body)

    @app.post("/raw")
    async def raw(request: Request) -> int:
        return len(await request.body())

    @app.post("/unread")
    async def unread() -> None:
        pass

    @app.websocket("/socket")
    async def socket(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.send_text(str(len(await websocket.receive_text())))
        await websocket.close()

    return app


async def in_chunks(size: int) -> AsyncIterator[bytes]:
    for start in range(0, size, 300):
        yield b" " * min(300, size - start)


@pytest.mark.parametrize("path", ["/raw", "/"])
async def test_a_body_over_the_limit_is_a_413_problem_with_or_without_its_length(limited: FastAPI, path: str) -> None:
    async with serving(limited) as url, httpx2.AsyncClient(base_url=url) as client:
        for content in (b" " * 1001, in_chunks(1001)):
            response = await client.post(path, content=content, headers={"X-Request-ID": "b1"})
            problem = response.json()
            assert (response.status_code, problem["code"], problem["status"]) == (413, "content_too_large", 413)
            assert response.headers["content-type"] == "application/problem+json"
            assert problem["request_id"] == "b1"


async def test_a_body_of_the_limit_passes(limited: FastAPI) -> None:
    async with serving(limited) as url, httpx2.AsyncClient(base_url=url) as client:
        for content in (b" " * 1000, in_chunks(1000), b""):
            assert (await client.post("/raw", content=content)).status_code == 200
        assert (await client.post("/", json=[1] * 300)).json() == 300


async def test_a_length_over_the_limit_is_refused_unread(limited: FastAPI) -> None:
    for length in (b"1001", b"0" * 5000 + b"1001", b"9" * 5000):
        response = TestClient(limited).post("/unread", headers=[(b"content-length", length)])
        assert response.status_code == 413


def test_the_limit_leaves_websockets_alone(limited: FastAPI) -> None:
    with TestClient(limited).websocket_connect("/socket") as websocket:
        websocket.send_text("x" * 2000)
        assert websocket.receive_text() == "2000"


async def test_a_streamed_answer_is_finished_though_the_body_was_too_long(limited: FastAPI) -> None:
    @limited.post("/answers")
    async def answers() -> StreamingResponse:
        async def parts() -> AsyncIterator[bytes]:
            for _ in range(20):
                yield b"x" * 100
                await asyncio.sleep(0.005)

        return StreamingResponse(parts())

    async with serving(limited) as url, httpx2.AsyncClient(base_url=url) as client:
        response = await client.post("/answers", content=in_chunks(5000))
        assert (response.status_code, len(response.content)) == (200, 2000)


# Deadlines


def timed_app(seconds: float) -> FastAPI:
    app = FastAPI()
    install_problem_details(app)
    app.add_middleware(DeadlineMiddleware, seconds=seconds)

    @app.get("/left")
    async def left() -> float | None:
        return time_left()

    @app.get("/slow")
    async def slow() -> None:
        await asyncio.sleep(seconds)
        time_left()

    @app.get("/stream")
    async def stream() -> StreamingResponse:
        async def chunks() -> AsyncIterator[str]:
            yield str(time_left())

        return StreamingResponse(chunks())

    @app.get("/background")
    async def background(tasks: BackgroundTasks) -> None:
        tasks.add_task(lambda: setattr(app.state, "left", time_left()))

    @app.websocket("/socket")
    async def socket(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.send_json(time_left())
        await websocket.close()

    return app


def test_a_request_has_one_deadline_and_so_have_its_stream_and_its_background_tasks() -> None:
    app = timed_app(5.0)
    client = TestClient(app)
    for _ in range(2):
        assert 4.0 < client.get("/left").json() < 5.0
    assert 4.0 < float(client.get("/stream").text) < 5.0
    client.get("/background")
    assert 4.0 < app.state.left < 5.0
    assert time_left() is None


def test_a_request_whose_time_is_over_is_a_504_problem() -> None:
    response = TestClient(timed_app(0.02)).get("/slow")
    assert response.status_code == 504
    assert response.json()["code"] == "deadline_exceeded"


def test_a_websocket_has_no_deadline() -> None:
    with TestClient(timed_app(5.0)).websocket_connect("/socket") as socket:
        assert socket.receive_json() is None


@pytest.mark.parametrize("seconds", [0, -1.0, float("nan")])
def test_a_deadline_that_makes_no_sense_is_refused(seconds: float) -> None:
    with pytest.raises(ValueError, match="greater than 0"):
        DeadlineMiddleware(FastAPI(), seconds=seconds)
