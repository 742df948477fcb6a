"""What errors promise: the database's reason as a class of the domain, with the fields, and without SQL."""

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from typing import Any

import pytest
import sqlalchemy as sa

from fastapi_building_blocks.domain import (
    BuildingBlocksError,
    ConflictError,
    ConstraintError,
    DuplicateKeyError,
    ForeignKeyError,
    InvalidInputError,
    LockNotAvailableError,
    TransientError,
)
from fastapi_building_blocks.domain import errors as domain_errors
from fastapi_building_blocks.infrastructure import SQLAlchemyRepository, SQLAlchemySession
from fastapi_building_blocks.infrastructure.database import sqlalchemy_errors
from fastapi_building_blocks.infrastructure.database.dialects import Timeouts, mssql, mysql, postgresql, sqlite

metadata = sa.MetaData()
teams = sa.Table(
    "teams",
    metadata,
    sa.Column("id", sa.Integer(), primary_key=True),
    sa.Column("name", sa.String(20), nullable=False, unique=True),
    sa.Column("city", sa.String(20)),
    sa.Column("street", sa.String(20)),
    sa.Column("size", sa.SmallInteger()),
    sa.Column("e_mail", sa.String(40), key="email"),
    sa.UniqueConstraint("city", "street", name="uq_place"),
    sa.Index("ux_teams_email", "email", unique=True),
    sa.CheckConstraint("size > 0", name="ck_teams_size"),
)
players = sa.Table(
    "players",
    metadata,
    sa.Column("id", sa.Integer(), primary_key=True),
    sa.Column("team_id", sa.ForeignKey("teams.id"), nullable=False),
)


@dataclasses.dataclass
class Team:
    id: int | None
    name: Any
    city: str | None = None
    street: str | None = None
    size: Any = None
    email: str | None = None


@dataclasses.dataclass
class Player:
    id: int | None
    team_id: int


class Teams(SQLAlchemyRepository[Team]):
    table = teams


class Players(SQLAlchemyRepository[Player]):
    table = players


@pytest.fixture(params=[False, True], ids=["driver", "portable"])
async def session(database_url: str, request: pytest.FixtureRequest) -> AsyncIterator[SQLAlchemySession]:
    async with SQLAlchemySession(database_url, portable=request.param) as session:
        await session.create_tables(metadata)
        yield session


@pytest.mark.parametrize(
    ("other", "fields"),
    [
        (Team(1, "b"), ("id",)),
        (Team(2, "a"), ("name",)),
        (Team(2, "b", "Rome", "Via 1"), ("city", "street")),
        (Team(2, "b", email="a@b.c"), ("email",)),
    ],
)
async def test_w2_a_duplicate_names_the_fields_of_the_key(
    session: SQLAlchemySession, other: Team, fields: tuple[str, ...]
) -> None:
    await Teams(session).add(Team(1, "a", "Rome", "Via 1", 1, "a@b.c"))
    for write in (Teams(session).add, lambda team: Teams(session).add_many([team])):
        with pytest.raises(DuplicateKeyError) as caught:
            await write(other)
        assert set(caught.value.fields) == set(fields)
        assert "already taken" in caught.value.detail
        assert not any(word in caught.value.detail for word in ("INSERT", "uq_", "ux_", "teams"))
    if other.id != 1:
        await Teams(session).add(Team(2, "z"))
        with pytest.raises(DuplicateKeyError) as caught:
            await Teams(session).update(other)
        assert set(caught.value.fields) == set(fields)


async def test_a_missing_or_remaining_reference_is_a_foreign_key_error(session: SQLAlchemySession) -> None:
    with pytest.raises(ForeignKeyError):
        await Players(session).add(Player(1, 99))
    await Teams(session).add(Team(1, "a"))
    await Players(session).add(Player(1, 1))
    with pytest.raises(ForeignKeyError) as caught:
        await Teams(session).delete(1)
    assert "INSERT" not in str(caught.value)


async def test_what_the_database_refuses_is_a_constraint_error(session: SQLAlchemySession) -> None:
    with pytest.raises(ConstraintError):
        await Teams(session).add(Team(1, "a", size=-1))
    await Teams(session).add(Team(1, "a", size=1))
    with pytest.raises(ConstraintError):
        await session.execute(sa.text("UPDATE teams SET size = -1"))
    with pytest.raises(ConstraintError) as caught:
        await session.execute(sa.text("UPDATE teams SET name = NULL"))
    assert caught.value.fields == ("name",)


