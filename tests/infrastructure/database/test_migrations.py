"""Alembic as services get it: any database, whole or not at all, and generated migrations that are portable."""

import asyncio
import importlib
import sys
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from fastapi_building_blocks.domain import ConnectionLostError, DeadlineExceededError, UnavailableError
from fastapi_building_blocks.infrastructure import SQLAlchemySession, deadline
from fastapi_building_blocks.infrastructure.database import migrations
from fastapi_building_blocks.infrastructure.database.dialects.postgresql import PostgreSQLDialect
from fastapi_building_blocks.infrastructure.database.migrations import downgrade, upgrade
from fastapi_building_blocks.infrastructure.database.plain_types import adapt_dialect
from fastapi_building_blocks.testing import FaultProxy
from tests.backends import run_apart

MODULE = "fastapi_building_blocks.infrastructure.database.migrations"
TEMPLATE = """import sqlalchemy as sa
from alembic import op
${imports if imports else ""}
revision = ${repr(up_revision)}
down_revision = ${repr(down_revision)}

def upgrade():
    ${upgrades if upgrades else "pass"}

def downgrade():
    ${downgrades if downgrades else "pass"}
"""
ENVIRONMENT = """import os
import sqlalchemy as sa
from fastapi_building_blocks.infrastructure import BinaryString, ExactDecimal, UtcDateTime, timestamp_columns
from fastapi_building_blocks.infrastructure.database.migrations import run_migrations

metadata = sa.MetaData()
sa.Table(
    "orders", metadata, sa.Column("id", sa.Uuid(), primary_key=True),
    sa.Column("paid", sa.Boolean(), server_default=sa.true(), nullable=False),
    sa.Column("sent", sa.Boolean(), server_default=sa.false(), nullable=False),
    sa.Column("code", BinaryString(10)), sa.Column("price", ExactDecimal(30, 2)),
    sa.Column("placed_at", UtcDateTime(), nullable=False), sa.Column("details", sa.JSON()), *timestamp_columns(),
)
run_migrations(metadata, os.environ.get("URL_OF_TEST", ""), unmanaged={"by_hand"})
"""


async def on_connection(url: str, work: Any) -> Any:
    engine = create_async_engine(url, poolclass=NullPool)
    adapt_dialect(engine.dialect)
    async with engine.begin() as connection:
        return await connection.run_sync(work)


def tables(connection: sa.Connection) -> set[str]:
    return set(sa.inspect(connection).get_table_names())


def config_on(connection: sa.Connection, directory: Path) -> Config:
    config = Config(directory / "alembic.ini")
    config.attributes["connection"] = connection
    return config


