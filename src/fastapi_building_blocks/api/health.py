"""Health endpoints: whether the process lives, and whether its database answers."""

import asyncio
import logging

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field

from fastapi_building_blocks.domain.errors import BuildingBlocksError
from fastapi_building_blocks.infrastructure.database.session import DatabaseSession

from .problem_details import problem_response, problem_responses

logger = logging.getLogger(__name__)

_LATE = "the database did not answer in time"


class Health(BaseModel):
    """The service can do what was asked."""

    status: str = Field(description="Always `ok`: anything else is a problem.", examples=["ok"])


_OK = Health(status="ok")


def health_router(session: DatabaseSession, *, deadline: float = 1.0) -> APIRouter:
    """Return the router of ``/health``, ``/health/live`` and ``/health/ready``.

    The first two answer 200 as long as the process does, database or not: restarting a service does not mend its
    database. ``/health/ready`` answers 503 until the database does. HEAD is answered like GET, without the body.

    Args:
        deadline: seconds that the database has to answer.
    """
    router = APIRouter(tags=["health"])

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
        """Tell whether the database answers."""
        reason = await _unready(session, deadline)
        if reason is None:
            return _OK
        logger.warning("not ready: %s", reason)
        return problem_response(request, 503, reason, code="unavailable", headers={"Retry-After": "1"})

    return router


async def _unready(session: DatabaseSession, deadline: float) -> str | None:
    """Return why the session is not ready, or None."""
    ping = asyncio.ensure_future(session.ping())
    ping.add_done_callback(_seen)
    try:
        # Not asyncio.timeout(), which would wait for a frozen connection to acknowledge its cancellation.
        await asyncio.wait({ping}, timeout=deadline)
    finally:
        late = not ping.done()
        ping.cancel()
    if late:
        return _LATE
    try:
        await ping
    except BuildingBlocksError as error:
        return error.detail
    except RuntimeError:
        return "the database is not connected"
    return None


def _seen(ping: asyncio.Future[None]) -> None:
    if not ping.cancelled():
        ping.exception()