async def test_text_that_cannot_be_encoded_is_invalid_input(session: SQLAlchemySession) -> None:
    for call in (
        lambda: session.execute(sa.text("SELECT :x"), {"x": "\ud800"}),
        lambda: Teams(session).get_all(teams.c.name == "\ud800"),
    ):
        with pytest.raises(InvalidInputError):
            await call()
    await session.ping()


async def test_a_row_lock_that_is_not_waited_for_is_not_available(session: SQLAlchemySession) -> None:
    if session.dialect_name == "sqlite":
        pytest.skip("SQLite has no row locks")
    await Teams(session).add(Team(1, "a"))
    async with session.transaction() as unit:
        await Teams(unit).get_by_id(1, lock="update")
        for find in (
            lambda repository: repository.get_by_id(1, lock="nowait"),
            lambda repository: repository.get_all(lock="nowait"),
            lambda repository: repository.find_one(teams.c.id == 1, lock="nowait"),
        ):
            with pytest.raises(LockNotAvailableError):
                async with session.transaction() as other:
                    await find(Teams(other))


async def test_two_that_wait_for_each_other_are_told_apart(session: SQLAlchemySession) -> None:
    if session.dialect_name == "sqlite":
        pytest.skip("SQLite's units that may write come one after the other")
    await Teams(session).add_many([Team(1, "a"), Team(2, "b")])
    both = asyncio.Barrier(2)

    async def work(first: int, second: int) -> None:
        async with session.transaction() as unit:
            await Teams(unit).patch(first, {"size": 5})
            await both.wait()
            await Teams(unit).patch(second, {"size": 6})

    outcomes = await asyncio.gather(work(1, 2), work(2, 1), return_exceptions=True)
    assert sum(isinstance(one, TransientError) for one in outcomes) == 1
    assert outcomes.count(None) == 1


def _codes() -> list[tuple[str, Any, type[BuildingBlocksError]]]:
    tables = {
        "postgresql": {**postgresql._BY_CODE, **postgresql._BY_CLASS},
        "mysql": mysql._BY_CODE,
        "sqlite": {**sqlite._BY_CODE, **sqlite._BY_EXTENDED_CODE},
        "mssql": mssql._BY_CODE,
    }
    return [(name, code, kind) for name, table in tables.items() for code, kind in table.items()]


@pytest.mark.parametrize(("name", "code", "kind"), _codes())
def test_every_code_of_every_table_becomes_an_error_with_a_sentence(
    name: str, code: Any, kind: type[BuildingBlocksError]
) -> None:
    error: Any = type("DriverError", (Exception,), {})("x", f"[42000] message ({code}) (SQLExecDirectW)")
    if name == "postgresql":
        error.sqlstate = code if len(code) == 5 else f"{code}P99"
    elif name == "sqlite":
        error.sqlite_errorcode = code
    elif name == "mysql":
        error = type("DriverError", (Exception,), {})(code, "message 'x'")
    dialect = {
        "postgresql": postgresql.AsyncpgDialect,
        "mysql": mysql.AiomysqlDialect,
        "sqlite": sqlite.AiosqliteDialect,
        "mssql": mssql.SQLServerDialect,
    }[name](Timeouts(5.0, None))
    failure = sqlalchemy_errors.translate(error, dialect)
    assert type(failure) is kind
    assert failure.detail
    assert "DriverError" not in failure.detail


def test_every_kind_without_fields_has_a_sentence_of_its_own() -> None:
    listed = {kind for _, _, kind in _codes()} - {DuplicateKeyError, ConstraintError}
    assert listed <= set(sqlalchemy_errors._DETAILS)
    assert all(issubclass(kind, domain_errors.BuildingBlocksError) for kind in sqlalchemy_errors._DETAILS)
    assert ConflictError in sqlalchemy_errors._DETAILS


def test_what_is_not_the_databases_business_comes_back_as_it_is() -> None:
    dialect = postgresql.AsyncpgDialect(Timeouts(5.0, None))
    for error in (ZeroDivisionError(), RuntimeError("x"), TypeError("y"), DuplicateKeyError("z")):
        assert sqlalchemy_errors.translate(error, dialect) is error
