"""The whole repository contract on every database, for every kind of entity."""

from collections.abc import AsyncIterator, Iterator

import pytest
from sqlalchemy import make_url

from fastapi_building_blocks.infrastructure.database.sqlalchemy_session import SQLAlchemySession
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


@pytest.fixture(scope="module", params=["sqlite", "postgres", "mysql"])
def tables_url(
    request: pytest.FixtureRequest, backends: Backends, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """A database with all tables, shared by the tests of this module: making one for each would take minutes."""
    if request.param == "sqlite":
        url = f"sqlite+aiosqlite:///{tmp_path_factory.mktemp('contract') / 'test.db'}"
        run_apart(create_tables(url))
        yield url
    else:
        with backends.database(request.param) as url:
            run_apart(create_tables(url))
            yield url


async def create_tables(url: str) -> None:
    async with SQLAlchemySession(url) as session:
        await session.create_tables(metadata)


class OnDatabase(SampleContract):
    base = SQLAlchemyRepository
    portable = False
    returning = True
    driver: str | None = None

    @pytest.fixture
    async def session(self, tables_url: str) -> AsyncIterator[SQLAlchemySession]:
        url = make_url(tables_url)
        if self.driver is not None:
            url = url.set(drivername=self.driver)
        async with SQLAlchemySession(url, portable=self.portable) as session:
            session.dialect.insert_returning &= self.returning
            for table in reversed(metadata.sorted_tables):
                await session.execute(table.delete())
            yield session


class TestNotes(OnDatabase, NoteContract):
    pass


@pytest.mark.parametrize("tables_url", ["sqlite"], indirect=True)
class TestArticles(OnDatabase, ArticleContract):
    """On the other databases further down, on the portable path and without RETURNING."""


class TestTickets(OnDatabase, TicketContract):
    pass


@pytest.mark.parametrize("tables_url", ["sqlite"], indirect=True)
class TestAccounts(OnDatabase, AccountContract):
    """How an entity is written down is the mapping's business, not the database's: on one database only."""


class TestSettings(OnDatabase, SettingContract):
    pass


class TestMembers(OnDatabase, MemberContract):
    pass


class TestNotesInAPrivateSQLite(OnDatabase, NoteContract):
    """``:memory:``: one connection, taken in turn."""

    one_connection = True

    @pytest.fixture
    async def session(self) -> AsyncIterator[SQLAlchemySession]:
        async with SQLAlchemySession("sqlite+aiosqlite:///:memory:") as session:
            await session.create_tables(metadata)
            yield session


@pytest.mark.parametrize("tables_url", ["mysql"], indirect=True)
class WithoutReturning(OnDatabase):
    """MySQL has no RETURNING; MariaDB does, so here it is told that it does not."""

    returning = False


class TestArticlesWithoutReturning(WithoutReturning, ArticleContract):
    pass


class TestTicketsWithoutReturning(WithoutReturning, TicketContract):
    pass


class OnPortablePath(OnDatabase):
    """SQLAlchemy's adapted cursor instead of the driver's own connection."""

    portable = True


class TestArticlesOnPortablePath(OnPortablePath, ArticleContract):
    pass


@pytest.mark.parametrize("tables_url", ["mysql"], indirect=True)
class OnAsyncmy(OnDatabase):
    """asyncmy instead of aiomysql: it writes parameters and reads rows in its own way."""

    driver = "mysql+asyncmy"


class TestArticlesOnAsyncmy(OnAsyncmy, ArticleContract):
    pass


class TestNotesOnAsyncmy(OnAsyncmy, NoteContract):
    pass


class TestArticlesOnAsyncmyWithoutReturning(OnAsyncmy, ArticleContract):
    returning = False
