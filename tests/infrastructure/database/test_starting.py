"""What ``start()`` promises: a service may come before its database, and lets nobody in before that is ready."""

import asyncio
import logging
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import make_url

from fastapi_building_blocks.domain import ConnectionLostError, UnavailableError
from fastapi_building_blocks.infrastructure import InMemorySession, PoolStatus, SQLAlchemySession
from fastapi_building_blocks.infrastructure.database import sqlalchemy_session
from fastapi_building_blocks.testing import FaultProxy
from tests.guarantees.ledger import Accounts, account, metadata
from tests.server_view import connections, until

on_servers = pytest.mark.parametrize("database_url", ["postgres", "mysql"], indirect=True)


@pytest.fixture
async def proxy(database_url: str) -> AsyncIterator[FaultProxy]:
    """A way to the server that is closed."""
    place = make_url(database_url)
    async with FaultProxy(place.host or "", place.port or 0) as proxy:
        proxy.refuse()
        yield proxy


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlalchemy_session, "_START_LONGEST_DELAY", 0.1)


async def test_a_database_that_is_there_is_ready_when_start_returns(database_url: str) -> None:
    session = SQLAlchemySession(database_url)
    await session.start(lambda: session.create_tables(metadata))
    assert await Accounts(session).add(account(1)) == account(1)
    await session.start()  # again is harmless
    await session.connect()
    assert await Accounts(session).count() == 1
    await session.disconnect()
    with pytest.raises(RuntimeError, match=r"await session\.connect\(\) first"):
        await session.ping()


