"""T5: of transfers that clash, each acknowledged one is in the books once, and money is neither made nor lost."""

import asyncio
import dataclasses
import itertools
import random
from collections import Counter
from collections.abc import Callable

import sqlalchemy as sa

from fastapi_building_blocks.domain import TransientError
from fastapi_building_blocks.infrastructure import SQLAlchemyRepository, UnitOfWork
from fastapi_building_blocks.testing import assert_connections_sound
from tests.faults.databases import name_of, on_every_driver
from tests.guarantees.ledger import Accounts, account, opened

TELLERS = 32
ACCOUNTS = 10

books_metadata = sa.MetaData()


@dataclasses.dataclass
class Entry:
    transfer: int
    source: int
    target: int
    amount: int
    id: int | None = None


class Books(SQLAlchemyRepository[Entry]):
    """What was transferred; nothing but the program keeps a transfer from being entered twice."""

    table = sa.Table(
        "t5_books",
        books_metadata,
        sa.Column("id", sa.Integer(), primary_key=True),
        sa.Column("transfer", sa.Integer(), nullable=False),
        sa.Column("source", sa.Integer(), nullable=False),
        sa.Column("target", sa.Integer(), nullable=False),
        sa.Column("amount", sa.Integer(), nullable=False),
    )


@on_every_driver
async def test_t5_transfers_of_32_tasks_between_10_accounts_keep_the_total_and_the_books(
    database_url: str, effort: Callable[[int, int], int], shown: Callable[..., None]
) -> None:
    chance, transfers = random.Random(7), effort(32, 1600)
    acknowledged: set[int] = set()
    attempts = given_up = 0
    async with opened(database_url, pool_size=8, max_overflow=8, pool_timeout=60) as session:
        await session.create_tables(books_metadata)
        await Accounts(session).add_many([account(number, 100) for number in range(ACCOUNTS)])

        async def transfer(number: int) -> None:
            source, target = chance.sample(range(ACCOUNTS), 2)
            amount = chance.randint(1, 50)

            async def work(unit: UnitOfWork) -> int:
                nonlocal attempts
                attempts += 1
                giver, taker = await Accounts(unit).get(source), await Accounts(unit).get(target)
                await Accounts(unit).patch(source, {"balance": giver.balance - amount})
                await Accounts(unit).patch(target, {"balance": taker.balance + amount})
                await Books(unit).add(Entry(number, source, target, amount))
                return number

            acknowledged.add(await session.run(work, attempts=100, isolation="SERIALIZABLE"))

        numbers = itertools.count()

        async def teller() -> None:
            nonlocal given_up
            while (number := next(numbers)) < transfers:
                try:
                    await transfer(number)
                except TransientError:
                    given_up += 1

        await asyncio.gather(*[teller() for _ in range(TELLERS)])
        balances = {one.id: one.balance for one in await Accounts(session).get_all()}
        entries = await Books(session).get_all()
        await assert_connections_sound(session)
    entered = Counter(entry.transfer for entry in entries)
    shown(
        "T5",
        f"{TELLERS} tasks, {ACCOUNTS} accounts, SERIALIZABLE: {name_of(database_url)}",
        transfers=len(acknowledged),
        replays=attempts - transfers,
        given_up=given_up,
        entered_twice=sum(count > 1 for count in entered.values()),
        lost=len(acknowledged - entered.keys()),
        total_off_by=sum(balances.values()) - ACCOUNTS * 100,
    )
    assert sum(balances.values()) == ACCOUNTS * 100
    assert entered == Counter(acknowledged), "each acknowledged transfer once, and no other"
    expected = dict.fromkeys(range(ACCOUNTS), 100)
    for entry in entries:
        expected[entry.source] -= entry.amount
        expected[entry.target] += entry.amount
    assert balances == expected
    assert given_up == 0
    if "sqlite" not in database_url:  # which takes one writer at a time
        assert attempts > transfers, "they clashed"
