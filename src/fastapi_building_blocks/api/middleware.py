"""The request id: accepted or made, in the answer, in logs and in problems."""

import logging
import re
import uuid
from contextvars import ContextVar

from starlette.types import ASGIApp, Message, Receive, Scope, Send

_HEADER = b"x-request-id"
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


class RequestIdFilter(logging.Filter):
    """Put ``request_id`` on every log record of a handler, ``-`` outside of a request."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Let every record pass, with its request id."""
        record.request_id = request_id() or getattr(record, "request_id", None) or "-"
        return True
