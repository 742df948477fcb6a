"""The unit of work: repositories that share one transaction, on any session."""

import asyncio
import enum
import inspect
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager, aclosing
from types import TracebackType
from typing import Any, NamedTuple, Self, TypeVar

from fastapi_building_blocks.domain.errors import (
    CommitOutcomeUnknownError,
    ConnectionLostError,
    DeadlineExceededError,
    TransientError,
    UnavailableError,
)
from fastapi_building_blocks.infrastructure.database.deadlines import time_left
from fastapi_building_blocks.infrastructure.database.session import (
    DatabaseSession,
    Iteration,
    Operation,
    Transaction,
    TransactionBackend,
)

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")
Hook = Callable[[], Awaitable[None] | None]

_MAY_HAVE_COMMITTED = (CommitOutcomeUnknownError, ConnectionLostError, DeadlineExceededError)

_unfinished: set[asyncio.Task[Any]] = set()


async def to_the_end(work: Coroutine[Any, Any, Answer]) -> Answer:
    """Await ``work`` in a task that finishes even when the caller is cancelled meanwhile."""
    return await asyncio.shield(in_background(work))


def in_background(work: Coroutine[Any, Any, Answer]) -> "asyncio.Task[Answer]":
    """Start ``work`` in a task that is kept until it has ended."""
    task = asyncio.ensure_future(work)
    _unfinished.add(task)
    task.add_done_callback(_finished)
    return task


def _finished(task: asyncio.Task[Any]) -> None:
    _unfinished.discard(task)
    if not task.cancelled():
        task.exception()  # marks it as seen: a cancelled caller no longer listens


class AfterCommit(NamedTuple):
    """What one part of the program wants to know of a unit's end."""

    callback: Hook
    in_doubt: Hook | None
    comes_first: bool


class _State(enum.Enum):
    NEW = "new"
    IDLE = "not begun"
    READY = "ready"
    BUSY = "busy"
    FAILED = "failed"
    ENDED = "ended"


