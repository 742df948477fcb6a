"""The migrations are the tables, on every database, forth and back."""

import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from example_service.app.infrastructure.tables import metadata
from example_service.app.main import MIGRATIONS
from fastapi_building_blocks.infrastructure.database.migrations import downgrade, upgrade
from fastapi_building_blocks.infrastructure.database.plain_types import adapt_dialect
from tests.backends import Backends

ROOT = Path(__file__).parents[2]
INI = MIGRATIONS / "alembic.ini"


async def on_connection(url: str, work: Any) -> Any:
    engine = create_async_engine(url, poolclass=NullPool)
    adapt_dialect(engine.dialect)
    async with engine.begin() as connection:
        return await connection.run_sync(work)


def tables(connection: sa.Connection) -> set[str]:
    return set(sa.inspect(connection).get_table_names())


def differences(connection: sa.Connection) -> list[Any]:
    context = MigrationContext.configure(
        connection, opts={"include_object": lambda _item, name, *_: name != "ix_users_search"}
    )
    return compare_metadata(context, metadata)


def alembic(url: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "alembic", "-c", str(INI), *arguments],
        cwd=ROOT,
        env={"DATABASE_URL": url, "PATH": "", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


async def test_upgrading_makes_the_tables_and_nothing_is_left_to_do(database_url: str):
    await upgrade(database_url, MIGRATIONS)
    assert await on_connection(database_url, tables) == {"users", "alembic_version"}
    assert await on_connection(database_url, differences) == []


async def test_autogenerate_sees_what_is_missing(database_url: str):
    """Or the test above would prove nothing."""
    await upgrade(database_url, MIGRATIONS)
    await on_connection(
        database_url, lambda connection: connection.exec_driver_sql("ALTER TABLE users DROP COLUMN bio")
    )
    (difference,) = await on_connection(database_url, differences)
    assert (difference[0], difference[3].name) == ("add_column", "bio")


async def test_upgrading_again_changes_nothing(database_url: str):
    users = metadata.tables["users"]
    await upgrade(database_url, MIGRATIONS)
    one = sa.insert(users).values(id=uuid.uuid4(), email="alice@test.com", username="alice")
    await on_connection(database_url, lambda connection: connection.execute(one))
    await upgrade(database_url, MIGRATIONS)
    count = sa.select(sa.func.count()).select_from(users)
    assert await on_connection(database_url, lambda connection: connection.scalar(count)) == 1


async def test_downgrading_to_base_leaves_nothing(database_url: str):
    await upgrade(database_url, MIGRATIONS)
    await downgrade(database_url, MIGRATIONS, "base")
    assert await on_connection(database_url, tables) == {"alembic_version"}
    await upgrade(database_url, MIGRATIONS)
    assert await on_connection(database_url, differences) == []


def test_the_alembic_command_works_from_the_root(database_url: str):
    for arguments in (["upgrade", "head"], ["check"], ["upgrade", "head", "--sql"]):
        done = alembic(database_url, *arguments)
        assert done.returncode == 0, done.stderr
    assert "CREATE TABLE users" in done.stdout


# init.sql


CATALOGUE = """
SELECT 'column', table_name, column_name, concat_ws(' ', data_type, character_maximum_length, collation_name,
       is_nullable, column_default)
FROM information_schema.columns WHERE table_schema = 'public'
UNION ALL SELECT 'index', tablename, indexname, indexdef FROM pg_indexes WHERE schemaname = 'public'
UNION ALL SELECT 'constraint', conrelid::regclass::text, conname, pg_get_constraintdef(oid)
FROM pg_constraint WHERE connamespace = 'public'::regnamespace
UNION ALL SELECT 'extension', extname, '', '' FROM pg_extension
UNION ALL SELECT 'revision', version_num, '', '' FROM alembic_version
ORDER BY 1, 2, 3
"""


async def test_init_sql_is_the_migrations(backends: Backends):
    catalogues = []
    with backends.database("postgres") as migrated, backends.database("postgres") as initialized:
        await upgrade(migrated, MIGRATIONS)
        await run_script(initialized, (MIGRATIONS.parent / "init.sql").read_text())
        for url in (migrated, initialized):
            rows = await on_connection(url, lambda connection: connection.execute(sa.text(CATALOGUE)).all())
            catalogues.append([tuple(row) for row in rows])
        await upgrade(initialized, MIGRATIONS)  # and there is nothing left to do
    assert catalogues[0] == catalogues[1]
    assert ("index", "users", "ix_users_search") in {row[:3] for row in catalogues[0]}


async def test_the_migration_does_without_the_extension_where_it_may_not_be_made(backends: Backends):
    with backends.database("postgres") as url:
        blocked = (
            "CREATE FUNCTION refuse() RETURNS event_trigger LANGUAGE plpgsql AS "
            "$$ BEGIN RAISE insufficient_privilege; END $$;"
            "CREATE EVENT TRIGGER refuse ON ddl_command_start WHEN TAG IN ('CREATE EXTENSION') "
            "EXECUTE FUNCTION refuse()"
        )
        await run_script(url, blocked)
        await upgrade(url, MIGRATIONS)
        indexes = await on_connection(
            url, lambda connection: {index["name"] for index in sa.inspect(connection).get_indexes("users")}
        )
        assert "ix_users_created_at" in indexes
        assert "ix_users_search" not in indexes
        assert await on_connection(url, differences) == []


async def run_script(url: str, script: str) -> None:
    import asyncpg

    dsn = sa.make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
    connection = await asyncpg.connect(dsn)
    try:
        await connection.execute(script)
    finally:
        await connection.close()


async def test_an_id_is_kept_as_text_where_the_databases_own_type_would_sort_it_by_other_digits(
    database_url: str,
) -> None:
    await upgrade(database_url, MIGRATIONS)
    kinds = await on_connection(database_url, lambda connection: sa.inspect(connection).get_columns("users"))
    kind = str(next(column["type"] for column in kinds if column["name"] == "id"))
    assert kind.partition(" ")[0] == ("UUID" if "postgresql" in database_url else "CHAR(32)")
