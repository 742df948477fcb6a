"""Every statement of every repository, compiled for every database: what its SQL must and must not say."""

import re
from functools import cache

import pytest
import sqlalchemy as sa

from fastapi_building_blocks.domain import Sort, field
from fastapi_building_blocks.infrastructure import SQLAlchemyRepository, SQLAlchemySession
from fastapi_building_blocks.infrastructure.persistence.repositories.sqlalchemy_statements import compile_statement
from fastapi_building_blocks.infrastructure.persistence.repositories.table_statements import Query
from tests.contracts.sample_entities import (
    ArticleContract,
    MemberContract,
    NoteContract,
)
from tests.infrastructure.persistence.every_statement import (
    REPOSITORIES,
    URLS,
    Emitted,
    Odd,
    Odds,
    Pulse,
    Pulses,
    every_statement,
    statement_methods,
    statements_of,
)

NOTES, ARTICLES, MEMBERS = (
    next(repository for repository in REPOSITORIES if repository.__qualname__.startswith(contract.__name__))
    for contract in (NoteContract, ArticleContract, MemberContract)
)
LITERAL_OR_NAME = re.compile(r"'[^']*'|\[(?:[^\]]|\]\])*\]|\"[^\"]*\"|`[^`]*`")
IDENTITY_BATCH = re.compile(r"SET IDENTITY_INSERT (\S+) ON; (.*); SET IDENTITY_INSERT \1 OFF", re.DOTALL)
LIMITED = re.compile(r"ORDER BY [^()]*(?:\([^()]*\)[^()]*)*\s+OFFSET \? ROWS(?:\s+FETCH FIRST \? ROWS ONLY)?")


@cache
def emitted(database: str) -> tuple[Emitted, ...]:
    return tuple(item for repository in REPOSITORIES for item in every_statement(repository, database))


def of(method: str, database: str = "mssql") -> list[Emitted]:
    return [item for item in emitted(database) if item.method == method]


def bare(sql: str) -> str:
    """Return the SQL without what stands in quotes."""
    return LITERAL_OR_NAME.sub("_", sql)


def placeholders(sql: str, database: str) -> int:
    sql = bare(sql)
    if database == "postgres":
        numbers = {int(number) for number in re.findall(r"\$(\d+)", sql)}
        assert numbers == set(range(1, len(numbers) + 1))
        return len(numbers)
    return sql.replace("%%", "").count("%s") if database == "mysql" else sql.count("?")


@pytest.mark.parametrize("database", URLS)
class TestOnEveryDatabase:
    def test_the_catalogue_has_every_statement_that_there_is(self, database: str):
        assert {item.method for item in emitted(database)} == statement_methods()

    def test_each_placeholder_gets_its_argument(self, database: str):
        for item in emitted(database):
            assert placeholders(item.statement.sql, database) == len(item.arguments), item.statement.sql

    def test_nothing_is_left_to_be_compiled_when_it_runs(self, database: str):
        for item in emitted(database):
            assert "POSTCOMPILE" not in item.statement.sql
            assert "__[" not in item.statement.sql

    def test_a_row_that_the_database_fills_alone_is_inserted_without_columns(self, database: str):
        (statement,) = {
            item.statement.sql
            for item in every_statement(Pulses, database)
            if item.method == "insert" and not item.arguments and not re.search("RETURNING|OUTPUT", item.statement.sql)
        }
        assert statement == f"INSERT INTO pulses {'() VALUES ()' if database == 'mysql' else 'DEFAULT VALUES'}"

    def test_only_a_query_without_a_lock_may_be_sent_again(self, database: str):
        for item in emitted(database):
            replayable = item.statement.sql.startswith("SELECT") and item.statement.lock is None
            assert item.statement.reads is replayable, item.statement.sql

    def test_the_primary_key_closes_every_order(self, database: str):
        for item in of("select", database):
            if item.query is not None and item.query.order:
                order = item.statement.sql.rpartition("ORDER BY ")[2]
                key = list(item.statement.table.primary_key.columns)[-1]
                assert key.name in order.replace("]]", "]"), item.statement.sql

    def test_a_version_is_counted_by_every_update(self, database: str):
        for item in emitted(database):
            if item.statement.table.name in ("members", "articles") and item.method in ("patch", "update_where"):
                assert "version=(" in item.statement.sql

    def test_a_soft_deleted_row_is_neither_found_nor_changed_until_asked_for(self, database: str):
        sql = statements_of(MEMBERS, database)
        for deleted_too in (True, False):
            for statement in (
                sql.select(Query(deleted_too=deleted_too)),
                sql.select(Query(deleted_too=deleted_too, what="count")),
                sql.by_key(None, deleted_too),
                sql.by_keys(2, deleted_too),
                sql.by_fields(("email",), None, deleted_too),
                sql.patch(("name",), True, deleted_too, False),
                sql.delete(deleted_too),
                sql.update_where(("name",), Query(deleted_too=deleted_too)),
                sql.delete_where(Query(deleted_too=deleted_too)),
            ):
                assert ("deleted_at IS NULL" in statement.sql) is not deleted_too

    def test_what_comes_back_from_the_cache_is_the_statement_itself(self, database: str):
        sql = statements_of(NOTES, database)
        assert sql.by_key(None, False) is sql.by_key(None, False)
        assert sql.by_key(None, False) is not sql.by_key("update" if database != "sqlite" else None, True)


