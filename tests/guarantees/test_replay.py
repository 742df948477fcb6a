"""T5: ``run`` replays the whole unit after a clash, a bounded number of times, and nothing after any other error."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from fastapi_building_blocks.domain import DeadlockError, DuplicateKeyError, field
from fastapi_building_blocks.infrastructure import UnitOfWork
from tests.guarantees.ledger import Accounts, account, opened

on_servers = pytest.mark.parametrize("database_url", ["postgres", "mysql"], indirect=True)


@on_servers
async def test_t5_a_withdrawal_that_another_one_made_impossible_is_seen_by_the_replay(database_url: str) -> None:
    """Write skew: each checks the sum of two accounts and draws on one of them."""
    async with opened(database_url) as session:
        await Accounts(session).add_many([account(1, balance=50), account(2, balance=50)])
        tried = 0
        both_have_read = asyncio.Barrier(2)

        def withdraw(number: int) -> Callable[[UnitOfWork], Awaitable[bool]]:
            async def work(unit: UnitOfWork) -> bool:
                nonlocal tried
                tried += 1
                both = await Accounts(unit).get_many([1, 2])
                if tried <= 2:
                    await both_have_read.wait()
                if sum(one.balance for one in both) < 60:
                    return False
                await Accounts(unit).patch(number, {"balance": both[number - 1].balance - 60})
                return True

            return work

        answers = await asyncio.gather(*[session.run(withdraw(number), isolation="SERIALIZABLE") for number in (1, 2)])
        assert sorted(answers) == [False, True]
        assert sum(one.balance for one in await Accounts(session).get_all()) == 40
        assert tried == 3


@on_servers
async def test_t5_of_a_deadlock_one_unit_is_replayed_as_a_whole_and_both_are_kept(database_url: str) -> None:
    async with opened(database_url) as session:
        await Accounts(session).add_many([account(1), account(2)])
        attempts: list[int] = []
        each_holds_one = asyncio.Barrier(2)

        def work(first: int, second: int) -> Callable[[UnitOfWork], Awaitable[None]]:
            async def cross(unit: UnitOfWork) -> None:
                attempts.append(first)
                inside = Accounts(unit)
                await inside.update_where({"owner": f"{first} was here"}, field("id") == first)
                if attempts.count(first) == 1:
                    await each_holds_one.wait()
                found = await inside.get_by_id(second, lock="update")
                assert found is not None
                await inside.patch(second, {"balance": found.balance + first})

            return cross

        await asyncio.gather(session.run(work(1, 2)), session.run(work(2, 1)))
        assert sorted(attempts) in ([1, 1, 2], [1, 2, 2])
        assert [(one.balance, one.owner) for one in await Accounts(session).get_all(sort="id")] == [
            (2, "1 was here"),
            (1, "2 was here"),
        ]


async def test_t5_no_other_error_is_replayed(database_url: str) -> None:
    async with opened(database_url) as session:
        await Accounts(session).add(account(1))
        calls = 0

        async def duplicate(unit: UnitOfWork) -> None:
            nonlocal calls
            calls += 1
            await Accounts(unit).add(account(7))
            await Accounts(unit).add(account(1))

        async def broken(unit: UnitOfWork) -> None:
            nonlocal calls
            calls += 1
            await Accounts(unit).add(account(7))
            raise LookupError

        for work, error in ((duplicate, DuplicateKeyError), (broken, LookupError)):
            calls = 0
            with pytest.raises(error):
                await session.run(work, attempts=5)
            assert calls == 1
        assert await Accounts(session).get_all() == [account(1)]


async def test_t5_attempts_are_bounded_and_the_last_error_is_raised(database_url: str) -> None:
    async with opened(database_url) as session:
        errors: list[DeadlockError] = []

        async def clash(unit: UnitOfWork) -> None:
            await Accounts(unit).add(account(7))
            errors.append(DeadlockError(f"clash {len(errors) + 1}"))
            raise errors[-1]

        with pytest.raises(DeadlockError) as caught:
            await session.run(clash, attempts=4)
        assert len(errors) == 4
        assert caught.value is errors[-1]
        assert await Accounts(session).count() == 0
