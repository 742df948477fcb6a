import json
import logging
import sqlite3
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

import httpx2
import pytest
from fastapi import APIRouter, Body, FastAPI, HTTPException, Query, Request, WebSocket
from fastapi.middleware.cors import CORSMiddleware
from pydantic import BaseModel, Field, field_validator
from starlette.responses import StreamingResponse
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from fastapi_building_blocks import domain
from fastapi_building_blocks.api import RequestIdMiddleware, install_problem_details, problem_responses
from fastapi_building_blocks.api.problem_details import status_of
from tests.api.serving import serving

KEYS = {"type", "title", "status", "detail", "instance", "code", "request_id"}


class Address(BaseModel):
    city: str


class Person(BaseModel):
    name: str = Field(min_length=2)
    age: int
    addresses: list[Address] = []

    @field_validator("name")
    @classmethod
    def not_root(cls, name: str) -> str:
        if name == "root":
            raise ValueError("this name is reserved")
        return name


def application(*, error: Exception | None = None) -> FastAPI:
    app = FastAPI()
    install_problem_details(app)

    @app.api_route("/raise", methods=["GET", "PATCH"], include_in_schema=False)
    async def fail() -> None:
        assert error is not None
        raise error

    @app.post("/people")
    async def add(person: Person, limit: Annotated[int, Query(ge=1)] = 1) -> Person:
        return person

    return app


def answer(error: Exception, **kwargs: Any) -> Any:
    return TestClient(application(error=error)).get("/raise", **kwargs)


def every_error_class() -> list[type[domain.BuildingBlocksError]]:
    return [
        value
        for value in vars(domain).values()
        if isinstance(value, type) and issubclass(value, domain.BuildingBlocksError)
    ]


STATUSES = {
    "building_blocks": 500,
    "not_found": 404,
    "conflict": 409,
    "duplicate_key": 409,
    "foreign_key": 409,
    "lock_not_available": 409,
    "stale_version": 409,
    "multiple_results": 500,
    "invalid_input": 400,
    "invalid_query": 400,
    "constraint": 400,
    "unsupported_operation": 501,
    "unavailable": 503,
    "transient": 503,
    "deadlock": 503,
    "serialization": 503,
    "connection_lost": 503,
    "commit_outcome_unknown": 503,
    "circuit_open": 503,
    "deadline_exceeded": 504,
    "pool_timeout": 504,
    "statement_timeout": 504,
}


def test_the_table_of_statuses_is_total() -> None:
    assert {kind.code for kind in every_error_class()} == set(STATUSES)


@pytest.mark.parametrize("kind", every_error_class(), ids=lambda kind: kind.__name__)
def test_every_error_of_the_tree_has_its_status_code_and_media_type(kind: type[domain.BuildingBlocksError]) -> None:
    response = answer(kind("what happened"))
    assert response.status_code == STATUSES[kind.code]
    assert response.headers["content-type"] == "application/problem+json"
    body = response.json()
    assert set(body) == KEYS
    assert body["status"] == response.status_code
    assert body["code"] == kind.code
    assert body["detail"] == "what happened"
    assert body["instance"] == "/raise"
    assert body["type"] == "about:blank"


def test_an_error_class_of_the_service_has_the_status_of_its_parent_and_its_own_code() -> None:
    class SeatTakenError(domain.ConflictError):
        """Someone sits there."""

    response = answer(SeatTakenError("seat 7 is taken"))
    assert (response.status_code, response.json()["code"]) == (409, "seat_taken")


def test_fields_of_a_domain_error_are_listed() -> None:
    response = answer(domain.DuplicateKeyError("the email is taken", fields=["email"]))
    assert response.json()["errors"] == [{"field": "email", "message": "the email is taken", "code": "duplicate_key"}]


def test_a_stale_version_is_412_only_where_the_request_was_conditional() -> None:
    client = TestClient(application(error=domain.StaleVersionError("it has changed")))
    assert client.patch("/raise").status_code == 409
    conditional = client.patch("/raise", headers={"If-Match": '"1"'})
    assert conditional.status_code == 412
    assert conditional.json()["title"] == "Precondition Failed"


@pytest.mark.parametrize(
    ("error", "header"),
    [
        (domain.UnavailableError("x"), "1"),
        (domain.DeadlockError("x"), "1"),
        (domain.CommitOutcomeUnknownError("x"), None),
        (domain.PoolTimeoutError("x"), None),
    ],
)
def test_retry_after_says_when_to_try_again_unless_that_could_do_it_twice(error: Exception, header: str | None) -> None:
    assert answer(error).headers.get("retry-after") == header


