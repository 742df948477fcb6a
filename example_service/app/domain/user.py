"""Users, and the rules that hold for one whatever stores it."""

import enum
from dataclasses import dataclass, field
from datetime import datetime
from typing import Self
from uuid import UUID

from example_service.app.domain.identifiers import uuid7


class UserStatus(enum.StrEnum):
    """Whether a user may sign in."""

    ACTIVE = "active"
    INACTIVE = "inactive"
    SUSPENDED = "suspended"


@dataclass(kw_only=True, slots=True)
class User:
    """Somebody who uses the product, known by e-mail and username, both unique.

    E-mail addresses are kept in lower case, so that one mailbox is one user; usernames keep their case, and
    ``Ada`` and ``ada`` are two.
    """

    email: str
    username: str
    first_name: str | None = None
    last_name: str | None = None
    full_name: str | None = None
    bio: str | None = None
    hashed_password: str | None = field(default=None, repr=False)
    status: UserStatus = UserStatus.ACTIVE
    is_verified: bool = False
    is_admin: bool = False
    id: UUID = field(default_factory=uuid7)
    version: int = 1
    created_at: datetime | None = None
    updated_at: datetime | None = None

    @classmethod
    def register(
        cls,
        *,
        email: str,
        username: str,
        first_name: str | None = None,
        last_name: str | None = None,
        full_name: str | None = None,
        bio: str | None = None,
        hashed_password: str | None = None,
    ) -> Self:
        """Return a new active user; without a full name it is the first and the last one joined."""
        joined = " ".join(name for name in (first_name, last_name) if name)
        return cls(
            email=normalized_email(email),
            username=username,
            first_name=first_name,
            last_name=last_name,
            full_name=full_name if full_name is not None else joined or None,
            bio=bio,
            hashed_password=hashed_password,
        )


def normalized_email(email: str) -> str:
    """Return the one spelling under which this address is kept and looked up."""
    return email.lower()