class UnitOfWork(Transaction):
    """One transaction on any session: ``async with UnitOfWork(session) as uow:``, then ``UserRepository(uow)``.

    It commits on a clean exit and rolls back on an exception. The connection is taken by the first
    statement, so a unit that does nothing costs nothing. On a unit of work instead of a session it is a
    savepoint of that one.

    A failed statement dooms the unit, or the savepoint around it, on every store: later statements raise
    ``RuntimeError``, and so does a clean exit, because nothing would be kept. A deadlock, a serialization
    failure or a lost connection dooms the whole unit. One task at a time may use it.
    """

    def __init__(self, session: DatabaseSession, isolation: str | None = None, read_only: bool = False) -> None:
        self._outer = session if isinstance(session, Transaction) else None
        if self._outer is not None and (isolation or read_only):
            raise ValueError("a unit of work inside another one takes its isolation and read_only from that one")
        self._session = session
        self._isolation = isolation
        self._read_only = session.read_only if self._outer is not None else read_only
        self._state = _State.NEW
        self._backend: TransactionBackend
        self._connection: Any = None
        self._cause: BaseException | None = None
        self._whole_unit_failed = False
        self._hooks: list[AfterCommit] = []
        self._savepoints = 0
        self._nested: AbstractAsyncContextManager[None]

    @property
    def dialect_name(self) -> str:
        return self._session.dialect_name

    @property
    def root(self) -> DatabaseSession:
        return self._session.root

    @property
    def read_only(self) -> bool:
        return self._read_only

    @property
    def isolation(self) -> str | None:
        """The isolation level that was asked for; None: the database's default."""
        return self.outermost._isolation

    @property
    def outermost(self) -> "UnitOfWork":
        """The unit of work whose COMMIT decides: this one, unless it is a savepoint of another."""
        return self._outer.outermost if isinstance(self._outer, UnitOfWork) else self

    @property
    def after_commit(self) -> Sequence[AfterCommit]:
        """What ``on_commit`` has been given and no rollback to a savepoint has taken back."""
        return self.outermost._hooks

    # Beginning and ending

    async def __aenter__(self) -> Self:
        if self._state is not _State.NEW:
            raise RuntimeError("a unit of work is used once; make another one")
        if self._outer is None:
            self._backend = self._session.open_transaction(self._isolation, self._read_only)
        else:
            self._nested = self._outer.savepoint()
            await self._nested.__aenter__()
        self._state = _State.IDLE
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._state is _State.ENDED:
            return
        if self._outer is not None:
            self._state = _State.ENDED
            await self._nested.__aexit__(kind, error, traceback)
            return
        if self._state is _State.BUSY:
            self._end_while_busy(error)
        elif error is not None or self._state is _State.FAILED:
            failed = self._state is _State.FAILED
            await self._roll_back()
            if error is None and failed:
                raise self._doomed("nothing was kept")
        elif self._state is _State.READY:
            try:
                time_left()
            except DeadlineExceededError:
                await self._roll_back()
                raise
            self._state = _State.ENDED
            await to_the_end(self._commit())
        else:
            self._state = _State.ENDED
            await self._run_hooks()

    async def rollback(self) -> None:
        if self._state in (_State.NEW, _State.ENDED):
            raise self._refusal()
        if self._outer is not None:
            self._state = _State.ENDED
            undo = _Undo()
            await self._nested.__aexit__(_Undo, undo, None)
        else:
            if self._state is _State.BUSY:
                raise self._refusal()
            await self._roll_back()

    async def _commit(self) -> None:
        try:
            await self._backend.commit()
        except BaseException as error:
            if not isinstance(error, Exception) or isinstance(error, _MAY_HAVE_COMMITTED):
                await self._run_hooks(in_doubt=True)
            raise
        await self._run_hooks()

    async def _run_hooks(self, *, in_doubt: bool = False) -> None:
        """Call every hook; the transaction is committed, so a hook that fails is logged and changes nothing."""
        for after in sorted(self._hooks, key=lambda after: not after.comes_first):
            hook = after.in_doubt if in_doubt else after.callback
            if hook is None:
                continue
            try:
                answer = hook()
                if inspect.isawaitable(answer):
                    await answer
            except (Exception, asyncio.CancelledError):
                task = asyncio.current_task()
                if task is not None and task.cancelling():
                    raise  # the loop is closing down: this is not the hook's own
                logger.exception("an after-commit hook failed", extra={"hook": getattr(hook, "__qualname__", "")})

    async def _roll_back(self) -> None:
        begun = self._state in (_State.READY, _State.FAILED) and self._connection is not None
        self._state = _State.ENDED
        if begun:
            await to_the_end(self._backend.rollback())

    def _end_while_busy(self, error: BaseException | None) -> None:
        # Another task's statement, or an open stream, still uses the connection: nothing can be sent on it.
        self._state = _State.ENDED
        if self._connection is not None:  # else that task is about to get one, and gives it up
            self._backend.abandon()
        if error is None:
            raise RuntimeError("the unit of work ended while a statement or a stream was open; nothing was kept")

    # Statements

    async def perform(self, operation: Operation, statement: Any, arguments: Any) -> Any:
        if self._state is not _State.READY:
            if self._outer is not None:
                self._check_open()
                return await self._outer.perform(operation, statement, arguments)
            await self._begin()
        self._state = _State.BUSY
        try:
            self._backend.start_clock()
            answer = await operation(self._connection, statement, arguments)
        except BaseException as error:
            failure = self._failed(error, statement)
            if failure is error:
                raise
            raise failure from (failure.__cause__ or error)
        self._settle()
        return answer

    def iterate(self, operation: Iteration, statement: Any, arguments: Any) -> AsyncGenerator[Any, None]:
        if self._outer is not None:
            return self._iterate_on(self._outer, operation, statement, arguments)
        return self._iterate(operation, statement, arguments)

    async def _iterate_on(
        self, outer: Transaction, operation: Iteration, statement: Any, arguments: Any
    ) -> AsyncGenerator[Any, None]:
        self._check_open()
        async with aclosing(outer.iterate(operation, statement, arguments)) as items:
            async for item in items:
                yield item

    async def _iterate(self, operation: Iteration, statement: Any, arguments: Any) -> AsyncGenerator[Any, None]:
        if self._state is not _State.READY:
            await self._begin()
        self._state = _State.BUSY
        left = False
        try:
            self._backend.start_clock()
            async with aclosing(operation(self._connection, statement, arguments)) as items:
                async for item in items:
                    self._backend.stop_clock()  # the consumer's time is its own
                    try:
                        yield item
                    except GeneratorExit:
                        left = True  # the operation closes its cursor, which may mean to read what is left
                        if self._state is _State.BUSY:
                            self._backend.start_last_clock()
                        raise
                    if self._state is not _State.BUSY:
                        raise self._refusal()  # the unit has ended meanwhile: its connection is somebody else's
                    self._backend.start_clock()
        except GeneratorExit:
            self._settle()  # the consumer left early; the operation has closed its cursor
            raise
        except BaseException as error:
            failure = self._failed(error, statement)
            if left and isinstance(failure, Exception):
                return  # the consumer has what it wanted; what the unit does next is told
            if failure is error:
                raise
            raise failure from (failure.__cause__ or error)
        self._settle()

    def _settle(self) -> None:
        """End a call: the unit is ready for the next one, unless it ended or failed as a whole meanwhile."""
        if self._state is _State.BUSY:
            self._backend.stop_clock()
            self._state = _State.FAILED if self._whole_unit_failed else _State.READY

    def open_transaction(self, isolation: str | None, read_only: bool) -> TransactionBackend:
        raise RuntimeError("a unit of work inside another one is a savepoint")  # UnitOfWork never asks

    async def run(self, work: Any, attempts: int = 3, isolation: str | None = None) -> Any:
        raise RuntimeError("run() replays whole units of work: call it on the session, not inside a unit")

    async def _begin(self) -> None:
        if self._state is not _State.IDLE:
            raise self._refusal()
        self._state = _State.BUSY
        try:
            connection = await self._backend.begin()
        except BaseException as error:
            if self._state is _State.BUSY:
                self._state = _State.FAILED
            self._cause = error
            self._whole_unit_failed = True
            raise
        if self._state is not _State.BUSY:  # the unit has ended meanwhile
            self._backend.abandon()
            raise self._refusal()
        self._connection = connection
        self._state = _State.READY

    def _failed(self, error: BaseException, statement: Any) -> BaseException:
        """Note the failure of a statement and return what to raise."""
        self._cause = error
        if self._state is not _State.BUSY:
            # The unit has ended meanwhile, and whatever happened to the connection since is no answer.
            return self._refusal() if isinstance(error, Exception) else error
        late = self._backend.ran_out_of_time(error)
        if late is not None or not isinstance(error, Exception):
            # Interrupted in the middle of a call: what the connection would answer next is unknown.
            self._state = _State.FAILED
            self._cause = late or error
            self._whole_unit_failed = True
            self._connection = None
            self._backend.abandon()
            return late or error
        self._backend.stop_clock()
        failure = self._backend.translate(error, statement)
        self._cause = failure
        self._state = _State.FAILED
        if isinstance(failure, UnavailableError):
            self._whole_unit_failed = True
            if not isinstance(failure, TransientError):
                self._connection = None
                self._backend.abandon()
        elif self._backend.has_ended():
            self._whole_unit_failed = True  # as SQLite ends it where a write is interrupted, or the disk is full
        return failure

    def _check_open(self) -> None:
        if self._state in (_State.NEW, _State.ENDED):
            raise self._refusal()

    def _refusal(self) -> RuntimeError:
        if self._state is _State.NEW:
            return RuntimeError("the unit of work is not open; use it under 'async with'")
        if self._state is _State.ENDED:
            return RuntimeError("the unit of work has ended; make another one")
        if self._state is _State.FAILED:
            return self._doomed("no further statement is taken")
        return RuntimeError(
            "the unit of work is in use: one task at a time may use a transaction (no gather on it), and a stream "
            "owns it until it is read to its end or closed"
        )

    def _doomed(self, consequence: str) -> RuntimeError:
        if isinstance(self._cause, asyncio.CancelledError):
            refusal = RuntimeError(f"the task was cancelled in the middle of a statement, so {consequence}")
        else:
            refusal = RuntimeError(
                f"an earlier statement failed ({type(self._cause).__name__}), so {consequence}; put what may fail "
                "into 'async with uow.savepoint()'"
            )
        refusal.__cause__ = self._cause
        return refusal

    # Savepoints and hooks

    def savepoint(self) -> AbstractAsyncContextManager[None]:
        return self._outer.savepoint() if self._outer is not None else _Savepoint(self)

    def doom(self, cause: BaseException) -> None:
        if self._outer is not None:
            self._outer.doom(cause)
        elif self._state is _State.READY:
            self._state = _State.FAILED
            self._cause = cause

    def all_or_none(self) -> AbstractAsyncContextManager[None]:
        return self._outer.all_or_none() if self._outer is not None else _Savepoint(self, forgives=False)

    def on_commit(self, callback: Hook, *, in_doubt: Hook | None = None, comes_first: bool = False) -> None:
        """Have ``callback`` called, and awaited, after COMMIT has succeeded; never on a rollback.

        Args:
            in_doubt: called instead where nobody knows whether COMMIT has succeeded (``CommitOutcomeUnknownError``).
            comes_first: before all that do not, in whatever order they were given: they find it done.
        """
        self._check_open()
        if not callable(callback):
            raise TypeError("an after-commit hook is a function, called without arguments")
        outermost = self.outermost
        outermost._check_open()
        outermost._hooks.append(AfterCommit(callback, in_doubt, comes_first))


