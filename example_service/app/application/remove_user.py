"""Removing a user."""

from uuid import UUID

from example_service.app.domain.user import User
from fastapi_building_blocks.domain import NotFoundError, Repository, StaleVersionError, field


async def remove_user(users: Repository[User], id: UUID, version: int | None) -> None:
    """Remove a user for good.

    Args:
        users: where users are kept.
        id: whom to remove.
        version: the version that the caller has seen, or None to remove whatever is there.

    Raises:
        NotFoundError: there is no such user.
        StaleVersionError: the user is no longer at that version.
    """
    if version is None:
        removed = await users.delete(id)
    else:
        removed = await users.delete_where(field("id") == id, field("version") == version) > 0
        if not removed and await users.exists(field("id") == id):
            raise StaleVersionError("the user has changed since this version")
    if not removed:
        raise NotFoundError("there is no such user", fields=("id",))
