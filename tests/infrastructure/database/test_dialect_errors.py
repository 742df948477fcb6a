"""What each dialect makes of its driver's errors: the class by the code, and what the error is about."""

import sqlite3
from typing import Any

import asyncpg
import pymysql
import pytest
import sqlalchemy as sa
from sqlalchemy import make_url

from fastapi_building_blocks.domain import errors
from fastapi_building_blocks.domain.errors import (
    BuildingBlocksError,
    ConnectionLostError,
    ConstraintError,
    DuplicateKeyError,
    ForeignKeyError,
    LockNotAvailableError,
    StatementTimeoutError,
)
from fastapi_building_blocks.infrastructure import SQLAlchemySession
from fastapi_building_blocks.infrastructure.database.dialects import PortableDialect, Timeouts, dialect_for
from fastapi_building_blocks.infrastructure.database.sqlalchemy_errors import translate

URLS = {
    "postgres": "postgresql+asyncpg://h/db",
    "mysql": "mysql+aiomysql://h/db",
    "sqlite": "sqlite+aiosqlite:///file.db",
    "mssql": "mssql+aioodbc://h/db",
}
# What only the library itself says.
OWN = {
    errors.BuildingBlocksError,
    errors.NotFoundError,
    errors.StaleVersionError,
    errors.MultipleResultsError,
    errors.InvalidQueryError,
    errors.TransientError,
    errors.CommitOutcomeUnknownError,
    errors.CircuitOpenError,
    errors.DeadlineExceededError,
    errors.PoolTimeoutError,
}
# What a database has no code for, or not even the thing.
NEVER = {
    "postgres": {errors.UnavailableError},
    "mysql": {errors.ConflictError, errors.UnavailableError},
    "sqlite": {errors.ConflictError, errors.LockNotAvailableError, errors.InvalidInputError},
    "mssql": {errors.ConflictError},
}


class Locking:
    """The statement of a read that does not wait."""

    lock = "nowait"


def dialect(database: str) -> PortableDialect:
    return dialect_for(make_url(URLS[database]), Timeouts(5.0, 30.0))


def postgres_error(code: str) -> Exception:
    error: Exception = asyncpg.PostgresError.new({"S": "ERROR", "C": code, "M": "secret"})
    return error


def mysql_error(code: int) -> Exception:
    return pymysql.err.OperationalError(code, "secret")


def sqlite_error(code: int) -> Exception:
    error = sqlite3.OperationalError("secret")
    error.sqlite_errorcode = code
    return error


def mssql_error(code: int, message: str = "secret") -> Exception:
    """As pyodbc words it; the driver itself needs a library of the system."""
    server = "[Microsoft][ODBC Driver 18 for SQL Server][SQL Server]"
    end = f"[01000] {server}The statement has been terminated. (3621)"
    return Exception("23000", f"[23000] {server}{message} ({code}) (SQLExecDirectW); {end}")


