"""Causal reads: what a context has written stays visible to it, on whichever server it reads.

A *mark* says what a context has written to one database: how far the primary's log was when it was asked after the
write, or, where a database cannot say, when that was. A read of the context needs a server that has replayed as much.
The primary is asked only once somebody wants to know: a read that could go to a replica, or the answer of a request.
"""

import base64
import binascii
import hmac
import os
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

Position = Mapping[int, int]
"""How far a server is in each of its logs of writes, by the number of the log: PostgreSQL has one, MariaDB domains."""

prefer_primary: ContextVar[bool] = ContextVar("prefer_primary", default=False)
"""Whether reads of this context go to the primary, whatever it has written."""
accepts_old: ContextVar[bool] = ContextVar("accepts_old", default=False)
"""Whether reads of this context go to any replica, whatever it has written."""

_KIND = b"consistency token, 1st form:"
_SIGNATURE = 16
"""Bytes of the HMAC that a token carries."""
_SHORTEST_SECRET = 16
_LONGEST_TOKEN = 1024
"""Bytes; a header of that size passes every proxy."""


def includes(have: Position, wanted: Position) -> bool:
    """Whether a server that is so far has replayed what is wanted."""
    return all(have.get(log, -1) >= place for log, place in wanted.items())


def newest(one: Position, other: Position) -> Position:
    """Return the position that includes both."""
    return {log: max(one.get(log, 0), other.get(log, 0)) for log in one.keys() | other.keys()}


@contextmanager
def reads_from_primary() -> Iterator[None]:
    """Have every read of a block go to the primary: what fills a cache, or decides about a write that follows."""
    token = prefer_primary.set(True)
    try:
        yield
    finally:
        prefer_primary.reset(token)


@contextmanager
def eventual_reads() -> Iterator[None]:
    """Let the reads of a block be older than the context's own writes, by ``max_lag`` seconds at most."""
    token = accepts_old.set(True)
    try:
        yield
    finally:
        accepts_old.reset(token)


class Mark:
    """What one context has written to one database, or has been told of by a token; times by ``time.monotonic()``."""

    __slots__ = ("_ask", "_told", "_written", "_written_at", "position", "position_at", "unknown_at")

    def __init__(self, position: Position | None = None, at: float = 0.0, unknown_at: float | None = None) -> None:
        self.position = position
        """What a server must have replayed; None: nothing that is known."""
        self.position_at = at
        """When the primary was so far."""
        self.unknown_at = unknown_at
        """When something was written of which the primary could not say how far it was; None: there is no such."""
        self._written = self._told = 0
        self._written_at = 0.0
        self._ask: Callable[[], Awaitable[Position | None]]

    @property
    def is_open(self) -> bool:
        """Whether something was written since the primary was asked."""
        return self._written != self._told

    def note_write(self, ask: Callable[[], Awaitable[Position | None]]) -> None:
        """Remember a write; ``ask`` answers how far the primary is, None if that cannot be said."""
        self._written += 1
        self._written_at = time.monotonic()
        self._ask = ask

    async def settle(self) -> None:
        """Ask the primary how far it is, if something was written since it was asked last."""
        written, at = self._written, self._written_at
        if written == self._told:
            return
        position = await self._ask()
        if position is None:
            self.add(Mark(unknown_at=at))
        else:
            # It includes all that was wanted before, unless this is another primary, and then it counts.
            self.position, self.position_at = position, time.monotonic()
        self._told = max(self._told, written)

    def add(self, other: "Mark") -> None:
        """Want what another mark wants as well."""
        if other.position is not None:
            self.position = other.position if self.position is None else newest(self.position, other.position)
            self.position_at = max(self.position_at, other.position_at)
        if other.unknown_at is not None:
            self.unknown_at = max(self.unknown_at or other.unknown_at, other.unknown_at)

    @property
    def is_blank(self) -> bool:
        """Whether it asks nothing of a read."""
        return self._written == self._told and self.position is None and self.unknown_at is None


class ConsistencyScope:
    """The marks of one context, such as a request with all its tasks, by database.

    Args:
        tokens: what makes tokens of them; None: they do not leave the process.
        marks: what the context was told when it began.
        distrusted: it was told something that cannot be verified, so it reads from the primary.
    """

    def __init__(
        self, tokens: "ConsistencyTokens | None" = None, marks: dict[str, Mark] | None = None, distrusted: bool = False
    ) -> None:
        self.tokens = tokens
        self.marks = {} if marks is None else marks
        self.distrusted = distrusted

    def mark(self, database: str) -> Mark:
        """Return the mark of a database, a blank one at first."""
        return self.marks.setdefault(database, Mark())

    async def token(self) -> str | None:
        """Return a token for all that the context has written and was told; None: there is nothing."""
        for mark in tuple(self.marks.values()):
            await mark.settle()
        return None if self.tokens is None else self.tokens.seal(self.marks)


