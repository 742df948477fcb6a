"""T1: what was answered is committed, and what did not commit is not answered as if it had."""

from collections.abc import AsyncIterator, Callable
from typing import Annotated

import httpx2
import pytest
import sqlalchemy as sa
from fastapi import Depends, FastAPI
from fastapi.responses import Response

from fastapi_building_blocks.api import database, install_problem_details, unit_of_work
from fastapi_building_blocks.domain import NotFoundError
from fastapi_building_blocks.infrastructure.database.session import DatabaseSession
from fastapi_building_blocks.infrastructure.database.sqlalchemy_session import SQLAlchemySession
from fastapi_building_blocks.infrastructure.persistence.unit_of_work import UnitOfWork
from tests.api.serving import serving
from tests.faults.databases import name_of

orders = sa.table("t1_orders", sa.column("id"), sa.column("item_id"))


def tables(*, deferrable: bool) -> sa.MetaData:
    metadata = sa.MetaData()
    reference = sa.ForeignKey(
        "t1_items.id", deferrable=deferrable or None, initially="DEFERRED" if deferrable else None
    )
    sa.Table("t1_items", metadata, sa.Column("id", sa.Integer, primary_key=True))
    sa.Table(
        "t1_orders",
        metadata,
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("item_id", sa.Integer, reference),
    )
    return metadata


@pytest.fixture
async def session(database_url: str) -> AsyncIterator[SQLAlchemySession]:
    async with SQLAlchemySession(database_url) as session:
        # MySQL has no deferred constraints: there the statement fails, and not COMMIT.
        await session.create_tables(tables(deferrable=not database_url.startswith(("mysql", "mariadb"))))
        yield session


def application(session: DatabaseSession) -> FastAPI:
    app = FastAPI()
    install_problem_details(app)

    @app.post("/orders/{number}", status_code=201)
    async def add(
        number: int,
        unit: Annotated[UnitOfWork, Depends(unit_of_work(session), scope="function")],
        item: int | None = None,
    ) -> None:
        await unit.execute(sa.insert(orders).values(id=number, item_id=item))

    @app.get("/orders/{number}")
    async def show(number: int, reads: Annotated[DatabaseSession, Depends(database(session))]) -> Response:
        found = await reads.execute(sa.select(orders.c.id).where(orders.c.id == number))
        if found.first() is None:
            raise NotFoundError("there is no such order")
        return Response(status_code=204)

    return app


async def test_t1_a_constraint_that_fails_at_commit_is_a_problem_and_keeps_no_row(
    session: SQLAlchemySession, database_url: str, effort: Callable[[int, int], int], shown: Callable[..., None]
) -> None:
    tries = effort(3, 200)
    async with serving(application(session)) as url, httpx2.AsyncClient(base_url=url) as client:
        for number in range(tries):
            response = await client.post(f"/orders/{number}?item=404")
            assert response.status_code == 409
            assert response.headers["content-type"] == "application/problem+json"
            assert response.json()["code"] == "foreign_key"
            assert (await client.get(f"/orders/{number}")).status_code == 404
    rows = (await session.execute(sa.select(sa.func.count()).select_from(orders))).scalar()
    shown("T1", f"a foreign key that fails at COMMIT: {name_of(database_url)}", tries=tries, rows_kept=rows)
    assert rows == 0


async def test_t1_what_was_answered_201_is_there_for_the_next_request(
    session: SQLAlchemySession, database_url: str, effort: Callable[[int, int], int], shown: Callable[..., None]
) -> None:
    pairs, misses = effort(40, 2000), 0
    async with serving(application(session)) as url, httpx2.AsyncClient(base_url=url) as client:
        for number in range(pairs):
            assert (await client.post(f"/orders/{number}")).status_code == 201
            misses += (await client.get(f"/orders/{number}")).status_code != 204
    shown("T1", f"POST, then GET on one connection: {name_of(database_url)}", pairs=pairs, misses=misses)
    assert misses == 0
