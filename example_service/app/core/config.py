"""Settings, from the environment, ``.env`` and the service's own defaults."""

from functools import lru_cache
from pathlib import Path

from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

from fastapi_building_blocks.infrastructure import DatabaseSettings

_ENV_FILES = (Path(__file__).parents[2] / "defaults.env", ".env")


class ServiceSettings(BaseSettings):
    """Where the service listens, and how long things may take, in seconds."""

    model_config = SettingsConfigDict(env_file=_ENV_FILES, extra="ignore")

    host: str
    port: int = Field(ge=0, le=65535)
    request_deadline: float = Field(gt=0, allow_inf_nan=False)
    """What a request has for all its database calls."""
    drain_seconds: float = Field(ge=0, allow_inf_nan=False)
    """How long it serves on after SIGTERM, not ready any more, so that load balancers take it out."""
    shutdown_timeout: int = Field(ge=1)
    """How long requests in flight have after that."""
    consistency_secret: SecretStr = SecretStr("")
    """What signs consistency tokens, where there are read replicas: the same for every process of the service."""
    redis_url: SecretStr = SecretStr("")
    """Where users are cached; empty: nowhere. One Redis, or one of its numbered databases, for one database of users."""


@lru_cache
def get_settings() -> ServiceSettings:
    """Return the service's settings, read once."""
    return ServiceSettings()


@lru_cache
def get_database_settings() -> DatabaseSettings:
    """Return where the database is and how its pool behaves, read once."""
    return DatabaseSettings(_env_file=_ENV_FILES)
