"""A soak: all databases, all kinds of requests and all faults, for as long as asked."""

import asyncio
import logging
import random
import secrets
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from fastapi_building_blocks.infrastructure import SQLAlchemySession
from fastapi_building_blocks.testing import (
    DatabaseServer,
    FaultProxy,
    MariaDBServer,
    MissingServer,
    PostgreSQLServer,
    assert_connections_sound,
)
from tests.server_view import connections, open_transactions, until

from .faults import Chaos
from .memory import Slope, allocated_bytes, open_files, resident_bytes, slope_of
from .truth import Truth, audit, prepare
from .work import Tally, Worker

DATABASES = {"postgresql": PostgreSQLServer, "mariadb": MariaDBServer, "sqlite": None}
SHOWN_EVERY = 10.0
WARM_UP = 0.2
"""The part of the time after which memory is measured."""
MOST_GROWTH = 0.1
"""MiB a minute of memory in use that are no leak yet."""
KNOBS: dict[str, Any] = {
    "pool_size": 5,
    "max_overflow": 5,
    "pool_timeout": 3.0,
    "connect_timeout": 2.0,
    "statement_timeout": 3.0,
}


@dataclass
class Stand:
    """One database under test: its session, what it should hold, those who use it, and what breaks it."""

    name: str
    session: SQLAlchemySession
    truth: Truth
    workers: list[Worker]
    chaos: Chaos | None = None
    url: str = ""
    """Of the server itself, around the proxy."""
    most_connections: int = 0
    idle_in_transaction: int = 0


@dataclass
class Samples:
    """What was measured at every audit, when nothing is in use."""

    allocated: list[tuple[float, float]] = field(default_factory=list)
    """Seconds since the start, and bytes of memory in use."""
    resident: list[tuple[float, float]] = field(default_factory=list)
    """The same of the memory that the process occupies."""
    files: list[int] = field(default_factory=list)


class _CountedLog(logging.Handler):
    """Counts what is logged, instead of showing it: a soak breaks thousands of connections on purpose."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.counts: Counter[str] = Counter()
        self.unhandled: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.counts[f"{record.name} {record.levelname}"] += 1
        if record.name == "asyncio" and record.levelno >= logging.ERROR:
            error = record.exc_info[1] if record.exc_info else None
            self.unhandled.append(f"{' '.join(record.getMessage().split())} {error!r}"[:400])


async def soak(names: Sequence[str], seconds: float, workers: int, seed: int | None) -> int:
    """Run it, show how it goes and what came of it, and return the exit code."""
    seed = secrets.randbelow(2**32) if seed is None else seed
    files_before = open_files()
    log = _CountedLog()
    logging.getLogger().addHandler(log)
    stopping = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    tally, samples = Tally(), Samples()
    _fill_table_of_names()
    print(f"soak of {', '.join(names)} for {seconds / 60:g} min, {workers} workers each, seed {seed}", flush=True)
    begun = time.monotonic()
    async with AsyncExitStack() as stack:
        stands = []
        for name in names:
            try:
                chance = random.Random(f"{seed} {name}")
                stands.append(await stack.enter_async_context(_stand(name, workers, tally, chance)))
            except MissingServer as missing:
                print(f"{name} is left out: {missing}", flush=True)
        begun = time.monotonic()
        await _run(stands, seconds, stopping, tally, samples)
    elapsed = time.monotonic() - begun
    _summarize(stands, elapsed, tally, samples, log)
    print(f"file descriptors      {files_before} before, {open_files()} after; at audits {_range(samples.files)}")
    growth = _line(samples.allocated)
    # What nobody handled is shown only: SQLAlchemy leaves some behind by itself.
    failed = tally.failed or not stands or (growth is not None and growth.rises_by(MOST_GROWTH))
    print("FAILED" if failed else "passed", flush=True)
    logging.getLogger().removeHandler(log)
    return int(failed)


@asynccontextmanager
async def _stand(name: str, workers: int, tally: Tally, chance: random.Random) -> AsyncIterator[Stand]:
    async with AsyncExitStack() as stack:
        chaos, direct = None, ""
        if (make := DATABASES[name]) is None:
            directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="soak-"))
            url = f"sqlite+aiosqlite:///{Path(directory) / 'soak.db'}"
        else:
            server: DatabaseServer = make()
            await asyncio.to_thread(server.start)
            stack.callback(server.close)
            proxy = await stack.enter_async_context(FaultProxy(server.host, server.port))
            direct, url = server.url, proxy.url(server.url)
            chaos = Chaos(server, proxy, direct, random.Random(chance.random()))
        session = await stack.enter_async_context(SQLAlchemySession(url, **KNOBS))
        await prepare(session)
        if name == "postgresql":
            await _fill_free_lists(session)
        truth = Truth()
        made = [Worker(session, truth, tally, random.Random(chance.random())) for _ in range(workers)]
        yield Stand(name, session, truth, made, chaos, direct)


def _fill_table_of_names() -> None:
    """Have CPython's table of interned strings grow now, by 2 MiB at once, as it does when enough have come and gone."""
    for number in range(300_000):
        sys.intern(f"soak {number}")


