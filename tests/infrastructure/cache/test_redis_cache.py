"""What Redis is asked, and what a cache does when it does not answer."""

import asyncio
import logging
import sys
import time
import traceback
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import pytest
import redis.asyncio
from sqlalchemy import make_url

from fastapi_building_blocks.infrastructure.cache import redis_cache
from fastapi_building_blocks.infrastructure.cache.cache import HELD, CacheUnavailable
from fastapi_building_blocks.infrastructure.cache.redis_cache import RedisCache
from fastapi_building_blocks.testing import FaultProxy


@pytest.fixture
async def client(redis_url: str) -> AsyncIterator[Any]:
    async with redis.asyncio.from_url(redis_url) as client:
        yield client


@pytest.fixture
async def cache(redis_url: str, request: pytest.FixtureRequest) -> AsyncIterator[RedisCache]:
    async with RedisCache(redis_url, prefix=f"{request.node.name}:", timeout=2.0) as cache:
        yield cache


@pytest.fixture
def key(request: pytest.FixtureRequest) -> str:
    return f"{request.node.name}:key"


async def until(condition: Any, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        await asyncio.sleep(0.01)


# Calls


async def test_an_exchange_takes_place_only_where_what_is_expected_stands(cache: RedisCache, client: Any, key: str):
    assert not await cache.exchange(key, b"1", b"2", 60)
    assert await cache.exchange(key, None, b"1", 60)
    assert 59_000 < await client.pttl(key) <= 60_000
    assert await cache.exchange(key, None, b"1", 60)  # as where the answer to a first attempt was lost
    assert not await cache.exchange(key, None, b"2", 60)
    assert await cache.exchange(key, b"1", b"\0\xff", 0.0001)
    while await client.exists(key):
        await asyncio.sleep(0.001)
    assert await cache.exchange(key, None, b"1", 60)
    assert await cache.exchange(key, b"1", None, 60)
    assert await cache.get_many([key]) == [None]


async def test_what_is_held_stays_until_a_write_of_the_row_and_for_a_table_until_its_time(
    cache: RedisCache, client: Any, key: str
):
    await cache.invalidate([key], [f"{key}!"], 10)
    assert await cache.get_many([key, f"{key}!"]) == [HELD, HELD]
    assert 9_000 < await client.pttl(key) <= 10_000
    await cache.invalidate([key], [f"{key}!"])
    assert await cache.get_many([key, f"{key}!"]) == [None, HELD]


async def test_calls_of_one_turn_are_one_call_of_redis(cache: RedisCache, client: Any, key: str):
    await client.mset({f"{key}{number}": b"%d" % number for number in range(64)})
    before = (await client.info("stats"))["total_commands_processed"]
    answers = await asyncio.gather(*(cache.get_many([f"{key}{number}", f"{key}0"]) for number in range(64)))
    assert answers == [[b"%d" % number, b"0"] for number in range(64)]
    assert (await client.info("stats"))["total_commands_processed"] - before < 30  # others use the server as well


async def test_a_call_of_ten_thousand_keys_travels_in_parts(cache: RedisCache, monkeypatch: pytest.MonkeyPatch):
    sizes: list[int] = []
    execute = cache._execute

    async def measured(commands: Any, **how: Any) -> Any:
        sizes.append(sum(max(1, len(command) - 1) if command[0] == "MGET" else 1 for command in commands))
        return await execute(commands, **how)

    monkeypatch.setattr(cache, "_execute", measured)
    keys = [f"{cache.prefix}{number}" for number in range(10_000)]
    values = [str(number).encode() for number in range(1_100)]
    wanted = zip(keys, values, strict=False)
    assert all(await asyncio.gather(*(cache.exchange(key, None, value, 60) for key, value in wanted)))
    assert await cache.get_many(keys) == [*values, *[None] * 8_900]
    assert max(sizes) <= 500
    assert len(sizes) == 3 + 20


async def test_who_is_cancelled_takes_nothing_from_the_others(cache: RedisCache, key: str):
    await cache.exchange(key, None, b"1", 60)
    calls = [asyncio.ensure_future(cache.get_many([key])) for _ in range(10)]
    await asyncio.sleep(0)
    for call in calls[::2]:
        call.cancel()
    answers = await asyncio.gather(*calls, return_exceptions=True)
    assert answers[1::2] == [[b"1"]] * 5
    assert await cache.get_many([key]) == [b"1"]
    assert cache.statistics().errors == 0


async def test_it_connects_by_itself(redis_url: str, key: str):
    cache = RedisCache(redis_url, timeout=2.0)
    assert await cache.get_many([key]) == [None]
    await cache.disconnect()
    with pytest.raises(CacheUnavailable):
        await cache.get_many([key])


# Where it is


@pytest.mark.parametrize(
    ("url", "kind"),
    [
        ("redis://127.0.0.1:1/0", "server"),
        ("rediss://user:secret@127.0.0.1:1/0?ssl_cert_reqs=none", "server"),
        ("unix:///nowhere?db=1", "server"),
        ("redis+sentinel://127.0.0.1:1,localhost/service/2?sentinel_password=other", "sentinel"),
        ("rediss+sentinel://user:p%40ss@127.0.0.1:1/service", "sentinel"),
        ("redis+cluster://127.0.0.1:1,[::1]:7000", "cluster"),
        ("rediss+cluster://:secret@127.0.0.1:1?ssl_cert_reqs=none", "cluster"),
    ],
)
async def test_every_kind_of_url_makes_a_client_which_is_away(url: str, kind: str, caplog: pytest.LogCaptureFixture):
    cache = RedisCache(url)
    assert f"RedisCache({kind}" in repr(cache)
    assert "secret" not in repr(cache)
    async with cache:
        assert cache.statistics().state == "open"
    assert "secret" not in caplog.text


def test_a_url_says_who_where_and_how():
    place = RedisCache("rediss+sentinel://user:p%40ss@one:1,two/service/2?sentinel_password=other")._place
    assert place._hosts == [("one", 1), ("two", 26379)]
    assert place._service == "service"
    assert place._options == {"username": "user", "password": "p@ss", "db": 2}
    assert place._sentinel_login == {"password": "other"}
    assert place._is_encrypted


def test_it_serves_one_event_loop_after_another(redis_url: str, key: str):
    cache = RedisCache(redis_url, prefix=f"{key}:", timeout=2.0)

    async def serve() -> None:
        async with cache:
            await asyncio.sleep(1.2)  # longer than an answer is believed in: its watcher must have looked
            await cache.get_many([key])

    for _ in range(2):
        asyncio.run(serve())
    assert cache.statistics().errors == 0


@pytest.mark.parametrize(
    "url",
    [
        "http://localhost",
        "localhost:6379",
        "redis+other://localhost",
        "unix+cluster:///x",
        "redis+sentinel://localhost",
        "redis+sentinel://localhost/service/0/1",
        "redis+cluster://localhost/0",
        "redis+cluster://",
        "redis+cluster://:7000",
    ],
)
def test_other_urls_are_refused(url: str):
    with pytest.raises(ValueError, match="URL"):
        RedisCache(url)


@pytest.mark.parametrize(
    "url",
    [
        "redis://user:sec#ret@localhost",
        "redis://user:sec/ret@localhost",
        "redis://user:sec[ret@localhost",
        "redis://user:sec\u2100ret@localhost",
        "redis://user:secret@localhost:port",
        "redis://localhost?socket_keepalive_typo=secret",
        "redis://localhost?socket_timeout=secret",
        "redis+cluster://user:sec#ret@localhost",
        "redis+cluster://user:secret@localhost:70000",
        "redis+sentinel://user:sec/ret@localhost/service",
    ],
)
def test_a_url_that_cannot_be_read_is_refused_at_once_and_not_quoted(url: str):
    with pytest.raises(ValueError, match="Redis URL") as refused:
        RedisCache(url)
    told = "".join(traceback.format_exception_only(refused.value))
    assert "sec" not in told
    assert refused.value.__cause__ is refused.value.__context__ is None


def test_without_redis_py_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "redis", None)
    with pytest.raises(ImportError, match=r"fastapi-building-blocks\[redis\]"):
        RedisCache("redis://localhost")


