"""What every request passes: its id, in the answer, in logs and in problems; a limit to its body, and to its time."""

import logging
import re
import uuid
from contextvars import ContextVar

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastapi_building_blocks.infrastructure.database.deadlines import deadline

from .problem_details import problem_response

_HEADER = b"x-request-id"
_LONGEST_LENGTH = 19  # digits
_SANE = re.compile(rb"[\x21-\x7e]{1,128}")
_ANSWERS = frozenset({"http.response.start", "websocket.accept", "websocket.http.response.start"})

_request_id: ContextVar[str | None] = ContextVar("request_id", default=None)


def request_id() -> str | None:
    """Return the id of the request that this task works on; None outside of ``RequestIdMiddleware``."""
    return _request_id.get()


class RequestIdMiddleware:
    """Give every request an id: ``app.add_middleware(RequestIdMiddleware)``.

    The client's ``X-Request-ID`` is taken if it is 1 to 128 visible ASCII characters, and replaced otherwise.
    The id is in the answer's ``X-Request-ID``, in ``request_id()``, in ``request.state.request_id`` and in problems.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        given = next((value for name, value in scope["headers"] if name == _HEADER), b"")
        header = given if _SANE.fullmatch(given) else uuid.uuid4().hex.encode()
        identity = header.decode()

        async def send_with_id(message: Message) -> None:
            if message["type"] in _ANSWERS:
                others = [pair for pair in message.get("headers", ()) if pair[0].lower() != _HEADER]
                message = {**message, "headers": [*others, (_HEADER, header)]}
            await send(message)

        # Error handlers outside of this middleware still find it there.
        scope.setdefault("state", {})["request_id"] = identity
        token = _request_id.set(identity)
        try:
            await self.app(scope, receive, send_with_id)
        finally:
            _request_id.reset(token)


class BodyLimitMiddleware:
    """Refuse longer bodies with a 413 problem: ``app.add_middleware(BodyLimitMiddleware)``.

    Where ``Content-Length`` says so, nothing is read. A body without it (chunked) is counted as the endpoint reads
    it, and breaks off with an ``HTTPException`` that ``install_problem_details`` answers.

    Args:
        max_bytes: what a body may have at most, in bytes.
    """

    def __init__(self, app: ASGIApp, max_bytes: int = 1_048_576) -> None:
        self.app = app
        self.max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        detail = f"the body is longer than {self.max_bytes} bytes"
        if any(name == b"content-length" and self._is_too_long(value) for name, value in scope["headers"]):
            await problem_response(Request(scope), 413, detail)(scope, receive, send)
            return
        received = 0
        answering = False

        async def receive_within_limit() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.max_bytes:
                if not answering:
                    raise HTTPException(413, detail)
                message["body"] = b""  # too late for another answer: what is left of the body is dropped
            return message

        async def send_and_note(message: Message) -> None:
            nonlocal answering
            answering = True
            await send(message)

        await self.app(scope, receive_within_limit, send_and_note)

    def _is_too_long(self, length: bytes) -> bool:
        digits = length.lstrip(b"0")
        return digits.isdigit() and (len(digits) > _LONGEST_LENGTH or int(digits) > self.max_bytes)


class DeadlineMiddleware:
    """Give every HTTP request one deadline for all its database calls: ``app.add_middleware(DeadlineMiddleware)``.

    A call after it, or that it ends, raises ``DeadlineExceededError``, a 504. Calls are all that it bounds: work without
    them goes on, and so do WebSockets. What is streamed and background tasks are part of their request, since they hold
    connections like it: what may stream for longer belongs in an application without this middleware.

    Args:
        seconds: from the request's first byte to the end of its last database call.
    """

    def __init__(self, app: ASGIApp, seconds: float = 30.0) -> None:
        if not seconds > 0:
            raise ValueError("a deadline is a number of seconds greater than 0")
        self.app = app
        self.seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        with deadline(self.seconds):
            await self.app(scope, receive, send)


class RequestIdFilter(logging.Filter):
    """Put ``request_id`` on every log record of a handler, ``-`` outside of a request."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Let every record pass, with its request id."""
        record.request_id = request_id() or getattr(record, "request_id", None) or "-"
        return True
