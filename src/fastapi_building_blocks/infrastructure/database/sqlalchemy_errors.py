"""Driver errors to domain errors: the one place where they are translated, by the codes that dialects list."""

from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError, StatementError

from fastapi_building_blocks.domain.errors import (
    BuildingBlocksError,
    CommitOutcomeUnknownError,
    ConflictError,
    ConnectionLostError,
    ConstraintError,
    DeadlockError,
    DuplicateKeyError,
    ForeignKeyError,
    InvalidInputError,
    LockNotAvailableError,
    SerializationError,
    StatementTimeoutError,
    UnavailableError,
    UnsupportedOperationError,
)

from .dialects import PortableDialect

_DETAILS: dict[type[BuildingBlocksError], str] = {
    ConflictError: "the values clash with what is stored",
    ForeignKeyError: "what is referenced does not exist, or this is still referenced",
    LockNotAvailableError: "another transaction holds a lock on it",
    InvalidInputError: "the database cannot hold a value as it is",
    DeadlockError: "the database ended the transaction to resolve a deadlock or a long wait for a lock",
    SerializationError: "the transaction clashed with another one that committed first",
    ConnectionLostError: "the connection to the database was lost or could not be made",
    UnavailableError: "the database cannot take the statement now",
    StatementTimeoutError: "the database did not finish the statement in time",
    UnsupportedOperationError: "a read-only transaction cannot write",
}


def driver_error(error: BaseException) -> BaseException:
    """Return the driver's own error under those that SQLAlchemy put around it."""
    if isinstance(error, StatementError) and error.orig is not None:
        error = error.orig
    # An adapter that emulates the DBAPI's errors has the driver's own, or at least was raised from it.
    return error.orig or error.__cause__ or error if isinstance(error, sa.exc.EmulatedDBAPIException) else error


def translate(error: Exception, dialect: PortableDialect, statement: Any = None) -> Exception:
    """Return the domain's error for a driver's or SQLAlchemy's; what is not about the database comes back as it is.

    Args:
        statement: what was being run; a table that it knows turns a constraint's name into fields.
    """
    if isinstance(error, BuildingBlocksError):
        return error
    cause = driver_error(error)
    failure = dialect.classify(cause, statement)
    if failure is not None:
        return _domain_error(failure.error, failure.constraint, failure.columns, dialect, _table_of(statement))
    if isinstance(cause, TimeoutError):
        return ConnectionLostError("the database did not accept a connection in time")
    if isinstance(cause, UnicodeEncodeError):
        return InvalidInputError("a text holds characters that cannot be encoded")
    if isinstance(error, DBAPIError) or cause is not error or type(cause).__module__.startswith(_DRIVERS):
        return BuildingBlocksError("the database refused the statement")
    return error


_DRIVERS = ("asyncpg", "pymysql", "aiomysql", "asyncmy", "sqlite3", "pyodbc")


def translate_commit(error: Exception, dialect: PortableDialect) -> Exception:
    """Return the domain's error for one that COMMIT raised: if the connection broke, the outcome is unknown."""
    failure = translate(error, dialect)
    if isinstance(failure, ConnectionLostError) or isinstance(driver_error(error), TimeoutError):
        return outcome_unknown()
    return failure


def outcome_unknown() -> CommitOutcomeUnknownError:
    """Return the error of a COMMIT that was sent and not answered."""
    return CommitOutcomeUnknownError("COMMIT was sent and not answered; whether the transaction was kept is unknown")


def write_unknown() -> CommitOutcomeUnknownError:
    """Return the error of a single write that was sent and not answered: it is a transaction of its own."""
    return CommitOutcomeUnknownError("a write was sent and not answered; whether it was kept is unknown")


def out_of_time() -> StatementTimeoutError:
    """Return the error of a call that the session has ended because the database did not."""
    return StatementTimeoutError("the database did not answer in time")


def _table_of(statement: Any) -> sa.Table | None:
    table = getattr(statement, "table", None)
    return table if isinstance(table, sa.Table) else None


def _domain_error(
    kind: type[BuildingBlocksError],
    constraint: str | None,
    columns: tuple[str, ...],
    dialect: PortableDialect,
    table: sa.Table | None,
) -> BuildingBlocksError:
    fields = _fields(columns, constraint, dialect, table)
    if kind is DuplicateKeyError:
        names = " and ".join(fields) or "a unique value"
        return DuplicateKeyError(f"{names} is already taken", fields=fields)
    if kind is ConstraintError:
        names = " and ".join(fields) or "a value"
        return ConstraintError(f"{names} is missing or outside of what the database allows", fields=fields)
    return kind(_DETAILS[kind], fields=fields)


def _fields(
    columns: tuple[str, ...], constraint: str | None, dialect: PortableDialect, table: sa.Table | None
) -> tuple[str, ...]:
    if table is None:
        return columns
    if constraint:
        named = dialect.columns_of(constraint, table)
        if named:
            return named
    keys = {column.name: column.key for column in table.columns}
    return tuple(keys[name] for name in columns if name in keys)
