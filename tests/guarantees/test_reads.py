"""R3 of the guarantees: what a keyset page costs at depth, by the database's own plan and count of rows read."""

import dataclasses
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
import sqlalchemy as sa

from fastapi_building_blocks.domain import CursorRequest, Sort
from fastapi_building_blocks.infrastructure import SQLAlchemyRepository, SQLAlchemySession
from tests.backends import Backends, run_apart

ROWS = 100_000
LIMIT = 20
metadata = sa.MetaData()
events = sa.Table(
    "events",
    metadata,
    sa.Column("id", sa.Integer(), primary_key=True, autoincrement=False),
    sa.Column("minute", sa.Integer(), nullable=False),
    sa.Column("grade", sa.Integer()),
    sa.Index("ix_events_minute", "minute", "id"),
    sa.Index("ix_events_grade", "grade", "id"),
)


@dataclasses.dataclass
class Event:
    id: int
    minute: int
    grade: int | None


class Events(SQLAlchemyRepository[Event]):
    table = events


@pytest.fixture(scope="module", params=["sqlite", "postgres", "mysql"])
def filled(request: pytest.FixtureRequest, backends: Backends, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A database with 100,000 events, a tenth of them without a grade."""

    async def fill(url: str) -> None:
        async with SQLAlchemySession(url, statement_timeout=60) as session:
            await session.create_tables(metadata)
            await Events(session).add_many(
                Event(number, number * 7919 % 50_000, number % 1000 if number % 10 else None) for number in range(ROWS)
            )
            analyze = {"sqlite": "ANALYZE", "postgresql": "VACUUM ANALYZE events", "mysql": "ANALYZE TABLE events"}
            await session.execute(sa.text(analyze[session.dialect_name]))

    if request.param == "sqlite":
        url = f"sqlite+aiosqlite:///{tmp_path_factory.mktemp('events') / 'events.db'}"
        run_apart(fill(url))
        yield url
        return
    with backends.database(request.param) as url:
        run_apart(fill(url))
        yield url


@pytest.fixture
async def session(filled: str) -> AsyncIterator[SQLAlchemySession]:
    async with SQLAlchemySession(filled, pool_size=1, max_overflow=0) as session:
        yield session


async def at_depth(session: SQLAlchemySession, sort: Any) -> tuple[Any, Any]:
    """Return a cursor from the middle of the order, made by the page before it, and the sort."""
    repository = Events(session)
    order = sort if isinstance(sort, tuple) else (sort,)
    [pivot] = await repository.get_all(sort=order, limit=1, offset=ROWS // 2)
    before = await repository.get_all(sort=order, limit=LIMIT, offset=ROWS // 2 - LIMIT + 1)
    assert before[-1] == pivot
    page = await repository.paginate_by_cursor(CursorRequest(limit=ROWS // 2 + 1), sort=order)
    assert page.items[-1] == pivot
    return page.next_cursor, order


async def rows_read(session: SQLAlchemySession, monkeypatch: pytest.MonkeyPatch, cursor: str, order: Any) -> Any:
    """Fetch the page behind a cursor; return how many rows the database read for it, or SQLite's plan."""
    ran: list[tuple[str, Any]] = []
    real = session.dialect.fetch

    async def fetch(connection: Any, statement: Any, arguments: Any) -> Any:
        ran.append((statement.sql, arguments))
        return await real(connection, statement, arguments)

    async def handler_reads() -> int:
        status = await session.execute(sa.text("SHOW SESSION STATUS LIKE 'Handler_read%'"))
        return sum(int(count) for _, count in status)

    before = await handler_reads() if session.dialect_name == "mysql" else 0
    with monkeypatch.context() as patch:
        patch.setattr(session.dialect, "fetch", fetch)
        page = await Events(session).paginate_by_cursor(CursorRequest(LIMIT, cursor), sort=order)
    after = await handler_reads() if session.dialect_name == "mysql" else 0
    assert len(page.items) == LIMIT
    [(sql, arguments)] = ran
    connection = session._pool.take()
    assert connection is not None
    try:
        if session.dialect_name == "mysql":
            return after - before
        if session.dialect_name == "sqlite":
            plan = await connection.driver._execute(
                lambda: connection.driver._conn.execute(f"EXPLAIN QUERY PLAN {sql}", arguments).fetchall()
            )
            return "; ".join(row[3] for row in plan)
        explained = await connection.driver.fetchval(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {sql}", *arguments)
        plan = json.loads(explained) if isinstance(explained, str) else explained
        return _rows_of(plan[0]["Plan"])
    finally:
        session._pool.release(connection)


def _rows_of(node: dict[str, Any]) -> int:
    """Return the rows that the leaves of a PostgreSQL plan produced and those that a filter threw away."""
    if "Plans" in node:
        return sum(_rows_of(child) for child in node["Plans"]) + int(node.get("Rows Removed by Filter", 0))
    assert node["Node Type"] in ("Index Scan", "Index Only Scan"), node["Node Type"]
    return int(node["Actual Rows"]) + int(node.get("Rows Removed by Filter", 0))


SORTS: dict[str, Any] = {
    "the primary key": "id",
    "the primary key backwards": "-id",
    "an indexed column": "minute",
    "an indexed column and the key, both descending": ("-minute", "-id"),
}


@pytest.mark.parametrize("name", SORTS)
async def test_r3_a_deep_page_reads_an_index_range_of_about_its_own_size(
    session: SQLAlchemySession, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    cursor, order = await at_depth(session, SORTS[name])
    read = await rows_read(session, monkeypatch, cursor, order)
    if session.dialect_name == "sqlite":
        assert read.startswith("SEARCH events USING"), read
        assert "TEMP B-TREE" not in read
        assert ">" in read or "<" in read
    else:
        assert read <= LIMIT + 10, read


async def test_r3_mixed_directions_begin_at_the_bound_of_the_first_key(
    session: SQLAlchemySession, monkeypatch: pytest.MonkeyPatch
) -> None:
    cursor, order = await at_depth(session, ("-minute", "id"))
    read = await rows_read(session, monkeypatch, cursor, order)
    if session.dialect_name == "sqlite":
        assert read.startswith("SEARCH events USING INDEX ix_events_minute (minute<?)"), read
    elif session.dialect_name == "postgresql":
        assert read <= LIMIT + 10, read
    else:
        # MariaDB has no incremental sort: without an index in these very directions it sorts all that lies behind.
        assert read <= ROWS // 2 + 10, read


async def test_r3_a_descending_nullable_sort_begins_at_its_bound(
    session: SQLAlchemySession, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Behind it are no NULLs. Ascending, they come last, and no single range has the values and them: such a page
    # costs what lies before it, as its docstring says.
    cursor, order = await at_depth(session, ("-grade", "-id"))
    read = await rows_read(session, monkeypatch, cursor, order)
    if session.dialect_name == "sqlite":
        assert read.startswith("SEARCH events USING INDEX ix_events_grade (grade<?)"), read
        assert "TEMP B-TREE" not in read
    else:
        assert read <= LIMIT + 150, read


async def test_r3_a_nullable_sort_is_exact_at_any_depth(session: SQLAlchemySession) -> None:
    repository = Events(session)
    for order in (("grade",), ("-grade",), (Sort("grade", nulls="first"),), (Sort("grade", True, "last"),)):
        want = [found.id for found in await repository.get_all(sort=order, limit=300, offset=89_900)]
        cursor = (await repository.paginate_by_cursor(CursorRequest(limit=89_900), sort=order)).next_cursor
        got: list[int] = []
        while len(got) < 300:
            page = await repository.paginate_by_cursor(CursorRequest(100, cursor), sort=order)
            got += [found.id for found in page.items]
            cursor = page.next_cursor
        assert got == want
