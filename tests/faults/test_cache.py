"""C3 to C5 on Redis servers of this suite's own, which are frozen, killed, filled, and fail over."""

import asyncio
import dataclasses
import logging
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import redis.asyncio
import sqlalchemy as sa

from fastapi_building_blocks.infrastructure import (
    Cache,
    CachedRepository,
    RedisCache,
    SQLAlchemyRepository,
    SQLAlchemySession,
)
from fastapi_building_blocks.testing import RedisSentinelServer, RedisServer
from fastapi_building_blocks.testing.fault_proxy import free_port
from tests.faults.conftest import running

metadata = sa.MetaData()
values = sa.Table(
    "cached_values",
    metadata,
    sa.Column("id", sa.Integer(), primary_key=True),
    sa.Column("number", sa.Integer(), nullable=False),
)
ROWS = 200


@dataclasses.dataclass
class Value:
    id: int
    number: int


class Values(SQLAlchemyRepository[Value]):
    table = values


@pytest.fixture
async def session(tmp_path: Path) -> AsyncIterator[SQLAlchemySession]:
    async with SQLAlchemySession(f"sqlite+aiosqlite:///{tmp_path / 'test.db'}") as session:
        await session.create_tables(metadata)
        await Values(session).add_many(Value(number, 0) for number in range(ROWS))
        yield session


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    yield from running(RedisServer(), "redis")  # type: ignore[misc]


@pytest.fixture
def redis_server(server: RedisServer) -> Iterator[RedisServer]:
    if not server.alive:
        server.start()
    yield server
    server.thaw()


class Ledger:
    """Writes and reads values through two caches, as two processes do, and knows which answers would be too old."""

    def __init__(self, session: SQLAlchemySession, *caches: Cache) -> None:
        self.views = [CachedRepository(Values(session), cache) for cache in caches]
        self.committed = dict.fromkeys(range(ROWS), 0)
        self.stale = 0
        self.slowest = 0.0
        self.reads = 0

    async def write(self, view: int, id: int) -> None:
        number = self.committed[id] + 1
        began = time.monotonic()
        await self.views[view].patch(id, {"number": number})
        self.slowest = max(self.slowest, time.monotonic() - began)
        self.committed[id] = number

    async def read(self, view: int, id: int) -> None:
        floor = self.committed[id]
        began = time.monotonic()
        value = await self.views[view].get(id)
        self.slowest = max(self.slowest, time.monotonic() - began)
        self.reads += 1
        self.stale += value.number < floor

    async def work(self, view: int, seconds: float) -> None:
        end, turn = time.monotonic() + seconds, 0
        while time.monotonic() < end:
            turn += 1
            id = (turn * 7 + view) % ROWS
            if turn % 5 == 0 and view == 0:
                await self.write(view, id)
            else:
                await self.read(view, id)
            await asyncio.sleep(0)

    async def keep_working(self, until: Callable[[], bool], seconds: float = 30.0) -> None:
        """Work through every view until something has come about."""
        end = time.monotonic() + seconds
        while not until():
            assert time.monotonic() < end, [view._cache.statistics() for view in self.views]
            await asyncio.gather(*(self.work(view, 0.1) for view in range(len(self.views))))

    def all_are(self, state: str) -> Callable[[], bool]:
        return lambda: all(view._cache.statistics().state == state for view in self.views)


@asynccontextmanager
async def two_caches(url: str, prefix: str) -> AsyncIterator[tuple[RedisCache, RedisCache]]:
    async with RedisCache(url, prefix=prefix) as one, RedisCache(url, prefix=prefix) as other:
        yield one, other


@pytest.mark.parametrize("fault", ["frozen", "killed"])
async def test_c4_redis_goes_and_comes_back(
    redis_server: RedisServer,
    session: SQLAlchemySession,
    fault: str,
    shown: Callable[..., None],
    caplog: pytest.LogCaptureFixture,
):
    caplog.set_level(logging.INFO, "fastapi_building_blocks")
    async with two_caches(redis_server.url, fault) as caches:
        ledger = Ledger(session, *caches)
        await ledger.keep_working(lambda: all(cache.statistics().hits > 50 for cache in caches))
        ledger.slowest = 0.0
        if fault == "frozen":
            redis_server.freeze()
        else:
            redis_server.kill()
        await ledger.keep_working(ledger.all_are("open"))
        first, ledger.slowest = ledger.slowest, 0.0
        await ledger.keep_working(lambda: ledger.reads > 2000)
        later = ledger.slowest
        if fault == "frozen":
            redis_server.thaw()
        else:
            redis_server.start()
        await ledger.keep_working(ledger.all_are("closed"))
        hits = [cache.statistics().hits for cache in caches]
        await ledger.keep_working(lambda: all(c.statistics().hits > h + 50 for c, h in zip(caches, hits, strict=True)))
    shown(
        "C4",
        f"Redis {fault} and back, two processes",
        reads=ledger.reads,
        stale=ledger.stale,
        slowest_call_then_ms=round(first * 1000),
        slowest_call_while_away_ms=round(later * 1000),
    )
    assert ledger.stale == 0
    assert first < 1.0  # 0.1 is the promise, on a machine that has time
    warnings = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) <= 4  # one per process; the busiest of machines may lose it once more


