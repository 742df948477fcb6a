"""Which server a read may be answered by: what has to be current asks the primary."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

prefer_primary: ContextVar[bool] = ContextVar("prefer_primary", default=False)
"""Whether the reads of this context go to the primary."""


@contextmanager
def reads_from_primary() -> Iterator[None]:
    """Have the reads of a block answered by the primary: what is kept for others, as in a cache, must not lag."""
    token = prefer_primary.set(True)
    try:
        yield
    finally:
        prefer_primary.reset(token)
