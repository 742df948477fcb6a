"""Any repository behind a cache that follows commit.

The promise is that no read which begins after a write has returned answers what was there before it. It rests on
leases, as in "Scaling Memcache at Facebook" (NSDI 2013): who misses leaves a lease under the key before it asks the
database, and may store what it read only while that lease stands. A write removes, after COMMIT, whatever stands there,
so a reader that asked before the commit finds its lease gone. Each entry also names the generation of its table, a
random value under a key of its own; removing that one key makes every row of the table void at once.

Only the rows as Python values are kept, never entities: each answer is made anew, by the repository's own mapper.
"""

import asyncio
import copy
import math
import random
import secrets
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from itertools import islice
from typing import Any, Final, NamedTuple, NoReturn, Self, TypeGuard, TypeVar
from weakref import WeakKeyDictionary

import sqlalchemy as sa

from fastapi_building_blocks.domain.errors import (
    BuildingBlocksError,
    ConflictError,
    ConstraintError,
    InvalidInputError,
    InvalidQueryError,
    NotFoundError,
    PoolTimeoutError,
    TransientError,
    UnsupportedOperationError,
)
from fastapi_building_blocks.domain.query import (
    And,
    Comparison,
    Criterion,
    CursorPage,
    CursorRequest,
    Operator,
    Page,
    PageRequest,
)
from fastapi_building_blocks.domain.repository import Lock, Repository, SortKeys
from fastapi_building_blocks.infrastructure.cache.cache import HELD, Cache, CacheUnavailable, Flight
from fastapi_building_blocks.infrastructure.database.consistency import reads_from_primary
from fastapi_building_blocks.infrastructure.database.deadlines import time_left
from fastapi_building_blocks.infrastructure.persistence.repositories.declared_repository import DeclaredRepository
from fastapi_building_blocks.infrastructure.persistence.repositories.row_codec import (
    RowCodec,
    has_exact_equality,
    is_same,
    key_text,
)
from fastapi_building_blocks.infrastructure.persistence.repositories.row_mapping import MISSING
from fastapi_building_blocks.infrastructure.persistence.unit_of_work import UnitOfWork, in_background, to_the_end

T = TypeVar("T")
Answer = TypeVar("Answer")

Row = Sequence[Any]

_LEASE_SECONDS: Final = 5.0
"""How long a load may take and still be kept; where its process dies, others wait for it no longer."""
_WAIT_SECONDS: Final = 1.0
"""How long a reader waits for the load of another process before it asks the database itself."""
_FIRST_POLL, _LONGEST_POLL = 0.002, 0.05
_GENERATION_SECONDS: Final = 30 * 86_400.0
_DOUBT_SECONDS: Final = 60.0
"""How long nothing is kept of a row whose write may still be on its way through the database."""
_JITTER: Final = 0.1
_AT_ONCE: Final = 200
"""How many rows of one ``get_many`` are kept at a time, and how many of others' loads it waits for."""
_MOST_KEYS: Final = 256
"""The longest bulk write whose keys are invalidated one by one."""
_ATTEMPTS: Final = 20
_LEASE, _VALUE, _ABSENT = b"L", b"V", b"N"
_KEPT_NOTHING = (
    NotFoundError,
    ConflictError,
    ConstraintError,
    InvalidQueryError,
    UnsupportedOperationError,
    TransientError,
    PoolTimeoutError,
)
"""Errors of a write that say that nothing has changed."""
_IS_OVER = (InvalidInputError, TypeError, ValueError, RuntimeError)
"""Errors that say that a write is over: it was refused, or it is done and its answer makes no entity."""
_READ_COMMITTED = ("READ COMMITTED", "READ UNCOMMITTED")
_READ_COMMITTED_BY_DEFAULT = ("postgresql", "mssql", "memory")

_written: "WeakKeyDictionary[UnitOfWork, set[str]]" = WeakKeyDictionary()
"""The tables that a unit of work has written through a cached view."""


class Stale(NamedTuple):
    """What a write makes void: keys of rows and of finders, and tables as a whole."""

    keys: tuple[str, ...] = ()
    generations: tuple[str, ...] = ()


class _Lookup(NamedTuple):
    """One row by a unique key: where it is kept, and how it is loaded."""

    key: str
    names: tuple[str, ...]
    values: tuple[Any, ...]
    is_primary: bool


