"""The fault kit does what it says, shown on real servers."""

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import asyncpg
import pytest
import sqlalchemy as sa
from sqlalchemy import make_url

from fastapi_building_blocks.domain import BuildingBlocksError, CommitOutcomeUnknownError
from fastapi_building_blocks.infrastructure import SQLAlchemySession
from fastapi_building_blocks.testing import (
    DatabaseServer,
    FaultProxy,
    MariaDBServer,
    MissingServer,
    PgBouncerServer,
    PostgreSQLReplica,
    PostgreSQLServer,
    RedisServer,
    assert_connections_sound,
    database_servers,
    storm,
)
from tests.backends import required_backends
from tests.faults.databases import commits_at_once

notes = sa.Table("notes", sa.MetaData(), sa.Column("id", sa.Integer(), primary_key=True, autoincrement=False))


@contextmanager
def running(server: DatabaseServer, backend: str = "") -> Iterator[Any]:
    """Yield the server, or skip where it cannot run and is not required."""
    try:
        server.start()
    except MissingServer as missing:
        if backend in required_backends():
            pytest.fail(str(missing), pytrace=False)
        pytest.skip(str(missing))
    try:
        yield server
    finally:
        server.close()


@pytest.fixture(scope="module")
def postgresql() -> Iterator[PostgreSQLServer]:
    with running(PostgreSQLServer(), "postgres") as server:
        yield server


@pytest.fixture(scope="module")
def mariadb() -> Iterator[MariaDBServer]:
    with running(MariaDBServer(), "mysql") as server:
        yield server


@pytest.fixture(scope="module")
def redis() -> Iterator[RedisServer]:
    with running(RedisServer(), "redis") as server:
        yield server


@pytest.fixture(params=["postgresql", "mariadb"])
def server(request: pytest.FixtureRequest) -> DatabaseServer:
    return request.getfixturevalue(request.param)


@pytest.fixture
async def proxy(postgresql: PostgreSQLServer) -> AsyncIterator[FaultProxy]:
    async with FaultProxy(postgresql.host, postgresql.port) as proxy:
        yield proxy


@pytest.fixture
async def redis_proxy(redis: RedisServer) -> AsyncIterator[FaultProxy]:
    async with FaultProxy(redis.host, redis.port) as proxy:
        yield proxy


@asynccontextmanager
async def connected(url: str, **arguments: Any) -> AsyncIterator[Any]:
    """Yield a plain asyncpg connection, which hides no fault."""
    connection = await connect(url, **arguments)
    try:
        yield connection
    finally:
        connection.terminate()


async def connect(url: str, **arguments: Any) -> Any:
    dsn = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
    return await asyncpg.connect(dsn, timeout=10, **arguments)


async def seconds(call: Any) -> float:
    begun = time.monotonic()
    await call
    return time.monotonic() - begun


async def until(condition: Any, within: float = 5.0) -> None:
    async with asyncio.timeout(within):
        while not await condition():
            await asyncio.sleep(0.02)


# The proxy


async def test_the_url_through_the_proxy_differs_in_host_and_port_only(proxy: FaultProxy):
    there = "postgresql+asyncpg://me:p%40ss@db.example.org:5433/shop?command_timeout=3"
    assert proxy.url(there) == f"postgresql+asyncpg://me:p%40ss@127.0.0.1:{proxy.port}/shop?command_timeout=3"
    with pytest.raises(ValueError, match="host and port"):
        proxy.url("mysql+aiomysql://me@/shop?unix_socket=/run/s")


async def test_latency_is_added_in_each_direction(proxy: FaultProxy, postgresql: PostgreSQLServer):
    async with connected(proxy.url(postgresql.url)) as connection:
        proxy.latency(0.2)
        both = await seconds(connection.execute("SELECT 1"))
        proxy.heal()
        proxy.latency(0.2, "to_client")
        one = await seconds(connection.execute("SELECT 1"))
        proxy.heal()
        none = await seconds(connection.execute("SELECT 1"))
    assert both >= 0.4
    assert 0.2 <= one < both
    assert none < 0.2