MAKE: dict[str, Any] = {
    "postgres": postgres_error,
    "mysql": mysql_error,
    "sqlite": sqlite_error,
    "mssql": mssql_error,
}
# From the manuals, not from the tables under test.
CODES: dict[str, dict[Any, type[BuildingBlocksError]]] = {
    "postgres": {
        "23505": errors.DuplicateKeyError,
        "23503": errors.ForeignKeyError,
        "23001": errors.ForeignKeyError,
        "23502": errors.ConstraintError,
        "23514": errors.ConstraintError,
        "22001": errors.ConstraintError,
        "22003": errors.ConstraintError,
        "22021": errors.InvalidInputError,
        "22P02": errors.InvalidInputError,
        "23P01": errors.ConflictError,
        "25006": errors.UnsupportedOperationError,
        "40001": errors.SerializationError,
        "40P01": errors.DeadlockError,
        "55P03": errors.LockNotAvailableError,
        "57014": errors.StatementTimeoutError,
        "57P01": errors.ConnectionLostError,
        "08006": errors.ConnectionLostError,
        "53300": errors.ConnectionLostError,
    },
    "mysql": {
        1062: errors.DuplicateKeyError,
        1586: errors.DuplicateKeyError,
        1451: errors.ForeignKeyError,
        1452: errors.ForeignKeyError,
        1048: errors.ConstraintError,
        1406: errors.ConstraintError,
        1264: errors.ConstraintError,
        3819: errors.ConstraintError,
        4025: errors.ConstraintError,
        1366: errors.InvalidInputError,
        1213: errors.DeadlockError,
        1205: errors.DeadlockError,
        1020: errors.SerializationError,
        3572: errors.LockNotAvailableError,
        1792: errors.UnsupportedOperationError,
        1969: errors.StatementTimeoutError,
        3024: errors.StatementTimeoutError,
        2006: errors.ConnectionLostError,
        2013: errors.ConnectionLostError,
    },
    "sqlite": {
        sqlite3.SQLITE_CONSTRAINT_UNIQUE: errors.DuplicateKeyError,
        sqlite3.SQLITE_CONSTRAINT_PRIMARYKEY: errors.DuplicateKeyError,
        sqlite3.SQLITE_CONSTRAINT_FOREIGNKEY: errors.ForeignKeyError,
        sqlite3.SQLITE_CONSTRAINT_NOTNULL: errors.ConstraintError,
        sqlite3.SQLITE_CONSTRAINT_CHECK: errors.ConstraintError,
        sqlite3.SQLITE_BUSY: errors.DeadlockError,
        sqlite3.SQLITE_BUSY_SNAPSHOT: errors.SerializationError,
        sqlite3.SQLITE_INTERRUPT: errors.StatementTimeoutError,
        sqlite3.SQLITE_READONLY: errors.UnsupportedOperationError,
        sqlite3.SQLITE_CANTOPEN: errors.ConnectionLostError,
        sqlite3.SQLITE_IOERR_READ: errors.UnavailableError,
        sqlite3.SQLITE_FULL: errors.UnavailableError,
    },
    "mssql": {
        2627: errors.DuplicateKeyError,
        2601: errors.DuplicateKeyError,
        547: errors.ForeignKeyError,
        515: errors.ConstraintError,
        2628: errors.ConstraintError,
        8152: errors.ConstraintError,
        220: errors.ConstraintError,
        8115: errors.ConstraintError,
        245: errors.InvalidInputError,
        1205: errors.DeadlockError,
        1222: errors.DeadlockError,
        3960: errors.SerializationError,
        3952: errors.UnsupportedOperationError,
        650: errors.UnsupportedOperationError,
        596: errors.ConnectionLostError,
        9002: errors.UnavailableError,
    },
}


@pytest.mark.parametrize(
    ("database", "code", "kind"), [(name, *row) for name, codes in CODES.items() for row in codes.items()]
)
def test_a_code_means_what_its_manual_says(database: str, code: Any, kind: type[BuildingBlocksError]):
    failure = translate(MAKE[database](code), dialect(database))
    assert type(failure) is kind
    assert "secret" not in str(failure)


@pytest.mark.parametrize("database", CODES)
def test_every_error_that_a_database_can_mean_is_one_of_its_codes(database: str):
    tree = {item for item in vars(errors).values() if isinstance(item, type) and issubclass(item, BuildingBlocksError)}
    meant = set(CODES[database].values())
    if database == "mssql":
        meant |= {LockNotAvailableError, StatementTimeoutError}  # by the lock that was asked for, and by the state
    assert meant == tree - OWN - NEVER[database]


@pytest.mark.parametrize(("database", "code"), [("mysql", 1205), ("mssql", 1222)])
def test_a_lock_that_was_not_to_be_waited_for_is_no_deadlock(database: str, code: int):
    assert type(translate(MAKE[database](code), dialect(database), Locking)) is LockNotAvailableError


# SQL Server's messages, which hold the code and what it is about


def subject_of(error: Exception) -> tuple[Any, Any, Any]:
    failure = dialect("mssql").classify(error, None)
    assert failure is not None
    return failure.error, failure.constraint, failure.columns


def conflict(kind: str, name: str) -> str:
    where = 'The conflict occurred in database "shop", table "dbo.people", column \'id\'.'
    return f'The INSERT statement conflicted with the {kind} constraint "{name}". {where}'


VIOLATION = "Violation of UNIQUE KEY constraint 'uq_email'. Cannot insert duplicate key in object 'dbo.people'."
INDEX = "Cannot insert duplicate key row in object 'dbo.people' with unique index 'ux_email'."
NULL = "Cannot insert the value NULL into column 'name', table 'shop.dbo.people'; column does not allow nulls."
TRUNCATED = "String or binary data would be truncated in table 'shop.dbo.people', column 'name'. Truncated value: 'x'."


