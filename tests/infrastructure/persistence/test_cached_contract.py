"""The whole repository contract through a cache: on every database, with rows in memory and in Redis.

Entities are of the kinds whose rows are the hardest to keep: JSON, versions, soft delete, mappers by hand, keys of two
columns. What the cache itself promises is in ``test_cached_repository``.
"""

from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from fastapi_building_blocks.infrastructure import Cache, CachedRepository, InMemoryCache, RedisCache
from fastapi_building_blocks.infrastructure.database.in_memory_session import InMemorySession
from fastapi_building_blocks.infrastructure.database.sqlalchemy_session import SQLAlchemySession
from fastapi_building_blocks.infrastructure.persistence.repositories.base import BaseRepository
from fastapi_building_blocks.infrastructure.persistence.repositories.sqlalchemy_repository import SQLAlchemyRepository
from tests.backends import Backends, run_apart
from tests.contracts.sample_entities import (
    AccountContract,
    ArticleContract,
    MemberContract,
    NoteContract,
    SampleContract,
    SettingContract,
    TicketContract,
    metadata,
)


class Cached(SampleContract):
    """What is tried is the repository behind a cache that remembers misses and knows every unique key."""

    def make_repository(self, session: Any) -> Any:
        repository = super().make_repository(session)
        finders = repository.declaration().unique_keys[1:]
        hidden = set(repository.hidden_columns)
        return CachedRepository(
            repository,
            self.cache,
            finders=[finder for finder in finders if not hidden & set(finder)],
            remember_misses=60,
        )

    cache: Cache

    @pytest.fixture(autouse=True, params=["in memory", "redis"])
    async def cached(self, request: pytest.FixtureRequest, prefix: str) -> AsyncIterator[None]:
        if request.param == "in memory":
            self.cache = InMemoryCache(prefix=prefix)
        else:
            self.cache = RedisCache(request.getfixturevalue("redis_url"), prefix=prefix, timeout=2.0)
        async with self.cache:
            yield
        assert self.cache.statistics().errors == 0

    @pytest.fixture
    def prefix(self, request: pytest.FixtureRequest) -> str:
        """The store is emptied between tests by hand, past the cache: each test has keys of its own."""
        return f"{request.node.nodeid}:"


class InMemory(Cached):
    base = BaseRepository

    @pytest.fixture
    async def session(self) -> AsyncIterator[InMemorySession]:
        async with InMemorySession() as session:
            yield session


class TestNotesInMemory(InMemory, NoteContract):
    pass


class TestArticlesInMemory(InMemory, ArticleContract):
    pass


class TestAccountsInMemory(InMemory, AccountContract):
    pass


@pytest.fixture(scope="module", params=["sqlite", "postgres", "mysql"])
def tables_url(
    request: pytest.FixtureRequest, backends: Backends, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    with backends.database_by_driver(
        request.param, f"sqlite+aiosqlite:///{tmp_path_factory.mktemp('cached') / 'test.db'}"
    ) as url:
        run_apart(create_tables(url))
        yield url


async def create_tables(url: str) -> None:
    async with SQLAlchemySession(url) as session:
        await session.create_tables(metadata)


class OnDatabase(Cached):
    base = SQLAlchemyRepository

    @pytest.fixture
    async def session(self, tables_url: str) -> AsyncIterator[SQLAlchemySession]:
        async with SQLAlchemySession(tables_url) as session:
            for table in reversed(metadata.sorted_tables):
                await session.execute(table.delete())
            yield session


class TestNotes(OnDatabase, NoteContract):
    pass


class TestArticles(OnDatabase, ArticleContract):
    pass


@pytest.mark.parametrize("cached", ["redis"], indirect=True)
@pytest.mark.parametrize("tables_url", ["postgres"], indirect=True)
class TestTickets(OnDatabase, TicketContract):
    pass


@pytest.mark.parametrize("cached", ["redis"], indirect=True)
@pytest.mark.parametrize("tables_url", ["sqlite"], indirect=True)
class TestAccounts(OnDatabase, AccountContract):
    pass


@pytest.mark.parametrize("cached", ["redis"], indirect=True)
@pytest.mark.parametrize("tables_url", ["mysql"], indirect=True)
class TestSettings(OnDatabase, SettingContract):
    pass


@pytest.mark.parametrize("cached", ["redis"], indirect=True)
@pytest.mark.parametrize("tables_url", ["mysql"], indirect=True)
class TestMembers(OnDatabase, MemberContract):
    pass