# Keyset positions: one comparison of rows where an index answers it, elsewhere bounds around OR

ROW_VALUES = re.compile(r"\([^()?$]+, [^()?$]+\) [<>] \(")


@pytest.mark.parametrize(
    ("database", "rows"), [("postgres", True), ("sqlite", True), ("mysql", False), ("mssql", False)]
)
@pytest.mark.parametrize("descending", [False, True])
def test_a_position_compares_whole_rows_where_an_index_answers_that(database: str, rows: bool, descending: bool):
    order = (Sort("stars", descending), Sort("id", descending))
    sql = statements_of(NOTES, database).select(Query(order=order, nulls=(False, False))).sql
    operator, bound = ("<", "<=") if descending else (">", ">=")
    assert bool(ROW_VALUES.search(sql)) is rows
    if rows:
        assert re.search(rf"\(notes\.stars, notes\.id\) {operator} \(", sql)
    else:
        where = sql.partition("WHERE ")[2].partition(" ORDER BY")[0].replace("%s", "?")
        assert where == (
            f"notes.stars {bound} ? AND (notes.stars {operator} ? OR notes.stars = ? AND notes.id {operator} ?)"
        )


@pytest.mark.parametrize("database", URLS)
@pytest.mark.parametrize(
    "order",
    [
        (Sort("stars"), Sort("id", descending=True)),  # mixed directions
        (Sort("bio"), Sort("id")),  # NULLs, which no comparison finds
    ],
    ids=["mixed directions", "nullable"],
)
def test_a_position_that_rows_cannot_say_is_bounded_by_its_first_key(database: str, order: tuple[Sort, ...]):
    sql = statements_of(NOTES, database).select(Query(order=order, nulls=(False, False))).sql
    assert not ROW_VALUES.search(sql)
    first = order[0].field
    assert re.search(rf"WHERE \(?notes\.{first} >= ", sql)


# SQL Server, which no test of this run may have at hand

LOCK_HINTS = {
    "update": "WITH (UPDLOCK, ROWLOCK)",
    "nowait": "WITH (UPDLOCK, ROWLOCK, NOWAIT)",
    "skip_locked": "WITH (UPDLOCK, ROWLOCK, READPAST)",
}
NOT_SQL_SERVERS = re.compile(
    r"\b(LIMIT|TOP|NULLS (FIRST|LAST)|RETURNING|FOR UPDATE|ON CONFLICT|ON DUPLICATE|ILIKE|TRUE|FALSE|ANY|ALL)\b",
    re.IGNORECASE,
)
BARE_TRUTH = re.compile(r"\b(WHERE|AND|OR|NOT|ON) \(?[01]\b(?! [=<>])")


