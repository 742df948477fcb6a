"""What a session promises from its URL on: readable refusals, bounded waits, no secret anywhere."""

import asyncio
import builtins
import gc
import logging
import re
import socket
import threading
import traceback
from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import make_url
from sqlalchemy.ext.asyncio import AsyncEngine

from fastapi_building_blocks.domain import (
    BuildingBlocksError,
    ConnectionLostError,
    ConstraintError,
    DuplicateKeyError,
    field,
)
from fastapi_building_blocks.domain.query import Operator
from fastapi_building_blocks.infrastructure import DatabaseSettings, InMemorySession, PoolStatus, SQLAlchemySession
from fastapi_building_blocks.infrastructure.database import sqlalchemy_session
from fastapi_building_blocks.infrastructure.persistence.repositories.in_memory_query import InMemoryQuery
from tests import server_view
from tests.guarantees.ledger import Account, Accounts, account, accounts, opened
from tests.server_view import until

SECRET = "s3cr3t-p@ss/w:rd"
QUOTED = "s3cr3t-p%40ss%2Fw%3Ard"
portable_too = pytest.mark.parametrize("portable", [False, True], ids=["driver", "portable"])


def everything_said(error: BaseException | None) -> str:
    """Return all that a log or a report could show of an error and of what it came from."""
    said = []
    while error is not None:
        said += [*traceback.format_exception_only(error), repr(error), repr(error.args)]
        error = error.__cause__ or error.__context__
    return "\n".join(said)


def no_secret_in(text: str) -> bool:
    return not any(part in text for part in (SECRET, QUOTED, "s3cr3t", "ss/w:rd", "w:rd"))


# URLs


@pytest.mark.parametrize(
    "url",
    [
        "",
        "nonsense",
        "postgres://u:p@h/d",
        "nosuchdatabase+driver://h/d",
        "postgresql+nosuchdriver://h/d",
        f"postgresql+asyncpg://user:{QUOTED}@host:port/name",
        f"nosuchdatabase+driver://user:{QUOTED}@host/name",
        f"user:{SECRET}@host",
    ],
)
async def test_a_url_that_is_none_says_what_one_looks_like_and_repeats_no_secret(url: str) -> None:
    with pytest.raises(ValueError, match=r"postgresql\+asyncpg://user:password@host:5432/name") as caught:
        SQLAlchemySession(url)
    assert no_secret_in(everything_said(caught.value))


@pytest.mark.parametrize("rest", ["@127.0.0.1/db", "@127.0.0.1:5432/db", "/more@127.0.0.1/db"])
async def test_a_password_that_is_not_percent_encoded_is_refused_and_not_repeated(rest: str) -> None:
    with pytest.raises(ValueError, match="percent-encode the user and password in the URL") as caught:
        SQLAlchemySession(f"postgresql+asyncpg://u:top@{SECRET}{rest}")
    assert no_secret_in(everything_said(caught.value))


@pytest.mark.parametrize("scheme", ["postgresql+asyncpg", "mysql+aiomysql", "mariadb+aiomysql", "mysql+asyncmy"])
async def test_a_url_of_a_server_without_a_database_is_refused(scheme: str) -> None:
    for url in (f"{scheme}://root:{QUOTED}@127.0.0.1", f"{scheme}://root:{QUOTED}@127.0.0.1/"):
        with pytest.raises(ValueError, match="names no database") as caught:
            SQLAlchemySession(url)
        assert no_secret_in(everything_said(caught.value))


@pytest.mark.parametrize(
    ("url", "write"),
    [
        ("postgresql://h/d", "postgresql+asyncpg://"),
        ("postgresql+psycopg2://h/d", "postgresql+asyncpg://"),
        ("mysql+pymysql://h/d", "mysql+aiomysql://"),
        ("mariadb+pymysql://h/d", "mariadb+aiomysql://"),
        ("sqlite:///file.db", "sqlite+aiosqlite://"),
        ("mssql+pyodbc://h/d", "mssql+aioodbc://"),
    ],
)
async def test_a_synchronous_driver_is_refused_with_what_to_write_instead(url: str, write: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"write {write}")):
        SQLAlchemySession(url)


