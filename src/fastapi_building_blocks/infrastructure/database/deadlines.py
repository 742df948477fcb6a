"""How much time a piece of work has left: one deadline for all of its calls, which shrinks as it is spent."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from fastapi_building_blocks.domain.errors import DeadlineExceededError

current_deadline: ContextVar[float | None] = ContextVar("deadline", default=None)
"""When the work of this context has to be done, by ``time.monotonic()``."""


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Bound every database call of a block, by this task and those that it starts.

    ::

        with deadline(2.0):
            user = await users.get(id)

    Each call gets what is left, checkout and COMMIT included; once nothing is, a call raises before it sends anything.
    Of two deadlines, one inside the other, the earlier counts. A ROLLBACK has its own time.

    Args:
        seconds: from now.

    Raises:
        DeadlineExceededError: by the calls of the block; ``PoolTimeoutError`` and ``StatementTimeoutError`` are such.
        ValueError: ``seconds`` is not a positive number.
    """
    if not seconds > 0:
        raise ValueError("a deadline is a number of seconds greater than 0")
    end, earlier = time.monotonic() + seconds, current_deadline.get()
    token = current_deadline.set(end if earlier is None else min(end, earlier))
    try:
        yield
    finally:
        current_deadline.reset(token)


def time_left() -> float | None:
    """Return the seconds that the deadline around this call leaves; None: there is no deadline.

    Raises:
        DeadlineExceededError: there is none left.
    """
    left = seconds_left()
    if left <= 0:
        raise deadline_passed()
    return None if left == math.inf else left


def seconds_left() -> float:
    """Return what the deadline around this call leaves, less than 0 when it has passed; infinite without one."""
    end = current_deadline.get()
    return math.inf if end is None else end - time.monotonic()


def deadline_passed() -> DeadlineExceededError:
    """Return the error of work whose time was over before it began."""
    return DeadlineExceededError("the time that this work had is over")
