"""What repositories run on: a session, or one of its transactions."""

import asyncio
import logging
import math
import random
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar

from fastapi_building_blocks.domain.errors import DeadlineExceededError, TransientError, UnsupportedOperationError

from .deadlines import time_left
from .streams import StreamReader

if TYPE_CHECKING:
    from fastapi_building_blocks.infrastructure.persistence.unit_of_work import UnitOfWork

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")

Operation = Callable[[Any, Any, Any], Awaitable[Any]]
"""``await operation(connection, statement, arguments)``: one call to a store, on a connection of its own kind."""
Iteration = Callable[[Any, Any, Any], AsyncGenerator[Any, None]]
"""``async for batch in iteration(connection, statement, arguments)``: one streamed read of a store."""

_REPLAY_FIRST_DELAY = 0.02
_REPLAY_LONGEST_DELAY = 1.0
_REPLAY_WINDOW = 30.0


@dataclass(frozen=True, slots=True)
class PoolStatus:
    """A pool at one moment: connections there are, in use and idle, and the tasks that wait for one."""

    size: int
    checked_out: int
    idle: int
    waiting: int


class DatabaseSession(ABC):
    """A store that repositories run on, and that hands out transactions.

    On a session every call is its own transaction; on a ``Transaction``, which is a session too, it takes
    part and nothing is kept before that commits.
    """

    in_transaction: ClassVar[bool] = False
    """Whether calls take part in a transaction that somebody else ends."""

    @property
    def read_only(self) -> bool:
        """Whether calls take part in a transaction that refuses every write."""
        return False

    @property
    @abstractmethod
    def dialect_name(self) -> str:
        """``postgresql``, ``mysql``, ``mariadb``, ``sqlite``, ``mssql`` or ``memory``."""

    @abstractmethod
    async def connect(self) -> None:
        """Make the store ready for use."""

    async def start(self, prepare: Callable[[], Awaitable[object]] | None = None) -> None:
        """Make the store ready for use, now or as soon as it is there, so that a service may start before its store.

        Until then every call raises ``UnavailableError``, but for those of ``prepare``.

        Args:
            prepare: awaited once the store is there and before anybody else uses it: to migrate it, say. It is awaited
                again if the store goes away meanwhile.

        Raises:
            ConnectionLostError: the store is there and refuses the service.
        """
        await self.connect()
        if prepare is not None:
            await prepare()

    @abstractmethod
    async def disconnect(self) -> None:
        """Give every connection back; statements after this raise ``RuntimeError``."""

    @abstractmethod
    async def ping(self) -> None:
        """Return once the store has answered.

        Raises:
            UnavailableError, DeadlineExceededError: it does not.
        """

    def transaction(self, isolation: str | None = None, read_only: bool = False) -> "UnitOfWork":
        """Return a unit of work, to be entered with ``async with``.

        Args:
            isolation: ``"READ COMMITTED"``, ``"REPEATABLE READ"``, ``"SERIALIZABLE"``; None: the database's default.
            read_only: refuse every write.
        """
        # A unit of work is a session: at the top of the module this import would go round in a circle.
        from fastapi_building_blocks.infrastructure.persistence.unit_of_work import UnitOfWork  # noqa: PLC0415

        return UnitOfWork(self, isolation, read_only)

    async def run(
        self, work: "Callable[[UnitOfWork], Awaitable[Answer]]", attempts: int = 3, isolation: str | None = None
    ) -> Answer:
        """Await ``work(unit)`` in a fresh unit of work and return its answer once that has committed.

        A deadlock or a serialization failure replays the whole unit, after a random delay that grows ("full
        jitter", https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/), at most ``attempts``
        times and for 30 seconds. Nothing else is replayed, so ``work`` should touch nothing but its unit.

        Raises:
            TransientError: the last attempt clashed as well.
        """
        if attempts < 1:
            raise ValueError("attempts must be at least 1")
        give_up = time.monotonic() + _REPLAY_WINDOW
        for attempt in range(1, attempts + 1):
            try:
                async with self.transaction(isolation) as unit:
                    answer = await work(unit)
            except TransientError as error:
                longest = min(_REPLAY_FIRST_DELAY * 2**attempt, _REPLAY_LONGEST_DELAY)
                delay = random.uniform(0, longest)  # noqa: S311 - jitter, not a secret
                if attempt == attempts or time.monotonic() + delay > give_up or delay > (time_left() or math.inf):
                    raise
                logger.info("unit of work replayed", extra={"error": error.code, "attempt": attempt})
                await asyncio.sleep(delay)
            else:
                return answer
        raise AssertionError("unreachable")  # pragma: no cover

    async def execute(self, statement: Any, parameters: Any = None) -> Any:
        """Run any SQLAlchemy Core statement and return its fully fetched result.

        Args:
            parameters: a dict, or a list of them to run the statement for each in one transaction.

        Raises:
            UnsupportedOperationError: the store does not speak SQL.
        """
        if isinstance(statement, str):
            raise TypeError("a statement is a SQLAlchemy construct: wrap SQL in sqlalchemy.text()")
        if isinstance(parameters, list | tuple) and not parameters:
            raise ValueError("no parameters to run the statement for: an empty list would run it once without any")
        return await self.perform(self.root.execute_on, statement, parameters)

    async def stream(self, statement: Any, parameters: Any = None) -> AsyncIterator[Any]:
        """Iterate over the rows of any SQLAlchemy Core query in constant memory."""
        if isinstance(statement, str):
            raise TypeError("a statement is a SQLAlchemy construct: wrap SQL in sqlalchemy.text()")
        if getattr(statement, "is_dml", False):
            raise TypeError("stream() reads: what writes goes to execute()")
        async with StreamReader(self.iterate(self.root.stream_on, statement, parameters)) as batches:
            async for batch in batches:
                for row in batch:
                    yield row

    # What stores supply, and repositories call. Services use execute() and stream().

    @abstractmethod
    async def perform(self, operation: Operation, statement: Any, arguments: Any) -> Any:
        """Run one operation of the store on a connection, and return its answer."""

    @abstractmethod
    def iterate(self, operation: Iteration, statement: Any, arguments: Any) -> AsyncGenerator[Any, None]:
        """Run one streamed read of the store, batch by batch, on a connection that it keeps until it ends."""

    @abstractmethod
    def open_transaction(self, isolation: str | None, read_only: bool) -> "TransactionBackend":
        """Return the store's side of a new unit of work; nothing is sent yet."""

    @property
    def root(self) -> "DatabaseSession":
        """The session itself, or the one that a transaction belongs to."""
        return self

    async def execute_on(self, connection: Any, statement: Any, parameters: Any) -> Any:
        """Run a Core statement on a connection of this store: the operation behind ``execute``."""
        raise UnsupportedOperationError(f"a {self.dialect_name} session does not run SQL")

    def stream_on(self, connection: Any, statement: Any, parameters: Any) -> AsyncGenerator[Any, None]:
        """Run a Core query on a connection of this store, in batches: the iteration behind ``stream``."""
        raise UnsupportedOperationError(f"a {self.dialect_name} session does not run SQL")


