"""The example service with ``REDIS_URL``: users come from the cache, and are never older than what was answered."""

import secrets
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx2
import pytest
import redis

from example_service.app.main import create_app
from example_service.demo import free_port, running_service
from fastapi_building_blocks.infrastructure import RedisCache, SQLAlchemySession
from tests.example_service.test_main import run

USERS = "/api/v1/users/"


@pytest.fixture
async def cache(redis_url: str) -> AsyncIterator[RedisCache]:
    async with RedisCache(redis_url, prefix=secrets.token_hex(8), timeout=2.0) as cache:
        yield cache


@pytest.fixture
async def client(session: SQLAlchemySession, cache: RedisCache) -> AsyncIterator[httpx2.AsyncClient]:
    transport = httpx2.ASGITransport(create_app(session, cache))
    async with httpx2.AsyncClient(transport=transport, base_url="http://service") as client:
        yield client


async def test_c3_a_user_is_read_from_the_cache_and_never_older_than_the_last_answer(
    client: httpx2.AsyncClient, cache: RedisCache, alice: dict[str, Any]
) -> None:
    path = f"{USERS}{alice['id']}"
    for turn in range(20):
        name = f"alice{turn}"
        # With and without If-Match: the second goes by another way through the repository.
        headers = {"If-Match": f'"{turn + 1}"'} if turn % 2 else {}
        changed = await client.patch(path, json={"username": name, "bio": f"{turn}"}, headers=headers)
        assert changed.status_code == 200, changed.text
        for _ in range(2):
            by_id = await client.get(path)
            by_name = await client.get(f"{USERS}by_username/{name}")
            assert by_id.json() == by_name.json() == changed.json()
        former = await client.get(f"{USERS}by_username/alice{turn - 1 if turn else ''}")
        assert former.status_code == 404
        taken = await client.post(USERS, json={"username": name, "email": "other@test.com"})
        assert taken.status_code == 409
    figures = cache.statistics()
    assert figures.hits >= 40
    assert (figures.errors, figures.bypasses) == (0, 0)


@pytest.mark.parametrize("headers", [{}, {"If-Match": '"1"'}], ids=["delete", "delete of a version"])
async def test_c3_a_deleted_user_is_gone_from_the_cache(
    client: httpx2.AsyncClient, cache: RedisCache, alice: dict[str, Any], headers: dict[str, str]
) -> None:
    path, by_name = f"{USERS}{alice['id']}", f"{USERS}by_username/alice"
    for _ in range(2):
        assert (await client.get(path)).status_code == (await client.get(by_name)).status_code == 200
    assert cache.statistics().hits
    assert (await client.delete(path, headers=headers)).status_code == 204
    assert (await client.get(path)).status_code == (await client.get(by_name)).status_code == 404
    again = await client.post(USERS, json={"username": "alice", "email": "alice@test.com"})
    assert again.status_code == 201
    assert (await client.get(by_name)).json() == again.json()


def test_c3_two_processes_with_one_redis_answer_what_the_other_wrote(
    database_url: str, redis_url: str, tmp_path: Path
) -> None:
    with ExitStack() as stack, ThreadPoolExecutor(2) as starting:
        ports = free_port(), free_port()
        services = [running_service(database_url, port, tmp_path / f"{port}.log", redis_url) for port in ports]
        list(starting.map(stack.enter_context, services))
        clients = [stack.enter_context(httpx2.Client(base_url=f"http://127.0.0.1:{port}")) for port in ports]
        body = {"username": "both", "email": "both@test.com"}
        path = clients[0].post(USERS, json=body).headers["Location"]
        for turn in range(40):
            writer, reader = clients[turn % 2], clients[1 - turn % 2]
            assert writer.patch(path, json={"bio": str(turn)}).status_code == 200
            assert reader.get(path).json()["bio"] == str(turn)
            assert reader.get(f"{USERS}by_username/both").json()["bio"] == str(turn)
        with redis.Redis.from_url(redis_url) as server:
            kept = list(server.scan_iter("user-management:users*"))
            assert len(kept) == 3, "the user, where its name leads, and the table's generation"
            server.delete(*kept)


def test_a_redis_url_that_is_none_is_a_wrong_setting(tmp_path: Path) -> None:
    done = run(DATABASE_URL=f"sqlite+aiosqlite:///{tmp_path}/x.db", REDIS_URL="http://user:hunter2@host/")
    assert done.returncode == 2
    assert "the settings are wrong: " in done.stderr
    assert "redis" in done.stderr
    assert "Traceback" not in done.stderr
    assert "hunter2" not in done.stdout + done.stderr