class TestOnSQLServer:
    def test_nothing_is_said_in_another_databases_words(self):
        for item in emitted("mssql"):
            assert not NOT_SQL_SERVERS.search(bare(item.statement.sql)), item.statement.sql
            assert not ROW_VALUES.search(bare(item.statement.sql)), item.statement.sql

    def test_a_condition_is_a_comparison_and_never_a_bare_truth_value(self):
        for item in emitted("mssql"):
            assert not BARE_TRUTH.search(bare(item.statement.sql)), item.statement.sql

    def test_booleans_are_compared_with_1_and_0(self):
        sql = statements_of(ARTICLES, "mssql")
        assert sql.by_key(None, False).sql.endswith("WHERE articles.id = ? AND articles.deleted = 0")
        assert sql.restore(("deleted",)).sql.endswith("WHERE articles.id = ? AND articles.deleted = 1")

    def test_r1_offset_and_fetch_follow_an_order_and_take_parameters(self):
        limited = [item for item in emitted("mssql") if re.search(r"\b(OFFSET|FETCH)\b", bare(item.statement.sql))]
        assert {item.query.what for item in limited if item.query} == {"rows", "exists", "capped count"}
        for item in limited:
            assert LIMITED.search(bare(item.statement.sql)), item.statement.sql

    def test_whatever_is_limited_says_so_in_sql(self):
        for item in of("select"):
            assert item.query is not None
            assert ("FETCH FIRST ? ROWS ONLY" in item.statement.sql) is item.query.limit
            assert ("OFFSET ? ROWS" in item.statement.sql) is item.query.offset

    def test_no_column_is_twice_in_one_order(self):
        for item in (item for item in of("select") if "ORDER BY" in item.statement.sql):
            keys = item.statement.sql.rpartition("ORDER BY ")[2].partition("OFFSET")[0].split(", ")
            plain = [key.strip().removesuffix(" ASC").removesuffix(" DESC") for key in keys if "CASE" not in key]
            assert len(plain) == len(set(plain))

    def test_nulls_are_sorted_by_a_case_where_their_place_is_not_the_databases_own(self):
        sql = statements_of(NOTES, "mssql")
        last = sql.select(Query(order=(Sort("bio"), Sort("id")))).sql
        assert "ORDER BY CASE WHEN (notes.bio IS NULL) THEN 1 ELSE 0 END, notes.bio ASC, notes.id ASC" in last
        first = sql.select(Query(order=(Sort("bio", nulls="first"), Sort("id")))).sql
        assert first.endswith("ORDER BY notes.bio ASC, notes.id ASC")

    def test_a_capped_count_counts_a_limited_subquery(self):
        sql = statements_of(NOTES, "mssql")
        statement = sql.select(Query(what="capped count", limit=True, offset=True))
        assert " ".join(statement.sql.split()) == (
            "SELECT count(*) AS count_1 FROM (SELECT 1 AS one FROM notes ORDER BY notes.id "
            "OFFSET ? ROWS FETCH FIRST ? ROWS ONLY) AS anon_1"
        )
        assert statement.bind([11, 0]) == (0, 11)

    def test_a_write_answers_by_output(self):
        for item in (*of("insert"), *of("update"), *of("patch"), *of("upsert")):
            if "OUTPUT" in item.statement.sql:
                answer = bare(item.statement.sql).partition("OUTPUT ")[2]
                assert re.match(r"1 |inserted\.", answer), item.statement.sql
        sql = statements_of(NOTES, "mssql")
        everything = "OUTPUT inserted.id, inserted.title, inserted.stars, inserted.email, inserted.bio"
        assert f"{everything} VALUES (" in sql.insert(frozenset(), True).sql
        assert f"{everything} WHERE " in sql.patch(("title",), False, False, True).sql
        assert sql.upsert(frozenset(), frozenset(), ("id",), True).sql.endswith(f" {everything};")

    @pytest.mark.parametrize(("lock", "hint"), LOCK_HINTS.items())
    def test_a_lock_is_a_hint_on_the_table(self, lock: str, hint: str):
        locked = [item for item in emitted("mssql") if item.statement.lock == lock]
        assert {item.method for item in locked} == {"select", "by_key", "by_fields"}
        for item in locked:
            assert re.search(rf"FROM \S+ {re.escape(hint)}", bare(item.statement.sql)), item.statement.sql

    def test_an_upsert_is_a_merge_that_holds_its_range(self):
        for item in of("upsert"):
            sql = item.statement.sql
            batch = IDENTITY_BATCH.fullmatch(sql)
            assert re.match(r"MERGE INTO \S+ WITH \(HOLDLOCK\) AS target USING ", bare(batch[2] if batch else sql))
            assert batch or sql.endswith(";")
            assert bare(sql).count(" WHEN MATCHED THEN UPDATE SET ") == 1  # without one there would be no row to answer
            assert bare(sql).count(" WHEN NOT MATCHED THEN INSERT (") == 1
            assert re.search(r"VALUES \([?, ]*\)( OUTPUT inserted\.|;|$)", bare(batch[2] if batch else sql))

    def test_an_upsert_writes_what_it_should_and_no_more(self):
        sql = statements_of(MEMBERS, "mssql").upsert(frozenset(), frozenset(), ("email",), False).sql
        changes = sql.partition("UPDATE SET ")[2].partition(" WHEN NOT MATCHED")[0]
        assert "ON target.email = ? WHEN MATCHED" in sql
        assert "target.version = target.version + 1" in changes
        assert "target.created_at" not in changes
        assert "target.email" not in changes
        # The row that is found keeps its key; the key of yet another row collides with it.
        assert (
            "target.id = CASE WHEN EXISTS (SELECT 1 FROM members AS other WHERE other.id = ?) THEN ? ELSE target.id END"
        ) in changes

    @pytest.mark.parametrize("method", ["insert", "upsert"])
    def test_a_key_that_the_database_counts_up_may_be_given(self, method: str):
        for item in of(method):
            table = item.statement.table
            counts = table.name in ("tickets", "pulses")
            given = table.primary_key.columns[0] in item.statement.columns
            batch = IDENTITY_BATCH.fullmatch(item.statement.sql)
            assert bool(batch) is (counts and given), item.statement.sql
            if batch:
                assert batch[1] == table.name
                assert f"({', '.join(column.name for column in item.statement.columns)})" in batch[2]
            if counts:
                assert not re.search(r"(SET|,) target\.id =", item.statement.sql)  # an identity cannot be updated

    def test_no_statement_has_more_parameters_than_the_server_takes(self):
        assert max(len(item.arguments) for item in emitted("mssql")) <= 2_100

    def test_names_are_quoted_in_all_that_is_written_by_hand(self):
        sql = statements_of(Odds, "mssql").upsert(frozenset(), frozenset(), ("select",), True).sql
        assert sql.startswith("MERGE INTO [my schema].[or:der [by]]] WITH (HOLDLOCK) AS target ")
        assert "ON target.[select] = ? WHEN MATCHED THEN UPDATE SET target.[so:big?] = ?, target.[wh]]en] = ?" in sql
        assert sql.endswith("OUTPUT inserted.[k?y], inserted.[select], inserted.[so:big?], inserted.[wh]]en];")

    def test_the_size_of_a_table_is_asked_by_its_quoted_name(self):
        sql = statements_of(Odds, "mssql")
        estimate = compile_statement(sql.dialect.estimate(Odds.table), Odds.table, sql.compiler)
        assert estimate.sql == (
            "SELECT SUM(rows) FROM sys.partitions WHERE object_id = OBJECT_ID(?) AND index_id IN (0, 1)"
        )
        assert estimate.bind([]) == ("[my schema].[or:der [by]]]",)


