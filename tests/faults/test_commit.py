"""T2 and T6: a COMMIT that fails leaves nothing to the next borrower, and one without an answer is said to be unknown."""

import asyncio
import dataclasses
import random
from collections.abc import Callable
from typing import Annotated

import httpx2
import pytest
import sqlalchemy as sa
from fastapi import Depends, FastAPI

from fastapi_building_blocks.api import install_problem_details, unit_of_work
from fastapi_building_blocks.domain import CommitOutcomeUnknownError, ForeignKeyError
from fastapi_building_blocks.infrastructure import SQLAlchemyRepository, SQLAlchemySession, UnitOfWork
from fastapi_building_blocks.testing import FaultProxy, assert_connections_sound
from tests.api.serving import serving
from tests.faults.databases import (
    address_of,
    commit_of,
    commits_at_once,
    name_of,
    proxied,
    with_deferred_constraints,
)
from tests.guarantees.ledger import Accounts, account, opened

on_every_server = pytest.mark.parametrize("database_url", ["postgres", "mysql", "asyncmy"], indirect=True)
portable_too = pytest.mark.parametrize("portable", [False, True], ids=["driver", "portable"])

deferred = sa.MetaData()
parents = sa.Table("t2_parents", deferred, sa.Column("id", sa.Integer(), primary_key=True, autoincrement=False))
children = sa.Table(
    "t2_children",
    deferred,
    sa.Column("id", sa.Integer(), primary_key=True, autoincrement=False),
    sa.Column("parent_id", sa.ForeignKey("t2_parents.id", deferrable=True, initially="DEFERRED")),
)


@dataclasses.dataclass
class Child:
    id: int
    parent_id: int | None = None


class Children(SQLAlchemyRepository[Child]):
    table = children


# T2


@portable_too
@with_deferred_constraints
async def test_t2_whoever_borrows_the_connection_of_a_failed_commit_finds_nothing_on_it(
    database_url: str, portable: bool, effort: Callable[[int, int], int], shown: Callable[..., None]
) -> None:
    tries, seen, hooks = effort(10, 500), 0, 0

    def hook() -> None:
        nonlocal hooks
        hooks += 1

    async with SQLAlchemySession(
        database_url, pool_size=1, max_overflow=0, pool_timeout=60, portable=portable
    ) as session:
        await session.create_tables(deferred)

        async def fail(number: int) -> None:
            with pytest.raises(ForeignKeyError):
                async with session.transaction() as unit:
                    unit.on_commit(hook)
                    if number % 2:  # what a statement of Core may have left behind is looked for, what ours may not
                        await unit.execute(children.insert().values(id=number, parent_id=-1))
                    else:
                        await Children(unit).add(Child(number, parent_id=-1))

        async def borrow(number: int) -> None:
            nonlocal seen
            if number % 4 < 2:
                seen += len((await session.execute(sa.select(children))).all())
            else:
                async with session.transaction() as unit:
                    seen += len((await unit.execute(sa.select(children))).all())
                    await unit.execute(parents.insert().values(id=number))

        for first in range(0, tries, 10):
            numbers = range(first, min(first + 10, tries))
            await asyncio.gather(*[call(number) for number in numbers for call in (fail, borrow)])
        kept = len((await session.execute(sa.select(children))).all())
        borrowed = len((await session.execute(sa.select(parents))).all())
        await assert_connections_sound(session)
    path = ", portable" if portable else ""
    shown(
        "T2",
        f"a constraint that fails at COMMIT: {name_of(database_url)}{path}",
        tries=tries,
        rows_seen_by_the_next=seen,
        rows_kept=kept,
        hooks_run=hooks,
    )
    assert (seen, kept, hooks) == (0, 0, 0)
    assert borrowed == sum(number % 4 >= 2 for number in range(tries)), (
        "the next borrower commits what is its own, and that alone"
    )


@on_every_server
async def test_t2_a_connection_that_breaks_before_the_commit_arrives_leaves_nothing_to_the_next(
    database_url: str, effort: Callable[[int, int], int], shown: Callable[..., None]
) -> None:
    tries, seen = effort(5, 200), 0
    async with (
        FaultProxy(*address_of(database_url)) as proxy,
        opened(proxied(proxy, database_url), pool_size=1, max_overflow=0) as session,
    ):
        for number in range(tries):
            proxy.drop_message(commit_of(database_url))
            with pytest.raises(CommitOutcomeUnknownError):
                async with session.transaction() as unit:
                    await Accounts(unit).add(account(number))
            async with session.transaction() as unit:
                seen += await Accounts(unit).count()
        kept = await Accounts(session).count()
        await assert_connections_sound(session, server_url=database_url, within=5)
        assert proxy.dropped_messages == tries
    shown(
        "T2",
        f"connection reset before COMMIT arrives: {name_of(database_url)}",
        tries=tries,
        rows_seen_by_the_next=seen,
        rows_kept=kept,
    )
    assert (seen, kept) == (0, 0)