async def test_latency_delays_a_long_answer_once(proxy: FaultProxy, postgresql: PostgreSQLServer):
    async with connected(proxy.url(postgresql.url)) as connection:
        proxy.latency(0.1)
        begun = time.monotonic()
        answer = await connection.fetchval("SELECT repeat('x', 8000000)")
    assert len(answer) == 8_000_000
    assert time.monotonic() - begun < 2  # more than 120 pieces of 64 KiB, each 0.1 s late


async def test_a_black_hole_swallows_without_closing(proxy: FaultProxy, postgresql: PostgreSQLServer):
    url = proxy.url(postgresql.url)
    async with connected(postgresql.url) as observer, connected(url) as used, connected(url) as idle:
        backend = used.get_server_pid()
        proxy.blackhole()
        with pytest.raises(TimeoutError):
            await used.execute("SELECT 1", timeout=0.2)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await connect(url)
        used.terminate()
        await asyncio.sleep(0.1)

        async def backend_lives() -> bool:
            return await observer.fetchval("SELECT count(*) FROM pg_stat_activity WHERE pid = $1", backend) == 1

        async def backend_is_gone() -> bool:
            return not await backend_lives()

        assert await backend_lives()
        proxy.heal()
        assert await idle.fetchval("SELECT 41 + 1") == 42
        async with connected(url) as new:
            assert await new.fetchval("SELECT 41 + 1") == 42
        await until(backend_is_gone)


async def test_nothing_is_delivered_after_a_gap(redis_proxy: FaultProxy):
    reader, writer = await asyncio.open_connection("127.0.0.1", redis_proxy.port)
    redis_proxy.blackhole("to_client")
    writer.write(b"ECHO lost\r\n")
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(reader.read(100), 0.2)
    redis_proxy.heal()
    writer.write(b"ECHO found\r\n")
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(reader.read(100), 0.2)
    writer.close()
    await writer.wait_closed()


async def test_reset_ends_existing_and_new_connections(redis_proxy: FaultProxy):
    reader, writer = await asyncio.open_connection("127.0.0.1", redis_proxy.port)
    writer.write(b"PING\r\n")
    assert await reader.readline() == b"+PONG\r\n"
    assert redis_proxy.connections == 1
    redis_proxy.reset()
    with pytest.raises(ConnectionResetError):
        await reader.read(1)
    writer.close()
    with pytest.raises(ConnectionResetError):
        await ping(redis_proxy)
    assert (redis_proxy.connections, redis_proxy.accepted, redis_proxy.was_reset) == (0, 2, 2)
    redis_proxy.heal()
    redis_proxy.reset(new=False)
    await ping(redis_proxy)


async def ping(proxy: FaultProxy) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    try:
        writer.write(b"PING\r\n")
        assert await reader.readline() == b"+PONG\r\n"
    finally:
        writer.close()


async def test_a_connection_is_cut_after_exactly_so_many_bytes(redis_proxy: FaultProxy):
    reader, writer = await asyncio.open_connection("127.0.0.1", redis_proxy.port)
    redis_proxy.cut_after(10)
    writer.write(b"PING\r\n" * 3)
    assert await reader.read() == b"+PONG\r\n+PO"
    assert redis_proxy.was_cut == 1
    writer.close()
    new_reader, new_writer = await asyncio.open_connection("127.0.0.1", redis_proxy.port)
    new_writer.write(b"PING\r\n" * 3)
    assert await new_reader.read() == b"+PONG\r\n+PO"
    new_writer.close()
    redis_proxy.heal()
    await ping(redis_proxy)


async def test_refusing_leaves_connections_alone_and_comes_back_on_the_same_port(redis_proxy: FaultProxy):
    reader, writer = await asyncio.open_connection("127.0.0.1", redis_proxy.port)
    writer.write(b"PING\r\n")
    assert await reader.readline() == b"+PONG\r\n"
    redis_proxy.refuse()
    with pytest.raises(ConnectionRefusedError):
        await ping(redis_proxy)
    writer.write(b"PING\r\n")
    assert await reader.readline() == b"+PONG\r\n"
    redis_proxy.heal()
    await ping(redis_proxy)
    writer.close()


async def test_a_server_that_is_not_there_resets_its_clients():
    async with FaultProxy("127.0.0.1", 1) as proxy:
        with pytest.raises(ConnectionResetError):
            await ping(proxy)


