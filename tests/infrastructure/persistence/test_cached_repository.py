"""C3 and C5 on any cache: what a cached repository answers around commits, rollbacks, races and other shapes."""

import asyncio
import dataclasses
import itertools
import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, ClassVar

import pytest
import sqlalchemy as sa

from fastapi_building_blocks.domain import (
    BuildingBlocksError,
    CommitOutcomeUnknownError,
    DuplicateKeyError,
    MultipleResultsError,
    NotFoundError,
    field,
)
from fastapi_building_blocks.infrastructure import (
    BaseRepository,
    Cache,
    CachedRepository,
    InMemoryCache,
    InMemorySession,
    RedisCache,
    SQLAlchemyRepository,
    SQLAlchemySession,
    UnitOfWork,
    deadline,
)
from fastapi_building_blocks.infrastructure.cache.cache import CacheUnavailable
from fastapi_building_blocks.infrastructure.persistence.repositories import cached_repository

metadata = sa.MetaData()
counters = sa.Table(
    "counters",
    metadata,
    sa.Column("id", sa.Integer(), primary_key=True),
    sa.Column("number", sa.Integer(), nullable=False),
    sa.Column("email", sa.String(50), unique=True),
    sa.Column("notes", sa.JSON()),
)


@dataclasses.dataclass
class Counter:
    id: int | None
    number: int
    email: str | None = None
    notes: dict[str, Any] | None = None


class Counters(SQLAlchemyRepository[Counter]):
    table = counters


@pytest.fixture
async def session(tmp_path: Any) -> AsyncIterator[SQLAlchemySession]:
    async with SQLAlchemySession(f"sqlite+aiosqlite:///{tmp_path / 'test.db'}") as session:
        await session.create_tables(metadata)
        yield session


@pytest.fixture(params=["in memory", "redis"])
async def cache(request: pytest.FixtureRequest) -> AsyncIterator[Cache]:
    prefix = f"{request.node.nodeid}:"
    if request.param == "in memory":
        cache: Cache = InMemoryCache(prefix=prefix)
    else:
        cache = RedisCache(request.getfixturevalue("redis_url"), prefix=prefix, timeout=2.0)
    async with cache:
        yield cache


@pytest.fixture
async def cached(session: SQLAlchemySession, cache: Cache) -> CachedRepository[Counter]:
    await Counters(session).add(Counter(1, 1, "one@example.org", {"tags": ["a"]}))
    return CachedRepository(Counters(session), cache, finders=[("email",)])


class Reads:
    """The statements that a session has sent, but for those of transactions."""

    def __init__(self, session: SQLAlchemySession) -> None:
        self.names: list[str] = []
        session.observe(lambda event: self.names.append(event.name))

    def taken(self) -> int:
        count = len(self.names)
        self.names.clear()
        return count


# What is answered without the database


async def test_a_second_read_asks_the_cache_alone(cached: Any, session: Any):
    reads = Reads(session)
    first = await cached.get_by_id(1)
    assert reads.taken() == 1
    assert await cached.get_by_id(1) == await cached.get(1) == first
    assert await cached.get_many([1]) == [first]
    assert reads.taken() == 0


async def test_what_is_answered_is_never_shared(cached: Any):
    first, second = await asyncio.gather(cached.get_by_id(1), cached.get_by_id(1))
    third, fourth = await cached.get_many([1, 1])
    fifth, sixth = await cached.get_many([1, 1])
    answers = [first, second, third, fourth, fifth, sixth]
    for one, other in itertools.combinations(answers, 2):
        assert one == other
        assert one is not other
        assert one.notes is not other.notes
    first.notes["tags"].append("b")
    assert (await cached.get_by_id(1)).notes == {"tags": ["a"]}


async def test_many_are_one_call_of_the_cache_and_one_read_of_what_it_lacks(cached: Any, session: Any):
    await cached.add_many(Counter(number, number) for number in range(2, 50))
    await cached.get_many(range(1, 20))
    reads = Reads(session)
    calls = 0
    get_many = cached._cache.get_many

    async def counted(keys: Sequence[str]) -> Any:
        nonlocal calls
        calls += 1
        return await get_many(keys)

    cached._cache.get_many = counted
    assert [counter.id for counter in await cached.get_many([*range(49, 0, -1), 99, 49])] == [*range(49, 0, -1), 49]
    assert (calls, reads.taken()) == (1, 1)
    assert len(await cached.get_many(range(1, 50))) == 49
    assert (calls, reads.taken()) == (2, 0)


@pytest.mark.parametrize("what", ["table held", "table unknown", "rows held", "rows loaded by who died"])
async def test_many_that_cannot_be_kept_are_one_read(cached: Any, session: Any, cache: Cache, what: str):
    await cached.add_many(Counter(number, number) for number in range(2, 301))
    plan, ids = cached._plan, range(1, 301)
    keys = [plan.row_key((id,)) for id in ids]
    if what == "table held":
        await cache.invalidate([], [plan.generation], hold=60)
    elif what == "rows held":
        await cache.invalidate(keys, [], hold=60)
    elif what == "table unknown":
        get_many = cache.get_many

        async def overtaken(wanted: Sequence[str]) -> Any:
            found = await get_many(wanted)
            await cache.exchange(plan.generation, None, b"another!", 60)
            return found

        cache.get_many = overtaken  # type: ignore[method-assign]
    else:
        await cache.exchange(plan.generation, None, b"12345678", 60)
        for key in keys:
            lease = cached_repository._LEASE + plan.codec.version + b"12345678" + b"of a one"
            await cache.exchange(key, None, lease, 60)
    reads = Reads(session)
    assert [counter.id for counter in await cached.get_many(ids)] == [*ids]
    assert reads.taken() <= 2  # on SQLite a statement has so many keys at most