class _Undo(Exception):  # noqa: N818 - a signal, never seen by a caller
    """Makes a savepoint roll back on request."""


class _Savepoint:
    """Undo what happened inside if it ends with an exception, hooks included.

    Where it does not forgive, a failed statement dooms what surrounds it as well.
    """

    def __init__(self, unit: UnitOfWork, *, forgives: bool = True) -> None:
        self._unit = unit
        self._forgives = forgives
        self._name = ""
        self._hooks = 0

    async def __aenter__(self) -> None:
        unit = self._unit
        if unit._state is not _State.READY:
            await unit._begin()
        unit._savepoints += 1
        self._name = f"sp_{unit._savepoints}"
        self._hooks = len(unit._hooks)
        await self._send(unit._backend.savepoint)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        unit = self._unit
        if unit._state is _State.ENDED:
            return
        if unit._state is _State.BUSY:
            # Another task's statement, or an open stream, uses the connection: nothing can be undone on it.
            unit._whole_unit_failed = True
            unit._cause = refusal = unit._refusal()
            if error is None:
                raise refusal
            return
        failed = unit._state is _State.FAILED
        if error is None and not failed:
            await self._send(unit._backend.release_savepoint)
            return
        del unit._hooks[self._hooks :]
        if unit._whole_unit_failed or (failed and not self._forgives):
            if error is None:
                raise unit._doomed("nothing will be kept")
            return
        doomed = unit._doomed("nothing since the savepoint was kept") if failed else None
        unit._state = _State.READY
        await self._send(unit._backend.rollback_to_savepoint)
        if error is None and doomed is not None:
            raise doomed

    async def _send(self, command: Callable[[str], Awaitable[None]]) -> None:
        unit = self._unit
        unit._state = _State.BUSY
        try:
            unit._backend.start_clock()
            await command(self._name)
        except BaseException as error:
            # Without its savepoint the unit cannot keep its word, whatever the reason was.
            failure = unit._failed(error, None)
            unit._whole_unit_failed = True
            if failure is error:
                raise
            raise failure from (failure.__cause__ or error)
        if unit._state is not _State.BUSY:
            raise unit._refusal()  # it has ended meanwhile
        unit._settle()
