"""What the dialects promise: the right one for a URL, sane pools, literal searches and honest refusals."""

import asyncio
from typing import Any

import pytest
import sqlalchemy as sa
from asyncpg.exceptions import FeatureNotSupportedError, InvalidCachedStatementError
from pymysql.err import InternalError
from sqlalchemy import make_url

from fastapi_building_blocks.domain import ConnectionLostError, SerializationError, UnsupportedOperationError
from fastapi_building_blocks.domain.query import Operator
from fastapi_building_blocks.infrastructure import SQLAlchemySession
from fastapi_building_blocks.infrastructure.database.dialects import PortableDialect, Timeouts, dialect_for
from fastapi_building_blocks.infrastructure.database.dialects.mssql import SQLServerDialect
from fastapi_building_blocks.infrastructure.database.dialects.mysql import AiomysqlDialect, AsyncmyDialect, MySQLDialect
from fastapi_building_blocks.infrastructure.database.dialects.postgresql import AsyncpgDialect, PostgreSQLDialect
from fastapi_building_blocks.infrastructure.database.dialects.sqlite import AiosqliteDialect, SQLiteDialect
from fastapi_building_blocks.infrastructure.database.sqlalchemy_errors import translate
from tests.server_view import kill_connections, until

TIMEOUTS = Timeouts(5.0, 30.0)


@pytest.mark.parametrize(
    ("url", "fast", "portable"),
    [
        ("postgresql+asyncpg://h/d", AsyncpgDialect, PostgreSQLDialect),
        ("postgresql+psycopg://h/d", PostgreSQLDialect, PostgreSQLDialect),
        ("mysql+aiomysql://h/d", AiomysqlDialect, MySQLDialect),
        ("mariadb+aiomysql://h/d", AiomysqlDialect, MySQLDialect),
        ("mysql+asyncmy://h/d", AsyncmyDialect, MySQLDialect),
        ("mariadb+asyncmy://h/d", AsyncmyDialect, MySQLDialect),
        ("sqlite+aiosqlite://", AiosqliteDialect, SQLiteDialect),
        ("mssql+aioodbc://h/d", SQLServerDialect, SQLServerDialect),
        ("oracle+oracledb://h/d", PortableDialect, PortableDialect),
    ],
)
def test_a_url_finds_its_dialect_and_a_database_without_one_the_portable(url: str, fast: Any, portable: Any) -> None:
    assert type(dialect_for(make_url(url), TIMEOUTS)) is fast
    assert type(dialect_for(make_url(url), TIMEOUTS, portable=True)) is portable


@pytest.mark.parametrize(
    ("url", "size"),
    [
        ("sqlite+aiosqlite://", (1, 0)),
        ("sqlite+aiosqlite:///:memory:", (1, 0)),
        ("sqlite+aiosqlite:///file:one?mode=memory&uri=true", (1, 0)),
        ("sqlite+aiosqlite:///file.db", (5, 10)),
        ("postgresql+asyncpg://h/d", (5, 10)),
    ],
)
def test_a_database_that_lives_in_its_connection_has_one(url: str, size: tuple[int, int]) -> None:
    address = make_url(url)
    assert dialect_for(address, TIMEOUTS).pool_size(address, 5, 10) == size


def test_an_isolation_level_is_spelled_as_sql_spells_it_or_refused() -> None:
    dialect = AsyncpgDialect(TIMEOUTS)
    assert dialect.check_isolation(None) is None
    assert dialect.check_isolation("repeatable_read") == "REPEATABLE READ"
    with pytest.raises(UnsupportedOperationError):
        dialect.check_isolation("SNAPSHOT")
    for wrong in ("", "SERIALIZABLE; DROP TABLE users"):
        with pytest.raises(ValueError, match="isolation is one of"):
            dialect.check_isolation(wrong)
    assert SQLServerDialect(TIMEOUTS).check_isolation("snapshot") == "SNAPSHOT"


def test_a_search_text_is_taken_literally() -> None:
    text = r"50%_\[a]*?"
    portable = PortableDialect(TIMEOUTS)
    assert portable.text_operand(Operator.CONTAINS, text) == r"%50\%\_\\[a]*?%"
    assert portable.text_operand(Operator.STARTS_WITH, text) == r"50\%\_\\[a]*?%"
    assert SQLiteDialect(TIMEOUTS).text_operand(Operator.STARTS_WITH, text) == r"50%_\[[]a][*][?]*"
    assert SQLiteDialect(TIMEOUTS).text_operand(Operator.CONTAINS, text) == text
    assert AiomysqlDialect(TIMEOUTS).text_operand(Operator.ICONTAINS, text) == text
    assert all(
        dialect(TIMEOUTS).text_operand(Operator.CONTAINS, None) is None
        for dialect in (PortableDialect, SQLServerDialect)
    )