@pytest.mark.parametrize(
    ("url", "module", "extra"),
    [
        ("postgresql+asyncpg://h/d", "asyncpg", "postgres"),
        ("mysql+aiomysql://h/d", "aiomysql", "mysql"),
        ("mysql+asyncmy://h/d", "asyncmy", "asyncmy"),
        ("sqlite+aiosqlite:///x.db", "aiosqlite", "sqlite"),
        ("mssql+aioodbc://h/d?driver=x", "aioodbc", "mssql"),
    ],
)
async def test_a_missing_driver_names_the_extra_to_install(
    url: str, module: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(name: str, *arguments: Any, **named: Any) -> Any:
        if name.partition(".")[0] == module:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *arguments, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ModuleNotFoundError) as caught:
        SQLAlchemySession(url)
    assert f"pip install 'fastapi-building-blocks[{extra}]'" in str(caught.value)
    assert caught.value.name == module


@pytest.mark.parametrize(
    "knobs",
    [
        {"pool_size": 0}, {"max_overflow": -1}, {"connect_attempts": 0}, {"pool_timeout": 0},
        {"connect_timeout": -1.0}, {"statement_timeout": float("inf")}, {"pool_timeout": float("nan")},
    ],
)  # fmt: skip
async def test_a_knob_that_makes_no_sense_is_refused(knobs: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"at least 1|seconds"):
        SQLAlchemySession("sqlite+aiosqlite://", **knobs)


# Servers that are not there


@pytest.fixture
def nobody() -> Iterator[int]:
    """A port that nobody listens on."""
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        yield reserved.getsockname()[1]


