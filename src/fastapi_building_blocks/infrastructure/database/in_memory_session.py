"""A store in memory with real transactions: for tests, demos, and services that are not sure yet.

Rows, unique values and references share one overlay, one undo list and the same locks, so they stay together.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import cached_property
from types import TracebackType
from typing import Any, Literal, Self

import sqlalchemy as sa

from fastapi_building_blocks.domain.errors import (
    DuplicateKeyError,
    ForeignKeyError,
    LockNotAvailableError,
    SerializationError,
    UnsupportedOperationError,
)
from fastapi_building_blocks.infrastructure.database.in_memory_locks import InMemoryLocks, Resource, session_closed
from fastapi_building_blocks.infrastructure.database.session import (
    DatabaseSession,
    Iteration,
    Operation,
    PoolStatus,
    TransactionBackend,
)

Row = tuple[Any, ...]
Key = tuple[Any, ...]
Predicate = Callable[[Row], bool | None]

_MISSING: Any = object()
_SNAPSHOT_LEVELS = ("REPEATABLE READ", "SERIALIZABLE")
_LEVELS = ("READ UNCOMMITTED", "READ COMMITTED", *_SNAPSHOT_LEVELS)


@dataclass(frozen=True, slots=True)
class Reference:
    """A foreign key: these fields hold the ``target_fields`` of a row of ``target``, or NULL."""

    fields: tuple[str, ...]
    target: str
    target_fields: tuple[str, ...]
    on_delete: Literal["RESTRICT", "CASCADE", "SET NULL"]


@dataclass(frozen=True)
class Collection:
    """What a store has to know of a table: its columns in order, its keys and its references."""

    name: str
    fields: tuple[str, ...]
    unique_keys: tuple[tuple[str, ...], ...]
    """The primary key first."""
    references: tuple[Reference, ...] = ()

    @cached_property
    def positions(self) -> dict[str, int]:
        """Where each field stands in a row."""
        return {name: position for position, name in enumerate(self.fields)}

    def values(self, row: Row, names: Sequence[str]) -> tuple[Any, ...]:
        """Return these fields of a row."""
        return tuple(row[self.positions[name]] for name in names)

    def key(self, row: Row) -> Key:
        """Return the primary key of a row."""
        return self.values(row, self.unique_keys[0])


@dataclass(slots=True)
class _Table:
    """The committed rows of a collection."""

    collection: Collection
    versions: dict[Key, list[tuple[int, Row | None]]] = field(default_factory=dict)
    """For each key its row at each commit that changed it, newest last; None where it was removed."""
    index: dict[Resource, Key] = field(default_factory=dict)
    numbers: dict[str, int] = field(default_factory=dict)
    """The last generated number of each column."""

    def at(self, key: Key, sequence: int | None) -> Row | None:
        """Return the row as the commit ``sequence`` left it; None: the newest."""
        for committed, row in reversed(self.versions.get(key, ())):
            if sequence is None or committed <= sequence:
                return row
        return None

    def changed_at(self, key: Key) -> int:
        versions = self.versions.get(key)
        return versions[-1][0] if versions else 0


class InMemorySession(DatabaseSession):
    """Keeps entities in memory, with transactions that commit, roll back, lock and clash as on PostgreSQL.

    Reads never wait. The default isolation is READ COMMITTED; a writer waits for another one of the same row or
    the same unique value. REPEATABLE READ sees the store as it was at its first statement, and the first of two
    writers to commit wins. SERIALIZABLE also refuses to commit a transaction that wrote, if anything that it has
    read was changed meanwhile, so that such transactions have an order. There is no pool: every transaction has
    a connection of its own.

    The data last as long as the object, through ``disconnect`` and ``connect``. It belongs to one event loop.

    Args:
        lock_timeout: how long a statement waits for a lock, in seconds, before it is a ``DeadlockError``.
    """

    def __init__(self, *, lock_timeout: float = 5.0) -> None:
        if lock_timeout <= 0:
            raise ValueError("lock_timeout must be more than 0 seconds")
        self._connected = False
        self._tables: dict[str, _Table] = {}
        self._sequence = 0
        self._locks = InMemoryLocks(lock_timeout)
        self._open: set[InMemoryTransaction] = set()

    @property
    def dialect_name(self) -> str:
        return "memory"

    async def connect(self) -> None:
        """Open the session; doing so twice is harmless."""
        self._connected = True

    async def disconnect(self) -> None:
        """Close the session, rolling back what is still open; the data stay."""
        self._connected = False
        for transaction in list(self._open):
            transaction.abandon()

    async def __aenter__(self) -> Self:
        await self.connect()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.disconnect()

    async def create_tables(self, metadata: sa.MetaData) -> None:
        """Return if the session is open: here a table exists as soon as a repository names it."""
        del metadata
        self._require_connection()

    async def ping(self) -> None:
        """Return if the session is open."""
        self._require_connection()

    def pool_status(self) -> PoolStatus:
        """Return how many transactions are open; nobody ever waits for a connection."""
        self._require_connection()
        return PoolStatus(size=len(self._open), checked_out=len(self._open), idle=0, waiting=0)

    def open_transaction(self, isolation: str | None, read_only: bool) -> "InMemoryTransaction":
        self._require_connection()
        return InMemoryTransaction(self, isolation, read_only)

    async def perform(self, operation: Operation, statement: Any, arguments: Any) -> Any:
        transaction = self.open_transaction(None, read_only=False)
        transaction.start_clock()
        await transaction.begin()
        try:
            answer = await operation(transaction, statement, arguments)
        except BaseException:
            transaction.abandon()
            raise
        await transaction.commit()
        return answer

    async def iterate(self, operation: Iteration, statement: Any, arguments: Any) -> AsyncGenerator[Any, None]:
        transaction = self.open_transaction(None, read_only=True)
        transaction.start_clock()
        await transaction.begin()
        try:
            async with aclosing(operation(transaction, statement, arguments)) as batches:
                async for batch in batches:
                    yield batch
        finally:
            transaction.abandon()

    def register(self, collection: Collection) -> None:
        """Make a collection known, so that references to and from it are kept.

        Raises:
            TypeError: another one has the same name and other fields or keys.
        """
        table = self._tables.setdefault(collection.name, _Table(collection))
        if table.collection != collection:
            raise TypeError(f"two repositories disagree on the fields or keys of {collection.name!r}")

    def _require_connection(self) -> None:
        if not self._connected:
            raise RuntimeError("the session is not open: await session.connect() first, or use 'async with'")


class InMemoryTransaction(TransactionBackend):
    """One transaction of an ``InMemorySession``, and the connection that its operations are given."""

    def __init__(self, session: InMemorySession, isolation: str | None, read_only: bool) -> None:
        if isolation is not None and not isinstance(isolation, str):
            raise TypeError(f"isolation is one of {', '.join(_LEVELS)}, not {type(isolation).__name__}")
        level = "READ COMMITTED" if isolation is None else isolation.upper().replace("_", " ")
        if level not in _LEVELS:
            raise ValueError(f"isolation is one of {', '.join(_LEVELS)}, not {isolation!r}")
        self._session = session
        self._level = level
        self._read_only = read_only
        self._snapshot: int | None = None
        self._overlay: dict[Resource, Any] = {}
        """What this transaction has written: rows and unique values by resource; None where it removed them."""
        self._undo: list[tuple[Resource, Any]] = []
        self._reads: list[tuple[str, Predicate]] = []
        self._savepoints: list[tuple[str, int, int]] = []
        self.locks: list[Resource] = []
        self.waits_for: Resource | None = None

    # Beginning and ending

    async def begin(self) -> Self:
        await asyncio.sleep(0)
        # Nothing is awaited from here on: a caller that is cancelled has nothing to give back.
        self._session._require_connection()
        self._session._open.add(self)
        if self._level in _SNAPSHOT_LEVELS:
            self._snapshot = self._session._sequence
        return self

    async def commit(self) -> None:
        try:
            self._require_open()
            if self._level == "SERIALIZABLE" and self._overlay:
                self._validate_reads()
            self._publish()
        finally:
            self.abandon()

    async def rollback(self) -> None:
        self.abandon()

    def abandon(self) -> None:
        self._session._open.discard(self)
        self._overlay.clear()
        self._undo.clear()
        self._session._locks.dismiss(self)
        self._release_locks(0)

    async def savepoint(self, name: str) -> None:
        self._require_open()
        self._savepoints.append((name, len(self._undo), len(self.locks)))

    async def release_savepoint(self, name: str) -> None:
        self._forget_savepoint(name)

    async def rollback_to_savepoint(self, name: str) -> None:
        undone, locks = self._forget_savepoint(name)
        while len(self._undo) > undone:
            resource, before = self._undo.pop()
            if before is _MISSING:
                del self._overlay[resource]
            else:
                self._overlay[resource] = before
        self._release_locks(locks)

    def translate(self, error: Exception, statement: Any) -> Exception:
        return error

    def _forget_savepoint(self, name: str) -> tuple[int, int]:
        self._require_open()
        while self._savepoints:
            found, undone, locks = self._savepoints.pop()
            if found == name:
                return undone, locks
        raise RuntimeError(f"there is no savepoint {name}")

    def _release_locks(self, keep: int) -> None:
        released = self.locks[keep:]
        del self.locks[keep:]
        for resource in released:
            self._session._locks.release(self, resource)

    def _require_open(self) -> None:
        if self not in self._session._open:
            raise session_closed()

    def _validate_reads(self) -> None:
        """Refuse to commit if what was read is no longer so (backward validation, Kung and Robinson 1981)."""
        snapshot = self._snapshot or 0
        for name, predicate in self._reads:
            table = self._session._tables[name]
            for key, versions in table.versions.items():
                newer = [row for sequence, row in versions if sequence > snapshot]
                if newer and any(row is not None and predicate(row) for row in [table.at(key, snapshot), *newer]):
                    raise SerializationError("what this transaction has read was changed by another one")

    def _publish(self) -> None:
        session = self._session
        if not self._overlay:
            return
        session._sequence += 1
        oldest = min(
            (other._snapshot for other in session._open if other is not self and other._snapshot is not None),
            default=session._sequence,
        )
        for resource, value in self._overlay.items():
            table = session._tables[resource[1]]
            if resource[0] == "unique":
                if value is None:
                    table.index.pop(resource, None)
                else:
                    table.index[resource] = value
                continue
            versions = table.versions.setdefault(resource[2], [])
            versions.append((session._sequence, value))
            while len(versions) > 1 and versions[1][0] <= oldest:
                versions.pop(0)
            if versions[-1][1] is None and len(versions) == 1:
                del table.versions[resource[2]]

    # Reads

    def rows(self, name: str, predicate: Predicate, *, newest: bool = False) -> Iterator[tuple[Key, Row]]:
        """Iterate over the rows that match, as this transaction sees them.

        Args:
            newest: what is committed now instead of the snapshot; writes of READ COMMITTED, and keys, go by that.
        """
        self._require_open()
        table = self._table(name)
        if self._level == "SERIALIZABLE":
            self._reads.append((name, predicate))
        snapshot = None if newest else self._snapshot
        for key in list(table.versions):
            row = self._overlay.get(("row", name, key), _MISSING)
            if row is _MISSING:
                row = table.at(key, snapshot)
            if row is not None and predicate(row):
                yield key, row
        for resource, row in list(self._overlay.items()):
            added = resource[0] == "row" and resource[1] == name and resource[2] not in table.versions
            if added and row is not None and predicate(row):
                yield resource[2], row

    def row(self, name: str, key: Key, *, newest: bool = False) -> Row | None:
        """Return the row with this key as this transaction sees it, or None."""
        self._require_open()
        table = self._table(name)
        if self._level == "SERIALIZABLE":
            self._reads.append((name, lambda row: table.collection.key(row) == key))
        own: Row | None = self._overlay.get(("row", name, key), _MISSING)
        if own is not _MISSING:
            return own
        return table.at(key, None if newest else self._snapshot)

    def owner(self, name: str, names: tuple[str, ...], values: tuple[Any, ...]) -> Key | None:
        """Return the key of the row that holds these values of a unique key now, or None."""
        resource = ("unique", name, names, values)
        own: Key | None = self._overlay.get(resource, _MISSING)
        return self._table(name).index.get(resource) if own is _MISSING else own

    def next_number(self, name: str, field: str) -> int:
        """Return the next generated number of a field; as with a sequence, a rollback leaves a gap."""
        numbers = self._table(name).numbers
        numbers[field] = numbers.get(field, 0) + 1
        return numbers[field]

    def skip_numbers(self, name: str, field: str, used: int) -> None:
        """Have generated numbers begin behind one that was given."""
        numbers = self._table(name).numbers
        numbers[field] = max(numbers.get(field, 0), used)

    # Locks

    async def lock(self, name: str, key: Key, mode: str = "update") -> bool:
        """Lock a row; answer whether it was taken, which only ``"skip_locked"`` denies.

        What the row holds must be read again afterwards: another transaction may have changed it meanwhile.

        Raises:
            LockNotAvailableError: with ``"nowait"``, another transaction holds it.
            SerializationError: on a snapshot, the row has changed since.
        """
        self._require_open()
        taken = await self._session._locks.acquire(self, ("row", name, key), wait=mode == "update")
        if not taken and mode == "nowait":
            raise LockNotAvailableError("another transaction holds a row that was asked for")
        if taken and self._snapshot is not None and self._table(name).changed_at(key) > self._snapshot:
            raise SerializationError("a row that this transaction wants to change was changed by another one")
        return taken

    async def claim(
        self, name: str, names: tuple[str, ...], values: tuple[Any, ...], *, exclusive: bool = True
    ) -> Key | None:
        """Wait until no other transaction is about to take or free a unique value, and return who holds it."""
        await self._session._locks.acquire(self, ("unique", name, names, values), exclusive=exclusive)
        self._require_open()
        return self.owner(name, names, values)

    async def contend(self, name: str, names: tuple[str, ...], values: tuple[Any, ...]) -> Key | None:
        """Return who holds a unique value, as ``claim`` does; it stays claimed only if nobody does.

        Whoever goes on to lock the holder's row must not hold the value: those who delete the row come the other way.
        """
        held = len(self.locks)
        holder = await self.claim(name, names, values)
        if holder is not None:
            self._release_locks(held)
        return holder

    # Writes

    async def insert(self, name: str, row: Row) -> None:
        """Add a row.

        Raises:
            DuplicateKeyError: a unique value is taken.
            ForeignKeyError: what it references does not exist.
        """
        self.require_writable()
        table = self._table(name)
        key = table.collection.key(row)
        await self._take_unique_values(table, key, None, row)
        await self._require_references(table, None, row)
        await self.lock(name, key)
        self._write(("row", name, key), row)

    async def replace(self, name: str, key: Key, row: Row) -> None:
        """Write a row that this transaction has locked; its key stays.

        Raises:
            DuplicateKeyError, ForeignKeyError: as for ``insert``.
        """
        self.require_writable()
        table = self._table(name)
        before = self.row(name, key, newest=True)
        await self._take_unique_values(table, key, before, row)
        await self._require_references(table, before, row)
        await self._let_go(table, before, row)
        self._write(("row", name, key), row)

    async def remove(self, name: str, key: Key) -> None:
        """Remove a row that this transaction has locked.

        Raises:
            ForeignKeyError: another row references it.
        """
        self.require_writable()
        table = self._table(name)
        row = self.row(name, key, newest=True)
        if row is None:
            return
        for names in table.collection.unique_keys:
            await self._free(table, names, row)
        await self._let_go(table, row, None)
        self._write(("row", name, key), None)

    def _table(self, name: str) -> _Table:
        return self._session._tables[name]

    def _write(self, resource: Resource, value: Any) -> None:
        self._undo.append((resource, self._overlay.get(resource, _MISSING)))
        self._overlay[resource] = value

    def require_writable(self) -> None:
        """Refuse a write in a read-only transaction, even one that would touch nothing."""
        self._require_open()
        if self._read_only:
            raise UnsupportedOperationError("a read-only transaction does not write")

    async def _take_unique_values(self, table: _Table, key: Key, before: Row | None, after: Row) -> None:
        collection = table.collection
        for names in collection.unique_keys:
            values = collection.values(after, names)
            if before is not None and collection.values(before, names) == values:
                continue
            if None not in values:
                holder = self.owner(collection.name, names, values)
                if holder is None or self._is_contended(collection, names, values):
                    holder = await self.claim(collection.name, names, values)
                if holder is not None:
                    raise _duplicate(names)
                self._write(("unique", collection.name, names, values), key)
            if before is not None:
                await self._free(table, names, before)

    def _is_contended(self, collection: Collection, names: tuple[str, ...], values: tuple[Any, ...]) -> bool:
        """Answer whether another transaction is about to free or to take a unique value."""
        return self._session._locks.contended(self, ("unique", collection.name, names, values))

    async def _free(self, table: _Table, names: tuple[str, ...], row: Row) -> None:
        values = table.collection.values(row, names)
        if None not in values:
            await self.claim(table.collection.name, names, values)
            self._write(("unique", table.collection.name, names, values), None)

    # Foreign keys

    async def _require_references(self, table: _Table, before: Row | None, after: Row) -> None:
        collection = table.collection
        for reference in collection.references:
            values = collection.values(after, reference.fields)
            if None in values or (before is not None and collection.values(before, reference.fields) == values):
                continue
            target = self._session._tables.get(reference.target)
            if target is None:
                continue
            names = _same_key(target.collection, reference.target_fields)
            if names is None:
                continue
            ordered = tuple(values[reference.target_fields.index(name)] for name in names)
            itself = target is table and collection.values(after, names) == ordered
            if not itself and await self.claim(reference.target, names, ordered, exclusive=False) is None:
                raise ForeignKeyError(
                    f"what {', '.join(reference.fields)} refers to does not exist", fields=reference.fields
                )

    async def _let_go(self, table: _Table, before: Row | None, after: Row | None) -> None:
        """Keep the references to a row that is removed, or whose referenced values change."""
        if before is None:
            return
        for other in list(self._session._tables.values()):
            for reference in other.collection.references:
                if reference.target != table.collection.name:
                    continue
                gone = table.collection.values(before, reference.target_fields)
                if None in gone or (
                    after is not None and table.collection.values(after, reference.target_fields) == gone
                ):
                    continue
                await self._follow(table, before, other, reference, gone, removed=after is None)

    async def _follow(
        self, table: _Table, row: Row, other: _Table, reference: Reference, gone: tuple[Any, ...], *, removed: bool
    ) -> None:
        collection = other.collection

        def refers(found: Row) -> bool:
            return collection.values(found, reference.fields) == gone

        for key, found in list(self.rows(collection.name, refers, newest=True)):
            if other is table and found == row:
                continue
            if not removed or reference.on_delete == "RESTRICT":
                raise ForeignKeyError(f"a row of {collection.name} still refers to it", fields=reference.target_fields)
            await self.lock(collection.name, key)
            current = self.row(collection.name, key, newest=True)
            if current is None or not refers(current):
                continue
            if reference.on_delete == "CASCADE":
                await self.remove(collection.name, key)
            else:
                nulled = tuple(
                    None if name in reference.fields else value
                    for name, value in zip(collection.fields, current, strict=True)
                )
                await self.replace(collection.name, key, nulled)


def _duplicate(names: tuple[str, ...]) -> DuplicateKeyError:
    return DuplicateKeyError(f"{' and '.join(names)} is already taken", fields=names)


def _same_key(collection: Collection, names: tuple[str, ...]) -> tuple[str, ...] | None:
    """Return the unique key with these fields, in any order, as the collection spells it."""
    return next((unique for unique in collection.unique_keys if set(unique) == set(names)), None)
