"""The whole repository contract on SQL Server, where ``MSSQL_URL`` names one."""

from collections.abc import AsyncIterator

import pytest

from fastapi_building_blocks.infrastructure import SQLAlchemyRepository, SQLAlchemySession
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


class OnSQLServer(SampleContract):
    base = SQLAlchemyRepository

    @pytest.fixture
    async def session(self, mssql_url: str) -> AsyncIterator[SQLAlchemySession]:
        async with SQLAlchemySession(mssql_url) as session:
            await session.create_tables(metadata)
            yield session
            async with session.engine.begin() as connection:
                await connection.run_sync(metadata.drop_all)


class TestNotes(OnSQLServer, NoteContract):
    pass


class TestArticles(OnSQLServer, ArticleContract):
    pass


class TestTickets(OnSQLServer, TicketContract):
    pass


class TestAccounts(OnSQLServer, AccountContract):
    pass


class TestSettings(OnSQLServer, SettingContract):
    pass


class TestMembers(OnSQLServer, MemberContract):
    pass