@pytest.mark.parametrize("timeout", [0, -1, 10])
def test_a_timeout_that_is_none_is_refused(timeout: float):
    with pytest.raises(ValueError, match="timeout"):
        RedisCache("redis://localhost", timeout=timeout)


# Away


@pytest.fixture
async def behind(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[FaultProxy, RedisCache]]:
    monkeypatch.setattr(redis_cache, "_GRACE", 0.4)
    address = make_url(redis_url)
    async with (
        FaultProxy(address.host or "", address.port or 6379) as proxy,
        RedisCache(proxy.url(redis_url), prefix="behind:", timeout=0.1) as cache,
    ):
        monkeypatch.setattr(cache, "_last_answer", float("inf"), raising=True)
        yield proxy, cache


@pytest.mark.parametrize("fault", ["silent", "refused"])
async def test_c4_what_is_invalidated_while_it_is_away_is_gone_before_it_is_read_again(
    behind: tuple[FaultProxy, RedisCache], client: Any, fault: str, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO, "fastapi_building_blocks")
    proxy, cache = behind
    cache.know_table("behind:table!")
    await client.mset({"behind:old": b"1", "behind:other": b"1", "behind:table!": b"12345678"})
    assert await cache.get_many(["behind:old"]) == [b"1"]
    if fault == "silent":
        proxy.blackhole()
    else:
        proxy.refuse()
        proxy.reset()
    began = time.monotonic()
    with pytest.raises(CacheUnavailable):
        await cache.get_many(["behind:old"])
    await cache.invalidate(["behind:old"], ["behind:table!"])
    assert time.monotonic() - began < 1.0  # its timeout is 0.1; a busy machine takes its time
    began = time.monotonic()
    for _ in range(1000):
        with pytest.raises(CacheUnavailable):
            await cache.get_many(["behind:old"])
        await cache.invalidate(["behind:old"], [])
    assert time.monotonic() - began < 1.0
    assert await client.get("behind:old") == b"1"
    proxy.heal()
    await until(lambda: cache.statistics().state == "closed")
    assert await client.mget("behind:old", "behind:table!") == [None, None]
    assert await cache.get_many(["behind:old", "behind:other"]) == [None, b"1"]
    said = [record.message for record in caplog.records if record.name.endswith("redis_cache")]
    assert said == ["the cache is away; reads go to the database until it is back", "the cache is back"]


