"""Pages: by offset with a choice of counts, by keyset without skip or repeat."""

from collections.abc import Sequence
from typing import Any, TypeVar

import pytest

from fastapi_building_blocks.domain import (
    CursorPage,
    CursorRequest,
    InvalidQueryError,
    PageRequest,
    Repository,
    Sort,
    field,
)
from fastapi_building_blocks.testing.contract_subject import ContractSubject

T = TypeVar("T")

ROWS = 11


class PageContract(ContractSubject[T]):
    """What a repository promises about pages."""

    # By offset

    async def test_r4_every_page_has_the_right_total_and_neighbours(self, repository: Repository[T]) -> None:
        await self.added(repository, *range(5))
        everything = await repository.get_all()
        for offset, has_next in ((0, True), (2, True), (3, False), (4, False)):
            page = await repository.paginate(PageRequest(limit=2, offset=offset))
            assert list(page.items) == everything[offset : offset + 2]
            assert (page.total, page.limit, page.offset) == (5, 2, offset)
            assert (page.has_next, page.has_prev) == (has_next, offset > 0)

    async def test_r4_past_the_last_page_the_total_is_still_right(self, repository: Repository[T]) -> None:
        await self.added(repository, *range(3))
        for offset in (3, 4, 1000, 2**40):
            page = await repository.paginate(PageRequest(limit=2, offset=offset))
            assert (list(page.items), page.total, page.has_next, page.has_prev) == ([], 3, False, True)

    async def test_r4_an_empty_list_is_a_page_too(self, repository: Repository[T]) -> None:
        page = await repository.paginate(PageRequest())
        assert (list(page.items), page.total, page.has_next, page.has_prev) == ([], 0, False, False)

    async def test_r4_counting_is_a_choice(self, repository: Repository[T]) -> None:
        await self.added(repository, *range(5))
        uncounted = await repository.paginate(PageRequest(limit=2, count="none"))
        assert (uncounted.total, uncounted.has_next) == (None, True)
        capped = await repository.paginate(PageRequest(limit=2, count="capped", count_cap=3))
        assert (capped.total, capped.total_is_capped, capped.has_next) == (3, True, True)
        under = await repository.paginate(PageRequest(limit=2, count="capped", count_cap=5))
        assert (under.total, under.total_is_capped) == (5, False)
        estimated = await repository.paginate(PageRequest(limit=2, count="estimated"))
        assert estimated.total is not None
        assert estimated.total >= 3, "an estimate is never less than what the page itself has seen"

    async def test_a_page_takes_criteria_and_sorts(self, repository: Repository[T]) -> None:
        name = self.needs("number_field")
        for number in range(6):
            await repository.add(self.entity(number, **{name: number}))
        page = await repository.paginate(PageRequest(limit=2, offset=1), field(name) >= 2, sort="-" + name)
        assert [self.value(entity, name) for entity in page.items] == [4, 3]
        assert page.total == 4

    async def test_r7_pages_leave_soft_deleted_entities_out(self, repository: Repository[T]) -> None:
        self.needs_column(repository, "soft_delete_column")
        stored = await self.added(repository, *range(3))
        await repository.delete(self.key_of(stored[1]))
        page = await repository.paginate(PageRequest())
        assert (len(page.items), page.total) == (2, 2)
        by_cursor = await repository.paginate_by_cursor(CursorRequest())
        assert len(by_cursor.items) == 2
        assert (await repository.including_deleted().paginate(PageRequest())).total == 3

    # By keyset

    @pytest.mark.parametrize("limit", [1, 2, 4, ROWS - 1, ROWS, ROWS + 1])
    async def test_r2_keyset_pages_are_exact_there_and_back(self, repository: Repository[T], limit: int) -> None:
        for number in range(ROWS):
            await repository.add(self._with_ties_and_nulls(number))
        for sort in self._sorts():
            everything = await repository.get_all(sort=sort)
            pages = await self._forwards(repository, limit, sort)
            assert [entity for page in pages for entity in page.items] == everything, sort
            assert all(len(page.items) == limit for page in pages[:-1])
            assert pages[0].prev_cursor is None
            back = await self._backwards(repository, limit, sort, pages[-1])
            assert [list(page.items) for page in back] == [list(page.items) for page in pages], sort
            assert back[0].prev_cursor is None

    async def test_r2_keyset_pages_keep_to_their_criteria(self, repository: Repository[T]) -> None:
        name = self.needs("number_field")
        for number in range(ROWS):
            await repository.add(self.entity(number, **{name: number}))
        criterion = field(name).between(2, 8)
        pages = await self._forwards(repository, 3, ["-" + name], criterion)
        assert [self.value(entity, name) for page in pages for entity in page.items] == [8, 7, 6, 5, 4, 3, 2]

    async def test_r2_what_is_deleted_or_added_between_pages_moves_no_other_entity(
        self, repository: Repository[T]
    ) -> None:
        name = self.needs("number_field")
        for number in range(0, 20, 2):
            await repository.add(self.entity(number, **{name: number}))
        first = await repository.paginate_by_cursor(CursorRequest(limit=3), sort=name)
        assert self._numbers(first) == [0, 2, 4]
        for entity in (first.items[0], first.items[2]):
            assert await repository.delete(self.key_of(entity)), "even the one at which the cursor stands"
        for number in (1, 3, 5, 7):
            await repository.add(self.entity(number, **{name: number}))
        second = await repository.paginate_by_cursor(CursorRequest(limit=3, cursor=first.next_cursor), sort=name)
        assert self._numbers(second) == [5, 6, 7]
        back = await repository.paginate_by_cursor(CursorRequest(limit=3, cursor=second.prev_cursor), sort=name)
        assert self._numbers(back) == [1, 2, 3]

    async def test_r2_a_page_whose_rows_were_all_deleted_leads_back(self, repository: Repository[T]) -> None:
        await self.added(repository, *range(4))
        everything = await repository.get_all()
        first = await repository.paginate_by_cursor(CursorRequest(limit=2))
        for entity in everything[2:]:
            assert await repository.delete(self.key_of(entity))
        empty = await repository.paginate_by_cursor(CursorRequest(limit=2, cursor=first.next_cursor))
        assert (list(empty.items), empty.next_cursor) == ([], None)
        back = await repository.paginate_by_cursor(CursorRequest(limit=2, cursor=empty.prev_cursor))
        assert list(back.items) == everything[:2]
        assert (back.next_cursor, back.prev_cursor) == (None, None)

    async def test_r2_the_direction_can_be_turned_on_every_page(self, repository: Repository[T]) -> None:
        await self.added(repository, *range(6))
        everything = await repository.get_all()
        first = await repository.paginate_by_cursor(CursorRequest(limit=2))
        second = await repository.paginate_by_cursor(CursorRequest(limit=2, cursor=first.next_cursor))
        again = await repository.paginate_by_cursor(CursorRequest(limit=2, cursor=second.prev_cursor))
        onwards = await repository.paginate_by_cursor(CursorRequest(limit=2, cursor=again.next_cursor))
        assert list(again.items) == list(first.items) == everything[:2]
        assert list(onwards.items) == list(second.items) == everything[2:4]

    async def test_r2_a_cursor_belongs_to_its_sort_and_its_filter(self, repository: Repository[T]) -> None:
        name = self.needs("number_field")
        for number in range(4):
            await repository.add(self.entity(number, **{name: number}))
        page = await repository.paginate_by_cursor(CursorRequest(limit=2), field(name) >= 0, sort=name)
        request = CursorRequest(limit=2, cursor=page.next_cursor)
        assert (await repository.paginate_by_cursor(request, field(name) >= 0, sort=name)).items
        for criteria, sort in (
            ((field(name) >= 0,), "-" + name),
            ((field(name) >= 0,), ()),
            ((field(name) >= 1,), name),
            ((), name),
        ):
            with pytest.raises(InvalidQueryError) as caught:
                await repository.paginate_by_cursor(request, *criteria, sort=sort)
            assert caught.value.fields == ("cursor",)

    @pytest.mark.parametrize("cursor", ["x", "====", "e30", "WzEsMiwzXQ", "W10", "\N{PILE OF POO}", "A" * 10_000])
    async def test_r2_a_malformed_cursor_is_refused(self, repository: Repository[T], cursor: str) -> None:
        with pytest.raises(InvalidQueryError) as caught:
            await repository.paginate_by_cursor(CursorRequest(cursor=cursor))
        assert caught.value.fields == ("cursor",)

    async def test_r2_a_cursor_that_somebody_changed_is_refused_or_harmless(self, repository: Repository[T]) -> None:
        await self.added(repository, *range(4))
        cursor = (await repository.paginate_by_cursor(CursorRequest(limit=2))).next_cursor
        assert cursor is not None
        for place in range(0, len(cursor), 3):
            changed = cursor[:place] + ("A" if cursor[place] != "A" else "B") + cursor[place + 1 :]
            try:
                page = await repository.paginate_by_cursor(CursorRequest(limit=2, cursor=changed))
            except InvalidQueryError:
                continue
            assert len(page.items) <= 2

    def _with_ties_and_nulls(self, number: int) -> T:
        values: dict[str, Any] = {}
        if self.number_field is not None:
            values[self.number_field] = number % 3
        if self.nullable_field is not None and number % 4 == 0:
            values[self.nullable_field] = None
        return self.entity(number, **values)

    def _sorts(self) -> list[list[str | Sort]]:
        """Return orders over every declared field: up, down, mixed, NULLs first and last."""
        found: list[list[str | Sort]] = [[], ["-" + name for name in self.key_fields]]
        for name in (self.number_field, self.text_field, self.nullable_field):
            if name is not None:
                found += [[name], ["-" + name]]
        if self.number_field is not None and self.text_field is not None:
            found += [[self.number_field, "-" + self.text_field], ["-" + self.number_field, self.text_field]]
        if self.nullable_field is not None:
            for descending in (False, True):
                found += [
                    [Sort(self.nullable_field, descending, "first")],
                    [Sort(self.nullable_field, descending, "last")],
                ]
            if self.number_field is not None:
                found += [
                    ["-" + self.number_field, self.nullable_field],
                    [self.nullable_field, "-" + self.number_field],
                ]
        return found

    async def _forwards(
        self, repository: Repository[T], limit: int, sort: Sequence[str | Sort], *criteria: Any
    ) -> list[CursorPage[T]]:
        pages = [await repository.paginate_by_cursor(CursorRequest(limit=limit), *criteria, sort=sort)]
        while pages[-1].next_cursor is not None:
            request = CursorRequest(limit=limit, cursor=pages[-1].next_cursor)
            pages.append(await repository.paginate_by_cursor(request, *criteria, sort=sort))
            assert len(pages) <= ROWS + 1, "the pages do not end"
        return pages

    async def _backwards(
        self, repository: Repository[T], limit: int, sort: Sequence[str | Sort], last: CursorPage[T]
    ) -> list[CursorPage[T]]:
        """Return the pages from the first to ``last``, read from the last one back."""
        pages = [last]
        while pages[0].prev_cursor is not None:
            request = CursorRequest(limit=limit, cursor=pages[0].prev_cursor)
            pages.insert(0, await repository.paginate_by_cursor(request, sort=sort))
            assert len(pages) <= ROWS + 1, "the pages do not end"
        return pages

    def _numbers(self, page: CursorPage[T]) -> list[int]:
        return [self.value(entity, self.needs("number_field")) for entity in page.items]
