"""T2 to T4 and T9: whatever a unit of work begins with, it is whole or absent, for every other connection too."""

import asyncio
import sqlite3
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import sqlalchemy as sa

from fastapi_building_blocks.domain import CommitOutcomeUnknownError, DuplicateKeyError, ForeignKeyError
from fastapi_building_blocks.infrastructure import SQLAlchemySession, UnitOfWork
from tests.guarantees.ledger import Accounts, account, accounts, opened
from tests.server_view import kill_connections, open_transactions, until

on_servers = pytest.mark.parametrize("database_url", ["postgres", "mysql"], indirect=True)
# MySQL and MariaDB have no deferred constraints, and commit DDL by themselves.
but_mysql = pytest.mark.parametrize("database_url", ["sqlite", "postgres"], indirect=True)

deferring = sa.MetaData()
items = sa.Table("t2_items", deferring, sa.Column("id", sa.Integer(), primary_key=True))
orders = sa.Table(
    "t2_orders",
    deferring,
    sa.Column("id", sa.Integer(), primary_key=True, autoincrement=False),
    sa.Column("item_id", sa.ForeignKey("t2_items.id", deferrable=True, initially="DEFERRED")),
)


class LeaveTheBlock(Exception):
    pass


@but_mysql
async def test_t2_after_a_commit_that_failed_nobody_waits_for_its_locks_nor_sees_its_rows(database_url: str) -> None:
    async with SQLAlchemySession(database_url, pool_size=1, max_overflow=0) as session:
        await session.create_tables(deferring)
        for _ in range(3):
            with pytest.raises(ForeignKeyError) as caught:
                async with session.transaction() as unit:
                    await unit.execute(orders.insert().values(id=1, item_id=404))
            assert "t2_orders" not in str(caught.value)
            await until(lambda: session.pool_status().checked_out == 0)
            assert _writers(database_url) == 0
            assert (await session.execute(sa.select(orders))).all() == []
            async with session.transaction() as unit:
                await unit.execute(orders.insert().values(id=1))
            assert (await session.execute(orders.delete())).rowcount == 1


def _writers(url: str) -> int:
    if "sqlite" not in url:
        return open_transactions(url)
    other = sqlite3.connect(str(sa.make_url(url).database), timeout=0, isolation_level=None)
    try:
        other.execute("BEGIN IMMEDIATE")
    except sqlite3.OperationalError:
        return 1
    finally:
        other.close()
    return 0


@on_servers
async def test_t2_a_commit_on_a_dead_connection_keeps_nothing_and_claims_nothing(database_url: str) -> None:
    async with opened(database_url, pool_size=1, max_overflow=0) as session:
        hooks: list[str] = []
        with pytest.raises(CommitOutcomeUnknownError):
            async with session.transaction() as unit:
                unit.on_commit(lambda: hooks.append("ran"))
                await Accounts(unit).add(account(1))
                await asyncio.to_thread(kill_connections, database_url)
        assert hooks == []
        assert await Accounts(session).count() == 0
        await Accounts(session).add(account(2))
        await until(lambda: open_transactions(database_url) == 0)


@but_mysql
async def test_t3_ddl_and_rows_are_undone_together(database_url: str) -> None:
    made = sa.Table("t3_made", sa.MetaData(), sa.Column("id", sa.Integer(), primary_key=True))
    async with opened(database_url) as session:

        async def columns(table: str) -> list[str]:
            async with session.engine.connect() as connection:
                return await connection.run_sync(
                    lambda sync: [column["name"] for column in sa.inspect(sync).get_columns(table)]
                )

        before = await columns("accounts")
        with pytest.raises(LeaveTheBlock):
            async with session.transaction() as unit:
                await unit.execute(sa.text("ALTER TABLE accounts ADD COLUMN extra INTEGER"))
                await unit.execute(sa.text("INSERT INTO accounts (id, number, balance, extra) VALUES (1, 'A1', 0, 7)"))
                raise LeaveTheBlock
        assert await columns("accounts") == before
        async with session.transaction() as unit:
            await Accounts(unit).add(account(2))
            with pytest.raises(LeaveTheBlock):
                async with unit.savepoint():
                    await unit.execute(sa.schema.CreateTable(made))
                    await unit.execute(made.insert().values(id=1))
                    raise LeaveTheBlock
            await unit.execute(sa.schema.CreateTable(made))
        assert (await session.execute(sa.select(made))).all() == []
        assert await Accounts(session).get_all() == [account(2)]


