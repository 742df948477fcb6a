"""Registering a user."""

from dataclasses import asdict, dataclass

from example_service.app.domain.user import User
from fastapi_building_blocks.domain import Repository


@dataclass(frozen=True, kw_only=True, slots=True)
class RegisterUser:
    """What is known of somebody who registers; the password was hashed by the calling service."""

    email: str
    username: str
    first_name: str | None = None
    last_name: str | None = None
    full_name: str | None = None
    bio: str | None = None
    hashed_password: str | None = None


async def register_user(users: Repository[User], command: RegisterUser) -> User:
    """Add a user, or raise ``DuplicateKeyError`` naming the field that is taken."""
    return await users.add(User.register(**asdict(command)))
