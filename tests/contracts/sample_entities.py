"""Entities of every kind that a repository takes, each with its table, its repository and its contract.

``declare(base)`` makes the repository on any store: the declarations are the same in memory and in SQL.
"""

import dataclasses
from datetime import UTC, datetime
from functools import cache
from typing import Any, ClassVar
from uuid import UUID, uuid5

import attrs
import pydantic
import pytest
import sqlalchemy as sa

from fastapi_building_blocks.domain import ConstraintError, DuplicateKeyError, field
from fastapi_building_blocks.infrastructure.database.types import (
    BinaryString,
    UtcDateTime,
    timestamp_columns,
    version_column,
)
from fastapi_building_blocks.testing import RepositoryContract

metadata = sa.MetaData()
NAMESPACE = UUID(int=2026)


class SampleContract(RepositoryContract[Any]):
    """A contract whose repository is declared on the store that a test class names."""

    base: ClassVar[Any]

    @classmethod
    def declare(cls, base: Any) -> Any:
        raise NotImplementedError

    def make_repository(self, session: Any) -> Any:
        return _declared(type(self).declare, self.base)(session)


@cache
def _declared(declare: Any, base: Any) -> Any:
    return declare(base)


# A dataclass whose fields match its table: a repository of three lines


@dataclasses.dataclass
class Note:
    id: UUID
    title: str
    stars: int
    email: str
    bio: str | None = None


notes = sa.Table(
    "notes",
    metadata,
    sa.Column("id", sa.Uuid(), primary_key=True),
    sa.Column("title", sa.String(200), nullable=False),
    sa.Column("stars", sa.Integer(), nullable=False),
    sa.Column("email", sa.String(200), nullable=False, unique=True),
    sa.Column("bio", sa.String(200)),
)


class NoteContract(SampleContract):
    text_field, number_field, unique_field, nullable_field = "title", "stars", "email", "bio"

    @classmethod
    def declare(cls, base: Any) -> Any:
        class NoteRepository(base[Note]):
            table = notes

        return NoteRepository

    def make_entity(self, number: int) -> Note:
        return Note(
            uuid5(NAMESPACE, str(number)), f"title {number:06}", number, f"{number}@example.org", f"bio {number}"
        )

    async def test_a_key_that_is_missing_is_refused_before_anything_is_sent(self, session: Any) -> None:
        async with session.transaction() as unit:
            repository = self.make_repository(unit)
            with pytest.raises(ConstraintError) as caught:
                await repository.add(self.entity(1, id=None))
            assert caught.value.fields == ("id",)
            await repository.add(self.make_entity(2))
        assert await self.make_repository(session).count() == 1

    async def test_get_or_add_of_what_is_there_needs_no_write(self, repository: Any, session: Any) -> None:
        [stored] = await self.added(repository, 1)
        async with session.transaction(read_only=True) as unit:
            assert await self.make_repository(unit).get_or_add(stored) == (stored, False)
            assert await self.make_repository(unit).get_all(limit=0) == []


# A frozen Pydantic model, with a flag for deleted and a version


class Article(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(frozen=True)

    id: UUID
    slug: str | None
    text: str
    likes: int = 0
    version: int | None = None
    deleted: bool = False
    tags: list[str] = pydantic.Field(default_factory=list)


articles = sa.Table(
    "articles",
    metadata,
    sa.Column("id", sa.Uuid(), primary_key=True),
    sa.Column("slug", BinaryString(100), unique=True),
    sa.Column("text", sa.Text(), nullable=False),
    sa.Column("likes", sa.BigInteger(), nullable=False),
    version_column(),
    sa.Column("deleted", sa.Boolean(), nullable=False, server_default=sa.false()),
    sa.Column("tags", sa.JSON(), nullable=False),
)


class ArticleContract(SampleContract):
    text_field, number_field, unique_field, nullable_field = "text", "likes", "slug", "slug"

    @classmethod
    def declare(cls, base: Any) -> Any:
        class ArticleRepository(base[Article]):
            table = articles
            version_column = "version"
            soft_delete_column = "deleted"

        return ArticleRepository

    def make_entity(self, number: int) -> Article:
        identity = uuid5(NAMESPACE, str(number))
        return Article(
            id=identity, slug=f"slug-{number:06}", text=f"text {number:06}", likes=number, tags=["a", str(number)]
        )


# An attrs class with a key that the database generates


@attrs.define
class Ticket:
    id: int | None
    subject: str
    priority: int
    reference: str
    assignee: str | None = None
    status: str | None = None


tickets = sa.Table(
    "tickets",
    metadata,
    sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), primary_key=True),
    sa.Column("subject", sa.String(200), nullable=False),
    sa.Column("priority", sa.Integer(), nullable=False),
    sa.Column("reference", sa.String(50), nullable=False),
    sa.Column("assignee", sa.String(200), index=True),
    sa.Column("status", sa.String(20), nullable=False, server_default="open"),
    sa.Index("ux_tickets_reference", "reference", unique=True),
)


