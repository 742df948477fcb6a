"""The contract suite fails for repositories that break their promises, and skips what they do not have."""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
from _pytest.outcomes import Skipped

from fastapi_building_blocks.domain import CursorPage, DuplicateKeyError, field
from fastapi_building_blocks.infrastructure.database.in_memory_session import InMemorySession
from fastapi_building_blocks.infrastructure.persistence.repositories.base import BaseRepository
from fastapi_building_blocks.testing import RepositoryContract
from tests.contracts.sample_entities import Member, MemberContract


class Unfilled(RepositoryContract[Any]):
    pass


@dataclasses.dataclass
class Bare:
    id: int


class BareRepository(BaseRepository[Bare]):
    pass


class BareContract(RepositoryContract[Bare]):
    def make_repository(self, session: Any) -> BareRepository:
        return BareRepository(session)

    def make_entity(self, number: int) -> Bare:
        return Bare(number)


MemberRepository = MemberContract.declare(BaseRepository)


class SharesItsEntities(MemberRepository):  # type: ignore[misc, valid-type]
    entities: dict[Any, Any] = {}  # noqa: RUF012

    async def add(self, entity: Member) -> Member:
        await super().add(entity)
        return self.entities.setdefault(entity.id, entity)

    async def get_by_id(self, id: Any, **options: Any) -> Any:
        return self.entities.get(id)


class CountsTheDeleted(MemberRepository):  # type: ignore[misc, valid-type]
    async def count(self, *criteria: Any) -> int:
        return await MemberRepository(self._session).including_deleted().count(*criteria)

    def including_deleted(self) -> Any:
        return MemberRepository(self._session).including_deleted()


class CommitsOnItsOwn(MemberRepository):  # type: ignore[misc, valid-type]
    async def patch(self, id: Any, values: Any, version: int | None = None) -> Any:
        return await MemberRepository(self._session.root).patch(id, values, version)


class ForgetsTheVersion(MemberRepository):  # type: ignore[misc, valid-type]
    async def update(self, entity: Member) -> Member:
        current = await self.get(entity.id)
        return await super().update(dataclasses.replace(entity, version=current.version))


class KeepsHalfOfABatch(MemberRepository):  # type: ignore[misc, valid-type]
    async def add_many(self, entities: Any) -> int:
        return len([await self.add(entity) for entity in entities])


class SkipsARow(MemberRepository):  # type: ignore[misc, valid-type]
    async def paginate_by_cursor(self, request: Any, *criteria: Any, sort: Any = ()) -> CursorPage[Any]:
        page = await super().paginate_by_cursor(request, *criteria, sort=sort)
        return dataclasses.replace(page, items=page.items[1:]) if request.cursor else page


class LooksThenAdds(MemberRepository):  # type: ignore[misc, valid-type]
    async def get_or_add(self, entity: Member, on: Any = None) -> Any:
        found = await self.find_one(field("email") == entity.email)
        return (found, False) if found else (await self.add(entity), True)


BROKEN: list[tuple[type[Any], Callable[..., Any]]] = [
    (SharesItsEntities, RepositoryContract.test_r8_nothing_that_is_answered_or_given_is_shared_with_the_store),
    (CountsTheDeleted, RepositoryContract.test_r7_a_soft_deleted_entity_is_seen_by_no_read_until_asked_for),
    (ForgetsTheVersion, RepositoryContract.test_w3_a_stale_version_changes_nothing),
    (KeepsHalfOfABatch, RepositoryContract.test_w5_add_many_keeps_all_or_nothing),
    (SkipsARow, RepositoryContract.test_r2_the_direction_can_be_turned_on_every_page),
    (LooksThenAdds, RepositoryContract.test_w1_concurrent_get_or_add_adds_once),
]


@pytest.mark.parametrize(("repository_class", "promise"), BROKEN)
async def test_a_broken_promise_fails_its_test(repository_class: type[Any], promise: Callable[..., Any]) -> None:
    contract = MemberContract()
    async with InMemorySession() as session:
        await promise(contract, MemberRepository(session))
    async with InMemorySession() as session:
        with pytest.raises((AssertionError, DuplicateKeyError, pytest.fail.Exception)):
            await promise(contract, repository_class(session))


async def test_a_repository_that_commits_on_its_own_fails_the_test_of_t4() -> None:
    class Contract(MemberContract):
        def make_repository(self, session: Any) -> Any:
            return CommitsOnItsOwn(session)

    async with InMemorySession() as session:
        with pytest.raises(AssertionError):
            await Contract().test_t4_no_write_commits_inside_a_callers_transaction(
                session, CommitsOnItsOwn(session), "patch"
            )


async def test_what_is_not_declared_is_skipped_with_its_reason() -> None:
    async with InMemorySession() as session:
        repository = BareRepository(session)
        with pytest.raises(Skipped, match=r"BareContract\.number_field is not declared"):
            await BareContract().test_r1_the_primary_key_closes_every_order(repository)
        with pytest.raises(Skipped, match="BareRepository has no version_column"):
            await BareContract().test_w3_of_two_writers_from_one_version_one_wins(repository)
        with pytest.raises(Skipped, match="neither number_field"):
            await BareContract().test_update_writes_the_entity_and_answers_it_as_stored(repository)


async def test_a_suite_that_was_not_filled_in_says_what_is_missing() -> None:
    with pytest.raises(NotImplementedError, match="make_repository"):
        Unfilled().make_repository(InMemorySession())
    with pytest.raises(NotImplementedError, match="make_entity"):
        Unfilled().make_entity(1)
    with pytest.raises(NotImplementedError, match="change"):
        Unfilled().change(copy.copy(Unfilled()), x=1)
