"""A service with read replicas, served by processes of their own: ``uvicorn tests.faults.replicated_service:app``."""

from typing import Any

from fastapi import FastAPI

from fastapi_building_blocks.api import ConsistencyMiddleware, database_lifespan, install_problem_details
from fastapi_building_blocks.infrastructure import DatabaseSettings, SQLAlchemySession
from tests.guarantees.ledger import Accounts, account

session = SQLAlchemySession.from_settings(DatabaseSettings())
app = FastAPI(lifespan=database_lifespan(session))
install_problem_details(app)
app.add_middleware(ConsistencyMiddleware)


@app.put("/accounts/{number}/{balance}")
async def put(number: int, balance: int) -> None:
    if balance % 2:
        await Accounts(session).upsert(account(number, balance))
    else:
        async with session.transaction() as unit:
            await Accounts(unit).upsert(account(number, balance))


@app.get("/accounts/{number}")
async def get(number: int) -> int | None:
    found = await Accounts(session).get_by_id(number)
    return None if found is None else found.balance


@app.get("/replicas")
async def replicas() -> dict[str, Any]:
    status = session.replica_status()
    return {
        "waiting": [replica.name for replica in status if not replica.in_rotation],
        "reads": {replica.name: replica.reads for replica in status},
    }