async def test_c4_too_many_invalidations_to_remember_empty_every_table(
    behind: tuple[FaultProxy, RedisCache], client: Any, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(redis_cache, "_MOST_PENDING", 100)
    proxy, cache = behind
    cache.know_table("behind:many!")
    await client.set("behind:many!", b"12345678")
    proxy.blackhole()
    for number in range(1000):
        await cache.invalidate([f"behind:{number}"], [])
    assert len(cache._pending) <= 100
    proxy.heal()
    await until(lambda: cache.statistics().state == "closed")
    assert await client.get("behind:many!") is None


async def test_c4_another_server_than_before_is_not_believed(behind: tuple[FaultProxy, RedisCache], client: Any):
    _, cache = behind
    cache.know_table("behind:known!")
    await client.set("behind:known!", b"12345678")
    cache._identity = "what answered before"
    await cache._look()
    assert cache.statistics().state == "returning"
    assert await client.get("behind:known!") is None
    await until(lambda: cache.statistics().state == "closed")


async def test_c4_a_process_that_stood_still_believes_nothing_at_first(cache: RedisCache, key: str):
    await cache.get_many([key])
    cache._last_answer -= 5
    with pytest.raises(CacheUnavailable):
        await cache.get_many([key])
    await until(lambda: cache.statistics().state == "closed")
    assert await cache.get_many([key]) == [None]


async def test_c4_a_probe_whose_cancellation_was_swallowed_does_not_end_the_search(
    cache: RedisCache, monkeypatch: pytest.MonkeyPatch
):
    """redis-py may make another error, or an answer, of a probe that is late."""
    ask, probes = cache._ask_identity, 0

    async def probe() -> str:
        nonlocal probes
        probes += 1
        if probes == 1:
            with suppress(asyncio.CancelledError):
                await asyncio.sleep(10)
            raise ConnectionError
        if probes == 2:
            await asyncio.sleep(10)
        return await ask()

    monkeypatch.setattr(redis_cache, "_PATIENCE", 0.05)
    cache._timeout = 0.05
    monkeypatch.setattr(cache, "_ask_identity", probe)
    cache._lose("a test")
    await until(lambda: cache.statistics().state == "closed", 5)
    assert probes > 2


async def test_c4_an_answer_that_came_while_the_event_loop_was_busy_counts(redis_url: str, key: str):
    async with RedisCache(redis_url, timeout=0.05) as cache:
        await cache.get_many([key])
        for _ in range(5):
            call = asyncio.ensure_future(cache.get_many([key]))
            for _ in range(4):
                await asyncio.sleep(0)  # it is sent
            time.sleep(0.2)  # noqa: ASYNC251 - a service that blocks its event loop
            assert await call == [None]
        assert cache.statistics().errors == 0


async def test_the_end_waits_for_a_client_that_is_given_up(redis_url: str, monkeypatch: pytest.MonkeyPatch):
    cache = RedisCache(redis_url)
    await cache.connect()
    client: Any = cache._client
    aclose, closed = client.aclose, []

    async def slowly() -> None:
        await asyncio.sleep(0.05)
        await aclose()
        closed.append(client)

    monkeypatch.setattr(client, "aclose", slowly)
    giving_up = asyncio.create_task(cache._drop_client())
    await asyncio.sleep(0)
    giving_up.cancel()  # as the end cancels the watcher
    await cache.disconnect()
    assert closed == [client]


@pytest.mark.parametrize("turns", [1, 2], ids=["about to be sent", "in a task that has not begun"])
async def test_a_call_that_the_end_overtakes_is_answered_and_the_next_beginning_sends(
    redis_url: str, key: str, turns: int
):
    cache = RedisCache(redis_url, timeout=2.0)
    await cache.connect()
    call = asyncio.ensure_future(cache.get_many([key]))
    for _ in range(turns):
        await asyncio.sleep(0)
    await cache.disconnect()
    async with asyncio.timeout(5):
        with pytest.raises(CacheUnavailable):
            await call
        async with cache:
            assert await cache.get_many([key]) == [None]


async def test_what_waits_for_its_turn_at_the_end_is_not_sent(cache: RedisCache, monkeypatch: pytest.MonkeyPatch):
    sent: list[Any] = []

    async def execute(commands: Any, **_how: Any) -> Any:
        sent.extend(commands)
        await asyncio.Event().wait()

    monkeypatch.setattr(cache, "_execute", execute)
    calls = [asyncio.ensure_future(cache.get_many(["first"]))]
    await until(lambda: sent)
    calls.append(asyncio.ensure_future(cache.get_many(["second"])))
    await asyncio.sleep(0)
    await cache.disconnect()
    answers = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(answer) for answer in answers] == [CacheUnavailable] * 2
    assert sent == [("MGET", "first")]
    assert not cache._tasks
