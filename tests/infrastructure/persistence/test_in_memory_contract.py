"""The whole repository contract, in memory, for every kind of entity."""

from collections.abc import AsyncIterator
from typing import Any, ClassVar

import attrs
import pytest

from fastapi_building_blocks.infrastructure.database.in_memory_session import InMemorySession
from fastapi_building_blocks.infrastructure.persistence.repositories.base import BaseRepository
from tests.contracts.sample_entities import (
    Account,
    AccountContract,
    Article,
    ArticleContract,
    MemberContract,
    Note,
    NoteContract,
    SampleContract,
    SettingContract,
    Ticket,
    TicketContract,
)


class InMemory(SampleContract):
    base = BaseRepository

    @pytest.fixture
    async def session(self) -> AsyncIterator[InMemorySession]:
        async with InMemorySession() as session:
            yield session


class TestNotes(InMemory, NoteContract):
    pass


class TestArticles(InMemory, ArticleContract):
    pass


class TestTickets(InMemory, TicketContract):
    pass


class TestAccounts(InMemory, AccountContract):
    pass


class TestSettings(InMemory, SettingContract):
    pass


class TestMembers(InMemory, MemberContract):
    pass


# Without a table


class TestNotesWithoutTable(InMemory, NoteContract):
    @classmethod
    def declare(cls, base: Any) -> Any:
        class NoteRepository(base[Note]):
            unique = (("email",),)

        return NoteRepository


class TestArticlesWithoutTable(InMemory, ArticleContract):
    @classmethod
    def declare(cls, base: Any) -> Any:
        class ArticleRepository(base[Article]):
            unique = (("slug",),)
            version_column = "version"
            soft_delete_column = "deleted"

        return ArticleRepository


@attrs.frozen
class FrozenTicket:
    id: int | None
    subject: str
    priority: int
    reference: str
    assignee: str | None = None


class TestTicketsWithoutTable(InMemory, TicketContract):
    @classmethod
    def declare(cls, base: Any) -> Any:
        class TicketRepository(base[FrozenTicket]):
            unique = (("reference",),)

        return TicketRepository

    def make_entity(self, number: int) -> Ticket:
        return FrozenTicket(None, f"subject {number:06}", number, f"T-{number}", f"person {number}")  # type: ignore[return-value]

    test_what_is_none_on_add_is_left_to_the_servers_default = None
    test_of_two_with_one_key_the_later_wins_whatever_they_leave_to_defaults = None


class TestAccountsWithoutTable(InMemory, AccountContract):
    """A class of its own kind has a constructor at least: its parameters are the fields."""

    key_fields = ("number",)
    text_field, number_field, unique_field, nullable_field = "owner", "cents", "nickname", "nickname"
    attributes: ClassVar[dict[str, str]] = {"owner": "holder"}

    @classmethod
    def declare(cls, base: Any) -> Any:
        class AccountRepository(base[Account]):
            id_field = "number"
            unique = (("nickname",),)

            def _row_to_entity(self, row: Any) -> Account:
                return Account(**dict(zip(row.keys(), row, strict=True)))

            def _entity_to_dict(self, account: Account) -> dict[str, Any]:
                return {
                    "number": account.number,
                    "owner": account.holder,
                    "cents": account.cents,
                    "nickname": account.nickname,
                }

        return AccountRepository

    def change(self, entity: Account, /, **values: Any) -> Account:
        now = {name: self.value(entity, name) for name in ("number", "owner", "cents", "nickname")} | values
        return Account(**now)
