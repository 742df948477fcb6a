"""W1 to W3: of writers that race for one key or one version, each is answered, and one wins where one can."""

import asyncio
import dataclasses
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import httpx2
import pytest
import sqlalchemy as sa

from example_service.app.infrastructure.repositories.user_repository import UserRepository
from example_service.app.main import MIGRATIONS, create_app
from fastapi_building_blocks.domain import DuplicateKeyError, StaleVersionError
from fastapi_building_blocks.infrastructure import (
    SQLAlchemyRepository,
    SQLAlchemySession,
    UnitOfWork,
    version_column,
)
from fastapi_building_blocks.infrastructure.database.migrations import upgrade
from tests.api.serving import serving
from tests.backends import Backends, run_apart
from tests.faults.databases import name_of, on_every_driver
from tests.guarantees.ledger import Account, Accounts, opened

USERS = "/api/v1/users/"
PATHS = [
    "sqlite",
    "sqlite portable",
    "postgres",
    "postgres portable",
    "mysql",
    "mysql portable",
    "mysql without RETURNING",
    "asyncmy",
]


@dataclasses.dataclass
class Place:
    """Where writers meet."""

    session: SQLAlchemySession
    name: str


@pytest.fixture(params=PATHS)
async def place(request: pytest.FixtureRequest, backends: Backends, sqlite_url: str) -> AsyncIterator[Place]:
    """An empty table on each database, by each path; MySQL has no RETURNING, so MariaDB is told that it has none."""
    driver, _, how = request.param.partition(" ")
    with backends.database_by_driver(driver, sqlite_url) as url:
        async with opened(url, portable=how == "portable", pool_timeout=60) as session:
            session.dialect.insert_returning &= how != "without RETURNING"
            # Or the first would be done before the others have a connection.
            await asyncio.gather(*[Accounts(session).count() for _ in range(40)])
            yield Place(session, f"{name_of(url)}{how and f', {how}'}")


# W1


async def test_w1_80_upserts_and_80_get_or_adds_of_one_key_all_answer_and_leave_one_row(
    place: Place, effort: Callable[[int, int], int], shown: Callable[..., None]
) -> None:
    rounds, repository = effort(1, 10), Accounts(place.session)
    errors: Counter[str] = Counter()
    answers = rows = created = 0

    async def race(*calls: Any) -> list[Any]:
        nonlocal answers, rows
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        failures = [one for one in outcomes if isinstance(one, BaseException)]
        errors.update(type(one).__name__ for one in failures)
        answers += len(outcomes) - len(failures)
        rows += await repository.count()
        return [one for one in outcomes if not isinstance(one, BaseException)]

    for _ in range(rounds):
        for on in (None, ["number"]):
            found = await race(*[repository.upsert(Account(1, "A1", number), on=on) for number in range(80)])
            assert [one.balance for one in found] == list(range(80)), f"each answers what it wrote; {errors}"
            [stored] = await repository.get_all()
            assert stored in found
            await repository.delete_where(everything=True)
        found = await race(*[repository.get_or_add(Account(n, "same", n), on=["number"]) for n in range(80)])
        created += sum(is_new for _, is_new in found)
        assert len({one.id for one, _ in found}) == 1
        await repository.delete_where(everything=True)
    shown(
        "W1",
        f"80 upserts at once, 80 get_or_adds at once: {place.name}",
        races=rounds * 3,
        answers=answers,
        errors=dict(errors) or 0,
        rows_per_race=rows / (rounds * 3),
    )
    assert not errors
    assert answers == 80 * rounds * 3
    assert rows == rounds * 3
    assert created == rounds


async def test_w1_get_or_add_races_within_units_whose_snapshot_is_older(
    place: Place, effort: Callable[[int, int], int]
) -> None:
    async def step(unit: UnitOfWork, number: int) -> tuple[Account, bool]:
        await Accounts(unit).count()  # the snapshot is older than what another one adds
        return await Accounts(unit).get_or_add(Account(number, "same", number), on=["number"])

    for _ in range(effort(1, 10)):
        answers = await asyncio.gather(
            *[place.session.run(lambda unit, number=number: step(unit, number), attempts=30) for number in range(20)]
        )
        assert sum(created for _, created in answers) == 1
        assert await Accounts(place.session).count() == 1
        await Accounts(place.session).delete_where(everything=True)


# W2


async def test_w2_of_50_racing_adds_one_wins_and_49_are_told_the_field(
    place: Place, effort: Callable[[int, int], int]
) -> None:
    repository = Accounts(place.session)
    for _ in range(effort(1, 10)):
        outcomes = await asyncio.gather(
            *[repository.add(Account(number, "same")) for number in range(50)], return_exceptions=True
        )
        errors = [one for one in outcomes if isinstance(one, BaseException)]
        assert len(errors) == 49
        assert {(type(one), getattr(one, "fields", ())) for one in errors} == {(DuplicateKeyError, ("number",))}
        await repository.delete_where(everything=True)


