"""Which SQL each dialect writes where databases differ: text searches and the place of NULL."""

from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import make_url
from sqlalchemy.dialects import mssql, mysql, postgresql, sqlite

from fastapi_building_blocks.domain.query import Operator
from fastapi_building_blocks.infrastructure.database.dialects import PortableDialect, Timeouts, dialect_for

URLS = {
    "postgres": "postgresql+asyncpg://h/db",
    "mysql": "mysql+aiomysql://h/db",
    "sqlite": "sqlite+aiosqlite:///file.db",
    "mssql": "mssql+aioodbc://h/db",
}
COMPILERS: dict[str, Any] = {
    "postgres": postgresql.asyncpg.dialect(),
    "mysql": mysql.aiomysql.dialect(),
    "sqlite": sqlite.aiosqlite.dialect(),
    "mssql": mssql.aioodbc.dialect(paramstyle="qmark"),
}
people = sa.Table(
    "people",
    sa.MetaData(),
    sa.Column("id", sa.Integer(), primary_key=True),
    sa.Column("name", sa.String(20)),
    sa.Column("age", sa.Integer()),
)


def dialect(database: str) -> PortableDialect:
    return dialect_for(make_url(URLS[database]), Timeouts(5.0, 30.0))


@pytest.mark.parametrize(
    ("database", "operator", "clause"),
    [
        ("postgres", Operator.CONTAINS, r"people.name LIKE $1::VARCHAR ESCAPE '\'"),
        ("postgres", Operator.ICONTAINS, r"people.name ILIKE $1::VARCHAR ESCAPE '\'"),
        ("mysql", Operator.CONTAINS, "locate(CAST(%s AS BINARY), CAST(people.name AS BINARY)) > %s"),
        ("mysql", Operator.ICONTAINS, "locate(CAST(lower(%s) AS BINARY), CAST(lower(people.name) AS BINARY)) > %s"),
        ("mysql", Operator.STARTS_WITH, r"CAST(people.name AS BINARY) LIKE CAST(%s AS BINARY) ESCAPE '\\'"),
        ("sqlite", Operator.CONTAINS, "instr(people.name, ?) > ?"),
        ("sqlite", Operator.ICONTAINS, "instr(unicode_lower(people.name), unicode_lower(?)) > ?"),
        ("sqlite", Operator.STARTS_WITH, "people.name GLOB ?"),
        ("mssql", Operator.CONTAINS, r"(people.name COLLATE Latin1_General_100_BIN2_UTF8) LIKE ? ESCAPE '\'"),
        (
            "mssql",
            Operator.ICONTAINS,
            r"(lower(people.name) COLLATE Latin1_General_100_BIN2_UTF8) LIKE lower(?) ESCAPE '\'",
        ),
    ],
)
def test_a_text_search_regards_case_by_its_operator_and_not_by_the_columns_collation(
    database: str, operator: Operator, clause: str
):
    search = dialect(database).text_search(operator, people.c.name, sa.bindparam("p", type_=sa.String()))
    assert str(search.compile(dialect=COMPILERS[database])) == clause


@pytest.mark.parametrize(
    ("database", "descending", "nulls_last", "order"),
    [
        ("postgres", False, True, "people.age ASC"),
        ("postgres", True, False, "people.age DESC"),
        ("postgres", False, False, "people.age ASC NULLS FIRST"),
        ("postgres", True, True, "people.age DESC NULLS LAST"),
        ("sqlite", False, True, "people.age ASC NULLS LAST"),
        ("sqlite", True, False, "people.age DESC NULLS FIRST"),
        ("sqlite", False, False, "people.age ASC"),
        ("sqlite", True, True, "people.age DESC"),
        ("mysql", False, False, "people.age ASC"),
        ("mysql", False, True, "CASE WHEN (people.age IS NULL) THEN 1 ELSE 0 END, people.age ASC"),
        ("mssql", True, True, "people.age DESC"),
        ("mssql", True, False, "CASE WHEN (people.age IS NULL) THEN 0 ELSE 1 END, people.age DESC"),
    ],
)
def test_null_stands_where_it_was_asked_for(database: str, descending: bool, nulls_last: bool, order: str):
    clauses = dialect(database).order(people.c.age, descending=descending, nulls_last=nulls_last)
    assert ", ".join(str(clause.compile(dialect=COMPILERS[database])) for clause in clauses) == order


@pytest.mark.parametrize("nulls_last", [True, False])
@pytest.mark.parametrize("database", URLS)
def test_a_column_without_null_is_ordered_plainly_so_that_its_index_serves(database: str, nulls_last: bool):
    (clause,) = dialect(database).order(people.c.id, descending=False, nulls_last=nulls_last)
    assert str(clause.compile(dialect=COMPILERS[database])) == "people.id ASC"


@pytest.mark.parametrize(
    ("operator", "operand"),
    [
        (Operator.CONTAINS, r"%50\%\_\\\[a]%"),
        (Operator.ICONTAINS, r"%50\%\_\\\[a]%"),
        (Operator.STARTS_WITH, r"50\%\_\\\[a]%"),
    ],
)
def test_sql_servers_own_wildcard_is_literal_too(operator: Operator, operand: str):
    assert dialect("mssql").text_operand(operator, r"50%_\[a]") == operand
    assert dialect("mssql").text_operand(operator, None) is None


def test_sql_server_has_a_thread_for_every_connection():
    url = make_url(URLS["mssql"])
    of_database = dialect("mssql")
    of_database.pool_size(url, 20, 30)
    arguments = of_database.engine_arguments(url)["connect_args"]
    assert arguments["executor"]._max_workers >= 50
    assert arguments["timeout"] == 5
