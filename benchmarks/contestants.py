"""What a contestant is: one way to reach the accounts, with a pool of its own."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from .accounts import Account

POOL_SIZE = 5
"""Connections of each contestant, all kept open: eight contestants share a server that allows a hundred."""


class Contestant:
    """One way to reach the accounts. It takes part in the operations whose methods it defines.

    Answers are accounts: instances of any class with the columns as attributes, or mappings.
    """

    name: ClassVar[str]

    async def setup(self, url: str) -> None:
        """Open the pool."""
        raise NotImplementedError

    async def teardown(self) -> None:
        """Close the pool."""
        raise NotImplementedError

    def native(self, account: Account) -> Any:
        """Return the account as this contestant's users hold it; made outside the timed part."""
        return account

    def takes_part(self, method: str) -> bool:
        return getattr(type(self), method) is not getattr(Contestant, method)

    async def get(self, number: int) -> Any:
        """Return one account by its key."""
        raise NotImplementedError

    async def page(self, status: str) -> Sequence[Any]:
        """Return the 100 newest accounts with this status."""
        raise NotImplementedError

    async def get_many(self, numbers: list[int]) -> Sequence[Any]:
        """Return these accounts, in any order."""
        raise NotImplementedError

    async def count(self, status: str) -> int:
        """Return how many accounts have this status."""
        raise NotImplementedError

    async def unit(self, numbers: list[int]) -> Sequence[Any]:
        """Return these accounts, read one by one in a single transaction."""
        raise NotImplementedError

    async def stream(self, take: Callable[[Any], object]) -> None:
        """Give every account to ``take``, in the order of the keys, with a bounded number in memory."""
        raise NotImplementedError

    async def add(self, account: Any) -> object:
        """Insert an account and commit."""
        raise NotImplementedError

    async def update(self, account: Any) -> object:
        """Write all columns of an account and commit."""
        raise NotImplementedError

    async def delete(self, number: int) -> object:
        """Delete an account and commit."""
        raise NotImplementedError

    async def add_many(self, accounts: list[Any]) -> object:
        """Insert accounts in one transaction."""
        raise NotImplementedError

    async def upsert_many(self, accounts: list[Any]) -> object:
        """Insert accounts or overwrite them by key, in one transaction."""
        raise NotImplementedError

    async def update_many(self, accounts: list[Any]) -> object:
        """Write all columns of accounts in one transaction."""
        raise NotImplementedError
