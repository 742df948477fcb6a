"""Schema migrations by Alembic, on any database that sessions run on.

``env.py`` of a service is one call of ``run_migrations``, and a service that migrates itself awaits ``upgrade``. The
``alembic`` command works as its own documentation says, autogenerate included.
"""

import asyncio
import logging.config
import math
import time
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool

from fastapi_building_blocks.domain.errors import UnavailableError, UnsupportedOperationError

from .deadlines import time_left
from .dialects import Timeouts, dialect_for
from .plain_types import adapt_dialect
from .sqlalchemy_errors import driver_error, translate
from .sqlalchemy_session import SQLAlchemySession

try:
    from alembic import command, context
    from alembic.autogenerate.api import AutogenContext
    from alembic.config import Config
except ImportError as error:
    raise ImportError(
        "migrations need Alembic, which is not installed: pip install 'fastapi-building-blocks[migrations]'"
    ) from error

logger = logging.getLogger(__name__)

_CONNECTION = "connection"
_TYPES = "fastapi_building_blocks.infrastructure.database.types"
_NO_TIMEOUTS = Timeouts(connect=5.0, statement=None)
_LOCK_WINDOW = 600.0
_LOCK_DELAY = 0.1


async def upgrade(database: str | sa.URL | SQLAlchemySession, directory: str | Path, revision: str = "head") -> None:
    """Bring the database to a revision; one that is there already is left as it is.

    Of processes that do so at once, each waits for the one before it, and finds it done.

    What runs is one transaction where the database has transactional DDL (PostgreSQL, SQLite, SQL Server): a migration
    that fails leaves nothing behind. MySQL and MariaDB commit every DDL statement as it runs. No statement timeout
    applies, because an index may take its time; the connect timeout and a deadline bound what comes before it.

    Args:
        database: its URL, or a session of it: connected, where the database is in memory and so the session's alone.
            PostgreSQL's own, where sessions go through PgBouncer: the lock belongs to a connection.
        directory: where ``alembic.ini`` lies.
        revision: its id, or ``"head"`` for the newest.

    Raises:
        UnavailableError: the database cannot be reached, or another process has been migrating it for ten minutes.
        DeadlineExceededError: the deadline around the call has passed before the migration could begin.
        UnsupportedOperationError: the session goes through PgBouncer.
    """
    await _run_command(command.upgrade, database, directory, revision)


async def downgrade(database: str | sa.URL | SQLAlchemySession, directory: str | Path, revision: str) -> None:
    """Take the database back to a revision, alone and in one transaction like ``upgrade``.

    Args:
        database: its URL or session, as for ``upgrade``.
        directory: where ``alembic.ini`` lies.
        revision: its id, or ``"base"`` for before the first one.

    Raises:
        UnavailableError: the database cannot be reached, or another process has been migrating it for ten minutes.
        DeadlineExceededError: the deadline around the call has passed before the migration could begin.
        UnsupportedOperationError: the session goes through PgBouncer.
    """
    await _run_command(command.downgrade, database, directory, revision)


def run_migrations(target_metadata: sa.MetaData, url: str | sa.URL, unmanaged: Collection[str] = ()) -> None:
    """Do what Alembic was asked to do; the whole of an ``env.py``.

    Args:
        target_metadata: the tables as they should be, for autogenerate.
        url: the database, where Alembic was started from the command line.
        unmanaged: indexes and tables that autogenerate leaves alone, because a migration makes them by hand.
    """

    def is_managed(_item: Any, name: str | None, _kind: str, _reflected: bool, _counterpart: Any) -> bool:
        return name not in unmanaged

    def configure(**where: Any) -> None:
        context.configure(
            target_metadata=target_metadata,
            include_object=is_managed,
            render_item=_render_portably,
            # SQLite has no ALTER beyond the simplest: there a table is copied, elsewhere batches are plain ALTERs.
            render_as_batch=True,
            **where,
        )
        with context.begin_transaction():
            context.run_migrations()

    def on_connection(connection: sa.Connection) -> None:
        transactional_ddl = True if connection.dialect.name == "sqlite" else None
        configure(connection=connection, transactional_ddl=transactional_ddl)

    given = context.config.attributes.get(_CONNECTION)
    if given is not None:
        on_connection(given)
        return
    if context.config.config_file_name and context.config.file_config.has_section("loggers"):
        logging.config.fileConfig(context.config.config_file_name, disable_existing_loggers=False)
    if context.is_offline_mode():
        configure(dialect_name=sa.make_url(url).get_backend_name(), literal_binds=True)
    else:
        asyncio.run(_on_own_connection(url, on_connection))