class Transaction(DatabaseSession):
    """A session whose calls are kept together, or not at all."""

    in_transaction = True

    async def connect(self) -> None:
        raise RuntimeError("a transaction lives on its session's connections: connect the session")

    async def start(self, prepare: Callable[[], Awaitable[object]] | None = None) -> None:
        raise RuntimeError("a transaction lives on its session's connections: start the session")

    async def disconnect(self) -> None:
        raise RuntimeError("a transaction lives on its session's connections: disconnect the session")

    async def ping(self) -> None:
        await self.root.ping()

    @abstractmethod
    async def __aenter__(self) -> Self: ...

    @abstractmethod
    async def __aexit__(self, *exception: Any) -> None: ...

    @abstractmethod
    def savepoint(self) -> AbstractAsyncContextManager[None]:
        """Return a context whose statements are undone together if it ends with an exception."""

    @abstractmethod
    def all_or_none(self) -> AbstractAsyncContextManager[None]:
        """Return a context for one write of many statements: undone together if the write is refused halfway.

        For repositories: other than with ``savepoint``, a failed statement dooms the transaction as it does alone.
        """

    @abstractmethod
    def doom(self, cause: BaseException) -> None:
        """Take a failure that a repository has stepped back from for that of the transaction's own statement."""

    @abstractmethod
    async def rollback(self) -> None:
        """Leave without keeping anything; statements after this raise ``RuntimeError``."""

    @abstractmethod
    def on_commit(self, callback: Callable[[], Awaitable[None] | None]) -> None:
        """Have ``callback`` called, and awaited, after COMMIT has succeeded; never on a rollback."""


class TransactionBackend(ABC):
    """A store's side of one unit of work: one connection, from BEGIN to its return.

    After ``commit``, ``rollback`` or ``abandon`` the connection is back with the store and the object is done.
    All of them raise errors of the domain's tree.
    """

    @abstractmethod
    async def begin(self) -> Any:
        """Take a connection, begin, and return the connection that operations are given."""

    @abstractmethod
    async def commit(self) -> None:
        """Keep everything. Whatever it raises, the connection is not returned with the transaction open.

        Raises:
            CommitOutcomeUnknownError: the connection broke after COMMIT was sent.
        """

    @abstractmethod
    async def rollback(self) -> None:
        """Keep nothing; never raises for a connection that is gone, since nothing was kept then either."""

    @abstractmethod
    def abandon(self) -> None:
        """Give up a connection whose call was interrupted midway; it is mended or closed in the background."""

    def start_clock(self) -> None:
        """Begin a call on the connection, which may take so long and no longer.

        Raises:
            DeadlineExceededError: the time of the work that it belongs to is over.
        """
        time_left()

    def start_last_clock(self) -> None:  # noqa: B027
        """Begin the end of a stream that its consumer has left, which has a time of its own."""

    def stop_clock(self) -> None:  # noqa: B027 - a store whose calls cannot hang has no clock
        """End the call."""

    def has_ended(self) -> bool:
        """Whether the store has ended the transaction by itself, with all of its savepoints."""
        return False

    def ran_out_of_time(self, error: BaseException) -> DeadlineExceededError | None:
        """Return what to raise if the call was cancelled because its time was over; None: it was not."""
        return None

    @abstractmethod
    async def savepoint(self, name: str) -> None:
        """Set a savepoint."""

    @abstractmethod
    async def release_savepoint(self, name: str) -> None:
        """Merge the savepoint into what surrounds it."""

    @abstractmethod
    async def rollback_to_savepoint(self, name: str) -> None:
        """Undo everything since the savepoint, and forget it."""

    @abstractmethod
    def translate(self, error: Exception, statement: Any) -> Exception:
        """Return the domain's error for one of the store's, or ``error`` itself."""
