"""Row locks: kept until the transaction ends, waited for in turn, or refused at once."""

import asyncio
from typing import TypeVar

import pytest

from fastapi_building_blocks.domain import LockNotAvailableError, Repository, UnsupportedOperationError
from fastapi_building_blocks.domain.repository import Lock
from fastapi_building_blocks.infrastructure.database.session import DatabaseSession
from fastapi_building_blocks.testing.contract_subject import ContractSubject

T = TypeVar("T")


class LockContract(ContractSubject[T]):
    """What a repository promises about row locks; a database that has none must say so (R6)."""

    async def test_a_lock_outside_a_transaction_is_an_error(self, repository: Repository[T]) -> None:
        [stored] = await self.added(repository, 1)
        with pytest.raises(RuntimeError, match="unit of work"):
            await repository.get_by_id(self.key_of(stored), lock="update")
        with pytest.raises(RuntimeError, match="unit of work"):
            await repository.find_one(lock="nowait")
        with pytest.raises(RuntimeError, match="unit of work"):
            await repository.get_all(lock="skip_locked")

    async def test_an_unknown_lock_is_an_error(self, session: DatabaseSession) -> None:
        async with session.transaction() as unit:
            with pytest.raises(ValueError, match="skip_locked"):
                await self.make_repository(unit).get_all(lock="share")  # type: ignore[arg-type]

    @pytest.mark.parametrize("lock", ["update", "nowait", "skip_locked"])
    async def test_a_lock_that_nobody_holds_is_taken(
        self, session: DatabaseSession, repository: Repository[T], lock: Lock
    ) -> None:
        stored = await self.added(repository, 1, 2)
        unknown = await self.unknown_key(repository)
        await self._needs_lock(session, repository, stored[0], lock)
        async with session.transaction() as unit:
            inside = self.make_repository(unit)
            assert await inside.get_by_id(self.key_of(stored[0]), lock=lock) == stored[0]
            assert await inside.get_all(lock=lock) == await inside.get_all()
            assert await inside.get_by_id(unknown, lock=lock) is None
            await inside.patch(self.key_of(stored[0]), self.another_value())

    async def test_concurrent_increments_under_a_lock_lose_nothing(
        self, session: DatabaseSession, repository: Repository[T]
    ) -> None:
        name = self.needs("number_field")
        stored = await repository.add(self.entity(1, **{name: 0}))
        key = self.key_of(stored)
        await self._needs_lock(session, repository, stored, "update")

        async def increment() -> None:
            async with session.transaction() as unit:
                inside = self.make_repository(unit)
                locked = await inside.get_by_id(key, lock="update")
                assert locked is not None
                await inside.patch(key, {name: self.value(locked, name) + 1})

        await asyncio.gather(*(increment() for _ in range(20)))
        assert self.value(await repository.get(key), name) == 20

    async def test_nowait_is_refused_while_another_transaction_holds_the_row(
        self, session: DatabaseSession, repository: Repository[T]
    ) -> None:
        self.needs_two_connections()
        held, free = await self.added(repository, 1, 2)
        await self._needs_lock(session, repository, held, "nowait")
        async with session.transaction() as holder:
            await self.make_repository(holder).get_by_id(self.key_of(held), lock="update")
            with pytest.raises(LockNotAvailableError):
                async with session.transaction() as other:
                    await self.make_repository(other).get_by_id(self.key_of(held), lock="nowait")
            async with session.transaction() as other:
                assert await self.make_repository(other).get_by_id(self.key_of(free), lock="nowait") == free
        async with session.transaction() as other:
            assert await self.make_repository(other).get_by_id(self.key_of(held), lock="nowait") == held

    async def test_skip_locked_leaves_out_what_another_transaction_holds(
        self, session: DatabaseSession, repository: Repository[T]
    ) -> None:
        self.needs_two_connections()
        held, *free = await self.added(repository, 1, 2, 3)
        await self._needs_lock(session, repository, held, "skip_locked")
        async with session.transaction() as holder:
            await self.make_repository(holder).get_by_id(self.key_of(held), lock="update")
            async with session.transaction() as other:
                inside = self.make_repository(other)
                assert await inside.get_by_id(self.key_of(held), lock="skip_locked") is None
                found = await inside.get_all(lock="skip_locked")
                assert sorted(map(self.key_of, found)) == sorted(map(self.key_of, free))
        async with session.transaction() as other:
            assert len(await self.make_repository(other).get_all(lock="skip_locked")) == 3

    async def _needs_lock(self, session: DatabaseSession, repository: Repository[T], stored: T, lock: Lock) -> None:
        """Skip the test where the database says that it has no such lock."""
        try:
            async with session.transaction() as unit:
                await self.make_repository(unit).get_by_id(self.key_of(stored), lock=lock)
        except UnsupportedOperationError as error:
            assert await repository.get(self.key_of(stored)) == stored
            pytest.skip(f"lock={lock!r}: {error.detail}")
