"""Changing some fields of a user."""

from collections.abc import Mapping
from typing import Any
from uuid import UUID

from example_service.app.domain.user import User, normalized_email
from fastapi_building_blocks.domain import Repository


async def change_user(users: Repository[User], id: UUID, changes: Mapping[str, Any], version: int | None) -> User:
    """Write these fields and no others, and return the user as stored.

    Args:
        users: where users are kept.
        id: whom to change.
        changes: field to new value; None is written.
        version: the version that the caller has seen, or None to change whatever is there.

    Raises:
        NotFoundError: there is no such user.
        StaleVersionError: the user is no longer at that version.
        DuplicateKeyError: the new e-mail or username is taken; where both are, which one it names is up to the database.
    """
    values = dict(changes)
    if "email" in values:
        values["email"] = normalized_email(values["email"])
    return await users.patch(id, values, version=version)
