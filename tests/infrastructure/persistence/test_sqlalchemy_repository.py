"""What a repository promises on awkward tables, and how it says that a declaration contradicts itself."""

import asyncio
import dataclasses
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal, localcontext
from typing import Any

import pytest
import sqlalchemy as sa

from fastapi_building_blocks.domain import (
    BuildingBlocksError,
    ConstraintError,
    CursorRequest,
    DuplicateKeyError,
    InvalidInputError,
    InvalidQueryError,
    MultipleResultsError,
    NotFoundError,
    PageRequest,
    UnsupportedOperationError,
    field,
)
from fastapi_building_blocks.infrastructure import (
    BinaryString,
    ExactDecimal,
    SQLAlchemyRepository,
    SQLAlchemySession,
    UtcDateTime,
)
from fastapi_building_blocks.infrastructure.database.types import utc_now
from fastapi_building_blocks.infrastructure.persistence.repositories import sqlalchemy_repository
from tests.guarantees.ledger import Account, Accounts, account, accounts, opened

PATHS = ["driver", "portable", "without returning"]
odd_metadata = sa.MetaData()
odd = sa.Table(
    "Order by; --50%",
    odd_metadata,
    sa.Column("Primary %s Key", sa.Integer(), primary_key=True, autoincrement=False, key="id"),
    sa.Column("select", sa.String(50), nullable=False, unique=True, key="name"),
    sa.Column("50%", sa.Integer(), nullable=False, key="share"),
    sa.Column(":x $1 ?", sa.Integer(), key="amount"),
    sa.Column("arg__0", sa.Integer(), key="arg__1"),
    sa.Column("user", sa.String(20), server_default="nobody", key="user"),
    sa.Column("row_version", sa.Integer(), nullable=False, key="version"),
    sa.Column("gone", UtcDateTime(), key="deleted_at"),
)


@dataclasses.dataclass
class Odd:
    id: int
    name: str
    share: int = 1
    amount: int | None = None
    arg__1: int | None = None
    user: str | None = None
    version: int | None = None
    deleted_at: Any = None


class Odds(SQLAlchemyRepository[Odd]):
    table = odd
    version_column = "version"
    soft_delete_column = "deleted_at"


computed_metadata = sa.MetaData()
lines = sa.Table(
    "order_lines",
    computed_metadata,
    sa.Column("id", sa.Integer(), primary_key=True),
    sa.Column("pieces", sa.Integer(), nullable=False),
    sa.Column("price", sa.Integer(), nullable=False),
    sa.Column("total", sa.Integer(), sa.Computed("pieces * price", persisted=True)),
    sa.Column("stamp", UtcDateTime(), server_default=utc_now()),
    sa.Column("source", sa.String(20), default="shop", onupdate=lambda: "changed"),
)


@dataclasses.dataclass
class Line:
    id: int | None
    pieces: int
    price: int
    total: int | None = None
    stamp: Any = None
    source: str | None = None


class Lines(SQLAlchemyRepository[Line]):
    table = lines


papers_metadata = sa.MetaData()
papers = sa.Table(
    "papers",
    papers_metadata,
    sa.Column("id", sa.Integer(), primary_key=True, autoincrement=False),
    sa.Column("title", sa.String(20), nullable=False, unique=True),
    sa.Column("copies", sa.Integer(), default=5),
    sa.Column("stamp", sa.Integer(), default=1, onupdate=lambda: 9),
    sa.Column("deleted_at", UtcDateTime()),
)


@dataclasses.dataclass
class Paper:
    id: int | None
    title: str
    copies: int | None = None
    stamp: int | None = None
    deleted_at: Any = None


class Papers(SQLAlchemyRepository[Paper]):
    table = papers
    soft_delete_column = "deleted_at"


class PapersByHand(Papers):
    """Leaves out what it does not know."""

    def _row_to_entity(self, row: Any) -> Paper:
        return Paper(row.id, row.title, row.copies, row.stamp, row.deleted_at)

    def _entity_to_dict(self, entity: Paper) -> dict[str, Any]:
        values = {"id": entity.id, "title": entity.title, "copies": entity.copies, "stamp": entity.stamp}
        return {name: value for name, value in values.items() if value is not None}


@pytest.fixture(params=PATHS)
async def session(request: pytest.FixtureRequest, database_url: str) -> AsyncIterator[SQLAlchemySession]:
    if request.param == "without returning" and "mysql" not in database_url:
        pytest.skip("MySQL alone is without RETURNING")
    async with opened(database_url, portable=request.param == "portable") as session:
        if request.param == "without returning":
            session.dialect.insert_returning = False
        yield session


