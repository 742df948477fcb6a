"""R4: what a page's total costs is what was asked for, by the statements that are really sent."""

from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import sqlalchemy as sa

from fastapi_building_blocks.domain import PageRequest, field
from fastapi_building_blocks.infrastructure import SQLAlchemySession
from tests.guarantees.ledger import Accounts, account, accounts, opened

ROWS = 500


@pytest.fixture
async def session(database_url: str) -> AsyncIterator[SQLAlchemySession]:
    async with opened(database_url, pool_size=1, max_overflow=0) as session:
        await Accounts(session).add_many(account(number, balance=number % 10) for number in range(ROWS))
        yield session


@pytest.fixture
def sent(session: SQLAlchemySession, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The statements that the session is given, as SQL."""
    statements: list[str] = []
    perform = session.perform

    async def record(operation: Any, statement: Any, arguments: Any) -> Any:
        statements.append(getattr(statement, "sql", None) or str(getattr(statement, "core", statement)))
        return await perform(operation, statement, arguments)

    monkeypatch.setattr(session, "perform", record)
    yield statements
    assert not [sql for sql in statements if " OVER " in sql.upper()]


CRITERIA: dict[str, tuple[Any, int]] = {
    "all": ((), 500),
    "criterion": ((field("balance") < 5,), 250),
    "expression": ((accounts.c.balance < sa.literal(5),), 250),
}


@pytest.mark.parametrize("criteria", CRITERIA)
async def test_r4_an_exact_total_is_a_statement_of_its_own_and_spared_where_the_page_tells_it(
    session: SQLAlchemySession, sent: list[str], criteria: str
) -> None:
    asked, total = CRITERIA[criteria]
    page = await Accounts(session).paginate(PageRequest(limit=20), *asked)
    assert (page.total, page.has_next, page.total_is_capped) == (total, True, False)
    assert len(sent) == 2
    assert "count(" not in sent[0].lower()
    assert "count(*)" in sent[1].lower()
    assert "order by" not in sent[1].lower()
    sent.clear()
    last = await Accounts(session).paginate(PageRequest(limit=20, offset=total - 5), *asked)
    assert (len(last.items), last.total, last.has_next) == (5, total, False)
    assert len(sent) == 1, "the last page says how many there are"
    past = await Accounts(session).paginate(PageRequest(limit=20, offset=total + 5), *asked)
    assert (list(past.items), past.total) == ([], total)


@pytest.mark.parametrize("criteria", CRITERIA)
async def test_r4_a_capped_total_counts_no_further_than_its_cap(
    session: SQLAlchemySession, sent: list[str], criteria: str
) -> None:
    asked, total = CRITERIA[criteria]
    page = await Accounts(session).paginate(PageRequest(limit=20, count="capped", count_cap=100), *asked)
    assert (page.total, page.total_is_capped) == (100, True)
    assert len(sent) == 2
    assert "limit" in sent[1].lower()
    at_the_cap = await Accounts(session).paginate(PageRequest(limit=20, count="capped", count_cap=total), *asked)
    assert (at_the_cap.total, at_the_cap.total_is_capped) == (total, False)
    below = await Accounts(session).paginate(PageRequest(limit=20, count="capped", count_cap=total - 1), *asked)
    assert (below.total, below.total_is_capped) == (total - 1, True)


@pytest.mark.parametrize("criteria", CRITERIA)
async def test_r4_no_total_is_no_statement(session: SQLAlchemySession, sent: list[str], criteria: str) -> None:
    asked, _ = CRITERIA[criteria]
    page = await Accounts(session).paginate(PageRequest(limit=20, offset=20, count="none"), *asked)
    assert (page.total, page.has_next, page.has_prev, len(page.items)) == (None, True, True, 20)
    assert len(sent) == 1


async def test_r4_an_estimate_comes_from_statistics_and_is_never_below_what_was_seen(
    session: SQLAlchemySession, sent: list[str]
) -> None:
    analyze = {"postgresql": "ANALYZE accounts", "sqlite": "ANALYZE"}.get(
        session.dialect_name, "ANALYZE TABLE accounts"
    )
    estimated = PageRequest(limit=20, count="estimated")
    await session.execute(sa.text(analyze))
    sent.clear()
    page = await Accounts(session).paginate(estimated)
    assert page.total is not None
    if session.dialect_name == "sqlite":
        assert page.total == ROWS, "it keeps no count, so this is an exact one"
        assert "count(*)" in sent[-1].lower()
    else:
        assert ROWS / 2 < page.total < ROWS * 2
        assert not [sql for sql in sent if "count(" in sql.lower()]
    await Accounts(session).delete_where(field("id") >= 10)
    await session.execute(sa.text(analyze))
    await Accounts(session).add_many(account(number) for number in range(10, 300))
    later = await Accounts(session).paginate(PageRequest(limit=20, offset=200, count="estimated"))
    assert later.total is not None
    assert later.total >= 221
    assert later.has_next


async def test_r4_an_estimate_of_some_rows_is_an_exact_count_of_them(session: SQLAlchemySession) -> None:
    for criterion in (field("balance") < 5, accounts.c.balance < sa.literal(5)):
        page = await Accounts(session).paginate(PageRequest(limit=20, count="estimated"), criterion)
        assert page.total == 250


@pytest.mark.parametrize("database_url", ["postgres"], indirect=True)
async def test_r4_without_statistics_an_estimate_is_an_exact_count(session: SQLAlchemySession) -> None:
    await session.execute(sa.text("UPDATE pg_class SET reltuples = -1 WHERE oid = 'accounts'::regclass"))
    assert (await Accounts(session).paginate(PageRequest(limit=20, count="estimated"))).total == ROWS
