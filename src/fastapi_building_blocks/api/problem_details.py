"""Errors over HTTP, as problem details (RFC 9457); the only place that knows the statuses of the error tree."""

import json
import logging
import math
import re
import traceback
from collections.abc import Iterable, Mapping
from http import HTTPStatus
from typing import Any
from urllib.parse import quote

from fastapi import FastAPI
from fastapi.encoders import jsonable_encoder
from fastapi.exceptions import RequestValidationError
from fastapi.utils import is_body_allowed_for_status_code
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import HTTPConnection, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocket, WebSocketState

from fastapi_building_blocks.domain.errors import (
    BuildingBlocksError,
    ConflictError,
    DeadlineExceededError,
    InvalidInputError,
    MultipleResultsError,
    NotFoundError,
    StaleVersionError,
    UnavailableError,
    UnsupportedOperationError,
)

from .openapi_document import PROBLEM_MEDIA_TYPE, described, problem_reference
from .route_dependants import methods_of_path

logger = logging.getLogger(__name__)

_STATUSES: dict[type[BuildingBlocksError], int] = {
    NotFoundError: 404,
    ConflictError: 409,
    MultipleResultsError: 500,
    InvalidInputError: 400,
    UnsupportedOperationError: 501,
    UnavailableError: 503,
    DeadlineExceededError: 504,
    BuildingBlocksError: 500,
}
# Where Python's phrases differ between its versions, those of RFC 9110.
_PHRASES = {
    413: "Content Too Large",
    414: "URI Too Long",
    416: "Range Not Satisfiable",
    422: "Unprocessable Content",
}
_INTERNAL = "internal"
_UNEXPECTED = "An unexpected error occurred."
_MOST_ERRORS = 100
_MOST_CAUSES = 10
_LONGEST_FIELD = 200
_LONGEST_MESSAGE = 500
_WEBSOCKET_INTERNAL_ERROR = 1011

FieldErrors = Iterable[Mapping[str, str]]


class FieldProblem(BaseModel):
    """What is wrong with one field or parameter."""

    field: str = Field(description="The field's path in the body, or the parameter's name.", examples=["email"])
    message: str = Field(description="What is wrong with it.", examples=["Field required"])
    code: str = Field(description="A stable code for what is wrong.", examples=["missing"])


class ProblemDetails(BaseModel):
    """An error, machine-readable (RFC 9457)."""

    type: str = Field(description="Always `about:blank`: `code` tells problems apart.", examples=["about:blank"])
    title: str = Field(description="The status in words.", examples=["Not Found"])
    status: int = Field(description="The HTTP status.", ge=100, le=599, examples=[404])
    detail: str = Field(description="What happened, for a person.", examples=["there is no user with this id"])
    instance: str = Field(description="The path of the request.", examples=["/api/v1/users/7"])
    code: str = Field(description="A stable code for what happened.", examples=["not_found"])
    request_id: str | None = Field(description="The request's id in the logs, if it has one.")
    errors: list[FieldProblem] = Field(default=[], description="The fields concerned, where there are any.")


def status_of(error: BuildingBlocksError, request: HTTPConnection) -> int:
    """Return the HTTP status of an error of the domain's tree; a subclass has that of its nearest parent."""
    if isinstance(error, StaleVersionError) and "if-match" in request.headers:
        return 412  # RFC 9110, 13.1.1
    return next(_STATUSES[kind] for kind in type(error).__mro__ if kind in _STATUSES)


def problem_response(
    request: HTTPConnection,
    status: int,
    detail: str,
    *,
    code: str | None = None,
    errors: FieldErrors = (),
    headers: Mapping[str, str] | None = None,
) -> Response:
    """Return an ``application/problem+json`` response.

    Args:
        code: None: the status's own, such as ``method_not_allowed``.
        errors: ``{"field", "message", "code"}`` for each field concerned.
    """
    title = _phrase(status)
    content: dict[str, Any] = {
        "type": "about:blank",
        "title": title,
        "status": status,
        "detail": detail,
        "instance": quote(request.scope["path"], safe="/:@!$&'()*+,;=~", errors="replace"),
        "code": code or _code(status, title),
        "request_id": request.scope.get("state", {}).get("request_id"),
    }
    if listed := list(errors):
        content["errors"] = listed
    # Text may hold lone surrogates, which are no UTF-8: they become question marks, not a failure to answer.
    body = json.dumps(content, ensure_ascii=False).encode("utf-8", "replace")
    return Response(body, status, headers, PROBLEM_MEDIA_TYPE)