def test_a_database_without_an_upsert_of_its_own_refuses_it() -> None:
    table = sa.Table("t", sa.MetaData(), sa.Column("id", sa.Integer(), primary_key=True))
    with pytest.raises(UnsupportedOperationError, match="no upsert"):
        PortableDialect(TIMEOUTS).upsert(table, {}, ["id"], [], None)


@pytest.mark.parametrize("database_url", ["mysql"], indirect=True)
async def test_mysql_is_strict_and_keeps_the_key_0_whatever_the_server_says(database_url: str) -> None:
    async with SQLAlchemySession(database_url) as session:
        modes = (await session.execute(sa.text("SELECT @@SESSION.sql_mode"))).scalar_one().split(",")
        assert {"STRICT_TRANS_TABLES", "NO_AUTO_VALUE_ON_ZERO"} <= set(modes)


@pytest.mark.parametrize("driver", ["aiomysql", "asyncmy"])
@pytest.mark.parametrize("database_url", ["mysql"], indirect=True)
async def test_mysql_a_connection_that_is_gone_is_lost_however_often_it_is_asked(
    database_url: str, driver: str
) -> None:
    url = make_url(database_url).set(drivername=f"mysql+{driver}")
    async with SQLAlchemySession(url, pool_size=1, max_overflow=0) as session:
        connection = session._pool.take()
        assert connection is not None
        assert not session.dialect.is_dead(connection.driver)
        await asyncio.to_thread(kill_connections, database_url)
        await until(lambda: session.dialect.is_dead(connection.driver))
        for _ in range(3):
            with pytest.raises(Exception) as caught:  # noqa: PT011 - each driver has its own tree
                await session.dialect.command(connection, "SELECT 1")
            assert isinstance(translate(caught.value, session.dialect), ConnectionLostError), caught.value
        session._pool.mend(connection)
        await session.ping()


@pytest.mark.parametrize("driver", ["aiomysql", "asyncmy"])
@pytest.mark.parametrize("database_url", ["mysql"], indirect=True)
async def test_mysql_an_idle_connection_with_something_unread_is_dead(database_url: str, driver: str) -> None:
    url = make_url(database_url).set(drivername=f"mysql+{driver}")
    async with SQLAlchemySession(url, pool_size=1, max_overflow=0) as session:
        connection = session._pool.take()
        assert connection is not None
        await connection.driver._execute_command(3, "SELECT 'an answer that nobody reads'")  # COM_QUERY
        await until(lambda: session.dialect.is_dead(connection.driver))
        session._pool.release(connection)
        assert (await session.execute(sa.text("SELECT 7"))).scalar() == 7


def test_what_a_changed_table_breaks_may_be_replayed() -> None:
    for code in (159, 1412):
        failure = translate(InternalError(code, "the table has changed"), AiomysqlDialect(TIMEOUTS))
        assert isinstance(failure, SerializationError)
    out_of_turn = InternalError("Packet sequence number wrong - got 3 expected 1")
    assert isinstance(translate(out_of_turn, AiomysqlDialect(TIMEOUTS)), ConnectionLostError)
    stale = InvalidCachedStatementError("cached plan must not change result type")
    dialect = PostgreSQLDialect(TIMEOUTS)
    assert dialect.plan_is_stale(stale)
    assert isinstance(translate(stale, dialect), SerializationError)
    assert not dialect.plan_is_stale(FeatureNotSupportedError("of another kind"))


def test_the_smallest_statement_timeout_is_still_one() -> None:
    arguments = AsyncpgDialect(Timeouts(5.0, 0.0004)).engine_arguments(make_url("postgresql+asyncpg://h/d"))
    assert arguments["connect_args"]["server_settings"]["statement_timeout"] == "1", "0 would be none at all"
    without = AsyncpgDialect(Timeouts(5.0, None)).engine_arguments(make_url("postgresql+asyncpg://h/d"))
    assert "statement_timeout" not in without["connect_args"]["server_settings"]
