"""The applications of the HTTP part, one per contestant, all with `/accounts/{id}` and a page of 100 of a status.

Started as `python -m benchmarks.http_apps CONTESTANT URL FD`, with a listening socket that the caller has opened.
"""

import argparse
import socket
import sys
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Annotated, Any, Literal
from uuid import UUID

import sqlalchemy as sa
import uvicorn
from fastapi import Depends, FastAPI, HTTPException, Response
from pydantic import BaseModel, ConfigDict

from fastapi_building_blocks.api import (
    CursorPageResponse,
    ListQuery,
    PageResponse,
    RequestIdMiddleware,
    database,
    database_lifespan,
    install_problem_details,
    list_query,
    page_response,
)
from fastapi_building_blocks.domain import Page, PageRequest, Sort, field
from fastapi_building_blocks.infrastructure import DatabaseSession, SQLAlchemySession

from .accounts import PAGE_SIZE, Account, account, accounts, plain_table
from .contestants import POOL_SIZE, Contestant
from .core import make_engine
from .ours import AccountRepository
from .raw_mysql import RawMySQL
from .raw_postgres import RawPostgres
from .raw_sqlite import RawSQLite

Status = Literal["active", "invited", "suspended", "closed"]
Lifespan = Callable[[FastAPI], Any]


class AccountOut(BaseModel):
    """An account as every contestant answers it."""

    model_config = ConfigDict(from_attributes=True)

    id: int
    public_id: UUID
    email: str
    name: str
    status: str
    balance: Decimal
    is_active: bool
    note: str | None
    login_count: int
    created_at: datetime


def ours(url: str) -> FastAPI:
    """FastAPI and the repository, nothing else."""
    session = SQLAlchemySession(url, pool_size=POOL_SIZE, max_overflow=0)
    app = FastAPI(lifespan=database_lifespan(session))

    @app.get("/accounts/{id}", response_model=AccountOut)
    async def one(id: int) -> Account:
        return await AccountRepository(session).get(id)

    @app.get("/accounts", response_model=PageResponse[AccountOut])
    async def page(status: Status) -> Response:
        found = await AccountRepository(session).paginate(
            PageRequest(limit=PAGE_SIZE, count="none"),
            field("status") == status,
            sort=[Sort("created_at", descending=True)],
        )
        return page_response(found, AccountOut)

    return app


def ours_validated(url: str) -> FastAPI:
    """The same without `page_response`."""
    session = SQLAlchemySession(url, pool_size=POOL_SIZE, max_overflow=0)
    app = FastAPI(lifespan=database_lifespan(session))

    @app.get("/accounts", response_model=PageResponse[AccountOut])
    async def page(status: Status) -> Any:
        return await AccountRepository(session).paginate(
            PageRequest(limit=PAGE_SIZE, count="none"),
            field("status") == status,
            sort=[Sort("created_at", descending=True)],
        )

    return app


class ListedAccounts(AccountRepository):
    filterable_fields = ("status",)
    sortable_fields = ("created_at",)


def ours_whole(url: str) -> FastAPI:
    """What a service of ours has: problems, request ids, the session and the list's query as dependencies."""
    session = SQLAlchemySession(url, pool_size=POOL_SIZE, max_overflow=0)
    app = FastAPI(lifespan=database_lifespan(session))
    install_problem_details(app)
    app.add_middleware(RequestIdMiddleware)
    reading = Annotated[DatabaseSession, Depends(database(session))]
    listing = Annotated[ListQuery, Depends(list_query(ListedAccounts, default_sort="-created_at", count="none"))]

    @app.get("/accounts/{id}", response_model=AccountOut)
    async def one(id: int, session: reading) -> Account:
        return await ListedAccounts(session).get(id)

    @app.get("/accounts", response_model=PageResponse[AccountOut] | CursorPageResponse[AccountOut])
    async def page(query: listing, session: reading) -> Response:
        return page_response(await query.page_of(ListedAccounts(session)), AccountOut)

    return app


def core(url: str) -> FastAPI:
    """Core written by hand: what it answers is validated by the response model."""
    engine = make_engine(url)
    app = FastAPI(lifespan=_disposing(engine.dispose))

    @app.get("/accounts/{id}")
    async def one(id: int) -> AccountOut:
        async with engine.connect() as connection:
            result = await connection.execute(sa.select(plain_table).where(plain_table.c.id == id))
            row = result.one_or_none()
        if row is None:
            raise HTTPException(404)
        return AccountOut.model_validate(row)

    @app.get("/accounts")
    async def page(status: Status) -> list[AccountOut]:
        async with engine.connect() as connection:
            result = await connection.execute(
                sa.select(plain_table)
                .where(plain_table.c.status == status)
                .order_by(plain_table.c.created_at.desc(), plain_table.c.id.desc())
                .limit(PAGE_SIZE)
            )
            return [AccountOut.model_validate(row) for row in result]

    return app


