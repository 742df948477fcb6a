"""Servers of this suite's own, which its tests freeze, kill and start again, and databases on them."""

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from fastapi_building_blocks.testing import DatabaseServer, MariaDBServer, MissingServer, PostgreSQLServer
from tests.backends import required_backends
from tests.faults.breaking import Database, private_database

DRIVERS = {"asyncpg": "postgresql", "aiomysql": "mariadb", "asyncmy": "mariadb"}


def running(server: DatabaseServer, backend: str) -> Iterator[DatabaseServer]:
    """Yield the server, or skip where it cannot run and is not required."""
    try:
        server.start()
    except MissingServer as missing:
        if backend in required_backends():
            pytest.fail(str(missing), pytrace=False)
        pytest.skip(str(missing))
    yield server
    server.close()


@pytest.fixture(scope="session")
def postgresql() -> Iterator[DatabaseServer]:
    # The sessions that one freeze holds up, their cancel requests and the observers are more than 100 together.
    yield from running(PostgreSQLServer({"max_connections": 300}), "postgres")


@pytest.fixture(scope="session")
def mariadb() -> Iterator[DatabaseServer]:
    yield from running(MariaDBServer({"max-connections": 300}), "mysql")


@pytest.fixture(params=list(DRIVERS))
def databases(request: pytest.FixtureRequest) -> Iterator[list[Database]]:
    """Four empty databases of this test alone, on one server that it may break, by each driver in turn.

    ``@pytest.mark.parametrize("databases", ["asyncpg"], indirect=True)`` asks for one driver only.
    """
    server: DatabaseServer = request.getfixturevalue(DRIVERS[request.param])
    with ExitStack() as stack:
        yield [stack.enter_context(private_database(server, request.param)) for _ in range(4)]


@pytest.fixture(params=list(DRIVERS))
def database(request: pytest.FixtureRequest) -> Iterator[Database]:
    """An empty database of this test alone, on a server that it may break, by each driver in turn."""
    server: DatabaseServer = request.getfixturevalue(DRIVERS[request.param])
    with private_database(server, request.param) as database:
        yield database