@pytest.mark.parametrize("kept", [True, False], ids=["answer dropped", "message dropped"])
async def test_the_outcome_of_a_commit_is_unknown_to_the_client_alone(server: DatabaseServer, kept: bool):
    async with (
        FaultProxy(server.host, server.port) as proxy,
        SQLAlchemySession(server.url) as direct,
        SQLAlchemySession(proxy.url(server.url)) as session,
    ):
        async with direct.engine.begin() as connection:
            await connection.run_sync(notes.drop, checkfirst=True)
            await connection.run_sync(notes.create)
        if kept:
            proxy.drop_answer_to(b"COMMIT")
        else:
            proxy.drop_message(b"COMMIT")
        with pytest.raises(CommitOutcomeUnknownError):
            async with session.transaction() as transaction:
                await transaction.execute(sa.insert(notes), {"id": 1})
        assert (proxy.dropped_answers, proxy.dropped_messages) == ((1, 0) if kept else (0, 1))
        rows = await direct.execute(sa.select(notes.c.id))
        assert rows.scalars().all() == ([1] if kept and commits_at_once(session) else [])
        # Once only: the next COMMIT passes.
        async with session.transaction() as transaction:
            await transaction.execute(sa.insert(notes), {"id": 2})
        assert proxy.dropped_answers + proxy.dropped_messages == 1


async def test_a_message_is_recognised_in_two_parts(redis_proxy: FaultProxy, redis: RedisServer):
    redis_proxy.drop_answer_to(b"SET key value")
    reader, writer = await asyncio.open_connection("127.0.0.1", redis_proxy.port)
    for part in (b"SET k", b"ey va", b"lue\r\n"):
        writer.write(part)
        await asyncio.sleep(0.05)
    with pytest.raises(ConnectionResetError):
        await reader.read(1)
    writer.close()
    reader, writer = await asyncio.open_connection(redis.host, redis.port)
    writer.write(b"GET key\r\n")
    assert await reader.readexactly(11) == b"$5\r\nvalue\r\n"
    writer.close()


# Servers


async def test_a_frozen_server_answers_after_it_is_thawed(server: DatabaseServer):
    async with SQLAlchemySession(server.url) as session:
        await session.ping()
        server.freeze()
        try:
            answer = asyncio.create_task(session.ping())
            done, _ = await asyncio.wait({answer}, timeout=0.3)
            assert not done
            assert server.alive
        finally:
            server.thaw()
        await asyncio.wait_for(answer, 5)


async def test_a_killed_server_starts_again_with_what_it_acknowledged(server: DatabaseServer):
    async with SQLAlchemySession(server.url) as session:
        async with session.engine.begin() as connection:
            await connection.run_sync(notes.drop, checkfirst=True)
            await connection.run_sync(notes.create)
        await session.execute(sa.insert(notes), {"id": 1})
        async with asyncio.TaskGroup() as group:
            slow = "SELECT pg_sleep(30)" if session.dialect_name == "postgresql" else "SELECT sleep(30)"
            running = group.create_task(outcome(session.execute(sa.text(slow))))
            await asyncio.sleep(0.1)
            server.kill()
            assert not server.alive
        assert isinstance(running.result(), BuildingBlocksError)
        await asyncio.to_thread(server.start)
        rows = await session.execute(sa.select(notes.c.id))
        assert rows.scalars().all() == [1]


async def outcome(call: Any) -> Any:
    try:
        return await call
    except BuildingBlocksError as error:
        return error


async def test_a_restarted_server_keeps_its_address_and_a_closed_one_leaves_nothing():
    with running(RedisServer({"appendonly": "yes", "appendfsync": "always"}), "redis") as server:
        url, before = server.url, processes_of(server)
        async with FaultProxy(server.host, server.port) as proxy:
            await ping(proxy)
            server.restart()
            await ping(proxy)
        assert server.url == url
        assert processes_of(server) != before
        directory = directory_of(server)
        assert directory.exists()
    assert not server.alive
    assert not directory.exists()
    server.close()


def test_a_server_of_mariadb_leaves_temporary_tables_of_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The machine's own server has them in the common directory, and crashes without them."""
    theirs = tmp_path / "#sql-temptable-1-1-1.MAI"
    theirs.touch()
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with running(MariaDBServer(), "mysql"):
        assert theirs.exists()


