"""What a service's own tests use: contract suites for its repositories, and faults to try it with.

Needs pytest, and for the contract suites pytest-asyncio (auto mode).
"""

try:
    import pytest
except ImportError as error:
    raise ImportError("fastapi_building_blocks.testing needs pytest: pip install pytest pytest-asyncio") from error

# Before the import: a failing assert of the suite then shows its values, as one of the service's own tests would.
pytest.register_assert_rewrite(
    *(f"{__name__}.contract_{part}" for part in ("locks", "pages", "reads", "subject", "transactions", "writes"))
)

from fastapi_building_blocks.testing.cancellation import StormReport, storm  # noqa: E402
from fastapi_building_blocks.testing.connection_invariants import assert_connections_sound  # noqa: E402
from fastapi_building_blocks.testing.database_servers import (  # noqa: E402
    MARIADB_PRIMARY,
    DatabaseServer,
    MariaDBReplica,
    MariaDBServer,
    MissingServer,
    PgBouncerServer,
    PostgreSQLReplica,
    PostgreSQLServer,
    RedisSentinelServer,
    RedisServer,
)
from fastapi_building_blocks.testing.fault_proxy import FaultProxy  # noqa: E402
from fastapi_building_blocks.testing.repository_contract import RepositoryContract  # noqa: E402

__all__ = [
    "MARIADB_PRIMARY",
    "DatabaseServer",
    "FaultProxy",
    "MariaDBReplica",
    "MariaDBServer",
    "MissingServer",
    "PgBouncerServer",
    "PostgreSQLReplica",
    "PostgreSQLServer",
    "RedisSentinelServer",
    "RedisServer",
    "RepositoryContract",
    "StormReport",
    "assert_connections_sound",
    "storm",
]
