"""Reads: by key, by criteria, in order, streamed, soft-deleted ones left out."""

import copy
from contextlib import aclosing
from functools import reduce
from operator import and_, or_
from typing import Any, TypeVar

import pytest

from fastapi_building_blocks.domain import (
    DuplicateKeyError,
    InvalidInputError,
    InvalidQueryError,
    MultipleResultsError,
    NotFoundError,
    Repository,
    Sort,
    field,
)
from fastapi_building_blocks.infrastructure.database.session import DatabaseSession
from fastapi_building_blocks.testing.contract_subject import ContractSubject

T = TypeVar("T")


class ReadContract(ContractSubject[T]):
    """What a repository promises about reading."""

    # By key

    async def test_get_answers_what_add_answered(self, repository: Repository[T]) -> None:
        [stored] = await self.added(repository, 1)
        assert await repository.get(self.key_of(stored)) == stored

    async def test_get_of_an_unknown_key_raises_and_get_by_id_answers_none(self, repository: Repository[T]) -> None:
        key = await self.unknown_key(repository)
        assert await repository.get_by_id(key) is None
        with pytest.raises(NotFoundError):
            await repository.get(key)

    async def test_get_many_keeps_the_order_asked_repeats_and_leaves_missing_ones_out(
        self, repository: Repository[T]
    ) -> None:
        first, second, third = await self.added(repository, 1, 2, 3)
        unknown = await self.unknown_key(repository)
        keys = [self.key_of(third), unknown, self.key_of(first), self.key_of(third), self.key_of(second)]
        assert await repository.get_many(keys) == [third, first, third, second]
        assert await repository.get_many([]) == []

    async def test_a_key_of_another_width_or_type_is_refused(self, repository: Repository[T]) -> None:
        for key in ((1,) * (len(self.key_fields) + 1), object(), [1]):
            with pytest.raises((TypeError, InvalidInputError)):
                await repository.get_by_id(key)

    # By criteria

    async def test_find_one_answers_the_one_none_or_refuses_several(self, repository: Repository[T]) -> None:
        name = self.needs("text_field")
        first, second = await self.added(repository, 1, 2)
        assert await repository.find_one(field(name) == self.value(first, name)) == first
        assert await repository.find_one(field(name) == "nobody has this") is None
        both = [self.value(first, name), self.value(second, name)]
        with pytest.raises(MultipleResultsError):
            await repository.find_one(field(name).is_in(both))

    async def test_every_comparison_of_numbers(self, repository: Repository[T]) -> None:
        name = self.needs("number_field")
        for number in range(1, 6):
            await repository.add(self.entity(number, **{name: number}))
        asked = field(name)
        expected = {
            asked == 3: [3],
            asked != 3: [1, 2, 4, 5],
            asked < 3: [1, 2],
            asked <= 3: [1, 2, 3],
            asked > 3: [4, 5],
            asked >= 3: [3, 4, 5],
            asked.between(2, 4): [2, 3, 4],
            asked.between(4, 2): [],
            asked.is_in([1, 5, 9]): [1, 5],
            asked.is_in([]): [],
            asked.not_in([1, 5, 9]): [2, 3, 4],
            asked.not_in([]): [1, 2, 3, 4, 5],
            (asked < 2) | (asked > 4): [1, 5],
            (asked > 1) & (asked < 4): [2, 3],
            ~(asked == 3): [1, 2, 4, 5],
            ~((asked < 2) | (asked > 4)): [2, 3, 4],
        }
        for criterion, numbers in expected.items():
            found = await repository.get_all(criterion, sort=name)
            assert [self.value(entity, name) for entity in found] == numbers, criterion
            assert await repository.count(criterion) == len(numbers), criterion
            assert await repository.exists(criterion) is bool(numbers), criterion

    async def test_null_is_neither_equal_nor_unequal_nor_its_negation(self, repository: Repository[T]) -> None:
        name = self.needs("nullable_field")
        null = await repository.add(self.entity(1, **{name: None}))
        [valued] = await self.added(repository, 2)
        value = self.value(valued, name)
        asked = field(name)
        assert await repository.get_all(asked.is_null()) == [null]
        assert await repository.get_all(asked.is_not_null()) == [valued]
        assert await repository.get_all(asked == value) == [valued]
        assert await repository.get_all(asked != value) == []
        assert await repository.get_all(~(asked == value)) == []
        assert await repository.get_all(~(asked != value)) == [valued]
        assert await repository.get_all(asked == None) == []  # noqa: E711 - the comparison is what is tested
        assert await repository.get_all(asked != None) == []  # noqa: E711
        assert await repository.get_all(asked.not_in([value])) == []
        assert await repository.count(asked.not_in([])) == 2
        assert await repository.get_all((asked == value) | asked.is_null(), sort=self.key_fields) == sorted(
            [null, valued], key=self._sortable_key
        )

    async def test_r5_search_text_is_taken_literally(self, repository: Repository[T]) -> None:
        name = self.needs("text_field")
        texts = ["100% sure", "100 sure", "a_b", "aXb", "back\\slash", "backslash", "it's", 'say "x"']
        for number, text in enumerate(texts):
            await repository.add(self.entity(number, **{name: text}))

        async def found(criterion: Any) -> list[str]:
            return sorted(self.value(entity, name) for entity in await repository.get_all(criterion))

        assert await found(field(name).contains("0%")) == ["100% sure"]
        assert await found(field(name).contains("a_b")) == ["a_b"]
        assert await found(field(name).contains("\\")) == ["back\\slash"]
        assert await found(field(name).starts_with("100%")) == ["100% sure"]
        assert await found(field(name).icontains("A_B")) == ["a_b"]
        assert await found(field(name).contains("it's")) == ["it's"]
        assert await found(field(name).contains('"x"')) == ['say "x"']
        assert len(await found(field(name).contains(""))) == len(texts)

    async def test_contains_and_starts_with_mind_case_and_icontains_does_not(self, repository: Repository[T]) -> None:
        name = self.needs("text_field")
        stored = await repository.add(self.entity(1, **{name: "Ada Lovelace"}))
        assert await repository.get_all(field(name).contains("Love")) == [stored]
        assert await repository.get_all(field(name).contains("love")) == []
        assert await repository.get_all(field(name).icontains("LOVE")) == [stored]
        assert await repository.get_all(field(name).starts_with("Ada")) == [stored]
        assert await repository.get_all(field(name).starts_with("ada")) == []
        assert await repository.get_all(field(name).starts_with("Love")) == []

    async def test_r5_an_unknown_field_is_refused_by_name(self, repository: Repository[T]) -> None:
        for criterion in (
            field("no_such_field") == 1,
            ~(field("no_such_field") == 1) | field("no_such_field").is_null(),
        ):
            with pytest.raises(InvalidQueryError) as caught:
                await repository.get_all(criterion)
            assert caught.value.fields == ("no_such_field",)
            with pytest.raises(InvalidQueryError):
                await repository.count(criterion)
            with pytest.raises(InvalidQueryError):
                await repository.delete_where(criterion)
        with pytest.raises(InvalidQueryError) as caught:
            await repository.get_all(sort="-no_such_field")
        assert caught.value.fields == ("no_such_field",)
        with pytest.raises(InvalidQueryError):
            await repository.get_all(sort="id; DROP TABLE users")

    async def test_r5_hidden_fields_are_loaded_but_neither_filtered_sorted_nor_listed(
        self, repository: Repository[T]
    ) -> None:
        if not repository.hidden_columns:
            pytest.skip(f"{type(repository).__name__} has no hidden_columns")
        [stored] = await self.added(repository, 1)
        given = self.make_entity(1)
        for name in repository.hidden_columns:
            assert self.value(stored, name) == self.value(given, name)
            assert name not in repository.field_types()
            with pytest.raises(InvalidQueryError) as caught:
                await repository.get_all(field(name).is_not_null())
            assert caught.value.fields == (name,)
            with pytest.raises(InvalidQueryError):
                await repository.get_all(sort=name)

    async def test_r5_a_value_or_operator_that_does_not_suit_the_field_is_refused_by_name(
        self, repository: Repository[T]
    ) -> None:
        name = self.needs("number_field")
        for criterion in (
            field(name) == "three",
            field(name).contains("3"),
            field(name) > object(),
            field(name) == 2**70,
        ):
            with pytest.raises(InvalidQueryError) as caught:
                await repository.get_all(criterion)
            assert caught.value.fields == (name,)

    async def test_long_criteria_are_answered_and_endless_ones_refused(self, repository: Repository[T]) -> None:
        name = self.needs("number_field")
        for number in range(3):
            await repository.add(self.entity(number, **{name: number}))
        assert await repository.count(reduce(or_, [field(name) == number for number in range(1, 500)])) == 2
        assert await repository.count(reduce(and_, [field(name) != number for number in range(1, 500)])) == 1
        assert await repository.count(reduce(lambda part, _: ~part, range(501), field(name) == 1)) == 2
        assert await repository.count(field(name).is_in(range(1, 1000))) == 2
        for endless in (
            [field(name) == number for number in range(5000)],
            [field(name).is_in(range(10_001))],
            [field(name).is_in(range(6000)), field(name).not_in(range(6000))],
        ):
            with pytest.raises(InvalidQueryError):
                await repository.count(*endless)
            with pytest.raises(InvalidQueryError):
                await repository.delete_where(*endless)
        assert await repository.count() == 3

    # Order

    async def test_r1_the_primary_key_closes_every_order(self, repository: Repository[T]) -> None:
        name = self.needs("number_field")
        stored = [await repository.add(self.entity(number, **{name: number % 2})) for number in range(9)]
        by_key = sorted(stored, key=self._sortable_key)
        assert await repository.get_all() == by_key
        assert await repository.get_all(sort=name) == sorted(by_key, key=lambda entity: self.value(entity, name))
        ascending = await repository.get_all(sort=name)
        assert await repository.get_all(sort="-" + name) == ascending[::-1], "in the direction of the last key"

    async def test_sorts_ascend_and_descend_by_several_fields(self, repository: Repository[T]) -> None:
        number, text = self.needs("number_field"), self.needs("text_field")
        stored = [await repository.add(self.entity(index, **{number: index % 3})) for index in range(9)]
        found = await repository.get_all(sort=[Sort(number, descending=True), text])
        assert found == sorted(stored, key=lambda entity: (-self.value(entity, number), self.value(entity, text)))
        found = await repository.get_all(sort=(number, "-" + text))
        stored.reverse()
        assert found == sorted(stored, key=lambda entity: self.value(entity, number))

    async def test_r6_null_sorts_as_the_largest_value_unless_told_otherwise(self, repository: Repository[T]) -> None:
        name = self.needs("nullable_field")
        null = await repository.add(self.entity(1, **{name: None}))
        [valued] = await self.added(repository, 2)
        assert await repository.get_all(sort=name) == [valued, null]
        assert await repository.get_all(sort="-" + name) == [null, valued]
        for descending in (False, True):
            assert await repository.get_all(sort=Sort(name, descending, "first")) == [null, valued]
            assert await repository.get_all(sort=Sort(name, descending, "last")) == [valued, null]

    async def test_limit_and_offset_cut_a_window_out_of_the_order(self, repository: Repository[T]) -> None:
        await self.added(repository, *range(7))
        everything = await repository.get_all()
        assert await repository.get_all(limit=3, offset=2) == everything[2:5]
        assert await repository.get_all(offset=5) == everything[5:]
        assert await repository.get_all(limit=0) == []
        assert await repository.get_all(limit=5, offset=100) == []
        for window in ({"limit": -1}, {"offset": -1}, {"limit": 1.5}, {"offset": True}, {"limit": 2**70}):
            with pytest.raises(InvalidQueryError):
                await repository.get_all(**window)

    # Streams

    async def test_a_stream_answers_every_entity_in_order_whatever_the_batch_size(
        self, repository: Repository[T]
    ) -> None:
        await self.added(repository, *range(10))
        everything = await repository.get_all()
        for batch_size in (1, 3, 10, 1000):
            assert [entity async for entity in repository.stream(batch_size=batch_size)] == everything
        with pytest.raises(ValueError, match="batch_size"):
            _ = [entity async for entity in repository.stream(batch_size=0)]

    async def test_a_stream_takes_criteria_and_sorts(self, repository: Repository[T]) -> None:
        name = self.needs("number_field")
        for number in range(6):
            await repository.add(self.entity(number, **{name: number}))
        found = [self.value(entity, name) async for entity in repository.stream(field(name) < 4, sort="-" + name)]
        assert found == [3, 2, 1, 0]

    async def test_a_stream_left_early_leaves_the_session_usable(self, repository: Repository[T]) -> None:
        await self.added(repository, *range(5))
        async with aclosing(repository.stream(batch_size=1)) as entities:
            async for _ in entities:
                break
        assert await repository.count() == 5

    async def test_a_stream_owns_its_transaction_until_it_is_closed(
        self, session: DatabaseSession, repository: Repository[T]
    ) -> None:
        await self.added(repository, 1, 2, 3)
        async with session.transaction() as unit:
            inside = self.make_repository(unit)
            async with aclosing(inside.stream(batch_size=1)) as entities:
                await anext(aiter(entities))
                with pytest.raises(RuntimeError, match="stream"):
                    await inside.count()
            assert await inside.count() == 3

    # Soft delete

    async def test_r7_a_soft_deleted_entity_is_seen_by_no_read_until_asked_for(self, repository: Repository[T]) -> None:
        self.needs_column(repository, "soft_delete_column")
        gone, kept = await self.added(repository, 1, 2)
        key = self.key_of(gone)
        assert await repository.delete(key) is True
        assert await repository.get_by_id(key) is None
        assert await repository.get_many([key, self.key_of(kept)]) == [kept]
        assert await repository.get_all() == [kept]
        assert await repository.count() == 1
        assert [entity async for entity in repository.stream()] == [kept]
        everyone = repository.including_deleted()
        assert await everyone.count() == 2
        assert await everyone.get_by_id(key) is not None
        assert await repository.count() == 1, "a view must not change the repository it came from"

    async def test_r7_a_soft_deleted_entity_is_touched_by_no_write(self, repository: Repository[T]) -> None:
        self.needs_column(repository, "soft_delete_column")
        [gone] = await self.added(repository, 1)
        key = self.key_of(gone)
        await repository.delete(key)
        assert await repository.delete(key) is False
        with pytest.raises(NotFoundError):
            await repository.update(gone)
        with pytest.raises(NotFoundError):
            await repository.patch(key, self.another_value())
        assert await repository.update_where(self.another_value(), everything=True) == 0
        assert await repository.delete_where(everything=True) == 0

    async def test_r7_restore_brings_back_what_delete_marked_and_the_view_removes_for_good(
        self, repository: Repository[T]
    ) -> None:
        column = self.needs_column(repository, "soft_delete_column")
        [stored] = await self.added(repository, 1)
        key = self.key_of(stored)
        assert await repository.restore(key) is False
        await repository.delete(key)
        assert self.value(await repository.including_deleted().get(key), column)
        assert await repository.restore(key) is True
        assert not self.value(await repository.get(key), column)
        assert await repository.including_deleted().delete(key) is True
        assert await repository.including_deleted().get_by_id(key) is None
        assert await repository.restore(key) is False

    async def test_r7_a_soft_deleted_entity_holds_its_unique_values_and_an_upsert_revives_it(
        self, repository: Repository[T]
    ) -> None:
        column = self.needs_column(repository, "soft_delete_column")
        on = [self.unique_field] if self.unique_field else None
        [stored] = await self.added(repository, 1)
        key = self.key_of(stored)
        await repository.delete(key)
        with pytest.raises(DuplicateKeyError):
            await repository.get_or_add(self.make_entity(1), on=on)
        found, created = await repository.including_deleted().get_or_add(self.make_entity(1), on=on)
        assert (self.key_of(found), created) == (key, False)
        revived = await repository.upsert(self.make_entity(1), on=on)
        assert self.key_of(revived) == key
        assert not self.value(revived, column)
        assert await repository.get(key) == revived

    # Sharing

    async def test_r8_nothing_that_is_answered_or_given_is_shared_with_the_store(
        self, repository: Repository[T]
    ) -> None:
        given = self.make_entity(1)
        before = copy.deepcopy(given)
        stored = await repository.add(given)
        assert given == before, "an argument is left as it was"
        assert stored is not given
        key = self.key_of(stored)
        as_stored = copy.deepcopy(stored)
        for entity in (given, stored, await repository.get(key)):
            self._spoil(entity)
        assert await repository.get(key) == as_stored

    def _spoil(self, entity: T) -> None:
        """Change whatever an entity lets be changed."""
        for name in [*self.another_value()]:
            try:
                setattr(entity, name, self.another_value()[name])
            except (AttributeError, TypeError, ValueError):
                continue  # frozen
        for value in list(getattr(entity, "__dict__", {}).values()):
            if isinstance(value, dict):
                value["spoiled"] = True
            elif isinstance(value, list):
                value.append("spoiled")

    def _sortable_key(self, entity: T) -> tuple[Any, ...]:
        return tuple(self.value(entity, name) for name in self.key_fields)
