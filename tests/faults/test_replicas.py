"""C1 and C2: replicas that lag, die, stand still or are promoted, and reads that are neither old nor lost."""

import asyncio
import os
import random
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import pytest
import sqlalchemy as sa

from fastapi_building_blocks.infrastructure import SQLAlchemySession, StatementEvent, deadline, reads_from_primary
from fastapi_building_blocks.infrastructure.database.consistency import ConsistencyScope, Mark, consistency_scope
from fastapi_building_blocks.testing import (
    MARIADB_PRIMARY,
    DatabaseServer,
    MariaDBReplica,
    MariaDBServer,
    PostgreSQLReplica,
    PostgreSQLServer,
    database_servers,
)
from fastapi_building_blocks.testing.fault_proxy import free_port
from tests.faults.breaking import HONEST, ending_of
from tests.faults.conftest import running
from tests.guarantees.ledger import Accounts, account, opened
from tests.server_view import until

ROOT = Path(__file__).parents[2]
BACK = 5.0
"""Seconds from a replica that has recovered to one that is read from."""
DELAY = 5


@dataclass
class Cluster:
    """A primary with one replica that follows closely, and one that is held back."""

    name: str
    primary: DatabaseServer
    near: Any
    held: Any

    def urls(self, *replicas: DatabaseServer) -> dict[str, Any]:
        return {"replica_urls": [replica.url for replica in replicas]}


@pytest.fixture(scope="module")
def postgresql_cluster() -> Iterator[Cluster]:
    with ExitStack() as stack:
        primary = PostgreSQLServer({"max_connections": 200})
        for server in running(primary, "postgres"):
            # A replica gives up reads that are in the way of its replay, after half a minute unless told otherwise.
            near = stack.enter_context(PostgreSQLReplica(primary, {"max_standby_streaming_delay": "100ms"}))
            held = stack.enter_context(PostgreSQLReplica(primary, delay=DELAY))
            yield Cluster("PostgreSQL", server, near, held)


@pytest.fixture(scope="module")
def mariadb_cluster() -> Iterator[Cluster]:
    with ExitStack() as stack:
        primary = MariaDBServer(MARIADB_PRIMARY)
        for server in running(primary, "mysql"):
            near = stack.enter_context(MariaDBReplica(primary))
            held = stack.enter_context(MariaDBReplica(primary, delay=DELAY))
            yield Cluster("MariaDB", server, near, held)


@pytest.fixture(params=["postgresql", "mariadb"])
def cluster(request: pytest.FixtureRequest) -> Cluster:
    found: Cluster = request.getfixturevalue(f"{request.param}_cluster")
    return found


# C1: own writes are visible


@asynccontextmanager
async def served(
    cluster: Cluster, replicas: list[DatabaseServer], redis_url: str = ""
) -> AsyncIterator[httpx2.AsyncClient]:
    """Serve with a process of its own, and yield a client that keeps its connections."""
    port = free_port()
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)]),
        "DATABASE_URL": cluster.primary.url,
        "DATABASE_REPLICA_URLS": ",".join(replica.url for replica in replicas),
        "DATABASE_MAX_LAG": "60",  # so that what is held back stays in rotation
        "CONSISTENCY_SECRET": "shared by both services",
        "REDIS_URL": redis_url,
    }
    command = [sys.executable, "-m", "uvicorn", "tests.faults.replicated_service:app", "--port", str(port)]
    process = await asyncio.create_subprocess_exec(*command, "--log-level", "warning", cwd=ROOT, env=environment)
    try:
        async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
            async with asyncio.timeout(20):
                while True:
                    try:
                        await client.get("/replicas")
                        break
                    except httpx2.TransportError:
                        assert process.returncode is None
                        await asyncio.sleep(0.05)
            yield client
    finally:
        process.terminate()
        await asyncio.wait_for(process.wait(), 20)