async def test_columns_of_any_name_are_written_found_and_named_by_their_keys(session: SQLAlchemySession) -> None:
    await session.create_tables(odd_metadata)
    repository = Odds(session)
    first = await repository.add(Odd(1, "a%s", 3, 4, 5))
    assert first == Odd(1, "a%s", 3, 4, 5, "nobody", 1)
    assert (
        await repository.add_many([Odd(number, f"n{number}", number, None, 0, "me") for number in range(2, 40)]) == 38
    )
    with pytest.raises(DuplicateKeyError) as caught:
        await repository.add(Odd(99, "a%s"))
    assert caught.value.fields == ("name",)
    with pytest.raises(DuplicateKeyError) as caught:
        await repository.add(Odd(1, "b"))
    assert caught.value.fields == ("id",)
    assert (await repository.upsert(Odd(50, "a%s", 30), on=["name"])).id == 1
    assert (await repository.get(1)).share == 30
    assert await repository.upsert_many([Odd(1, "a%s", 31), Odd(60, "new")]) == 2
    with pytest.raises(DuplicateKeyError):
        await repository.upsert(Odd(1, "new"))
    updated = await repository.update(await repository.get(2))
    assert updated.version == 2
    assert (await repository.patch(2, {"share": 77, "amount": None, "arg__1": 8})).arg__1 == 8
    assert await repository.update_where({"share": 5}, field("name").contains("%s") | (field("share") == 77)) == 2
    assert await repository.update_many([await repository.get(2), await repository.get(3)]) == 2
    assert [one.id for one in await repository.get_all(field("amount").is_null(), sort=["-share", "id"], limit=3)]
    assert await repository.find_one(odd.c.name == "a%s", field("id") == 1) is not None
    page = await repository.paginate_by_cursor(CursorRequest(10), field("share") > 0, sort=["user", "-share"])
    after = await repository.paginate_by_cursor(
        CursorRequest(10, page.next_cursor), field("share") > 0, sort=["user", "-share"]
    )
    assert not {one.id for one in page.items} & {one.id for one in after.items}
    assert [one.id for one in await repository.get_many([3, 1, 999, 3])] == [3, 1, 3]
    assert await repository.delete(3)
    assert not await repository.delete(3)
    assert await repository.restore(3)
    assert await repository.delete_where(field("name").starts_with("n1")) == 10
    assert len([one async for one in repository.stream(batch_size=7)]) == await repository.count() == 30
    assert await repository.including_deleted().delete_where(everything=True) == 40


async def test_columns_whose_keys_are_not_their_names_are_upserted(session: SQLAlchemySession) -> None:
    keyed = sa.Table(
        "keyed",
        sa.MetaData(),
        sa.Column("account_id", sa.Integer(), primary_key=True, autoincrement=False, key="id"),
        sa.Column("account_number", sa.String(20), unique=True, nullable=False, key="number"),
        sa.Column("account_balance", sa.Integer(), nullable=False, key="balance"),
        sa.Column("account_owner", sa.String(20), key="owner"),
    )

    class Keyed(SQLAlchemyRepository[Account]):
        table = keyed

    await session.create_tables(keyed.metadata)
    repository = Keyed(session)
    assert await repository.upsert(account(1, 5)) == account(1, 5)
    assert await repository.upsert(account(1, 6, "me")) == account(1, 6, "me")
    assert await repository.upsert(Account(2, "A1", 7), on=["number"]) == account(1, 7)
    assert await repository.upsert_many([account(1, 8), account(2, 9)], on=["number"]) == 2
    with pytest.raises(DuplicateKeyError):
        await repository.upsert(Account(2, "A1", 99), on=["number"])
    assert await repository.get_all(sort="id") == [account(1, 8), account(2, 9)]


async def test_what_the_database_computes_comes_back_and_is_never_written(session: SQLAlchemySession) -> None:
    await session.create_tables(computed_metadata)
    repository = Lines(session)
    line = await repository.add(Line(None, 3, 5, total=999))
    assert (line.total, line.source, line.id is not None, line.stamp is not None) == (15, "shop", True, True)
    changed = await repository.update(dataclasses.replace(line, pieces=4, total=0))
    assert changed.total == 20
    patched = await repository.patch(line.id, {"price": 6})
    assert (patched.total, patched.source) == (24, "changed")
    assert await repository.add_many([Line(None, number, 2) for number in range(10)]) == 10
    assert await repository.count(lines.c.total == lines.c.pieces * 2) >= 9
    assert (await repository.upsert(dataclasses.replace(line, pieces=7))).total == 35


class Lowered(sa.TypeDecorator[str]):
    """Text that the database makes lower case on its way in."""

    impl = sa.String
    cache_ok = True

    def bind_expression(self, bindvalue: Any) -> Any:
        return sa.func.lower(bindvalue, type_=self)


