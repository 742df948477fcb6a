"""Settings, from the environment, ``.env`` and the service's own defaults."""

from functools import lru_cache
from pathlib import Path

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from fastapi_building_blocks.infrastructure import DatabaseSettings

_ENV_FILES = (Path(__file__).parents[2] / "defaults.env", ".env")


class ServiceSettings(BaseSettings):
    """Where the service listens."""

    model_config = SettingsConfigDict(env_file=_ENV_FILES, extra="ignore")

    host: str
    port: int = Field(ge=0, le=65535)


@lru_cache
def get_settings() -> ServiceSettings:
    """Return the service's settings, read once."""
    return ServiceSettings()


@lru_cache
def get_database_settings() -> DatabaseSettings:
    """Return where the database is and how its pool behaves, read once."""
    return DatabaseSettings(_env_file=_ENV_FILES)
