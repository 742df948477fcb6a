"""What a contract suite has to be told about the repository that it tests."""

import copy
import dataclasses
from typing import Any, ClassVar, Generic, TypeVar

import pytest

from fastapi_building_blocks.domain import Repository
from fastapi_building_blocks.infrastructure.database.session import DatabaseSession

T = TypeVar("T")


class ContractSubject(Generic[T]):
    """The repository under test, its entities, and which of their fields the tests may play with."""

    key_fields: ClassVar[tuple[str, ...]] = ("id",)
    """The fields of the primary key, in its order."""
    text_field: ClassVar[str | None] = None
    """A text that may be filtered and sorted by, and not be None; ``make_entity`` gives it in ascending order."""
    number_field: ClassVar[str | None] = None
    """A whole number that is not unique and may be filtered, sorted and written."""
    unique_field: ClassVar[str | None] = None
    """A field that is unique on its own, and not part of the key."""
    nullable_field: ClassVar[str | None] = None
    """A field that may be None, and sorted by; ``make_entity`` gives it a value."""
    bulk_size: ClassVar[int] = 3000
    """How many entities a bulk write is tried with."""
    concurrent_tasks: ClassVar[int] = 80
    """How many tasks race for one row."""
    one_connection: ClassVar[bool] = False
    """Whether the session has a single connection (SQLite's ``:memory:``), so that two transactions never overlap."""

    @pytest.fixture
    async def session(self) -> Any:
        """Yield an open session whose store is empty; to be overridden."""
        raise NotImplementedError(f"{type(self).__name__} needs a fixture 'session' that yields an open, empty store")

    @pytest.fixture
    def repository(self, session: DatabaseSession) -> Repository[T]:
        """Return the repository on the session itself, where every call is its own transaction."""
        return self.make_repository(session)

    def make_repository(self, session: DatabaseSession) -> Repository[T]:
        """Return the repository under test on a session or a unit of work; to be overridden."""
        raise NotImplementedError(f"{type(self).__name__} needs make_repository(session)")

    def make_entity(self, number: int) -> T:
        """Return a new entity, another one for each number, ``text_field`` ascending; to be overridden."""
        raise NotImplementedError(f"{type(self).__name__} needs make_entity(number)")

    def change(self, entity: T, /, **values: Any) -> T:
        """Return a copy of an entity with other values; override it for classes with a constructor of their own."""
        subject: Any = entity
        if dataclasses.is_dataclass(subject):
            changed: Any = dataclasses.replace(subject, **values)  # type: ignore[type-var]
        elif hasattr(subject, "model_copy"):
            changed = subject.model_copy(update=values)
        elif hasattr(subject, "__attrs_attrs__"):
            changed = copy.copy(subject)
            for name, value in values.items():
                object.__setattr__(changed, name, value)
        else:
            raise NotImplementedError(f"{type(self).__name__} needs change(entity, **values)")
        return changed  # type: ignore[no-any-return]

    def value(self, entity: T, name: str) -> Any:
        """Return a field of an entity; override it where attributes have other names than columns."""
        return getattr(entity, name)

    # What the tests are written with

    def key_of(self, entity: T) -> Any:
        """Return the key as ``get_by_id`` takes it."""
        values = tuple(self.value(entity, name) for name in self.key_fields)
        return values[0] if len(values) == 1 else values

    def entity(self, number: int, /, **values: Any) -> T:
        """Return ``make_entity(number)`` with some of its values changed."""
        return self.change(self.make_entity(number), **values) if values else self.make_entity(number)

    async def added(self, repository: Repository[T], *numbers: int) -> list[T]:
        """Add the entities with these numbers and return them as stored."""
        return [await repository.add(self.make_entity(number)) for number in numbers]

    async def unknown_key(self, repository: Repository[T]) -> Any:
        """Return a key that no entity has, by removing the one that had it."""
        key = self.key_of(await repository.add(self.make_entity(999_999)))
        assert await repository.including_deleted().delete(key)
        return key

    def needs(self, attribute: str) -> str:
        """Return the field that an attribute of the suite names, or skip the test."""
        name: str | None = getattr(self, attribute)
        if name is None:
            pytest.skip(f"{type(self).__name__}.{attribute} is not declared")
        return name

    def needs_column(self, repository: Repository[T], attribute: str) -> str:
        """Return the column that an attribute of the repository names, or skip the test."""
        name: str | None = getattr(repository, attribute)
        if name is None:
            pytest.skip(f"{type(repository).__name__} has no {attribute}")
        return name

    def needs_two_connections(self) -> None:
        """Skip the test where two transactions can never overlap."""
        if self.one_connection:
            pytest.skip("the session has one connection: transactions take turns")

    def any_writable(self) -> str:
        """Return a field that may be given other values, or skip the test."""
        name = self.number_field or self.text_field or self.nullable_field
        if name is None:
            pytest.skip(f"{type(self).__name__} declares neither number_field, text_field nor nullable_field")
        return name

    def another_value(self, number: int = 7) -> dict[str, Any]:
        """Return a change to a writable field, another one for each number."""
        name = self.any_writable()
        return {name: number if name == self.number_field else self.value(self.make_entity(500_000 + number), name)}