class CachedRepository(Repository[T]):
    """The same repository, with ``get_by_id``, ``get``, ``get_many`` and declared finders answered by a cache.

    ::

        users = CachedRepository(UserRepository(session), cache, ttl=300.0, finders=[("email",)])
        await users.get_by_id(42)
        await users.find_one(field("email") == "a@example.org")

    Everything else goes to the repository. A write is invalidated after COMMIT and before it returns; in a unit of
    work by the unit's COMMIT, and not at all by its rollback. Inside a unit the view reads from the cache only at READ
    COMMITTED, only until the unit has written through a cached view of the same table, and never with a lock; it
    keeps nothing that it has read there.

    What changes rows past every cached view - SQL by hand, triggers, another program - is seen after ``ttl`` at the
    latest, or after ``invalidate_all()``. A cache that is away costs its timeout once; reads then go to the store.

    Args:
        repository: on a session, or in a unit of work. Its ``get_by_id``, ``get_many`` and ``find_one`` must be those
            of its base class.
        cache: one for one database, in all processes that write to it.
        ttl: seconds that a row is kept at most; up to a tenth less, so that they do not all end at once.
        finders: unique keys, each a tuple of fields, by which ``find_one`` is answered from the cache.
        remember_misses: seconds for which the absence of a row is kept; None: not at all.

    Raises:
        TypeError: the repository has no rows to keep, or reads in a way of its own.
        ValueError: a finder is no unique key.
    """

    def __init__(
        self,
        repository: Repository[T],
        cache: Cache,
        ttl: float = 300.0,
        *,
        finders: Iterable[Sequence[str]] = (),
        remember_misses: float | None = None,
    ) -> None:
        if not isinstance(repository, DeclaredRepository):
            raise TypeError(f"a {type(repository).__name__} has no rows to keep in a cache")
        if not isinstance(cache, Cache):
            raise TypeError(f"the cache is an InMemoryCache or a RedisCache, not a {type(cache).__name__}")
        if not 0 < ttl < math.inf or not (remember_misses is None or 0 < remember_misses < math.inf):
            raise ValueError("ttl and remember_misses are numbers of seconds greater than 0")
        self._repository: DeclaredRepository[T] = repository
        self._cache = cache
        self._ttl = ttl
        self._remember_misses = remember_misses
        self._plan = plan = _plan_of(type(repository), repository._session.dialect_name, cache.prefix)
        self._finders = frozenset(plan.unique_key(finder) for finder in finders)
        session = repository._session
        self._unit = session if isinstance(session, UnitOfWork) else None
        cache.know_table(plan.generation)
        vars(self).update(plan.declared)

    @classmethod
    def field_types(cls) -> NoReturn:
        raise TypeError("the fields are those of the repository behind the cache: ask its class")

    @property
    def repository(self) -> Repository[T]:
        """The repository behind the cache. What it writes by itself is not invalidated."""
        return self._repository

    # Reads that the cache answers

    async def get(self, id: Any) -> T:
        entity = await self.get_by_id(id)
        if entity is None:
            raise self._repository._missing()
        return entity

    async def get_by_id(self, id: Any, *, lock: Lock | None = None) -> T | None:
        if lock is not None or (self._unit is not None and self._goes_past(self._unit)):
            return await self._repository.get_by_id(id, lock=lock)
        plan = self._plan
        values = self._repository._key_values(id)
        key = plan.row_key(values)
        try:
            generation, entry = await self._cache.get_many((plan.generation, key))
        except CacheUnavailable:
            self._cache.figures.bypasses += 1
            return await self._repository.get_by_id(id)
        row = plan.row(entry, generation)
        if row is not None:
            self._cache.figures.hits += 1
            return self._visible(row[0])
        if self._unit is not None:
            self._cache.figures.misses += 1
            return await self._repository.get_by_id(id)
        return self._visible(await self._load(_Lookup(key, plan.key, values, True), generation, entry))

    async def get_many(self, ids: Iterable[Any]) -> list[T]:
        ids = list(ids)
        if not ids or (self._unit is not None and self._goes_past(self._unit)):
            return await self._repository.get_many(ids)
        plan, figures = self._plan, self._cache.figures
        wanted = [self._repository._key_values(id) for id in ids]
        keys = {values: plan.row_key(values) for values in wanted}
        try:
            generation, *entries = await self._cache.get_many((plan.generation, *keys.values()))
        except CacheUnavailable:
            figures.bypasses += 1
            return await self._repository.get_many(ids)
        rows: dict[tuple[Any, ...], Row | None] = {}
        missing: dict[tuple[Any, ...], bytes | None] = {}
        for values, entry in zip(keys, entries, strict=True):
            row = plan.row(entry, generation)
            if row is None:
                missing[values] = entry
            else:
                figures.hits += 1
                rows[values] = row[0]
        if missing and self._unit is not None:
            figures.misses += len(missing)
            return await self._repository.get_many(ids)
        if missing:
            rows |= await self._load_many({values: keys[values] for values in missing}, generation, missing)
        # A repeat is an entity of its own.
        if len(wanted) != len(rows):
            return [entity for key in wanted if (entity := self._visible(self._own(rows[key]))) is not None]
        return [entity for key in wanted if (entity := self._visible(rows[key])) is not None]

    async def find_one(self, *criteria: Any, lock: Lock | None = None) -> T | None:
        finder = None if lock is not None else self._finder(criteria)
        if finder is None or (self._unit is not None and self._goes_past(self._unit)):
            return await self._repository.find_one(*criteria, lock=lock)
        plan = self._plan
        try:
            generation, entry = await self._cache.get_many((plan.generation, finder.key))
            row = await self._found(finder, generation, entry)
        except CacheUnavailable:
            self._cache.figures.bypasses += 1
            return await self._repository.find_one(*criteria)
        if row is not None:
            return self._visible(row[0])
        if self._unit is not None:
            self._cache.figures.misses += 1
            return await self._repository.find_one(*criteria)
        return self._visible(await self._load(finder, generation, entry))

    async def _pointed_at(self, key: tuple[Any, ...] | None, finder: _Lookup) -> tuple[Row | None] | None:
        """Return the row that a finder's entry leads to, in a tuple, or None where it no longer has these values.

        So an entry may be as old as it likes: what it leads to is checked, and the fields are unique.
        """
        if key is None:
            self._cache.figures.hits += 1
            return (None,)
        text = self._plan.row_key(key)
        generation, entry = await self._cache.get_many((self._plan.generation, text))
        found = self._plan.row(entry, generation)
        if found is not None:
            self._cache.figures.hits += 1
            row = found[0]
        elif self._unit is not None:
            return None
        else:
            row = await self._load(_Lookup(text, self._plan.key, key, True), generation, entry)
        if row is None or not all(map(is_same, self._plan.picked(row, finder.names), finder.values)):
            return None
        return (row,)

    def _finder(self, criteria: Sequence[Any]) -> _Lookup | None:
        """Return the declared finder that the criteria amount to."""
        if not self._finders:
            return None
        wanted: dict[str, Any] = {}
        parts = [part for item in criteria for part in (item.parts if isinstance(item, And) else (item,))]
        for part in parts:
            if not isinstance(part, Comparison) or part.operator is not Operator.EQ or part.value is None:
                return None
            if part.field in wanted:
                return None
            wanted[part.field] = part.value
        names = next((names for names in self._finders if set(names) == set(wanted)), None)
        if names is None:
            return None
        try:
            values = tuple(self._repository._mapping.check(name, wanted[name]) for name in names)
        except BuildingBlocksError:
            return None  # the repository says what is wrong
        return _Lookup(self._plan.finder_key(names, values), names, values, False)

    def _goes_past(self, unit: UnitOfWork) -> bool:
        """Whether reads of the unit must see what the cache does not have: its own writes, or a snapshot."""
        written = _written.get(unit.outermost)
        if written is not None and self._plan.generation in written:
            return True
        isolation = unit.isolation
        if isolation is None:
            return unit.dialect_name not in _READ_COMMITTED_BY_DEFAULT
        return isolation.upper().replace("_", " ") not in _READ_COMMITTED

    def _visible(self, row: Row | None) -> T | None:
        if row is None:
            return None
        repository = self._repository
        mark = self._plan.deleted_place
        if mark is not None and not repository._deleted_too and (row[mark] is not None and row[mark] is not False):
            return None
        return repository._entity_of(row)

    # Misses

    async def _load(self, lookup: _Lookup, generation: bytes | None, entry: bytes | None) -> Row | None:
        """Return the row from the store, by one read of it however many ask at once, and keep it."""
        self._cache.figures.misses += 1
        flights, place = self._cache.flights, (lookup.key, self._plan.codec.version)
        for _ in range(_ATTEMPTS):
            flight = flights.get(place)
            if flight is None or not self._plan.may_join(flight, generation, entry):
                return await self._fly(lookup, generation, entry)
            # Its read of the store begins, or began, after this call did: what it finds is not too old for us.
            outcome = await _outcome_of(flight)
            if outcome is not None:
                self._cache.figures.waits += 1
                return self._own(outcome[0])
            try:
                generation, entry = await self._cache.get_many((self._plan.generation, lookup.key))
                row = await self._found(lookup, generation, entry)
            except CacheUnavailable:
                break
            if row is not None:
                self._cache.figures.waits += 1
                return row[0]
        return await self._read(lookup)

    async def _fly(self, lookup: _Lookup, generation: bytes | None, entry: bytes | None) -> Row | None:
        """Read the row for all who wait for it here, and keep it if nobody has written meanwhile."""
        cache, place = self._cache, (lookup.key, self._plan.codec.version)
        flight = cache.flights[place] = Flight(asyncio.get_running_loop().create_future())
        try:
            try:
                found = await self._take_lease(flight, lookup, generation, entry)
            except CacheUnavailable:
                # Nobody knows when the lease arrives, perhaps after the read and a write: it is worth nothing.
                found = flight.lease = None
            if found is not None:
                return found[0]
            flight.is_loading = True
            row = await self._read(lookup)
            flight.outcome.set_result((row,))
            if flight.lease is not None:
                await to_the_end(self._keep(lookup, flight.lease, row))
            return self._own(row)
        finally:
            self._land(place, flight)

    def _land(self, place: Any, flight: Flight) -> None:
        """End a flight; where it has no outcome, those who wait look again, and its lease is in nobody's way."""
        if self._cache.flights.get(place) is flight:
            del self._cache.flights[place]
        if not flight.outcome.done():
            flight.outcome.set_result(None)
            if flight.lease is not None:
                in_background(self._give_up(place[0], flight.lease))

    async def _take_lease(
        self, flight: Flight, lookup: _Lookup, generation: bytes | None, entry: bytes | None
    ) -> tuple[Row | None] | None:
        """Leave a lease under the key, or wait for the row where somebody else has; None: go on and load."""
        cache, plan = self._cache, self._plan
        end, pause = asyncio.get_running_loop().time() + _WAIT_SECONDS, _FIRST_POLL
        for _ in range(_ATTEMPTS * 5):
            time_left()
            if not _is_generation(generation):
                new = secrets.token_bytes(8)
                if await cache.exchange(plan.generation, generation, new, _GENERATION_SECONDS):
                    generation = new
                    continue
                # Somebody else has begun one, and may have kept the row in it.
            elif HELD in (generation, entry):
                return None
            elif _is_lease(entry, generation):
                # Another process loads it, or a load of this one that began before this call.
                if asyncio.get_running_loop().time() > end:
                    return None
                await asyncio.sleep(pause)
                pause = min(pause * 2, _LONGEST_POLL)
            else:
                lease = _LEASE + plan.codec.version + generation + secrets.token_bytes(8)
                flight.lease = lease
                if await cache.exchange(lookup.key, entry, lease, _LEASE_SECONDS):
                    return None
                flight.lease = None
            generation, entry = await cache.get_many((plan.generation, lookup.key))
            row = await self._found(lookup, generation, entry)
            if row is not None:
                cache.figures.waits += 1
                return row
        return None

    async def _found(self, lookup: _Lookup, generation: bytes | None, entry: bytes | None) -> tuple[Row | None] | None:
        """Return the row that an entry says, in a tuple, or that there is none; None: it does not say."""
        if lookup.is_primary:
            return self._plan.row(entry, generation)
        pointer = self._plan.pointer(entry, generation)
        return None if pointer is None else await self._pointed_at(pointer[0], lookup)

    async def _load_many(
        self,
        keys: Mapping[tuple[Any, ...], str],
        generation: bytes | None,
        entries: Mapping[tuple[Any, ...], bytes | None],
    ) -> dict[tuple[Any, ...], Row | None]:
        """Return rows from the store: those that nobody loads yet by one read, the others from who loads them."""
        plan, cache, loop = self._plan, self._cache, asyncio.get_running_loop()
        rows: dict[tuple[Any, ...], Row | None] = {}
        own: dict[tuple[Any, ...], Flight] = {}
        if not _is_generation(generation):
            generation = await self._begin_generation(generation)
        leased = {values for values, entry in entries.items() if _is_lease(entry, generation)}
        if len(leased) > _AT_ONCE:
            leased.clear()  # one read of them all costs less than to wait for so many, and perhaps in vain
        for values in entries:
            place = (keys[values], plan.codec.version)
            if values not in leased and place not in cache.flights:
                own[values] = cache.flights[place] = Flight(loop.create_future())
        try:
            if generation is not None and generation != HELD:
                await self._lease_all(own, keys, generation, entries)
            for flight in own.values():
                flight.is_loading = True
            together = [values for values in keys if values in own]
            cache.figures.misses += len(together)
            if together:
                with reads_from_primary():
                    cache.figures.loads += 1
                    found = {plan.key_of(row): row for row in await self._repository._rows_by(plan.key, together)}
                for values, flight in own.items():
                    rows[values] = found.get(values) if values in found else await self._other_spelling(values, found)
                    flight.outcome.set_result((rows[values],))
                kept = (
                    self._keep(_Lookup(keys[values], plan.key, values, True), flight.lease, rows[values])
                    for values, flight in own.items()
                    if flight.lease is not None
                )
                await to_the_end(_all(kept))
        finally:
            for values, flight in own.items():
                self._land((keys[values], plan.codec.version), flight)
        others = [values for values in keys if values not in own]
        lookups = [_Lookup(keys[values], plan.key, values, True) for values in others]
        rest = await asyncio.gather(*(self._load(lookup, generation, entries[lookup.values]) for lookup in lookups))
        return {values: self._own(row) for values, row in rows.items()} | dict(zip(others, rest, strict=True))

    async def _begin_generation(self, found: bytes | None) -> bytes | None:
        """Return a new generation of the table in the place of what was found; None where that is not there now."""
        new = secrets.token_bytes(8)
        with suppress(CacheUnavailable):
            if await self._cache.exchange(self._plan.generation, found, new, _GENERATION_SECONDS):
                return new
        return None

    async def _other_spelling(self, values: tuple[Any, ...], found: Mapping[tuple[Any, ...], Row]) -> Row | None:
        """Return the row that the database, but not Python, finds under this key."""
        if self._plan.exact_key or not found:
            return None
        return await self._read(_Lookup("", self._plan.key, values, True))

    async def _lease_all(
        self,
        flights: Mapping[tuple[Any, ...], Flight],
        keys: Mapping[tuple[Any, ...], str],
        generation: bytes,
        entries: Mapping[tuple[Any, ...], bytes | None],
    ) -> None:
        async def lease(values: tuple[Any, ...], flight: Flight) -> None:
            token = _LEASE + self._plan.codec.version + generation + secrets.token_bytes(8)
            flight.lease = token
            taken = False
            try:
                taken = await self._cache.exchange(keys[values], entries[values], token, _LEASE_SECONDS)
            finally:
                if not taken:
                    flight.lease = None

        await _all(lease(values, flight) for values, flight in flights.items() if entries[values] != HELD)

    async def _read(self, lookup: _Lookup) -> Row | None:
        """Return the row as the store has it now, soft-deleted ones included."""
        self._cache.figures.loads += 1
        with reads_from_primary():
            rows = await self._repository._rows_by(lookup.names, [lookup.values])
        return rows[0] if rows else None

    async def _keep(self, lookup: _Lookup, lease: bytes, row: Row | None) -> None:
        """Put the row in the place of the lease; where that is gone, a write came between and the row is not kept."""
        plan, figures = self._plan, self._cache.figures
        version_and_generation = lease[1:17]
        value: bytes | None = None
        seconds = self._ttl
        if row is not None:
            # Under a key that the database alone holds equal to it, no invalidation would find the row.
            if all(map(is_same, plan.picked(row, lookup.names), lookup.values)):
                data = plan.codec.encode(row) if lookup.is_primary else plan.key_codec.encode(plan.key_of(row))
                value = None if data is None else _VALUE + version_and_generation + data
        elif self._remember_misses is not None and plan.is_exact(lookup.names):
            value, seconds = _ABSENT + version_and_generation, self._remember_misses
        # Nothing outlives its generation, and Redis refuses what is no number of milliseconds to it.
        seconds = min(seconds, _GENERATION_SECONDS)
        seconds *= 1 - random.uniform(0, _JITTER)  # noqa: S311 - jitter, not a secret
        try:
            kept = await self._cache.exchange(lookup.key, lease, value, seconds)
        except CacheUnavailable:
            kept = False
        if not kept or (value is None and row is not None):
            figures.refused += 1

    async def _give_up(self, key: str, lease: bytes) -> None:
        with suppress(CacheUnavailable):  # it ends by itself
            await self._cache.exchange(key, lease, None, 1)

    def _own(self, row: Row | None) -> Row | None:
        """Return a row that others have got as well, without sharing what could be changed."""
        places = self._plan.mutable
        if row is None or not places:
            return row
        values = list(row)
        for place in places:
            values[place] = copy.deepcopy(values[place])
        return values

    # Writes

    async def _write(
        self, call: Awaitable[Answer], stale: Callable[[Answer], Stale], doubtful: Callable[[], Stale]
    ) -> Answer:
        """Await a write, and invalidate what it makes void: now, or when its unit of work has committed.

        Args:
            stale: what that is, by the write's answer.
            doubtful: what to distrust where nobody knows whether it was written.
        """
        if self._unit is not None:
            _written.setdefault(self._unit.outermost, set()).update(self._plan.reached)
            try:
                answer = await call
            except Exception as error:
                if not isinstance(error, _KEPT_NOTHING):
                    with suppress(RuntimeError):  # a unit that has ended has kept nothing of it
                        self._follow(self._unit, self._possible(doubtful))
                raise
            self._follow(self._unit, stale(answer))
            return answer
        try:
            answer = await call
        except BaseException as error:
            void = Stale() if isinstance(error, _KEPT_NOTHING) else self._possible(doubtful)
            if any(void):
                hold = 0.0 if isinstance(error, _IS_OVER) else _DOUBT_SECONDS
                await to_the_end(self._cache.invalidate(*void, hold))
            raise
        void = stale(answer)
        if any(void):
            await to_the_end(self._cache.invalidate(*void))
        return answer

    def _follow(self, unit: UnitOfWork, stale: Stale) -> None:
        after = _Invalidation(unit, self._cache, stale)
        unit.on_commit(after, in_doubt=after.distrust, comes_first=True)

    def _possible(self, doubtful: Callable[[], Stale]) -> Stale:
        """Return what a failed write may have made void: nothing where its arguments could not be sent at all."""
        try:
            return doubtful()
        except (BuildingBlocksError, TypeError):
            return Stale()

    async def invalidate_all(self) -> None:
        """Make every row of the table void: after it was changed past the cache."""
        await to_the_end(self._cache.invalidate((), (self._plan.generation,)))

    def _of_entity(self, entity: T) -> Stale:
        """Return what the write of an entity makes void: its row, and the absence of its unique values."""
        try:
            return self._of_argument(entity)
        except (BuildingBlocksError, TypeError):
            return self._plan.whole  # the repository says what is wrong with it

    def _of_argument(self, entity: T) -> Stale:
        """The same for an entity that is to be written, and raises where it cannot be."""
        return self._plan.stale(self._repository._dump(entity))

    def _of_entities(self, entities: Iterable[T], seen: list[Stale]) -> Iterator[T]:
        """Yield entities on, and note what each makes void, up to a number."""
        for entity in entities:
            if len(seen) <= _MOST_KEYS:
                seen.append(self._of_entity(entity))
            yield entity

    def _of_all(self, seen: Sequence[Stale]) -> Stale:
        if len(seen) > _MOST_KEYS or any(item.generations for item in seen):
            return self._plan.whole
        return Stale(tuple(dict.fromkeys(key for item in seen for key in item.keys)))

    def _of_key(self, id: Any) -> Stale:
        if not self._plan.exact_key:
            return self._plan.whole
        return Stale((self._plan.row_key(self._repository._key_values(id)),))

    def _whole(self) -> Stale:
        return self._plan.whole

    async def add(self, entity: T) -> T:
        return await self._write(self._repository.add(entity), self._of_entity, lambda: self._of_argument(entity))

    async def add_many(self, entities: Iterable[T]) -> int:
        seen: list[Stale] = []
        call = self._repository.add_many(self._of_entities(entities, seen))
        return await self._write(call, lambda _: self._of_all(seen), self._whole)

    async def update(self, entity: T) -> T:
        def doubtful() -> Stale:
            return self._plan.with_followers(self._of_argument(entity))

        return await self._write(self._repository.update(entity), self._of_update, doubtful)

    async def patch(self, id: Any, values: Mapping[str, Any], version: int | None = None) -> T:
        def doubtful() -> Stale:
            for name in values:
                self._repository._mapping.check(name, values[name])
            unique = any(name in values for names in self._plan.unique_keys for name in names)
            return self._plan.with_followers(self._plan.whole if unique else self._of_key(id))

        return await self._write(self._repository.patch(id, values, version), self._of_update, doubtful)

    def _of_update(self, entity: T) -> Stale:
        return self._plan.with_followers(self._of_entity(entity))

    def _of_any_update(self) -> Stale:
        return self._plan.with_followers(self._plan.whole)

    async def update_where(self, values: Mapping[str, Any], *criteria: Any, everything: bool = False) -> int:
        call = self._repository.update_where(values, *criteria, everything=everything)
        return await self._write(call, lambda count: self._of_any_update() if count else Stale(), self._of_any_update)

    async def update_many(self, entities: Iterable[T]) -> int:
        seen: list[Stale] = []
        call = self._repository.update_many(self._of_entities(entities, seen))
        return await self._write(call, lambda _: self._plan.with_followers(self._of_all(seen)), self._of_any_update)

    async def upsert(self, entity: T, on: Sequence[str] | None = None) -> T:
        def doubtful() -> Stale:
            void = self._of_argument(entity)
            return self._plan.with_followers(void if on is None else self._plan.whole)

        return await self._write(self._repository.upsert(entity, on), self._of_update, doubtful)

    async def upsert_many(self, entities: Iterable[T], on: Sequence[str] | None = None) -> int:
        seen: list[Stale] = []
        by_key = on is None or set(on) == set(self._plan.key)

        def stale(_: int) -> Stale:
            void = self._of_all(seen) if by_key or not seen else self._plan.whole
            return self._plan.with_followers(void)

        call = self._repository.upsert_many(self._of_entities(entities, seen), on)
        return await self._write(call, stale, self._of_any_update)

    async def get_or_add(self, entity: T, on: Sequence[str] | None = None) -> tuple[T, bool]:
        return await self._write(
            self._repository.get_or_add(entity, on),
            lambda answer: self._of_entity(answer[0]) if answer[1] else Stale(),
            lambda: self._of_argument(entity),
        )

    async def delete(self, id: Any) -> bool:
        def stale() -> Stale:
            return self._plan.with_dependants(self._of_key(id))

        return await self._write(self._repository.delete(id), lambda was: stale() if was else Stale(), stale)

    async def delete_where(self, *criteria: Any, everything: bool = False) -> int:
        def stale() -> Stale:
            return self._plan.with_dependants(self._plan.whole)

        call = self._repository.delete_where(*criteria, everything=everything)
        return await self._write(call, lambda count: stale() if count else Stale(), stale)

    async def restore(self, id: Any) -> bool:
        call = self._repository.restore(id)
        return await self._write(call, lambda was: self._of_key(id) if was else Stale(), lambda: self._of_key(id))

    # What goes to the repository

    def including_deleted(self) -> Self:
        view = copy.copy(self)
        view._repository = self._repository.including_deleted()
        return view

    async def get_all(
        self,
        *criteria: Any,
        sort: SortKeys = (),
        limit: int | None = None,
        offset: int = 0,
        lock: Lock | None = None,
    ) -> list[T]:
        return await self._repository.get_all(*criteria, sort=sort, limit=limit, offset=offset, lock=lock)

    async def paginate(self, request: PageRequest, *criteria: Any, sort: SortKeys = ()) -> Page[T]:
        return await self._repository.paginate(request, *criteria, sort=sort)

    async def paginate_by_cursor(self, request: CursorRequest, *criteria: Any, sort: SortKeys = ()) -> CursorPage[T]:
        return await self._repository.paginate_by_cursor(request, *criteria, sort=sort)

    def stream(self, *criteria: Any, sort: SortKeys = (), batch_size: int = 1000) -> AsyncGenerator[T, None]:
        return self._repository.stream(*criteria, sort=sort, batch_size=batch_size)

    async def count(self, *criteria: Criterion) -> int:
        return await self._repository.count(*criteria)

    async def exists(self, *criteria: Criterion) -> bool:
        return await self._repository.exists(*criteria)