@on_servers
async def test_p5_a_session_starts_before_its_server_and_works_once_that_is_there(
    database_url: str, proxy: FaultProxy, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    session = SQLAlchemySession(proxy.url(database_url))
    early = Accounts(session)
    begun = asyncio.get_running_loop().time()
    await session.start(lambda: session.create_tables(metadata))
    assert asyncio.get_running_loop().time() - begun < 1
    assert not session.is_connected

    async def transact() -> None:
        async with session.transaction() as unit:
            await Accounts(unit).count()

    async def use_engine() -> None:
        async with session.engine.connect():
            pass

    calls: list[Any] = [session.ping, transact, use_engine, lambda: early.add(account(1))]
    for call in calls:
        with pytest.raises(UnavailableError, match="not available yet"):
            await call()
    assert session.pool_status() == PoolStatus(5, 0, 0, 0)
    await until(lambda: "attempt 3, next in" in caplog.text)
    place = rf"127\.0\.0\.1:{proxy.port}"
    assert re.search(rf"\w+ at {place} does not answer \(.+\); attempt 1, next in \d\.\d s", caplog.text)
    with pytest.raises(RuntimeError, match="already"):
        await session.connect()

    proxy.heal()
    await until(lambda: session._starting is None)
    for call in calls:
        await call()
    assert await Accounts(session).get(1) == account(1)
    assert "is there, at attempt" in caplog.text
    await session.disconnect()
    await until(lambda: not connections(database_url))


@on_servers
async def test_what_the_server_can_do_is_known_to_repositories_that_came_before_it(
    database_url: str, proxy: FaultProxy
) -> None:
    session = SQLAlchemySession(proxy.url(database_url))
    await session.start(lambda: session.create_tables(metadata))
    early = Accounts(session)
    for call in (early.count, lambda: early.upsert(account(1))):
        with pytest.raises(UnavailableError):
            await call()
    guesses = list(early._sql._cache._statements.values())
    assert guesses
    proxy.heal()
    await until(lambda: session._starting is None)
    late = Accounts(session)
    assert session.dialect.insert_returning == session.engine.dialect.insert_returning
    assert await early.upsert(account(1)) == account(1)
    assert await late.upsert(account(1, balance=5)) == account(1, balance=5)
    assert early._sql is not late._sql
    shared = [key for key in early._sql._cache._statements if key in late._sql._cache._statements]
    assert shared
    assert not set(map(id, guesses)) & set(map(id, early._sql._cache._statements.values()))
    for key in shared:
        assert early._sql._cache._statements[key].sql == late._sql._cache._statements[key].sql
    assert not session.unlearned
    await session.disconnect()


@on_servers
@pytest.mark.parametrize(
    "wrong", [{"database": "no_such_database"}, {"username": "nobody_known", "password": "secret"}]
)
async def test_a_server_that_is_there_and_refuses_fails_the_start(database_url: str, wrong: dict[str, str]) -> None:
    session = SQLAlchemySession(make_url(database_url).set(**wrong))
    with pytest.raises(ConnectionLostError, match=r"does not exist|the login was refused"):
        await session.start()
    assert session.pool_status() == PoolStatus(5, 0, 0, 0)
    with pytest.raises(RuntimeError, match=r"await session\.connect\(\) first"):
        await session.ping()


@on_servers
async def test_one_that_comes_up_and_refuses_is_said_as_an_error_and_tried_again(
    database_url: str, proxy: FaultProxy, caplog: pytest.LogCaptureFixture
) -> None:
    session = SQLAlchemySession(make_url(proxy.url(database_url)).set(database="no_such_database"))
    await session.start()
    proxy.heal()
    await until(lambda: caplog.text.count("refuses (the database does not exist") >= 2)
    assert {record.levelname for record in caplog.records if "refuses" in record.message} == {"ERROR"}
    with pytest.raises(UnavailableError):
        await session.ping()
    await session.disconnect()


@on_servers
async def test_a_server_that_says_nothing_does_not_hold_up_the_start(
    database_url: str, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlalchemy_session, "_START_PATIENCE", 0.1)
    proxy.heal()
    proxy.blackhole()
    session = SQLAlchemySession(proxy.url(database_url), connect_timeout=0.5)
    async with asyncio.timeout(0.4):
        await session.start()
    with pytest.raises(UnavailableError):
        await session.ping()
    proxy.heal()
    proxy.reset(new=False)
    await until(lambda: session._starting is None)
    await session.ping()
    await session.disconnect()


async def test_nobody_is_let_in_before_the_preparation_is_done(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlalchemy_session, "_START_PATIENCE", 0.05)
    session = SQLAlchemySession(database_url)
    go_on = asyncio.Event()

    async def prepare() -> None:
        await session.create_tables(metadata)
        await asyncio.gather(Accounts(session).add(account(1)), Accounts(session).add(account(2)))
        await go_on.wait()
        assert await Accounts(session).count() == 2

    await session.start(prepare)
    await until(lambda: session.is_connected and session.pool_status().idle > 0)
    for call in (session.ping, Accounts(session).count):
        with pytest.raises(UnavailableError):
            await call()
    go_on.set()
    await until(lambda: session._starting is None)
    assert await Accounts(session).count() == 2
    await session.disconnect()


async def test_a_database_in_memory_keeps_what_it_was_prepared_with() -> None:
    session = SQLAlchemySession("sqlite+aiosqlite:///:memory:")
    await session.start(lambda: session.create_tables(metadata))
    assert await Accounts(session).count() == 0
    await session.disconnect()


async def test_a_failed_preparation_fails_the_start(sqlite_url: str) -> None:
    session = SQLAlchemySession(sqlite_url)

    async def prepare() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await session.start(prepare)
    with pytest.raises(RuntimeError, match=r"await session\.connect\(\) first"):
        await session.ping()


async def test_a_preparation_that_is_cancelled_from_within_fails_the_start(sqlite_url: str) -> None:
    async def prepare() -> None:
        raise asyncio.CancelledError

    with pytest.raises(RuntimeError, match="preparation of the database was cancelled"):
        await SQLAlchemySession(sqlite_url).start(prepare)


async def test_a_preparation_may_connect_other_sessions(sqlite_url: str, tmp_path: Path) -> None:
    session = SQLAlchemySession(sqlite_url)

    async def prepare() -> None:
        async with SQLAlchemySession(f"sqlite+aiosqlite:///{tmp_path / 'other.db'}") as other:
            await other.ping()
            await session.create_tables(metadata)
        assert await Accounts(session).count() == 0

    await session.start(prepare)
    assert await Accounts(session).count() == 0
    await session.disconnect()


async def test_a_preparation_that_fails_later_is_logged_without_its_statement_and_not_repeated(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sqlalchemy_session, "_START_PATIENCE", 0.05)
    session = SQLAlchemySession(sqlite_url)
    attempts = 0

    async def prepare() -> None:
        nonlocal attempts
        attempts += 1
        await asyncio.sleep(0.1)
        async with session.engine.connect() as connection:
            await connection.execute(sa.text("SELECT secret FROM nowhere"))

    await session.start(prepare)
    await until(lambda: "preparing sqlite" in caplog.text)
    assert "secret" not in caplog.text
    assert attempts == 1
    assert not session.is_connected
    with pytest.raises(UnavailableError):
        await session.ping()
    await session.start(lambda: session.create_tables(metadata))  # as if it had never been called
    await until(lambda: session._starting is None)
    assert await Accounts(session).count() == 0
    await session.disconnect()


async def test_a_preparation_that_outlives_disconnect_lets_nobody_in(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlalchemy_session, "_START_PATIENCE", 0.05)
    session = SQLAlchemySession(sqlite_url, shutdown_timeout=1.0)
    go_on, has_ended = asyncio.Event(), asyncio.Event()

    async def prepare() -> None:
        while not go_on.is_set():
            try:
                await go_on.wait()
            except asyncio.CancelledError:
                continue
        has_ended.set()

    left: list[float] = []
    drain = session.pool.drain

    async def note(patience: float) -> int:
        left.append(patience)
        return await drain(patience)

    monkeypatch.setattr(session.pool, "drain", note)
    await session.start(prepare)
    await session.disconnect()
    go_on.set()
    await has_ended.wait()
    await asyncio.sleep(0.05)
    assert not session.is_connected
    assert max(left) < 0.5, "the time is spent once"
    with pytest.raises(RuntimeError, match=r"await session\.connect\(\) first"):
        await session.ping()


@on_servers
@pytest.mark.parametrize("lost", [ConnectionLostError("it is gone"), ConnectionResetError()], ids=repr)
async def test_a_preparation_that_loses_the_database_is_done_again(database_url: str, lost: Exception) -> None:
    session = SQLAlchemySession(database_url)
    attempts = 0

    async def prepare() -> None:
        nonlocal attempts
        attempts += 1
        await session.create_tables(metadata)
        if attempts == 1:
            raise lost

    await session.start(prepare)
    await until(lambda: session._starting is None)
    assert attempts == 2
    assert await Accounts(session).count() == 0
    await session.disconnect()


async def test_disconnecting_ends_a_start_that_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    session = SQLAlchemySession("postgresql+asyncpg://u:p@127.0.0.1:1/name")
    await session.start()
    await session.start()  # changes nothing
    await session.disconnect()
    said = caplog.text
    await asyncio.sleep(0.3)
    assert caplog.text == said
    with pytest.raises(RuntimeError, match=r"await session\.connect\(\) first"):
        await session.ping()


async def test_what_a_preparation_has_started_is_lent_nothing_after_the_end(sqlite_url: str) -> None:
    session = SQLAlchemySession(sqlite_url)
    go_on = asyncio.Event()
    started: list[asyncio.Task[None]] = []

    async def ping_later() -> None:
        await go_on.wait()
        await session.ping()

    async def prepare() -> None:
        started.append(asyncio.create_task(ping_later()))

    await session.start(prepare)
    await session.disconnect()
    go_on.set()
    with pytest.raises(RuntimeError, match=r"await session\.connect\(\) first"):
        await started[0]


async def test_a_session_in_memory_starts_and_is_prepared() -> None:
    session, prepared = InMemorySession(), []

    async def prepare() -> None:
        await session.ping()
        prepared.append(True)

    await session.start(prepare)
    assert prepared == [True]
    await session.ping()