def fastcrud(url: str) -> FastAPI:
    """FastCRUD's router as it comes; its list counts what matches for each request, and cannot be told not to."""
    from fastcrud import FilterConfig, crud_router  # noqa: PLC0415 - for this contestant only
    from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker  # noqa: PLC0415

    from .peers import CrudAccount  # noqa: PLC0415

    engine = make_engine(url)
    sessions = async_sessionmaker(engine, expire_on_commit=False)
    app = FastAPI(lifespan=_disposing(engine.dispose))

    async def session() -> AsyncIterator[AsyncSession]:
        async with sessions() as session:
            yield session

    router = crud_router(
        session=session,
        model=CrudAccount,
        create_schema=AccountOut,
        update_schema=AccountOut,
        select_schema=AccountOut,
        path="/accounts",
        filter_config=FilterConfig(status=None),
        included_methods=["read", "read_multi"],
    )
    app.include_router(router)
    return app


def raw(url: str) -> FastAPI:
    """The driver with hand-written SQL, and `page_response`: how near a repository can come."""
    drivers = {"postgresql": RawPostgres, "mysql": RawMySQL, "sqlite": RawSQLite}
    driver: Contestant = drivers[sa.make_url(url).get_backend_name()]()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await driver.setup(url)
        yield
        await driver.teardown()

    app = FastAPI(lifespan=lifespan)

    @app.get("/accounts/{id}", response_model=AccountOut)
    async def one(id: int) -> Any:
        return await driver.get(id)

    @app.get("/accounts", response_model=PageResponse[AccountOut])
    async def page(status: Status) -> Response:
        return _page_response(await driver.page(status))

    return app


def floor(_: str) -> FastAPI:
    """FastAPI without a database: what no data layer can go below."""
    app = FastAPI()
    listed = {
        status: [item for item in accounts(range(1, 1001)) if item.status == status][:PAGE_SIZE]
        for status in ("active", "invited", "suspended", "closed")
    }

    @app.get("/accounts/{id}", response_model=AccountOut)
    async def one(id: int) -> Account:
        return account(id)

    @app.get("/accounts", response_model=PageResponse[AccountOut])
    async def page(status: Status) -> Response:
        return _page_response(listed[status])

    return app


def _page_response(items: Sequence[Account]) -> Response:
    return page_response(Page(items, None, PAGE_SIZE, 0, has_next=True, has_prev=False), AccountOut)


def _disposing(dispose: Callable[[], Awaitable[None]]) -> Lifespan:
    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await dispose()

    return lifespan


@dataclass(frozen=True)
class HttpContestant:
    """An application, and how it is asked."""

    make: Callable[[str], FastAPI]
    page: str = "/accounts?status={status}"
    items: str | None = "items"
    """Where in the answer the accounts are."""
    operations: tuple[str, ...] = ("one row", "100 rows")
    reads_the_database: bool = True


FASTCRUD_PAGE = f"/accounts?status={{status}}&sort=-created_at,-id&offset=0&limit={PAGE_SIZE}"
HTTP_CONTESTANTS = {
    "ours": HttpContestant(ours),
    "core": HttpContestant(core, items=None),
    "FastCRUD": HttpContestant(fastcrud, FASTCRUD_PAGE, "data"),
    "ours in a whole service": HttpContestant(ours_whole, f"/accounts?status={{status}}&limit={PAGE_SIZE}"),
    "ours without page_response": HttpContestant(ours_validated, operations=("100 rows",)),
    "raw driver": HttpContestant(raw),
    "FastAPI alone": HttpContestant(floor, reads_the_database=False),
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.http_apps", description=__doc__)
    parser.add_argument("contestant", choices=HTTP_CONTESTANTS)
    parser.add_argument("url")
    parser.add_argument("fd", type=int)
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # the peers' own
    app = HTTP_CONTESTANTS[options.contestant].make(options.url)
    server = uvicorn.Server(uvicorn.Config(app, access_log=False, log_level="warning", loop="uvloop", http="httptools"))
    server.run(sockets=[socket.socket(fileno=options.fd)])
    sys.exit(0 if server.started else 1)


if __name__ == "__main__":
    main()
