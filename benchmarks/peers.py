"""advanced-alchemy, FastCRUD and SQLModel, used as their documentation shows: a session and a commit per call."""

from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from decimal import Decimal
from typing import Any
from uuid import UUID

import sqlalchemy as sa
from advanced_alchemy.base import CommonTableAttributes
from advanced_alchemy.filters import LimitOffset
from advanced_alchemy.repository import SQLAlchemyAsyncRepository
from fastcrud import FastCRUD
from pydantic import BaseModel
from sqlalchemy.ext.asyncio import AsyncSession as PlainAsyncSession
from sqlalchemy.ext.asyncio import async_sessionmaker
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlmodel import Field, SQLModel, col, func, select
from sqlmodel.ext.asyncio.session import AsyncSession

from .accounts import DECIMAL_TYPE, PAGE_SIZE, TIMESTAMP_TYPE, UUID_TYPE, Account
from .contestants import Contestant
from .core import make_engine


class AlchemyBase(CommonTableAttributes, DeclarativeBase):
    """advanced-alchemy's models."""


class AlchemyAccount(AlchemyBase):
    __tablename__ = "accounts"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    public_id: Mapped[UUID] = mapped_column(UUID_TYPE)
    email: Mapped[str] = mapped_column(sa.String(255))
    name: Mapped[str] = mapped_column(sa.String(100))
    status: Mapped[str] = mapped_column(sa.String(16))
    balance: Mapped[Decimal] = mapped_column(DECIMAL_TYPE)
    is_active: Mapped[bool]
    note: Mapped[str | None] = mapped_column(sa.Text)
    login_count: Mapped[int]
    created_at: Mapped[datetime] = mapped_column(TIMESTAMP_TYPE)


class AlchemyRepository(SQLAlchemyAsyncRepository[AlchemyAccount]):
    model_type = AlchemyAccount


class AdvancedAlchemy(Contestant):
    """advanced-alchemy's asynchronous repository."""

    name = "advanced-alchemy"

    async def setup(self, url: str) -> None:
        self._engine = make_engine(url)
        self._sessions = async_sessionmaker(self._engine, expire_on_commit=False)

    async def teardown(self) -> None:
        await self._engine.dispose()

    def native(self, account: Account) -> AlchemyAccount:
        return AlchemyAccount(**asdict(account))

    async def get(self, number: int) -> AlchemyAccount:
        async with self._sessions() as session:
            return await AlchemyRepository(session=session).get(number)

    async def page(self, status: str) -> Sequence[AlchemyAccount]:
        async with self._sessions() as session:
            return await AlchemyRepository(session=session).get_many(
                AlchemyAccount.status == status,
                LimitOffset(PAGE_SIZE, 0),
                order_by=[("created_at", True), ("id", True)],
            )

    async def get_many(self, numbers: list[int]) -> Sequence[AlchemyAccount]:
        async with self._sessions() as session:
            return await AlchemyRepository(session=session).get_many(AlchemyAccount.id.in_(numbers))

    async def count(self, status: str) -> int:
        async with self._sessions() as session:
            return await AlchemyRepository(session=session).count(AlchemyAccount.status == status)

    async def add(self, account: AlchemyAccount) -> AlchemyAccount:
        async with self._sessions() as session:
            return await AlchemyRepository(session=session).add(account, auto_commit=True)

    async def update(self, account: AlchemyAccount) -> AlchemyAccount:
        async with self._sessions() as session:
            return await AlchemyRepository(session=session).update(account, auto_commit=True)

    async def delete(self, number: int) -> AlchemyAccount:
        async with self._sessions() as session:
            return await AlchemyRepository(session=session).delete(number, auto_commit=True)

    async def add_many(self, accounts: list[AlchemyAccount]) -> object:
        async with self._sessions() as session:
            return await AlchemyRepository(session=session).add_many(accounts, auto_commit=True)

    async def upsert_many(self, accounts: list[AlchemyAccount]) -> object:
        async with self._sessions() as session:
            return await AlchemyRepository(session=session).upsert_many(accounts, auto_commit=True)

    async def update_many(self, accounts: list[AlchemyAccount]) -> object:
        async with self._sessions() as session:
            return await AlchemyRepository(session=session).update_many(accounts, auto_commit=True)


class CrudBase(DeclarativeBase):
    """FastCRUD's models."""


class CrudAccount(CrudBase):
    __tablename__ = "accounts"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    public_id: Mapped[UUID] = mapped_column(UUID_TYPE)
    email: Mapped[str] = mapped_column(sa.String(255))
    name: Mapped[str] = mapped_column(sa.String(100))
    status: Mapped[str] = mapped_column(sa.String(16))
    balance: Mapped[Decimal] = mapped_column(DECIMAL_TYPE)
    is_active: Mapped[bool]
    note: Mapped[str | None] = mapped_column(sa.Text)
    login_count: Mapped[int]
    created_at: Mapped[datetime] = mapped_column(TIMESTAMP_TYPE)


