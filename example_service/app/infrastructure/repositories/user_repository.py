"""Users on any database, and how they are found."""

from abc import abstractmethod

import sqlalchemy as sa

from example_service.app.domain.user import User, UserStatus, normalized_email
from example_service.app.infrastructure.tables import users_table
from fastapi_building_blocks.domain import Criterion, Repository, field
from fastapi_building_blocks.infrastructure import SQLAlchemyRepository

SEARCHED_FIELDS = ("username", "email", "full_name")


class FindsUsers(Repository[User]):
    """How users are found, whether the database answers or a cache in front of it."""

    async def get_by_email(self, email: str) -> User | None:
        """Return the user with this e-mail address, compared without case, or None."""
        return await self.find_one(field("email") == normalized_email(email))

    async def get_by_username(self, username: str) -> User | None:
        """Return the user with exactly this username, or None."""
        return await self.find_one(field("username") == username)

    async def get_active_users(self) -> list[User]:
        """Return every user who may sign in, by username."""
        return await self.get_all(field("status") == UserStatus.ACTIVE, sort="username")

    @abstractmethod
    def search(self, text: str) -> Criterion | sa.ColumnElement[bool]:
        """Return the condition of having this text in username, e-mail or full name, literally, in whatever case."""


class UserRepository(FindsUsers, SQLAlchemyRepository[User]):
    """Users as rows of ``users``, found by id, e-mail or username."""

    table = users_table
    version_column = "version"
    created_at_column = "created_at"
    updated_at_column = "updated_at"
    hidden_columns = frozenset({"hashed_password"})
    filterable_fields = (
        "id",
        "email",
        "username",
        "first_name",
        "last_name",
        "full_name",
        "status",
        "is_verified",
        "is_admin",
        "version",
        "created_at",
        "updated_at",
    )
    sortable_fields = (
        "id",
        "email",
        "username",
        "first_name",
        "last_name",
        "full_name",
        "status",
        "created_at",
        "updated_at",
    )

    def search(self, text: str) -> Criterion | sa.ColumnElement[bool]:
        username, email, full_name = (field(name).icontains(text) for name in SEARCHED_FIELDS)
        return username | email | full_name
