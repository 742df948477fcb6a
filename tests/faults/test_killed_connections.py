"""P3 and T6: connections are killed, reset and cut, idle, in a transaction, and after COMMIT was sent."""

import asyncio
import dataclasses
import random
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Annotated, Any

import httpx2
import pytest
import sqlalchemy as sa
from fastapi import Depends, FastAPI

from fastapi_building_blocks.api import install_problem_details, unit_of_work
from fastapi_building_blocks.domain import CommitOutcomeUnknownError, ConnectionLostError, PageRequest, field
from fastapi_building_blocks.infrastructure import SQLAlchemyRepository, SQLAlchemySession, UnitOfWork
from fastapi_building_blocks.testing import FaultProxy, assert_connections_sound
from tests.api.serving import serving
from tests.faults.breaking import Database, ending_of
from tests.faults.databases import commits_at_once, proxied
from tests.guarantees.ledger import Accounts, account, opened
from tests.server_view import kill_connections

POOL = 5
ACCOUNTS = 2000


@asynccontextmanager
async def warm(url: str) -> AsyncIterator[SQLAlchemySession]:
    """Yield a session with accounts, and with all connections of its pool open and idle."""
    async with opened(url, pool_size=POOL, max_overflow=0) as session:
        await Accounts(session).add_many([account(number, number) for number in range(ACCOUNTS)])
        await warm_up(session)
        yield session


async def warm_up(session: SQLAlchemySession) -> None:
    barrier = asyncio.Barrier(POOL)

    async def hold() -> None:
        async with session.transaction() as unit:
            await Accounts(unit).exists()
            await barrier.wait()

    await asyncio.gather(*[hold() for _ in range(POOL)])
    assert session.pool_status().idle == POOL


async def streamed(session: SQLAlchemySession, *criteria: Any) -> list[int]:
    return [one.id async for one in Accounts(session).stream(*criteria, sort="id")]


SELECT = sa.select(Accounts.table.c.balance).where(Accounts.table.c.id == 7)


async def selected(session: SQLAlchemySession) -> list[int]:
    return list((await session.execute(SELECT)).scalars())


async def streamed_rows(session: SQLAlchemySession) -> list[int]:
    return [row.balance async for row in session.stream(SELECT)]


READS: dict[str, tuple[Callable[[SQLAlchemySession], Awaitable[Any]], Any]] = {
    "get": (lambda session: Accounts(session).get(3), account(3, 3)),
    "get_many": (lambda session: Accounts(session).get_many([3, 4]), [account(3, 3), account(4, 4)]),
    "find_one": (lambda session: Accounts(session).find_one(Accounts.table.c.number == "A5"), account(5, 5)),
    "count": (lambda session: Accounts(session).count(), ACCOUNTS),
    "exists": (lambda session: Accounts(session).exists(Accounts.table.c.id == 6), True),
    "page": (
        lambda session: _items(Accounts(session).paginate(PageRequest(limit=2), sort="id")),
        [account(0), account(1, 1)],
    ),
    "stream": (lambda session: streamed(session, field("id") < 10), list(range(10))),
    "stream of an expression": (lambda session: streamed(session, Accounts.table.c.id < 10), list(range(10))),
    "ping": (lambda session: session.ping(), None),
    "select": (selected, [7]),
    "stream of a select": (streamed_rows, [7]),
}


READS["estimated page"] = (
    lambda session: _items(Accounts(session).paginate(PageRequest(limit=2, count="estimated"), sort="id")),
    READS["page"][1],
)


async def _items(page: Awaitable[Any]) -> list[Any]:
    return list((await page).items)


@pytest.mark.parametrize("how", ["killed by the server", "reset"])
async def test_p3_a_single_read_does_not_notice_that_idle_connections_died(
    database: Database, how: str, effort: Callable[[int, int], int], shown: Callable[..., None]
) -> None:
    server, killed, answers = database.server, 0, 0
    async with (
        FaultProxy(server.host, server.port) as proxy,
        warm(proxy.url(database.url) if how == "reset" else database.url) as session,
    ):
        for turn in range(effort(3, 40)):
            for known in (False, True):
                await warm_up(session)
                if how == "reset":
                    killed += proxy.connections
                    proxy.reset(new=False)
                else:
                    killed += kill_connections(database.url)
                if known:
                    await asyncio.sleep(0.01)  # the loop has seen the farewells; without this, only the reads meet them
                # As many as there are connections, each kind in its turn.
                chosen = [list(READS)[(turn * POOL + number) % len(READS)] for number in range(POOL)]
                endings = await asyncio.gather(*[ending_of(READS[name][0](session)) for name in chosen])
                wrong = [
                    f"{name}: {ending}"
                    for name, ending in zip(chosen, endings, strict=True)
                    if ending.error is not None or ending.answer != READS[name][1]
                ]
                assert not wrong, f"after {killed} kills: " + "; ".join(wrong)
                answers += len(endings)
        assert killed >= effort(3, 40) * 2 * POOL
        await assert_connections_sound(session, within=5, server_url=database.url)
    shown(
        "P3",
        f"idle connections {how}, {sa.make_url(database.url).drivername}, single reads",
        tries=f"{killed} connections, {answers} reads",
        errors=0,
        leaked=0,
    )