def problem_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return what documents these statuses of a route as problems: ``responses=problem_responses(404, 409)``.

    The application needs ``install_problem_details``, which supplies the schema and documents every other problem.
    """
    return {status: problem_reference(_phrase(status)) for status in statuses}


def install_problem_details(app: FastAPI) -> None:
    """Answer every error as ``application/problem+json``, and say so in the OpenAPI document.

    Errors of the domain's tree have the statuses of its classes, request validation is a 400, HTTPException keeps
    its status and headers, and anything else is a 500 that tells nothing, with the stack in the log. ``code`` is
    the error's class in snake case without ``_error`` (``request_validation`` for a request that FastAPI refuses),
    the status in words for an HTTPException, and ``internal`` for the unexpected.

    Raises:
        RuntimeError: the application has already started.
    """
    if app.middleware_stack is not None:
        raise RuntimeError("install_problem_details() comes before the application starts")
    app.add_exception_handler(BuildingBlocksError, _domain_error)  # type: ignore[arg-type]  # None for a WebSocket
    app.add_exception_handler(RequestValidationError, _request_validation_error)
    app.add_exception_handler(HTTPException, _http_exception)
    app.add_exception_handler(Exception, _error_in_other_middleware)
    # Innermost, wherever it is installed: a 500 then passes through CORS and request ids like every answer.
    app.user_middleware.append(Middleware(_UnexpectedErrorMiddleware))
    app.openapi = described(app, ProblemDetails)  # type: ignore[method-assign]


async def _domain_error(connection: HTTPConnection, error: Exception) -> Response | None:
    assert isinstance(error, BuildingBlocksError)  # noqa: S101 - how the handler is registered
    status = status_of(error, connection)
    if status == 500:
        logger.error("%s answered with 500 %s: %r\n%s", _where(connection), error.code, error.detail, _origin(error))
    elif status > 500:
        logger.warning("%s answered with %d %s: %r", _where(connection), status, error.code, error.detail)
    if isinstance(connection, WebSocket) and connection.application_state is WebSocketState.CONNECTED:
        await connection.close(_WEBSOCKET_INTERNAL_ERROR, error.code)
        return None
    headers = {}
    if isinstance(error, UnavailableError) and error.retry_after is not None:
        headers["Retry-After"] = str(math.ceil(error.retry_after))
    errors = [{"field": name, "message": error.detail, "code": error.code} for name in error.fields]
    return problem_response(connection, status, error.detail, code=error.code, errors=errors, headers=headers)


async def _request_validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)  # noqa: S101 - how the handler is registered
    errors = [
        {"field": _field(item), "message": _message(item), "code": str(item["type"])}
        for item in error.errors()[:_MOST_ERRORS]
    ]
    return problem_response(
        request, 400, "The request is not valid; errors names each field.", code="request_validation", errors=errors
    )


async def _http_exception(request: HTTPConnection, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # noqa: S101 - how the handler is registered
    if not is_body_allowed_for_status_code(error.status_code):
        return Response(status_code=error.status_code, headers=error.headers)
    detail: Any = error.detail
    if not isinstance(detail, str):
        detail = json.dumps(jsonable_encoder(detail))
    headers = error.headers
    if error.status_code == 405:
        # Starlette looks at one route only; RFC 9110, 15.5.6 wants all methods of the resource.
        headers = {**(headers or {}), "Allow": ", ".join(sorted(methods_of_path(request.scope)))}
    return problem_response(request, error.status_code, detail, headers=headers)


async def _error_in_other_middleware(request: Request, _: Exception) -> Response:
    """Answer for a middleware outside of ours. Starlette raises the error again, and the server logs its stack."""
    response = problem_response(request, 500, _UNEXPECTED)
    identity = request.scope.get("state", {}).get("request_id")
    if identity is not None:
        response.headers["X-Request-ID"] = identity
    return response


class _UnexpectedErrorMiddleware:
    """Answers 500 and logs the stack, once: Starlette's own handler would raise it again for the server to log."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = False

        async def watch(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self.app(scope, receive, watch)
        except Exception:
            request = Request(scope)
            if started:
                # Only the server can break the response off, and it logs the stack of what it is given.
                logger.warning("%s: broken off after the response had started", _where(request))
                raise
            logger.exception("%s: unexpected error", _where(request))
            await problem_response(request, 500, _UNEXPECTED)(scope, receive, send)


def _where(connection: HTTPConnection) -> str:
    scope = connection.scope
    identity = scope.get("state", {}).get("request_id") or "-"
    return f"{scope.get('method', 'WEBSOCKET')} {quote(scope['path'], errors='replace')} (request {identity})"


def _origin(error: BaseException) -> str:
    """Return the stacks of an error and its causes, the origin first, without their messages: those hold values."""
    parts: list[str] = []
    cause: BaseException | None = error
    while cause is not None and len(parts) < _MOST_CAUSES:
        kind = f"{type(cause).__module__}.{type(cause).__qualname__}"
        parts.append("".join(traceback.format_tb(cause.__traceback__)) + f"{kind} {_driver_code(cause)}".rstrip())
        cause = cause.__cause__
    return "\n\n".join(reversed(parts))


def _driver_code(error: BaseException) -> str:
    """Return the SQLSTATE or number under which the manuals of drivers and databases list an error, or nothing."""
    for name in ("sqlstate", "sqlite_errorname"):
        if isinstance(code := getattr(error, name, None), str):
            return code
    return next((str(first) for first in error.args[:1] if type(first) is int), "")


def _phrase(status: int) -> str:
    if status in _PHRASES:
        return _PHRASES[status]
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return f"Status {status}"


def _code(status: int, phrase: str) -> str:
    return _INTERNAL if status == 500 else re.sub(r"\W+", "_", phrase.replace("'", "").lower())


def _message(item: Mapping[str, Any]) -> str:
    if item["type"] == "union_tag_invalid":  # the one message of Pydantic's own that repeats the whole input
        return f"Input should be one of {item['ctx']['expected_tags']}"
    return str(item["msg"])[:_LONGEST_MESSAGE]


def _field(item: Mapping[str, Any]) -> str:
    """Return where an error is, without the part of the request: ``address.city``; ``body`` for all of it."""
    place = item["loc"]
    inner = () if item["type"] == "json_invalid" else place[1:]
    return ".".join(str(part) for part in inner or place[:1])[:_LONGEST_FIELD]
