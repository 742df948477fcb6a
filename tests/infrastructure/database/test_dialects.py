"""What the dialects promise: the right one for a URL, sane pools, literal searches and honest refusals."""

from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import make_url

from fastapi_building_blocks.domain import UnsupportedOperationError
from fastapi_building_blocks.domain.query import Operator
from fastapi_building_blocks.infrastructure import SQLAlchemySession
from fastapi_building_blocks.infrastructure.database.dialects import PortableDialect, Timeouts, dialect_for
from fastapi_building_blocks.infrastructure.database.dialects.mssql import SQLServerDialect
from fastapi_building_blocks.infrastructure.database.dialects.mysql import AiomysqlDialect, MySQLDialect
from fastapi_building_blocks.infrastructure.database.dialects.postgresql import AsyncpgDialect, PostgreSQLDialect
from fastapi_building_blocks.infrastructure.database.dialects.sqlite import AiosqliteDialect, SQLiteDialect

TIMEOUTS = Timeouts(5.0, 30.0)


@pytest.mark.parametrize(
    ("url", "fast", "portable"),
    [
        ("postgresql+asyncpg://h/d", AsyncpgDialect, PostgreSQLDialect),
        ("postgresql+psycopg://h/d", PostgreSQLDialect, PostgreSQLDialect),
        ("mysql+aiomysql://h/d", AiomysqlDialect, MySQLDialect),
        ("mariadb+aiomysql://h/d", AiomysqlDialect, MySQLDialect),
        ("mysql+asyncmy://h/d", MySQLDialect, MySQLDialect),
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


def test_the_smallest_statement_timeout_is_still_one() -> None:
    arguments = AsyncpgDialect(Timeouts(5.0, 0.0004)).engine_arguments(make_url("postgresql+asyncpg://h/d"))
    assert arguments["connect_args"]["server_settings"] == {"statement_timeout": "1"}, "0 would be none at all"
    without = AsyncpgDialect(Timeouts(5.0, None)).engine_arguments(make_url("postgresql+asyncpg://h/d"))
    assert without["connect_args"]["server_settings"] == {}
