"""The fixtures that the other tests stand on: databases are real, private and gone afterwards."""

import asyncio
from collections.abc import Iterator
from contextlib import AsyncExitStack, suppress

import pytest
import redis
from sqlalchemy import make_url, text
from sqlalchemy.ext.asyncio import create_async_engine

from tests import backends as backends_module
from tests.backends import SERVERS, Backends, Missing, Server, container_engine_answers, required_backends


async def answer(url: str, sql: str) -> object:
    """Run one statement on a connection of its own and return its first value."""
    engine = create_async_engine(url)
    try:
        async with engine.begin() as connection:
            result = await connection.execute(text(sql))
            return result.scalar() if result.returns_rows else None
    finally:
        await engine.dispose()


async def test_a_database_url_names_an_empty_database(database_url: str):
    # Two tests would collide on this name if they shared a database; the second run is the next test.
    await answer(database_url, "CREATE TABLE letters (letter VARCHAR(10))")
    await answer(database_url, "INSERT INTO letters VALUES ('🦆')")
    assert await answer(database_url, "SELECT letter FROM letters") == "🦆"


async def test_a_database_url_is_not_shared_between_tests(database_url: str):
    await answer(database_url, "CREATE TABLE letters (letter VARCHAR(10))")


@pytest.mark.parametrize("database_url", ["postgres"], indirect=True)
def test_one_database_can_be_asked_for(database_url: str):
    assert make_url(database_url).drivername == "postgresql+asyncpg"


async def test_postgres_url_is_utf8(postgres_url: str):
    assert await answer(postgres_url, "SHOW server_encoding") == "UTF8"


async def test_mysql_url_is_utf8mb4(mysql_url: str):
    assert await answer(mysql_url, "SELECT @@character_set_database") == "utf8mb4"


async def test_mssql_url_is_the_database_that_was_created(mssql_url: str):
    assert await answer(mssql_url, "SELECT DB_NAME()") == make_url(mssql_url).database


def test_a_redis_database_is_empty_and_nobody_elses(backends: Backends):
    with backends.database("redis") as one, backends.database("redis") as another:
        assert another != one
        with redis.Redis.from_url(one) as client:
            client.set("key", "value")
        with redis.Redis.from_url(another) as client:
            assert client.dbsize() == 0


@pytest.mark.parametrize("name", ["postgres", "mysql"])
async def test_a_database_is_dropped_although_the_test_failed_inside_a_transaction(name: str, backends: Backends):
    async with AsyncExitStack() as left_open:
        with suppress(ZeroDivisionError), backends.database(name) as url:
            engine = create_async_engine(url)
            left_open.push_async_callback(engine.dispose)
            connection = await engine.connect()
            # The server will have hung up on it.
            left_open.push_async_callback(connection.invalidate)
            await connection.execute(text("CREATE TABLE letters (letter VARCHAR(10))"))
            await connection.execute(text("SELECT * FROM letters"))
            raise ZeroDivisionError
    database = make_url(url).database
    catalog = {
        "postgres": "SELECT count(*) FROM pg_database WHERE datname = ",
        "mysql": "SELECT count(*) FROM information_schema.schemata WHERE schema_name = ",
    }[name]
    with backends.database(name) as neighbour:
        assert await answer(neighbour, f"{catalog} '{database}'") == 0


class TestFinding:
    @pytest.fixture(autouse=True)
    def nothing_given(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        monkeypatch.delenv("POSTGRES_URL", raising=False)
        monkeypatch.setenv("DOCKER_HOST", "unix:///nowhere/docker.sock")
        container_engine_answers.cache_clear()
        yield
        container_engine_answers.cache_clear()

    def test_a_url_in_the_environment_comes_first_and_gets_its_driver(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv("POSTGRES_URL", "postgresql://me:secret@db.example/test")
        assert Backends(frozenset()).server("postgres") == Server(
            "postgresql+asyncpg://me:secret@db.example/test", "by POSTGRES_URL"
        )

    def test_a_container_comes_before_a_local_server(self, monkeypatch: pytest.MonkeyPatch):
        class Container:
            image = "postgres:16-alpine"
            stopped = False

            def __enter__(self) -> "Container":
                return self

            def __exit__(self, *_: object) -> None:
                self.stopped = True

            def get_connection_url(self) -> str:
                return "postgresql+asyncpg://test:test@127.0.0.1:49153/test"

        container = Container()
        monkeypatch.setattr(backends_module, "container_engine_answers", lambda: True)
        monkeypatch.setattr(SERVERS["postgres"], "container", lambda: container)
        backends = Backends(frozenset())
        assert backends.server("postgres").found == "in a container of postgres:16-alpine"
        backends.close()
        assert container.stopped

    def test_a_missing_server_skips_with_what_to_install(self, monkeypatch: pytest.MonkeyPatch):
        backends = self.without_servers(monkeypatch)
        with pytest.raises(pytest.skip.Exception, match=r"POSTGRES_URL.*apt install postgresql"):
            backends.database("postgres").__enter__()
        assert [line for line in backends.report() if line.startswith("postgres  skipped")]

    def test_a_missing_server_fails_where_it_is_required(self, monkeypatch: pytest.MonkeyPatch):
        backends = self.without_servers(monkeypatch, required=frozenset({"postgres"}))
        with pytest.raises(pytest.fail.Exception, match="REQUIRE_BACKENDS lists postgres"):
            backends.database("postgres").__enter__()
        assert [line for line in backends.report() if line.startswith("postgres  MISSING")]

    def test_a_stranger_on_the_port_is_not_taken_for_the_server(
        self, monkeypatch: pytest.MonkeyPatch, unused_tcp_port: int
    ):
        async def speak_nonsense(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"220 smtp.example ESMTP\r\n")
            writer.close()

        async def look() -> Server | Missing:
            async with await asyncio.start_server(speak_nonsense, "127.0.0.1", unused_tcp_port):
                url = f"postgresql+asyncpg://postgres@127.0.0.1:{unused_tcp_port}/test"
                monkeypatch.setattr(type(SERVERS["postgres"]), "default_url", url)
                return await asyncio.to_thread(Backends(frozenset()).server, "postgres")

        found = asyncio.run(look())
        assert isinstance(found, Missing)
        assert "does not let us in" in found.reason

    def without_servers(self, monkeypatch: pytest.MonkeyPatch, required: frozenset[str] = frozenset()) -> Backends:
        monkeypatch.setattr(type(SERVERS["postgres"]), "default_url", "postgresql+asyncpg://postgres@127.0.0.1:1/test")
        return Backends(required)


def test_required_backends_are_known_names(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("REQUIRE_BACKENDS", " postgres, mysql,")
    assert required_backends() == {"postgres", "mysql"}
    monkeypatch.setenv("REQUIRE_BACKENDS", "postgresql")
    with pytest.raises(pytest.UsageError, match="unknown postgresql; known are sqlite, postgres"):
        required_backends()