class _Plan:
    """What follows from a repository class, its database and the cache's prefix, worked out once."""

    def __init__(self, repository: type[DeclaredRepository[Any]], dialect_name: str, prefix: str) -> None:
        for method in ("get_by_id", "get_many", "find_one"):
            defined = next(base for base in repository.__mro__ if method in vars(base))
            if not defined.__module__.startswith(f"{__package__}."):
                raise TypeError(f"{repository.__name__}.{method} is its own, and a cache would go past it")
        declaration = repository.declaration()
        table = declaration.table
        names = declaration.mapping.names
        columns = declaration.mapping.columns
        self._places = {name: place for place, name in enumerate(names)}
        self.key = declaration.key
        self.unique_keys = declaration.unique_keys[1:]
        self._prefix = f"{prefix}{table.fullname}"
        self.generation = self._generation_of(prefix, table)
        self._row_prefix = f"{self._prefix}:"
        self.codec = RowCodec(columns)
        self.key_codec = RowCodec([columns[self._places[name]] for name in self.key])
        self._exact = {
            unique: all(has_exact_equality(columns[self._places[name]], dialect_name) for name in unique)
            for unique in declaration.unique_keys
        }
        self.exact_key = self._exact[self.key]
        self.mutable = declaration.mutable
        soft_delete = repository.soft_delete_column
        self.deleted_place = None if soft_delete is None else self._places[soft_delete]
        self.whole = Stale((), (self.generation,))
        self.dependants = tuple(self._generation_of(prefix, other) for other in _dependants(table, "ondelete"))
        self._followers = tuple(self._generation_of(prefix, other) for other in _dependants(table, "onupdate"))
        self.reached = (self.generation, *self.dependants, *self._followers)
        """The tables that a write of this one may change."""
        self._hidden = frozenset(repository.hidden_columns)
        self.declared = {
            name: getattr(repository, name) for name in Repository.__annotations__ if not name.startswith("_")
        } | {"field_types": repository.field_types}

    @staticmethod
    def _generation_of(prefix: str, table: sa.Table) -> str:
        return f"{prefix}{table.fullname}!"

    def unique_key(self, finder: Sequence[str]) -> tuple[str, ...]:
        """Return a finder as the declaration spells it."""
        if isinstance(finder, str):
            raise TypeError("a finder is a tuple of field names, not one string")
        for unique in self.unique_keys:
            if set(unique) == set(finder) and not self._hidden & set(finder):
                return unique
        raise ValueError(f"a finder is a unique key of fields that are not hidden; {tuple(finder)} is none")

    def is_exact(self, names: tuple[str, ...]) -> bool:
        """Whether the database holds equal what Python does, in all of these fields."""
        return self._exact[names]

    # Keys

    def row_key(self, values: tuple[Any, ...]) -> str:
        """Return where the row with this primary key is kept."""
        return self._row_prefix + key_text(values)

    def finder_key(self, names: tuple[str, ...], values: tuple[Any, ...]) -> str:
        """Return where the primary key of the row with these values is kept."""
        return f"{self._prefix}?{','.join(names)}={key_text(values)}"

    def picked(self, row: Row, names: Iterable[str]) -> tuple[Any, ...]:
        """Return some fields of a row."""
        return tuple(row[self._places[name]] for name in names)

    def key_of(self, row: Row) -> tuple[Any, ...]:
        """Return the primary key of a row."""
        return self.picked(row, self.key)

    # Entries

    def row(self, entry: bytes | None, generation: bytes | None) -> tuple[Row | None] | None:
        """Return the row of an entry, in a tuple, or that there is none; None: the entry does not say."""
        data = self._body(entry, generation)
        if data is None:
            return None
        if not data:
            return (None,)
        row = self.codec.decode(data)
        return None if row is None else (row,)

    def pointer(self, entry: bytes | None, generation: bytes | None) -> tuple[tuple[Any, ...] | None] | None:
        """Return the primary key that a finder's entry leads to, likewise."""
        data = self._body(entry, generation)
        if data is None:
            return None
        if not data:
            return (None,)
        key = self.key_codec.decode(data)
        return None if key is None else (tuple(key),)

    def _body(self, entry: bytes | None, generation: bytes | None) -> bytes | None:
        """Return what follows the head of an entry of this version and generation: nothing where the row is absent."""
        if entry is None or generation is None or entry[9:17] != generation or entry[1:9] != self.codec.version:
            return None
        if entry[:1] == _VALUE:
            return entry[17:] or None
        return b"" if entry == _ABSENT + entry[1:17] else None

    def may_join(self, flight: Flight, generation: bytes | None, entry: bytes | None) -> bool:
        """Whether a load that is on its way serves a call which has just read ``generation`` and ``entry``.

        It does if it has not begun to read the store. If it has, its lease must have been standing when the call
        looked: every write that had returned by then would have removed it.
        """
        if not flight.is_loading:
            return True
        return entry is not None and entry == flight.lease and entry[9:17] == generation

    # What writes make void

    def stale(self, values: Row) -> Stale:
        """Return the keys of a row that was written: its own, and those of its unique values."""
        key = self.key_of(values)
        if not self.exact_key or any(value is None or value is MISSING for value in key):
            return self.whole
        keys = [self.row_key(key)]
        for names in self.unique_keys:
            unique = self.picked(values, names)
            if MISSING in unique:
                return self.whole
            if None not in unique:
                keys.append(self.finder_key(names, unique))
        return Stale(tuple(keys))

    def with_dependants(self, stale: Stale) -> Stale:
        """Add the tables whose rows the database removes or changes along with a row of this one."""
        return Stale(stale.keys, (*stale.generations, *self.dependants)) if self.dependants else stale

    def with_followers(self, stale: Stale) -> Stale:
        """Add the tables whose rows the database changes where a referenced value changes."""
        return Stale(stale.keys, (*stale.generations, *self._followers)) if self._followers and any(stale) else stale