@pytest.fixture
def silence() -> Iterator[int]:
    """A port where connections are accepted, and nothing is ever said."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(50)
        yield listening.getsockname()[1]


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlalchemy_session, "_CONNECT_FIRST_DELAY", 0.01)


@pytest.mark.parametrize("scheme", ["postgresql+asyncpg", "mysql+aiomysql", "mysql+asyncmy"])
async def test_an_unreachable_server_is_named_in_time_and_the_password_is_not(
    scheme: str, nobody: int, soon: None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    session = SQLAlchemySession(f"{scheme}://someone:{QUOTED}@127.0.0.1:{nobody}/name", connect_attempts=3)
    async with asyncio.timeout(10):
        with pytest.raises(ConnectionLostError, match="attempt 3") as caught:
            await session.connect()
    assert "127.0.0.1" in str(caught.value)
    assert str(nobody) in str(caught.value)
    assert caplog.text.count("does not answer") == 2
    assert no_secret_in(everything_said(caught.value) + caplog.text + repr(session) + str(session))
    assert session.pool_status() == PoolStatus(5, 0, 0, 0)
    with pytest.raises(RuntimeError, match=r"connect\(\)"):
        await session.ping()


@pytest.mark.parametrize("scheme", ["postgresql+asyncpg", "mysql+aiomysql"])
async def test_a_server_that_never_answers_is_given_up_in_time(scheme: str, silence: int, soon: None) -> None:
    session = SQLAlchemySession(f"{scheme}://u:p@127.0.0.1:{silence}/name", connect_attempts=2, connect_timeout=0.2)
    async with asyncio.timeout(5):
        with pytest.raises(ConnectionLostError, match="no answer in time"):
            await session.connect()
    await session.disconnect()


async def test_an_unknown_host_is_named(soon: None) -> None:
    session = SQLAlchemySession("postgresql+asyncpg://u:p@no-such-host.invalid/name", connect_attempts=1)
    with pytest.raises(ConnectionLostError, match=r"no-such-host\.invalid"):
        await session.connect()


@pytest.mark.parametrize("database_url", ["postgres", "mysql"], indirect=True)
@pytest.mark.parametrize("wrong", [{"database": "no_such_database"}, {"username": "nobody_known", "password": SECRET}])
async def test_a_wrong_database_or_password_is_said_at_once(database_url: str, wrong: dict[str, str]) -> None:
    session = SQLAlchemySession(make_url(database_url).set(**wrong), connect_attempts=5)
    with pytest.raises(ConnectionLostError, match="attempt 1") as caught:
        await session.connect()
    assert no_secret_in(everything_said(caught.value))
    assert "127.0.0.1" in str(caught.value)
    said = r"the database does not exist \((3D000|1049)\)" if "database" in wrong else r"the login was refused \(\w+\)"
    assert re.search(said, str(caught.value))


async def test_a_url_without_a_port_is_named_with_the_databases_own() -> None:
    for scheme, port in (("postgresql+asyncpg", 5432), ("mysql+aiomysql", 3306)):
        session = SQLAlchemySession(f"{scheme}://u:p@no-such-host.invalid/name", connect_attempts=1)
        with pytest.raises(ConnectionLostError, match=rf"at no-such-host\.invalid:{port}: "):
            await session.connect()


@pytest.mark.parametrize("database_url", ["postgres"], indirect=True)
async def test_a_server_that_refuses_further_connections_is_unavailable(database_url: str) -> None:
    name = make_url(database_url).database
    async with opened(database_url) as session:
        server_view._postgres(database_url, f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
        async with session.transaction() as unit:
            await Accounts(unit).count()
            with pytest.raises(ConnectionLostError, match="refused a connection"):
                await session.ping()
            with pytest.raises(ConnectionLostError, match="refused a connection"):
                async with session.transaction() as other:
                    await Accounts(other).count()
        server_view._postgres(database_url, f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
        await session.ping()


async def test_a_file_that_cannot_be_opened_is_named_at_once(tmp_path: Any, soon: None) -> None:
    session = SQLAlchemySession(f"sqlite+aiosqlite:///{tmp_path}/no/such/folder/file.db", connect_attempts=5)
    with pytest.raises(
        ConnectionLostError, match=r"no/such/folder/file\.db: the file cannot be opened .*\(attempt 1\)"
    ):
        await session.connect()
    await until(lambda: not any("_connection_worker" in thread.name for thread in threading.enumerate()))


async def test_connecting_waits_for_a_server_that_starts_late(
    postgres_url: str, soon: None, caplog: pytest.LogCaptureFixture
) -> None:
    place = make_url(postgres_url)
    with socket.create_server(("127.0.0.1", 0)) as reserved:
        port = reserved.getsockname()[1]
    session = SQLAlchemySession(place.set(host="127.0.0.1", port=port), connect_attempts=12)
    connecting = asyncio.create_task(session.connect())
    await until(lambda: "attempt 2 of 12" in caplog.text)
    proxy = await asyncio.start_server(_forward_to(place.host, place.port), "127.0.0.1", port)
    await connecting
    await session.ping()
    await session.disconnect()
    proxy.close()


def _forward_to(host: Any, port: Any) -> Any:
    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)
        writer.close()

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection(host, port)
        await asyncio.gather(pump(reader, back), pump(there, writer))

    return forward


# Lifecycle


async def test_an_unopened_or_disconnected_session_says_what_to_call(sqlite_url: str) -> None:
    session = SQLAlchemySession(sqlite_url)
    repository = Accounts(session)

    async def transact() -> None:
        async with session.transaction():
            pass

    async def stream() -> None:
        async for _ in session.stream(sa.text("SELECT 1")):
            pass

    async def use_engine() -> None:
        async with session.engine.connect():
            pass

    calls: list[Any] = [
        session.ping, repository.count, transact, stream, use_engine, lambda: session.execute(sa.text("SELECT 1")),
        lambda: session.run(lambda unit: None), lambda: repository.add_many([account(1)]),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(RuntimeError, match=r"await session\.connect\(\) first"):
            await call()
    assert not session.is_connected
    async with session:
        assert session.is_connected
        await session.ping()
    for call in calls:
        with pytest.raises(RuntimeError, match=r"await session\.connect\(\) first"):
            await call()


@portable_too
async def test_a_session_says_that_it_is_connected_in_another_event_loop(database_url: str, portable: bool) -> None:
    async def in_another(session: SQLAlchemySession) -> None:
        async def use_the_engine() -> None:
            async with session.engine.connect():
                pass

        for use in (lambda: session.execute(sa.text("SELECT 1")), session.ping, session.connect, use_the_engine):
            with pytest.raises(RuntimeError, match="connected in another event loop"):
                await use()

    async with SQLAlchemySession(database_url, portable=portable) as session:
        await asyncio.to_thread(asyncio.run, in_another(session))
        assert (await session.execute(sa.text("SELECT 1"))).scalar() == 1


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # drivers', of what is left behind
def test_a_session_left_behind_by_one_event_loop_serves_the_next_after_disconnect(database_url: str) -> None:
    session = SQLAlchemySession(database_url)

    async def use() -> None:
        await session.connect()
        assert (await session.execute(sa.text("SELECT 1"))).scalar() == 1

    async def use_again() -> None:
        with pytest.raises(RuntimeError, match="connected in another event loop"):
            await session.connect()
        await session.disconnect()
        await use()
        await session.disconnect()

    asyncio.run(use())
    asyncio.run(use_again())
    assert session.pool_status().checked_out == 0
    gc.collect()  # so that they warn here


async def test_the_representation_has_the_place_and_not_the_password() -> None:
    session = SQLAlchemySession(f"postgresql+asyncpg://user:{QUOTED}@host:5432/name")
    assert repr(session) == "SQLAlchemySession('postgresql+asyncpg://user:***@host:5432/name')"
    assert no_secret_in(repr(session.engine) + repr(session._pool) + repr(session.__dict__))


@pytest.mark.parametrize(
    "url", ["postgresql+asyncpg://h/db?user=u&password=hush", "mysql+aiomysql://h/d?password=hush"]
)
async def test_nor_has_it_a_password_of_the_urls_query(url: str) -> None:
    assert "hush" not in repr(SQLAlchemySession(url))


async def test_a_stream_reads_and_refuses_what_does_not(database_url: str) -> None:
    table = sa.Table("streamed", sa.MetaData(), sa.Column("id", sa.Integer(), primary_key=True))
    async with SQLAlchemySession(database_url) as session:
        await session.create_tables(table.metadata)
        await session.execute(table.insert().values(id=1))
        for statement in (table.delete(), "SELECT 1"):
            with pytest.raises(TypeError):
                async for _ in session.stream(statement):
                    pass
        assert [row.id async for row in session.stream(sa.select(table))] == [1]


async def test_settings_make_a_session() -> None:
    settings = DatabaseSettings(url="sqlite+aiosqlite://", pool_size=3, max_overflow=2, _env_file=None)
    session = SQLAlchemySession.from_settings(settings)
    assert session.dialect_name == "sqlite"
    assert isinstance(session.engine, AsyncEngine)
    assert session.pool_status() == PoolStatus(1, 0, 0, 0), "one connection to :memory:"
    default = SQLAlchemySession("postgresql+asyncpg://h/d")
    assert default._pool.size() == 5
    assert default._pool.limit == 15


async def test_the_dialect_name_is_the_databases(database_url: str) -> None:
    async with SQLAlchemySession(database_url) as session:
        assert session.dialect_name == make_url(database_url).get_backend_name()
        await session.connect()  # again is harmless
        await session.ping()


async def test_a_repository_may_be_made_before_the_session_is_connected(database_url: str) -> None:
    session = SQLAlchemySession(database_url)
    repository = Accounts(session)
    async with session:
        await session.create_tables(accounts.metadata)
        await session.create_tables(accounts.metadata)  # what exists is left alone
        assert await repository.add(account(1)) == account(1)
        assert await Accounts(session).get(1) == account(1)


async def test_a_search_without_regard_to_case_answers_as_in_memory(database_url: str) -> None:
    """Character by character: neither the end of a word nor a character that Python makes two of changes anything."""
    async with opened(database_url) as session:
        for stored, part, found in [
            ("ΟΔΟΣ", "οδοσ", True), ("οδος", "ΟΔΟΣ", False), ("ΟΔΟΣ", "ς", False), ("ÀÉ", "àé", True),
            ("İstanbul", "istanbul", True), ("istanbul", "İ", True), ("straße", "SS", False),
        ]:  # fmt: skip
            operand = session.dialect.text_operand(Operator.ICONTAINS, part)
            text = sa.cast(sa.literal(stored), sa.String(50))
            clause = session.dialect.text_search(Operator.ICONTAINS, text, sa.literal(operand))
            assert bool((await session.execute(sa.select(clause))).scalar()) is found, (stored, part)
            in_memory = InMemoryQuery({"text": sa.Column("text", sa.String(50))}).test([field("text").icontains(part)])
            assert in_memory((stored,)) is found, (stored, part)


async def test_a_repository_on_another_kind_of_session_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="SQLAlchemySession, not on InMemorySession"):
        Accounts(InMemorySession())


# Any Core statement


@portable_too
async def test_execute_answers_a_fully_fetched_result(database_url: str, portable: bool) -> None:
    async with opened(database_url, portable=portable, pool_size=1, max_overflow=0) as session:
        await session.execute(sa.insert(accounts), {"id": 1, "number": "A1", "balance": 5})
        await session.execute(
            sa.insert(accounts), [{"id": number, "number": f"A{number}", "balance": 0} for number in range(2, 50)]
        )
        result = await session.execute(sa.select(accounts.c.id, accounts.c.balance).order_by(accounts.c.id))
        assert session.pool_status().idle == 1
        first = result.first()
        assert (first.id, first._mapping["balance"]) == (1, 5)
        changed = await session.execute(sa.update(accounts).values(balance=1).where(accounts.c.id < 11))
        assert changed.rowcount == 10
        total = await session.execute(sa.text("SELECT sum(balance) FROM accounts WHERE id < :id"), {"id": 11})
        assert total.scalar_one() == 10
        with pytest.raises(DuplicateKeyError):
            await session.execute(
                sa.insert(accounts), [{"id": number, "number": f"B{number}", "balance": 0} for number in (60, 61, 1)]
            )
        assert await Accounts(session).count() == 49, "all rows or none"
        with pytest.raises(BuildingBlocksError) as caught:
            await session.execute(sa.text("SELECT nothing FROM nowhere"))
        assert "nowhere" not in caught.value.detail
        with pytest.raises(ConstraintError):
            await session.execute(sa.insert(accounts), {"id": 99, "number": "A99", "balance": -2_000_000})
        assert session.pool_status() == PoolStatus(1, 0, 1, 0)


@portable_too
async def test_stream_answers_rows_and_may_be_left_early(database_url: str, portable: bool) -> None:
    async with opened(database_url, portable=portable, pool_size=1, max_overflow=0) as session:
        await Accounts(session).add_many([account(number) for number in range(3000)])
        query = sa.select(accounts.c.id).where(accounts.c.id >= sa.bindparam("least")).order_by(accounts.c.id)
        rows = [row.id async for row in session.stream(query, {"least": 5})]
        assert rows == list(range(5, 3000))
        for open_stream in (lambda: session.stream(query, {"least": 0}), lambda: Accounts(session).stream(sort="id")):
            stream = open_stream()
            assert (await anext(stream)).id == 0
            assert session.pool_status().checked_out == 1
            await stream.aclose()
            async with asyncio.timeout(5):
                while session.pool_status().checked_out:
                    await asyncio.sleep(0.01)
            await session.ping()
        async with session.transaction() as unit:
            await Accounts(unit).add(account(5000))
            assert len([row async for row in unit.stream(query, {"least": 0})]) == 3001
        with pytest.raises(BuildingBlocksError):
            [row async for row in session.stream(sa.text("SELECT nothing FROM nowhere"))]
        assert await Accounts(session).count() == 3001


async def test_asyncmy_works_by_its_url(mysql_url: str) -> None:
    async with opened(str_of(make_url(mysql_url).set(drivername="mysql+asyncmy"))) as session:
        repository = Accounts(session)
        try:
            assert await repository.add(account(1)) == account(1)
            assert await repository.add_many([account(number) for number in range(2, 500)]) == 498
            assert await repository.upsert(account(1, 9)) == account(1, 9)
            with pytest.raises(DuplicateKeyError) as caught:
                await repository.add(Account(1000, "A2"))
            assert caught.value.fields == ("number",)
            async with session.transaction(isolation="SERIALIZABLE") as unit:
                assert len([one async for one in Accounts(unit).stream(batch_size=50)]) == 499
        finally:
            async with session.engine.begin() as connection:
                await connection.run_sync(accounts.metadata.drop_all)


def str_of(url: sa.URL) -> str:
    return url.render_as_string(hide_password=False)