def directory_of(server: DatabaseServer) -> Path:
    assert server._place is not None
    return server._place.directory


def processes_of(server: DatabaseServer) -> int:
    assert server._process is not None
    return server._process.pid


async def test_two_clients_share_a_connection_of_pgbouncer(postgresql: PostgreSQLServer):
    with running(PgBouncerServer(postgresql, {"default_pool_size": 1})) as bouncer:
        async with (
            connected(bouncer.url, statement_cache_size=0) as one,
            connected(bouncer.url, statement_cache_size=0) as other,
        ):
            backend = "SELECT pg_backend_pid()"
            assert await one.fetchval(backend) == await other.fetchval(backend)
            async with one.transaction():
                await one.execute("SELECT 1")
                with pytest.raises(TimeoutError):
                    await other.execute("SELECT 1", timeout=0.2)


def test_a_missing_server_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shutil, "which", lambda *arguments, **options: None)
    with pytest.raises(MissingServer, match="no program redis-server: `apt install redis-server`"):
        RedisServer().start()


def test_a_server_that_does_not_start_shows_its_log(redis: RedisServer):
    with pytest.raises(RuntimeError, match=r"(?s)ended while it started.*Bad directive"):
        RedisServer({"no-such-setting": "1"}).start()
    with pytest.raises(RuntimeError, match="runs already"):
        redis.start()


def test_servers_do_not_outlive_a_killed_test_run(postgresql: PostgreSQLServer):
    script = textwrap.dedent("""
        import time
        from fastapi_building_blocks.testing import PostgreSQLServer
        from fastapi_building_blocks.testing.database_servers import _tree
        server = PostgreSQLServer()
        server.start()
        server.freeze()
        print(server._place.directory, *_tree(server._process.pid), flush=True)
        time.sleep(60)
    """)
    run = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    with run:
        assert run.stdout is not None
        directory, *pids = run.stdout.readline().split()
        assert len(pids) > 3
        assert Path(directory).exists()
        run.send_signal(signal.SIGKILL)
    give_up = time.monotonic() + 10
    while Path(directory).exists() or any(lives(pid) for pid in pids):
        assert time.monotonic() < give_up, "the server or its data is still there"
        time.sleep(0.05)


