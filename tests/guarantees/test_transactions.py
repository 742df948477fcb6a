"""T2 to T5 and P3 of the guarantees, against real servers with real clashes."""

import asyncio
from typing import Any

import pytest
import sqlalchemy as sa

from fastapi_building_blocks.domain import (
    BuildingBlocksError,
    CommitOutcomeUnknownError,
    ForeignKeyError,
    StatementTimeoutError,
    TransientError,
    field,
)
from fastapi_building_blocks.infrastructure import SQLAlchemySession, UnitOfWork
from tests.guarantees.ledger import Accounts, account, opened
from tests.server_view import kill_connections, open_transactions, until

on_servers = pytest.mark.parametrize("database_url", ["postgres", "mysql"], indirect=True)
with_deferred_constraints = pytest.mark.parametrize("database_url", ["sqlite", "postgres"], indirect=True)
portable_too = pytest.mark.parametrize("portable", [False, True], ids=["driver", "portable"])

deferred = sa.MetaData()
parents = sa.Table("parents", deferred, sa.Column("id", sa.Integer(), primary_key=True, autoincrement=False))
children = sa.Table(
    "children",
    deferred,
    sa.Column("id", sa.Integer(), primary_key=True, autoincrement=False),
    sa.Column("parent_id", sa.ForeignKey("parents.id", deferrable=True, initially="DEFERRED")),
)


class LeaveTheBlock(Exception):
    pass


@portable_too
@with_deferred_constraints
async def test_t2_a_failed_commit_leaves_nothing_behind(database_url: str, portable: bool) -> None:
    async with SQLAlchemySession(database_url, pool_size=1, max_overflow=0, portable=portable) as session:
        await session.create_tables(deferred)
        seen: list[str] = []
        with pytest.raises(ForeignKeyError):
            async with session.transaction() as unit:
                unit.on_commit(lambda: seen.append("hook"))
                await unit.execute(sa.insert(children).values(id=1, parent_id=99))
        assert seen == []
        await until(lambda: session.pool_status().checked_out == 0)
        async with session.transaction() as unit:  # the next borrower
            assert (await unit.execute(sa.select(sa.func.count()).select_from(children))).scalar() == 0
            await unit.execute(sa.insert(parents).values(id=1))
        with pytest.raises(ForeignKeyError):
            await session.execute(sa.insert(children).values(id=2, parent_id=99))  # a transaction of its own
        assert (await session.execute(sa.select(sa.func.count()).select_from(children))).scalar() == 0
        assert (await session.execute(sa.select(sa.func.count()).select_from(parents))).scalar() == 1
        if "postgres" in database_url:
            assert open_transactions(database_url) == 0


@portable_too
async def test_t3_savepoints_are_real_and_ddl_is_undone_on_sqlite(sqlite_url: str, portable: bool) -> None:
    async with opened(sqlite_url, portable=portable) as session:
        with pytest.raises(LeaveTheBlock):
            async with session.transaction() as unit:
                async with unit.savepoint():
                    await Accounts(unit).add(account(1))
                    await unit.execute(sa.text("CREATE TABLE extra (id INTEGER)"))
                async with unit.savepoint():
                    await unit.execute(sa.text("INSERT INTO extra VALUES (1)"))
                raise LeaveTheBlock
        assert await Accounts(session).count() == 0
        with pytest.raises(BuildingBlocksError):
            await session.execute(sa.text("SELECT * FROM extra"))
        async with session.transaction() as unit:
            with pytest.raises(LeaveTheBlock):
                async with unit.savepoint():
                    await unit.execute(sa.text("CREATE TABLE extra (id INTEGER)"))
                    raise LeaveTheBlock
            await unit.execute(sa.text("CREATE TABLE extra (id INTEGER)"))
        assert (await session.execute(sa.text("SELECT count(*) FROM extra"))).scalar() == 0


