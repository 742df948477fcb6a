"""The databases that faults are tried on, and what a line of the summary calls them."""

import pytest
from sqlalchemy import make_url

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