async def _run_command(
    alembic_command: Callable[[Config, str], None],
    database: str | sa.URL | SQLAlchemySession,
    directory: str | Path,
    revision: str,
) -> None:
    config = Config(Path(directory) / "alembic.ini")
    # The service's modules are importable already; the search path is not Alembic's to change here.
    config.set_main_option("prepend_sys_path", "")

    def run(connection: sa.Connection) -> None:
        config.attributes[_CONNECTION] = connection
        alembic_command(config, revision)

    if isinstance(database, SQLAlchemySession) and not database.dialect.keeps_sessions:
        raise UnsupportedOperationError(
            "migrations need a connection of their own, for the lock that keeps others out: give the URL of PostgreSQL "
            "itself, not a session behind PgBouncer"
        )
    url = database.engine.url if isinstance(database, SQLAlchemySession) else sa.make_url(database)
    patience = database.dialect.timeouts.connect if isinstance(database, SQLAlchemySession) else _NO_TIMEOUTS.connect
    if isinstance(database, SQLAlchemySession) and database.dialect.in_memory:
        async with database.engine.connect() as connection:
            # A batch drops the table that it has copied; rows that refer to it are to stay.
            await connection.exec_driver_sql("PRAGMA foreign_keys = OFF")
            try:
                await connection.run_sync(run)
                await connection.commit()
            finally:
                await connection.rollback()  # within a transaction that has failed, the pragma does nothing
                await connection.exec_driver_sql("PRAGMA foreign_keys = ON")
    else:
        try:
            await _on_own_connection(url, run, patience)
        except (DBAPIError, OSError) as error:
            # What was refused is for whoever wrote the migration, in the database's words.
            failure = translate(error, dialect_for(url, _NO_TIMEOUTS))
            if isinstance(failure, UnavailableError):
                raise failure from driver_error(error)
            raise


async def _on_own_connection(
    url: str | sa.URL, work: Callable[[sa.Connection], None], patience: float = _NO_TIMEOUTS.connect
) -> None:
    engine = create_async_engine(url, poolclass=NullPool, hide_parameters=True)
    adapt_dialect(engine.dialect)
    if engine.dialect.name == "sqlite":
        _begin_explicitly(engine)
    async with _answered_within(patience):
        connection = await engine.connect()
    async with aclosing(connection):
        await _wait_for_others(connection, patience)
        await connection.run_sync(work)
        await connection.commit()


async def _wait_for_others(connection: AsyncConnection, patience: float) -> None:
    """Take the lock under which a database is migrated; it ends with the connection."""
    lock = dialect_for(connection.engine.url, _NO_TIMEOUTS).migration_lock
    if lock is None:
        return
    give_up = time.monotonic() + _LOCK_WINDOW
    has_waited = False
    # Asked again and again, since a query that waits keeps a snapshot, for which CREATE INDEX CONCURRENTLY would wait.
    while True:
        async with _answered_within(patience):
            is_ours = await connection.scalar(sa.text(lock))
            await connection.commit()
        if is_ours:
            return
        if time.monotonic() > give_up:
            raise UnavailableError("another process has been migrating the database for too long")
        if not has_waited:
            logger.info("waiting for another process that migrates the database")
        has_waited = True
        await asyncio.sleep(_LOCK_DELAY)


@asynccontextmanager
async def _answered_within(patience: float) -> AsyncIterator[None]:
    """Bound what a database that is there answers at once, by seconds and the deadline around the call."""
    try:
        async with asyncio.timeout(min(patience, time_left() or math.inf)):
            yield
    except TimeoutError:
        time_left()  # raises if it was the deadline
        raise


def _begin_explicitly(engine: AsyncEngine) -> None:
    """Have DDL take part in transactions, and concurrent runs wait for each other: SQLite's driver does neither."""

    @event.listens_for(engine.sync_engine, "connect")
    def leave_transactions_to_us(connection: Any, _record: Any) -> None:
        connection.isolation_level = None

    @event.listens_for(engine.sync_engine, "begin")
    def begin(connection: sa.Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")


def _render_portably(kind: str, item: Any, autogenerate: AutogenContext) -> str | Literal[False]:
    """Write what this library and SQLAlchemy spell the same for every database; leave the rest to Alembic."""
    if kind == "server_default":
        item = getattr(item, "arg", item)
        if isinstance(item, sa.True_ | sa.False_):
            return "sa.true()" if isinstance(item, sa.True_) else "sa.false()"
    if kind not in ("type", "server_default") or type(item).__module__ != _TYPES:
        return False
    name = type(item).__name__
    autogenerate.imports.add(f"from {_TYPES} import {name}")
    return repr(item) if kind == "type" else f"{name}()"
