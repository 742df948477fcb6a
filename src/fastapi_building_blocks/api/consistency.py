"""Own writes stay visible from one request to the next: the marks of a client travel with it, signed."""

import logging

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastapi_building_blocks.infrastructure.database.consistency import (
    ConsistencyScope,
    ConsistencyTokens,
    consistency_scope,
)

logger = logging.getLogger(__name__)

CONSISTENCY_HEADER = "X-Consistency-Token"
_HEADER = CONSISTENCY_HEADER.lower().encode()


class ConsistencyMiddleware:
    """Have a client see its own writes on read replicas: ``app.add_middleware(ConsistencyMiddleware)``.

    Every request is a scope of its own: its reads see what it has written itself, and what the ``X-Consistency-Token`` says
    that it brings. The response has the newest of both, for the client's next request, to this or another service with
    the same secret and database. A client that does not send it back may read what is up to ``max_lag`` seconds old.

    What is written after the response has begun, in a background task say, is not in its token. A token that cannot be
    verified may be the only witness of a write, so that request reads from the primary: whoever sends nonsense gets no
    old data, and costs the primary as much as a service without replicas would.

    Args:
        secret: at least 16 characters, the same for all services that pass tokens on; None: ``CONSISTENCY_SECRET`` of
            the environment.

    Raises:
        ValueError: there is no secret, or a short one.
    """

    def __init__(self, app: ASGIApp, secret: str | None = None) -> None:
        self.app = app
        self._tokens = ConsistencyTokens(secret)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        own = self._scope_of(scope)

        async def send_with_token(message: Message) -> None:
            if message["type"] == "http.response.start" and (token := await own.token()) is not None:
                others = [pair for pair in message.get("headers", ()) if pair[0].lower() != _HEADER]
                message = {**message, "headers": [*others, (_HEADER, token.encode())]}
            await send(message)

        with consistency_scope(own):
            await self.app(scope, receive, send_with_token)

    def _scope_of(self, scope: Scope) -> ConsistencyScope:
        given = [value for name, value in scope["headers"] if name == _HEADER]
        if not given:
            return ConsistencyScope(self._tokens)
        try:
            if len(given) > 1:
                raise ValueError("there is more than one token")
            return ConsistencyScope(self._tokens, self._tokens.open(given[0]))
        except ValueError as error:
            logger.debug("a consistency token is not regarded: %s", error)
            return ConsistencyScope(self._tokens, distrusted=True)