async def pairs(services: list[httpx2.AsyncClient], client: int, count: int, *, with_token: bool) -> int:
    """Write through one service, read through the other, and return how many reads were older than the write."""
    stale, headers = 0, {}
    for turn in range(count):
        writer, reader = services[turn % 2], services[1 - turn % 2]
        written = await writer.put(f"/accounts/{client}/{turn}", headers=headers)
        assert written.status_code == 200, written.text
        token = written.headers["X-Consistency-Token"]
        headers = {"X-Consistency-Token": token} if with_token else {}
        read = await reader.get(f"/accounts/{client}", headers=headers)
        assert read.status_code == 200, read.text
        assert not with_token or "X-Consistency-Token" in read.headers, "it travels on"
        stale += read.json() != turn
    return stale


@pytest.mark.parametrize("kind", ["postgresql", "mariadb"])
async def test_c1_the_writer_reads_its_own_writes_through_another_service(
    kind: str,
    request: pytest.FixtureRequest,
    effort: Callable[[int, int], int],
    shown: Callable[..., None],
) -> None:
    cluster: Cluster = request.getfixturevalue(f"{kind}_cluster")
    replicas = [cluster.near, cluster.held] if kind == "postgresql" else [cluster.held]
    clients, each = 4, effort(200, 2000) // 4
    async with opened(cluster.primary.url):
        # What is held back has the table as well, or its failures would go to the primary.
        await until(lambda: has_table(cluster.held), DELAY + 15)
    async with AsyncExitStack() as stack:
        services = [await stack.enter_async_context(served(cluster, replicas)) for _ in range(2)]
        for service in services:
            async with asyncio.timeout(DELAY + 15):
                while (await service.get("/replicas")).json()["waiting"]:
                    await asyncio.sleep(0.2)
        async with asyncio.TaskGroup() as group:
            told = [group.create_task(pairs(services, one, each, with_token=True)) for one in range(clients)]
        reads = Counter[str]()
        for service in services:
            reads.update((await service.get("/replicas")).json()["reads"])
        async with asyncio.TaskGroup() as group:
            blind = [group.create_task(pairs(services, one + 100, 10, with_token=False)) for one in range(clients)]
        stale = sum(task.result() for task in told)
        proof = sum(task.result() for task in blind)
        shown(
            "C1",
            f"{cluster.name}, {len(replicas)} replicas, one {DELAY} s behind, two services that share the header",
            pairs=clients * each,
            stale=stale,
            stale_without_token=f"{proof} of {clients * 10}",
            reads_on_replicas=sum(reads.values()),
        )
        assert stale == 0
        assert proof > 0, "the test cannot see old data"
        if kind == "postgresql":
            near = f"127.0.0.1:{cluster.near.port}"
            assert reads[near] > clients * each / 4, "a replica that has replayed the write is read from"


async def test_c1_c3_replicas_and_a_cache_together_show_nothing_old(
    postgresql_cluster: Cluster, redis_url: str, effort: Callable[[int, int], int], shown: Callable[..., None]
) -> None:
    cluster, clients, each = postgresql_cluster, 4, effort(160, 2000) // 4
    async with opened(cluster.primary.url):
        await until(lambda: has_table(cluster.held), DELAY + 15)

    async def client(services: list[httpx2.AsyncClient], number: int) -> tuple[int, int, int]:
        cached = listed = blind = 0
        headers: dict[str, str] = {}
        for turn in range(each):
            writer, reader = services[turn % 2], services[1 - turn % 2]
            blind += (await reader.get(f"/listed/{number}")).json() != (turn - 1 if turn else None)
            written = await writer.put(f"/accounts/{number}/{turn}", headers=headers)
            assert written.status_code == 200, written.text
            headers = {"X-Consistency-Token": written.headers["X-Consistency-Token"]}
            for service in (reader, writer):
                cached += (await service.get(f"/accounts/{number}", headers=headers)).json() != turn
                listed += (await service.get(f"/listed/{number}", headers=headers)).json() != turn
        return cached, listed, blind

    async with AsyncExitStack() as stack:
        both = [cluster.near, cluster.held]
        services = [await stack.enter_async_context(served(cluster, both, redis_url)) for _ in range(2)]
        for service in services:
            async with asyncio.timeout(DELAY + 15):
                while (await service.get("/replicas")).json()["waiting"]:
                    await asyncio.sleep(0.2)
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(client(services, 200 + number)) for number in range(clients)]
        old_cached, old_listed, blind = (sum(counts) for counts in zip(*(task.result() for task in tasks), strict=True))
        figures = [(await service.get("/replicas")).json() for service in services]
    hits, reads = (sum(one["hits"] for one in figures), sum(sum(one["reads"].values()) for one in figures))
    shown(
        "C1",
        f"PostgreSQL, 2 replicas, one {DELAY} s behind, and Redis; two services that share the header",
        pairs=clients * each,
        stale_cached=old_cached,
        stale_listed=old_listed,
        stale_without_token=blind,
        hits=hits,
        reads_on_replicas=reads,
    )
    assert (old_cached, old_listed) == (0, 0)
    assert blind > 0, "the test cannot see old data"
    assert hits >= clients * each / 2
    assert reads >= clients * each / 2


