"""Marks and tokens: what a context has written, kept, asked for once, and passed on."""

import asyncio
import base64
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastapi_building_blocks.infrastructure import current_consistency_token
from fastapi_building_blocks.infrastructure.database.consistency import (
    ConsistencyScope,
    ConsistencyTokens,
    Mark,
    Position,
    accepts_old,
    consistency_scope,
    current_scope,
    eventual_reads,
    includes,
    newest,
    prefer_primary,
    reads_from_primary,
)

SECRET = "a secret of some length"
TOKENS = ConsistencyTokens(SECRET)

positions = st.dictionaries(st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1), min_size=1, max_size=5)


@given(positions, positions)
def test_the_newest_position_includes_both_and_no_more(one: Position, other: Position) -> None:
    both = newest(one, other)
    assert includes(both, one)
    assert includes(both, other)
    assert includes(both, newest(other, one))
    assert all(place in (one.get(log), other.get(log)) for log, place in both.items())


@given(positions)
def test_a_server_that_knows_nothing_of_a_log_has_not_replayed_it(wanted: Position) -> None:
    assert not includes({}, wanted)
    assert includes(wanted, {})


# Tokens


@given(st.dictionaries(st.sampled_from(["0011aabb", "ffffffff", "12345678"]), positions, min_size=1))
def test_a_token_brings_every_mark_over(wanted: dict[str, dict[int, int]]) -> None:
    now = time.monotonic()
    token = TOKENS.seal({name: Mark(position, now) for name, position in wanted.items()})
    assert token is not None
    assert len(token) <= 1024
    told = TOKENS.open(token.encode())
    assert {name: mark.position for name, mark in told.items()} == wanted
    assert all(abs(mark.position_at - now) < 0.1 for mark in told.values())


def test_a_mark_without_a_position_travels_as_a_time() -> None:
    wrote = time.monotonic() - 3
    token = TOKENS.seal({"a": Mark(unknown_at=wrote), "b": Mark()})
    assert token is not None
    told = TOKENS.open(token.encode())
    assert list(told) == ["a"]
    assert told["a"].unknown_at == pytest.approx(wrote, abs=0.1)


def test_more_logs_than_a_header_holds_travel_as_a_time() -> None:
    token = TOKENS.seal({"a": Mark(dict.fromkeys(range(200), 2**60), time.monotonic())})
    assert token is not None
    assert len(token) <= 1024
    (mark,) = TOKENS.open(token.encode()).values()
    assert mark.position is None
    assert mark.unknown_at == pytest.approx(time.monotonic(), abs=0.1)


def test_nothing_written_is_no_token() -> None:
    assert TOKENS.seal({}) is None
    assert TOKENS.seal({"a": Mark()}) is None


def test_a_clock_that_is_ahead_does_not_make_a_write_of_tomorrow(monkeypatch: pytest.MonkeyPatch) -> None:
    there = time.time() + 3600
    monkeypatch.setattr(time, "time", lambda: there)
    token = TOKENS.seal({"a": Mark(unknown_at=time.monotonic())})
    monkeypatch.undo()
    assert token is not None
    assert TOKENS.open(token.encode())["a"].unknown_at <= time.monotonic()  # type: ignore[operator]


@given(st.binary(max_size=1500))
def test_whatever_is_not_a_token_is_refused(nonsense: bytes) -> None:
    for given_token in (nonsense, base64.urlsafe_b64encode(nonsense)):
        with pytest.raises(ValueError, match="token"):
            TOKENS.open(given_token)


@given(st.data())
def test_a_token_with_any_byte_changed_is_refused(data: st.DataObject) -> None:
    token = TOKENS.seal({"a": Mark({0: 2**40}, time.monotonic())})
    assert token is not None
    sealed = bytearray(base64.urlsafe_b64decode(token))
    place = data.draw(st.integers(0, len(sealed) - 1))
    sealed[place] ^= data.draw(st.integers(1, 255))
    with pytest.raises(ValueError, match="token"):
        TOKENS.open(base64.urlsafe_b64encode(bytes(sealed)))