@pytest.mark.parametrize(
    ("code", "message", "expected"),
    [
        (2627, VIOLATION, (DuplicateKeyError, "uq_email", ())),
        (2601, INDEX, (DuplicateKeyError, "ux_email", ())),
        (547, conflict("FOREIGN KEY", "fk_people"), (ForeignKeyError, "fk_people", ())),
        (547, conflict("REFERENCE", "fk_people"), (ForeignKeyError, "fk_people", ())),
        (547, conflict("CHECK", "ck_age"), (ConstraintError, "ck_age", ())),
        (547, conflict("FOREIGN KEY", "CHECK constraint"), (ForeignKeyError, "CHECK constraint", ())),
        (515, NULL, (ConstraintError, None, ("name",))),
        (2628, TRUNCATED, (ConstraintError, None, ("name",))),
        (8152, "String or binary data would be truncated.", (ConstraintError, None, ())),
    ],
)
def test_what_a_message_is_about_is_found_in_it(code: int, message: str, expected: tuple[Any, Any, Any]):
    assert subject_of(mssql_error(code, message)) == expected


def test_a_value_that_a_message_quotes_decides_nothing():
    """Else a client could have its requests replayed by the e-mail address that it sends."""
    sent = "constraint 'x' (1205) (SQLExecDirectW); [40001] y"
    error = mssql_error(2627, f"{VIOLATION} The duplicate key value is ({sent}).")
    assert subject_of(error) == (DuplicateKeyError, "uq_email", ())


@pytest.mark.parametrize(
    ("state", "function", "kind"),
    [
        ("HYT00", "SQLExecDirectW", StatementTimeoutError),
        ("HYT00", "SQLDriverConnect", ConnectionLostError),
        ("HYT01", "SQLExecDirectW", ConnectionLostError),
        ("08S01", "SQLExecDirectW", ConnectionLostError),
        ("08001", "SQLDriverConnect", ConnectionLostError),
    ],
)
def test_what_only_the_driver_noticed_is_known_by_its_state(state: str, function: str, kind: type[Exception]):
    message = f"[{state}] [Microsoft][ODBC Driver 18 for SQL Server]Timeout expired (0) ({function})"
    assert subject_of(Exception(state, message))[0] is kind


@pytest.mark.parametrize("portable", [False, True])
async def test_what_is_closed_in_a_text_of_sqlite_is_not_the_connection(portable: bool):
    """In memory, giving the connection up for lost would lose the database."""
    async with SQLAlchemySession("sqlite+aiosqlite:///:memory:", portable=portable) as session:
        await session.execute(sa.text("CREATE TABLE shops (id INTEGER, closed_at TEXT UNIQUE, CHECK (closed_at > ''))"))
        await session.execute(sa.text("INSERT INTO shops VALUES (1, 'noon')"))
        with pytest.raises(DuplicateKeyError, match="closed_at is already taken"):
            await session.execute(sa.text("INSERT INTO shops VALUES (2, 'noon')"))
        with pytest.raises(ConstraintError):
            await session.execute(sa.text("INSERT INTO shops VALUES (3, '')"))
        with pytest.raises(BuildingBlocksError, match="refused the statement"):
            await session.execute(sa.text("SELECT closed FROM shops"))
        assert (await session.execute(sa.text("SELECT count(*) FROM shops"))).scalar() == 1


# Names of constraints

people = sa.Table(
    "people",
    sa.MetaData(),
    sa.Column("person_id", sa.Integer(), primary_key=True, key="id"),
    sa.Column("e_mail", sa.String(20), unique=True, key="email"),
    sa.Column("city", sa.String(20)),
    sa.Column("street", sa.String(20)),
    sa.Column("nickname", sa.String(20)),
    sa.Column("size", sa.Integer()),
    sa.UniqueConstraint("city", "street", name="uq_place"),
    sa.UniqueConstraint("nickname", "size"),
    sa.Index("ux_nickname", "nickname", unique=True),
)


@pytest.mark.parametrize(
    ("reported", "fields"),
    [
        ("uq_place", ("city", "street")),
        ("ux_nickname", ("nickname",)),
        ("people_pkey", ("id",)),  # PostgreSQL's name
        ("PRIMARY", ("id",)),  # MySQL's
        ("people_e_mail_key", ("email",)),
        ("e_mail", ("email",)),
        ("people_nickname_size_key", ("nickname", "size")),
        ("UQ__people__AB6E6164", ()),  # SQL Server's, which says nothing
    ],
)
def test_the_name_of_a_constraint_leads_to_its_fields(reported: str, fields: tuple[str, ...]):
    assert PortableDialect(Timeouts(5.0, 30.0)).columns_of(reported, people) == fields