def has_table(server: Any) -> bool:
    sql = "SELECT count(*) FROM information_schema.tables WHERE table_name = 'accounts'"
    return server._ask(sql) == "1"


async def test_c1_within_a_session_as_well(
    cluster: Cluster, effort: Callable[[int, int], int], shown: Callable[..., None]
) -> None:
    tries, stale = effort(100, 2000), 0
    replicas = cluster.urls(cluster.near, cluster.held)
    async with opened(cluster.primary.url, max_lag=60, consistency_wait=1.0, **replicas) as session:
        await Accounts(session).upsert(account(1, 0))
        for turn in range(1, tries + 1):
            if turn % 2:
                await Accounts(session).update(account(1, turn))
            else:
                await session.run(lambda unit, turn=turn: Accounts(unit).update(account(1, turn)))
            kind = turn % 4
            if kind == 0:
                async with session.transaction(read_only=True) as unit:
                    found: Any = await Accounts(unit).get_by_id(1)
            elif kind == 1:
                found = await asyncio.create_task(Accounts(session).get_by_id(1))
            elif kind == 2:
                (found,) = [one async for one in Accounts(session).stream(Accounts.table.c.id == 1)]
            else:
                found = (await session.execute(sa.select(Accounts.table).where(Accounts.table.c.id == 1))).one()
            stale += found.balance != turn
        on_replicas = sum(replica.reads for replica in session.replica_status())
        shown("C1", f"{cluster.name}, one session", pairs=tries, stale=stale, reads_on_replicas=on_replicas)
        assert stale == 0
        assert on_replicas > tries / 2


async def test_c1_a_token_that_no_replica_reaches_waits_no_longer_than_said(cluster: Cluster) -> None:
    """As after a failover, where the log goes on from an earlier place."""
    async with opened(cluster.primary.url, consistency_wait=0.2, **cluster.urls(cluster.near)) as session:
        async with load_on(session) as load:
            load.over = True
        scope = ConsistencyScope()
        with consistency_scope(scope):
            await Accounts(session).update(account(3, 5))
            assert (await Accounts(session).get(3)).balance == 5
            (mark,) = scope.marks.values()
            assert mark.position is not None
            mark.add(Mark(dict.fromkeys(mark.position, 2**62), time.monotonic()))
            reads, begun = session.replica_status()[0].reads, time.monotonic()
            assert (await Accounts(session).get(3)).balance == 5
            assert 0.2 <= time.monotonic() - begun < 1.5
            assert session.replica_status()[0].reads == reads, "it went to the primary"
            # Once it is certain that whoever lags no more than max_lag has it, it asks nothing any more.
            mark.position_at -= 10.0 + 60.0
            assert (await Accounts(session).get(3)).balance == 5
            assert session.replica_status()[0].reads == reads + 1


