"""The one error tree. Every class has a stable ``code``; only ``api`` knows HTTP statuses.

::

    BuildingBlocksError
    ├── NotFoundError
    ├── ConflictError
    │   ├── DuplicateKeyError
    │   ├── ForeignKeyError
    │   ├── LockNotAvailableError
    │   └── StaleVersionError
    ├── MultipleResultsError
    ├── InvalidInputError
    │   ├── InvalidQueryError
    │   └── ConstraintError
    ├── UnsupportedOperationError
    ├── UnavailableError                 worth trying again, after ``retry_after`` seconds
    │   ├── TransientError               a whole unit of work may be replayed
    │   │   ├── DeadlockError
    │   │   └── SerializationError
    │   ├── ConnectionLostError
    │   ├── CommitOutcomeUnknownError    never replayed: it may have happened
    │   └── CircuitOpenError
    └── DeadlineExceededError
        ├── PoolTimeoutError
        └── StatementTimeoutError

Misuse by the programmer (an unopened session, two tasks on one transaction, a wrong argument)
is a ``RuntimeError``, ``TypeError`` or ``ValueError`` and stays outside the tree.
"""

import re
from collections.abc import Iterable
from typing import ClassVar


class BuildingBlocksError(Exception):
    """What every store raises when it cannot keep its promise.

    ``detail`` is a sentence for the caller of a service: it never holds SQL, a stack or a secret.
    ``fields`` names the entity's fields concerned, where there are any.
    """

    code: ClassVar[str] = "building_blocks"

    def __init__(self, detail: str, *, fields: Iterable[str] = ()) -> None:
        super().__init__(detail)
        self.detail = detail
        self.fields = tuple(fields)

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "code" not in cls.__dict__:
            words = re.sub(r"(?<!^)(?=[A-Z])", "_", cls.__name__).lower()
            cls.code = words.removesuffix("_error")


class NotFoundError(BuildingBlocksError):
    """No entity has the key that was asked for."""


class ConflictError(BuildingBlocksError):
    """The request is well formed, but what is stored stands against it."""


class DuplicateKeyError(ConflictError):
    """Another entity holds a value that must be unique; ``fields`` names the fields of the key."""


class ForeignKeyError(ConflictError):
    """A referenced entity is missing, or this one is still referenced."""


class LockNotAvailableError(ConflictError):
    """Another transaction holds the row, and the caller asked not to wait. Never replayed."""


class StaleVersionError(ConflictError):
    """The entity has changed since this version of it was read (optimistic concurrency)."""


class MultipleResultsError(BuildingBlocksError):
    """More than one entity matches where at most one may."""


class InvalidInputError(BuildingBlocksError):
    """A value cannot be stored as it is; ``fields`` names it, and nothing has changed."""


class InvalidQueryError(InvalidInputError):
    """A filter, sort, page or cursor is not one that this repository answers."""


class ConstraintError(InvalidInputError):
    """The database refused a value: a CHECK, a NOT NULL, a length or a range."""


class UnsupportedOperationError(BuildingBlocksError):
    """This store cannot do it, and does not pretend to."""


class UnavailableError(BuildingBlocksError):
    """The store cannot answer now. ``retry_after`` is a hint in seconds, or None: do not retry blindly."""

    retry_after: float | None = 1.0


class TransientError(UnavailableError):
    """The database ended the transaction to resolve a clash; the whole unit of work may be replayed."""


class DeadlockError(TransientError):
    """This transaction was chosen as the victim of a deadlock, or waited too long for a lock."""


class SerializationError(TransientError):
    """This transaction cannot be put in order with another one that committed."""


class ConnectionLostError(UnavailableError):
    """The connection broke or could not be made; nothing of an open transaction was kept."""


class CommitOutcomeUnknownError(UnavailableError):
    """The connection broke after COMMIT, or a single write, was sent: it is whole or absent, unknown which.

    A blind retry could do the work twice, so there is no ``retry_after``: read first, then decide.
    """

    retry_after = None


class CircuitOpenError(UnavailableError):
    """Too many recent calls failed; this one was refused without being tried."""


class DeadlineExceededError(BuildingBlocksError):
    """The answer did not come in time."""


class PoolTimeoutError(DeadlineExceededError):
    """No connection became free within the pool timeout."""


class StatementTimeoutError(DeadlineExceededError):
    """The database did not finish a statement within the statement timeout."""