class AccountSchema(BaseModel):
    id: int
    public_id: UUID
    email: str
    name: str
    status: str
    balance: Decimal
    is_active: bool
    note: str | None
    login_count: int
    created_at: datetime


class FastCrud(Contestant):
    """FastCRUD's methods; it answers dictionaries."""

    name = "FastCRUD"

    async def setup(self, url: str) -> None:
        self._engine = make_engine(url)
        self._sessions = async_sessionmaker(self._engine, class_=PlainAsyncSession, expire_on_commit=False)
        self._crud: Any = FastCRUD(CrudAccount)

    async def teardown(self) -> None:
        await self._engine.dispose()

    def native(self, account: Account) -> AccountSchema:
        return AccountSchema(**asdict(account))

    async def get(self, number: int) -> object:
        async with self._sessions() as session:
            return await self._crud.get(session, id=number)

    async def page(self, status: str) -> Sequence[object]:
        async with self._sessions() as session:
            found = await self._crud.get_multi(
                session,
                limit=PAGE_SIZE,
                sort_columns=["created_at", "id"],
                sort_orders=["desc", "desc"],
                return_total_count=False,
                status=status,
            )
        return found["data"]  # type: ignore[no-any-return]

    async def get_many(self, numbers: list[int]) -> Sequence[object]:
        async with self._sessions() as session:
            found = await self._crud.get_multi(session, limit=len(numbers), return_total_count=False, id__in=numbers)
        return found["data"]  # type: ignore[no-any-return]

    async def count(self, status: str) -> int:
        async with self._sessions() as session:
            return int(await self._crud.count(session, status=status))

    async def add(self, account: AccountSchema) -> object:
        async with self._sessions() as session:
            return await self._crud.create(session, account)

    async def update(self, account: AccountSchema) -> object:
        async with self._sessions() as session:
            return await self._crud.update(session, account, id=account.id)

    async def delete(self, number: int) -> object:
        async with self._sessions() as session:
            return await self._crud.delete(session, id=number)

    async def upsert_many(self, accounts: list[AccountSchema]) -> object:
        async with self._sessions() as session:
            return await self._crud.upsert_multi(session, accounts, commit=True)


class SqlModelAccount(SQLModel, table=True):
    __tablename__ = "accounts"

    id: int = Field(sa_column=sa.Column(sa.Integer, primary_key=True, autoincrement=False))
    public_id: UUID = Field(sa_type=UUID_TYPE)
    email: str = Field(max_length=255)
    name: str = Field(max_length=100)
    status: str = Field(max_length=16)
    balance: Decimal = Field(sa_type=DECIMAL_TYPE)
    is_active: bool
    note: str | None = Field(sa_type=sa.Text)
    login_count: int
    created_at: datetime = Field(sa_type=TIMESTAMP_TYPE)


class SqlModel(Contestant):
    """SQLModel on its asynchronous session."""

    name = "SQLModel"

    async def setup(self, url: str) -> None:
        self._engine = make_engine(url)

    async def teardown(self) -> None:
        await self._engine.dispose()

    def _session(self) -> AsyncSession:
        return AsyncSession(self._engine, expire_on_commit=False)

    def native(self, account: Account) -> SqlModelAccount:
        return SqlModelAccount(**asdict(account))

    async def get(self, number: int) -> SqlModelAccount | None:
        async with self._session() as session:
            return await session.get(SqlModelAccount, number)

    async def page(self, status: str) -> Sequence[SqlModelAccount]:
        query = (
            select(SqlModelAccount)
            .where(SqlModelAccount.status == status)
            .order_by(col(SqlModelAccount.created_at).desc(), col(SqlModelAccount.id).desc())
            .limit(PAGE_SIZE)
        )
        async with self._session() as session:
            return (await session.exec(query)).all()

    async def get_many(self, numbers: list[int]) -> Sequence[SqlModelAccount]:
        query = select(SqlModelAccount).where(col(SqlModelAccount.id).in_(numbers))
        async with self._session() as session:
            return (await session.exec(query)).all()

    async def count(self, status: str) -> int:
        query = select(func.count()).select_from(SqlModelAccount).where(SqlModelAccount.status == status)
        async with self._session() as session:
            return (await session.exec(query)).one()

    async def add(self, account: SqlModelAccount) -> SqlModelAccount:
        async with self._session() as session:
            session.add(account)
            await session.commit()
            await session.refresh(account)
        return account

    async def update(self, account: SqlModelAccount) -> SqlModelAccount | None:
        async with self._session() as session:
            stored = await session.get(SqlModelAccount, account.id)
            if stored is None:
                return None
            stored.sqlmodel_update(account.model_dump())
            session.add(stored)
            await session.commit()
            await session.refresh(stored)
        return stored

    async def delete(self, number: int) -> bool:
        async with self._session() as session:
            stored = await session.get(SqlModelAccount, number)
            if stored is None:
                return False
            await session.delete(stored)
            await session.commit()
        return True

    async def add_many(self, accounts: list[SqlModelAccount]) -> None:
        async with self._session() as session:
            session.add_all(accounts)
            await session.commit()
