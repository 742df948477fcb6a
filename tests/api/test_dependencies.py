import asyncio
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Annotated, Any

import httpx2
import pytest
import sqlalchemy as sa
from fastapi import BackgroundTasks, Depends, FastAPI, HTTPException, Response
from fastapi.exceptions import DependencyScopeError
from starlette.responses import StreamingResponse
from starlette.testclient import TestClient

from fastapi_building_blocks.api import (
    database,
    database_lifespan,
    health_router,
    install_problem_details,
    unit_of_work,
)
from fastapi_building_blocks.domain import ForeignKeyError
from fastapi_building_blocks.infrastructure import SQLAlchemySession
from fastapi_building_blocks.infrastructure.database.in_memory_session import InMemorySession, InMemoryTransaction
from fastapi_building_blocks.infrastructure.database.session import DatabaseSession
from fastapi_building_blocks.infrastructure.persistence.repositories.base import BaseRepository
from fastapi_building_blocks.infrastructure.persistence.unit_of_work import UnitOfWork
from tests.api.serving import serving


@dataclass
class Order:
    id: int
    item: str = "tea"


class Orders(BaseRepository[Order]):
    pass


class DeferredConstraintTransaction(InMemoryTransaction):
    """Fails at COMMIT, as a deferred foreign key does."""

    async def commit(self) -> None:
        await self.rollback()
        raise ForeignKeyError("the item does not exist", fields=["item"])


class DeferredConstraintSession(InMemorySession):
    holds = False

    def open_transaction(self, isolation: str | None, read_only: bool) -> InMemoryTransaction:
        kind = InMemoryTransaction if self.holds else DeferredConstraintTransaction
        return kind(self, isolation, read_only)


def application(session: DatabaseSession, store: DatabaseSession | None = None) -> FastAPI:
    app = FastAPI(lifespan=database_lifespan(session))
    install_problem_details(app)
    Unit = Annotated[UnitOfWork, Depends(unit_of_work(session), scope="function")]  # noqa: N806
    Reads = Annotated[DatabaseSession, Depends(database(session))]  # noqa: N806

    @app.post("/orders/{number}", status_code=201)
    async def add(number: int, unit: Unit) -> Order:
        return await Orders(unit).add(Order(number))

    @app.post("/failing/{number}")
    async def add_and_fail(number: int, unit: Unit, how: str) -> None:
        await Orders(unit).add(Order(number))
        raise HTTPException(418) if how == "http" else ZeroDivisionError

    @app.get("/orders/{number}")
    async def show(number: int, reads: Reads) -> Order:
        return await Orders(reads).get(number)

    @app.post("/background/{number}")
    async def background(number: int, unit: Unit, tasks: BackgroundTasks, reads: Reads) -> bool:
        async def look() -> None:
            app.state.seen = await Orders(reads).exists()

        await Orders(unit).add(Order(number))
        tasks.add_task(look)
        return await Orders(reads).exists()

    @app.get("/stream")
    async def stream(unit: Unit, reads: Reads) -> StreamingResponse:
        await Orders(unit).add(Order(1))

        async def chunks() -> AsyncIterator[str]:
            yield str(await Orders(reads).count())

        return StreamingResponse(chunks())

    return app


def test_t1_a_commit_that_fails_is_a_problem_and_keeps_nothing() -> None:
    session = DeferredConstraintSession()
    with TestClient(application(session)) as client:
        response = client.post("/orders/1")
        assert response.status_code == 409
        assert response.headers["content-type"] == "application/problem+json"
        assert response.json()["code"] == "foreign_key"
        assert response.json()["errors"][0]["field"] == "item"
        session.holds = True
        assert client.get("/orders/1").status_code == 404


def test_t1_the_commit_comes_before_background_tasks_and_streams() -> None:
    app = application(InMemorySession())
    with TestClient(app) as client:
        assert client.post("/background/1").json() is False
        assert app.state.seen is True
    with TestClient(application(InMemorySession())) as client:
        assert client.get("/stream").text == "1"


async def test_t1_what_was_answered_201_is_there_for_the_next_request_every_time() -> None:
    session = InMemorySession()
    async with serving(application(session)) as url, httpx2.AsyncClient(base_url=url) as client:
        for number in range(200):
            assert (await client.post(f"/orders/{number}")).status_code == 201
            assert (await client.get(f"/orders/{number}")).status_code == 200


@pytest.mark.parametrize(("how", "status"), [("http", 418), ("bug", 500)])
def test_an_exception_of_the_endpoint_rolls_back(how: str, status: int) -> None:
    with TestClient(application(InMemorySession())) as client:
        assert client.post(f"/failing/1?how={how}").status_code == status
        assert client.get("/orders/1").status_code == 404