async def test_a_finder_is_answered_from_the_cache_and_checked_against_the_row(cached: Any, session: Any):
    one = field("email") == "one@example.org"
    assert (await cached.find_one(one)).id == 1  # loads by the e-mail address
    assert (await cached.find_one(one)).id == 1  # leads to a key, whose row is loaded
    reads = Reads(session)
    assert (await cached.find_one(one)).id == 1
    assert reads.taken() == 0
    await cached.patch(1, {"email": "two@example.org"})
    await cached.add(Counter(2, 2, "one@example.org"))
    assert (await cached.find_one(one)).id == 2
    assert (await cached.find_one(field("email") == "two@example.org")).id == 1
    await cached.delete(2)
    assert await cached.find_one(one) is None


async def test_other_criteria_go_to_the_repository(cached: Any, session: Any):
    await cached.add(Counter(2, 1))
    with pytest.raises(MultipleResultsError):
        await cached.find_one(field("number") == 1)
    assert (await cached.find_one(field("email") == "one@example.org", field("number") == 1)).id == 1
    assert (await cached.find_one(counters.c.email == "one@example.org")).id == 1
    assert await cached.find_one(field("email") == None) is None  # noqa: E711 - a criterion
    with pytest.raises(BuildingBlocksError):
        await cached.find_one(field("email") == 7)


async def test_misses_are_remembered_if_asked_and_forgotten_by_whatever_makes_the_row_appear(
    session: Any, cache: Cache
):
    forgetful, cached = (
        CachedRepository(Counters(session), cache, finders=[("email",)], remember_misses=seconds)
        for seconds in (None, 60)
    )
    wanted = field("email") == "new@example.org"
    for repository, expected in ((forgetful, 4), (cached, 2)):
        reads = Reads(session)
        for _ in range(2):
            assert await repository.get_by_id(7) is None
            assert await repository.find_one(wanted) is None
        assert reads.taken() == expected
    with pytest.raises(NotFoundError):
        await cached.get(7)

    async def appears(write: Callable[[CachedRepository[Counter]], Awaitable[Any]]) -> None:
        assert await cached.get_by_id(7) is None
        assert await cached.find_one(wanted) is None
        await write(CachedRepository(Counters(session), cache))
        assert (await cached.get_by_id(7)).id == (await cached.find_one(wanted)).id == 7
        assert await cached.delete(7)

    counter = Counter(7, 1, "new@example.org")
    await appears(lambda repository: repository.add(counter))
    await appears(lambda repository: repository.upsert(counter))
    await appears(lambda repository: repository.upsert_many([counter]))
    await appears(lambda repository: repository.get_or_add(counter))
    await appears(lambda repository: repository.add_many([counter]))

    async def with_generated_keys(repository: Any) -> None:
        await repository.add(Counter(6, 1))
        await repository.add_many([Counter(None, 1, "new@example.org")])

    await appears(with_generated_keys)


async def test_rows_end_after_their_time(session: Any):
    now = 0.0
    cache = InMemoryCache(clock=lambda: now)
    cached = CachedRepository(Counters(session), cache, ttl=100.0, remember_misses=10.0)
    await cached.add(Counter(1, 1))
    await cached.get_many([1, 2])
    reads = Reads(session)
    for now, expected in ((8.9, 0), (10.1, 1), (89.9, 1), (100.1, 2)):
        await cached.get_by_id(1)
        await cached.get_by_id(2)
        assert reads.taken() == expected, now


async def test_a_time_that_is_longer_than_redis_takes_is_kept_for_as_long_as_its_table(session: Any, cache: Cache):
    cached = CachedRepository(Counters(session), cache, ttl=1e300, remember_misses=1e300)
    await cached.add(Counter(1, 1))
    await cached.get_many([1, 2])
    reads = Reads(session)
    await cached.get_many([1, 2])
    assert reads.taken() == 0


# C3: the cache follows commit


