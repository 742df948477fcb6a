"""The databases that faults are tried on, and what a line of the summary calls them."""

import pytest
from sqlalchemy import make_url

from fastapi_building_blocks.infrastructure import SQLAlchemySession
from fastapi_building_blocks.infrastructure.database.dialects.postgresql import PostgreSQLDialect
from fastapi_building_blocks.testing import FaultProxy
from tests.backends import SERVERS

on_every_driver = pytest.mark.parametrize(
    "database_url",
    ["sqlite", "postgres", "mysql", "asyncmy"],
    indirect=True,
    ids=["sqlite", "postgres", "mysql", "asyncmy"],
)
on_servers = pytest.mark.parametrize("database_url", ["postgres", "mysql"], indirect=True)
# MySQL and MariaDB have no deferred constraints.
with_deferred_constraints = pytest.mark.parametrize("database_url", ["sqlite", "postgres"], indirect=True)


def name_of(url: str) -> str:
    """Return the database, and its driver where there are two."""
    place = make_url(url)
    name = place.get_backend_name()
    if name == "mysql":
        return f"{SERVERS['mysql'].label}, {place.get_driver_name()}"
    return {"sqlite": "SQLite", "postgresql": "PostgreSQL"}[name]


def address_of(url: str) -> tuple[str, int]:
    """Return host and port, for a proxy to stand before."""
    place = make_url(url)
    assert place.host is not None
    return place.host, place.port or {"postgresql": 5432, "mysql": 3306}[place.get_backend_name()]


def commit_of(url: str) -> bytes:
    """Return the bytes by which a proxy knows COMMIT; a new connection to MySQL says AUTOCOMMIT."""
    return b"COMMIT\0" if make_url(url).get_backend_name() == "postgresql" else b"\x03COMMIT"


def proxied(proxy: FaultProxy, url: str) -> str:
    """Return the URL through a proxy that is to know COMMIT, which the portable path would send by name the next time."""
    place = make_url(proxy.url(url))
    if place.get_backend_name() == "postgresql":
        place = place.update_query_dict({"prepared_statement_cache_size": "0"})
    return place.render_as_string(hide_password=False)


def commits_at_once(session: SQLAlchemySession) -> bool:
    """Whether the message with COMMIT commits; the portable path has PostgreSQL prepare it first."""
    return type(session.dialect) is not PostgreSQLDialect
