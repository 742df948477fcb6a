"""What endpoints are given: users on the session for reading, users in a unit of work for writing."""

from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import Depends

from example_service.app.core.database import get_cache, get_db
from example_service.app.infrastructure.repositories.cached_user_repository import CachedUserRepository
from example_service.app.infrastructure.repositories.postgres_user_repository import PostgresUserRepository
from example_service.app.infrastructure.repositories.user_repository import FindsUsers, UserRepository
from fastapi_building_blocks.infrastructure import Cache, DatabaseSession, UnitOfWork

Database = Annotated[DatabaseSession, Depends(get_db)]
UserCache = Annotated[Cache | None, Depends(get_cache)]


async def get_unit_of_work(database: Database) -> AsyncIterator[UnitOfWork]:
    """Give a request its unit of work."""
    async with UnitOfWork(database) as unit:
        yield unit


# With this scope it commits before the response is sent: a COMMIT that fails is a problem, not a 201.
UnitOfWorkDep = Annotated[UnitOfWork, Depends(get_unit_of_work, scope="function")]


def user_repository(session: DatabaseSession) -> UserRepository:
    """Return the repository that suits the database: the one place that looks which one it is."""
    if session.dialect_name == "postgresql":
        return PostgresUserRepository(session)
    return UserRepository(session)


def _cached(users: UserRepository, cache: Cache | None) -> FindsUsers:
    return users if cache is None else CachedUserRepository(users, cache)


async def _users(database: Database, cache: UserCache) -> FindsUsers:
    return _cached(user_repository(database), cache)


async def _users_in_unit(unit: UnitOfWorkDep, cache: UserCache) -> FindsUsers:
    return _cached(user_repository(unit), cache)


Users = Annotated[FindsUsers, Depends(_users)]
UsersInUnit = Annotated[FindsUsers, Depends(_users_in_unit, scope="function")]
