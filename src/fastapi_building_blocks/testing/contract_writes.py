"""Writes: what is stored is what was given, all of it or nothing, and of two racing writers none is lost.

Every write is tested here and nowhere else, so that its promises are read in one place.
"""

import asyncio
import copy
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, TypeVar

import pytest

from fastapi_building_blocks.domain import (
    DuplicateKeyError,
    InvalidInputError,
    NotFoundError,
    Repository,
    StaleVersionError,
    field,
)
from fastapi_building_blocks.testing.contract_subject import ContractSubject

T = TypeVar("T")


class WriteContract(ContractSubject[T]):
    """What a repository promises about writing."""

    # Add

    async def test_add_answers_what_the_store_generated(self, repository: Repository[T]) -> None:
        stored = await repository.add(self.make_entity(1))
        assert None not in [self.value(stored, name) for name in self.key_fields]
        assert await repository.get(self.key_of(stored)) == stored

    async def test_every_generated_key_is_another_one(self, repository: Repository[T]) -> None:
        keys = [self.key_of(entity) for entity in await self.added(repository, *range(5))]
        assert len(set(keys)) == 5

    async def test_add_refuses_a_taken_key_and_names_its_fields(self, repository: Repository[T]) -> None:
        [stored] = await self.added(repository, 1)
        twin = self.entity(2, **{name: self.value(stored, name) for name in self.key_fields})
        with pytest.raises(DuplicateKeyError) as caught:
            await repository.add(twin)
        assert set(caught.value.fields) == set(self.key_fields)
        assert await repository.get_all() == [stored]

    async def test_w2_a_taken_unique_value_is_refused_by_the_name_of_its_field(self, repository: Repository[T]) -> None:
        name = self.needs("unique_field")
        first, second = await self.added(repository, 1, 2)
        taken = {name: self.value(first, name)}
        attempts: list[Callable[[], Awaitable[Any]]] = [
            lambda: repository.add(self.entity(3, **taken)),
            lambda: repository.add_many([self.make_entity(4), self.entity(5, **taken)]),
            lambda: repository.update(self.change(second, **taken)),
            lambda: repository.patch(self.key_of(second), taken),
            lambda: repository.upsert(self.change(second, **taken)),
            lambda: repository.update_where(taken, field(name) == self.value(second, name)),
        ]
        for attempt in attempts:
            with pytest.raises(DuplicateKeyError) as caught:
                await attempt()
            assert caught.value.fields == (name,)
        assert sorted(map(self.key_of, await repository.get_all())) == sorted([self.key_of(first), self.key_of(second)])
        assert await repository.get(self.key_of(second)) == second

    async def test_w2_of_racing_creators_of_one_value_one_wins(self, repository: Repository[T]) -> None:
        name = self.needs("unique_field")
        value = self.value(self.make_entity(1), name)
        answers = await asyncio.gather(
            *(repository.add(self.entity(number, **{name: value})) for number in range(self.concurrent_tasks)),
            return_exceptions=True,
        )
        refused = [answer for answer in answers if isinstance(answer, BaseException)]
        assert len(refused) == self.concurrent_tasks - 1
        assert {type(error) for error in refused} == {DuplicateKeyError}
        assert await repository.count() == 1

    async def test_a_null_in_a_unique_field_collides_with_none(self, repository: Repository[T]) -> None:
        if self.unique_field is None or self.unique_field != self.nullable_field:
            pytest.skip("unique_field is not nullable_field")
        for number in (1, 2):
            await repository.add(self.entity(number, **{self.unique_field: None}))
        assert await repository.count(field(self.unique_field).is_null()) == 2

    async def test_a_value_that_cannot_be_stored_is_refused_by_the_name_of_its_field(
        self, repository: Repository[T]
    ) -> None:
        name = self.needs("text_field")
        [stored] = await self.added(repository, 1)

        def attempts(values: dict[str, Any]) -> list[Callable[[], Awaitable[Any]]]:
            return [
                lambda: repository.add(self.entity(2, **values)),
                lambda: repository.add_many([self.make_entity(3), self.entity(4, **values)]),
                lambda: repository.update(self.change(stored, **values)),
                lambda: repository.patch(self.key_of(stored), values),
                lambda: repository.update_where(values, everything=True),
                lambda: repository.upsert(self.change(stored, **values)),
            ]

        for value in ("NUL \0", "surrogate \ud800", None):
            for attempt in attempts({name: value}):
                with pytest.raises(InvalidInputError) as caught:
                    await attempt()
                assert caught.value.fields == (name,)
        assert await repository.get_all() == [stored]

    async def test_w6_texts_come_out_as_they_went_in(self, repository: Repository[T]) -> None:
        name = self.needs("text_field")
        for number, text in enumerate(
            ("", " ", " padded ", "Ä ß 日本語 🦄", "'; DROP TABLE x; --", "%_\\", "a\r\nb\tc")
        ):
            stored = await repository.add(self.entity(number, **{name: text}))
            assert self.value(stored, name) == text
            assert self.value(await repository.get(self.key_of(stored)), name) == text

    async def test_what_is_no_dict_of_fields_is_refused_before_anything_is_written(
        self, repository: Repository[T]
    ) -> None:
        [stored] = await self.added(repository, 1)
        key = self.key_of(stored)
        for names in ({5: 1}, {None: 1}, {("a", "b"): 1}):
            with pytest.raises(InvalidInputError):
                await repository.patch(key, names)  # type: ignore[arg-type]
            with pytest.raises(InvalidInputError):
                await repository.update_where(names, everything=True)  # type: ignore[arg-type]
        pairs: Any = list(self.another_value().items())
        with pytest.raises(TypeError):
            await repository.patch(key, pairs)
        with pytest.raises(TypeError):
            await repository.update_where(pairs, everything=True)
        assert await repository.get_all() == [stored]

    async def test_an_entity_without_a_key_cannot_be_updated(self, repository: Repository[T]) -> None:
        [stored] = await self.added(repository, 1)
        keyless = self.change(stored, **dict.fromkeys(self.key_fields))
        for update in (repository.update(keyless), repository.update_many([keyless])):
            with pytest.raises(InvalidInputError) as caught:
                await update
            assert caught.value.fields == self.key_fields
        assert await repository.get_all() == [stored]

    # Bulk

    async def test_w5_add_many_takes_any_number_even_from_a_generator(self, repository: Repository[T]) -> None:
        assert await repository.add_many(self.make_entity(number) for number in range(self.bulk_size)) == self.bulk_size
        assert await repository.count() == self.bulk_size
        assert await repository.add_many([]) == 0

    async def test_w5_add_many_keeps_all_or_nothing(self, repository: Repository[T]) -> None:
        [stored] = await self.added(repository, 1)
        key = {name: self.value(stored, name) for name in self.key_fields}

        def entities() -> Iterator[T]:
            for number in range(2, self.bulk_size):
                yield self.make_entity(number)
            yield self.entity(self.bulk_size, **key)

        with pytest.raises(DuplicateKeyError):
            await repository.add_many(entities())
        assert await repository.get_all() == [stored]

    async def test_w5_an_error_of_the_generator_leaves_nothing_behind(self, repository: Repository[T]) -> None:
        def entities() -> Iterator[T]:
            for number in range(self.bulk_size):
                yield self.make_entity(number)
            raise LookupError("the source broke")

        with pytest.raises(LookupError):
            await repository.add_many(entities())
        assert await repository.count() == 0

    async def test_w5_update_many_writes_all_or_none(self, repository: Repository[T]) -> None:
        stored = await self.added(repository, *range(6))
        changed = [self.change(entity, **self.another_value(number)) for number, entity in enumerate(stored)]
        assert await repository.update_many(changed) == 6
        assert await repository.update_many([]) == 0
        now = await repository.get_many([self.key_of(entity) for entity in stored])
        name = self.any_writable()
        assert [self.value(entity, name) for entity in now] == [self.value(entity, name) for entity in changed]
        gone = now.pop(3)
        await repository.including_deleted().delete(self.key_of(gone))
        again = [self.change(entity, **self.another_value(50)) for entity in [*now, gone]]
        with pytest.raises(NotFoundError):
            await repository.update_many(again)
        assert await repository.get_many([self.key_of(entity) for entity in now]) == now

    async def test_w5_upsert_many_of_any_number_adds_and_writes(self, repository: Repository[T]) -> None:
        on, name = self._on(), self.any_writable()
        stored = await self.added(repository, 1, 2)
        changed = [self.entity(number, **self.another_value(60)) for number in (1, 2)]
        new = (self.make_entity(number) for number in range(3, self.bulk_size))
        assert await repository.upsert_many([*changed, *new], on=on) == self.bulk_size - 1
        assert await repository.upsert_many([], on=on) == 0
        assert await repository.count() == self.bulk_size - 1
        for entity in stored:
            now = await repository.get(self.key_of(entity))
            assert self.value(now, name) == self.another_value(60)[name]

    async def test_upsert_many_of_two_with_one_key_the_later_wins(self, repository: Repository[T]) -> None:
        [stored] = await self.added(repository, 1)
        name = self.any_writable()
        twins = [self.change(stored, **self.another_value(number)) for number in (1, 2)]
        assert await repository.upsert_many(twins) == 2
        assert self.value(await repository.get(self.key_of(stored)), name) == self.another_value(2)[name]

    # Update and patch

    async def test_update_writes_the_entity_and_answers_it_as_stored(self, repository: Repository[T]) -> None:
        stored, other = await self.added(repository, 1, 2)
        name = self.any_writable()
        changed = self.change(stored, **self.another_value())
        before = copy.deepcopy(changed)
        answered = await repository.update(changed)
        assert changed == before, "an argument is left as it was"
        assert self.value(answered, name) == self.another_value()[name]
        assert await repository.get(self.key_of(stored)) == answered
        assert await repository.get(self.key_of(other)) == other

    async def test_w7_update_and_patch_of_an_unknown_entity_raise(self, repository: Repository[T]) -> None:
        stored = await repository.add(self.make_entity(1))
        assert await repository.including_deleted().delete(self.key_of(stored))
        with pytest.raises(NotFoundError):
            await repository.update(stored)
        with pytest.raises(NotFoundError):
            await repository.patch(self.key_of(stored), self.another_value())
        assert await repository.count() == 0

    async def test_w4_patch_writes_null_where_it_is_given_and_leaves_absent_fields_alone(
        self, repository: Repository[T]
    ) -> None:
        name = self.needs("nullable_field")
        [stored] = await self.added(repository, 1)
        key = self.key_of(stored)
        patched = await repository.patch(key, self.another_value() if self.any_writable() != name else {name: None})
        if self.any_writable() != name:
            assert self.value(patched, name) == self.value(stored, name) is not None
        patched = await repository.patch(key, {name: None})
        assert self.value(patched, name) is None
        assert await repository.get(key) == patched
        if self.any_writable() != name:
            assert self.value(patched, self.any_writable()) == self.another_value()[self.any_writable()]

    async def test_patch_refuses_nothing_unknown_fields_the_key_and_the_version(
        self, repository: Repository[T]
    ) -> None:
        [stored] = await self.added(repository, 1)
        key = self.key_of(stored)
        with pytest.raises(InvalidInputError):
            await repository.patch(key, {})
        with pytest.raises(InvalidInputError) as caught:
            await repository.patch(key, {"no_such_field": 1})
        assert caught.value.fields == ("no_such_field",)
        fixed = [self.key_fields[0], *filter(None, [repository.version_column])]
        for name in fixed:
            with pytest.raises(InvalidInputError) as caught:
                await repository.patch(key, {name: self.value(stored, name)})
            assert caught.value.fields == (name,)
        assert await repository.get(key) == stored

    async def test_w7_update_where_writes_what_matches_and_says_how_many(self, repository: Repository[T]) -> None:
        name = self.needs("number_field")
        for number in range(6):
            await repository.add(self.entity(number, **{name: number}))
        assert await repository.update_where({name: 100}, field(name) >= 4) == 2
        assert await repository.update_where({name: 100}, field(name) == 55) == 0
        assert await repository.count(field(name) == 100) == 2
        assert await repository.update_where({name: 0}, everything=True) == 6
        assert await repository.count(field(name) == 0) == 6

    async def test_a_write_without_criteria_is_refused_unless_everything_is_meant(
        self, repository: Repository[T]
    ) -> None:
        [stored] = await self.added(repository, 1)
        with pytest.raises(ValueError, match="everything=True"):
            await repository.update_where(self.another_value())
        with pytest.raises(ValueError, match="everything=True"):
            await repository.delete_where()
        assert await repository.get_all() == [stored]

    # Delete

    async def test_w7_deleting_twice_says_so(self, repository: Repository[T]) -> None:
        stored, kept = await self.added(repository, 1, 2)
        assert await repository.delete(self.key_of(stored)) is True
        assert await repository.delete(self.key_of(stored)) is False
        assert await repository.get_all() == [kept]

    async def test_w7_delete_where_says_how_many(self, repository: Repository[T]) -> None:
        name = self.needs("number_field")
        for number in range(6):
            await repository.add(self.entity(number, **{name: number}))
        assert await repository.delete_where(field(name) < 2) == 2
        assert await repository.delete_where(field(name) < 2) == 0
        assert await repository.delete_where(everything=True) == 4
        assert await repository.count() == 0

    async def test_a_removed_entity_can_be_added_again(self, repository: Repository[T]) -> None:
        [stored] = await self.added(repository, 1)
        await repository.including_deleted().delete(self.key_of(stored))
        again = await repository.add(stored)
        assert self.key_of(again) == self.key_of(stored)

    # Versions and timestamps

    async def test_w3_every_change_counts_the_version_up(self, repository: Repository[T]) -> None:
        column = self.needs_column(repository, "version_column")
        [stored] = await self.added(repository, 1)
        key, first = self.key_of(stored), self.value(stored, column)
        assert isinstance(first, int)
        updated = await repository.update(self.change(stored, **self.another_value(1)))
        patched = await repository.patch(key, self.another_value(2))
        assert [self.value(updated, column), self.value(patched, column)] == [first + 1, first + 2]
        await repository.update_where(self.another_value(3), everything=True)
        assert self.value(await repository.get(key), column) == first + 3
        await repository.update_many([await repository.get(key)])
        assert self.value(await repository.get(key), column) == first + 4
        upserted = await repository.upsert(self.change(stored, **self.another_value(4)))
        assert self.value(upserted, column) == first + 5

    async def test_w3_of_two_writers_from_one_version_one_wins(self, repository: Repository[T]) -> None:
        column = self.needs_column(repository, "version_column")
        [stored] = await self.added(repository, 1)
        writes = [repository.update(self.change(stored, **self.another_value(number))) for number in range(10)]
        answers = await asyncio.gather(*writes, return_exceptions=True)
        lost = [answer for answer in answers if isinstance(answer, StaleVersionError)]
        won = [answer for answer in answers if not isinstance(answer, BaseException)]
        assert (len(won), len(lost)) == (1, 9)
        assert lost[0].fields == (column,)
        assert await repository.get(self.key_of(stored)) == won[0]

    async def test_w3_a_stale_version_changes_nothing(self, repository: Repository[T]) -> None:
        column = self.needs_column(repository, "version_column")
        stale, other = await self.added(repository, 1, 2)
        key, version = self.key_of(stale), self.value(stale, column)
        current = await repository.patch(key, self.another_value(1), version=version)
        with pytest.raises(StaleVersionError):
            await repository.patch(key, self.another_value(2), version=version)
        with pytest.raises(StaleVersionError):
            await repository.update(self.change(stale, **self.another_value(3)))
        with pytest.raises(StaleVersionError):
            await repository.update_many([other, stale])
        with pytest.raises(StaleVersionError):
            await repository.patch(key, self.another_value(2), version=2**70)  # more than any column holds
        assert await repository.get_many([key, self.key_of(other)]) == [current, other]

    async def test_a_new_entity_gets_its_timestamps_and_a_change_moves_only_the_last(
        self, repository: Repository[T]
    ) -> None:
        updated_at = self.needs_column(repository, "updated_at_column")
        created_at = repository.created_at_column
        [stored] = await self.added(repository, 1)
        key = self.key_of(stored)
        assert self.value(stored, updated_at) is not None
        patched = await repository.patch(key, self.another_value(1))
        assert self.value(patched, updated_at) > self.value(stored, updated_at)
        await repository.update_where(self.another_value(2), everything=True)
        moved = await repository.get(key)
        assert self.value(moved, updated_at) > self.value(patched, updated_at)
        updated = await repository.update(self.change(moved, **self.another_value(3)))
        assert self.value(updated, updated_at) > self.value(moved, updated_at)
        upserted = await repository.upsert(self.change(updated, **self.another_value(4)))
        assert self.value(upserted, updated_at) > self.value(updated, updated_at)
        forced = await repository.patch(key, {updated_at: self.value(stored, updated_at)})
        assert self.value(forced, updated_at) > self.value(upserted, updated_at)
        if created_at is not None:
            assert self.value(stored, created_at) is not None
            assert self.value(updated, created_at) == self.value(stored, created_at)

    # Upsert and get-or-add

    def _on(self) -> list[str]:
        """Return a unique key whose values ``make_entity`` supplies, or skip the test."""
        if self.unique_field is not None:
            return [self.unique_field]
        if None in [self.value(self.make_entity(1), name) for name in self.key_fields]:
            pytest.skip("the key is generated, and unique_field is not declared")
        return list(self.key_fields)

    async def test_upsert_adds_and_then_writes_the_same_row(self, repository: Repository[T]) -> None:
        on, name = self._on(), self.any_writable()
        added = await repository.upsert(self.make_entity(1), on=on)
        [other] = await self.added(repository, 2)
        written = await repository.upsert(self.entity(1, **self.another_value()), on=on)
        assert self.key_of(written) == self.key_of(added), "the row keeps its key"
        assert self.value(written, name) == self.another_value()[name]
        assert await repository.get(self.key_of(added)) == written
        assert await repository.get(self.key_of(other)) == other
        assert await repository.count() == 2

    async def test_upsert_goes_by_the_primary_key_unless_told_otherwise(self, repository: Repository[T]) -> None:
        [stored] = await self.added(repository, 1)
        written = await repository.upsert(self.change(stored, **self.another_value()))
        assert self.key_of(written) == self.key_of(stored)
        assert await repository.get_all() == [written]

    async def test_an_upsert_needs_a_value_for_the_key_that_it_goes_by(self, repository: Repository[T]) -> None:
        if self.unique_field is None or self.unique_field != self.nullable_field:
            pytest.skip("unique_field is not nullable_field")
        entity, on = self.entity(1, **{self.unique_field: None}), [self.unique_field]
        attempts: list[Callable[[], Awaitable[Any]]] = [
            lambda: repository.upsert(entity, on=on),
            lambda: repository.upsert_many([entity], on=on),
            lambda: repository.get_or_add(entity, on=on),
        ]
        for attempt in attempts:
            with pytest.raises(InvalidInputError) as caught:
                await attempt()
            assert caught.value.fields == (self.unique_field,)
        assert await repository.count() == 0

    async def test_upsert_on_what_is_not_unique_is_refused(self, repository: Repository[T]) -> None:
        name = self.needs("number_field")
        for on in ([name], ["no_such_field"], []):
            with pytest.raises(ValueError, match="unique"):
                await repository.upsert(self.make_entity(1), on=on)
            with pytest.raises(ValueError, match="unique"):
                await repository.upsert_many([self.make_entity(1)], on=on)
            with pytest.raises(ValueError, match="unique"):
                await repository.get_or_add(self.make_entity(1), on=on)
        assert await repository.count() == 0

    async def test_w1_concurrent_upserts_of_one_key_all_succeed_and_leave_one_row(
        self, repository: Repository[T]
    ) -> None:
        on = self._on()
        answers = await asyncio.gather(
            *(
                repository.upsert(self.entity(1, **self.another_value(task)), on=on)
                for task in range(self.concurrent_tasks)
            )
        )
        assert len({self.key_of(answer) for answer in answers}) == 1
        assert await repository.count() == 1
        column = repository.version_column
        if column is not None:
            versions = sorted(self.value(answer, column) for answer in answers)
            assert versions == list(range(versions[0], versions[0] + self.concurrent_tasks)), "each sees its own write"

    async def test_w1_concurrent_get_or_add_adds_once(self, repository: Repository[T]) -> None:
        on = self._on()
        answers = await asyncio.gather(
            *(repository.get_or_add(self.make_entity(1), on=on) for _ in range(self.concurrent_tasks))
        )
        assert [created for _, created in answers].count(True) == 1
        assert await repository.get_all() == [answers[0][0]]
        assert all(entity == answers[0][0] for entity, _ in answers)

    async def test_get_or_add_leaves_what_is_there_as_it_is(self, repository: Repository[T]) -> None:
        on = self._on()
        [stored] = await self.added(repository, 1)
        found, created = await repository.get_or_add(self.entity(1, **self.another_value()), on=on)
        assert (found, created) == (stored, False)
        added, created = await repository.get_or_add(self.make_entity(2), on=on)
        assert created
        assert await repository.get(self.key_of(added)) == added