async def test_c1_what_a_function_has_written_is_seen(postgresql_cluster: Cluster) -> None:
    """A replica refuses it, so it is done on the primary, and nothing but the refusal says that it writes."""
    cluster = postgresql_cluster
    bump = "UPDATE accounts SET balance = balance + 1 WHERE id = $1 RETURNING balance"
    async with opened(cluster.primary.url, max_lag=60, **cluster.urls(cluster.held)) as session:
        await Accounts(session).upsert(account(4, 0))
        await session.execute(
            sa.text(f"CREATE OR REPLACE FUNCTION bump(integer) RETURNS integer LANGUAGE sql AS '{bump}'")
        )
        found = "SELECT count(*) FROM pg_proc WHERE proname = 'bump'"
        await until(lambda: cluster.held._ask(found) == "1", DELAY + 15)
        await until(lambda: session.replica_status()[0].in_rotation, DELAY + 15)
        calls = (sa.select(sa.func.bump(4)), sa.select(sa.text("bump(4)")), sa.select(sa.literal_column("bump(4)")))
        for written, call in enumerate((*calls, calls[0]), 1):
            with consistency_scope(ConsistencyScope()):
                if written == 4:  # without a replica that refuses it
                    with reads_from_primary():
                        await session.execute(call)
                else:
                    await session.execute(call)
                assert (await Accounts(session).get(4)).balance == written


async def test_a_lock_or_a_number_by_a_function_is_the_primarys(postgresql_cluster: Cluster) -> None:
    """A replica would give the same advisory lock once more."""
    cluster = postgresql_cluster
    async with opened(cluster.primary.url, max_lag=60, **cluster.urls(cluster.near)) as session:
        await until(lambda: session.replica_status()[0].in_rotation, 15)
        port = sa.func.inet_server_port()
        with consistency_scope(ConsistencyScope()):
            assert (await session.execute(sa.select(port))).scalar_one() == cluster.near.port
        for name in ("pg_try_advisory_lock", "pg_advisory_unlock"):
            with consistency_scope(ConsistencyScope()):
                _, asked = (await session.execute(sa.select(getattr(sa.func, name)(42), port))).one()
                assert asked == cluster.primary.port, name


async def test_c1_the_wait_for_a_replica_leaves_time_for_the_primary(cluster: Cluster) -> None:
    """Of a deadline that is shorter than ``consistency_wait``."""
    async with opened(cluster.primary.url, consistency_wait=5.0, **cluster.urls(cluster.near)) as session:
        await Accounts(session).upsert(account(3, 0))
        await until(lambda: session.replica_status()[0].in_rotation, 15)
        with consistency_scope(ConsistencyScope()) as scope:
            await Accounts(session).update(account(3, 6))
            await scope.token()
            (mark,) = scope.marks.values()
            assert mark.position is not None
            mark.add(Mark(dict.fromkeys(mark.position, 2**62), time.monotonic()))
            with deadline(0.5):
                assert (await Accounts(session).get(3)).balance == 6


# C2: one unit, one server; replicas leave and come back


def port_of(backend: str) -> Any:
    return sa.literal_column("inet_server_port()" if backend == "postgresql" else "@@port", sa.Integer())


async def test_c2_a_unit_runs_on_one_server(cluster: Cluster) -> None:
    async with opened(cluster.primary.url, max_lag=60, **cluster.urls(cluster.near, cluster.held)) as session:
        port = port_of(session.dialect_name)
        await until(lambda: all(replica.in_rotation for replica in session.replica_status()), DELAY + 10)
        with consistency_scope(ConsistencyScope()):
            seen = Counter[int]()
            for _ in range(8):
                async with session.transaction(read_only=True) as unit:
                    first = [(await unit.execute(sa.select(port))).scalar_one() for _ in range(3)]
                    async with unit.savepoint():
                        first += [row[0] async for row in unit.stream(sa.select(port))]
                    assert len(set(first)) == 1
                    seen[first[0]] += 1
            assert set(seen) == {cluster.near.port, cluster.held.port}, "each in turn"
            async with session.transaction() as unit:
                written = [(await unit.execute(sa.select(port))).scalar_one() for _ in range(3)]
            assert set(written) == {cluster.primary.port}