async def test_c4_one_frozen_call_costs_its_timeout_once(redis_server: RedisServer, session: SQLAlchemySession):
    async with RedisCache(redis_server.url, prefix="once") as cache:
        cached = CachedRepository(Values(session), cache)
        await cached.get(1)
        redis_server.freeze()
        spent = []
        for _ in range(20):
            began = time.monotonic()
            assert (await cached.get(1)).number == 0
            spent.append(time.monotonic() - began)
        statistics = cache.statistics()
        assert statistics.errors <= 2  # the read that found out, and a probe
        assert statistics.bypasses >= 19
        assert sorted(spent)[10] < 0.05


async def test_c4_a_full_redis_keeps_answering_and_is_written_to_again(
    session: SQLAlchemySession, caplog: pytest.LogCaptureFixture
):
    server = RedisServer({"maxmemory": "3mb", "maxmemory-policy": "noeviction"})
    with ExitStack() as stack:
        stack.callback(server.close)
        next(running(server, "redis"))
        async with RedisCache(server.url, timeout=1.0) as cache, redis.asyncio.from_url(server.url) as client:
            cached = CachedRepository(Values(session), cache)
            assert (await cached.get(1)).number == 0
            with pytest.raises(redis.OutOfMemoryError):
                for number in range(10_000):
                    await client.set(f"filling {number}", b"x" * 10_000)
            assert (await cached.get(1)).number == 0
            hits = cache.statistics().hits
            assert hits == 1
            for id in range(2, 50):
                assert (await cached.get(id)).number == 0
            await cached.patch(1, {"number": 1})
            assert (await cached.get(1)).number == 1
            await cached.update_where({"number": 2}, everything=True)
            assert {value.number for value in await cached.get_many(range(ROWS))} == {2}
            statistics = cache.statistics()
            assert statistics.state == "closed"
            warnings = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
            assert warnings == ["the cache is full and evicts nothing; what is read from the database is not kept"]
            await client.flushall()
            end = time.monotonic() + 10
            while statistics.hits == hits:
                assert time.monotonic() < end
                assert (await cached.get(1)).number == 2
                await asyncio.sleep(0.01)


async def test_c3_units_and_writes_cancelled_anywhere_leave_nothing_old(
    redis_server: RedisServer, session: SQLAlchemySession, shown: Callable[..., None]
):
    """What a cancelled write has left in the database is what every later read answers."""
    stale, tries = 0, 300
    async with two_caches(redis_server.url, "cancelled") as caches:
        one, other = (CachedRepository(Values(session), cache) for cache in caches)

        async def in_a_unit(number: int) -> None:
            async with session.transaction() as unit:
                await CachedRepository(Values(unit), caches[0]).patch(1, {"number": number})

        for number in range(1, tries + 1):
            write: Awaitable[Any] = one.patch(1, {"number": number}) if number % 2 else in_a_unit(number)
            task = asyncio.ensure_future(write)
            readers = [asyncio.ensure_future(view.get(1)) for view in (one, other, other)]
            for _ in range(number % 60):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, *readers, return_exceptions=True)
            # A commit that was under way ends in the background, and then invalidates.
            end = time.monotonic() + 5
            while True:
                await asyncio.sleep(0.002)
                now = (await Values(session).get(1)).number
                answers = [(await view.get(1)).number for view in (one, other)]
                if answers == [now, now]:
                    break
                if time.monotonic() > end:
                    stale += 1
                    break
    shown("C3", "writes cancelled at any point", tries=tries, stale=stale)
    assert stale == 0


WORKER = """
import asyncio, sys
from fastapi_building_blocks.infrastructure import CachedRepository, RedisCache, SQLAlchemySession
from tests.faults.test_cache import Values

async def main(url, redis_url):
    async with SQLAlchemySession(url) as session, RedisCache(redis_url, prefix="processes", timeout=2.0) as cache:
        cached = CachedRepository(Values(session), cache)
        statements = 0
        def count(event):
            nonlocal statements
            statements += event.name == "cached_values by key"
        session.observe(count)
        print("ready", flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        values = await asyncio.gather(*(cached.get_by_id(1) for _ in range(200)))
        assert [value.number for value in values] == [0] * 200
        print(statements, flush=True)

asyncio.run(main(*sys.argv[1:]))
"""


def started(url: str, redis_url: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, url, redis_url],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )


async def test_c5_200_misses_in_each_of_two_processes_make_one_read(
    redis_server: RedisServer, session: SQLAlchemySession, tmp_path: Path
):
    url = f"sqlite+aiosqlite:///{tmp_path / 'test.db'}"
    processes = [started(url, redis_server.url) for _ in range(2)]
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        assert sum(int(process.communicate(timeout=60)[0]) for process in processes) == 1
    finally:
        for process in processes:
            process.kill()
            process.communicate()


# Failover


