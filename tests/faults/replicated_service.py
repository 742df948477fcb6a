"""A service with read replicas, and a cache if ``REDIS_URL`` is set, served by processes of their own: ``uvicorn tests.faults.replicated_service:app``."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext
from typing import Any

from fastapi import FastAPI

from fastapi_building_blocks.api import ConsistencyMiddleware, database_lifespan, install_problem_details
from fastapi_building_blocks.domain import Repository, field
from fastapi_building_blocks.infrastructure import (
    CachedRepository,
    DatabaseSession,
    DatabaseSettings,
    RedisCache,
    SQLAlchemySession,
)
from tests.guarantees.ledger import Account, Accounts, account

session = SQLAlchemySession.from_settings(DatabaseSettings())
# Its own timeout is tried elsewhere: on a machine that does much else, 50 ms say little about Redis.
cache = RedisCache(url, prefix="replicated:", timeout=1.0) if (url := os.environ.get("REDIS_URL")) else None


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    async with database_lifespan(session)(app), cache or nullcontext():
        yield


app = FastAPI(lifespan=lifespan)
install_problem_details(app)
app.add_middleware(ConsistencyMiddleware)


def accounts_on(database: DatabaseSession) -> Repository[Account]:
    return Accounts(database) if cache is None else CachedRepository(Accounts(database), cache)


@app.put("/accounts/{number}/{balance}")
async def put(number: int, balance: int) -> None:
    if balance % 2:
        await accounts_on(session).upsert(account(number, balance))
    else:
        async with session.transaction() as unit:
            await accounts_on(unit).upsert(account(number, balance))


@app.get("/accounts/{number}")
async def get(number: int) -> int | None:
    found = await accounts_on(session).get_by_id(number)
    return None if found is None else found.balance


@app.get("/listed/{number}")
async def listed(number: int) -> int | None:
    """Answer the same from the database, whether there is a cache or not."""
    found = await accounts_on(session).get_all(field("id") == number)
    return found[0].balance if found else None


@app.get("/replicas")
async def replicas() -> dict[str, Any]:
    status = session.replica_status()
    return {
        "waiting": [replica.name for replica in status if not replica.in_rotation],
        "reads": {replica.name: replica.reads for replica in status},
        "hits": 0 if cache is None else cache.statistics().hits,
    }