@pytest.fixture(scope="module", params=["sqlite", "postgres", "mysql"])
def migrated_url(
    request: pytest.FixtureRequest, backends: Backends, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """A database with the example service's tables, for this module."""
    file = f"sqlite+aiosqlite:///{tmp_path_factory.mktemp('service') / 'service.db'}"
    with backends.database_by_driver(request.param, file) as url:
        run_apart(upgrade(url, MIGRATIONS))
        yield url


@pytest.fixture
async def users(migrated_url: str) -> AsyncIterator[UserRepository]:
    async with SQLAlchemySession(migrated_url, pool_timeout=60) as session:
        users = UserRepository(session)
        await users.delete_where(everything=True)
        yield users


@pytest.fixture
async def client(users: UserRepository, migrated_url: str) -> AsyncIterator[httpx2.AsyncClient]:
    """Requests to the example service on a real server, up to 50 at once."""
    limits = httpx2.Limits(max_connections=50)
    session = SQLAlchemySession(migrated_url, pool_timeout=60)
    async with serving(create_app(session)) as url, httpx2.AsyncClient(base_url=url, limits=limits, timeout=60) as one:
        yield one


async def test_w2_of_50_racing_posts_of_one_e_mail_one_is_201_and_49_are_409_that_name_the_field(
    client: httpx2.AsyncClient,
    users: UserRepository,
    migrated_url: str,
    effort: Callable[[int, int], int],
    shown: Callable[..., None],
) -> None:
    rounds, statuses = effort(1, 10), Counter[int]()
    problems: Counter[str] = Counter()
    rows = 0
    for number in range(rounds):
        answers = await asyncio.gather(
            *[
                client.post(USERS, json={"email": f"race{number}@test.com", "username": f"user{number}x{racer}"})
                for racer in range(50)
            ]
        )
        statuses.update(answer.status_code for answer in answers)
        for answer in answers:
            if answer.status_code != 201:
                body = answer.json()
                problems[f"{body['code']} of {[error['field'] for error in body.get('errors', [])]}"] += 1
        rows += await users.count()
        await users.delete_where(everything=True)
    shown(
        "W2",
        f"50 POSTs of one e-mail at once: {name_of(migrated_url)}",
        races=rounds,
        answers_201=statuses[201],
        answers_409=statuses[409],
        answers_5xx=sum(count for status, count in statuses.items() if status >= 500),
        rows=rows,
    )
    assert statuses == {201: rounds, 409: 49 * rounds}
    assert problems == {"duplicate_key of ['email']": 49 * rounds}
    assert rows == rounds


# W3

versioned_metadata = sa.MetaData()


@dataclasses.dataclass
class Document:
    id: int
    words: int = 0
    version: int | None = None


class Documents(SQLAlchemyRepository[Document]):
    table = sa.Table(
        "w3_documents",
        versioned_metadata,
        sa.Column("id", sa.Integer(), primary_key=True, autoincrement=False),
        sa.Column("words", sa.Integer(), nullable=False),
        version_column(),
    )
    version_column = "version"


@on_every_driver
async def test_w3_of_two_writers_from_one_version_one_wins_and_one_is_told(
    database_url: str, effort: Callable[[int, int], int], shown: Callable[..., None]
) -> None:
    rounds, outcomes = effort(10, 500), Counter[str]()
    async with opened(database_url, pool_size=4, max_overflow=0) as session:
        await session.create_tables(versioned_metadata)
        await Documents(session).add(Document(1))

        async def by_update(seen: Document) -> None:
            await Documents(session).update(dataclasses.replace(seen, words=seen.words + 1))

        async def by_patch(seen: Document) -> None:
            await Documents(session).patch(1, {"words": seen.words + 1}, version=seen.version)

        async def in_a_unit(seen: Document) -> None:
            # Two that both wait for the other's row lock are a deadlock, and replayed as a whole.
            async def work(unit: UnitOfWork) -> None:
                await Documents(unit).update(dataclasses.replace(seen, words=seen.words + 1))

            await session.run(work, attempts=10)

        ways = (by_update, by_patch, in_a_unit)
        for number in range(rounds):
            seen = await Documents(session).get(1)
            answers = await asyncio.gather(ways[number % 3](seen), ways[number // 3 % 3](seen), return_exceptions=True)
            outcomes.update("won" if answer is None else type(answer).__name__ for answer in answers)
        document = await Documents(session).get(1)
    shown(
        "W3",
        f"two writers from one version: {name_of(database_url)}",
        rounds=rounds,
        won=outcomes["won"],
        told_stale=outcomes[StaleVersionError.__name__],
        updates_lost=outcomes["won"] - document.words,
    )
    assert outcomes == {"won": rounds, StaleVersionError.__name__: rounds}
    assert document == Document(1, rounds, rounds + 1)


async def test_w3_over_http_one_of_the_writers_under_one_etag_wins_and_the_others_are_412(
    client: httpx2.AsyncClient,
    migrated_url: str,
    effort: Callable[[int, int], int],
    shown: Callable[..., None],
) -> None:
    rounds, statuses = effort(2, 20), Counter[int]()
    created = await client.post(USERS, json={"email": "alice@test.com", "username": "alice"})
    path, etag = f"{USERS}{created.json()['id']}", created.headers["etag"]
    for number in range(rounds):
        answers = await asyncio.gather(
            *[
                client.patch(path, json={"bio": f"{number} by {writer}"}, headers={"If-Match": etag})
                for writer in range(10)
            ]
        )
        statuses.update(answer.status_code for answer in answers)
        [winner] = [answer for answer in answers if answer.status_code == 200]
        assert {answer.json()["code"] for answer in answers if answer is not winner} == {"stale_version"}
        current = await client.get(path)
        assert current.json() == winner.json()
        etag = current.headers["etag"]
        assert etag == winner.headers["etag"] == f'"{number + 2}"'
    shown(
        "W3",
        f"ten PATCHes under one ETag at once: {name_of(migrated_url)}",
        rounds=rounds,
        answers_200=statuses[200],
        answers_412=statuses[412],
    )
    assert statuses == {200: rounds, 412: 9 * rounds}