def test_a_token_of_another_secret_is_refused() -> None:
    token = ConsistencyTokens("another secret of some length").seal({"a": Mark({0: 1}, time.monotonic())})
    assert token is not None
    with pytest.raises(ValueError, match="not signed"):
        TOKENS.open(token.encode())


def test_the_secret_comes_from_the_environment_and_is_not_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CONSISTENCY_SECRET", raising=False)
    for secret in (None, "", "short"):
        with pytest.raises(ValueError, match="CONSISTENCY_SECRET"):
            ConsistencyTokens(secret)
    monkeypatch.setenv("CONSISTENCY_SECRET", SECRET)
    token = ConsistencyTokens().seal({"a": Mark({0: 1}, time.monotonic())})
    assert token is not None
    assert TOKENS.open(token.encode())["a"].position == {0: 1}


# Marks


class Primary:
    """Says how far it is, and counts how often it was asked."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)
        self.asked = 0

    async def __call__(self) -> Any:
        self.asked += 1
        await asyncio.sleep(0)
        return self.answers[min(self.asked, len(self.answers)) - 1]


async def test_the_primary_is_asked_once_for_any_number_of_writes_and_only_when_somebody_wants_to_know() -> None:
    primary, mark = Primary({0: 10}, {0: 20}), Mark()
    assert mark.is_blank
    for _ in range(5):
        mark.note_write(primary)
    assert (mark.is_open, mark.is_blank, primary.asked) == (True, False, 0)
    await mark.settle()
    await mark.settle()
    assert (mark.is_open, mark.position, primary.asked) == (False, {0: 10}, 1)
    mark.note_write(primary)
    await mark.settle()
    assert (mark.position, primary.asked) == ({0: 20}, 2)


async def test_a_write_while_the_primary_is_asked_is_asked_for_again() -> None:
    mark = Mark()

    async def meanwhile() -> Any:
        mark.note_write(primary)
        return {0: 10}

    primary = Primary({0: 20})
    mark.note_write(meanwhile)
    await mark.settle()
    assert mark.is_open, "the answer may be from before that write"
    await mark.settle()
    assert mark.position == {0: 20}


async def test_a_primary_that_cannot_tell_leaves_the_time() -> None:
    mark = Mark({0: 5}, 1.0)
    mark.note_write(Primary(None))
    await mark.settle()
    assert mark.position == {0: 5}, "what was known is wanted as well"
    assert mark.unknown_at == pytest.approx(time.monotonic(), abs=1)


async def test_another_primary_whose_log_is_shorter_is_believed() -> None:
    mark = Mark({0: 100}, 1.0)
    mark.note_write(Primary({0: 50}))
    await mark.settle()
    assert mark.position == {0: 50}


async def test_a_scope_is_shared_by_the_tasks_of_its_block_and_ends_with_it() -> None:
    with consistency_scope(ConsistencyScope(TOKENS)) as scope:

        async def child() -> None:
            found = current_scope.get()
            assert found is not None
            found.mark("a").note_write(Primary({0: 7}))

        await asyncio.create_task(child())
        token = await current_consistency_token()
        assert token is not None
        assert TOKENS.open(token.encode())["a"].position == {0: 7}
        assert scope.marks["a"].position == {0: 7}
    assert current_scope.get() is None
    assert await current_consistency_token() is None


async def test_a_scope_that_passes_nothing_on_has_no_token() -> None:
    with consistency_scope(ConsistencyScope()) as scope:
        scope.mark("a").note_write(Primary({0: 7}))
        assert await current_consistency_token() is None


def test_preferences_end_with_their_block() -> None:
    with reads_from_primary(), eventual_reads():
        assert (prefer_primary.get(), accepts_old.get()) == (True, True)
    assert (prefer_primary.get(), accepts_old.get()) == (False, False)
