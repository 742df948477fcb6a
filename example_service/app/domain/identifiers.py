"""Identifiers for new entities."""

import secrets
import time
from uuid import UUID

_SUBMILLISECOND_STEPS = 1 << 12


def uuid7() -> UUID:
    """Return a new UUID that sorts by its time of creation (RFC 9562, section 5.7).

    The 12 bits after the milliseconds hold the fraction of the millisecond (section 6.2, method 3), and 62 bits are
    random. New keys land at the end of an index instead of all over it.
    """
    milliseconds, nanoseconds = divmod(time.time_ns(), 1_000_000)
    fraction = nanoseconds * _SUBMILLISECOND_STEPS // 1_000_000
    version, variant = 0x7, 0b10
    return UUID(
        int=(milliseconds & 0xFFFF_FFFF_FFFF) << 80
        | version << 76
        | fraction << 64
        | variant << 62
        | secrets.randbits(62)
    )