def lives(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# The storm

cancelled_by = pytest.mark.parametrize("anyio", [False, True], ids=["task", "scope"])


@cancelled_by
async def test_a_storm_counts_how_its_calls_ended(anyio: bool):
    async def call(number: int) -> None:
        if number % 3 == 0:
            await asyncio.sleep(60)
        if number % 3 == 1:
            raise LookupError(number)

    report = await storm(call, times=30, longest_delay=0.05, concurrency=5, anyio=anyio)
    assert (report.finished, report.cancelled, report.failed, report.hung) == (10, 10, {LookupError: 10}, 0)
    assert report.total == 30
    assert report.slowest_end < 1


@cancelled_by
async def test_a_call_that_does_not_end_is_found(anyio: bool):
    released = asyncio.Event()

    async def call(number: int) -> None:
        while not released.is_set():
            try:
                await asyncio.wait_for(released.wait(), 0.05)
            except (TimeoutError, asyncio.CancelledError):
                continue

    report = await storm(call, times=2, longest_delay=0.01, concurrency=2, anyio=anyio, patience=0.1)
    released.set()
    await asyncio.sleep(0.1)
    assert (report.hung, report.total) == (2, 2)


async def test_the_same_seed_cancels_at_the_same_points():
    async def ends(seed: int) -> list[float]:
        seen: dict[int, float] = {}

        async def call(number: int) -> None:
            begun = time.monotonic()
            try:
                await asyncio.sleep(60)
            finally:
                seen[number] = time.monotonic() - begun

        await storm(call, times=20, longest_delay=0.3, concurrency=20, seed=seed)
        return [seen[number] for number in range(20)]

    first, again, other = await ends(1), await ends(1), await ends(2)
    assert first == pytest.approx(again, abs=0.08)
    assert first != pytest.approx(other, abs=0.08)


@cancelled_by
async def test_connections_are_sound_after_a_storm(server: DatabaseServer, anyio: bool):
    async with SQLAlchemySession(server.url, pool_size=4, max_overflow=2) as session:
        sleep = sa.text("SELECT pg_sleep(0.02)" if session.dialect_name == "postgresql" else "SELECT sleep(0.02)")

        async def call(number: int) -> None:
            async with session.transaction() as transaction:
                await transaction.execute(sleep)

        for delay in (0.08, 0.16, 0.32, 0.64):  # a busy machine takes longer to open what a cancelled call has cost
            report = await storm(call, times=100, longest_delay=delay, concurrency=6, anyio=anyio)
            assert not report.hung
            await assert_connections_sound(session, within=5)
            if report.finished > 5:
                break
        assert report.finished > 5
        assert report.cancelled > 5


# The invariants


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
async def test_connections_of_a_file_are_sound(database_url: str):
    async with SQLAlchemySession(database_url) as session:
        await session.ping()
        await assert_connections_sound(session)
        async with session.transaction() as transaction:
            await transaction.execute(sa.select(1))
            with pytest.raises(AssertionError, match="1 connections are still lent"):
                await assert_connections_sound(session, within=0.1)


async def test_a_session_behind_a_proxy_is_looked_at_on_the_server(server: DatabaseServer):
    async with (
        FaultProxy(server.host, server.port) as proxy,
        SQLAlchemySession(proxy.url(server.url)) as session,
    ):
        await session.ping()
        await assert_connections_sound(session, server_url=server.url)
        # Seen around the proxy, which would break the look at the server as well.
        assert proxy.accepted == proxy.connections


async def test_a_connection_idle_in_transaction_is_found(server: DatabaseServer):
    async with SQLAlchemySession(server.url) as session, SQLAlchemySession(server.url) as other:
        async with other.engine.begin() as connection:
            await connection.run_sync(notes.drop, checkfirst=True)
            await connection.run_sync(notes.create)
        async with other.transaction() as transaction:
            await transaction.execute(sa.insert(notes), {"id": 1})
            with pytest.raises(AssertionError, match="1 connections are idle in transaction on the server"):
                await assert_connections_sound(session, within=0.2)
        await assert_connections_sound(session)


async def test_connections_beyond_the_pool_are_found(server: DatabaseServer):
    async with (
        SQLAlchemySession(server.url, pool_size=1, max_overflow=1) as session,
        SQLAlchemySession(server.url, pool_size=2) as other,
    ):
        await asyncio.gather(other.ping(), other.ping())
        with pytest.raises(AssertionError, match="the server has 3 connections, and the pool may open 2"):
            await assert_connections_sound(session, within=0.2)


async def test_a_caller_that_waits_is_found(server: DatabaseServer):
    async with SQLAlchemySession(server.url, pool_size=1, max_overflow=0) as session:
        async with session.transaction() as transaction:
            await transaction.execute(sa.select(1))
            waiting = asyncio.create_task(session.ping())
            with pytest.raises(AssertionError, match="1 callers still wait for a connection"):
                await assert_connections_sound(session, within=0.2)
        await waiting
        await assert_connections_sound(session)


async def test_a_half_read_connection_is_found(mariadb: MariaDBServer):
    async with SQLAlchemySession(mariadb.url, pool_size=1) as session:
        await session.ping()
        pool: Any = session.engine.sync_engine.pool
        pool.is_dead = lambda driver: False  # the session's own guard would sort it out
        connection = pool.take()
        await connection.driver._execute_command(3, "SELECT 42")  # COM_QUERY, its answer left unread
        pool.release(connection)
        with pytest.raises(AssertionError, match="reads at once after the pool had settled"):
            await assert_connections_sound(session)


def test_a_replica_is_asked_again_where_replay_has_ended_the_question(monkeypatch: pytest.MonkeyPatch) -> None:
    said = iter([RuntimeError("psql failed:\nERROR:  canceling statement due to conflict with recovery"), "paused\n"])

    def run(*_: object) -> str:
        answer = next(said)
        if isinstance(answer, Exception):
            raise answer
        return answer

    replica = PostgreSQLReplica(PostgreSQLServer())
    monkeypatch.setattr(database_servers, "_run", run)
    assert replica._ask("SELECT pg_get_wal_replay_pause_state()") == "paused"
