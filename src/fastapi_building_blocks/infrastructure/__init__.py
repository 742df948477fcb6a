"""Sessions, units of work, repositories and settings: what a service's infrastructure is built from."""

from fastapi_building_blocks.infrastructure.cache.cache import Cache, CacheStatistics, InMemoryCache
from fastapi_building_blocks.infrastructure.cache.redis_cache import RedisCache
from fastapi_building_blocks.infrastructure.database.consistency import (
    current_consistency_token,
    eventual_reads,
    reads_from_primary,
)
from fastapi_building_blocks.infrastructure.database.deadlines import deadline, time_left
from fastapi_building_blocks.infrastructure.database.in_memory_session import InMemorySession
from fastapi_building_blocks.infrastructure.database.observation import StatementEvent
from fastapi_building_blocks.infrastructure.database.replicas import ReplicaStatus
from fastapi_building_blocks.infrastructure.database.session import DatabaseSession, PoolStatus, Transaction
from fastapi_building_blocks.infrastructure.database.settings import DatabaseSettings
from fastapi_building_blocks.infrastructure.database.sqlalchemy_session import SQLAlchemySession
from fastapi_building_blocks.infrastructure.database.types import (
    BinaryString,
    ExactDecimal,
    UtcDateTime,
    timestamp_columns,
    version_column,
)
from fastapi_building_blocks.infrastructure.persistence.repositories.base import BaseRepository
from fastapi_building_blocks.infrastructure.persistence.repositories.cached_repository import CachedRepository
from fastapi_building_blocks.infrastructure.persistence.repositories.sqlalchemy_repository import SQLAlchemyRepository
from fastapi_building_blocks.infrastructure.persistence.unit_of_work import UnitOfWork

__all__ = [
    "BaseRepository",
    "BinaryString",
    "Cache",
    "CacheStatistics",
    "CachedRepository",
    "DatabaseSession",
    "DatabaseSettings",
    "ExactDecimal",
    "InMemoryCache",
    "InMemorySession",
    "PoolStatus",
    "RedisCache",
    "ReplicaStatus",
    "SQLAlchemyRepository",
    "SQLAlchemySession",
    "StatementEvent",
    "Transaction",
    "UnitOfWork",
    "UtcDateTime",
    "current_consistency_token",
    "deadline",
    "eventual_reads",
    "reads_from_primary",
    "time_left",
    "timestamp_columns",
    "version_column",
]
