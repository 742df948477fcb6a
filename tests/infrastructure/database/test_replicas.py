"""Which server a call goes to. Two files stand for a primary and its replica: what a read answers says where it was."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from fastapi_building_blocks.domain import PageRequest, StaleVersionError
from fastapi_building_blocks.infrastructure import (
    SQLAlchemyRepository,
    SQLAlchemySession,
    StatementEvent,
    UnitOfWork,
    deadline,
    eventual_reads,
    reads_from_primary,
)
from fastapi_building_blocks.infrastructure.database import replicas as module
from fastapi_building_blocks.infrastructure.database.consistency import ConsistencyScope, consistency_scope
from fastapi_building_blocks.infrastructure.database.replicas import _History, _Shared
from fastapi_building_blocks.infrastructure.database.statement_kinds import is_read
from tests.guarantees.ledger import Account, Accounts, account, accounts, opened
from tests.server_view import until

PRIMARY, REPLICA = 1, 2
WHERE = sa.select(accounts.c.balance).where(accounts.c.id == 1)
"""SQLite has no positions, so a context that has written reads from the primary for ``max_lag`` seconds."""


class Versioned(SQLAlchemyRepository[Account]):
    table = accounts
    version_column = "balance"


@pytest.fixture
def urls(tmp_path: Path) -> list[str]:
    return [f"sqlite+aiosqlite:///{tmp_path / name}" for name in ("primary.db", "replica.db")]


@pytest.fixture
async def session(urls: list[str]) -> AsyncIterator[SQLAlchemySession]:
    for url, balance in zip(urls, (PRIMARY, REPLICA), strict=True):
        async with opened(url) as one:
            await Accounts(one).add_many([account(number, balance) for number in (1, 3)])
    async with SQLAlchemySession(urls[0], replica_urls=urls[1:], max_lag=30) as session:
        yield session


@pytest.fixture
def fresh() -> Any:
    """A context that has written nothing."""
    return lambda: consistency_scope(ConsistencyScope())


async def where(session: SQLAlchemySession) -> int:
    """Return which server a read goes to now."""
    return (await Accounts(session).get(1)).balance


async def on_engine(session: SQLAlchemySession) -> int:
    async with session.engine.connect() as connection:
        return (await connection.execute(WHERE)).scalar_one()


READS: dict[str, Any] = {
    "get_by_id": where,
    "get_many": lambda session: balance_of(Accounts(session).get_many([1])),
    "get_all": lambda session: balance_of(Accounts(session).get_all(limit=1, sort="id")),
    "core criteria": lambda session: balance_of(Accounts(session).get_all(accounts.c.id == 1)),
    "page": lambda session: balance_of(page_of(session)),
    "stream": lambda session: balance_of(streamed(Accounts(session).stream())),
    "core stream": lambda session: balance_of(streamed(Accounts(session).stream(accounts.c.id == 1))),
    "execute": lambda session: scalar(session.execute(WHERE)),
    "union": lambda session: scalar(session.execute(sa.union_all(WHERE, WHERE))),
    "session.stream": lambda session: first_of(streamed(session.stream(WHERE))),
    "unit": lambda session: in_unit(session, read_only=True),
}
ON_PRIMARY: dict[str, Any] = {
    "text": lambda session: scalar(session.execute(sa.text("SELECT balance FROM accounts WHERE id = 1"))),
    "text as a query": lambda session: scalar(
        session.execute(sa.text("SELECT balance FROM accounts WHERE id = 1").columns(accounts.c.balance))
    ),
    "text stream": lambda session: first_of(streamed(session.stream(sa.text("SELECT balance FROM accounts")))),
    "for update": lambda session: scalar(session.execute(WHERE.with_for_update())),
    "locked below": lambda session: scalar(session.execute(sa.select(WHERE.with_for_update().subquery()))),
    "unit that may write": lambda session: in_unit(session, read_only=False),
    "engine": on_engine,
}


async def balance_of(found: Any) -> int:
    return (await found)[0].balance  # type: ignore[no-any-return]


async def page_of(session: SQLAlchemySession) -> Any:
    page = await Accounts(session).paginate(PageRequest(limit=1), sort="id")
    assert page.total == 2
    return page.items


async def streamed(rows: Any) -> list[Any]:
    return [row async for row in rows]


async def first_of(rows: Any) -> int:
    return (await rows)[0][0]  # type: ignore[no-any-return]


async def scalar(result: Any) -> int:
    return (await result).scalars().first()  # type: ignore[no-any-return]


async def in_unit(session: SQLAlchemySession, read_only: bool) -> int:
    async with session.transaction(read_only=read_only) as unit:
        return (await Accounts(unit).get(1)).balance


@pytest.mark.parametrize("name", READS)
async def test_reads_go_to_the_replica(session: SQLAlchemySession, name: str) -> None:
    assert await READS[name](session) == REPLICA


@pytest.mark.parametrize("name", ON_PRIMARY)
async def test_everything_else_goes_to_the_primary(session: SQLAlchemySession, name: str) -> None:
    assert await ON_PRIMARY[name](session) == PRIMARY


@pytest.mark.parametrize("name", READS)
async def test_reads_go_to_the_primary_where_that_is_asked_for(session: SQLAlchemySession, name: str) -> None:
    with reads_from_primary():
        assert await READS[name](session) == PRIMARY


async def test_a_query_with_a_write_in_it_is_one() -> None:
    changed = sa.update(accounts).values(balance=3).returning(accounts.c.id).cte("changed")
    assert not is_read(sa.select(changed.c.id))
    assert not is_read(sa.insert(accounts))
    assert not is_read(sa.text("SELECT 1"))
    assert is_read(sa.select(accounts).where(sa.text("id = 1")))
    for name in ("pg_advisory_xact_lock", "pg_try_advisory_lock", "GET_LOCK", "nextval", "last_insert_id"):
        assert not is_read(sa.select(getattr(sa.func, name)(1))), name
    assert not is_read(sa.select(sa.Sequence("numbers").next_value()))
    assert is_read(sa.select(sa.func.locked(1), sa.func.lastvalue(1), sa.func.lower("A")))


# A session without replicas


async def test_a_session_without_replicas_has_none_of_it(urls: list[str]) -> None:
    async with opened(urls[0]) as session:
        assert not {"perform", "iterate", "open_transaction"} & vars(session).keys()
        assert session.replica_status() == []


def test_a_replica_of_another_kind_is_refused_without_its_password() -> None:
    for url in ("sqlite+aiosqlite:///r.db", "mysql+aiomysql://me:s3cret@r/d", "nonsense"):
        with pytest.raises(ValueError, match=r"replica|URL") as caught:
            SQLAlchemySession("postgresql+asyncpg://me:s3cret@p/d", replica_urls=[url])
        assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize("knobs", [{"max_lag": 0}, {"max_lag": -1}, {"consistency_wait": -0.1}])
def test_numbers_that_make_no_sense_are_refused(knobs: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="seconds"):
        SQLAlchemySession("sqlite+aiosqlite://", **knobs)


# Own writes


async def written_unit(session: SQLAlchemySession) -> None:
    async with UnitOfWork(session) as unit, unit.savepoint():
        await Accounts(unit).update(account(3, 9))


async def written_on_engine(session: SQLAlchemySession) -> None:
    async with session.engine.begin() as connection:
        await connection.execute(sa.update(accounts).values(owner="me"))


WRITES: dict[str, Any] = {
    "add": lambda session: Accounts(session).add(account(2)),
    "update": lambda session: Accounts(session).update(account(3, 9)),
    "upsert": lambda session: Accounts(session).upsert(account(3, 9)),
    "delete": lambda session: Accounts(session).delete(3),
    "add_many": lambda session: Accounts(session).add_many([account(5), account(6)]),
    "refused": lambda session: Accounts(session).add(account(3)),
    "execute": lambda session: session.execute(sa.update(accounts).values(owner="me")),
    "text": lambda session: session.execute(sa.text("UPDATE accounts SET owner = 'me'")),
    "unit": written_unit,
    "run": lambda session: session.run(lambda unit: Accounts(unit).update(account(3, 9))),
    "create_tables": lambda session: session.create_tables(sa.MetaData()),
    "engine": written_on_engine,
    "child task": lambda session: asyncio.create_task(written_unit(session)),
}


@pytest.mark.parametrize("name", WRITES)
@pytest.mark.parametrize("scoped", [True, False], ids=["scope", "session"])
async def test_c1_who_has_written_reads_from_the_primary(
    session: SQLAlchemySession, name: str, scoped: bool, fresh: Any
) -> None:
    scope = ConsistencyScope()
    with consistency_scope(scope):
        assert await where(session) == REPLICA
    with consistency_scope(scope) if scoped else nullcontext():
        await asyncio.gather(WRITES[name](session), return_exceptions=True)
        seen = [await where(session), await asyncio.create_task(where(session)), await in_unit(session, True)]
        assert seen == [PRIMARY] * 3
        with eventual_reads():
            assert await where(session) == REPLICA, "unless it does not want to"
    with fresh():
        assert await where(session) == REPLICA, "others need not see it"


async def test_c1_where_no_position_is_told_replicas_are_safe_after_max_lag(
    session: SQLAlchemySession, monkeypatch: pytest.MonkeyPatch
) -> None:
    await Accounts(session).update(account(3, 9))
    written = time.monotonic()
    monkeypatch.setattr(module.time, "monotonic", lambda: written + 29.9)
    assert await where(session) == PRIMARY
    monkeypatch.setattr(module.time, "monotonic", lambda: written + 30.1)
    assert await where(session) == REPLICA
    monkeypatch.undo()
    assert await where(session) == REPLICA, "it asks nothing any more"


async def test_c1_what_is_rolled_back_was_not_written(session: SQLAlchemySession) -> None:
    with pytest.raises(ZeroDivisionError):
        async with session.transaction() as unit:
            await Accounts(unit).update(account(3, 9))
            raise ZeroDivisionError
    async with session.transaction() as unit:
        await Accounts(unit).update(account(3, 9))
        await unit.rollback()
    async with session.transaction():
        pass
    assert await where(session) == REPLICA


async def test_a_context_that_was_told_what_nobody_can_verify_reads_from_the_primary(
    session: SQLAlchemySession,
) -> None:
    with consistency_scope(ConsistencyScope(distrusted=True)):
        assert await where(session) == PRIMARY


async def test_a_read_that_belongs_to_a_write_goes_where_the_write_went(session: SQLAlchemySession) -> None:
    await Accounts(session).add(account(7, PRIMARY))
    with consistency_scope(ConsistencyScope()), eventual_reads():
        found, added = await Accounts(session).get_or_add(account(7, 5))
        assert (found.balance, added) == (PRIMARY, False)
        with pytest.raises(StaleVersionError):  # and not NotFoundError, as the replica would have it
            await Versioned(session).update(account(7, 100))


# What a replica cannot answer


async def test_c2_what_fails_on_a_replica_is_done_on_the_primary(session: SQLAlchemySession, urls: list[str]) -> None:
    async with SQLAlchemySession(urls[1]) as replica:
        await replica.execute(sa.text("DROP TABLE accounts"))
    with consistency_scope(ConsistencyScope()):
        for name, read in READS.items():
            if name != "unit":  # which has begun there
                assert await read(session) == PRIMARY, name
    assert session.replica_status()[0].reads >= len(READS) - 1


async def test_c2_a_replica_that_is_down_is_left_and_comes_back_though_nobody_could_be_told(
    session: SQLAlchemySession, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(record: logging.LogRecord) -> bool:
        raise LookupError("whose request?")

    async def fail() -> None:
        raise ConnectionError("down")

    [replica] = session._replicas._replicas
    monkeypatch.setattr(asyncio.get_running_loop(), "call_exception_handler", lambda context: None)
    module.logger.addFilter(refuse)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(replica, "asked", _Shared(fail))
            await until(lambda: not session.replica_status()[0].in_rotation)
        await until(lambda: session.replica_status()[0].in_rotation)
    finally:
        module.logger.removeFilter(refuse)


async def test_c2_a_replica_that_is_full_is_passed_over(urls: list[str]) -> None:
    async with opened(urls[1]) as one:
        await Accounts(one).add(account(1, REPLICA))
    async with opened(
        urls[0], replica_urls=urls[1:], pool_size=1, max_overflow=0, pool_timeout=0.1, max_lag=0.2
    ) as session:
        await Accounts(session).add(account(1, PRIMARY))
        with consistency_scope(ConsistencyScope()):
            async with session.transaction(read_only=True) as unit:
                assert (await Accounts(unit).get(1)).balance == REPLICA
                assert session.replica_status()[0].outstanding == 1
                assert await where(session) == PRIMARY
                assert await in_unit(session, read_only=True) == PRIMARY


async def test_no_time_is_spent_that_is_not_there(session: SQLAlchemySession) -> None:
    with consistency_scope(ConsistencyScope()), deadline(0.05):
        await asyncio.sleep(0.06)
        with pytest.raises(Exception, match="time"):
            await where(session)


async def test_least_outstanding_work_decides_and_equal_ones_take_turns(urls: list[str], tmp_path: Path) -> None:
    third = f"sqlite+aiosqlite:///{tmp_path / 'third.db'}"
    for url in (urls[1], third):
        async with opened(url) as one:
            await Accounts(one).add(account(1, REPLICA))
    async with opened(urls[0], replica_urls=[urls[1], third], max_lag=0.1) as session:
        with consistency_scope(ConsistencyScope()):
            for _ in range(10):
                await where(session)
            assert [one.reads for one in session.replica_status()] == [5, 5]
            async with session.transaction(read_only=True) as unit:
                await Accounts(unit).get(1)
                busy = next(place for place, one in enumerate(session.replica_status()) if one.outstanding)
                for _ in range(6):
                    await where(session)
                reads = [one.reads for one in session.replica_status()]
                assert (reads[busy], reads[1 - busy]) == (6, 11)


# Figures, and life


async def test_status_and_events_say_where_statements_went(session: SQLAlchemySession) -> None:
    seen: list[StatementEvent] = []
    session.observe(seen.append)
    with consistency_scope(ConsistencyScope()):
        await where(session)
        await session.execute(WHERE)
        await in_unit(session, read_only=True)
        await Accounts(session).update(account(3, 9))
    (status,) = session.replica_status()
    assert (status.in_rotation, status.reason, status.reads, status.outstanding) == (True, "", 3, 0)
    assert status.name.endswith("replica.db")
    assert [(event.name, event.server == status.name) for event in seen if "PRAGMA" not in event.sql] == [
        ("accounts by key", True),
        ("core", True),
        ("BEGIN", True),
        ("accounts by key", True),
        ("COMMIT", True),
        ("accounts update", False),
    ]
    assert seen[-1].server == "primary"
    assert session.pool_status().checked_out == 0


async def test_a_session_is_used_again_after_it_was_disconnected(session: SQLAlchemySession) -> None:
    await session.disconnect()
    with pytest.raises(RuntimeError, match="not connected"):
        await where(session)
    with pytest.raises(RuntimeError, match="not connected"):
        await in_unit(session, read_only=True)
    assert not session.replica_status()[0].in_rotation
    await session.start()
    assert await where(session) == REPLICA
    await session.ping()
    tasks = {task.get_name() for task in asyncio.all_tasks()}
    await session.disconnect()
    assert len({task.get_name() for task in asyncio.all_tasks()}) < len(tasks), "nobody looks any more"


async def test_two_that_connect_at_once_watch_the_replicas_once(urls: list[str]) -> None:
    session = SQLAlchemySession(urls[0], replica_urls=urls[1:])
    await asyncio.gather(session.connect(), session.connect())
    await asyncio.sleep(0)
    watching = [task for task in asyncio.all_tasks() if task.get_coro().__qualname__ == "ReplicaSet._watch"]  # type: ignore[union-attr]
    assert len(watching) == 1
    await session.disconnect()
    assert all(task.done() for task in watching)


async def test_a_connect_that_is_cancelled_leaves_nothing_open(
    urls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    session = SQLAlchemySession(urls[0], replica_urls=urls[1:])
    replicas = session._replicas
    assert replicas is not None
    looking = asyncio.Event()

    async def look(replica: Any) -> bool:
        looking.set()
        await asyncio.sleep(60)
        return True

    monkeypatch.setattr(replicas, "_look_at", look)
    connecting = asyncio.create_task(session.connect())
    await looking.wait()
    connecting.cancel()
    await asyncio.wait({connecting})
    assert connecting.cancelled()
    assert not session.is_connected
    with pytest.raises(RuntimeError, match="not connected"):
        await where(session)
    assert [one.pool.checkedin() + one.pool.checkedout() for one in (session, *replicas._sessions())] == [0, 0, 0, 0]
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_preparing_a_session_reads_from_the_primary(urls: list[str]) -> None:
    async with opened(urls[1]) as one:
        await Accounts(one).add(account(1, REPLICA))
    session = SQLAlchemySession(urls[0], replica_urls=urls[1:], max_lag=0.1)

    async def prepare() -> None:
        await session.create_tables(accounts.metadata)
        await Accounts(session).add(account(1, PRIMARY))
        with eventual_reads():
            assert await where(session) == PRIMARY

    await session.start(prepare)
    await asyncio.sleep(0.15)
    assert await where(session) == REPLICA
    await session.disconnect()


# How far replicas are


def test_lag_is_since_when_the_primary_has_been_further(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    history = _History()
    assert not history
    assert history.lag_of({0: 5}) is None
    for at, place in ((900.0, 10), (950.0, 20), (990.0, 30)):
        history.add(at, {0: place})
    assert history.lag_of({0: 30}) == 0.0
    assert history.lag_of({0: 35}) == 0.0
    assert history.lag_of({0: 29}) == 10.0
    assert history.lag_of({0: 10}) == 50.0
    assert history.lag_of({0: 9}) is None
    assert history.lag_of(None) is None


def test_an_idle_primary_makes_nobody_old(monkeypatch: pytest.MonkeyPatch) -> None:
    history = _History()
    for at in range(0, 1000, 10):
        history.add(float(at), {0: 10})
    monkeypatch.setattr(module.time, "monotonic", lambda: 1000.0)
    assert history.lag_of({0: 10}) == 0.0
    history.add(999.0, {0: 11})
    assert history.lag_of({0: 10}) == 1.0


def test_another_primary_begins_another_history() -> None:
    history = _History()
    history.add(1.0, {0: 100})
    history.add(2.0, {0: 50})
    assert history.lag_of({0: 50}) == 0.0


async def test_one_question_answers_all_who_ask_before_it_is_sent_and_nobody_who_asks_after() -> None:
    asked = 0
    gate = asyncio.Event()

    async def ask() -> int:
        nonlocal asked
        asked += 1
        mine = asked
        await gate.wait()
        return mine

    shared = _Shared(ask)
    first = [shared.soon() for _ in range(3)]
    await asyncio.sleep(0)
    later = [shared.soon() for _ in range(3)]
    gate.set()
    assert [await one for one in first] == [1, 1, 1]
    assert [await one for one in later] == [2, 2, 2]
