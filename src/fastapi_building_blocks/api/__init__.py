"""FastAPI on top of the data layer: problems, lists, units of work, health, request ids, conditional requests."""

from .conditional_requests import (
    NO_VERSION,
    IfMatchVersion,
    IfMatchVersions,
    etag_of,
    if_match_version,
    if_match_versions,
    is_not_modified,
)
from .consistency import CONSISTENCY_HEADER, ConsistencyMiddleware
from .dependencies import database, database_lifespan, unit_of_work
from .draining import DrainMiddleware
from .health import health_router
from .middleware import BodyLimitMiddleware, DeadlineMiddleware, RequestIdFilter, RequestIdMiddleware, request_id
from .page_responses import CursorPageResponse, PageResponse, page_response
from .problem_details import ProblemDetails, install_problem_details, problem_response, problem_responses
from .query_parameters import ListQuery, list_query

__all__ = [
    "CONSISTENCY_HEADER",
    "NO_VERSION",
    "BodyLimitMiddleware",
    "ConsistencyMiddleware",
    "CursorPageResponse",
    "DeadlineMiddleware",
    "DrainMiddleware",
    "IfMatchVersion",
    "IfMatchVersions",
    "ListQuery",
    "PageResponse",
    "ProblemDetails",
    "RequestIdFilter",
    "RequestIdMiddleware",
    "database",
    "database_lifespan",
    "etag_of",
    "health_router",
    "if_match_version",
    "if_match_versions",
    "install_problem_details",
    "is_not_modified",
    "list_query",
    "page_response",
    "problem_response",
    "problem_responses",
    "request_id",
    "unit_of_work",
]