WRITES: dict[str, Callable[[Any], Awaitable[Any]]] = {
    "update": lambda repository: repository.update(Counter(1, 2, "x@example.org")),
    "patch": lambda repository: repository.patch(1, {"number": 2}),
    "upsert": lambda repository: repository.upsert(Counter(1, 2)),
    "upsert by another key": lambda repository: repository.upsert(Counter(8, 2, "one@example.org"), on=["email"]),
    "update_many": lambda repository: repository.update_many([Counter(1, 2)]),
    "upsert_many": lambda repository: repository.upsert_many([Counter(1, 2)]),
    "upsert_many by another key": lambda repository: repository.upsert_many(
        [Counter(9, 2, "one@example.org")], on=["email"]
    ),
    "upsert_many of a thousand": lambda repository: repository.upsert_many(Counter(n, 2) for n in range(1000, 0, -1)),
    "update_where": lambda repository: repository.update_where({"number": 2}, field("number") == 1),
    "delete": lambda repository: repository.delete(1),
    "delete_where": lambda repository: repository.delete_where(field("number") == 1),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
async def test_c3_no_reader_gets_the_old_value_once_a_write_has_returned(
    cached: Any, session: Any, cache: Cache, write: Any
):
    old = await cached.get_by_id(1)
    await write(CachedRepository(Counters(session), cache))
    new = await cached.get_by_id(1)
    assert new == await Counters(session).get_by_id(1)
    assert new != old
    assert await cached.get_many([1]) == ([] if new is None else [new])


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
async def test_c3_in_a_unit_the_cache_is_bypassed_after_a_write_and_follows_its_commit(
    cached: Any, session: Any, cache: Cache, write: Any
):
    old = await cached.get_by_id(1)
    async with UnitOfWork(session) as unit:
        view = CachedRepository(Counters(unit), cache)
        await write(view)
        inside = await view.get_by_id(1)
        assert inside != old
        assert await CachedRepository(Counters(unit), cache).get_many([1]) == ([] if inside is None else [inside])
        assert await cached.get_by_id(1) == old  # not committed: others are answered what is
    assert await cached.get_by_id(1) == inside


async def test_c3_the_cache_follows_before_any_other_hook_runs(cached: Any, session: Any, cache: Cache):
    seen: list[Any] = []

    async def hook() -> None:
        seen.append(await cached.get_by_id(1))

    await cached.get_by_id(1)
    async with UnitOfWork(session) as unit:
        unit.on_commit(hook)
        await CachedRepository(Counters(unit), cache).patch(1, {"number": 2})
    assert [counter.number for counter in seen] == [2]


async def test_c3_a_rollback_invalidates_nothing(cached: Any, session: Any, cache: Cache):
    old = await cached.get_by_id(1)
    before = cache.statistics().invalidations
    reads = Reads(session)
    async with UnitOfWork(session) as unit:
        await CachedRepository(Counters(unit), cache).patch(1, {"number": 2})
        await unit.rollback()
    with pytest.raises(ZeroDivisionError):
        async with UnitOfWork(session) as unit:
            await CachedRepository(Counters(unit), cache).update_where({"number": 2}, everything=True)
            raise ZeroDivisionError
    with pytest.raises(NotFoundError):
        await cached.update(Counter(99, 1))
    with pytest.raises(DuplicateKeyError):
        await cached.add(Counter(1, 1))
    assert await cached.delete(99) is False
    reads.taken()
    assert await cached.get_by_id(1) == old
    assert reads.taken() == 0
    assert cache.statistics().invalidations == before


async def test_c3_what_a_savepoint_has_undone_invalidates_nothing(cached: Any, session: Any, cache: Cache):
    await cached.add(Counter(2, 2))
    await cached.get_many([1, 2])
    async with UnitOfWork(session) as unit:
        view = CachedRepository(Counters(unit), cache)
        with pytest.raises(ZeroDivisionError):
            async with unit.savepoint():
                await view.patch(1, {"number": 9})
                raise ZeroDivisionError
        async with UnitOfWork(unit) as inner:
            await CachedRepository(Counters(inner), cache).patch(2, {"number": 9})
        assert (await view.get_by_id(2)).number == 9
    reads = Reads(session)
    assert [counter.number for counter in await cached.get_many([1, 2])] == [1, 9]
    assert reads.taken() == 1
    assert cache.statistics().invalidations == 2  # of what was added, and of what was changed


async def test_a_unit_of_many_writes_calls_the_cache_once(cached: Any, session: Any, cache: Cache):
    calls: list[Any] = []
    invalidate = cache.invalidate

    async def counted(*arguments: Any) -> None:
        calls.append(arguments)
        await invalidate(*arguments)

    cache.invalidate = counted  # type: ignore[method-assign]
    async with UnitOfWork(session) as unit:
        for number in range(2, 40):
            await CachedRepository(Counters(unit), cache).add(Counter(number, number))
    [(keys, generations)] = [call[:2] for call in calls]
    assert len(keys) == 38
    assert generations == ()


class Doubtful:
    """Has a session's COMMIT answer that nobody knows what became of it, committed or not."""

    def __init__(self, session: Any, monkeypatch: pytest.MonkeyPatch, *, commits: bool, error: BaseException) -> None:
        real = session.open_transaction

        def open_transaction(*arguments: Any) -> Any:
            backend = real(*arguments)
            commit = backend.commit

            async def doubtful() -> None:
                await (commit() if commits else backend.rollback())
                raise error

            backend.commit = doubtful
            return backend

        monkeypatch.setattr(session, "open_transaction", open_transaction)


@pytest.mark.parametrize("commits", [True, False])
async def test_c3_a_commit_of_unknown_outcome_is_followed_by_distrust(
    cached: Any, session: Any, cache: Cache, monkeypatch: pytest.MonkeyPatch, commits: bool
):
    await cached.get_by_id(1)
    with monkeypatch.context() as patched:
        Doubtful(session, patched, commits=commits, error=CommitOutcomeUnknownError("who knows"))
        with pytest.raises(CommitOutcomeUnknownError):
            async with UnitOfWork(session) as unit:
                await CachedRepository(Counters(unit), cache).patch(1, {"number": 2})
    expected = 2 if commits else 1
    reads = Reads(session)
    # The COMMIT may still be on its way: what is read now is not kept.
    assert [(await cached.get_by_id(1)).number for _ in range(3)] == [expected] * 3
    assert reads.taken() == 3
    await cached.patch(1, {"number": 3})  # it has the row, so that one has ended
    assert [(await cached.get_by_id(1)).number for _ in range(3)] == [3] * 3


async def test_c3_a_write_on_a_session_that_may_have_happened_is_distrusted(
    cached: Any, session: Any, monkeypatch: pytest.MonkeyPatch
):
    await cached.get_by_id(1)

    async def lost(*_: Any) -> Any:
        await session.execute(counters.update().values(number=2))
        raise asyncio.CancelledError

    with monkeypatch.context() as patched:
        patched.setattr(Counters, "patch", lost)
        task = asyncio.ensure_future(cached.patch(1, {"number": 2}))
        with pytest.raises(asyncio.CancelledError):
            await task
    await session.execute(counters.update().values(number=3))  # it was not over when it was cancelled
    assert (await cached.get_by_id(1)).number == 3
    await session.execute(counters.update().values(number=4))
    assert (await cached.get_by_id(1)).number == 4


@dataclasses.dataclass
class Natural:
    id: int
    number: int
    email: str | None = None
    notes: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.number < 0:
            raise ValueError("less than nothing")


class Naturals(SQLAlchemyRepository[Natural]):
    table = counters


async def test_c3_a_write_whose_answer_makes_no_entity_is_followed_all_the_same(
    cached: Any, session: Any, cache: Cache
):
    naturals = CachedRepository(Naturals(session), cache)
    await cached.get_by_id(1)
    with pytest.raises(ValueError, match="nothing"):
        await naturals.patch(1, {"number": -1})
    assert (await cached.get_by_id(1)).number == -1
    async with UnitOfWork(session) as unit:
        with pytest.raises(ValueError, match="nothing"):
            await CachedRepository(Naturals(unit), cache).patch(1, {"number": -2})
    assert (await cached.get_by_id(1)).number == -2


async def test_a_write_that_is_refused_invalidates_nothing(cached: Any, cache: Cache):
    await cached.add(Counter(2, 2, "two@example.org"))
    before = cache.statistics().invalidations
    refused = [
        cached.add(Counter(1, 2**40)),
        cached.add(Counter(1, 1)),
        cached.update(Counter(7, 1)),
        cached.upsert(Counter(1, 1, "x" * 51), on=["email"]),
        cached.get_or_add(Counter(1, 1, "x" * 51)),
        cached.patch(1, {"email": "x" * 51}),
        cached.patch(1, {"email": "two@example.org"}),
        cached.patch("1", {"number": 2}),
        cached.delete("1"),
    ]
    for write in refused:
        with pytest.raises(BuildingBlocksError):
            await write
    assert cache.statistics().invalidations == before


async def test_c3_who_is_cancelled_while_a_write_is_invalidated_has_invalidated(
    cached: Any, session: Any, cache: Cache
):
    await cached.get_by_id(1)
    begun, go_on = asyncio.Event(), asyncio.Event()
    invalidate = cache.invalidate

    async def slow(*arguments: Any) -> None:
        begun.set()
        await go_on.wait()
        await invalidate(*arguments)

    cache.invalidate = slow  # type: ignore[method-assign]
    for write in (cached.patch(1, {"number": 2}), in_a_unit(session, cache, {"number": 3})):
        begun.clear()
        task = asyncio.ensure_future(write)
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    go_on.set()
    for _ in range(50):
        await asyncio.sleep(0.01)
        if cache.statistics().invalidations >= 4:
            break
    assert (await cached.get_by_id(1)).number == 3


async def in_a_unit(session: Any, cache: Cache, values: dict[str, Any]) -> None:
    async with UnitOfWork(session) as unit:
        await CachedRepository(Counters(unit), cache).patch(1, values)


async def test_what_is_changed_past_the_cache_is_seen_after_invalidate_all(cached: Any, session: Any):
    await cached.get_by_id(1)
    await session.execute(counters.update().values(number=2))
    assert (await cached.get_by_id(1)).number == 1
    await cached.invalidate_all()
    assert (await cached.get_by_id(1)).number == 2


# Units of work


@pytest.mark.parametrize("database_url", ["postgres"], indirect=True)
async def test_units_read_from_the_cache_at_read_committed_only_and_never_fill_it(database_url: str, cache: Cache):
    async with SQLAlchemySession(database_url) as session:
        await session.create_tables(metadata)
        cached = CachedRepository(Counters(session), cache)
        await cached.add_many([Counter(1, 1), Counter(2, 2)])
        await cached.get_by_id(1)
        for isolation, expected in ((None, 0), ("READ COMMITTED", 0), ("REPEATABLE READ", 1), ("SERIALIZABLE", 1)):
            async with UnitOfWork(session, isolation) as unit:
                view = CachedRepository(Counters(unit), cache)
                await unit.execute(sa.text("SELECT 1"))
                reads = Reads(session)
                assert (await view.get_by_id(1)).number == 1
                assert reads.taken() == expected, isolation
                assert (await view.get_by_id(1, lock="update")).number == 1
                assert (await view.get_by_id(2)).number == 2
                assert len(await view.get_many([1, 2])) == 2
                assert reads.taken() == 3, isolation
        reads = Reads(session)
        await cached.get_by_id(2)
        assert reads.taken() == 1


async def test_on_a_snapshot_by_default_a_unit_goes_past_the_cache(cached: Any, session: Any, cache: Cache):
    await cached.get_by_id(1)
    async with UnitOfWork(session) as unit:
        reads = Reads(session)
        await CachedRepository(Counters(unit), cache).get_by_id(1)
        assert "counters by key" in reads.names


# Soft delete, foreign keys, text keys, hidden columns

articles = sa.Table(
    "cached_articles",
    metadata,
    sa.Column("id", sa.Integer(), primary_key=True),
    sa.Column("slug", sa.String(50), unique=True),
    sa.Column("deleted", sa.Boolean(), nullable=False),
)
comments = sa.Table(
    "cached_comments",
    metadata,
    sa.Column("id", sa.Integer(), primary_key=True),
    sa.Column("article", sa.ForeignKey(articles.c.id, ondelete="CASCADE")),
)
links = sa.Table(
    "cached_links",
    metadata,
    sa.Column("id", sa.Integer(), primary_key=True),
    sa.Column("slug", sa.ForeignKey(articles.c.slug, onupdate="CASCADE")),
)
words = sa.Table(
    "cached_words",
    metadata,
    sa.Column("word", sa.String(20), primary_key=True),
    sa.Column("number", sa.Integer(), nullable=False),
)


@dataclasses.dataclass
class Article:
    id: int
    slug: str | None
    deleted: bool = False


@dataclasses.dataclass
class Comment:
    id: int
    article: int


@dataclasses.dataclass
class Link:
    id: int
    slug: str


@dataclasses.dataclass
class Word:
    word: str
    number: int


class Articles(SQLAlchemyRepository[Article]):
    table = articles
    soft_delete_column = "deleted"


class Comments(SQLAlchemyRepository[Comment]):
    table = comments


class Padded(SQLAlchemyRepository[Word]):
    table = sa.Table(
        "cached_padded_words",
        metadata,
        sa.Column("word", sa.CHAR(5), primary_key=True),
        sa.Column("number", sa.Integer(), nullable=False),
    )


class Links(SQLAlchemyRepository[Link]):
    table = links


class Words(SQLAlchemyRepository[Word]):
    table = words


async def test_soft_deleted_rows_are_seen_by_those_who_ask(session: Any, cache: Cache):
    cached = CachedRepository(Articles(session), cache, finders=[("slug",)], remember_misses=60)
    slug = field("slug") == "a"
    await cached.add(Article(1, "a"))
    for _ in range(2):
        assert (await cached.get_by_id(1)).id == (await cached.find_one(slug)).id == 1
    assert await cached.delete(1)
    for _ in range(2):
        assert await cached.get_by_id(1) is None
        assert await cached.find_one(slug) is None
        assert await cached.get_many([1]) == []
        assert (await cached.including_deleted().get_by_id(1)).deleted
        assert (await cached.including_deleted().find_one(slug)).deleted
    reads = Reads(session)
    assert await cached.get_by_id(1) is None
    assert reads.taken() == 0
    assert await cached.restore(1)
    assert (await cached.get_by_id(1)).id == (await cached.find_one(slug)).id == 1
    assert await cached.including_deleted().delete(1)
    assert await cached.including_deleted().get_by_id(1) is None


@pytest.mark.parametrize("database_url", ["postgres"], indirect=True)
async def test_c3_what_the_database_changes_along_is_read_past_the_cache_in_the_unit(database_url: str, cache: Cache):
    async with SQLAlchemySession(database_url) as session:
        await session.create_tables(metadata)
        await Articles(session).add(Article(1, "a"))
        links_ = CachedRepository(Links(session), cache)
        await links_.add(Link(1, "a"))
        await links_.get_by_id(1)
        async with UnitOfWork(session) as unit:
            await CachedRepository(Articles(unit), cache).patch(1, {"slug": "b"})
            assert await CachedRepository(Links(unit), cache).get_by_id(1) == Link(1, "b")
        assert await links_.get_by_id(1) == Link(1, "b")


async def test_what_the_database_removes_along_is_removed_from_the_cache(session: Any, cache: Cache):
    articles_, comments_ = CachedRepository(Articles(session), cache), CachedRepository(Comments(session), cache)
    await articles_.add(Article(1, "a"))
    await comments_.add(Comment(1, 1))
    assert await comments_.get_by_id(1) is not None
    await articles_.including_deleted().delete(1)
    assert await comments_.get_by_id(1) is None


@pytest.mark.parametrize("database_url", ["mysql", "postgres"], indirect=True)
async def test_a_key_that_the_database_spells_otherwise_never_answers_what_was(database_url: str, cache: Cache):
    async with SQLAlchemySession(database_url) as session:
        await session.create_tables(metadata)
        cached = CachedRepository(Words(session), cache, remember_misses=60)
        await cached.add(Word("word", 1))
        spellings = ["word", "WORD", "word ", "Word"]

        async def answers() -> list[Any]:
            return [await cached.get_by_id(spelling) for spelling in spellings]

        async def expected() -> list[Any]:
            return [await Words(session).get_by_id(spelling) for spelling in spellings]

        for write in (
            lambda: cached.patch("word", {"number": 2}),
            lambda: cached.update_many([Word("word", 3)]),
            lambda: cached.update(Word("WORD" if session.dialect_name == "mariadb" else "word", 4)),
            lambda: cached.delete("WORD" if session.dialect_name == "mariadb" else "word"),
            lambda: cached.add(Word("wOrd", 5)),
        ):
            assert await answers() == await answers() == await expected()
            many = await cached.get_many(spellings)
            assert len(many) == len([word for word in await expected() if word is not None]) or many
            await write()
            assert await answers() == await answers() == await expected()


# Shapes, and bytes that are not ours


@pytest.mark.parametrize("database_url", ["postgres"], indirect=True)
async def test_a_key_that_the_database_pads_never_answers_what_was(database_url: str, cache: Cache):
    async with SQLAlchemySession(database_url) as session:
        await session.create_tables(metadata)
        cached = CachedRepository(Padded(session), cache, remember_misses=60)
        assert await cached.get_by_id("ab") is None
        await cached.add(Word("ab", 1))
        assert (await cached.get_by_id("ab")).number == (await cached.get_by_id("ab   ")).number == 1
        await cached.delete("ab")
        assert await cached.get_by_id("ab") is await cached.get_by_id("ab   ") is None


async def test_a_program_with_another_shape_of_the_table_reads_nothing_old(session: Any, cache: Cache):
    await Counters(session).add(Counter(1, 1))
    other = sa.Table(
        "counters",
        sa.MetaData(),
        sa.Column("id", sa.Integer(), primary_key=True),
        sa.Column("number", sa.String(20)),
        sa.Column("email", sa.String(50), unique=True),
    )

    @dataclasses.dataclass
    class Newer:
        id: int
        number: str
        email: str | None

    class NewerCounters(SQLAlchemyRepository[Newer]):
        table = other

    old, new = CachedRepository(Counters(session), cache), CachedRepository(NewerCounters(session), cache)
    for number in range(2, 5):
        assert (await old.get_by_id(1)).number == number - 1
        assert type(await new.get_by_id(1)) is Newer
        # What one of them writes, the other sees: a deploy has both for a while.
        await (old.patch(1, {"number": number}) if number % 2 else new.patch(1, {"number": number and str(number)}))


class Damaged(InMemoryCache):
    """Answers what a test puts in the place of the values of rows, or of everything."""

    damage: Callable[[bytes], bytes] = staticmethod(lambda value: value)

    async def get_many(self, keys: Sequence[str]) -> Sequence[bytes | None]:
        values = await super().get_many(keys)
        return [None if value is None else self.damage(value) for value in values]


async def test_corrupt_bytes_are_a_miss(session: Any):
    cache = Damaged()
    cached = CachedRepository(Counters(session), cache, finders=[("email",)])
    counter = await cached.add(Counter(1, 1, "a@example.org", {"a": 1}))
    chosen = random.Random(5)
    for _ in range(300):
        place, bit = chosen.randrange(200), 1 << chosen.randrange(8)
        cache.damage = lambda value, place=place, bit=bit: (
            value[: place % len(value)] + bytes([value[place % len(value)] ^ bit]) + value[place % len(value) + 1 :]
        )
        with deadline(5):
            assert await cached.get_by_id(1) == counter
            assert await cached.find_one(field("email") == "a@example.org") == counter
            assert await cached.get_many([1, 2]) == [counter]
    for foreign in (b"", b"V", b"L" * 25, b"garbage", b"\x80\x04K\x01.", b"X", b"N" * 17):
        cache.damage = lambda _, foreign=foreign: foreign
        assert await cached.get_by_id(1) == counter
        assert await cached.get_many([1]) == [counter]
    cache.damage = lambda value: value
    assert await cached.get_by_id(1) == counter


async def test_bytes_of_others_in_redis_are_a_miss_and_written_over(session: Any, redis_url: str):
    import redis.asyncio

    async with (
        RedisCache(redis_url, prefix="foreign:", timeout=2.0) as cache,
        redis.asyncio.from_url(redis_url) as client,
    ):
        cached = CachedRepository(Counters(session), cache)
        counter = await cached.add(Counter(1, 1))
        plan = cached._plan
        for key in (plan.row_key((1,)), plan.generation):
            for put in (
                lambda key: client.set(key, b"garbage"),
                lambda key: client.rpush(key, b"a list"),
                lambda key: client.set(key, b""),
            ):
                await client.delete(key)
                await put(key)
                assert await cached.get_by_id(1) == counter
                assert await cached.get_by_id(1) == counter
                hits = cache.statistics().hits
                assert await cached.get_by_id(1) == counter
                assert cache.statistics().hits == hits + 1
                await client.delete(key)
                await put(key)
                await cached.patch(1, {"number": counter.number + 1})
                counter = await Counters(session).get(1)
        assert cache.statistics().errors == 0


async def test_a_value_that_would_not_come_back_the_same_is_not_kept(session: Any, cache: Cache):
    class Odd(sa.types.TypeDecorator[Any]):
        impl = sa.String
        cache_ok = True

        def process_result_value(self, value: Any, dialect: Any) -> Any:
            return frozenset(value.split(",")) if value else None

        def process_bind_param(self, value: Any, dialect: Any) -> Any:
            return ",".join(sorted(value)) if value else None

    tables = sa.MetaData()
    table = sa.Table("cached_odd", tables, sa.Column("id", sa.Integer(), primary_key=True), sa.Column("set", Odd(50)))

    @dataclasses.dataclass
    class Thing:
        id: int
        set: Any

    class Things(SQLAlchemyRepository[Thing]):
        pass

    Things.table = table
    await session.create_tables(tables)
    cached = CachedRepository(Things(session), cache)
    await cached.add_many([Thing(1, frozenset("ab")), Thing(2, None)])
    for _ in range(2):
        assert await cached.get_many([1, 2]) == [Thing(1, frozenset("ab")), Thing(2, None)]
    assert cache.statistics().refused == 2


# C5


@pytest.mark.parametrize("of", ["key", "finder"])
async def test_c5_200_concurrent_misses_make_one_read(cached: Any, session: Any, cache: Cache, of: str):
    reads = Reads(session)
    one = field("email") == "one@example.org"
    answers = await asyncio.gather(*(cached.get_by_id(1) if of == "key" else cached.find_one(one) for _ in range(200)))
    assert [answer.number for answer in answers] == [1] * 200
    assert reads.taken() == 1
    assert cache.statistics().loads == 1


@pytest.mark.parametrize("of", ["key", "finder"])
async def test_c5_two_processes_make_one_read(session: Any, redis_url: str, of: str):
    """Two caches that share their Redis alone are what two processes are to each other."""
    await Counters(session).add(Counter(1, 1, "one@example.org"))
    reads = Reads(session)
    one = field("email") == "one@example.org"
    async with (
        RedisCache(redis_url, prefix=f"c5 {of}:", timeout=2.0) as first,
        RedisCache(redis_url, prefix=f"c5 {of}:", timeout=2.0) as second,
    ):
        views = [CachedRepository(Counters(session), cache, finders=[("email",)]) for cache in (first, second)]
        if of == "finder":
            await views[0].get_by_id(1)
            reads.taken()
        answers = await asyncio.gather(
            *(view.get_by_id(1) if of == "key" else view.find_one(one) for view in views for _ in range(100))
        )
        assert [answer.number for answer in answers] == [1] * 200
        assert reads.taken() == 1
        assert first.statistics().loads + second.statistics().loads == (1 if of == "key" else 2)


async def test_c5_who_looked_before_the_first_load_of_all_takes_what_that_has_kept(
    session: Any, redis_url: str, monkeypatch: pytest.MonkeyPatch
):
    await Counters(session).add(Counter(1, 1))
    reads = Reads(session)
    async with RedisCache(redis_url, prefix="c5 late:") as first, RedisCache(redis_url, prefix="c5 late:") as second:
        get_many, asked = second.get_many, 0

        async def late(keys: Any) -> Any:
            nonlocal asked
            asked += 1
            answer = await get_many(keys)
            if asked == 1:
                assert answer == [None, None]
                await CachedRepository(Counters(session), first).get(1)
            return answer

        monkeypatch.setattr(second, "get_many", late)
        assert (await CachedRepository(Counters(session), second).get(1)).number == 1
        assert reads.taken() == 1


async def test_c5_many_with_one_key_in_common_wait_for_its_load(
    cached: Any, session: Any, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(cached_repository, "_WAIT_SECONDS", 30.0)  # on a busy machine a load takes its time
    await cached.add_many(Counter(number, number) for number in range(2, 30))
    reads = Reads(session)
    lists = [[1, number] for number in range(2, 30)]
    answers = await asyncio.gather(*(cached.get_many(ids) for ids in lists))
    assert [[counter.id for counter in answer] for answer in answers] == lists
    assert reads.taken() == len(lists)  # one of them reads 1 as well, the others wait for it


class Gated(InMemoryCache):
    """A cache, and a repository, that stop where a test says."""

    def __init__(self) -> None:
        super().__init__()
        self.gates: dict[str, asyncio.Event] = {}
        self.reached: dict[str, asyncio.Event] = {}

    def stop_at(self, name: str) -> None:
        self.gates[name], self.reached[name] = asyncio.Event(), asyncio.Event()

    async def pass_by(self, name: str) -> None:
        if name in self.gates:
            self.reached[name].set()
            await self.gates[name].wait()


@pytest.mark.parametrize("place", ["before the lease", "before the load", "after the load", "before the store"])
@pytest.mark.parametrize("write", ["patch", "update_where"])
async def test_c3_a_reader_that_loads_before_a_commit_never_leaves_the_old_value_behind(
    session: Any, monkeypatch: pytest.MonkeyPatch, place: str, write: str
):
    cache = Gated()
    cached = CachedRepository(Counters(session), cache)
    await cached.add(Counter(1, 1))
    exchange, rows_by = cache.exchange, Counters._rows_by

    async def gated_exchange(key: str, expected: Any, value: Any, seconds: float) -> bool:
        if key == cached._plan.row_key((1,)):
            await cache.pass_by("before the lease" if value[:1] == b"L" else "before the store")
        return await exchange(key, expected, value, seconds)

    async def gated_rows(self: Any, *arguments: Any) -> Any:
        await cache.pass_by("before the load")
        rows = await rows_by(self, *arguments)
        await cache.pass_by("after the load")
        return rows

    monkeypatch.setattr(cache, "exchange", gated_exchange)
    monkeypatch.setattr(Counters, "_rows_by", gated_rows)
    cache.stop_at(place)
    reader = asyncio.ensure_future(cached.get_by_id(1))
    await cache.reached[place].wait()
    if write == "patch":
        await cached.patch(1, {"number": 2})
    else:
        await cached.update_where({"number": 2}, everything=True)
    gate = cache.gates.pop(place)
    # A reader that begins now must not wait for the first one's load either, if that has begun.
    late = asyncio.ensure_future(cached.get_by_id(1))
    if place != "before the lease":
        assert (await late).number == 2
    gate.set()
    assert (await reader).number in (1, 2)
    assert (await late).number == 2
    assert (await cached.get_by_id(1)).number == 2
    assert (await cached.get_many([1]))[0].number == 2


@pytest.mark.parametrize("steps", range(1, 12))
async def test_a_reader_that_is_cancelled_anywhere_is_in_nobodys_way(cached: Any, cache: Cache, steps: int):
    reader = asyncio.ensure_future(cached.get_by_id(1))
    waiting = [asyncio.ensure_future(cached.get_by_id(1)) for _ in range(5)]
    for _ in range(steps):
        await asyncio.sleep(0)
    reader.cancel()
    await asyncio.gather(reader, return_exceptions=True)
    with deadline(4):  # sooner than its lease ends
        assert [counter.number for counter in await asyncio.gather(*waiting)] == [1] * 5
        assert (await cached.get_by_id(1)).number == 1
    assert not cache.flights


async def test_those_who_wait_for_a_load_that_fails_try_for_themselves(
    cached: Any, cache: Cache, monkeypatch: pytest.MonkeyPatch
):
    rows_by = Counters._rows_by
    failures = 1

    async def failing(self: Any, *arguments: Any) -> Any:
        nonlocal failures
        await asyncio.sleep(0.01)
        if failures:
            failures -= 1
            raise ZeroDivisionError
        return await rows_by(self, *arguments)

    monkeypatch.setattr(Counters, "_rows_by", failing)
    answers = await asyncio.gather(*(cached.get_by_id(1) for _ in range(20)), return_exceptions=True)
    assert sorted(type(answer).__name__ for answer in answers) == ["Counter"] * 19 + ["ZeroDivisionError"]


# C3: ten thousand interleavings


class Scheduler:
    """Lets one of those that wait at a step go on at a time, chosen by chance."""

    def __init__(self, chosen: random.Random) -> None:
        self._chosen = chosen
        self._waiting: list[asyncio.Future[None]] = []

    async def step(self) -> None:
        future = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        await future

    async def run(self, *work: Awaitable[None]) -> None:
        tasks = [asyncio.ensure_future(item) for item in work]
        while not all(task.done() for task in tasks):
            for _ in range(3):
                await asyncio.sleep(0)
            if self._waiting:
                self._waiting.pop(self._chosen.randrange(len(self._waiting))).set_result(None)
        for task in tasks:
            task.result()


class Stepped(InMemoryCache):
    """One process's view of a Redis that it shares: every call goes there and comes back, each in its own time."""

    checks_leases: ClassVar[bool] = True

    def __init__(self, scheduler: Scheduler, entries: Any) -> None:
        super().__init__()
        self._entries = entries
        self._step = scheduler.step

    async def get_many(self, keys: Sequence[str]) -> Sequence[bytes | None]:
        await self._step()
        values = await super().get_many(keys)
        await self._step()
        return values

    async def exchange(self, key: str, expected: Any, value: Any, seconds: float) -> bool:
        await self._step()
        if not self.checks_leases and value is not None and value[:1] == b"V":
            expected = self._get(key)
        answer = await super().exchange(key, expected, value, seconds)
        await self._step()
        return answer

    async def invalidate(self, keys: Sequence[str], generations: Sequence[str], hold: float = 0.0) -> None:
        await self._step()
        await super().invalidate(keys, generations, hold)
        await self._step()


class InMemoryCounters(BaseRepository[Counter]):
    table = counters


async def interleave(seed: int, session: InMemorySession) -> int:
    """Let readers and writers of two processes go their ways, and count the reads that answered what was before."""
    chosen = random.Random(seed)
    scheduler = Scheduler(chosen)
    shared = InMemoryCache()

    class Counters(InMemoryCounters):
        async def _rows_by(self, *arguments: Any) -> Any:
            await scheduler.step()
            rows = await super()._rows_by(*arguments)
            await scheduler.step()
            return rows

    views = [CachedRepository(Counters(session), Stepped(scheduler, shared._entries)) for _ in range(2)]
    committed = sequence = await InMemoryCounters(session).count()
    await InMemoryCounters(session).upsert(Counter(1, 0))
    committed, sequence, stale = 0, 0, 0

    async def read(view: Any) -> None:
        nonlocal stale
        for _ in range(chosen.randint(1, 2)):
            floor = committed
            counter = (await view.get_many([1]))[0] if chosen.random() < 0.3 else await view.get_by_id(1)
            stale += counter.number < floor

    async def write(view: Any) -> None:
        nonlocal sequence, committed
        for _ in range(chosen.randint(1, 2)):
            await scheduler.step()
            sequence += 1
            number = sequence
            if chosen.random() < 0.3:
                await view.update_where({"number": number}, everything=True)
            else:
                await view.patch(1, {"number": number})
            committed = max(committed, number)

    await scheduler.run(*(read(chosen.choice(views)) for _ in range(3)), write(chosen.choice(views)))
    return stale


async def interleavings(count: int) -> int:
    async with InMemorySession() as session:
        return sum([await interleave(seed, session) for seed in range(count)])


async def test_c3_10000_random_interleavings_leave_nothing_stale(
    monkeypatch: pytest.MonkeyPatch, effort: Callable[[int, int], int], shown: Callable[..., None]
):
    monkeypatch.setattr(cached_repository, "_FIRST_POLL", 0)
    monkeypatch.setattr(cached_repository, "_LONGEST_POLL", 0)
    tries = effort(500, 10_000)
    stale = await interleavings(tries)
    shown("C3", "readers and writers in two processes, interleaved by chance", interleavings=tries, stale=stale)
    assert stale == 0


async def test_the_same_interleavings_find_what_leases_are_there_for(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cached_repository, "_FIRST_POLL", 0)
    monkeypatch.setattr(cached_repository, "_LONGEST_POLL", 0)
    with monkeypatch.context() as patched:
        patched.setattr(Stepped, "checks_leases", False)
        assert await interleavings(500) > 0
    with monkeypatch.context() as patched:
        patched.setattr(cached_repository._Plan, "may_join", lambda *_: True)
        assert await interleavings(500) > 0
    assert await interleavings(500) == 0


# A cache that is away


class Away(InMemoryCache):
    """A cache that does not answer from its n-th call on."""

    def __init__(self, calls: int) -> None:
        super().__init__()
        self.left = calls

    def _count(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise CacheUnavailable

    async def get_many(self, keys: Sequence[str]) -> Sequence[bytes | None]:
        self._count()
        return await super().get_many(keys)

    async def exchange(self, key: str, expected: Any, value: Any, seconds: float) -> bool:
        self._count()
        return await super().exchange(key, expected, value, seconds)


@pytest.mark.parametrize("calls", range(8))
async def test_c4_a_cache_that_goes_away_at_any_call_changes_no_answer(session: Any, calls: int):
    cache = Away(10**6)
    cached = CachedRepository(Counters(session), cache, finders=[("email",)], remember_misses=60)
    counter = await cached.add(Counter(1, 1, "a@example.org"))
    one = field("email") == "a@example.org"
    for read, expected in (
        (lambda: cached.get_by_id(1), counter),
        (lambda: cached.get_many([1, 2]), [counter]),
        (lambda: cached.find_one(one), counter),
        (lambda: cached.find_one(one), counter),
        (lambda: cached.get_by_id(2), None),
    ):
        cache.left = calls
        assert await read() == expected
        assert not cache.flights


# What it takes, and what it refuses


async def test_a_view_has_the_attributes_of_its_repository(session: Any, cache: Cache):
    cached = CachedRepository(Articles(session), cache)
    assert cached.soft_delete_column == "deleted"
    assert cached.field_types() == Articles.field_types()
    assert cached.repository.__class__ is Articles
    with pytest.raises(TypeError, match="ask its class"):
        CachedRepository.field_types()


async def test_what_cannot_be_kept_is_refused(session: Any, cache: Cache):
    repository: Any = Counters(session)

    class Own(Counters):
        async def get_by_id(self, id: Any, *, lock: Any = None) -> Any:
            return None

    with pytest.raises(TypeError, match="get_by_id is its own"):
        CachedRepository(Own(session), cache)
    with pytest.raises(TypeError, match="no rows to keep"):
        CachedRepository(CachedRepository(repository, cache), cache)
    with pytest.raises(TypeError, match="not a dict"):
        CachedRepository(repository, {})  # type: ignore[arg-type]
    for ttl in (0, -1, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="ttl"):
            CachedRepository(repository, cache, ttl=ttl)
    with pytest.raises(ValueError, match="unique key"):
        CachedRepository(repository, cache, finders=[("number",)])
    with pytest.raises(TypeError, match="tuple"):
        CachedRepository(repository, cache, finders=["email"])


async def test_nothing_is_logged_while_all_is_well(cached: Any, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.WARNING)
    await cached.get_many([1, 2])
    await cached.patch(1, {"number": 5})
    assert not caplog.records