async def test_a_type_that_binds_by_sql_does_so_in_every_write(session: SQLAlchemySession) -> None:
    lowered = sa.Table(
        "lowered",
        sa.MetaData(),
        sa.Column("id", sa.Integer(), primary_key=True, autoincrement=False),
        sa.Column("number", Lowered(20), nullable=False, unique=True),
        sa.Column("balance", sa.Integer(), nullable=False),
        sa.Column("owner", Lowered(20)),
    )

    class LoweredAccounts(SQLAlchemyRepository[Account]):
        table = lowered

    await session.create_tables(lowered.metadata)
    repository = LoweredAccounts(session)
    assert await repository.add_many([Account(1, "ONE"), Account(2, "TWO", owner="ME")]) == 2
    await repository.upsert(Account(3, "THREE"))
    await repository.patch(3, {"owner": "YOU"})
    assert [(one.number, one.owner) for one in await repository.get_all(sort="id")] == [
        ("one", None), ("two", "me"), ("three", "you"),
    ]  # fmt: skip
    assert (await repository.find_one(field("number") == "TWO")).id == 2


async def test_expressions_of_sqlalchemy_mix_with_criteria_everywhere(session: SQLAlchemySession) -> None:
    repository = Accounts(session)
    await repository.add_many([account(number, number * 10, f"Owner {number % 3}") for number in range(30)])
    rich = accounts.c.balance / 10 > 20
    odd_owner = field("owner") == "Owner 1"
    want = [number for number in range(30) if number > 20 and number % 3 == 1]
    assert [one.id for one in await repository.get_all(rich, odd_owner, sort="id")] == want
    assert await repository.count(odd_owner, rich) == len(want)
    assert await repository.exists(rich, odd_owner)
    assert not await repository.exists(sa.false())
    page = await repository.paginate(PageRequest(2, 1), rich, odd_owner, sort="-id")
    assert ([one.id for one in page.items], page.total) == (want[::-1][1:3], len(want))
    capped = await repository.paginate(PageRequest(1, 0, count="capped", count_cap=2), rich)
    assert (capped.total, capped.total_is_capped) == (2, True)
    first = await repository.paginate_by_cursor(CursorRequest(2), rich, odd_owner, sort="balance")
    second = await repository.paginate_by_cursor(CursorRequest(2, first.next_cursor), rich, odd_owner, sort="balance")
    assert [one.id for one in [*first.items, *second.items]] == want
    with pytest.raises(InvalidQueryError, match="another sort or filter"):
        await repository.paginate_by_cursor(
            CursorRequest(2, first.next_cursor), accounts.c.balance / 10 > 21, odd_owner, sort="balance"
        )
    assert [one.id async for one in repository.stream(rich, odd_owner, sort="id", batch_size=1)] == want
    with pytest.raises(MultipleResultsError):
        await repository.find_one(rich)
    assert await repository.update_where({"owner": None}, rich, odd_owner) == len(want)
    assert await repository.delete_where(rich, field("owner").is_null()) == len(want)
    with pytest.raises(TypeError, match="criterion or a SQLAlchemy expression"):
        await repository.get_all("balance > 1")  # type: ignore[arg-type]


async def test_a_window_past_the_end_and_an_empty_one_are_empty(session: SQLAlchemySession) -> None:
    repository = Accounts(session)
    await repository.add_many([account(number) for number in range(5)])
    assert await repository.get_all(limit=0) == []
    assert await repository.get_all(offset=5) == []
    assert [one.id for one in await repository.get_all(offset=3)] == [3, 4]
    assert await repository.get_all(offset=2**63 - 1) == []
    page = await repository.paginate(PageRequest(limit=2, offset=50))
    assert (page.items, page.total) == ([], 5)
    assert (await repository.paginate(PageRequest(count="none"))).total is None
    assert (await repository.paginate(PageRequest(count="estimated"))).total >= 0


async def test_lists_of_any_length_and_kind_are_answered(session: SQLAlchemySession) -> None:
    repository = Accounts(session)
    await repository.add_many([account(number, number, None if number % 2 else "x") for number in range(300)])
    ids = field("id")
    for size in (0, 1, 2, 3, 7, 255, 256, 257):
        assert await repository.count(ids.is_in(range(size))) == size
        assert await repository.count(ids.not_in(range(size))) == 300 - size
    assert await repository.count(field("owner").not_in([])) == 300
    assert await repository.count(field("owner").not_in(["y"])) == 150, "NULL is neither in nor out"
    assert await repository.count(~field("owner").is_in(["y"])) == 150
    assert len(await repository.get_many(range(600))) == 300
    if not session.dialect.array_parameters:
        with pytest.raises(InvalidQueryError, match="10000 values"):
            await repository.count(ids.is_in(range(40_000)))


async def test_a_stream_left_early_gives_its_connection_back(session: SQLAlchemySession) -> None:
    repository = Accounts(session)
    await repository.add_many([account(number) for number in range(2000)])
    for criteria in ((), (accounts.c.id >= 0,)):
        async with aclosing(repository.stream(*criteria, sort="id", batch_size=10)) as stream:
            assert (await anext(stream)).id == 0
        async with asyncio.timeout(5):
            while session.pool_status().checked_out:
                await asyncio.sleep(0.01)
    with pytest.raises(ValueError, match="batch_size"):
        [one async for one in repository.stream(batch_size=0)]


