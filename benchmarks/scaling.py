"""The part about scaling reads: one row by its key from PostgreSQL, its replicas, and a cache in front of it."""

import asyncio
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import ClassVar

from fastapi_building_blocks.infrastructure import (
    Cache,
    CachedRepository,
    InMemoryCache,
    RedisCache,
    SQLAlchemySession,
    eventual_reads,
)
from fastapi_building_blocks.infrastructure.database.consistency import ConsistencyScope, consistency_scope
from fastapi_building_blocks.testing import MissingServer, PostgreSQLReplica, PostgreSQLServer, RedisServer

from .accounts import Account, account
from .contestants import POOL_SIZE
from .databases import Housekeeping
from .measure import Log, Result, measure_operation, on_one_core
from .operations import Get, GetConcurrently
from .ours import AccountRepository, Ours

ROWS = 1_000
"""Accounts that are read: all of them are in the cache before anything is timed."""
SETTLE = 10.0
"""Seconds in which both replicas have to have replayed everything."""


class OneServer(Ours):
    name = "one server"


class Replicated(Ours):
    """A session with replicas, that waits until both are read from."""

    replica_urls: ClassVar[tuple[str, ...]] = ()

    async def setup(self, url: str) -> None:
        self._session = SQLAlchemySession(url, pool_size=POOL_SIZE, max_overflow=0, replica_urls=self.replica_urls)
        await self._session.connect()
        give_up = time.monotonic() + SETTLE
        while not all(one.in_rotation for one in self._session.replica_status()):
            if time.monotonic() > give_up:
                raise RuntimeError(f"replicas that are not read from: {self._session.replica_status()}")
            await asyncio.sleep(0.05)


class OldAllowed(Replicated):
    """Reads that may be older than the context's writes: no causal routing."""

    name = "two replicas, old rows allowed"

    async def get(self, number: int) -> Account | None:
        with eventual_reads():
            return await super().get(number)


class OwnWriteReplayed(Replicated):
    """Reads of a context that has written; both replicas have replayed that, and are known to have."""

    name = "two replicas, own write replayed"

    async def setup(self, url: str) -> None:
        await super().setup(url)
        self._scope = ConsistencyScope()
        with consistency_scope(self._scope):
            repository = AccountRepository(self._session)
            await repository.upsert(account(1))
            await asyncio.sleep(1)
            for _ in range(100):
                await repository.get(1)

    async def get(self, number: int) -> Account | None:
        with consistency_scope(self._scope):
            return await super().get(number)


class Cached(Ours):
    """A cache that has every account that is asked for."""

    cache: Callable[[], Cache]

    async def setup(self, url: str) -> None:
        await super().setup(url)
        self._cache = type(self).cache()
        self._cached = CachedRepository(AccountRepository(self._session), self._cache)
        await self._cached.get_many(range(1, ROWS + 1))

    async def teardown(self) -> None:
        if isinstance(self._cache, RedisCache):
            await self._cache.disconnect()
        await super().teardown()

    async def get(self, number: int) -> Account | None:
        return await self._cached.get_by_id(number)


class CachedInRedis(Cached):
    name = "cached in Redis"


class CachedInMemory(Cached):
    name = "cached in memory"
    cache = staticmethod(lambda: InMemoryCache(max_entries=2 * ROWS))


KINDS: tuple[type[Ours], ...] = (OneServer, OldAllowed, OwnWriteReplayed, CachedInRedis, CachedInMemory)
OPERATIONS = (Get("get", "get_by_id", "get"), GetConcurrently("get64", "get_by_id, 64 tasks", "get", calls_at_least=64))


def run_scaling(rounds: int, seconds: float, log: Log) -> Result | None:
    """Start the servers, measure and stop them; None where one of them is not installed."""
    with ExitStack() as stack:
        try:
            primary = stack.enter_context(PostgreSQLServer())
            replicas = [stack.enter_context(PostgreSQLReplica(primary)) for _ in range(2)]
            redis = stack.enter_context(RedisServer())
        except MissingServer as missing:
            log(f"scaling reads is left out: {missing}")
            return None
        Replicated.replica_urls = tuple(replica.url for replica in replicas)
        CachedInRedis.cache = staticmethod(lambda: RedisCache(redis.url))
        stack.enter_context(on_one_core())
        return asyncio.run(_measure(primary.url, rounds, seconds, log))


async def _measure(url: str, rounds: int, seconds: float, log: Log) -> Result:
    house = Housekeeping("postgres", url, ROWS)
    await house.setup()
    contestants = [kind() for kind in KINDS]
    try:
        for contestant in contestants:
            await contestant.setup(url)
        result = Result("postgres", f"{await house.version()}, two replicas of it, and Redis", ROWS)
        for operation in OPERATIONS:
            for contestant in contestants:
                await operation.check(contestant, house)
            result.cells[operation.name] = await measure_operation(operation, contestants, house, rounds, seconds)
            log(f"scaling reads: {operation.title}")
        return result
    finally:
        for contestant in contestants:
            await contestant.teardown()
        await house.teardown()