# T6


@on_every_server
async def test_t6_a_commit_without_an_answer_is_unknown_whole_or_absent_and_not_replayed(
    database_url: str, effort: Callable[[int, int], int], shown: Callable[..., None]
) -> None:
    """Eight tasks at once; of every second COMMIT the answer is lost, or the message on its way."""
    chance, tries = random.Random(6), effort(16, 400)
    acknowledged: set[int] = set()
    unknown: set[int] = set()
    hooked: set[int] = set()
    attempts = 0
    async with (
        FaultProxy(*address_of(database_url)) as proxy,
        opened(proxied(proxy, database_url), pool_size=4, max_overflow=4) as session,
    ):

        async def write(number: int) -> None:
            async def work(unit: UnitOfWork) -> None:
                nonlocal attempts
                attempts += 1
                unit.on_commit(lambda: hooked.add(number))
                await Accounts(unit).add_many([account(number * 2), account(number * 2 + 1)])
                if number % 2:
                    (proxy.drop_answer_to if chance.random() < 0.5 else proxy.drop_message)(commit_of(database_url))

            try:
                await session.run(work, attempts=5)
                acknowledged.add(number)
            except CommitOutcomeUnknownError:
                unknown.add(number)

        numbers = iter(range(tries))

        async def writer() -> None:
            for number in numbers:
                await write(number)

        await asyncio.gather(*[writer() for _ in range(8)])
        broken = proxy.dropped_answers + proxy.dropped_messages
        proxy.heal()
        await assert_connections_sound(session, server_url=database_url, within=5)
        stored = {one.id for one in await Accounts(session).get_all()}
    there = {number for number in range(tries) if number * 2 in stored}
    torn = {number for number in range(tries) if (number * 2 in stored) != (number * 2 + 1 in stored)}
    shown(
        "T6",
        f"COMMIT or its answer lost on the way: {name_of(database_url)}",
        tries=tries,
        said_unknown=len(unknown),
        of_those_kept=len(unknown & there),
        replays=attempts - tries,
        acknowledged_and_lost=len(acknowledged - there),
        torn=len(torn),
    )
    assert attempts == tries, "never replayed"
    assert acknowledged | unknown == set(range(tries))
    assert len(unknown) == broken > 0
    assert acknowledged <= there
    assert not torn
    assert hooked == acknowledged
    if commits_at_once(session):
        assert len(unknown & there) == proxy.dropped_answers


@on_every_server
async def test_t6_over_http_an_unknown_outcome_is_a_503_that_does_not_ask_to_try_again(
    database_url: str, effort: Callable[[int, int], int], shown: Callable[..., None]
) -> None:
    tries = effort(4, 100)
    async with (
        opened(database_url) as direct,
        FaultProxy(*address_of(database_url)) as proxy,
        SQLAlchemySession(proxied(proxy, database_url)) as session,
    ):
        app = FastAPI()
        install_problem_details(app)

        @app.post("/accounts/{number}", status_code=201)
        async def add(
            number: int, unit: Annotated[UnitOfWork, Depends(unit_of_work(session), scope="function")]
        ) -> None:
            await Accounts(unit).add(account(number))

        async with serving(app) as url, httpx2.AsyncClient(base_url=url) as client:
            for number in range(tries):
                (proxy.drop_answer_to if number % 2 else proxy.drop_message)(commit_of(database_url))
                response = await client.post(f"/accounts/{number}")
                assert (response.status_code, response.json()["code"]) == (503, "commit_outcome_unknown")
                assert "retry-after" not in response.headers
                is_kept = number % 2 == 1 and commits_at_once(session)
                assert (await Accounts(direct).get_by_id(number) is not None) is is_kept
                assert (await client.post(f"/accounts/{-1 - number}")).status_code == 201
    shown("T6", f"the same over HTTP: {name_of(database_url)}", tries=tries, answers_503=tries, with_retry_after=0)
