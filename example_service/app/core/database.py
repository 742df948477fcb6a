"""The one database session of the process, and the cache in front of it."""

from functools import lru_cache

from example_service.app.core.config import get_database_settings, get_settings
from fastapi_building_blocks.infrastructure import RedisCache, SQLAlchemySession


@lru_cache
def get_db() -> SQLAlchemySession:
    """Return the session that every request runs on; the lifespan connects it."""
    return SQLAlchemySession.from_settings(get_database_settings())


@lru_cache
def get_cache() -> RedisCache | None:
    """Return the cache that ``REDIS_URL`` names, which the lifespan connects, or None."""
    url = get_settings().redis_url.get_secret_value()
    return RedisCache(url, prefix="user-management:") if url else None
