"""The time that SQLAlchemy's own calls may take, on ``session.engine``: as much as the session's."""

import asyncio
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine, ExceptionContext, ExecutionContext

from fastapi_building_blocks.domain.errors import StatementTimeoutError

from .connections import ConnectionPool, PooledConnection
from .dialects import PortableDialect
from .sqlalchemy_errors import out_of_time, outcome_unknown, translate

logger = logging.getLogger(__name__)

_UNDOING = 2.0
"""Seconds, whatever the deadline, for what a connection needs before the next one can use it."""


class LateCallError(TimeoutError):
    """The time of a call is over. After a ``TimeoutError`` SQLAlchemy gives the connection up."""

    def __init__(self, failure: Exception) -> None:
        super().__init__()
        self.failure = failure
        """What its caller is raised."""


def keep_time(engine: Engine, pool: ConnectionPool, ours: PortableDialect) -> None:
    """End the calls of an engine that take longer than a dialect's patience, or than the deadline around them leaves.

    They raise ``StatementTimeoutError``, whoever ended them, and ``CommitOutcomeUnknownError`` where it was COMMIT.
    """
    dialect: Any = engine.dialect
    patience = ours.patience

    def lent(handle: Any) -> PooledConnection | None:
        return handle if isinstance(handle, PooledConnection) else pool.find(handle.dbapi_connection)

    def execution(call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            context = arguments[-1]
            if not isinstance(context, ExecutionContext):  # of SQLAlchemy's own, on a connection that is being opened
                return call(*arguments)
            return _timed(lent(context.root_connection.connection), patience, call, arguments)

        return timed

    for name in ("do_execute", "do_executemany", "do_execute_no_params"):
        setattr(dialect, name, execution(getattr(dialect, name)))
    undoing = min(patience, _UNDOING)
    _keep_time_of_isolation(dialect, pool, patience, undoing)
    commit, rollback = dialect.do_commit, dialect.do_rollback
    dialect.do_commit = lambda handle: _timed(lent(handle), patience, commit, (handle,), outcome_unknown)
    dialect.do_rollback = lambda handle: _timed(lent(handle), undoing, rollback, (handle,), heeds_deadline=False)

    @sa.event.listens_for(engine, "handle_error")
    def say(context: ExceptionContext) -> Exception | None:
        """Return what to raise for a call that was ended, here or by the database."""
        error = context.original_exception
        if isinstance(error, LateCallError):
            return error.failure
        if context.engine is pool.engine or not isinstance(error, Exception):
            return None  # what the session runs itself it translates itself
        failure = translate(error, ours)
        return failure if isinstance(failure, StatementTimeoutError) else None


def _keep_time_of_isolation(dialect: Any, pool: ConnectionPool, patience: float, undoing: float) -> None:
    """Do so for isolation levels, where SQLAlchemy handles no errors: neither theirs nor what they leave behind."""
    begin, end = dialect.set_isolation_level, dialect.reset_isolation_level
    set_options = dialect._set_connection_characteristics

    def set_handled(connection: Connection, options: Mapping[str, Any]) -> None:
        try:
            set_options(connection, options)
        except BaseException as error:  # noqa: BLE001 - raised again, as that of a statement is
            connection._handle_dbapi_exception(error, None, None, None, None)

    def reset(driver: Any) -> None:
        connection = pool.find(driver)
        try:
            _timed(connection, undoing, end, (driver,), heeds_deadline=False)
        except Exception as error:
            if connection is None:
                raise
            # Whoever returns a connection is done with it, or is raised an error of his own already.
            logger.debug("an isolation level could not be set back; the connection is given up", exc_info=True)
            connection.record.invalidate(error)

    dialect.set_isolation_level = lambda driver, level: _timed(pool.find(driver), patience, begin, (driver, level))
    dialect._set_connection_characteristics = set_handled
    dialect.reset_isolation_level = reset


def _timed(
    connection: PooledConnection | None,
    patience: float,
    call: Callable[..., Any],
    arguments: tuple[Any, ...],
    failure: Callable[[], Exception] = out_of_time,
    *,
    heeds_deadline: bool = True,
) -> Any:
    if connection is None or connection.until < math.inf:
        return call(*arguments)  # the session's own call, which has its time
    connection.start_clock(patience, heeds_deadline=heeds_deadline)
    try:
        return call(*arguments)
    except asyncio.CancelledError as error:
        if connection.ran_out_of_time(error):
            raise LateCallError(failure()) from None
        raise
    finally:
        connection.rest()
