"""How Alembic reaches this service's tables; run by every alembic command."""

from example_service.app.core.config import get_database_settings
from example_service.app.infrastructure.tables import metadata
from fastapi_building_blocks.infrastructure.database.migrations import run_migrations

# Made by hand in its migration, because only PostgreSQL has such an index.
run_migrations(metadata, get_database_settings().url, unmanaged={"ix_users_search"})