class TicketContract(SampleContract):
    text_field, number_field, unique_field, nullable_field = "subject", "priority", "reference", "assignee"

    @classmethod
    def declare(cls, base: Any) -> Any:
        class TicketRepository(base[Ticket]):
            table = tickets

        return TicketRepository

    def make_entity(self, number: int) -> Ticket:
        return Ticket(None, f"subject {number:06}", number, f"T-{number}", f"person {number}")

    async def test_what_is_none_on_add_is_left_to_the_servers_default(self, repository: Any) -> None:
        stored = await repository.add(self.make_entity(1))
        assert stored.status == "open"
        assert (await repository.add(self.entity(2, status="closed"))).status == "closed"
        upserted = await repository.upsert(self.entity(2, priority=9), on=["reference"])
        assert (upserted.status, upserted.priority) == ("closed", 9)

    async def test_of_two_with_one_key_the_later_wins_whatever_they_leave_to_defaults(self, repository: Any) -> None:
        other, older, newer = self.entity(2), self.entity(1, priority=8, status="closed"), self.entity(1, priority=9)
        assert await repository.upsert_many([other, older, newer], on=["reference"]) == 3
        stored = await repository.find_one(field("reference") == "T-1")
        assert (stored.priority, stored.status) == (9, "closed")


# A class of its own kind, with both mappers written by hand and other names than its columns


class Account:
    def __init__(self, number: str, owner: str, cents: int, nickname: str | None) -> None:
        self.number = number
        self._owner = owner
        self.cents = cents
        self.nickname = nickname

    @property
    def holder(self) -> str:
        return self._owner

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Account) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash(self.number)

    def __repr__(self) -> str:
        return f"Account({vars(self)})"


accounts = sa.Table(
    "accounts",
    metadata,
    sa.Column("account_no", sa.String(20), primary_key=True),
    sa.Column("owner", sa.String(200), nullable=False),
    sa.Column("balance", sa.BigInteger(), nullable=False),
    sa.Column("nickname", BinaryString(50), unique=True),
)


class AccountContract(SampleContract):
    key_fields = ("account_no",)
    text_field, number_field, unique_field, nullable_field = "owner", "balance", "nickname", "nickname"
    attributes: ClassVar[dict[str, str]] = {"account_no": "number", "owner": "holder", "balance": "cents"}

    @classmethod
    def declare(cls, base: Any) -> Any:
        class AccountRepository(base[Account]):
            table = accounts

            def _row_to_entity(self, row: Any) -> Account:
                return Account(row.account_no, row["owner"], row.balance, row["nickname"])

            def _entity_to_dict(self, account: Account) -> dict[str, Any]:
                return {
                    "account_no": account.number,
                    "owner": account.holder,
                    "balance": account.cents,
                    "nickname": account.nickname,
                }

        return AccountRepository

    def make_entity(self, number: int) -> Account:
        return Account(f"A{number:08}", f"owner {number:06}", number, f"nick {number}")

    def value(self, entity: Account, name: str) -> Any:
        return getattr(entity, self.attributes.get(name, name))

    def change(self, entity: Account, /, **values: Any) -> Account:
        now = {name: self.value(entity, name) for name in ("account_no", "owner", "balance", "nickname")} | values
        return Account(now["account_no"], now["owner"], now["balance"], now["nickname"])


