"""The whole repository contract on SQL Server, where ``MSSQL_URL`` names one."""

import os
from collections.abc import Iterator

import pytest

from tests.backends import SERVERS, Backends, required_backends, run_apart
from tests.contracts.sample_entities import (
    AccountContract,
    ArticleContract,
    MemberContract,
    NoteContract,
    SettingContract,
    TicketContract,
)
from tests.contracts.test_sql_contract import OnDatabase, create_tables

SERVER = SERVERS["mssql"]

if SERVER.variable not in os.environ and SERVER.name not in required_backends():  # one line instead of hundreds
    pytest.skip(f"no {SERVER.label}: set {SERVER.variable} ({SERVER.install})", allow_module_level=True)


@pytest.fixture(scope="module")
def tables_url(backends: Backends) -> Iterator[str]:
    """A database on the server, with all tables."""
    with backends.database("mssql") as url:
        run_apart(create_tables(url))
        yield url


class TestNotesOnSQLServer(OnDatabase, NoteContract):
    pass


class TestArticlesOnSQLServer(OnDatabase, ArticleContract):
    pass


class TestTicketsOnSQLServer(OnDatabase, TicketContract):
    pass


class TestAccountsOnSQLServer(OnDatabase, AccountContract):
    pass


class TestSettingsOnSQLServer(OnDatabase, SettingContract):
    pass


class TestMembersOnSQLServer(OnDatabase, MemberContract):
    pass
