"""The whole repository contract on every database, for every kind of entity."""

from collections.abc import AsyncIterator

import pytest

from fastapi_building_blocks.infrastructure.database.sqlalchemy_session import SQLAlchemySession
from fastapi_building_blocks.infrastructure.persistence.repositories.sqlalchemy_repository import SQLAlchemyRepository
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


class OnDatabase(SampleContract):
    base = SQLAlchemyRepository

    @pytest.fixture
    async def session(self, database_url: str) -> AsyncIterator[SQLAlchemySession]:
        async with SQLAlchemySession(database_url) as session:
            await session.create_tables(metadata)
            yield session


class TestNotes(OnDatabase, NoteContract):
    pass


class TestArticles(OnDatabase, ArticleContract):
    pass


class TestTickets(OnDatabase, TicketContract):
    pass


class TestAccounts(OnDatabase, AccountContract):
    pass


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
