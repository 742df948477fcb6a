"""A cache in memory is bounded, and its entries end."""

import pytest

from fastapi_building_blocks.infrastructure.cache.cache import HELD, InMemoryCache


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


async def test_the_least_recently_used_is_given_up_first():
    cache = InMemoryCache(max_entries=3)
    for key in "abc":
        assert await cache.exchange(key, None, b"1", 60)
    assert await cache.get_many(["a"]) == [b"1"]
    assert await cache.exchange("d", None, b"1", 60)
    assert await cache.get_many(list("abcd")) == [b"1", None, b"1", b"1"]
    assert len(cache) == 3


async def test_entries_end_by_a_clock_that_never_goes_back():
    clock = Clock()
    cache = InMemoryCache(clock=clock)
    await cache.exchange("a", None, b"1", 10)
    clock.now = 9.9
    assert await cache.get_many(["a"]) == [b"1"]
    clock.now = 10.0
    assert await cache.get_many(["a"]) == [None]
    assert len(cache) == 0


async def test_an_exchange_takes_place_only_where_what_is_expected_stands():
    cache = InMemoryCache()
    assert not await cache.exchange("a", b"1", b"2", 60)
    assert await cache.exchange("a", None, b"1", 60)
    assert not await cache.exchange("a", None, b"2", 60)
    assert await cache.exchange("a", b"1", b"2", 60)
    assert await cache.exchange("a", b"2", None, 60)
    assert await cache.get_many(["a"]) == [None]


async def test_what_is_held_stays_until_a_write_of_the_row_and_for_a_table_until_its_time():
    clock = Clock()
    cache = InMemoryCache(clock=clock)
    await cache.invalidate(["row"], ["table"], 10)
    assert await cache.get_many(["row", "table"]) == [HELD, HELD]
    await cache.invalidate(["row"], ["table"])
    assert await cache.get_many(["row", "table"]) == [None, HELD]
    clock.now = 10.0
    assert await cache.get_many(["row", "table"]) == [None, None]
    assert cache.statistics().invalidations == 4


@pytest.mark.parametrize("max_entries", [0, -1, 1.5, None])
def test_a_size_that_is_none_is_refused(max_entries):
    with pytest.raises(ValueError, match="max_entries"):
        InMemoryCache(max_entries=max_entries)
