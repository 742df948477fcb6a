"""Transactions: a unit of work is kept whole or not at all, and nothing that runs in it commits on its own."""
# ruff: noqa: PT012 - the block that raises is a whole unit of work: that is what is tested

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import pytest

from fastapi_building_blocks.domain import (
    ConstraintError,
    DuplicateKeyError,
    NotFoundError,
    Repository,
    StaleVersionError,
    UnsupportedOperationError,
    field,
)
from fastapi_building_blocks.infrastructure.database.session import DatabaseSession
from fastapi_building_blocks.infrastructure.persistence.unit_of_work import UnitOfWork
from fastapi_building_blocks.testing.contract_subject import ContractSubject

T = TypeVar("T")

WRITES = (
    "add", "add_many", "update", "patch", "update_where", "update_many", "upsert", "upsert_many",
    "get_or_add", "delete", "delete_where",
)  # fmt: skip


class LeaveTheBlock(Exception):  # noqa: N818 - a test's own way out of a unit of work
    """Raised by a test inside a unit of work."""


class TransactionContract(ContractSubject[T]):
    """What a repository promises about running in a unit of work."""

    async def test_a_clean_exit_keeps_everything_together(self, session: DatabaseSession) -> None:
        async with UnitOfWork(session) as unit:
            inside = self.make_repository(unit)
            [stored] = await self.added(inside, 1)
            assert await inside.get(self.key_of(stored)) == stored, "a unit sees its own writes"
            await inside.patch(self.key_of(stored), self.another_value())
        [kept] = await self.make_repository(session).get_all()
        assert self.key_of(kept) == self.key_of(stored)

    @pytest.mark.parametrize("write", WRITES)
    async def test_t4_no_write_commits_inside_a_callers_transaction(
        self, session: DatabaseSession, repository: Repository[T], write: str
    ) -> None:
        stored = await self.added(repository, 1, 2)
        with pytest.raises(LeaveTheBlock):
            async with session.transaction() as unit:
                await self._write(self.make_repository(unit), write, stored)
                raise LeaveTheBlock
        assert await repository.get_many(map(self.key_of, stored)) == stored
        assert await repository.including_deleted().count() == 2

    @pytest.mark.parametrize("write", WRITES)
    async def test_a_read_only_unit_refuses_every_write(
        self, session: DatabaseSession, repository: Repository[T], write: str
    ) -> None:
        stored = await self.added(repository, 1, 2)
        with pytest.raises(UnsupportedOperationError, match="read-only"):
            async with session.transaction(read_only=True) as unit:
                inside = self.make_repository(unit)
                assert await inside.count() == 2
                await self._write(inside, write, stored)
        assert await repository.get_many(map(self.key_of, stored)) == stored
        assert await repository.count() == 2
        await self.added(repository, 3)  # the connection takes writes again

    async def test_t3_a_released_savepoint_dies_with_the_outer_rollback(self, session: DatabaseSession) -> None:
        with pytest.raises(LeaveTheBlock):
            async with session.transaction() as unit:
                async with unit.savepoint():
                    await self.added(self.make_repository(unit), 1)
                raise LeaveTheBlock
        assert await self.make_repository(session).count() == 0

    async def test_t3_a_savepoint_undoes_what_happened_inside_and_nothing_else(self, session: DatabaseSession) -> None:
        async with session.transaction() as unit:
            inside = self.make_repository(unit)
            outer, changed = await self.added(inside, 1, 2)
            with pytest.raises(LeaveTheBlock):
                async with unit.savepoint():
                    await self.added(inside, 3)
                    await inside.patch(self.key_of(changed), self.another_value())
                    await inside.including_deleted().delete(self.key_of(outer))
                    async with unit.savepoint():
                        await self.added(inside, 4)
                    raise LeaveTheBlock
            assert await inside.get_many(map(self.key_of, [outer, changed])) == [outer, changed]
            [after] = await self.added(inside, 5)
        assert await self.make_repository(session).get_many(map(self.key_of, [outer, changed, after])) == [
            outer,
            changed,
            after,
        ]
        assert await self.make_repository(session).count() == 3

    async def test_a_unit_of_work_inside_another_one_is_a_savepoint(self, session: DatabaseSession) -> None:
        async with UnitOfWork(session) as outer:
            await self.added(self.make_repository(outer), 1)
            with pytest.raises(LeaveTheBlock):
                async with UnitOfWork(outer) as inner:
                    await self.added(self.make_repository(inner), 2)
                    raise LeaveTheBlock
            async with UnitOfWork(outer) as inner:
                await self.added(self.make_repository(inner), 3)
        assert await self.make_repository(session).count() == 2

    async def test_a_failed_statement_dooms_its_transaction(self, session: DatabaseSession) -> None:
        with pytest.raises(RuntimeError, match="DuplicateKeyError"):
            async with session.transaction() as unit:
                inside = self.make_repository(unit)
                [stored] = await self.added(inside, 1)
                with pytest.raises(DuplicateKeyError):
                    await inside.add(self._twin(stored))
                with pytest.raises(RuntimeError, match="DuplicateKeyError"):
                    await inside.count()
        assert await self.make_repository(session).count() == 0

    async def test_a_failed_bulk_write_dooms_its_transaction_too(self, session: DatabaseSession) -> None:
        with pytest.raises(RuntimeError, match="DuplicateKeyError"):
            async with session.transaction() as unit:
                inside = self.make_repository(unit)
                [stored] = await self.added(inside, 1)
                with pytest.raises(DuplicateKeyError):
                    await inside.add_many([self.make_entity(2), self._twin(stored)])
                with pytest.raises(RuntimeError, match="DuplicateKeyError"):
                    await inside.count()
        assert await self.make_repository(session).count() == 0

    async def test_a_failed_statement_in_a_savepoint_dooms_only_that(self, session: DatabaseSession) -> None:
        async with session.transaction() as unit:
            inside = self.make_repository(unit)
            [stored] = await self.added(inside, 1)
            with pytest.raises(DuplicateKeyError):
                async with unit.savepoint():
                    await self.added(inside, 2)
                    await inside.add(self._twin(stored))
            await self.added(inside, 3)
        assert await self.make_repository(session).count() == 2

    async def test_what_finds_nothing_dooms_nothing(self, session: DatabaseSession, repository: Repository[T]) -> None:
        unknown = await self.unknown_key(repository)
        async with session.transaction() as unit:
            inside = self.make_repository(unit)
            with pytest.raises(NotFoundError):
                await inside.get(unknown)
            with pytest.raises(NotFoundError):
                await inside.patch(unknown, self.another_value())
            await self.added(inside, 1)
        assert await repository.count() == 1

    async def test_a_bulk_update_that_misses_one_is_undone_and_the_unit_goes_on(
        self, session: DatabaseSession, repository: Repository[T]
    ) -> None:
        stored, gone = await self.added(repository, 1, 2)
        await repository.including_deleted().delete(self.key_of(gone))
        async with session.transaction() as unit:
            inside = self.make_repository(unit)
            with pytest.raises(NotFoundError):
                await inside.update_many([self.change(stored, **self.another_value()), gone])
            assert await inside.get(self.key_of(stored)) == stored
            await self.added(inside, 3)
        assert await repository.count() == 2

    async def test_a_stale_bulk_update_is_undone_and_the_unit_goes_on(
        self, session: DatabaseSession, repository: Repository[T]
    ) -> None:
        self.needs_column(repository, "version_column")
        stored, stale = await self.added(repository, 1, 2)
        await repository.patch(self.key_of(stale), self.another_value())
        async with session.transaction() as unit:
            inside = self.make_repository(unit)
            with pytest.raises(StaleVersionError):
                await inside.update_many([self.change(stored, **self.another_value()), stale])
            assert await inside.get(self.key_of(stored)) == stored
            await self.added(inside, 3)
        assert await repository.count() == 3

    async def test_a_null_that_the_store_refuses_dooms_its_transaction(
        self, session: DatabaseSession, repository: Repository[T]
    ) -> None:
        name = self.needs("text_field")
        [stored] = await self.added(repository, 1)
        for write in ("patch", "update", "add", "update_many", "add_many"):
            with pytest.raises(RuntimeError, match="ConstraintError"):
                async with session.transaction() as unit:
                    inside = self.make_repository(unit)
                    null = self.change(self.make_entity(2) if "add" in write else stored, **{name: None})
                    with pytest.raises(ConstraintError):
                        if write == "patch":
                            await inside.patch(self.key_of(stored), {name: None})
                        else:
                            await getattr(inside, write)([null] if "many" in write else null)
                    with pytest.raises(RuntimeError, match="ConstraintError"):
                        await inside.count()
        assert await repository.get_all() == [stored]

    async def test_a_refused_get_or_add_dooms_its_transaction(self, session: DatabaseSession) -> None:
        name = self.needs("unique_field")
        if None in [self.value(self.make_entity(1), key) for key in self.key_fields]:
            pytest.skip("the key is generated")
        with pytest.raises(RuntimeError, match="DuplicateKeyError"):
            async with session.transaction() as unit:
                inside = self.make_repository(unit)
                [stored] = await self.added(inside, 1)
                with pytest.raises(DuplicateKeyError):
                    await inside.get_or_add(self.entity(2, **{name: self.value(stored, name)}))
                with pytest.raises(RuntimeError, match="DuplicateKeyError"):
                    await inside.count()
        assert await self.make_repository(session).count() == 0

    async def test_after_rollback_statements_raise_and_leaving_is_quiet(self, session: DatabaseSession) -> None:
        async with session.transaction() as unit:
            inside = self.make_repository(unit)
            await self.added(inside, 1)
            await unit.rollback()
            with pytest.raises(RuntimeError, match="ended"):
                await inside.count()
        assert await self.make_repository(session).count() == 0

    async def test_a_repository_of_a_unit_that_has_ended_raises(self, session: DatabaseSession) -> None:
        async with session.transaction() as unit:
            inside = self.make_repository(unit)
            await self.added(inside, 1)
        with pytest.raises(RuntimeError, match="ended"):
            await inside.count()

    async def test_t8_two_tasks_on_one_transaction_are_a_clear_error(self, session: DatabaseSession) -> None:
        async with session.transaction() as unit:
            inside = self.make_repository(unit)
            await self.added(inside, 1)
            answers = await asyncio.gather(inside.count(), inside.count(), inside.count(), return_exceptions=True)
        refused = [answer for answer in answers if isinstance(answer, BaseException)]
        assert answers.count(1) == 1
        assert {type(error) for error in refused} == {RuntimeError}
        assert "one task at a time" in str(refused[0])

    async def test_t9_hooks_run_after_the_commit_and_see_it(self, session: DatabaseSession) -> None:
        repository, seen = self.make_repository(session), []

        async def hook() -> None:
            seen.append(await repository.count())

        async with session.transaction() as unit:
            unit.on_commit(hook)
            await self.added(self.make_repository(unit), 1)
            assert seen == []
        assert seen == [1]

    async def test_t9_hooks_never_run_on_a_rollback_nor_those_of_an_undone_savepoint(
        self, session: DatabaseSession
    ) -> None:
        seen: list[str] = []
        with pytest.raises(LeaveTheBlock):
            async with session.transaction() as unit:
                await self.added(self.make_repository(unit), 1)
                unit.on_commit(lambda: seen.append("rolled back"))
                raise LeaveTheBlock
        async with session.transaction() as unit:
            unit.on_commit(lambda: seen.append("kept"))
            with pytest.raises(LeaveTheBlock):
                async with unit.savepoint():
                    await self.added(self.make_repository(unit), 1)
                    unit.on_commit(lambda: seen.append("undone"))
                    raise LeaveTheBlock
        assert seen == ["kept"]

    async def test_t9_a_hook_that_fails_does_not_make_a_committed_unit_fail(self, session: DatabaseSession) -> None:
        seen: list[str] = []

        def broken() -> None:
            raise LookupError("a broken hook")

        async with session.transaction() as unit:
            unit.on_commit(broken)
            unit.on_commit(lambda: seen.append("next"))
            await self.added(self.make_repository(unit), 1)
        assert seen == ["next"]
        assert await self.make_repository(session).count() == 1

    async def test_t5_transfers_that_clash_are_replayed_and_lose_nothing(
        self, session: DatabaseSession, repository: Repository[T]
    ) -> None:
        name = self.needs("number_field")
        accounts = [self.key_of(await repository.add(self.entity(number, **{name: 100}))) for number in range(4)]

        def transfer(task: int) -> Callable[[UnitOfWork], Awaitable[None]]:
            async def work(unit: UnitOfWork) -> None:
                inside = self.make_repository(unit)
                source, target = accounts[task % 4], accounts[(task + 1 + task // 4 % 3) % 4]
                for key, amount in ((source, -task), (target, task)):
                    balance = self.value(await inside.get(key), name)
                    await inside.patch(key, {name: balance + amount})

            return work

        await asyncio.gather(
            *(session.run(transfer(task), attempts=200, isolation="SERIALIZABLE") for task in range(8))
        )
        assert sum(self.value(entity, name) for entity in await repository.get_all()) == 400

    async def test_run_answers_what_its_work_answers_and_replays_nothing_else(self, session: DatabaseSession) -> None:
        calls = []

        async def work(unit: UnitOfWork) -> int:
            calls.append(unit)
            await self.added(self.make_repository(unit), 1)
            return await self.make_repository(unit).count()

        async def fails(unit: UnitOfWork) -> None:
            await work(unit)

        assert await session.run(work) == 1
        assert len(calls) == 1
        if self.unique_field is not None:
            with pytest.raises(DuplicateKeyError):
                await session.run(fails)
            assert len(calls) == 2

    def _twin(self, stored: T) -> T:
        return self.entity(777_777, **{name: self.value(stored, name) for name in self.key_fields})

    async def _write(self, inside: Repository[T], write: str, stored: list[T]) -> None:
        first, new = stored[0], self.make_entity(70)
        changed, values = self.change(first, **self.another_value()), self.another_value()
        arguments: dict[str, tuple[Any, ...]] = {
            "add": (new,),
            "add_many": ([new, self.make_entity(71)],),
            "update": (changed,),
            "patch": (self.key_of(first), values),
            "update_where": (values, field(self.any_writable()).is_not_null()),
            "update_many": ([changed],),
            "upsert": (changed,),
            "upsert_many": ([changed],),
            "get_or_add": (new, [self.unique_field] if self.unique_field else None),
            "delete": (self.key_of(first),),
            "delete_where": (field(self.any_writable()).is_not_null(),),
        }
        await getattr(inside, write)(*arguments[write])
