"""The one database session of the process."""

from functools import lru_cache

from example_service.app.core.config import get_database_settings
from fastapi_building_blocks.infrastructure import SQLAlchemySession


@lru_cache
def get_db() -> SQLAlchemySession:
    """Return the session that every request runs on; the lifespan connects it."""
    return SQLAlchemySession.from_settings(get_database_settings())
