"""What every store promises, in words; ``testing.RepositoryContract`` holds them to it."""

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Collection, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Generic, Literal, Self, TypeVar

from .query import Criterion, CursorPage, CursorRequest, Page, PageRequest, Sort

T = TypeVar("T")

Lock = Literal["update", "skip_locked", "nowait"]
SortKeys = str | Sort | Iterable[str | Sort]


class Repository(ABC, Generic[T]):
    """A collection of entities of one kind, found by key and by criteria.

    A repository runs on a session, where every call is its own transaction, or in a unit of work, where it
    takes part and never commits. Entities are the caller's own classes; what is answered is never shared
    with another caller, and an argument is left as it was.

    Every read leaves soft-deleted entities out, unless asked through ``including_deleted()``.
    Every order ends in the primary key, in the direction of its last key, so it is total. A criterion or sort on an unknown or hidden field
    raises ``InvalidQueryError``; a value that the store cannot hold raises ``InvalidInputError`` that names
    the field, and nothing changes. A store that cannot answer raises ``UnavailableError`` or
    ``DeadlineExceededError``.
    """

    version_column: ClassVar[str | None] = None
    """The whole number that grows with every change (optimistic concurrency)."""
    soft_delete_column: ClassVar[str | None] = None
    """The nullable timestamp, or the flag, that marks an entity as deleted."""
    created_at_column: ClassVar[str | None] = None
    """The timestamp that ``add`` sets where the entity has none."""
    updated_at_column: ClassVar[str | None] = None
    """The timestamp that every change sets."""
    hidden_columns: ClassVar[Collection[str]] = frozenset()
    """Loaded into the entity, but never filtered, sorted or shown."""
    filterable_fields: ClassVar[Collection[str] | None] = None
    """What a list over HTTP may filter by; None: every field that is not hidden."""
    sortable_fields: ClassVar[Collection[str] | None] = None
    """What a list over HTTP may sort by; None: every field that is not hidden."""
    search_fields: ClassVar[Sequence[str]] = ()
    """The text fields that ``search=`` over HTTP looks into; empty: no such parameter."""

    @classmethod
    @abstractmethod
    def field_types(cls) -> Mapping[str, type]:
        """Return each field that may be filtered or sorted with its Python type; hidden ones are left out."""

    # Reads

    @abstractmethod
    async def get(self, id: Any) -> T:
        """Return the entity with this key; a composite key is a tuple.

        Raises:
            NotFoundError: there is none.
        """

    @abstractmethod
    async def get_by_id(self, id: Any, *, lock: Lock | None = None) -> T | None:
        """Return the entity with this key, or None.

        Args:
            lock: keep the row until the transaction ends. ``"update"`` waits for another holder, ``"nowait"``
                raises, ``"skip_locked"`` answers None.

        Raises:
            LockNotAvailableError: with ``"nowait"``, another transaction holds it.
            RuntimeError: a lock was asked for outside a transaction.
            UnsupportedOperationError: the database has no such lock.
        """

    @abstractmethod
    async def get_many(self, ids: Iterable[Any]) -> list[T]:
        """Return the entities with these keys in the order asked; missing ones are left out, repeats repeated."""

    @abstractmethod
    async def find_one(self, *criteria: Criterion, lock: Lock | None = None) -> T | None:
        """Return the one entity that matches, or None.

        Raises:
            MultipleResultsError: several match.
        """

    @abstractmethod
    async def get_all(
        self,
        *criteria: Criterion,
        sort: SortKeys = (),
        limit: int | None = None,
        offset: int = 0,
        lock: Lock | None = None,
    ) -> list[T]:
        """Return every entity that matches all criteria, in order; ``lock`` as for ``get_by_id``."""

    @abstractmethod
    async def paginate(self, request: PageRequest, *criteria: Criterion, sort: SortKeys = ()) -> Page[T]:
        """Return one page by offset; past the last page it is empty and the total still right."""

    @abstractmethod
    async def paginate_by_cursor(
        self, request: CursorRequest, *criteria: Criterion, sort: SortKeys = ()
    ) -> CursorPage[T]:
        """Return one page by keyset: no skip and no repeat while others insert and delete.

        Raises:
            InvalidQueryError: the cursor is malformed, or belongs to another sort or filter.
        """

    @abstractmethod
    def stream(self, *criteria: Criterion, sort: SortKeys = (), batch_size: int = 1000) -> AsyncGenerator[T, None]:
        """Iterate over every entity that matches, in constant memory.

        Holds one connection until it ends; leave a loop early under ``contextlib.aclosing``. A stream owns
        its transaction while it is open: another statement there is a ``RuntimeError``.
        """

    @abstractmethod
    async def count(self, *criteria: Criterion) -> int:
        """Return how many entities match."""

    @abstractmethod
    async def exists(self, *criteria: Criterion) -> bool:
        """Return whether any entity matches."""

    # Writes

    @abstractmethod
    async def add(self, entity: T) -> T:
        """Store a new entity and return it with what the database generated.

        None is left out for generated keys and for columns with a default, and written as NULL elsewhere.

        Raises:
            DuplicateKeyError: a unique value is taken; ``fields`` names it.
            ForeignKeyError: what it references does not exist.
        """

    @abstractmethod
    async def add_many(self, entities: Iterable[T]) -> int:
        """Store new entities, all or none, and return how many. A generator is taken in constant memory.

        They may be read while those before them are already written, so leave them alone until the call is over.
        """

    @abstractmethod
    async def update(self, entity: T) -> T:
        """Write every field of an entity that exists and return it as stored.

        Raises:
            NotFoundError: there is none with its key.
            StaleVersionError: with ``version_column``, it has changed since the entity was read.
            DuplicateKeyError: a unique value is taken.
        """

    @abstractmethod
    async def patch(self, id: Any, values: Mapping[str, Any], version: int | None = None) -> T:
        """Write only these fields and return the entity as stored; None is written as NULL.

        Args:
            values: field to new value; at least one, never a field of the key or the version.
            version: if given, the version that the caller has read (``StaleVersionError``).

        Raises:
            NotFoundError, StaleVersionError, DuplicateKeyError: as for ``update``.
            InvalidInputError: no values, an unknown field, or a value that cannot be stored.
        """

    @abstractmethod
    async def update_where(self, values: Mapping[str, Any], *criteria: Criterion, everything: bool = False) -> int:
        """Write these fields of every entity that matches and return how many; version and timestamp follow.

        Raises:
            ValueError: no criteria, and not ``everything=True``.
        """

    @abstractmethod
    async def update_many(self, entities: Iterable[T]) -> int:
        """Write every field of these entities, all or none, and return how many.

        Raises:
            NotFoundError, StaleVersionError: for one of them; none has changed.
        """

    @abstractmethod
    async def upsert(self, entity: T, on: Sequence[str] | None = None) -> T:
        """Add the entity, or write its fields to the one with the same key, in one atomic step; return it as stored.

        Args:
            on: the fields of a unique constraint; None: the primary key.

        Raises:
            DuplicateKeyError: it collides on another unique key than ``on``.
            ValueError: ``on`` is not unique.
        """

    @abstractmethod
    async def upsert_many(self, entities: Iterable[T], on: Sequence[str] | None = None) -> int:
        """Upsert these entities, all or none, and return how many were taken; of two with one key the later wins."""

    @abstractmethod
    async def get_or_add(self, entity: T, on: Sequence[str] | None = None) -> tuple[T, bool]:
        """Return the stored entity with the same ``on`` fields and False, or add this one: it and True. Race-free."""

    @abstractmethod
    async def delete(self, id: Any) -> bool:
        """Remove the entity, or mark it with ``soft_delete_column``; answer whether there was one."""

    @abstractmethod
    async def delete_where(self, *criteria: Criterion, everything: bool = False) -> int:
        """Remove or mark every entity that matches and return how many.

        Raises:
            ValueError: no criteria, and not ``everything=True``.
        """

    # Soft delete

    @abstractmethod
    def including_deleted(self) -> Self:
        """Return a view that sees soft-deleted entities as well; its ``delete`` removes them for good."""

    @abstractmethod
    async def restore(self, id: Any) -> bool:
        """Bring a soft-deleted entity back; answer whether there was one to bring back."""
