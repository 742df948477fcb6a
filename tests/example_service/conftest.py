"""The example service on each database, once with Redis: migrated once a module, emptied for each test."""

import secrets
from collections.abc import AsyncIterator, Iterator

import httpx2
import pytest

from example_service.app.api.dependencies import user_repository
from example_service.app.infrastructure.repositories.user_repository import UserRepository
from example_service.app.main import MIGRATIONS, create_app
from fastapi_building_blocks.infrastructure import RedisCache, SQLAlchemySession
from fastapi_building_blocks.infrastructure.database.migrations import upgrade
from tests.backends import Backends, run_apart

USERS = "/api/v1/users/"


@pytest.fixture(scope="module", params=["sqlite", "postgres", "postgres, redis", "mysql"])
def migrated_url(
    request: pytest.FixtureRequest, backends: Backends, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """A database with the service's tables, for one module."""
    if request.param == "sqlite":
        url = f"sqlite+aiosqlite:///{tmp_path_factory.mktemp('service') / 'service.db'}"
        run_apart(upgrade(url, MIGRATIONS))
        yield url
    else:
        with backends.database(request.param.partition(",")[0]) as url:
            run_apart(upgrade(url, MIGRATIONS))
            yield url


@pytest.fixture
async def session(migrated_url: str) -> AsyncIterator[SQLAlchemySession]:
    async with SQLAlchemySession(migrated_url) as session:
        await UserRepository(session).delete_where(everything=True)
        yield session


@pytest.fixture
def users(session: SQLAlchemySession) -> UserRepository:
    """What the service's wiring picks for the database."""
    return user_repository(session)


@pytest.fixture
async def cache(request: pytest.FixtureRequest, migrated_url: str) -> AsyncIterator[RedisCache | None]:
    """What ``REDIS_URL`` gives the service, where the database's parameter says so."""
    if not request.node.callspec.params["migrated_url"].endswith("redis"):
        yield None
        return
    async with RedisCache(request.getfixturevalue("redis_url"), prefix=secrets.token_hex(8), timeout=2.0) as cache:
        yield cache


@pytest.fixture
async def client(session: SQLAlchemySession, cache: RedisCache | None) -> AsyncIterator[httpx2.AsyncClient]:
    """Requests to the service, in process."""
    transport = httpx2.ASGITransport(create_app(session, cache))
    async with httpx2.AsyncClient(transport=transport, base_url="http://service") as client:
        yield client


@pytest.fixture
async def alice(client: httpx2.AsyncClient) -> dict[str, object]:
    """The user of the seed's curl command, as answered."""
    body = {"first_name": "Alice", "last_name": "Test", "email": "alice@test.com", "username": "alice"}
    response = await client.post(USERS, json=body)
    assert response.status_code == 201
    return dict(response.json())