@pytest.mark.parametrize("how", ["killed by the server", "reset"])
async def test_p3_a_transaction_whose_connection_died_is_lost_as_a_whole(
    database: Database, how: str, effort: Callable[[int, int], int], shown: Callable[..., None]
) -> None:
    server, chance = database.server, random.Random()
    times, ends = effort(10, 100), Counter[str]()

    async def broken_unit(session: SQLAlchemySession, number: int) -> None:
        async with session.transaction() as unit:
            await Accounts(unit).add(account(number))
            await Accounts(unit).patch(3, {"owner": f"unit {number}"})
            if how == "reset":
                proxy.reset(new=False)
            else:
                kill_connections(database.url)
            if chance.random() < 0.5:
                await asyncio.sleep(0.01)
            if number % 2:
                await Accounts(unit).add(account(number + 1))

    async with (
        FaultProxy(server.host, server.port) as proxy,
        warm(proxy.url(database.url) if how == "reset" else database.url) as session,
    ):
        for number in range(10_000, 10_000 + 3 * times, 3):
            ending = await ending_of(broken_unit(session, number))
            # In a statement, the connection is lost. In COMMIT, nobody can tell whether the server had got that far.
            expected = ConnectionLostError if number % 2 else ConnectionLostError | CommitOutcomeUnknownError
            assert isinstance(ending.error, expected), ending
            ends[type(ending.error).__name__] += 1
            assert (await Accounts(session).get(3)).owner is None, "serving again, and nothing was kept"
        assert await Accounts(session).count(Accounts.table.c.id >= 10_000) == 0, "no half of a unit"
        await assert_connections_sound(session, within=5, server_url=database.url)
    shown(
        "P3",
        f"connections {how} in a transaction, {sa.make_url(database.url).drivername}",
        tries=times,
        half_written=0,
        leaked=0,
        **dict(sorted(ends.items())),
    )


async def test_p3_a_cut_connection_gives_no_wrong_answer(
    database: Database, effort: Callable[[int, int], int], shown: Callable[..., None]
) -> None:
    server, chance = database.server, random.Random()
    times, refused, unknown = effort(10, 300), 0, set[int]()
    kept: set[int] = set()

    async def everything(session: SQLAlchemySession) -> int:
        return sum([one.id async for one in Accounts(session).stream(Accounts.table.c.id < ACCOUNTS, batch_size=100)])

    async with FaultProxy(server.host, server.port) as proxy, warm(proxy.url(database.url)) as session:
        for number in range(10_000, 10_000 + times):
            # From the first byte of an answer to the middle of a stream, and new connections as well as old ones.
            proxy.cut_after(int(2 ** chance.uniform(0, 15)), chance.choice(["to_client", "both"]))
            calls = {
                "get": (Accounts(session).get(3), account(3, 3)),
                "list": (_ids(Accounts(session).get_all(sort="id", limit=500)), list(range(500))),
                "stream": (everything(session), sum(range(ACCOUNTS))),
                "add": (Accounts(session).add(account(number)), account(number)),
            }
            endings = await asyncio.gather(*[ending_of(call) for call, _ in calls.values()])
            proxy.heal()
            for (name, (_, expected)), ending in zip(calls.items(), endings, strict=True):
                assert ending.is_honest or (ending.error is None and ending.answer == expected), f"{name}: {ending}"
                refused += ending.error is not None
                if name == "add" and ending.error is None:
                    kept.add(number)
                elif isinstance(ending.error, CommitOutcomeUnknownError):
                    unknown.add(number)
            assert await Accounts(session).get(3) == account(3, 3), "serving again at once"
        there = {one.id for one in await Accounts(session).get_all(Accounts.table.c.id >= 10_000)}
        assert kept <= there, "acknowledged, and lost"
        assert there <= kept | unknown, "refused, and kept all the same: that is CommitOutcomeUnknownError"
        assert refused > times / 4
        assert proxy.was_cut > times / 4
        await assert_connections_sound(session, within=5, server_url=database.url)
    shown(
        "P3",
        f"connections cut in an answer, {sa.make_url(database.url).drivername}",
        tries=f"{4 * times} calls",
        refused=refused,
        wrong=0,
        lost=0,
        leaked=0,
    )


async def _ids(found: Awaitable[list[Any]]) -> list[int]:
    return [one.id for one in await found]