WRITES: dict[str, Any] = {
    "add": lambda accounts: accounts.add(account(10)),
    "add_many": lambda accounts: accounts.add_many([account(number) for number in range(10, 40)]),
    "upsert": lambda accounts: accounts.upsert(account(1, 7)),
    "upsert_many": lambda accounts: accounts.upsert_many([account(number, 7) for number in range(30)]),
    "update": lambda accounts: accounts.update(account(1, 7)),
    "update_many": lambda accounts: accounts.update_many([account(1, 7), account(2, 7)]),
    "patch": lambda accounts: accounts.patch(1, {"balance": 7}),
    "update_where": lambda accounts: accounts.update_where({"balance": 7}, field("id") > 0),
    "delete": lambda accounts: accounts.delete(1),
    "delete_where": lambda accounts: accounts.delete_where(everything=True),
    "get_or_add": lambda accounts: accounts.get_or_add(account(10)),
    "expression": lambda accounts: accounts.delete_where(accounts.table.c.id > 1),
}


@portable_too
@pytest.mark.parametrize("first", [True, False], ids=["first statement", "after another one"])
async def test_t4_a_repository_never_commits_inside_a_callers_transaction(
    database_url: str, portable: bool, first: bool
) -> None:
    async with opened(database_url, pool_size=1, max_overflow=0, portable=portable) as session:
        stored = [account(number) for number in range(5)]
        await Accounts(session).add_many(stored)
        for name, write in WRITES.items():
            with pytest.raises(LeaveTheBlock):
                async with session.transaction() as unit:
                    if not first:
                        await Accounts(unit).count()
                    await write(Accounts(unit))
                    raise LeaveTheBlock
            assert await Accounts(session).get_all(sort="id") == stored, name
            async with session.transaction() as unit:
                with pytest.raises(LeaveTheBlock):
                    async with unit.savepoint():
                        await write(Accounts(unit))
                        raise LeaveTheBlock
            assert await Accounts(session).get_all(sort="id") == stored, name


async def test_t5_a_busy_sqlite_file_is_waited_for_and_then_a_clash(sqlite_url: str) -> None:
    async with opened(sqlite_url) as session, opened(sqlite_url) as other:
        await session.execute(sa.text("SELECT 1"))
        async with session.transaction() as unit:
            await Accounts(unit).add(account(1))
            await other.execute(sa.text("PRAGMA busy_timeout = 50"))
            with pytest.raises(TransientError):
                await Accounts(other).add(account(2))
        await Accounts(other).add(account(2))
        assert await Accounts(session).count() == 2


@on_servers
async def test_t6_a_connection_that_breaks_in_the_commit_leaves_the_outcome_unknown(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(database_url) as session:
        real = session.dialect.commit

        async def commit_and_break(connection: Any) -> None:
            await real(connection)
            await asyncio.to_thread(kill_connections, database_url)
            await session.dialect.command(connection, "COMMIT")

        monkeypatch.setattr(session.dialect, "commit", commit_and_break)
        attempts = 0

        async def work(unit: UnitOfWork) -> None:
            nonlocal attempts
            attempts += 1
            await Accounts(unit).add(account(1))

        with pytest.raises(CommitOutcomeUnknownError) as caught:
            await session.run(work, attempts=5)
        assert attempts == 1, "never replayed"
        assert caught.value.retry_after is None
        assert await Accounts(session).count() == 1
        await until(lambda: session.pool_status().checked_out == 0)


SLOW = {
    "p": "SELECT pg_sleep(30)",
    "m": "SELECT SLEEP(30), COUNT(*) FROM information_schema.columns a, information_schema.columns b",
    "s": "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n WHERE i < 0",
}


async def test_a_statement_that_takes_too_long_is_ended(database_url: str) -> None:
    async with opened(database_url, statement_timeout=0.3, pool_size=1, max_overflow=0) as session:
        async with asyncio.timeout(10):
            with pytest.raises(StatementTimeoutError):
                await session.execute(sa.text(SLOW[database_url[0]]))
            with pytest.raises(StatementTimeoutError):
                async with session.transaction() as unit:
                    await Accounts(unit).add(account(1))
                    await unit.execute(sa.text(SLOW[database_url[0]]))
        assert await Accounts(session).count() == 0
        await until(lambda: session.pool_status().checked_out == 0)