# Against real databases: what is rarely met in a table


class LocalOdds(SQLAlchemyRepository[Odd]):
    table = Odds.table.to_metadata(sa.MetaData(), schema=None)


async def test_names_that_mean_something_in_sql_are_names_all_the_same(database_url: str):
    async with SQLAlchemySession(database_url) as session:
        await session.create_tables(LocalOdds.table.metadata)
        odds = LocalOdds(session)
        await odds.add(Odd(1, "a", True, "100%"))
        await odds.add_many([Odd(2, "b"), Odd(3, "c", False, "?")])
        assert await odds.upsert(Odd(4, "a", False, "%s"), on=["select"]) == Odd(1, "a", False, "%s")
        assert await odds.patch(2, {"when": ":x"}) == Odd(2, "b", None, ":x")
        assert [odd.key for odd in await odds.get_all(field("when").contains("%"), sort="-select")] == [1]
        assert await odds.update_where({"big": True}, field("select") == "c") == 1
        assert await odds.get(3) == Odd(3, "c", True, "?")


async def test_a_row_may_be_left_to_the_database_as_a_whole(database_url: str):
    async with SQLAlchemySession(database_url) as session:
        await session.create_tables(Pulses.table.metadata)
        pulses = Pulses(session)
        first = await pulses.add(Pulse())
        assert first.id == 1
        assert first.at is not None
        assert await pulses.add_many([Pulse(), Pulse()]) == 2
        assert [pulse.id for pulse in await pulses.get_all(field("at").is_not_null())] == [1, 2, 3]
