"""Health endpoints: whether the process lives, and whether it should be sent requests."""

import asyncio
import logging
from contextvars import Context

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field

from fastapi_building_blocks.domain.errors import BuildingBlocksError
from fastapi_building_blocks.infrastructure.database.session import DatabaseSession

from .problem_details import problem_response, problem_responses

logger = logging.getLogger(__name__)

_LATE = "the database did not answer in time"
_LEAVING = "the service is shutting down"
_PATIENCE = 5.0
"""How often its deadline a ping may last: one that was lost on the way, not delayed, is sent again after that."""


class Health(BaseModel):
    """The service can do what was asked."""

    status: str = Field(description="Always `ok`: anything else is a problem.", examples=["ok"])


_OK = Health(status="ok")


def health_router(session: DatabaseSession, *, deadline: float = 1.0) -> APIRouter:
    """Return the router of ``/health``, ``/health/live`` and ``/health/ready``.

    The first two answer 200 as long as the process does, database or not: restarting a service does not mend its
    database. ``/health/ready`` answers 503 until the database does, and again once ``DrainMiddleware`` lets the service
    leave. The log has a line when that turns, and none for a probe. HEAD is answered like GET, without the body.

    Args:
        deadline: seconds that the database has to answer. Probes that come meanwhile wait for the same answer.
    """
    router = APIRouter(tags=["health"])
    readiness = _Readiness(session, deadline)

    @router.get("/health")
    @router.get("/health/live")
    @router.head("/health", include_in_schema=False)
    @router.head("/health/live", include_in_schema=False)
    async def live() -> Health:
        """Tell that the process lives, whatever its database does."""
        return _OK

    @router.get("/health/ready", responses=problem_responses(503), response_model=Health)
    @router.head("/health/ready", response_model=Health, include_in_schema=False)
    async def ready(request: Request) -> Health | Response:
        """Tell whether the service takes requests: its database answers, and it is not shutting down."""
        is_leaving = request.scope.get("state", {}).get("is_leaving", False)
        reason = _LEAVING if is_leaving else await readiness.trouble()
        if reason is None:
            return _OK
        return problem_response(request, 503, reason, code="unavailable", headers={"Retry-After": "1"})

    return router


class _Readiness:
    """Whether a database answers, found out by one ping at a time."""

    def __init__(self, session: DatabaseSession, deadline: float) -> None:
        self._session = session
        self._deadline = deadline
        self._ping: asyncio.Task[str | None] | None = None
        self._was_ready = True

    async def trouble(self) -> str | None:
        """Return why the database is not ready, or None."""
        ping = self._ping
        if ping is None or ping.done() or ping.get_loop() is not asyncio.get_running_loop():
            # It belongs to no request: neither to the first one's deadline, nor to its id in the log.
            ping = self._ping = asyncio.get_running_loop().create_task(self._ask(), context=Context())
        # Not asyncio.timeout(), which would wait for a frozen connection to acknowledge its cancellation.
        await asyncio.wait({ping}, timeout=self._deadline)
        reason = ping.result() if ping.done() else _LATE
        self._note(reason)
        return reason

    async def _ask(self) -> str | None:
        try:
            async with asyncio.timeout(self._deadline * _PATIENCE):
                await self._session.ping()
        except TimeoutError:
            return _LATE
        except BuildingBlocksError as error:
            return error.detail
        except RuntimeError:
            return "the database is not connected"
        except Exception:
            logger.exception("asking the database for a sign of life failed")
            return "the database could not be asked"
        return None

    def _note(self, reason: str | None) -> None:
        is_ready = reason is None
        if is_ready and not self._was_ready:
            logger.info("ready again")
        elif self._was_ready and not is_ready:
            logger.warning("not ready: %s", reason)
        self._was_ready = is_ready