current_scope: ContextVar[ConsistencyScope | None] = ContextVar("consistency_scope", default=None)


@contextmanager
def consistency_scope(scope: ConsistencyScope) -> Iterator[ConsistencyScope]:
    """Have the reads of a block, and of the tasks that it starts, see its own writes; those of others need not be."""
    token = current_scope.set(scope)
    try:
        yield scope
    finally:
        current_scope.reset(token)


async def current_consistency_token() -> str | None:
    """Return the token to send with a request to another service, so that it sees what this one has written so far.

    None if there is nothing to see, or outside of a request that ``ConsistencyMiddleware`` has let in.
    """
    scope = current_scope.get()
    return None if scope is None else await scope.token()


class ConsistencyTokens:
    """Makes tokens of marks and marks of tokens; nobody without the secret can do either.

    Args:
        secret: at least 16 characters, the same for all services that pass tokens on; None: ``CONSISTENCY_SECRET`` of
            the environment.

    Raises:
        ValueError: there is no secret, or a short one.
    """

    def __init__(self, secret: str | None = None) -> None:
        if secret is None:
            secret = os.environ.get("CONSISTENCY_SECRET", "")
        if len(secret) < _SHORTEST_SECRET:
            raise ValueError(f"CONSISTENCY_SECRET signs the tokens: give it {_SHORTEST_SECRET} characters or more")
        self._secret = secret.encode()

    def seal(self, marks: Mapping[str, Mark]) -> str | None:
        """Return the token of some marks; None if they want nothing."""
        wanted = {
            name: mark for name, mark in marks.items() if mark.position is not None or mark.unknown_at is not None
        }
        if not wanted:
            return None
        token = self._sign(";".join(_entry(name, mark) for name, mark in wanted.items()))
        if len(token) > _LONGEST_TOKEN:  # so many logs: the time does as well
            now = time.monotonic()
            token = self._sign(";".join(_entry(name, Mark(unknown_at=now)) for name in tuple(wanted)[:8]))
        return token

    def open(self, token: bytes) -> dict[str, Mark]:
        """Return the marks of a token.

        Raises:
            ValueError: it is not one that ``seal`` has made with this secret.
        """
        if len(token) > _LONGEST_TOKEN:
            raise ValueError("the token is too long")
        try:
            sealed = base64.b64decode(token, altchars=b"-_", validate=True)
        except binascii.Error as error:
            raise ValueError("the token is not one") from error
        signature, payload = sealed[:_SIGNATURE], sealed[_SIGNATURE:]
        if not payload or not hmac.compare_digest(signature, self._signature(payload)):
            raise ValueError("the token was not signed with this secret")
        return dict(map(_mark, payload.decode().split(";")))

    def _sign(self, text: str) -> str:
        payload = text.encode()
        return base64.urlsafe_b64encode(self._signature(payload) + payload).decode()

    def _signature(self, payload: bytes) -> bytes:
        return hmac.digest(self._secret, _KIND + payload, "sha256")[:_SIGNATURE]


def _entry(name: str, mark: Mark) -> str:
    logs = "" if mark.position is None else ",".join(f"{log:x}-{place:x}" for log, place in mark.position.items())
    unknown = "" if mark.unknown_at is None else f"{_to_clock(mark.unknown_at):x}"
    return f"{name}:{_to_clock(mark.position_at) if logs else 0:x}:{logs}:{unknown}"


def _mark(entry: str) -> tuple[str, Mark]:
    name, at, logs, unknown = entry.split(":")
    pairs = [pair.split("-") for pair in logs.split(",")] if logs else []
    position = {int(log, 16): int(place, 16) for log, place in pairs} or None
    return name, Mark(position, _from_clock(at) if logs else 0.0, _from_clock(unknown) if unknown else None)


def _to_clock(moment: float) -> int:
    """Return a moment of this process as one that others understand, in milliseconds."""
    return round((time.time() - time.monotonic() + moment) * 1000)


def _from_clock(milliseconds: str) -> float:
    # Another machine's clock may be ahead; nothing was written in the future.
    return min(int(milliseconds, 16) / 1000 - time.time(), 0.0) + time.monotonic()