@pytest.mark.slow
async def test_c3_a_sentinel_failover_changes_no_answer(session: SQLAlchemySession, shown: Callable[..., None]):
    primary = RedisServer({"repl-diskless-sync-delay": 0})
    replica = RedisServer({"replicaof": f"127.0.0.1 {primary.port}", "repl-diskless-sync-delay": 0})
    sentinel = RedisSentinelServer(primary, {"down-after-milliseconds": 500, "failover-timeout": 3000})
    with ExitStack() as stack:
        for server in (primary, replica, sentinel):
            stack.callback(server.close)
            next(running(server, "redis"))
        async with redis.asyncio.from_url(replica.url) as client:
            await eventually(lambda: is_in_step(client))
        async with redis.asyncio.Redis(host=sentinel.host, port=sentinel.port) as client:
            await eventually(lambda: knows_a_replica(client))
        async with two_caches(sentinel.url, "sentinel") as caches:
            ledger = Ledger(session, *caches)
            await ledger.keep_working(lambda: all(cache.statistics().hits > 50 for cache in caches))
            primary.kill()
            await ledger.keep_working(ledger.all_are("open"))
            await ledger.keep_working(ledger.all_are("closed"), 60)
            hits = caches[0].statistics().hits
            await ledger.keep_working(lambda: caches[0].statistics().hits > hits + 50)
    shown("C3", "Redis Sentinel fails over, two processes", reads=ledger.reads, stale=ledger.stale)
    assert ledger.stale == 0


async def is_in_step(client: Any) -> bool:
    return (await client.info("replication")).get("master_link_status") == "up"


async def knows_a_replica(client: Any) -> bool:
    return bool(await client.execute_command("SENTINEL", "REPLICAS", "service"))


async def eventually(condition: Callable[[], Awaitable[bool]], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not await condition():
        assert time.monotonic() < end
        await asyncio.sleep(0.05)


@pytest.mark.slow
async def test_c3_a_cluster_of_three_and_three_loses_a_node_and_no_answer(
    session: SQLAlchemySession, shown: Callable[..., None]
):
    settings = {
        "cluster-enabled": "yes",
        "cluster-node-timeout": 1000,
        "cluster-replica-validity-factor": 0,
        "repl-diskless-sync-delay": 0,
    }
    # By default the bus has the port 10,000 above, which may be a client's.
    buses = [free_port() for _ in range(6)]
    servers = [RedisServer({**settings, "cluster-port": bus}) for bus in buses]
    with ExitStack() as stack:
        for server in servers:
            stack.callback(server.close)
            next(running(server, "redis"))
        await make_cluster(servers, buses)
        url = f"redis+cluster://{','.join(f'127.0.0.1:{server.port}' for server in servers)}"
        async with two_caches(url, "cluster") as caches:
            ledger = Ledger(session, *caches)
            await ledger.keep_working(lambda: all(cache.statistics().hits > 50 for cache in caches))
            servers[0].kill()
            await ledger.keep_working(ledger.all_are("open"))
            await ledger.keep_working(ledger.all_are("closed"), 60)
            hits = caches[0].statistics().hits
            await ledger.keep_working(lambda: caches[0].statistics().hits > hits + 50)
    shown("C3", "a node of a Redis Cluster of 3+3 is killed, two processes", reads=ledger.reads, stale=ledger.stale)
    assert ledger.stale == 0


async def make_cluster(servers: list[RedisServer], buses: list[int]) -> None:
    """Three primaries with a third of the slots each, and a replica of each."""
    clients = [redis.asyncio.from_url(server.url) for server in servers]
    try:
        slots = [(0, 5460), (5461, 10922), (10923, 16383)]
        for client, (first, last) in zip(clients[:3], slots, strict=True):
            await client.execute_command("CLUSTER", "ADDSLOTSRANGE", first, last)
        for number, client in enumerate(clients):
            await client.execute_command("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
        for server, bus in zip(servers[1:], buses[1:], strict=True):
            await clients[0].execute_command("CLUSTER", "MEET", "127.0.0.1", server.port, bus)

        async def all_are_known() -> bool:
            answers = [await client.execute_command("CLUSTER", "INFO") for client in clients]
            return all(info_of(answer)["cluster_known_nodes"] == "6" for answer in answers)

        await eventually(all_are_known)
        for primary, replica in zip(clients[:3], clients[3:], strict=True):
            identity = await primary.execute_command("CLUSTER", "MYID")
            await replica.execute_command("CLUSTER", "REPLICATE", identity)

        async def all_are_well() -> bool:
            answers = [info_of(await client.execute_command("CLUSTER", "INFO")) for client in clients]
            in_step = [await is_in_step(client) for client in clients[3:]]
            return all(answer["cluster_state"] == "ok" for answer in answers) and all(in_step)

        await eventually(all_are_well)
    finally:
        for client in clients:
            await client.aclose()


def info_of(answer: Any) -> dict[str, str]:
    if isinstance(answer, dict):
        return {str(name): str(value) for name, value in answer.items()}
    text = answer.decode() if isinstance(answer, bytes) else answer
    return dict(line.split(":", 1) for line in text.split() if ":" in line)
