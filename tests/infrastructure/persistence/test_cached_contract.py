"""The whole repository contract through a cache: on every database, with rows in memory and in Redis.

Entities are of the kinds whose rows are the hardest to keep: JSON, versions, soft delete, mappers by hand, keys of two
columns. What the cache itself promises is in ``test_cached_repository``.

Each database and each cache is in a pair that is always tried; ``--full`` tries them all.
"""

import itertools
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


def pairs(*always: tuple[str, str]) -> pytest.MarkDecorator:
    """Try these databases and caches always, and every other pair under ``--full``."""
    every = itertools.product(("sqlite", "postgres", "mysql"), ("in memory", "redis"))
    marked = [pytest.param(*pair, marks=() if pair in always else pytest.mark.full) for pair in every]
    return pytest.mark.parametrize(("tables_url", "cached"), marked, indirect=True)


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


@pytest.mark.parametrize("cached", ["in memory", pytest.param("redis", marks=pytest.mark.full)], indirect=True)
class TestNotesInMemory(InMemory, NoteContract):
    pass


@pytest.mark.full
class TestArticlesInMemory(InMemory, ArticleContract):
    pass


@pytest.mark.full
class TestAccountsInMemory(InMemory, AccountContract):
    pass


@pytest.fixture(scope="module")
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
            async with session.transaction() as unit:  # one COMMIT, not one for each table
                for table in reversed(metadata.sorted_tables):
                    await unit.execute(table.delete())
            yield session


@pairs(("postgres", "redis"))
class TestNotes(OnDatabase, NoteContract):
    pass


@pairs(("sqlite", "in memory"))
class TestArticles(OnDatabase, ArticleContract):
    pass


@pytest.mark.full
@pytest.mark.parametrize(("tables_url", "cached"), [("postgres", "redis")], indirect=True)
class TestTickets(OnDatabase, TicketContract):
    pass


@pytest.mark.full
@pytest.mark.parametrize(("tables_url", "cached"), [("sqlite", "redis")], indirect=True)
class TestAccounts(OnDatabase, AccountContract):
    pass


@pytest.mark.parametrize(("tables_url", "cached"), [("mysql", "redis")], indirect=True)
class TestSettings(OnDatabase, SettingContract):
    pass


@pytest.mark.full
@pytest.mark.parametrize(("tables_url", "cached"), [("mysql", "redis")], indirect=True)
class TestMembers(OnDatabase, MemberContract):
    pass