async def _fill_free_lists(session: SQLAlchemySession) -> None:
    """Have asyncpg make as many rows as it keeps for reuse, 2,000 of each width: filled slowly, that is like a leak."""
    for width in range(1, 10):
        more = "".join(", 1" for _ in range(1, width))
        await session.execute(sa.text(f"SELECT number{more} FROM generate_series(1, 2500) AS number"))


async def _run(stands: list[Stand], seconds: float, stopping: asyncio.Event, tally: Tally, samples: Samples) -> None:
    loop = asyncio.get_running_loop()
    begun = loop.time()
    pause = min(30.0, max(2.0, seconds / 25))
    shown = loop.time()
    while not stopping.is_set() and loop.time() < begun + seconds:
        ends = min(begun + seconds, loop.time() + pause)
        async with asyncio.TaskGroup() as group:
            for stand in stands:
                group.create_task(_use(stand, ends, stopping))
            while loop.time() < ends and not stopping.is_set():
                with suppress(TimeoutError):
                    await asyncio.wait_for(stopping.wait(), min(1.0, max(0.0, ends - loop.time())))
                if loop.time() >= shown + SHOWN_EVERY:
                    shown = loop.time()
                    _show(stands, loop.time() - begun, tally)
        await asyncio.gather(*[_audit(stand, tally) for stand in stands])
        if (allocated := await _at_rest()) is not None:
            samples.allocated.append((loop.time() - begun, allocated))
        samples.resident.append((loop.time() - begun, resident_bytes()))
        samples.files.append(open_files())


async def _at_rest() -> int | None:
    """Return the memory in use once what an audit has left behind is done: broken connections take a while to close."""
    seen = []
    for _ in range(5):
        seen.append(allocated_bytes())
        await asyncio.sleep(0.3)
    return min((size for size in seen if size is not None), default=None)


async def _use(stand: Stand, ends: float, stopping: asyncio.Event) -> None:
    """Have the workers of one database make requests until then, and break it meanwhile."""
    loop = asyncio.get_running_loop()

    async def requests(worker: Worker) -> None:
        while loop.time() < ends and not stopping.is_set():
            await worker.request()
            await asyncio.sleep(0)  # a request may have nothing to wait for

    breaking = asyncio.create_task(stand.chaos.run()) if stand.chaos is not None else None
    watching = asyncio.create_task(_watch(stand)) if stand.chaos is not None else None
    try:
        await asyncio.gather(*[requests(worker) for worker in stand.workers])
    finally:
        for task in filter(None, (breaking, watching)):
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task


async def _watch(stand: Stand) -> None:
    """Count the server's connections now and then, when it is there to be asked."""
    assert stand.chaos is not None
    while True:
        await asyncio.sleep(1)
        async with stand.chaos.calm:
            counting = asyncio.ensure_future(asyncio.to_thread(connections, stand.url))
            try:
                stand.most_connections = max(stand.most_connections, len(await asyncio.shield(counting)))
            except asyncio.CancelledError:
                await counting
                raise


