"""The knobs of a session, from the environment."""

from typing import Annotated

from pydantic import Field, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict


class DatabaseSettings(BaseSettings):
    """``DATABASE_URL``, ``DATABASE_POOL_SIZE`` and so on, from the environment or ``.env``; times in seconds."""

    model_config = SettingsConfigDict(
        env_prefix="DATABASE_", env_file=".env", extra="ignore", hide_input_in_errors=True
    )

    url: str = Field("sqlite+aiosqlite:///./database.db", repr=False)
    """Where the database is. Not part of ``repr``: it may hold a password."""
    pool_size: int = Field(5, ge=1)
    """Connections that stay open."""
    max_overflow: int = Field(10, ge=0)
    """Connections beyond those, opened under load and closed when they have been idle for a while."""
    pool_timeout: float = Field(5.0, gt=0, allow_inf_nan=False)
    """How long a caller waits for a connection before ``PoolTimeoutError``."""
    connect_timeout: float = Field(5.0, gt=0, allow_inf_nan=False)
    """How long opening one connection may take."""
    connect_attempts: int = Field(5, ge=1)
    """How often ``connect()`` tries, with growing delays, before it gives up."""
    statement_timeout: float | None = Field(30.0, gt=0, allow_inf_nan=False)
    """How long one statement may take before ``StatementTimeoutError``, whether the database still answers or not."""
    recycle: float | None = Field(1800.0, gt=0, allow_inf_nan=False)
    """The age at which a connection is replaced."""
    leak_threshold: float | None = Field(60.0, gt=0, allow_inf_nan=False)
    """How long a connection may be held before the log says where it was taken."""
    shutdown_timeout: float = Field(10.0, gt=0, allow_inf_nan=False)
    """How long ``disconnect()`` waits for connections in use before it closes them all the same."""
    replica_urls: Annotated[tuple[str, ...], NoDecode] = Field((), repr=False)
    """Read replicas, separated by commas."""
    max_lag: float = Field(10.0, gt=0, allow_inf_nan=False)
    """How far behind the primary a replica may be and still be read from."""
    consistency_wait: float = Field(0.1, ge=0, allow_inf_nan=False)
    """How long a read waits for a replica to have what its context has written, before it goes to the primary."""
    pgbouncer: bool = False
    """Whether ``url`` leads to PgBouncer in transaction mode instead of to PostgreSQL itself."""

    @field_validator("replica_urls", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value