async def test_a_miss_is_said_the_same_way_by_every_method(session: SQLAlchemySession) -> None:
    repository = Accounts(session)
    assert await repository.get_by_id(1) is None
    for call in (
        lambda: repository.get(1),
        lambda: repository.update(account(1)),
        lambda: repository.patch(1, {"balance": 1}),
        lambda: repository.update_many([account(1)]),
    ):
        with pytest.raises(NotFoundError):
            await call()
    assert not await repository.delete(1)
    with pytest.raises(ValueError, match="no version_column"):
        await repository.patch(1, {"balance": 1}, version=1)
    with pytest.raises(TypeError, match="no soft_delete_column"):
        await repository.restore(1)
    with pytest.raises(ValueError, match="everything=True"):
        await repository.delete_where()


async def test_an_entity_is_never_shared(session: SQLAlchemySession) -> None:
    entity = account(1)
    stored = await Accounts(session).add(entity)
    assert stored == entity
    assert stored is not entity
    one, other = await Accounts(session).get_many([1, 1])
    assert one == other
    assert one is not other


# Declarations


def test_a_table_without_a_primary_key_is_refused_by_name() -> None:
    keyless = sa.Table("keyless", sa.MetaData(), sa.Column("id", sa.Integer()))
    with pytest.raises(TypeError, match="'keyless' has no primary key"):

        class Keyless(SQLAlchemyRepository[Account]):
            table = keyless


def test_an_entity_that_does_not_match_its_table_names_both_sides() -> None:
    other = sa.Table(
        "other",
        sa.MetaData(),
        sa.Column("id", sa.Integer(), primary_key=True),
        sa.Column("number", sa.Integer()),
        sa.Column("colour", sa.Integer()),
    )
    with pytest.raises(TypeError) as caught:

        class Others(SQLAlchemyRepository[Account]):
            table = other

    for name in ("Account", "other", "colour", "balance", "owner"):
        assert name in str(caught.value)


async def test_without_a_table_it_says_what_is_missing(sqlite_url: str) -> None:
    class Without(SQLAlchemyRepository[Account]):
        pass

    with pytest.raises(TypeError, match=r"Without\.table must be a SQLAlchemy Table"):
        Without(SQLAlchemySession(sqlite_url))


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
async def test_what_sqlite_lacks_is_refused_and_not_dropped(database_url: str) -> None:
    async with opened(database_url) as session:
        await Accounts(session).add(account(1))
        async with session.transaction() as unit:
            assert await Accounts(unit).get_by_id(1, lock="update") == account(1)
        for lock in ("nowait", "skip_locked"):
            with pytest.raises(UnsupportedOperationError, match=lock):
                async with session.transaction() as unit:
                    await Accounts(unit).get_by_id(1, lock=lock)
        with pytest.raises(RuntimeError, match="unit of work"):
            await Accounts(session).get_by_id(1, lock="update")


async def test_what_a_mapper_leaves_out_of_an_update_gets_its_onupdate_value(session: SQLAlchemySession) -> None:
    await session.create_tables(papers_metadata)
    by_hand = PapersByHand(session)
    await by_hand.add(Paper(1, "a", 3, 5))
    assert await by_hand.update(Paper(1, "b")) == Paper(1, "b", 3, 9)
    await by_hand.patch(1, {"stamp": 4})
    assert await by_hand.update_many([Paper(1, "c")]) == 1
    assert await by_hand.get(1) == Paper(1, "c", 3, 9)


async def test_an_upsert_does_not_write_a_default_over_what_is_there(session: SQLAlchemySession) -> None:
    await session.create_tables(papers_metadata)
    repository = Papers(session)
    assert await repository.upsert(Paper(1, "a")) == Paper(1, "a", 5, 1)
    await repository.update(Paper(1, "a", 3, 7))
    assert await repository.upsert(Paper(1, "b")) == Paper(1, "b", 3, 7)
    assert await repository.upsert_many([Paper(1, "c"), Paper(2, "d")]) == 2
    assert await repository.get_all() == [Paper(1, "c", 3, 7), Paper(2, "d", 5, 1)]


async def test_a_view_of_deleted_entities_updates_them(session: SQLAlchemySession) -> None:
    await session.create_tables(papers_metadata)
    repository = Papers(session)
    await repository.add(Paper(1, "a"))
    await repository.delete(1)
    everyone = repository.including_deleted()
    gone = await everyone.get(1)
    assert (await everyone.update(dataclasses.replace(gone, title="b"))).title == "b"
    assert await everyone.update_many([dataclasses.replace(gone, title="c")]) == 1
    with pytest.raises(NotFoundError):
        await repository.update(gone)
    assert (await everyone.get(1)).title == "c"


async def test_a_key_that_nothing_fills_is_asked_for(session: SQLAlchemySession) -> None:
    await session.create_tables(papers_metadata)
    with pytest.raises(ConstraintError) as caught:
        await Papers(session).add(Paper(None, "a"))
    assert caught.value.fields == ("id",)


