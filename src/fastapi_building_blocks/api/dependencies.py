"""FastAPI dependencies: a unit of work that commits before the response, a session for reads, a lifespan."""

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Annotated, Any
from weakref import WeakValueDictionary

from fastapi import Depends, FastAPI

from fastapi_building_blocks.infrastructure.database.session import DatabaseSession
from fastapi_building_blocks.infrastructure.persistence.unit_of_work import UnitOfWork

UnitOfWorkDependency = Callable[..., AsyncGenerator[UnitOfWork, None]]
SessionDependency = Callable[[], Awaitable[DatabaseSession]]

# FastAPI's dependency cache and overrides go by identity. A dependency holds its session, so an id is not reused.
_units_of_work: WeakValueDictionary[int, UnitOfWorkDependency] = WeakValueDictionary()
_databases: WeakValueDictionary[int, SessionDependency] = WeakValueDictionary()


async def _ends_before_the_response() -> None:
    """Hold its dependant to ``scope="function"``: FastAPI refuses a dependency that outlives one of its own."""


def unit_of_work(session: DatabaseSession) -> UnitOfWorkDependency:
    """Return the dependency that gives a request its unit of work, the same one for the same session.

    ``Annotated[UnitOfWork, Depends(unit_of_work(session), scope="function")]`` commits when the endpoint has
    returned and *before* the response is sent, so that a COMMIT which fails is a problem and not a 201. Any
    exception, HTTPException included, rolls back. Without ``scope="function"`` FastAPI would commit after the
    response; that is refused with ``DependencyScopeError`` when the endpoint is declared.
    """
    dependency = _units_of_work.get(id(session))
    if dependency is None:

        async def unit_of_work_dependency(
            _: Annotated[None, Depends(_ends_before_the_response, scope="function")],
        ) -> AsyncGenerator[UnitOfWork, None]:
            async with session.transaction() as unit:
                yield unit

        # FastAPI's refusal names the dependency: this makes it say what to do.
        unit_of_work_dependency.__name__ = 'unit_of_work(session), declared without Depends(..., scope="function"),'
        _units_of_work[id(session)] = dependency = unit_of_work_dependency
    return dependency


def database(session: DatabaseSession) -> SessionDependency:
    """Return the dependency that gives the session itself, for reads; the same one for the same session."""
    dependency = _databases.get(id(session))
    if dependency is None:

        async def database_dependency() -> DatabaseSession:
            return session

        _databases[id(session)] = dependency = database_dependency
    return dependency


def database_lifespan(
    session: DatabaseSession, prepare: Callable[[], Awaitable[object]] | None = None
) -> Callable[[FastAPI], AbstractAsyncContextManager[Any]]:
    """Return a lifespan that starts the session, in the background if its database is not there yet, and disconnects it.

    Until the database is there and prepared, requests that need it are answered 503, and so is ``/health/ready``. See
    ``session.start`` for what fails the start of the application. In a lifespan of your own:
    ``async with database_lifespan(session)(app)``.

    Args:
        prepare: awaited once the database is there, before requests are: ``lambda: session.create_tables(metadata)``.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await session.start(prepare)
        try:
            yield
        finally:
            await session.disconnect()

    return lifespan
