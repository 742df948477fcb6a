"""P6: a connection that is held for too long is found by the place where it was taken."""

import asyncio
import inspect
import logging
from collections.abc import Callable
from contextvars import ContextVar
from pathlib import Path

import pytest

from fastapi_building_blocks.infrastructure import SQLAlchemySession, UnitOfWork
from tests.guarantees.ledger import Accounts, account, opened
from tests.server_view import until

THRESHOLD = 0.1
LOGGER = "fastapi_building_blocks.infrastructure.database.connections"


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        record.getMessage() for record in caplog.records if record.name == LOGGER and record.levelno == logging.WARNING
    ]


def line_of(text: str) -> str:
    """Return where this file says ``text``, as a message would."""
    source = Path(__file__).read_text().splitlines()
    (number,) = [number for number, line in enumerate(source, 1) if line.endswith(f"# {text}")]
    return f"{Path(__file__).name}:{number}"


async def held_unit(session: SQLAlchemySession, done: asyncio.Event) -> None:
    async with session.transaction() as unit:
        await Accounts(unit).exists()  # a unit is taken here
        await done.wait()


async def held_unit_of_work(session: SQLAlchemySession, done: asyncio.Event) -> None:
    async with UnitOfWork(session) as unit:
        await Accounts(unit).get_all()  # a unit of work is taken here
        await done.wait()


async def held_stream(session: SQLAlchemySession, done: asyncio.Event) -> None:
    async for _ in Accounts(session).stream(batch_size=1):  # a stream is taken here
        await done.wait()


async def held_replayable(session: SQLAlchemySession, done: asyncio.Event) -> None:
    async def work(unit: UnitOfWork) -> None:
        await Accounts(unit).exists()  # a run is taken here
        await done.wait()

    await session.run(work)


HOLDERS = {
    "a unit is taken here": held_unit,
    "a unit of work is taken here": held_unit_of_work,
    "a stream is taken here": held_stream,
    "a run is taken here": held_replayable,
}


@pytest.mark.parametrize("place", HOLDERS)
async def test_p6_a_held_connection_is_logged_once_with_where_it_was_taken(
    database_url: str, place: str, caplog: pytest.LogCaptureFixture, shown: Callable[..., None]
) -> None:
    done = asyncio.Event()
    async with opened(database_url, leak_threshold=THRESHOLD) as session:
        await Accounts(session).add_many([account(number) for number in range(10)])
        caplog.clear()  # on a busy machine even the preparations take their time
        holder = asyncio.create_task(HOLDERS[place](session, done))
        await until(lambda: warnings_in(caplog))
        begun = asyncio.get_running_loop().time()
        await until(lambda: asyncio.get_running_loop().time() > begun + 3 * THRESHOLD)
        done.set()
        await holder
        (message,) = warnings_in(caplog)
        assert line_of(place) in message
    shown("P6", f"connection held, {session.dialect_name}: {place.removesuffix(' is taken here')}", tries=1, found=1)


async def test_p6_nothing_is_logged_of_what_ends_in_time(
    database_url: str, caplog: pytest.LogCaptureFixture, effort: Callable[[int, int], int], shown: Callable[..., None]
) -> None:
    times = effort(20, 200)
    async with opened(database_url, leak_threshold=5.0) as session:
        await Accounts(session).add_many([account(number) for number in range(10)])

        async def short(number: int) -> None:
            done = asyncio.Event()
            done.set()
            await list(HOLDERS.values())[number % len(HOLDERS)](session, done)
            await Accounts(session).get(number % 10)

        await asyncio.gather(*[short(number) for number in range(times)])
    assert warnings_in(caplog) == []
    shown("P6", f"connections held shortly, {session.dialect_name}", tries=times, found=0)


async def test_p6_nothing_is_watched_where_it_is_turned_off(
    database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    done = asyncio.Event()
    async with opened(database_url, leak_threshold=None) as session:
        holder = asyncio.create_task(held_unit(session, done))
        await until(lambda: session.pool_status().checked_out == 1)
        begun = asyncio.get_running_loop().time()
        await until(lambda: asyncio.get_running_loop().time() > begun + 2 * THRESHOLD)
        done.set()
        await holder
    assert warnings_in(caplog) == []


def test_a_threshold_is_a_number_of_seconds() -> None:
    assert "leak_threshold" in inspect.signature(SQLAlchemySession).parameters
    with pytest.raises(ValueError, match="greater than 0"):
        SQLAlchemySession("sqlite+aiosqlite://", leak_threshold=0)


async def test_p6_what_is_logged_is_nobody_elses(database_url: str, caplog: pytest.LogCaptureFixture) -> None:
    request = ContextVar("request", default="")

    class NoteRequest(logging.Filter):
        def filter(self, record: logging.LogRecord) -> bool:
            record.of_request = request.get()
            return True

    async def quick() -> None:
        request.set("another")
        await Accounts(session).exists()

    done = asyncio.Event()
    async with opened(database_url, leak_threshold=THRESHOLD) as session:
        await until(lambda: session._pool._watch is None)
        caplog.handler.addFilter(note := NoteRequest())
        await asyncio.create_task(quick())
        holder = asyncio.create_task(held_unit(session, done))
        await until(lambda: warnings_in(caplog))
        done.set()
        await holder
        caplog.handler.removeFilter(note)
    assert [vars(record)["of_request"] for record in caplog.records if record.name == LOGGER] == [""]


async def test_p6_what_was_given_back_is_not_held(database_url: str, caplog: pytest.LogCaptureFixture) -> None:
    async with opened(database_url, pool_size=1, max_overflow=0, leak_threshold=5 * THRESHOLD) as session:
        caplog.clear()
        async with session.transaction() as unit:
            await Accounts(unit).exists()
        begun = asyncio.get_running_loop().time()
        while asyncio.get_running_loop().time() < begun + 10 * THRESHOLD:  # single calls: nobody holds it for long
            await Accounts(session).exists()
        assert warnings_in(caplog) == []