def test_retry_after_is_whole_seconds_rounded_up() -> None:
    error = domain.CircuitOpenError("x")
    error.retry_after = 2.2
    assert answer(error).headers["retry-after"] == "3"


def test_request_validation_is_400_and_names_each_field() -> None:
    body = {"name": "x", "addresses": [{"city": "Rome"}, {}]}
    response = TestClient(application()).post("/people?limit=0", json=body)
    assert response.status_code == 400
    problem = response.json()
    assert problem["code"] == "request_validation"
    assert {item["field"]: item["code"] for item in problem["errors"]} == {
        "limit": "greater_than_equal",
        "name": "string_too_short",
        "age": "missing",
        "addresses.1.city": "missing",
    }
    assert all(set(item) == {"field", "message", "code"} for item in problem["errors"])


def test_validation_never_echoes_the_input_nor_chokes_on_a_validators_exception() -> None:
    response = TestClient(application()).post("/people", json={"name": "root", "age": "my-secret"})
    assert response.status_code == 400
    assert "my-secret" not in response.text
    assert response.json()["errors"][0]["message"] == "Value error, this name is reserved"


def test_an_unknown_tag_of_a_union_is_not_repeated() -> None:
    class Cat(BaseModel):
        kind: Literal["cat"]

    class Dog(BaseModel):
        kind: Literal["dog"]

    app = FastAPI()
    install_problem_details(app)

    @app.post("/pets")
    async def add(pet: Annotated[Cat | Dog, Body(discriminator="kind")]) -> None:
        pass

    response = TestClient(app).post("/pets", json={"kind": "my-secret"})
    assert response.status_code == 400
    assert "my-secret" not in response.text
    assert "'cat', 'dog'" in response.json()["errors"][0]["message"]