@lru_cache(maxsize=1024)
def _plan_of(repository: type[DeclaredRepository[Any]], dialect_name: str, prefix: str) -> _Plan:
    return _Plan(repository, dialect_name, prefix)


def _dependants(table: sa.Table, when: str) -> list[sa.Table]:
    """Return the tables of the same metadata that a foreign key with an action of its own ties to this one."""
    found: list[sa.Table] = []
    waiting = [table]
    while waiting:
        target = waiting.pop()
        for other in table.metadata.tables.values():
            for constraint in other.foreign_key_constraints:
                action = getattr(constraint, when) or "NO ACTION"
                acts = action.upper() not in ("NO ACTION", "RESTRICT")
                if acts and constraint.referred_table is target and other not in found:
                    found.append(other)
                    waiting.append(other)
    return found


class _Invalidation:
    """What one write in a unit of work makes void, once that has committed.

    The first that is called takes the others along, so that a unit of many writes costs one call of the cache.
    """

    def __init__(self, unit: UnitOfWork, cache: Cache, stale: Stale) -> None:
        self._unit = unit.outermost
        self._cache = cache
        self._stale = stale
        self._is_done = False

    async def __call__(self) -> None:
        await self._invalidate(0.0)

    async def distrust(self) -> None:
        """The same where nobody knows whether it has committed, or still will."""
        await self._invalidate(_DOUBT_SECONDS)

    async def _invalidate(self, hold: float) -> None:
        if self._is_done:
            return
        keys: dict[str, None] = {}
        generations: dict[str, None] = {}
        for after in self._unit.after_commit:
            other = after.callback
            if isinstance(other, _Invalidation) and other._cache is self._cache:
                other._is_done = True
                keys.update(dict.fromkeys(other._stale.keys))
                generations.update(dict.fromkeys(other._stale.generations))
        if keys or generations:
            await self._cache.invalidate(tuple(keys), tuple(generations), hold)


async def _outcome_of(flight: Flight) -> Any:
    """Wait for a load, as long as the caller's deadline and a lease allow; None: look again."""
    left = time_left()
    seconds = _LEASE_SECONDS if left is None else min(left, _LEASE_SECONDS)
    done, _ = await asyncio.wait((flight.outcome,), timeout=seconds)
    if not done:
        time_left()
        return None
    return flight.outcome.result()


async def _all(calls: Iterator[Awaitable[None]]) -> None:
    """Await them some at a time: ten thousand tasks hold the event loop up for longer than a cache may take."""
    while part := list(islice(calls, _AT_ONCE)):
        for outcome in await asyncio.gather(*part, return_exceptions=True):
            if isinstance(outcome, BaseException) and not isinstance(outcome, CacheUnavailable):
                raise outcome


def _is_lease(entry: bytes | None, generation: bytes | None) -> bool:
    """Whether somebody loads the row for this generation of its table."""
    return entry is not None and entry[:1] == _LEASE and entry[9:17] == generation


def _is_generation(value: bytes | None) -> TypeGuard[bytes]:
    """Whether these bytes can stand under the key of a generation, and are not anybody else's."""
    return value is not None and (len(value) == 8 or value == HELD)