@pytest.mark.parametrize("database", ["asyncpg", "aiomysql"], indirect=True)
async def test_p3_over_http_a_lost_transaction_is_a_503_and_a_read_is_answered(database: Database) -> None:
    async with warm(database.url) as session:
        app = FastAPI()
        install_problem_details(app)

        @app.get("/accounts/{number}")
        async def read(number: int) -> int:
            return (await Accounts(session).get(number)).balance

        @app.put("/accounts/{number}")
        async def write(
            number: int, unit: Annotated[UnitOfWork, Depends(unit_of_work(session), scope="function")]
        ) -> None:
            await Accounts(unit).patch(number, {"owner": "x"})
            kill_connections(database.url)
            await Accounts(unit).patch(number, {"owner": "y"})

        async with serving(app) as url, httpx2.AsyncClient(base_url=url, timeout=10) as client:
            for _ in range(5):
                assert kill_connections(database.url) > 0
                assert (await client.get("/accounts/3")).json() == 3
                answer = await client.put("/accounts/3")
                assert (answer.status_code, answer.json()["code"]) == (503, "connection_lost")
                assert (await Accounts(session).get(3)).owner is None


# T6

entries_metadata = sa.MetaData()


@dataclasses.dataclass
class Entry:
    """What may be there twice: nothing but its generated key is unique."""

    token: str
    id: int | None = None


class Entries(SQLAlchemyRepository[Entry]):
    table = sa.Table(
        "entries",
        entries_metadata,
        sa.Column("id", sa.Integer(), primary_key=True),
        sa.Column("token", sa.String(40), nullable=False),
    )


COMMIT = {"postgresql": b"COMMIT", "mysql": b"\x03COMMIT"}  # not the one in SET AUTOCOMMIT


@asynccontextmanager
async def with_entries(database: Database) -> AsyncIterator[tuple[FaultProxy, SQLAlchemySession, SQLAlchemySession]]:
    """Yield a proxy, a session through it, and one that reaches the server directly."""
    async with (
        FaultProxy(database.server.host, database.server.port) as proxy,
        SQLAlchemySession(database.url) as direct,
        SQLAlchemySession(proxied(proxy, database.url)) as session,
    ):
        await direct.create_tables(entries_metadata)
        yield proxy, session, direct


async def test_t6_a_commit_without_an_answer_is_said_and_never_done_twice(
    database: Database, effort: Callable[[int, int], int], shown: Callable[..., None]
) -> None:
    times, duplicates, works = effort(10, 100), 0, 0

    async def work(unit: UnitOfWork) -> None:
        nonlocal works
        works += 1
        await Entries(unit).add(Entry(token))

    async with with_entries(database) as (proxy, session, direct):
        for number in range(times):
            token, kept = f"token-{number}", number % 2 == 0
            if kept:
                proxy.drop_answer_to(COMMIT[session.dialect_name])
            else:
                proxy.drop_message(COMMIT[session.dialect_name])
            with pytest.raises(CommitOutcomeUnknownError) as unknown:
                await session.run(work, attempts=5)
            assert unknown.value.retry_after is None
            rows = await Entries(direct).count(Entries.table.c.token == token)
            assert rows == (1 if kept and commits_at_once(session) else 0)
            duplicates += rows > 1
        assert works == times, "nothing was tried again"
        assert proxy.dropped_answers + proxy.dropped_messages == times
        await assert_connections_sound(session, within=5, server_url=database.url)
    shown(
        "T6",
        f"connection lost after COMMIT, {sa.make_url(database.url).drivername}",
        tries=times,
        said=times,
        retried=0,
        duplicates=duplicates,
    )


async def test_t6_nor_is_a_single_write(
    database: Database, effort: Callable[[int, int], int], shown: Callable[..., None]
) -> None:
    times = effort(10, 100)
    async with with_entries(database) as (proxy, session, direct):
        await Entries(session).add(Entry("prepared"))
        for number in range(times):
            token, kept = f"token-{number}", number % 2 == 0
            if kept:
                proxy.drop_answer_to(token.encode())
            else:
                proxy.drop_message(token.encode())
            with pytest.raises(CommitOutcomeUnknownError):
                await Entries(session).add(Entry(token))
            assert await Entries(direct).count(Entries.table.c.token == token) == (1 if kept else 0)
        assert proxy.dropped_answers + proxy.dropped_messages == times
        await assert_connections_sound(session, within=5, server_url=database.url)
    shown(
        "T6",
        f"connection lost after a single INSERT, {sa.make_url(database.url).drivername}",
        tries=times,
        said=times,
        retried=0,
        duplicates=0,
    )


@pytest.mark.parametrize("database", ["asyncpg", "aiomysql"], indirect=True)
async def test_t6_over_http_it_is_a_503_that_invites_no_retry(database: Database) -> None:
    async with with_entries(database) as (proxy, session, direct):
        app = FastAPI()
        install_problem_details(app)

        @app.post("/entries", status_code=201)
        async def create(unit: Annotated[UnitOfWork, Depends(unit_of_work(session), scope="function")]) -> None:
            await Entries(unit).add(Entry("posted"))

        async with serving(app) as url, httpx2.AsyncClient(base_url=url, timeout=10) as client:
            proxy.drop_answer_to(COMMIT[session.dialect_name])
            answer = await client.post("/entries")
            assert (answer.status_code, answer.json()["code"]) == (503, "commit_outcome_unknown")
            assert "retry-after" not in answer.headers
            assert await Entries(direct).count() == (1 if commits_at_once(session) else 0)