@pytest.mark.parametrize(
    "body", [b"{", b"", b"[1,", b"nul", b"\xff\xfe", b'{"name": "\xff"}', b"[" * 100_000, b"9" * 5000]
)
def test_malformed_json_is_400(body: bytes) -> None:
    response = TestClient(application()).post("/people", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert response.headers["content-type"] == "application/problem+json"
    for item in response.json().get("errors", []):
        assert item["field"] == "body"


def test_a_lone_surrogate_in_a_body_is_400() -> None:
    body = b'{"name": "\\ud800abc", "age": 1}'
    response = TestClient(application()).post("/people", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400
    response.content.decode()


def test_thousands_of_wrong_fields_make_a_bounded_answer() -> None:
    body = {"name": "ab", "age": 1, "addresses": [{}] * 5000}
    response = TestClient(application()).post("/people", json=body)
    assert len(response.json()["errors"]) == 100


def test_a_detail_with_lone_surrogates_is_still_utf_8() -> None:
    response = answer(domain.NotFoundError("no user \ud800 \U0001f600"))
    assert response.status_code == 404
    assert json.loads(response.content.decode())["detail"] == "no user ? \U0001f600"


def test_an_unknown_path_is_a_problem_with_its_path_escaped_and_without_its_query() -> None:
    response = TestClient(application()).get("/n%20o/%22%C3%A9?token=secret")
    assert response.status_code == 404
    assert response.json()["instance"] == "/n%20o/%22%C3%A9"
    assert response.json()["code"] == "not_found"


def test_405_keeps_its_allow_header() -> None:
    response = TestClient(application()).put("/people", json={})
    assert response.status_code == 405
    assert response.headers["allow"] == "POST"
    assert response.json()["code"] == "method_not_allowed"


@pytest.mark.parametrize(
    ("error", "code", "detail"),
    [
        (HTTPException(401, headers={"WWW-Authenticate": "Bearer"}), "unauthorized", "Unauthorized"),
        (HTTPException(418, "short and stout"), "im_a_teapot", "short and stout"),
        (HTTPException(413), "content_too_large", None),
        (HTTPException(499, "gone"), "status_499", "gone"),
        (HTTPException(400, {"reason": "size"}), "bad_request", '{"reason": "size"}'),
        (HTTPException(500, "broken"), "internal", "broken"),
    ],
)
def test_http_exceptions_keep_status_detail_and_headers(error: HTTPException, code: str, detail: str | None) -> None:
    response = answer(error)
    assert response.status_code == error.status_code
    assert response.json()["code"] == code
    assert detail is None or response.json()["detail"] == detail
    for name, value in (error.headers or {}).items():
        assert response.headers[name] == value


def test_an_http_exception_without_a_body_has_none() -> None:
    response = answer(HTTPException(304, headers={"ETag": '"1"'}))
    assert (response.status_code, response.content, response.headers["etag"]) == (304, b"", '"1"')


def test_the_unexpected_is_a_500_that_tells_nothing_and_one_stack_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    app = application(error=KeyError("password=hunter2"))
    app.add_middleware(RequestIdMiddleware)
    # raise_server_exceptions is on: nothing is raised a second time for the server to log.
    response = TestClient(app).get("/raise", headers={"X-Request-ID": "abc-1"})
    assert response.status_code == 500
    assert response.headers["content-type"] == "application/problem+json"
    assert response.headers["x-request-id"] == "abc-1"
    assert response.json()["code"] == "internal"
    assert response.json()["request_id"] == "abc-1"
    assert "hunter2" not in response.text
    stacks = [record for record in caplog.records if record.exc_info]
    assert len(stacks) == 1
    assert "abc-1" in stacks[0].getMessage()


def test_a_500_passes_through_cors_wherever_that_was_added() -> None:
    app = FastAPI()
    app.add_middleware(CORSMiddleware, allow_origins=["*"])
    app.add_middleware(RequestIdMiddleware)
    install_problem_details(app)

    @app.get("/")
    async def fail() -> None:
        raise ZeroDivisionError

    response = TestClient(app).get("/", headers={"Origin": "https://example.org"})
    assert response.status_code == 500
    assert response.headers["access-control-allow-origin"] == "*"
    assert response.headers["x-request-id"] == response.json()["request_id"]


def test_an_error_in_a_middleware_outside_is_a_problem_too_and_left_to_the_server_to_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    app = application()
    app.add_middleware(RequestIdMiddleware)

    @app.middleware("http")
    async def broken(request: Request, call_next: Any) -> Any:
        await call_next(request)
        raise ZeroDivisionError("secret")

    response = TestClient(app, raise_server_exceptions=False).get("/people")
    assert response.status_code == 500
    assert response.headers["content-type"] == "application/problem+json"
    assert response.headers["x-request-id"] == response.json()["request_id"]
    assert "secret" not in response.text
    assert not [record for record in caplog.records if record.exc_info]


def test_an_error_after_the_response_has_started_breaks_it_off(caplog: pytest.LogCaptureFixture) -> None:
    app = FastAPI()
    install_problem_details(app)

    @app.get("/")
    async def stream() -> StreamingResponse:
        async def chunks() -> AsyncIterator[bytes]:
            yield b"half"
            raise ZeroDivisionError

        return StreamingResponse(chunks())

    with pytest.raises(ZeroDivisionError):
        TestClient(app).get("/")
    assert "broken off" in caplog.text
    assert not [record for record in caplog.records if record.exc_info]  # the server logs what it is given


async def test_on_a_real_server_the_log_has_one_stack_of_each_error(caplog: pytest.LogCaptureFixture) -> None:
    app = application(error=ZeroDivisionError())

    @app.get("/stream", include_in_schema=False)
    async def stream() -> StreamingResponse:
        async def chunks() -> AsyncIterator[bytes]:
            yield b"half"
            raise ZeroDivisionError

        return StreamingResponse(chunks())

    async with serving(app) as url, httpx2.AsyncClient(base_url=url) as client:
        response = await client.get("/raise")
        assert response.status_code == 500
        assert response.headers["content-type"] == "application/problem+json"
        assert len([record for record in caplog.records if record.exc_info]) == 1
        with pytest.raises(httpx2.RemoteProtocolError):
            await client.get("/stream")
        assert len([record for record in caplog.records if record.exc_info]) == 2


def test_5xx_of_the_tree_are_logged_without_a_stack(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        answer(domain.PoolTimeoutError("no connection became free"))
        answer(domain.NotFoundError("no such user"))
    (record,) = caplog.records
    assert "pool_timeout" in record.getMessage()
    assert record.exc_info is None


class DriverError(Exception):
    sqlstate = "42703"


def test_a_500_of_the_tree_is_logged_with_its_origin_and_without_what_the_driver_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    app = FastAPI()
    install_problem_details(app)

    def where_it_began(cause: Exception) -> None:
        raise cause

    @app.get("/{number}")
    async def fail(number: int) -> None:
        causes = [DriverError("password=hunter2"), RuntimeError(1054, "password=hunter2"), sqlite3.DataError()]
        try:
            where_it_began(causes[number])
        except Exception as cause:
            raise domain.BuildingBlocksError("the database refused the statement") from cause

    for number, origin in enumerate(["DriverError 42703", "builtins.RuntimeError 1054", "sqlite3.DataError"]):
        caplog.clear()
        response = TestClient(app).get(f"/{number}")
        assert response.status_code == 500
        assert origin not in response.text
        (record,) = caplog.records
        logged = record.getMessage()
        assert record.levelno == logging.ERROR
        assert f"GET /{number} (request -)" in logged
        assert "the database refused the statement" in logged
        assert origin in logged
        assert "in where_it_began" in logged
        assert logged.index(origin) < logged.index("domain.errors.BuildingBlocksError")
        assert "hunter2" not in caplog.text


def test_a_domain_error_refuses_a_websocket_and_closes_an_accepted_one() -> None:
    app = FastAPI()
    install_problem_details(app)

    @app.websocket("/refused")
    async def refused(websocket: WebSocket) -> None:
        raise domain.NotFoundError("no such room")

    @app.websocket("/closed")
    async def closed(websocket: WebSocket) -> None:
        await websocket.accept()
        raise domain.UnavailableError("gone")

    client = TestClient(app)
    with pytest.raises(WebSocketDisconnect) as refusal, client.websocket_connect("/refused"):
        pass
    assert refusal.value.__class__.__name__ == "WebSocketDenialResponse"
    with client.websocket_connect("/closed") as websocket:
        assert websocket.receive()["code"] == 1011


def test_installing_after_the_start_is_refused() -> None:
    app = FastAPI()
    TestClient(app).get("/")
    with pytest.raises(RuntimeError, match="before the application starts"):
        install_problem_details(app)


# The OpenAPI document


def documented() -> dict[str, Any]:
    app = application()
    inner, outer = APIRouter(), APIRouter()

    @inner.get("/items/{item}", responses=problem_responses(404))
    async def item(item: int) -> int:
        return item

    @inner.get("/plain")
    async def plain() -> None:
        pass

    outer.include_router(inner, prefix="/inner")
    app.include_router(outer, prefix="/outer")
    return app.openapi()


def test_openapi_lists_400_where_fastapi_would_list_422_in_nested_routers_too() -> None:
    document = documented()
    for path, method in (("/people", "post"), ("/outer/inner/items/{item}", "get")):
        responses = document["paths"][path][method]["responses"]
        assert "422" not in responses
        schema = responses["400"]["content"]["application/problem+json"]["schema"]
        assert schema == {"$ref": "#/components/schemas/ProblemDetails"}
    assert "400" not in document["paths"]["/outer/inner/plain"]["get"]["responses"]
    assert "HTTPValidationError" not in json.dumps(document)


def test_openapi_documents_every_other_problem_by_default_and_the_declared_ones() -> None:
    document = documented()
    for path in document["paths"].values():
        for operation in path.values():
            assert "application/problem+json" in operation["responses"]["default"]["content"]
    responses = document["paths"]["/outer/inner/items/{item}"]["get"]["responses"]
    assert list(responses["404"]["content"]) == ["application/problem+json"]


def test_the_document_is_made_once_and_again_when_routes_are_added() -> None:
    app = application()
    first = app.openapi()
    assert app.openapi() is first

    @app.get("/late/{number}")
    async def late(number: int) -> None:
        pass

    assert "400" in app.openapi()["paths"]["/late/{number}"]["get"]["responses"]


def test_a_problem_keeps_the_documented_schema() -> None:
    import jsonschema

    document = documented()
    schema = {"$ref": "#/components/schemas/ProblemDetails", "components": document["components"]}
    client = TestClient(application())
    for response in (client.get("/nowhere"), client.post("/people", json={})):
        jsonschema.validate(response.json(), schema)


def test_a_handwritten_422_is_left_alone() -> None:
    app = FastAPI()
    install_problem_details(app)

    @app.get("/{number}", responses={422: {"description": "mine"}})
    async def mine(number: int) -> None:
        pass

    responses = app.openapi()["paths"]["/{number}"]["get"]["responses"]
    assert responses["422"] == {"description": "mine"}
    assert "400" in responses


def test_status_of_takes_the_nearest_ancestor() -> None:
    request = Request({"type": "http", "headers": [], "path": "/"})
    assert status_of(domain.SerializationError("x"), request) == 503