@dataclass
class Load:
    """Readers, and writers that read what they have written, each with a deadline; and what went wrong."""

    session: SQLAlchemySession
    reads: int = 0
    longest: float = 0.0
    wrong: list[str] = field(default_factory=list)
    over: bool = False

    async def _timed(self, call: Any) -> Any:
        with deadline(4.0):
            ending = await ending_of(call)
        self.longest = max(self.longest, ending.seconds)
        if ending.error is not None:
            self.wrong.append(str(ending))
        return ending.answer

    async def read(self) -> None:
        chance = random.Random()
        while not self.over:
            with consistency_scope(ConsistencyScope()):
                found = await self._timed(Accounts(self.session).get_by_id(chance.randrange(10)))
            if found is None:
                self.wrong.append("an account is not there")
            self.reads += 1
            await asyncio.sleep(0.002)

    async def write(self, number: int) -> None:
        balance = 0
        while not self.over:
            with consistency_scope(ConsistencyScope()):
                balance += 1
                await self._timed(Accounts(self.session).update(account(number, balance)))
                found = await self._timed(Accounts(self.session).get_by_id(number))
            if found is None or found.balance != balance:
                self.wrong.append(f"wrote {balance}, read {found}")
            await asyncio.sleep(0.01)


@asynccontextmanager
async def load_on(session: SQLAlchemySession) -> AsyncIterator[Load]:
    await Accounts(session).upsert_many([account(number) for number in range(12)])
    await until(lambda: all(replica.in_rotation for replica in session.replica_status()), 15)
    assert await Accounts(session).get_by_id(0)
    load = Load(session)
    async with asyncio.TaskGroup() as group:
        for work in (*[load.read() for _ in range(8)], load.write(10), load.write(11)):
            group.create_task(work)
        try:
            yield load
        finally:
            load.over = True


FAULTS = ["killed", "frozen", "lagging"]


@pytest.mark.parametrize("fault", FAULTS)
async def test_c2_a_replica_leaves_and_comes_back_and_no_read_fails(
    cluster: Cluster, fault: str, shown: Callable[..., None]
) -> None:
    victim = cluster.near
    knobs = {"max_lag": 1.0, "connect_timeout": 2.0, "statement_timeout": 4.0, "pool_timeout": 3.0}
    async with opened(cluster.primary.url, **knobs, **cluster.urls(victim)) as session:

        def is_in() -> bool:
            return session.replica_status()[0].in_rotation

        async with load_on(session) as load:
            await until(lambda: session.replica_status()[0].reads > 50)
            broke = time.monotonic()
            if fault == "killed":
                victim.kill()
            elif fault == "frozen":
                victim.freeze()
            else:
                victim.pause()
            try:
                await until(lambda: not is_in(), 10)
                left = time.monotonic() - broke
                before = load.reads
                await until(lambda: load.reads > before + 100, 10)
            finally:
                if fault == "killed":
                    await asyncio.to_thread(victim.start)
                elif fault == "frozen":
                    victim.thaw()
                else:
                    victim.resume()
            recovered = time.monotonic()
            await until(is_in, BACK + 10)
            back = time.monotonic() - recovered
            reads = session.replica_status()[0].reads
            await until(lambda: session.replica_status()[0].reads > reads + 50)
        shown(
            "C2",
            f"{cluster.name}, a replica {fault} under load",
            reads=load.reads,
            failed=len(load.wrong),
            longest_wait=f"{load.longest:.2f} s",
            left_after=f"{left:.2f} s",
            back_after=f"{back:.2f} s",
        )
        assert not load.wrong, load.wrong[:10]
        assert load.longest < 4.5
        assert back < BACK


async def test_c2_a_promoted_replica_is_not_read_from_again(cluster: Cluster, shown: Callable[..., None]) -> None:
    kind: Any = type(cluster.near)
    with kind(cluster.primary) as victim:
        async with opened(cluster.primary.url, max_lag=2.0, **cluster.urls(cluster.near, victim)) as session:
            async with load_on(session) as load:
                await until(lambda: min(replica.reads for replica in session.replica_status()) > 20)
                await asyncio.to_thread(victim.promote)
                if cluster.name == "MariaDB":  # which does not say; its own writes do
                    await asyncio.to_thread(victim._ask, "UPDATE test.accounts SET balance = -1 WHERE id = 11")
                promoted = time.monotonic()
                await until(lambda: not session.replica_status()[1].in_rotation, 10)
                left = time.monotonic() - promoted
                reads = session.replica_status()[1].reads
                await asyncio.sleep(1.5)
                near, gone = session.replica_status()
                assert (near.in_rotation, gone.in_rotation, gone.reads) == (True, False, reads)
            wrong = [one for one in load.wrong if "balance=-1" not in one]
            assert not wrong, wrong[:10]
            shown("C2", f"{cluster.name}, a replica promoted under load", reads=load.reads, left_after=f"{left:.2f} s")


