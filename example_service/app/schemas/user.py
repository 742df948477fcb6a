"""Bodies of requests and answers about users."""

from datetime import datetime
from typing import Annotated, Any
from uuid import UUID

from pydantic import MISSING, BaseModel, BeforeValidator, ConfigDict, EmailStr, Field, StrictBool, StringConstraints

from example_service.app.application.register_user import RegisterUser
from example_service.app.domain.user import UserStatus

# NUL cannot be stored as text everywhere, so it is refused everywhere.
_WITHOUT_NUL = r"^[^\x00]*$"


def _without_display_name(address: object) -> object:
    # EmailStr takes "Alice <alice@test.com>" and drops the name.
    if isinstance(address, str) and "<" in address:
        raise ValueError("only the address, without a name")
    return address


Email = Annotated[
    EmailStr,
    BeforeValidator(_without_display_name),
    Field(max_length=254, description="Unique, kept in lower case", examples=["alice@test.com"]),
]
Username = Annotated[
    str,
    StringConstraints(min_length=3, max_length=50, pattern=r"^[a-zA-Z0-9_-]+$"),
    Field(description="Unique, case-sensitive", examples=["alice"]),
]
# Who looks a name up gets "no such user" for one that nobody can have, not a lesson on names.
LookedUpUsername = Annotated[
    str,
    StringConstraints(max_length=255, pattern=_WITHOUT_NUL),
    Field(description="Case-sensitive", examples=["alice"]),
]
GivenName = Annotated[str, StringConstraints(max_length=50, pattern=_WITHOUT_NUL)]
FullName = Annotated[str, StringConstraints(max_length=100, pattern=_WITHOUT_NUL)]
Biography = Annotated[str, StringConstraints(max_length=1000, pattern=_WITHOUT_NUL)]
HashedPassword = Annotated[
    str,
    StringConstraints(min_length=60, max_length=255, pattern=r"^[\x21-\x7e]+$"),
    Field(description="A bcrypt hash, made by the calling service; never answered"),
]

SearchText = Annotated[str, StringConstraints(max_length=100, pattern=_WITHOUT_NUL)]


class UserCreate(BaseModel):
    """A user to be."""

    model_config = ConfigDict(extra="forbid")

    email: Email
    username: Username
    first_name: GivenName | None = None
    last_name: GivenName | None = None
    full_name: Annotated[FullName | None, Field(description="Absent: the first and the last name joined")] = None
    bio: Biography | None = None
    hashed_password: HashedPassword | None = None

    def to_command(self) -> RegisterUser:
        """Return what the application floor takes."""
        return RegisterUser(**self.model_dump())


class UserUpdate(BaseModel):
    """Changes to a user: an absent field is left alone, an explicit null is written.

    The full name is joined once, at registration: a change of the first or the last name does not change it.
    """

    model_config = ConfigDict(extra="forbid", json_schema_extra={"minProperties": 1})

    email: Email | MISSING = MISSING
    username: Username | MISSING = MISSING
    first_name: GivenName | MISSING | None = MISSING
    last_name: GivenName | MISSING | None = MISSING
    full_name: FullName | MISSING | None = MISSING
    bio: Biography | MISSING | None = MISSING
    hashed_password: HashedPassword | MISSING | None = MISSING
    status: UserStatus | MISSING = MISSING
    is_verified: StrictBool | MISSING = MISSING
    is_admin: StrictBool | MISSING = MISSING

    def to_changes(self) -> dict[str, Any]:
        """Return the fields that were sent, with their new values."""
        return self.model_dump(exclude_unset=True)


class UserResponse(BaseModel):
    """A user as others see one."""

    model_config = ConfigDict(from_attributes=True)

    id: UUID
    email: str
    username: str
    first_name: str | None
    last_name: str | None
    full_name: str | None
    bio: str | None
    status: UserStatus
    is_verified: bool
    is_admin: bool
    version: int
    created_at: datetime
    updated_at: datetime


class Credentials(BaseModel):
    """Who somebody claims to be, and the proof."""

    model_config = ConfigDict(extra="forbid")

    username: LookedUpUsername
    password: Annotated[str, StringConstraints(max_length=1024, pattern=_WITHOUT_NUL), Field(repr=False)]
