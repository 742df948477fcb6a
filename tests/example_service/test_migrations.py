"""The migrations are the tables, on every database, forth and back."""

import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from example_service.app.infrastructure.tables import metadata
from example_service.app.main import MIGRATIONS
from fastapi_building_blocks.infrastructure.database.migrations import downgrade, upgrade
from tests.backends import Backends

ROOT = Path(__file__).parents[2]
INI = MIGRATIONS / "alembic.ini"


async def on_connection(url: str, work: Any) -> Any:
    engine = create_async_engine(url, poolclass=NullPool)
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


# Alembic as the library supplies it, with migrations of the test's own


def write_environment(directory: Path, *revisions: str) -> Path:
    (directory / "versions").mkdir()
    (directory / "alembic.ini").write_text("[alembic]\nscript_location = %(here)s\npath_separator = os\n")
    (directory / "script.py.mako").write_text((MIGRATIONS / "script.py.mako").read_text())
    (directory / "env.py").write_text(
        "import sqlalchemy as sa\n"
        "from fastapi_building_blocks.infrastructure import BinaryString, ExactDecimal, UtcDateTime\n"
        "from fastapi_building_blocks.infrastructure.database.migrations import run_migrations\n"
        "metadata = sa.MetaData()\n"
        "sa.Table('orders', metadata, sa.Column('id', sa.Uuid(), primary_key=True),\n"
        "    sa.Column('paid', sa.Boolean(), server_default=sa.false(), nullable=False),\n"
        "    sa.Column('code', BinaryString(10)), sa.Column('price', ExactDecimal(30, 2)),\n"
        "    sa.Column('placed_at', UtcDateTime(), nullable=False), sa.Column('details', sa.JSON()))\n"
        "run_migrations(metadata, '')\n"
    )
    for number, body in enumerate(revisions, 1):
        before = repr(f"{number - 1}") if number > 1 else "None"
        (directory / "versions" / f"{number}.py").write_text(
            f"import sqlalchemy as sa\nfrom alembic import op\nrevision = '{number}'\ndown_revision = {before}\n"
            f"def upgrade():\n    {body}\ndef downgrade():\n    pass\n"
        )
    return directory


CREATE = "op.create_table('things', sa.Column('id', sa.Integer(), primary_key=True), sa.Column('name', sa.String(20)))"


@pytest.mark.parametrize("database_url", ["sqlite", "postgres"], indirect=True)
async def test_a_migration_that_fails_leaves_nothing_behind(database_url: str, tmp_path: Path):
    directory = write_environment(tmp_path, CREATE, f"{CREATE.replace('things', 'more')}; raise ZeroDivisionError")
    with pytest.raises(ZeroDivisionError):
        await upgrade(database_url, directory)
    assert await on_connection(database_url, tables) == set()


async def test_a_batch_alters_a_table_on_every_database_and_keeps_its_rows(database_url: str, tmp_path: Path):
    fill = "op.execute(\"INSERT INTO things (id, name) VALUES (1, 'one')\")"
    alter = (
        "\n    with op.batch_alter_table('things') as batch:\n"
        "        batch.alter_column('name', existing_type=sa.String(20), type_=sa.String(40), nullable=False)\n"
        "        batch.create_unique_constraint('uq_things_name', ['name'])"
    )
    await upgrade(database_url, write_environment(tmp_path, CREATE, fill, alter))

    def look(connection: sa.Connection) -> Any:
        return connection.execute(sa.text("SELECT id, name FROM things")).all(), [
            constraint["name"] for constraint in sa.inspect(connection).get_unique_constraints("things")
        ]

    assert await on_connection(database_url, look) == ([(1, "one")], ["uq_things_name"])


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
async def test_a_batch_on_sqlite_keeps_the_rows_that_refer_to_the_table(database_url: str, tmp_path: Path):
    parents = "op.create_table('things', sa.Column('id', sa.Integer(), primary_key=True), sa.Column('x', sa.String(9)))"
    children = (
        "op.create_table('parts', sa.Column('id', sa.Integer(), primary_key=True), "
        "sa.Column('thing', sa.Integer(), sa.ForeignKey('things.id', ondelete='CASCADE')))"
    )
    fill = "op.execute('INSERT INTO things (id) VALUES (1)'); op.execute('INSERT INTO parts VALUES (1, 1)')"
    alter = "\n    with op.batch_alter_table('things') as batch:\n        batch.drop_column('x')"
    await upgrade(database_url, write_environment(tmp_path, parents, children, fill, alter))
    count = sa.text("SELECT count(*) FROM parts")
    assert await on_connection(database_url, lambda connection: connection.scalar(count)) == 1


async def test_a_generated_migration_is_portable_and_complete(database_url: str, tmp_path: Path):
    directory = write_environment(tmp_path)

    def generate(connection: sa.Connection) -> None:
        config = Config(directory / "alembic.ini")
        config.attributes["connection"] = connection
        command.revision(config, "orders", autogenerate=True, rev_id="1")

    await on_connection(database_url, generate)
    (written,) = (path.read_text() for path in (directory / "versions").glob("*.py"))
    for spelled in (
        "from fastapi_building_blocks.infrastructure.database.types import UtcDateTime",
        "sa.Column('placed_at', UtcDateTime(), nullable=False)",
        "BinaryString(length=10)",
        "ExactDecimal(precision=30, scale=2)",
        "server_default=sa.false()",
    ):
        assert spelled in written
    await upgrade(database_url, directory)

    def check(connection: sa.Connection) -> None:
        config = Config(directory / "alembic.ini")
        config.attributes["connection"] = connection
        command.check(config)  # raises where anything is left to do

    await on_connection(database_url, check)


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
