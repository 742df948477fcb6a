"""This library: a repository with derived mappers, and one with mappers written by hand."""

from collections.abc import Callable, Sequence
from typing import Any

from sqlalchemy import make_url

from fastapi_building_blocks.domain import PageRequest, Sort, field
from fastapi_building_blocks.infrastructure import SQLAlchemyRepository, SQLAlchemySession, UnitOfWork

from .accounts import PAGE_SIZE, Account, table
from .contestants import POOL_SIZE, Contestant


class AccountRepository(SQLAlchemyRepository[Account]):
    """Accounts, mapped by what the library derives."""

    table = table


class HandMappedAccountRepository(SQLAlchemyRepository[Account]):
    """Accounts, mapped by hand."""

    table = table

    def _row_to_entity(self, row: Any) -> Account:
        return Account(
            id=row.id,
            public_id=row.public_id,
            email=row.email,
            name=row.name,
            status=row.status,
            balance=row.balance,
            is_active=row.is_active,
            note=row.note,
            login_count=row.login_count,
            created_at=row.created_at,
        )

    def _entity_to_dict(self, account: Account) -> dict[str, Any]:
        return {
            "id": account.id,
            "public_id": account.public_id,
            "email": account.email,
            "name": account.name,
            "status": account.status,
            "balance": account.balance,
            "is_active": account.is_active,
            "note": account.note,
            "login_count": account.login_count,
            "created_at": account.created_at,
        }


class Ours(Contestant):
    """The repository as it comes."""

    name = "ours"
    repository: type[SQLAlchemyRepository[Account]] = AccountRepository

    async def setup(self, url: str) -> None:
        self._session = SQLAlchemySession(url, pool_size=POOL_SIZE, max_overflow=0)
        await self._session.connect()

    async def teardown(self) -> None:
        await self._session.disconnect()

    async def get(self, number: int) -> Account | None:
        return await self.repository(self._session).get_by_id(number)

    async def page(self, status: str) -> Sequence[Account]:
        page = await self.repository(self._session).paginate(
            PageRequest(limit=PAGE_SIZE, count="none"),
            field("status") == status,
            sort=[Sort("created_at", descending=True)],
        )
        return page.items

    async def get_many(self, numbers: list[int]) -> Sequence[Account]:
        return await self.repository(self._session).get_many(numbers)

    async def count(self, status: str) -> int:
        return await self.repository(self._session).count(field("status") == status)

    async def unit(self, numbers: list[int]) -> Sequence[Account]:
        async with UnitOfWork(self._session) as uow:
            repository = self.repository(uow)
            return [await repository.get(number) for number in numbers]

    async def stream(self, take: Callable[[Account], object]) -> None:
        async for account in self.repository(self._session).stream():
            take(account)

    async def add(self, account: Account) -> Account:
        return await self.repository(self._session).add(account)

    async def update(self, account: Account) -> Account:
        return await self.repository(self._session).update(account)

    async def delete(self, number: int) -> bool:
        return await self.repository(self._session).delete(number)

    async def add_many(self, accounts: list[Account]) -> int:
        return await self.repository(self._session).add_many(accounts)

    async def upsert_many(self, accounts: list[Account]) -> int:
        return await self.repository(self._session).upsert_many(accounts)

    async def update_many(self, accounts: list[Account]) -> int:
        return await self.repository(self._session).update_many(accounts)


class OursHandMapped(Ours):
    """The repository with both mappers overridden."""

    name = "ours, mapped by hand"
    repository = HandMappedAccountRepository


class OursOnAsyncmy(Ours):
    """The repository on the faster of MySQL's drivers."""

    name = "ours on asyncmy"

    async def setup(self, url: str) -> None:
        await super().setup(make_url(url).set(drivername="mysql+asyncmy").render_as_string(hide_password=False))