# A composite key, frozen


@dataclasses.dataclass(frozen=True)
class Setting:
    tenant: int
    name: str
    label: str
    weight: int
    value: dict[str, Any] | None = None


settings = sa.Table(
    "settings",
    metadata,
    sa.Column("tenant", sa.Integer(), primary_key=True, autoincrement=False),
    sa.Column("name", sa.String(50), primary_key=True),
    sa.Column("label", sa.String(200), nullable=False),
    sa.Column("weight", sa.SmallInteger(), nullable=False),
    sa.Column("value", sa.JSON()),
    sa.UniqueConstraint("tenant", "label"),
)


class SettingContract(SampleContract):
    key_fields = ("tenant", "name")
    text_field, number_field = "label", "weight"
    bulk_size = 1000

    @classmethod
    def declare(cls, base: Any) -> Any:
        class SettingRepository(base[Setting]):
            table = settings

        return SettingRepository

    def make_entity(self, number: int) -> Setting:
        return Setting(number % 5, f"name-{number:06}", f"label {number:06}", number % 1000, {"n": [number]})

    async def test_a_unique_key_of_several_fields_collides_as_a_whole(self, repository: Any) -> None:
        await repository.add(Setting(1, "a", "same", 1))
        await repository.add(Setting(2, "a", "same", 1))
        with pytest.raises(DuplicateKeyError) as caught:
            await repository.add(Setting(1, "b", "same", 1))
        assert set(caught.value.fields) == {"tenant", "label"}
        assert caught.value.detail == f"{' and '.join(caught.value.fields)} is already taken"
        written = await repository.upsert(Setting(1, "b", "same", 2), on=["label", "tenant"])
        assert (written.name, written.weight) == ("a", 2)


# Everything that a repository can declare


@dataclasses.dataclass
class Member:
    id: UUID
    email: str
    name: str
    points: int
    bio: str | None = None
    password_hash: str | None = None
    profile: dict[str, Any] = dataclasses.field(default_factory=dict)
    version: int = 1
    created_at: datetime | None = None
    updated_at: datetime | None = None
    deleted_at: datetime | None = None


members = sa.Table(
    "members",
    metadata,
    sa.Column("id", sa.Uuid(), primary_key=True),
    sa.Column("email", BinaryString(200), nullable=False),
    sa.Column("name", BinaryString(200), nullable=False),
    sa.Column("points", sa.Integer(), nullable=False, server_default="0"),
    sa.Column("bio", sa.Text()),
    sa.Column("password_hash", sa.String(255)),
    sa.Column("profile", sa.JSON(), nullable=False),
    version_column(),
    *timestamp_columns(),
    sa.Column("deleted_at", UtcDateTime()),
    sa.UniqueConstraint("email", name="uq_members_email"),
)


class MemberContract(SampleContract):
    text_field, number_field, unique_field, nullable_field = "name", "points", "email", "bio"

    @classmethod
    def declare(cls, base: Any) -> Any:
        class MemberRepository(base[Member]):
            table = members
            version_column = "version"
            soft_delete_column = "deleted_at"
            created_at_column = "created_at"
            updated_at_column = "updated_at"
            hidden_columns = frozenset({"password_hash"})

        return MemberRepository

    def make_entity(self, number: int) -> Member:
        identity = uuid5(NAMESPACE, str(number))
        return Member(
            identity,
            f"{number}@example.org",
            f"name {number:06}",
            number,
            f"bio {number:06}",
            "$2b$secret",
            {"n": [number]},
        )

    async def test_a_creation_time_that_the_entity_brings_is_kept(self, repository: Any) -> None:
        moment = datetime(2020, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)
        stored = await repository.add(self.entity(1, created_at=moment))
        assert stored.created_at == moment


CONTRACTS = (NoteContract, ArticleContract, TicketContract, AccountContract, SettingContract, MemberContract)
