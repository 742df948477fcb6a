"""Checking passwords: the same work for everybody, and never on the event loop."""

import asyncio
import threading

import bcrypt
import pytest

from example_service.app.application import verify_credentials as module
from example_service.app.application.verify_credentials import verify_credentials
from example_service.app.domain.user import User, UserStatus

HASH = "$2b$04$gJ1LKmoBk0XPn6ugMQnv0ORXvqUzPlwqufvQendciXwBpX4KnaWS2"  # of "secret", at the lowest cost


class OneUser:
    """A lookup that knows at most one user."""

    def __init__(self, **fields: object) -> None:
        self.user = User(email="alice@test.com", username="alice", **fields) if fields else None

    async def get_by_username(self, username: str) -> User | None:
        return self.user if self.user and username == self.user.username else None


@pytest.fixture
def checks(monkeypatch) -> list[tuple[bytes, bytes, int]]:
    """Every bcrypt check: password, hash, and the thread it ran in."""
    seen = []
    check = bcrypt.checkpw

    def watched(password: bytes, hashed: bytes) -> bool:
        seen.append((password, hashed, threading.get_ident()))
        return check(password, hashed)

    monkeypatch.setattr(module.bcrypt, "checkpw", watched)
    return seen


def work(checks: list[tuple[bytes, bytes, int]]) -> int:
    """In bcrypt's rounds."""
    return sum(2 ** int(hashed[4:6]) for _, hashed, _ in checks)


async def test_the_right_password_answers_the_user(checks):
    users = OneUser(hashed_password=HASH)
    assert await verify_credentials(users, "alice", "secret") is users.user
    assert await verify_credentials(users, "alice", "Secret") is None
    assert [hashed for _, hashed, _ in checks].count(HASH.encode()) == 2


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"hashed_password": None},
        {"hashed_password": ""},
        {"hashed_password": "x" * 60},
        {"hashed_password": "ä" * 60},
        {"hashed_password": HASH[:-1]},
        {"hashed_password": HASH + "x"},
        {"hashed_password": HASH[:28] + "A" + HASH[29:]},
        {"hashed_password": "$2b$31$" + HASH[7:]},
        {"hashed_password": "$2b$03$" + HASH[7:]},
        {"hashed_password": "$argon2id$v=19$m=65536,t=3,p=4$" + "a" * 60},
    ],
    ids=["unknown", "none", "empty", "no hash", "not ASCII", "short", "long", "salt", "cost 31", "cost 3", "argon2"],
)
async def test_without_a_usable_hash_it_takes_as_long_as_a_wrong_password(checks, fields):
    assert await verify_credentials(OneUser(**fields), "alice", "secret") is None
    ((password, hashed, _),) = checks
    assert password == b"secret"
    assert hashed[4:6] == b"12"  # what bcrypt.gensalt() gives


@pytest.mark.parametrize("status", [UserStatus.INACTIVE, UserStatus.SUSPENDED])
async def test_who_may_not_sign_in_takes_as_long_as_a_wrong_password(checks, status):
    assert await verify_credentials(OneUser(hashed_password=HASH, status=status), "alice", "secret") is None
    assert work(checks) == 2**12


@pytest.mark.parametrize("cost", [4, 8, 11, 12])
async def test_a_check_does_the_same_work_for_every_cost_up_to_the_usual_one(checks, cost):
    users = OneUser(hashed_password=bcrypt.hashpw(b"secret", bcrypt.gensalt(cost)).decode())
    for password, expected in (("secret", users.user), ("guess", None), ("", None), ("x" * 73, None)):
        checks.clear()
        assert await verify_credentials(users, "alice", password) is expected
        assert work(checks) == 2**12


@pytest.mark.parametrize("password", ["x" * 72, "é" * 36, "🔑" * 18], ids=len)
async def test_a_password_that_is_longer_than_bcrypt_reads_is_never_right(password):
    users = OneUser(hashed_password=bcrypt.hashpw(password.encode(), bcrypt.gensalt(4)).decode())
    assert await verify_credentials(users, "alice", password) is users.user
    assert await verify_credentials(users, "alice", "y" + password[1:]) is None
    for more in ("x", "é", "🔑" * 100):
        assert await verify_credentials(users, "alice", password + more) is None


async def test_the_loop_goes_on_while_a_password_is_checked(monkeypatch):
    loop, began, goes_on = asyncio.get_running_loop(), asyncio.Event(), threading.Event()

    def slow(_password: bytes, _hashed: bytes) -> bool:
        loop.call_soon_threadsafe(began.set)
        return goes_on.wait(10)

    monkeypatch.setattr(module.bcrypt, "checkpw", slow)
    checking = asyncio.create_task(verify_credentials(OneUser(hashed_password=HASH), "alice", "secret"))
    await began.wait()
    goes_on.set()  # only a loop that is not blocked gets here
    assert await checking is not None