def test_an_answer_that_cannot_be_serialised_rolls_back() -> None:
    session = InMemorySession()
    app = application(session)

    @app.post("/unserialisable")
    async def add(unit: Annotated[UnitOfWork, Depends(unit_of_work(session), scope="function")]) -> int:
        await Orders(unit).add(Order(1))
        return "not a number"  # type: ignore[return-value]

    with TestClient(app) as client:
        assert client.post("/unserialisable").status_code == 500
        assert client.get("/orders/1").status_code == 404


def test_without_function_scope_the_endpoint_is_refused_when_it_is_declared() -> None:
    app = FastAPI()
    dependency = unit_of_work(InMemorySession())
    with pytest.raises(DependencyScopeError, match=r'declared without Depends\(\.\.\., scope="function"\)'):

        @app.post("/")
        async def add(unit: Annotated[UnitOfWork, Depends(dependency)]) -> None:
            """Would commit after the response."""


def test_one_session_has_one_dependency_and_another_session_another() -> None:
    first, second = InMemorySession(), InMemorySession()
    assert unit_of_work(first) is unit_of_work(first)
    assert unit_of_work(first) is not unit_of_work(second)
    assert database(first) is database(first)
    assert database(first) is not database(second)


def test_dependencies_of_dropped_sessions_are_not_kept() -> None:
    import gc
    import weakref

    session = InMemorySession()
    unit_of_work(session)
    database(session)
    seen = weakref.ref(session)
    del session
    gc.collect()
    assert seen() is None


def test_one_request_has_one_unit_of_work_and_a_test_can_replace_it() -> None:
    session, other = InMemorySession(), InMemorySession()
    Unit = Annotated[UnitOfWork, Depends(unit_of_work(session), scope="function")]  # noqa: N806
    app = application(session)

    async def orders(unit: Unit) -> Orders:
        return Orders(unit)

    @app.post("/shared")
    async def shared(unit: Unit, orders: Annotated[Orders, Depends(orders)]) -> bool:
        await orders.add(Order(7))
        return await Orders(unit).exists()

    app.dependency_overrides[unit_of_work(session)] = unit_of_work(other)
    with TestClient(app) as client:
        assert client.portal is not None
        client.portal.call(other.connect)
        assert client.post("/shared").json() is True
        assert client.get("/orders/7").status_code == 404
        assert client.portal.call(Orders(other).count) == 1


def test_the_lifespan_connects_and_disconnects() -> None:
    session = InMemorySession()
    with TestClient(application(session)) as client:
        assert client.get("/orders/1").status_code == 404
    with pytest.raises(RuntimeError):
        asyncio.run(session.ping())


async def test_the_lifespan_disconnects_when_the_application_fails() -> None:
    session = InMemorySession()

    async def fail_while_serving() -> None:
        async with database_lifespan(session)(FastAPI()):
            await session.ping()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await fail_while_serving()
    with pytest.raises(RuntimeError):
        await session.ping()


def test_the_lifespan_prepares_the_session_before_requests() -> None:
    session = InMemorySession()
    app = application(session)

    async def add_order() -> None:
        await Orders(session).add(Order(1, "cake"))

    app.router.lifespan_context = database_lifespan(session, add_order)
    with TestClient(app) as client:
        assert client.get("/orders/1").json()["item"] == "cake"


async def test_p5_without_its_database_an_application_starts_and_answers_503() -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        session = SQLAlchemySession(f"postgresql+asyncpg://u:p@127.0.0.1:{nobody.getsockname()[1]}/name")
        app = application(session)
        app.include_router(health_router(session))

        @app.get("/unit")
        async def use(unit: Annotated[UnitOfWork, Depends(unit_of_work(session), scope="function")]) -> None:
            """Never get here."""

        @app.get("/read")
        async def read(reads: Annotated[DatabaseSession, Depends(database(session))]) -> None:
            await reads.execute(sa.text("SELECT 1"))

        async with serving(app) as url, httpx2.AsyncClient(base_url=url) as client:
            assert (await client.get("/health/live")).status_code == 200
            for path in ("/unit", "/read", "/health/ready"):
                response = await client.get(path)
                assert response.status_code == 503
                assert response.json()["code"] == "unavailable"
                assert response.headers["retry-after"] == "1"


def test_an_endpoint_that_answers_a_response_itself_commits() -> None:
    session = InMemorySession()
    app = application(session)

    @app.put("/raw")
    async def raw(unit: Annotated[Any, Depends(unit_of_work(session), scope="function")]) -> Response:
        await Orders(unit).add(Order(3))
        return Response(status_code=204)

    with TestClient(app) as client:
        assert client.put("/raw").status_code == 204
        assert client.get("/orders/3").status_code == 200