async def test_c2_a_replica_of_another_cluster_is_not_read_from(
    postgresql_cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its log may well be longer, and it has a database of the same name."""
    cluster = postgresql_cluster
    # A copy of the same initdb would pass for the same cluster.
    monkeypatch.setattr(database_servers, "_postgresql_template", database_servers._postgresql_template.__wrapped__)
    with ExitStack() as stack:
        other = PostgreSQLServer()
        for server in running(other, "postgres"):
            async with opened(server.url) as session:
                await Accounts(session).upsert(account(5, -1))
                for _ in range(20):
                    await session.execute(sa.text("SELECT pg_switch_wal()"))
                    await session.execute(sa.text("SELECT pg_logical_emit_message(true, 'x', 'y')"))
            stranger = stack.enter_context(PostgreSQLReplica(other))
            async with opened(cluster.primary.url, **cluster.urls(stranger, cluster.near)) as session:
                await Accounts(session).upsert(account(5, 5))
                await until(lambda: session.replica_status()[1].in_rotation, 15)
                for _ in range(10):
                    assert (await Accounts(session).get(5)).balance == 5
                status = session.replica_status()[0]
                assert (status.in_rotation, status.reads) == (False, 0)
                assert "follows another one" in status.reason


@pytest.mark.parametrize("portable", [False, True], ids=["driver", "portable"])
async def test_who_may_not_ask_for_the_cluster_reads_from_replicas_all_the_same(
    postgresql_cluster: Cluster, portable: bool
) -> None:
    cluster = postgresql_cluster
    primary, near = (sa.make_url(one.url).set(username="plain") for one in (cluster.primary, cluster.near))
    asking = "EXECUTE ON FUNCTION pg_control_system"
    async with SQLAlchemySession(cluster.primary.url) as owner:
        for sql in ("DROP ROLE IF EXISTS plain", "CREATE ROLE plain LOGIN", f"REVOKE {asking} FROM PUBLIC"):
            await owner.execute(sa.text(sql))
        try:
            async with SQLAlchemySession(primary, replica_urls=[near], portable=portable) as session:
                await until(lambda: session.replica_status()[0].in_rotation, 15)
                await session.execute(sa.text("SELECT 1"))  # marks
                async with asyncio.timeout(10):
                    while not session.replica_status()[0].reads:
                        # A commit, which flushes what a vacuum or a pruned page has left unflushed in the log.
                        await owner.execute(sa.text("SELECT pg_logical_emit_message(true, 'x', 'y')"))
                        assert (await session.execute(sa.select(sa.func.current_user()))).scalar_one() == "plain"
        finally:
            await owner.execute(sa.text(f"GRANT {asking} TO PUBLIC"))


async def test_c2_a_frozen_replica_ends_what_only_it_can_answer(cluster: Cluster) -> None:
    victim = cluster.near
    async with opened(cluster.primary.url, statement_timeout=20, **cluster.urls(victim)) as session:
        async with load_on(session) as load:
            load.over = True
        with consistency_scope(ConsistencyScope()):
            unit = session.transaction(read_only=True)
            await unit.__aenter__()
            await Accounts(unit).get_by_id(1)
            stream = Accounts(session).stream(batch_size=1)
            await anext(stream)
            begun = time.monotonic()
            victim.freeze()
            try:
                midway = await ending_of(Accounts(unit).get_by_id(1))
                rest = await ending_of(drained(stream))
                fresh = await ending_of(fresh_unit(session))
            finally:
                victim.thaw()
            assert midway.is_honest, midway
            # What was sent before the freeze may be all.
            assert rest.is_honest or rest.error is None, rest
            assert fresh.answer >= 12, "nothing of it was read, so the primary serves as well"
            assert time.monotonic() - begun < 6
            error = RuntimeError()
            await unit.__aexit__(RuntimeError, error, None)


async def drained(stream: Any) -> int:
    return len([one async for one in stream])


async def fresh_unit(session: SQLAlchemySession) -> int:
    async with session.transaction(read_only=True) as unit:
        return await Accounts(unit).count()


async def test_c2_replicas_that_are_down_do_not_hinder_the_start(cluster: Cluster) -> None:
    gone = sa.make_url(cluster.primary.url).set(port=free_port())
    async with opened(cluster.primary.url, replica_urls=[gone]) as session:
        (status,) = session.replica_status()
        assert not status.in_rotation
        assert "cannot be asked" in status.reason
        await Accounts(session).upsert(account(1, 7))
        assert (await Accounts(session).get(1)).balance == 7
        async with session.transaction(read_only=True) as unit:
            assert (await Accounts(unit).get(1)).balance == 7


@pytest.mark.parametrize("kind", ["postgresql"])
async def test_c2_a_read_that_writes_is_done_on_the_primary(kind: str, request: pytest.FixtureRequest) -> None:
    cluster: Cluster = request.getfixturevalue(f"{kind}_cluster")
    async with opened(cluster.primary.url, **cluster.urls(cluster.near)) as session:
        await session.execute(sa.text("CREATE SEQUENCE IF NOT EXISTS numbers"))
        numbers = sa.select(sa.literal_column("nextval('numbers')", sa.BigInteger()))
        for _ in range(50):  # until the replica has replayed what others did before, and the sequence
            assert (await session.execute(numbers)).scalar_one() >= 1
            if session.replica_status()[0].reads:
                break
            await asyncio.sleep(0.1)
        assert session.replica_status()[0].reads == 1, "it was tried there"


async def test_c2_a_read_in_the_way_of_replay_is_done_on_the_primary(postgresql_cluster: Cluster) -> None:
    cluster = postgresql_cluster
    seen: list[StatementEvent] = []
    async with opened(cluster.primary.url, **cluster.urls(cluster.near)) as session:
        async with load_on(session) as load:
            load.over = True
        session.observe(seen.append)
        slow = sa.select(sa.func.pg_sleep(1.0), Accounts.table.c.id).limit(1)
        with consistency_scope(ConsistencyScope()):
            reading = asyncio.create_task(session.execute(slow))
            await until(lambda: session.replica_status()[0].outstanding)
            await asyncio.sleep(0.1)
            await session.execute(sa.text("ALTER TABLE accounts ALTER COLUMN owner SET STATISTICS 50"))
            await session.execute(sa.text("TRUNCATE accounts CASCADE"))
            assert len((await reading).all()) == 0, "the primary's answer"
        servers = [(event.server, type(event.error).__name__) for event in seen if "pg_sleep" in event.sql]
        assert servers == [(f"127.0.0.1:{cluster.near.port}", "SerializationError"), ("primary", "NoneType")]


async def test_c2_a_frozen_primary_does_not_make_its_replicas_leave(cluster: Cluster) -> None:
    async with opened(cluster.primary.url, max_lag=1.0, **cluster.urls(cluster.near)) as session:
        async with load_on(session) as load:
            load.over = True
        cluster.primary.freeze()
        try:
            await asyncio.sleep(3)
            with consistency_scope(ConsistencyScope()):
                assert (await Accounts(session).get(1)).id == 1
            assert session.replica_status()[0].in_rotation
        finally:
            cluster.primary.thaw()


async def test_c1_a_write_while_the_primary_stands_still_is_not_forgotten(cluster: Cluster) -> None:
    """Its outcome is unknown, and so is how far the primary is: reads stay with it."""
    async with opened(cluster.primary.url, max_lag=3.0, **cluster.urls(cluster.near)) as session:
        async with load_on(session) as load:
            load.over = True
        with consistency_scope(ConsistencyScope()):
            cluster.primary.freeze()
            try:
                with deadline(0.5):
                    assert isinstance((await ending_of(Accounts(session).update(account(3, 77)))).error, HONEST)
                with deadline(1.5):
                    assert (await ending_of(Accounts(session).get(3))).is_honest
            finally:
                cluster.primary.thaw()
            assert (await Accounts(session).get(3)).balance in (0, 77)
