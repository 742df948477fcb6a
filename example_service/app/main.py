"""The application, and the command that migrates its database and serves it."""

import asyncio
import logging.config
import sys
from pathlib import Path

import uvicorn
from fastapi import FastAPI
from pydantic import ValidationError
from sqlalchemy.exc import SQLAlchemyError

from example_service.app.api.v1 import users
from example_service.app.core.config import get_database_settings, get_settings
from example_service.app.core.database import get_db
from fastapi_building_blocks.api import (
    RequestIdMiddleware,
    database_lifespan,
    health_router,
    install_problem_details,
)
from fastapi_building_blocks.domain import BuildingBlocksError
from fastapi_building_blocks.infrastructure import DatabaseSession, SQLAlchemySession
from fastapi_building_blocks.infrastructure.database.migrations import upgrade

logger = logging.getLogger(__name__)

MIGRATIONS = Path(__file__).parents[1] / "migrations"

LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "filters": {"request_id": {"()": "fastapi_building_blocks.api.RequestIdFilter"}},
    "formatters": {"line": {"format": "%(asctime)s %(levelname)-7s [%(request_id)s] %(name)s: %(message)s"}},
    "handlers": {
        "stderr": {"class": "logging.StreamHandler", "formatter": "line", "filters": ["request_id"]},
    },
    "root": {"level": "INFO", "handlers": ["stderr"]},
}


def create_app(session: DatabaseSession | None = None) -> FastAPI:
    """Return the application.

    Args:
        session: what it runs on instead of the settings' database, for tests.
    """
    database = session or get_db()
    app = FastAPI(
        title="User management",
        description="Users, on whatever database DATABASE_URL names.",
        version="1.0.0",
        lifespan=database_lifespan(database),
    )
    if session is not None:
        app.dependency_overrides[get_db] = lambda: session
    install_problem_details(app)
    app.add_middleware(RequestIdMiddleware)
    app.include_router(health_router(database))
    app.include_router(users.router)
    return app


async def serve(app: FastAPI, session: SQLAlchemySession) -> None:
    """Wait for the database, migrate it, and serve until a signal."""
    settings = get_settings()
    async with session:
        logger.info("migrating %r", session)
        await upgrade(get_database_settings().url, MIGRATIONS)
    await uvicorn.Server(uvicorn.Config(app, settings.host, settings.port, log_config=None)).serve()


def main() -> int:
    """Run the service as a command, and return its exit code."""
    logging.config.dictConfig(LOGGING)
    try:
        session = get_db()
        asyncio.run(serve(create_app(), session))
    except KeyboardInterrupt:
        return 130  # what a shell answers for Ctrl-C; everything in flight has ended
    except (ValidationError, ValueError, ModuleNotFoundError) as error:
        logger.error("the settings are wrong: %s", error)  # noqa: TRY400 - a sentence, not a stack
        return 2
    except (BuildingBlocksError, SQLAlchemyError) as error:
        logger.error("cannot start: %s", error)  # noqa: TRY400
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
else:
    # For ``uvicorn example_service.app.main:app``; the command above makes its own and says what is wrong in a line.
    app = create_app()
