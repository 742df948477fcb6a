"""What tests of faults share: a database on a server that may be broken, how calls end, and how late a loop is."""

import asyncio
import os
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import make_url

from fastapi_building_blocks.domain import DeadlineExceededError, UnavailableError
from fastapi_building_blocks.testing import DatabaseServer
from tests.backends import SERVERS, str_of

HONEST = (UnavailableError, DeadlineExceededError)
"""What a call may raise when its database cannot answer: 503 and 504."""


@dataclass(frozen=True)
class Database:
    """An empty database, and the server that it is on."""

    server: DatabaseServer
    url: str


@contextmanager
def private_database(server: DatabaseServer, driver: str) -> Iterator[Database]:
    """Give an empty database on the server for this driver; whatever became of the server, it runs again afterwards."""
    place = make_url(server.url)
    backend = SERVERS["postgres" if place.get_backend_name() == "postgresql" else "mysql"]
    private = backend.create(place, f"fbb_{secrets.token_hex(6)}")
    try:
        yield Database(server, str_of(private.set(drivername=f"{private.get_backend_name()}+{driver}")))
    finally:
        server.thaw()
        if not server.alive:
            server.start()
        backend.drop(place, private)


@dataclass(frozen=True)
class Ending:
    """How a call ended, and after how many seconds."""

    seconds: float
    answer: Any = None
    error: Exception | None = None

    @property
    def is_honest(self) -> bool:
        return isinstance(self.error, HONEST)

    def __str__(self) -> str:
        what = f"answered {self.answer!r}" if self.error is None else f"{type(self.error).__name__}: {self.error}"
        return f"{what} after {self.seconds:.2f} s"


async def ending_of(call: Awaitable[Any]) -> Ending:
    """Await the call and say how it ended."""
    begun = time.monotonic()
    try:
        answer = await call
    except Exception as error:  # noqa: BLE001 - how it ended is what is asked
        return Ending(time.monotonic() - begun, error=error)
    return Ending(time.monotonic() - begun, answer)


@dataclass
class Lag:
    """How late the event loop has been at most, and how long its thread waited for a processor in all; seconds."""

    longest: float = 0.0
    starved: float = 0.0

    @property
    def held_up(self) -> float:
        """What a call may be late for no fault of its own. Whether the loop often is late is asked apart."""
        return self.starved + self.longest


@asynccontextmanager
async def loop_lag() -> AsyncIterator[Lag]:
    """Tick every 5 ms, and yield how late the latest tick was.

    What the thread waited for a processor is taken off: that is the machine's business, not the loop's.
    """
    lag = Lag()
    loop = asyncio.get_running_loop()
    waited = _waited_for_a_processor()
    before = waited()
    due = loop.time() + 0.005
    timer: asyncio.TimerHandle

    def tick() -> None:
        nonlocal before, due, timer
        now, after = loop.time(), waited()
        lag.longest = max(lag.longest, now - due - (after - before))
        lag.starved += after - before
        before = after
        due = loop.time() + 0.005
        timer = loop.call_at(due, tick)

    timer = loop.call_at(due, tick)
    try:
        yield lag
    finally:
        timer.cancel()


def _waited_for_a_processor() -> Callable[[], float]:
    """Return what says how long this thread has been ready to run without a processor, in seconds."""
    statistics = Path("/proc/thread-self/schedstat").resolve()
    if not statistics.exists():
        return lambda: 0.0
    return lambda: int(_read(statistics).split()[1]) / 1e9


def _read(path: Path) -> bytes:
    file = os.open(path, os.O_RDONLY)
    try:
        return os.read(file, 100)
    finally:
        os.close(file)
