"""Checking a username and a password."""

import asyncio
import re
from typing import Protocol

import bcrypt

from example_service.app.domain.user import User, UserStatus

# Checked where there is no usable hash, so that the answer takes as long as for a wrong password.
# It has the cost that bcrypt.gensalt() gives by default, 12; no password is known for it.
_NOBODYS_HASH = b"$2b$12$.W41LWR7yT0G0cceNQo3VO5J6uZJekgCVKhiT/SC8aa/JrdZp1LAO"
_READ_BY_BCRYPT = 72  # bytes
# A hash names its own cost, and each step doubles the work: one of 31 would keep a thread busy for days.
_USABLE_HASH = re.compile(rb"\$2[aby]\$(0[4-9]|1[0-4])\$[./A-Za-z0-9]{21}[.Oeu][./A-Za-z0-9]{31}")


class UsersByName(Protocol):
    """Where users are looked up by name."""

    async def get_by_username(self, username: str) -> User | None:
        """Return the user with exactly this username, or None."""


async def verify_credentials(users: UsersByName, username: str, password: str) -> User | None:
    """Return the active user with this username and password, or None.

    An unknown user, one without a password and one that may not sign in take as long as a wrong password for a hash
    of cost 12 or less; only a hash of cost 13 or 14 takes longer. The check runs in a thread, and no connection is
    held meanwhile. bcrypt reads 72 bytes, so a longer password takes its time and is never right.
    """
    user = await users.get_by_username(username)
    stored = user.hashed_password.encode() if user and user.hashed_password else b""
    usable = _USABLE_HASH.fullmatch(stored) is not None
    given = password.encode()
    matches = await asyncio.to_thread(_check, given[:_READ_BY_BCRYPT], stored if usable else _NOBODYS_HASH)
    known = usable and matches and len(given) <= _READ_BY_BCRYPT
    return user if user and known and user.status is UserStatus.ACTIVE else None


def _check(password: bytes, hashed: bytes) -> bool:
    """Return whether the password is the hash's, with no less work than for ``_NOBODYS_HASH``."""
    matches = bcrypt.checkpw(password, hashed)
    # Work doubles with each cost, so a check of cost c and one each of c to 11 are the work of one of cost 12.
    for cost in range(int(hashed[4:6]), int(_NOBODYS_HASH[4:6])):
        bcrypt.checkpw(password, b"$2b$%02d$%b" % (cost, _NOBODYS_HASH[7:]))
    return matches