async def test_t3_savepoints_within_savepoints_hold_what_they_say(database_url: str) -> None:
    async with opened(database_url) as session:
        async with session.transaction() as unit:
            inside = Accounts(unit)
            async with unit.savepoint():  # before any statement
                await inside.add(account(1))
                with pytest.raises(DuplicateKeyError):
                    async with unit.savepoint():
                        await inside.add_many([account(2), account(1)])
                async with unit.savepoint():
                    await unit.execute(accounts.insert().values(id=3, number="A3", balance=0))
            with pytest.raises(LeaveTheBlock):
                async with unit.savepoint():
                    async with unit.savepoint():
                        await inside.upsert_many([account(1, balance=9), account(4)])
                    assert (await inside.get(1)).balance == 9
                    raise LeaveTheBlock
        assert await Accounts(session).get_all() == [account(1), account(3)]


async def _more_than_a_batch(unit: UnitOfWork) -> None:
    assert await Accounts(unit).add_many(account(number) for number in range(100, 11_100)) == 11_000


async def _stream_and_write(unit: UnitOfWork) -> None:
    assert len([found async for found in Accounts(unit).stream(batch_size=1)]) == 3
    await Accounts(unit).add_many([account(100)])


async def _leave_a_stream(unit: UnitOfWork) -> None:
    stream = Accounts(unit).stream(batch_size=1)
    await anext(stream)
    await stream.aclose()
    await Accounts(unit).add(account(100))


async def _stream_core(unit: UnitOfWork) -> None:
    assert len([row async for row in unit.stream(sa.select(accounts))]) == 3
    await unit.execute(accounts.delete())


async def _savepoint(unit: UnitOfWork) -> None:
    async with unit.savepoint():
        await Accounts(unit).add_many([account(100)])


async def _inner_unit(unit: UnitOfWork) -> None:
    async with UnitOfWork(unit) as inner:
        await Accounts(inner).add_many([account(100)])


FIRST: dict[str, Callable[[UnitOfWork], Awaitable[Any]]] = {
    "add_many": lambda unit: Accounts(unit).add_many([account(100), account(101)]),
    "add_many in batches": _more_than_a_batch,
    "upsert_many": lambda unit: Accounts(unit).upsert_many([account(1, balance=9), account(100)]),
    "update_many": lambda unit: Accounts(unit).update_many([account(1, balance=9), account(2, balance=9)]),
    "get_or_add": lambda unit: Accounts(unit).get_or_add(account(100), on=["number"]),
    "upsert": lambda unit: Accounts(unit).upsert(account(1, balance=9)),
    "update by expression": lambda unit: Accounts(unit).update_where({"balance": 9}, accounts.c.id < sa.literal(3)),
    "delete by expression": lambda unit: Accounts(unit).delete_where(accounts.c.id < sa.literal(3)),
    "core": lambda unit: unit.execute(accounts.insert().values(id=100, number="A100", balance=0)),
    "core, many rows": lambda unit: unit.execute(
        accounts.insert(), [{"id": number, "number": f"A{number}", "balance": 0} for number in range(100, 103)]
    ),
    "text": lambda unit: unit.execute(sa.text("DELETE FROM accounts")),
    "stream": _stream_and_write,
    "left stream": _leave_a_stream,
    "core stream": _stream_core,
    "savepoint": _savepoint,
    "inner unit": _inner_unit,
}


@pytest.mark.parametrize("portable", [False, True], ids=["driver", "portable"])
async def test_t4_nothing_that_a_unit_begins_with_is_seen_by_others_before_the_commit(
    database_url: str, portable: bool
) -> None:
    stored = [account(number) for number in (1, 2, 3)]
    async with opened(database_url, portable=portable) as session:
        await Accounts(session).add_many(stored)
        for name, first in FIRST.items():
            if portable and first is _more_than_a_batch:
                continue  # row by row there: seconds
            with pytest.raises(LeaveTheBlock):
                async with session.transaction() as unit:
                    await first(unit)
                    assert await Accounts(unit).get_all() != stored, name
                    assert await Accounts(session).get_all() == stored, f"{name}: another connection sees it"
                    raise LeaveTheBlock
            assert await Accounts(session).get_all() == stored, name
            async with session.transaction() as unit:
                await first(unit)
                await unit.rollback()
            assert await Accounts(session).get_all() == stored, name


async def test_t9_a_hook_finds_the_only_connection_free_and_its_failure_undoes_nothing(database_url: str) -> None:
    seen: list[int] = []
    async with opened(database_url, pool_size=1, max_overflow=0, pool_timeout=2) as session:

        async def look() -> None:
            seen.append(await Accounts(session).count())

        async def fail() -> None:
            await Accounts(session).add(account(1))

        async with session.transaction() as unit:
            unit.on_commit(look)
            unit.on_commit(fail)
            unit.on_commit(look)
            await Accounts(unit).add(account(1))
        assert seen == [1, 1]
        assert await Accounts(session).get_all() == [account(1)]