async def _audit(stand: Stand, tally: Tally) -> None:
    """Compare what one database holds with what was acknowledged; nobody uses it now, and nothing is broken."""
    try:
        if stand.chaos is not None:
            # What was sent for nobody any more has ended as well.
            await until(lambda: not open_transactions(stand.url), 20)
        await assert_connections_sound(stand.session, within=20, server_url=stand.url)
    except (AssertionError, TimeoutError) as unsound:
        tally.unsound.append(f"{stand.name}: {unsound or 'a transaction is still open on the server'}")
        if stand.chaos is not None:
            stand.idle_in_transaction = max(stand.idle_in_transaction, open_transactions(stand.url))
    wrong, lost = await audit(stand.session, stand.truth)
    tally.wrong += [f"{stand.name}: {text}" for text in wrong]
    tally.lost += [f"{stand.name}: {text}" for text in lost]
    for worker in stand.workers:
        worker.forget()


# What is shown


def _show(stands: list[Stand], elapsed: float, tally: Tally) -> None:
    requests = tally.requests.total()
    faults = sum(stand.chaos.counts.total() for stand in stands if stand.chaos is not None)
    now = ", ".join(f"{stand.name}: {stand.chaos.now}" for stand in stands if stand.chaos is not None)
    print(
        f"{int(elapsed) // 60:3}:{int(elapsed) % 60:02}  {requests:,} requests ({requests / elapsed:,.0f}/s)  "
        f"{tally.errors.total():,} refused  {tally.cancelled:,} cancelled  {faults} faults  "
        f"wrong {len(tally.wrong)}  lost {len(tally.lost)}  {resident_bytes() / 2**20:.1f} MiB  {now}",
        flush=True,
    )


def _summarize(stands: list[Stand], elapsed: float, tally: Tally, samples: Samples, log: _CountedLog) -> None:
    print(f"\n{elapsed:.0f} s, {tally.requests.total():,} requests, {len(samples.resident)} audits")
    _table(
        "requests by kind",
        {f"{kind} (slowest {tally.longest[kind]:.2f} s)": count for kind, count in _most(tally.requests)},
    )
    _table("refused, by error", dict(_most(tally.errors)) | {"cancelled by the caller": tally.cancelled})
    for stand in stands:
        if stand.chaos is not None:
            _table(f"faults of {stand.name}", dict(_most(stand.chaos.counts)))
    _table("log, warnings and errors", dict(_most(log.counts)))
    for title, found in (
        ("wrong answers", tally.wrong),
        ("lost acknowledged writes", tally.lost),
        ("connections not sound", tally.unsound),
        ("errors that nobody handled", log.unhandled),
    ):
        print(f"{title:<28} {len(found)}")
        for text in found[:20]:
            print(f"    {text}")
    for stand in stands:
        if stand.chaos is not None:
            limit = KNOBS["pool_size"] + KNOBS["max_overflow"]
            print(
                f"connections of {stand.name:<13} at most {stand.most_connections} seen by the server, the pool may "
                f"open {limit}; left in a transaction at audits: {stand.idle_in_transaction}"
            )
    print(f"memory in use         {_memory(samples.allocated)}")
    print(f"memory occupied       {_memory(samples.resident)}")


def _most(counts: Counter[str]) -> list[tuple[str, int]]:
    return counts.most_common()


def _table(title: str, rows: dict[str, int]) -> None:
    print(title)
    for name, count in rows.items():
        print(f"    {count:>10,}  {name}")


def _memory(samples: list[tuple[float, float]]) -> str:
    if not samples:
        return "not measured"
    warm = _warm(samples)
    line = _line(samples)
    level = f"{warm[0][1] / 2**20:.1f} MiB after warm-up, {warm[-1][1] / 2**20:.1f} MiB at the end"
    if line is None:
        return f"{level}; too few audits for a slope"
    verdict = "not distinguishable from 0" if line.is_zero else "it changes"
    return f"{level}; slope {line.slope:+.3f} ± {line.uncertainty:.3f} MiB/min ({verdict})"


def _line(samples: list[tuple[float, float]]) -> Slope | None:
    """Return the slope in MiB a minute, after the warm-up."""
    return slope_of([(seconds / 60, size / 2**20) for seconds, size in _warm(samples)])


def _warm(samples: list[tuple[float, float]]) -> list[tuple[float, float]]:
    return samples[int(len(samples) * WARM_UP) :]


def _range(values: list[int]) -> str:
    return f"{min(values)} to {max(values)}" if values else "none"
