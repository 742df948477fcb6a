"""Leaving before closing: a service that is told to stop lets load balancers and clients go elsewhere first."""

import asyncio
import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger(__name__)

_CLOSE = (b"connection", b"close")


class DrainMiddleware:
    """Go on serving for a while after SIGTERM: ``app.add_middleware(DrainMiddleware, seconds=5.0)``.

    For so long ``/health/ready`` answers 503, so that load balancers take the service out, and every answer says
    ``Connection: close``, so that clients with connections to it open their next one to another. Everything else is
    answered as ever. Then the server's own shutdown begins. A second SIGTERM ends the wait; Ctrl-C does not wait.

    It stands between SIGTERM and the handler that the server has installed before the lifespan, as uvicorn does, in the
    main thread. A server that does otherwise shuts down at once.

    Args:
        seconds: longer than load balancers take to notice, which is their probe's period times its failures.
    """

    def __init__(self, app: ASGIApp, seconds: float = 5.0) -> None:
        if not seconds >= 0:
            raise ValueError("a drain takes 0 seconds or more")
        self.app = app
        self.seconds = seconds
        self._is_leaving = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            self._is_leaving = False  # it may be served again in the same process
            with self._before_the_servers_handler():
                await self.app(scope, receive, send)
        elif scope["type"] == "http":
            await self._serve(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._is_leaving:
            scope.setdefault("state", {})["is_leaving"] = True

        async def send_and_part(message: Message) -> None:
            # HTTP/2 and later have no such header (RFC 9113, 8.2.2): there the server says goodbye.
            if self._is_leaving and message["type"] == "http.response.start" and scope["http_version"] < "2":
                message = {**message, "headers": [*message.get("headers", ()), _CLOSE]}
            await send(message)

        await self.app(scope, receive, send_and_part)

    @contextmanager
    def _before_the_servers_handler(self) -> Iterator[None]:
        server = signal.getsignal(signal.SIGTERM)
        if not (self.seconds and callable(server) and threading.current_thread() is threading.main_thread()):
            yield
            return
        loop = asyncio.get_running_loop()
        ending: asyncio.TimerHandle | None = None

        def leave() -> None:
            nonlocal ending
            if ending is None:
                self._is_leaving = True
                logger.info("leaving: not ready any more, shutting down in %g s", self.seconds)
                ending = loop.call_later(self.seconds, server, signal.SIGTERM, None)
            else:
                ending.cancel()
                server(signal.SIGTERM, None)

        def on_signal(_signal: int, _frame: FrameType | None) -> None:
            # A handler interrupts whatever runs, a log line that is being written for one.
            loop.call_soon_threadsafe(leave)

        signal.signal(signal.SIGTERM, on_signal)
        try:
            yield
        finally:
            if ending is not None:
                ending.cancel()
            if signal.getsignal(signal.SIGTERM) is on_signal:
                signal.signal(signal.SIGTERM, server)