def write_environment(directory: Path, *revisions: str) -> Path:
    (directory / "versions").mkdir()
    (directory / "alembic.ini").write_text("[alembic]\nscript_location = %(here)s\npath_separator = os\n")
    (directory / "script.py.mako").write_text(TEMPLATE)
    (directory / "env.py").write_text(ENVIRONMENT)
    for number, body in enumerate(revisions, 1):
        before = repr(f"{number - 1}") if number > 1 else "None"
        (directory / "versions" / f"{number}.py").write_text(
            f"import sqlalchemy as sa\nfrom alembic import op\nrevision = '{number}'\ndown_revision = {before}\n"
            f"def upgrade():\n    {body}\ndef downgrade():\n    op.drop_table('things')\n"
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
    await on_connection(
        database_url,
        lambda connection: command.revision(config_on(connection, directory), "orders", autogenerate=True, rev_id="1"),
    )
    (written,) = (path.read_text() for path in (directory / "versions").glob("*.py"))
    for spelled in (
        "from fastapi_building_blocks.infrastructure.database.types import UtcDateTime",
        "sa.Column('placed_at', UtcDateTime(), nullable=False)",
        "sa.Column('created_at', UtcDateTime(), server_default=utc_now(), nullable=False)",
        "BinaryString(length=10)",
        "ExactDecimal(precision=30, scale=2)",
        "server_default=sa.true()",
        "server_default=sa.false()",
    ):
        assert spelled in written
    await upgrade(database_url, directory)
    # Raises where anything is left to do.
    await on_connection(database_url, lambda connection: command.check(config_on(connection, directory)))


async def test_autogenerate_leaves_alone_what_is_made_by_hand(database_url: str, tmp_path: Path):
    directory = write_environment(tmp_path)
    await on_connection(
        database_url,
        lambda connection: command.revision(config_on(connection, directory), "orders", autogenerate=True, rev_id="1"),
    )
    await upgrade(database_url, directory)
    by_hand = "CREATE INDEX by_hand ON orders (code)"
    await on_connection(database_url, lambda connection: connection.execute(sa.text(by_hand)))
    await on_connection(database_url, lambda connection: command.check(config_on(connection, directory)))


def test_the_command_line_takes_the_url_of_env_py(database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("URL_OF_TEST", database_url)
    directory = write_environment(tmp_path, CREATE)
    said = StringIO()
    config = Config(directory / "alembic.ini", stdout=said, output_buffer=said)
    command.upgrade(config, "head")
    command.current(config)
    assert "1 (head)" in said.getvalue()
    command.downgrade(config, "base")
    command.upgrade(config, "head", sql=True)
    assert "CREATE TABLE things" in said.getvalue()
    assert run_apart(on_connection(database_url, tables)) == {"alembic_version"}


async def test_a_running_service_migrates_forth_and_back(database_url: str, tmp_path: Path):
    directory = write_environment(tmp_path, CREATE)
    path = list(sys.path)
    await upgrade(database_url, directory)
    assert await on_connection(database_url, tables) == {"things", "alembic_version"}
    await downgrade(database_url, directory, "base")
    assert await on_connection(database_url, tables) == {"alembic_version"}
    assert sys.path == path


async def test_of_processes_that_migrate_an_empty_database_at_once_all_but_one_find_it_done(
    database_url: str, tmp_path: Path
):
    directory = write_environment(tmp_path, CREATE)
    go = tmp_path / "go"
    script = (
        f"import asyncio, pathlib; from {MODULE} import upgrade\n"
        f"print('ready', flush=True)\nwhile not pathlib.Path({str(go)!r}).exists(): pass\n"
        f"asyncio.run(upgrade({database_url!r}, {str(directory)!r}))"
    )
    processes = [
        await asyncio.create_subprocess_exec(sys.executable, "-c", script, stdout=asyncio.subprocess.PIPE)
        for _ in range(4)
    ]
    async with asyncio.timeout(60):
        for process in processes:
            assert process.stdout is not None
            assert await process.stdout.readline() == b"ready\n"
        go.touch()
        assert [await process.wait() for process in processes] == [0, 0, 0, 0]
    assert await on_connection(database_url, tables) == {"things", "alembic_version"}


async def test_who_waits_too_long_for_another_migration_is_told(
    postgres_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(f"{MODULE}._LOCK_WINDOW", 0.2)
    directory = write_environment(tmp_path, CREATE)
    lock = PostgreSQLDialect.migration_lock
    engine = create_async_engine(postgres_url, poolclass=NullPool)
    async with engine.connect() as other, asyncio.timeout(10):
        assert await other.scalar(sa.text(lock or "")) == 1
        with pytest.raises(UnavailableError, match="another process"):
            await upgrade(postgres_url, directory)


async def test_a_database_in_memory_is_migrated_on_its_own_sessions_connection(tmp_path: Path):
    fill = "op.execute(\"INSERT INTO things (id, name) VALUES (1, 'one')\")"
    alter = "\n    with op.batch_alter_table('things') as batch:\n        batch.drop_column('name')"
    directory = write_environment(tmp_path, CREATE, fill, alter)
    async with SQLAlchemySession("sqlite+aiosqlite:///:memory:") as session:
        await upgrade(session, directory)
        await upgrade(session, directory)
        assert (await session.execute(sa.text("SELECT * FROM things"))).all() == [(1,)]
        assert (await session.execute(sa.text("PRAGMA foreign_keys"))).scalar() == 1


async def test_a_migration_that_fails_leaves_a_database_in_memory_with_its_foreign_keys(tmp_path: Path):
    fill = "op.execute(\"INSERT INTO things (id, name) VALUES (1, 'one')\"); raise ZeroDivisionError"
    directory = write_environment(tmp_path, CREATE, fill)
    async with SQLAlchemySession("sqlite+aiosqlite:///:memory:") as session:
        with pytest.raises(ZeroDivisionError):
            await upgrade(session, directory)
        assert (await session.execute(sa.text("PRAGMA foreign_keys"))).scalar() == 1


async def test_a_session_stands_for_its_url(database_url: str, tmp_path: Path):
    await upgrade(SQLAlchemySession(database_url), write_environment(tmp_path, CREATE))
    assert await on_connection(database_url, tables) == {"things", "alembic_version"}


@pytest.mark.parametrize("scheme", ["postgresql+asyncpg", "mysql+aiomysql"])
async def test_a_server_that_is_not_there_is_unavailable(scheme: str, tmp_path: Path):
    directory = write_environment(tmp_path, CREATE)
    with pytest.raises(UnavailableError):
        await upgrade(f"{scheme}://u:p@127.0.0.1:1/name", directory)


@pytest.mark.parametrize("database_url", ["postgres", "mysql", "asyncmy"], indirect=True)
@pytest.mark.parametrize("falls_silent", ["at once", "before the lock"])
@pytest.mark.parametrize("failure", [ConnectionLostError, DeadlineExceededError])
async def test_a_server_that_says_nothing_is_not_waited_for(
    database_url: str, falls_silent: str, failure: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    directory = write_environment(tmp_path, CREATE)
    wait_for_others, place = migrations._wait_for_others, sa.make_url(database_url)
    async with FaultProxy(place.host or "", place.port or 0) as proxy, asyncio.timeout(10):

        async def wait_in_vain(*arguments: Any) -> None:
            proxy.blackhole()
            await wait_for_others(*arguments)

        monkeypatch.setattr(migrations, "_wait_for_others", wait_in_vain)
        if falls_silent == "at once":
            proxy.blackhole()
        session = SQLAlchemySession(proxy.url(database_url), connect_timeout=1.0)
        with deadline(0.5 if failure is DeadlineExceededError else 30.0), pytest.raises(failure):
            await upgrade(session, directory)


async def test_who_waits_for_another_migration_heeds_the_deadline(postgres_url: str, tmp_path: Path):
    directory = write_environment(tmp_path, CREATE)
    engine = create_async_engine(postgres_url, poolclass=NullPool)
    async with engine.connect() as other, asyncio.timeout(10):
        assert await other.scalar(sa.text(PostgreSQLDialect.migration_lock or "")) == 1
        with deadline(1.0), pytest.raises(DeadlineExceededError):
            await upgrade(postgres_url, directory)


@pytest.mark.parametrize("database_url", ["postgres"], indirect=True)
async def test_a_migration_may_take_longer_than_the_time_to_connect(database_url: str, tmp_path: Path):
    directory = write_environment(tmp_path, f"op.execute('SELECT pg_sleep(3.1)'); {CREATE}")
    with deadline(3.0):
        await upgrade(SQLAlchemySession(database_url, connect_timeout=3.0), directory)
    assert await on_connection(database_url, tables) == {"things", "alembic_version"}


async def test_a_migration_that_is_refused_shows_no_values(sqlite_url: str, tmp_path: Path):
    fill = "op.bulk_insert(sa.table('nowhere', sa.column('name')), [{'name': 'hunter2'}])"
    with pytest.raises(sa.exc.OperationalError) as caught:
        await upgrade(sqlite_url, write_environment(tmp_path, CREATE, fill))
    assert "hunter2" not in str(caught.value)


def test_a_missing_alembic_names_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delitem(sys.modules, MODULE)
    monkeypatch.setitem(sys.modules, "alembic", None)
    with pytest.raises(ImportError, match=r"pip install 'fastapi-building-blocks\[migrations\]'"):
        importlib.import_module(MODULE)
