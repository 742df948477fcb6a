"""The contract of ``domain.Repository`` as a test suite, for any repository on any session."""

from typing import TypeVar

from fastapi_building_blocks.testing.contract_locks import LockContract
from fastapi_building_blocks.testing.contract_pages import PageContract
from fastapi_building_blocks.testing.contract_reads import ReadContract
from fastapi_building_blocks.testing.contract_transactions import TransactionContract
from fastapi_building_blocks.testing.contract_writes import WriteContract

T = TypeVar("T")


class RepositoryContract(ReadContract[T], PageContract[T], WriteContract[T], TransactionContract[T], LockContract[T]):
    """Every promise of a repository, as tests; subclass it with a repository and its entities.

    ::

        class TestUserRepository(RepositoryContract[User]):
            text_field = "name"
            number_field = "age"
            unique_field = "email"
            nullable_field = "bio"

            @pytest.fixture
            async def session(self):
                async with SQLAlchemySession("sqlite+aiosqlite:///:memory:") as session:
                    await session.create_tables(metadata)
                    yield session

            one_connection = True                       # of an SQLite ":memory:" session

            def make_repository(self, session):
                return UserRepository(session)

            def make_entity(self, number):
                return User(id=uuid4(), email=f"{number:06}@example.org", name=f"name {number:06}", age=number, bio="x")

    A test that needs a field that is not declared is skipped with that reason. ``version_column``,
    ``soft_delete_column`` and the other attributes are taken from the repository. The store must be empty for
    each test, and the session open; nothing sleeps, and the whole suite takes seconds.
    """
