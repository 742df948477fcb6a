"""The application, and the command that migrates its database and serves it."""

import asyncio
import logging.config
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext
from pathlib import Path

import uvicorn
from fastapi import FastAPI
from pydantic import ValidationError
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from example_service.app.api.v1 import users
from example_service.app.core.config import get_database_settings, get_settings
from example_service.app.core.database import get_cache, get_db
from fastapi_building_blocks.api import (
    BodyLimitMiddleware,
    ConsistencyMiddleware,
    DeadlineMiddleware,
    DrainMiddleware,
    RequestIdMiddleware,
    database_lifespan,
    health_router,
    install_problem_details,
)
from fastapi_building_blocks.domain import BuildingBlocksError, UnavailableError
from fastapi_building_blocks.infrastructure import Cache, DatabaseSession, DatabaseSettings, SQLAlchemySession
from fastapi_building_blocks.infrastructure.database.migrations import upgrade

logger = logging.getLogger(__name__)

MIGRATIONS = Path(__file__).parents[1] / "migrations"


class WithoutQuery(logging.Filter):
    """Keeps what clients search for out of the access log: e-mail addresses, say."""

    def filter(self, record: logging.LogRecord) -> bool:
        if isinstance(record.args, tuple):
            record.args = tuple(value.partition("?")[0] if isinstance(value, str) else value for value in record.args)
        return True


LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "filters": {
        "request_id": {"()": "fastapi_building_blocks.api.RequestIdFilter"},
        "without_query": {"()": WithoutQuery},
    },
    "formatters": {"line": {"format": "%(asctime)s %(levelname)-7s [%(request_id)s] %(name)s: %(message)s"}},
    "handlers": {
        "stderr": {"class": "logging.StreamHandler", "formatter": "line", "filters": ["request_id"]},
    },
    "loggers": {"uvicorn.access": {"filters": ["without_query"]}},
    "root": {"level": "INFO", "handlers": ["stderr"]},
}


def create_app(session: DatabaseSession | None = None, cache: Cache | None = None) -> FastAPI:
    """Return the application.

    Args:
        session: what it runs on instead of the settings' database, for tests.
        cache: the cache in front of that, instead of the settings'.
    """
    database, settings = session or get_db(), get_settings()
    cache = get_cache() if session is None else cache

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with database_lifespan(database)(app), cache or nullcontext():
            yield

    app = FastAPI(
        title="User management",
        description="Users, on whatever database DATABASE_URL names.",
        version="1.0.0",
        lifespan=lifespan,
    )
    if session is not None:
        app.dependency_overrides |= {get_db: lambda: session, get_cache: lambda: cache}
    install_problem_details(app)
    app.add_middleware(BodyLimitMiddleware)
    if get_database_settings().replica_urls:
        secret = settings.consistency_secret.get_secret_value()
        if not secret:
            raise ValueError("DATABASE_REPLICA_URLS goes with a CONSISTENCY_SECRET, the same for every process")
        app.add_middleware(ConsistencyMiddleware, secret=secret)
    app.add_middleware(DeadlineMiddleware, seconds=settings.request_deadline)
    app.add_middleware(DrainMiddleware, seconds=settings.drain_seconds)
    app.add_middleware(RequestIdMiddleware)
    app.include_router(health_router(database))
    app.include_router(users.router)
    return app


async def serve(app: FastAPI, session: SQLAlchemySession) -> None:
    """Serve until a signal; the database is migrated as soon as it is there, and the service is ready after that."""
    settings = get_settings()
    config = uvicorn.Config(
        app, settings.host, settings.port, log_config=None, timeout_graceful_shutdown=settings.shutdown_timeout
    )
    server = uvicorn.Server(config)
    failures: list[Exception] = []

    async def migrate() -> None:
        logger.info("migrating %r", session)
        try:
            await upgrade(session, MIGRATIONS)
        except UnavailableError:
            raise  # it is tried again
        except Exception as error:
            failures.append(error)
            server.should_exit = True
            raise

    try:
        await session.start(migrate)
        await server.serve()
    finally:
        await session.disconnect()
    if failures:
        raise failures[0]


def main() -> int:
    """Run the service as a command, and return its exit code."""
    logging.config.dictConfig(LOGGING)
    # uvicorn raises the signal once more when it has ended in good order.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        session = get_db()
        asyncio.run(serve(create_app(), session))
    except KeyboardInterrupt:
        return 130  # what a shell answers for Ctrl-C; everything in flight has ended
    except ValidationError as error:
        logger.error("the settings are wrong: %s", _named_as_set(error))  # noqa: TRY400 - a sentence, not a stack
        return 2
    except (ValueError, ImportError) as error:
        logger.error("the settings are wrong: %s", error)  # noqa: TRY400
        return 2
    except DBAPIError as error:
        # The driver's own first line: SQLAlchemy adds the statement, and PostgreSQL the values in further lines.
        said = str(error.orig).partition("\n")[0]
        logger.error("cannot start: the database refused the migration: %s", said)  # noqa: TRY400
        return 1
    except (BuildingBlocksError, SQLAlchemyError) as error:
        logger.error("cannot start: %s", error)  # noqa: TRY400
        return 1
    return 0


def _named_as_set(error: ValidationError) -> str:
    """Say what is wrong with which environment variable."""
    prefix = DatabaseSettings.model_config.get("env_prefix", "") if error.title == DatabaseSettings.__name__ else ""
    return "; ".join(
        f"{prefix}{'_'.join(map(str, problem['loc']))}".upper() + f": {problem['msg']}" for problem in error.errors()
    )


if __name__ == "__main__":
    sys.exit(main())
else:
    # For ``uvicorn example_service.app.main:app``; the command above makes its own and says what is wrong in a line.
    app = create_app()