async def test_no_parameters_at_all_run_nothing(session: SQLAlchemySession) -> None:
    await session.create_tables(papers_metadata)
    with pytest.raises(ValueError, match="no parameters"):
        await session.execute(papers.insert(), [])
    with pytest.raises(TypeError, match="text"):
        await session.execute("SELECT 1")
    assert await Papers(session).count() == 0


async def test_units_that_get_or_add_one_entity_at_once_do_not_deadlock(session: SQLAlchemySession) -> None:
    await session.create_tables(papers_metadata)

    async def get_or_add(number: int) -> bool:
        async with session.transaction() as unit:
            _, created = await Papers(unit).get_or_add(Paper(number, f"paper {number}"))
            return created

    for number in range(5):
        assert sum(await asyncio.gather(*(get_or_add(number) for _ in range(10)))) == 1


async def test_get_or_add_that_collides_on_another_key_dooms_its_unit(session: SQLAlchemySession) -> None:
    await session.create_tables(papers_metadata)
    await Papers(session).add(Paper(1, "a"))
    with pytest.raises(RuntimeError, match="DuplicateKeyError"):
        async with session.transaction() as unit:
            with pytest.raises(DuplicateKeyError):
                await Papers(unit).get_or_add(Paper(2, "a"))
            with pytest.raises(RuntimeError, match="DuplicateKeyError"):
                await Papers(unit).count()


async def test_a_transaction_ended_behind_the_units_back_is_no_silent_success(session: SQLAlchemySession) -> None:
    if session.dialect_name == "mysql":
        pytest.skip("DDL ends a transaction here, so an ended one says nothing")
    with pytest.raises(RuntimeError, match="ended the transaction"):
        async with session.transaction() as unit:
            await unit.execute(sa.text("SELECT 1"))
            await unit.execute(sa.text("ROLLBACK"))
    if session.dialect_name == "sqlite":
        with pytest.raises(RuntimeError, match="ended the transaction"):
            async with session.transaction(read_only=True) as unit:
                await unit.execute(sa.text("COMMIT"))
        await asyncio.gather(*[session.execute(sa.text("CREATE TABLE IF NOT EXISTS x (id INT)")) for _ in range(5)])
    await session.ping()
    assert session.pool_status().checked_out == 0


@pytest.mark.parametrize("database_url", ["postgres"], indirect=True)
async def test_a_number_that_is_always_the_databases_is_never_written(database_url: str) -> None:
    metadata = sa.MetaData()

    class Numbered(SQLAlchemyRepository[Line]):
        table = sa.Table(
            "numbered",
            metadata,
            sa.Column("id", sa.Integer(), primary_key=True),
            sa.Column("pieces", sa.Integer(), nullable=False),
            sa.Column("price", sa.Integer(), nullable=False),
            sa.Column("total", sa.Integer(), sa.Identity(always=True)),
            sa.Column("stamp", UtcDateTime()),
            sa.Column("source", sa.String(20)),
        )

    async with opened(database_url) as session:
        await session.create_tables(metadata)
        repository = Numbered(session)
        assert (await repository.add(Line(1, 2, 3, total=77))).total == 1
        assert (await repository.update(Line(1, 5, 3, total=78))).total == 1
        assert (await repository.upsert(Line(1, 6, 3, total=79))).total == 1
        assert await repository.add_many([Line(2, 1, 1, total=80), Line(3, 1, 1)]) == 2
        assert await repository.update_many([Line(2, 9, 9, total=81)]) == 1
        assert [line.pieces for line in await repository.get_all()] == [6, 9, 1]


async def test_a_table_of_nothing_but_its_key_is_updated_and_missed_like_any_other(session: SQLAlchemySession) -> None:
    links = sa.Table(
        "links",
        sa.MetaData(),
        sa.Column("a", sa.Integer(), primary_key=True),
        sa.Column("b", sa.Integer(), primary_key=True),
    )

    @dataclasses.dataclass
    class Link:
        a: int
        b: int

    class Links(SQLAlchemyRepository[Link]):
        table = links

    await session.create_tables(links.metadata)
    await Links(session).add(Link(1, 2))
    assert await Links(session).update(Link(1, 2)) == Link(1, 2)
    assert await Links(session).update_many([Link(1, 2)]) == 1
    assert await Links(session).upsert(Link(1, 2)) == Link(1, 2)
    for write in (Links(session).update(Link(1, 3)), Links(session).update_many([Link(1, 3)])):
        with pytest.raises(NotFoundError):
            await write


