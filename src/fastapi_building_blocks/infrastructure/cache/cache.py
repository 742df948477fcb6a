"""What a repository needs of a cache, and a cache in the memory of one process."""

import logging
import time
from abc import ABC, abstractmethod
from asyncio import Future
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, Self

logger = logging.getLogger(__name__)

HELD: Final = b"X"
"""Stands under a key whose row may still change by a write that nobody knows the outcome of: nothing is kept there."""


class CacheUnavailable(Exception):  # noqa: N818 - a signal between cache and repository, never seen by a caller
    """The cache does not answer, or is not to be believed yet: go to the store."""


@dataclass(slots=True)
class CacheStatistics:
    """What came of the reads and writes that went through a cache, counted since it was made, in this process."""

    hits: int = 0
    """Rows that the cache answered."""
    misses: int = 0
    """Rows that it did not."""
    loads: int = 0
    """Reads of the store because of misses."""
    waits: int = 0
    """Misses that were answered by somebody else's load."""
    refused: int = 0
    """Rows that were loaded and not kept: a write came between, or the cache is full or away."""
    invalidations: int = 0
    """Keys that were removed after writes, generations of tables included."""
    bypasses: int = 0
    """Reads that went past the cache because it was away."""
    errors: int = 0
    """Calls of the cache that failed."""
    state: Literal["closed", "open", "returning"] = "closed"
    """The circuit: ``closed`` in use, ``open`` away, ``returning`` back but not yet to be believed."""


class Flight:
    """One load of one row, and those that wait for it."""

    __slots__ = ("is_loading", "lease", "outcome")

    def __init__(self, outcome: "Future[Any]") -> None:
        self.outcome = outcome
        """A tuple with the row, or None in it; None itself: look again."""
        self.lease: bytes | None = None
        """What stands under the key for as long as the row may be kept."""
        self.is_loading = False
        """Whether the read of the store has begun: what it answers may be older than a call that begins now."""


class Cache(ABC):
    """Bytes by key, for a while, as ``CachedRepository`` uses them. One database, one cache, or one ``prefix`` each.

    Values are kept at least as carefully as their invalidations: a store that cannot remove a key says
    ``CacheUnavailable`` to readers until it has.
    """

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        """Stands before every key."""
        self.figures = CacheStatistics()
        self.flights: dict[Any, Flight] = {}
        """The loads of this process that are on their way."""

    def statistics(self) -> CacheStatistics:
        """Return the figures so far; they go on counting."""
        return self.figures

    async def connect(self) -> None:  # noqa: B027 - a cache that has no server has nothing to do
        """Make the cache ready; it is used by itself otherwise. Never fails because a server is away."""

    async def disconnect(self) -> None:  # noqa: B027
        """Give up every connection."""

    async def __aenter__(self) -> Self:
        await self.connect()
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.disconnect()

    def know_table(self, generation: str) -> None:  # noqa: B027
        """Note the generation key of a table that this process reads."""

    @abstractmethod
    async def get_many(self, keys: Sequence[str]) -> Sequence[bytes | None]:
        """Return what stands under each key, in one call of the server.

        Raises:
            CacheUnavailable: go to the store.
        """

    @abstractmethod
    async def exchange(self, key: str, expected: bytes | None, value: bytes | None, seconds: float) -> bool:
        """Put ``value`` under the key if ``expected`` stands there, in one atomic step; answer whether it did.

        Args:
            expected: None: nothing.
            value: None: remove what stands there.
            seconds: how long it is kept.

        Raises:
            CacheUnavailable: nobody knows whether it did; or there is no room.
        """

    @abstractmethod
    async def invalidate(self, keys: Sequence[str], generations: Sequence[str], hold: float = 0.0) -> None:
        """Remove these keys. Never fails: what cannot be removed now is removed before this process reads again.

        Args:
            keys: of rows.
            generations: of tables; removing one invalidates every row of the table.
            hold: seconds for which nothing may be kept under them.
        """


class InMemoryCache(Cache):
    """Bytes in the memory of this process, the least recently used given up first.

    For one process, or for data that may be ``ttl`` old in others: a write in another process does not reach it.

    Args:
        max_entries: how many are kept.
        prefix: stands before every key; one for each database where several share the cache.
        clock: seconds that never go back.
    """

    def __init__(
        self, max_entries: int = 10_000, prefix: str = "", clock: Callable[[], float] = time.monotonic
    ) -> None:
        if type(max_entries) is not int or max_entries < 1:
            raise ValueError("max_entries must be at least 1")
        super().__init__(prefix)
        self._max_entries = max_entries
        self._clock = clock
        self._entries: OrderedDict[str, tuple[bytes, float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def _get(self, key: str) -> bytes | None:
        entry = self._entries.get(key)
        if entry is None:
            return None
        if entry[1] <= self._clock():
            del self._entries[key]
            return None
        self._entries.move_to_end(key)
        return entry[0]

    def _put(self, key: str, value: bytes, seconds: float) -> None:
        self._entries[key] = value, self._clock() + seconds
        self._entries.move_to_end(key)
        if len(self._entries) > self._max_entries:
            self._entries.popitem(last=False)

    async def get_many(self, keys: Sequence[str]) -> Sequence[bytes | None]:
        return [self._get(key) for key in keys]

    async def exchange(self, key: str, expected: bytes | None, value: bytes | None, seconds: float) -> bool:
        if self._get(key) != expected:
            return False
        if value is None:
            self._entries.pop(key, None)
        else:
            self._put(key, value, seconds)
        return True

    async def invalidate(self, keys: Sequence[str], generations: Sequence[str], hold: float = 0.0) -> None:
        self.figures.invalidations += len(keys) + len(generations)
        for key in (*keys, *generations):
            if hold:
                self._put(key, HELD, hold)
            elif key not in generations or self._get(key) != HELD:
                self._entries.pop(key, None)
