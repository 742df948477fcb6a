from collections.abc import AsyncIterator
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


async def test_t1_a_constraint_that_fails_at_commit_is_a_problem_and_keeps_no_row(session: SQLAlchemySession) -> None:
    async with serving(application(session)) as url, httpx2.AsyncClient(base_url=url) as client:
        response = await client.post("/orders/1?item=404")
        assert response.status_code == 409
        assert response.headers["content-type"] == "application/problem+json"
        assert response.json()["code"] == "foreign_key"
        assert (await client.get("/orders/1")).status_code == 404
        assert (await session.execute(sa.select(sa.func.count()).select_from(orders))).scalar() == 0


@pytest.mark.slow
async def test_t1_what_was_answered_201_is_there_for_the_next_request_2000_times(session: SQLAlchemySession) -> None:
    misses = 0
    async with serving(application(session)) as url, httpx2.AsyncClient(base_url=url) as client:
        for number in range(2000):
            assert (await client.post(f"/orders/{number}")).status_code == 201
            misses += (await client.get(f"/orders/{number}")).status_code != 204
    assert misses == 0