async def test_rows_that_need_different_statements_are_all_written_however_they_are_mixed(
    session: SQLAlchemySession, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some leave a column to the database, and the others do not; PostgreSQL is sent them while they are read."""
    monkeypatch.setattr(sqlalchemy_repository, "_HEAD", 10)
    monkeypatch.setattr(sqlalchemy_repository, "_BATCH", 50)
    monkeypatch.setattr(sqlalchemy_repository, "_TURN", 4)
    monkeypatch.setattr(sqlalchemy_repository, "_LONGEST_RUN", 0.0005)
    mixed = sa.Table(
        "mixed",
        sa.MetaData(),
        sa.Column("id", sa.Integer(), primary_key=True, autoincrement=False),
        sa.Column("state", sa.String(10), nullable=False, server_default="new"),
        sa.Column("rank", sa.Integer(), nullable=False, server_default="7"),
    )

    @dataclasses.dataclass
    class Mixed:
        id: int
        state: str | None
        rank: int | None

    class Mixeds(SQLAlchemyRepository[Mixed]):
        table = mixed

    def given() -> Any:
        for number in range(1000):
            yield Mixed(number, None if number % 3 else "old", None if number % 7 == 0 else number)

    await session.create_tables(mixed.metadata)
    assert await Mixeds(session).add_many(given()) == 1000
    expected = [Mixed(one.id, one.state or "new", 7 if one.rank is None else one.rank) for one in given()]
    assert await Mixeds(session).get_all(sort="id") == expected
    await Mixeds(session).delete_where(everything=True)
    with pytest.raises(InvalidInputError):
        await Mixeds(session).add_many([*given(), Mixed(1001, "x" * 11, 1)])
    with pytest.raises(DuplicateKeyError):
        await Mixeds(session).add_many([*given(), Mixed(5, "x", 1)])
    assert await Mixeds(session).count() == 0


async def test_an_iteration_that_stops_inside_a_mapper_is_an_error_and_loses_nothing(
    session: SQLAlchemySession,
) -> None:
    class Stopping(Accounts):
        def _entity_to_dict(self, entity: Account) -> dict[str, Any]:
            if entity.id == 1500:
                raise StopIteration
            return super()._entity_to_dict(entity)

    with pytest.raises(RuntimeError):
        await Stopping(session).add_many(account(number) for number in range(3000))
    assert await Accounts(session).count() == 0


class Shifted(sa.types.TypeDecorator[Any]):
    """A type of the service's own over one of the library's, which leaves all to it."""

    impl = UtcDateTime
    cache_ok = True


class Negated(ExactDecimal):
    """A type of the service's own that binds in its own way."""

    cache_ok = True

    def bind_processor(self, dialect: Any) -> Any:
        bind = super().bind_processor(dialect)
        return lambda value: None if value is None else bind(-value)

    def result_processor(self, dialect: Any, coltype: Any) -> Any:
        load = super().result_processor(dialect, coltype)
        return lambda value: None if value is None else -(load(value) if load else value)


async def test_types_of_a_services_own_over_the_librarys_bind_as_they_say(session: SQLAlchemySession) -> None:
    own = sa.Table(
        "own_types",
        sa.MetaData(),
        sa.Column("id", sa.Integer(), primary_key=True, autoincrement=False),
        sa.Column("moment", Shifted()),
        sa.Column("amount", Negated(12, 2)),
        sa.Column("price", ExactDecimal(12, 2)),
    )

    @dataclasses.dataclass
    class Own:
        id: int
        moment: datetime | None
        amount: Decimal | None
        price: Decimal | None

    class Owns(SQLAlchemyRepository[Own]):
        table = own

    await session.create_tables(own.metadata)
    berlin = datetime(2026, 7, 1, 12, tzinfo=timezone(timedelta(hours=2)))
    given = Own(1, berlin, Decimal("1.00"), Decimal("1234567.89"))
    with localcontext(prec=4):
        await Owns(session).add(given)
        await Owns(session).add_many([Own(2, None, None, None)])
    assert await Owns(session).get(1) == given
    assert await Owns(session).get(2) == Own(2, None, None, None)
    assert await Owns(session).count(field("price") == Decimal("1234567.89")) == 1


@pytest.mark.parametrize("database_url", ["mysql"], indirect=True)
@pytest.mark.parametrize("driver", ["aiomysql", "asyncmy"])
async def test_text_stays_text_in_a_mode_without_backslash_escapes(database_url: str, driver: str) -> None:
    url = database_url.replace("aiomysql", driver)
    hostile = "x' OR 1=1 -- \\' \\"
    async with opened(url, pool_size=1, max_overflow=0) as session:
        await session.execute(sa.text("SET SESSION sql_mode = 'STRICT_TRANS_TABLES,NO_BACKSLASH_ESCAPES'"))
        await Accounts(session).add_many([account(1, owner=hostile), account(2)])
        assert await Accounts(session).delete_where(field("owner") == "x' OR 1=1 -- ") == 0
        assert (await Accounts(session).find_one(field("owner") == hostile)).id == 1


@dataclasses.dataclass
class Measurement:
    id: int
    moment: datetime
    value: Decimal
    place: str


class Reading(SQLAlchemyRepository[Measurement]):
    """Rows of the library's own types, which COPY takes as they are."""

    table = sa.Table(
        "readings",
        sa.MetaData(),
        sa.Column("id", sa.Integer(), primary_key=True, autoincrement=False),
        sa.Column("moment", UtcDateTime(), nullable=False),
        sa.Column("value", ExactDecimal(12, 2), nullable=False),
        sa.Column("place", BinaryString(20), nullable=False),
    )


def measurements(count: int) -> Iterator[Measurement]:
    return (Measurement(n, datetime(2026, 1, 1, tzinfo=UTC), Decimal("1.50"), f"place {n}") for n in range(count))


@pytest.mark.fast_path("COPY")
@pytest.mark.parametrize("database_url", ["postgres"], indirect=True)
async def test_on_postgresql_many_rows_are_one_statement(database_url: str) -> None:
    """A trigger counts statements: COPY is one, whatever the types, and an INSERT for each row would be as many."""
    async with opened(database_url) as session:
        await session.create_tables(Reading.table.metadata)
        async with session.engine.begin() as connection:
            await connection.execute(sa.text("CREATE TABLE counted (id SERIAL)"))
            await connection.execute(
                sa.text(
                    "CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS "
                    "$$ BEGIN INSERT INTO counted DEFAULT VALUES; RETURN NULL; END $$"
                )
            )
            await connection.execute(
                sa.text("CREATE TRIGGER t AFTER INSERT ON readings FOR EACH STATEMENT EXECUTE FUNCTION note()")
            )
        assert await Reading(session).add_many(measurements(3000)) == 3000
        assert await Reading(session).count() == 3000
        assert (await session.execute(sa.text("SELECT count(*) FROM counted"))).scalar() == 1


async def test_a_generator_that_takes_its_time_is_not_the_statements(database_url: str) -> None:
    def slow() -> Iterator[Account]:
        for number in range(1400):
            if number > 1000:
                time.sleep(0.002)
            yield account(number)

    async with opened(database_url, statement_timeout=0.4) as session:
        assert await Accounts(session).add_many(slow()) == 1400


async def test_rows_that_others_refer_to_are_there_a_batch_later(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlalchemy_repository, "_HEAD", 5)
    monkeypatch.setattr(sqlalchemy_repository, "_BATCH", 20)
    nodes = sa.Table(
        "nodes",
        sa.MetaData(),
        sa.Column("id", sa.Integer(), primary_key=True, autoincrement=False),
        sa.Column("parent", sa.ForeignKey("nodes.id")),
        sa.Column("kind", sa.String(10), nullable=False, server_default="leaf"),
    )

    @dataclasses.dataclass
    class Node:
        id: int
        parent: int | None
        kind: str | None

    class Nodes(SQLAlchemyRepository[Node]):
        table = nodes

    root = Node(1, None, None)
    async with opened(database_url) as session:
        await session.create_tables(nodes.metadata)
        others = [Node(number, None if number < 60 else 1, "other") for number in range(2, 200)]
        assert await Nodes(session).add_many([others[0], root, *others[1:]]) == 199
        assert await Nodes(session).count(field("parent") == 1) == 140


@dataclasses.dataclass
class Departure:
    id: int
    local: datetime
    instant: datetime | None
    fare: Decimal


class Departures(SQLAlchemyRepository[Departure]):
    table = sa.Table(
        "departures",
        sa.MetaData(),
        sa.Column("id", sa.Integer(), primary_key=True, autoincrement=False),
        sa.Column("local", sa.DateTime(), nullable=False),
        sa.Column("instant", UtcDateTime()),
        sa.Column("fare", sa.Numeric(40, 20), nullable=False),
    )


@pytest.mark.parametrize("zone", ["UTC", "Asia/Kolkata", "Africa/Monrovia"])
@pytest.mark.parametrize("database_url", ["postgres"], indirect=True)
async def test_what_is_read_as_text_is_the_same_in_every_time_zone_of_the_server(database_url: str, zone: str) -> None:
    """Monrovia's offset had seconds until 1972."""
    moments = [
        datetime(1, 1, 2, tzinfo=UTC),
        datetime(1960, 6, 1, 12, 0, 0, 1, tzinfo=UTC),
        datetime(2026, 11, 25, 22, 34, 0, 120000, tzinfo=UTC),
        datetime(9999, 12, 30, tzinfo=UTC),
    ]
    stored = [
        Departure(number, moment.replace(tzinfo=None), moment, Decimal("1234567.00000000009876543210") * number)
        for number, moment in enumerate(moments)
    ]
    stored.append(Departure(9, datetime(2026, 1, 1), None, Decimal("-0.5")))  # noqa: DTZ001
    async with opened(database_url) as session:
        await session.create_tables(Departures.table.metadata)
        await Departures(session).add_many(stored)
        async with session.transaction() as unit:
            await unit.execute(sa.text(f"SET LOCAL TIME ZONE '{zone}'"))
            found = await Departures(unit).get_all()
            assert found == stored == [await Departures(unit).get(one.id) for one in stored]
        assert {one.instant.tzinfo for one in found if one.instant} == {UTC}
        assert [f"{one.fare:f}" for one in found] == [f"{one.fare:.20f}" for one in stored]


@pytest.mark.parametrize("database_url", ["postgres"], indirect=True)
async def test_what_no_datetime_can_hold_is_said_or_the_last_moment(database_url: str) -> None:
    async with opened(database_url) as session:
        await session.create_tables(Departures.table.metadata)
        insert = "INSERT INTO departures VALUES (:id, :moment, :moment, 'NaN')"
        for number, moment in enumerate(("infinity", "-infinity", "2000-01-01")):
            await session.execute(sa.text(insert.replace(":moment", f"'{moment}'")), {"id": number})
        first, last, usual = await Departures(session).get_all()
        assert (first.local, first.instant) == (datetime.max, datetime.max.replace(tzinfo=UTC))  # noqa: DTZ901
        assert (last.local, last.instant) == (datetime.min, datetime.min.replace(tzinfo=UTC))  # noqa: DTZ901
        assert usual.fare.is_nan()
        with pytest.raises(BuildingBlocksError, match="DateStyle"):
            async with session.transaction() as unit:
                await unit.execute(sa.text("SET LOCAL datestyle = 'German'"))
                await Departures(unit).get(2)
        await session.execute(sa.text("INSERT INTO departures VALUES (3, '0044-03-15 BC', NULL, 1)"))
        with pytest.raises(BuildingBlocksError, match="years 1 to 9999"):
            await Departures(session).get(3)


async def test_of_two_upserts_of_one_key_in_one_call_the_later_wins(database_url: str) -> None:
    async with opened(database_url) as session:
        first = [account(number, number) for number in range(300)]
        assert await Accounts(session).upsert_many(first) == 300
        again = [account(number, number + 1) for number in (*range(300), 7, 7)]
        again[-1] = dataclasses.replace(again[-1], balance=99)
        assert await Accounts(session).upsert_many(again) == 302
        assert (await Accounts(session).get(7)).balance == 99
        assert (await Accounts(session).get(8)).balance == 9
        assert await Accounts(session).count() == 300


@pytest.mark.fast_path("arrays")
@pytest.mark.parametrize("database_url", ["postgres"], indirect=True)
async def test_on_postgresql_many_upserts_of_distinct_keys_are_one_statement(database_url: str) -> None:
    async with opened(database_url) as session:
        await session.create_tables(Departures.table.metadata)
        await session.execute(sa.text("CREATE TABLE counted (id SERIAL)"))
        await session.execute(
            sa.text(
                "CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS "
                "$$ BEGIN INSERT INTO counted DEFAULT VALUES; RETURN NULL; END $$"
            )
        )
        await session.execute(
            sa.text("CREATE TRIGGER t AFTER INSERT ON departures FOR EACH STATEMENT EXECUTE FUNCTION note()")
        )
        moment = datetime(2026, 1, 1)  # noqa: DTZ001 - a column without a time zone
        rows = [Departure(number, moment, None, Decimal(number)) for number in range(3000)]
        assert await Departures(session).upsert_many(rows) == 3000
        assert (await session.execute(sa.text("SELECT count(*) FROM counted"))).scalar() == 1
        assert await Departures(session).upsert_many([*rows[:10], rows[3]]) == 11
        assert (await session.execute(sa.text("SELECT count(*) FROM counted"))).scalar() == 12
        assert await Departures(session).get_all() == rows


@pytest.mark.parametrize("zone", ["UTC", "Asia/Tokyo", "America/New_York"])
async def test_the_first_and_the_last_instants_are_read_in_whatever_time_zone_the_server_is(
    postgres_url: str, zone: str
) -> None:
    table = sa.Table(
        f"edges_{zone.rpartition('/')[2].lower()}",
        sa.MetaData(),
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("at", UtcDateTime(), nullable=False),
    )

    @dataclasses.dataclass
    class Edge:
        id: int
        at: datetime

    class Edges(SQLAlchemyRepository[Edge]):
        pass

    Edges.table = table
    # Not the very first and last: asyncpg writes those as infinite.
    moments = [datetime(1, 1, 1, 0, 1, tzinfo=UTC), datetime(9999, 12, 31, 23, 59, 59, 1, tzinfo=UTC)]
    async with SQLAlchemySession(postgres_url, pool_size=1, max_overflow=0) as session:
        await session.create_tables(table.metadata)
        await session.execute(sa.text(f"SET TIME ZONE '{zone}'"))
        edges = Edges(session)
        await edges.add_many([Edge(number, moment) for number, moment in enumerate(moments)])
        assert [(await edges.get(number)).at for number in range(2)] == moments
        await session.execute(sa.text(f"UPDATE {table.name} SET at = '10000-01-02 12:00+00'"))
        with pytest.raises(BuildingBlocksError, match="1 to 9999"):
            await edges.get(0)
