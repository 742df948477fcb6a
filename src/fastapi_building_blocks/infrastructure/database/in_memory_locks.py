"""Locks of an in-memory store: held as long as a transaction, waited for in turn, deadlocks found by the wait-for graph."""

import asyncio
from collections import deque
from dataclasses import dataclass, field
from typing import Any, Protocol

from fastapi_building_blocks.domain.errors import DeadlockError, StatementTimeoutError

from .deadlines import time_left

Resource = tuple[Any, ...]
"""What is locked: ``("row", collection, key)`` or ``("unique", collection, names, values)``."""


class LockOwner(Protocol):
    """A transaction, as its locks see it."""

    locks: list[Resource]
    waits_for: Resource | None

    def __hash__(self) -> int: ...


def session_closed() -> RuntimeError:
    """Return what a transaction is told that outlived its session's connection."""
    return RuntimeError("the session was closed under this transaction: await session.connect() and begin anew")


@dataclass(slots=True)
class _Waiter:
    transaction: LockOwner
    exclusive: bool
    granted: asyncio.Future[None]


@dataclass(slots=True)
class _Held:
    """One lock: who holds it, shared or exclusive, and who waits, first come first served."""

    holders: dict[LockOwner, bool] = field(default_factory=dict)
    waiters: deque[_Waiter] = field(default_factory=deque)

    def blockers(self, transaction: LockOwner, exclusive: bool) -> set[LockOwner]:
        """Return the holders that stand against this request."""
        return {
            holder for holder, theirs in self.holders.items() if holder is not transaction and (exclusive or theirs)
        }


class InMemoryLocks:
    """Locks that last as long as a transaction, with first-come-first-served waiting and deadlock detection."""

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._held: dict[Resource, _Held] = {}

    async def acquire(
        self, transaction: LockOwner, resource: Resource, *, exclusive: bool = True, wait: bool = True
    ) -> bool:
        """Take a lock, waiting for others where ``wait``; answer whether it was taken.

        Raises:
            DeadlockError: waiting would close a circle, or took longer than the lock timeout.
            StatementTimeoutError: it took longer than the deadline around the call.
        """
        left = time_left()
        held = self._held.setdefault(resource, _Held())
        mine = held.holders.get(transaction)
        if mine is not None and (mine or not exclusive):
            return True
        if not held.blockers(transaction, exclusive) and (not held.waiters or mine is not None):
            self._grant(held, transaction, resource, exclusive)
            return True
        if not wait:
            return False
        waiter = _Waiter(transaction, exclusive, asyncio.get_running_loop().create_future())
        if mine is None:
            held.waiters.append(waiter)
        else:
            held.waiters.appendleft(waiter)  # whoever already shares it would block everybody behind
        transaction.waits_for = resource
        try:
            if self._closes_a_circle(transaction):
                raise DeadlockError("this transaction and another one waited for each other")
            async with asyncio.timeout(self._timeout if left is None else min(left, self._timeout)):
                await waiter.granted
        except TimeoutError as error:
            if left is not None and left < self._timeout:
                raise StatementTimeoutError("a lock did not become free before the deadline") from error
            raise DeadlockError("this transaction waited too long for a lock") from error
        finally:
            transaction.waits_for = None
            if waiter in held.waiters:
                held.waiters.remove(waiter)
                self._wake(resource, held)
        return True

    def contended(self, transaction: LockOwner, resource: Resource) -> bool:
        """Answer whether another transaction holds the lock for itself."""
        held = self._held.get(resource)
        return held is not None and bool(held.blockers(transaction, exclusive=False))

    def dismiss(self, transaction: LockOwner) -> None:
        """Wake a transaction that ended while it waited, with an error."""
        if transaction.waits_for is None:
            return
        held = self._held[transaction.waits_for]
        for waiter in list(held.waiters):
            if waiter.transaction is transaction:
                held.waiters.remove(waiter)
                if not waiter.granted.done():
                    waiter.granted.set_exception(session_closed())
        self._wake(transaction.waits_for, held)

    def release(self, transaction: LockOwner, resource: Resource) -> None:
        held = self._held[resource]
        held.holders.pop(transaction, None)
        self._wake(resource, held)

    def _grant(self, held: _Held, transaction: LockOwner, resource: Resource, exclusive: bool) -> None:
        if transaction not in held.holders:
            transaction.locks.append(resource)
        held.holders[transaction] = exclusive or held.holders.get(transaction, False)

    def _wake(self, resource: Resource, held: _Held) -> None:
        while held.waiters:
            waiter = held.waiters[0]
            if held.blockers(waiter.transaction, waiter.exclusive):
                break
            held.waiters.popleft()
            if not waiter.granted.done():
                self._grant(held, waiter.transaction, resource, waiter.exclusive)
                waiter.granted.set_result(None)
        if not held.holders and not held.waiters:
            self._held.pop(resource, None)

    def _closes_a_circle(self, start: LockOwner) -> bool:
        seen: set[LockOwner] = set()
        ahead = self._waited_for(start)
        while ahead:
            transaction = ahead.pop()
            if transaction is start:
                return True
            if transaction not in seen:
                seen.add(transaction)
                ahead |= self._waited_for(transaction)
        return False

    def _waited_for(self, transaction: LockOwner) -> set[LockOwner]:
        """Return the holders that ``transaction`` waits for, and those who came before it."""
        if transaction.waits_for is None:
            return set()
        held = self._held[transaction.waits_for]
        before: set[LockOwner] = set()
        for waiter in held.waiters:
            if waiter.transaction is transaction:
                return before | held.blockers(transaction, waiter.exclusive)
            before.add(waiter.transaction)
        return set()
