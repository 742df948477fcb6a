"""Real servers for tests: where they are found, and a private database on one of them.

The order for every server is a URL in the environment, a container, a server on its default local port, and otherwise
a reason that names what to install. A URL in the environment that does not work is an error, never a fallback.
"""

import asyncio
import os
import secrets
import socket
import sqlite3
import warnings
from abc import ABC, abstractmethod
from collections.abc import Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar

import asyncpg
import docker
import pymysql
import pytest
import redis
from sqlalchemy import URL, Connection, create_engine, make_url

T = TypeVar("T")

CONNECT_SECONDS = 5
PROBE_SECONDS = 1
REDIS_CLAIM_SECONDS = 6 * 3600


class Server(NamedTuple):
    """A server that lets tests create databases; ``found`` says how it was reached."""

    url: str
    found: str


class Missing(NamedTuple):
    """No server, and why."""

    reason: str


class Backend(ABC):
    """What is particular to one kind of server."""

    name: ClassVar[str]
    label: ClassVar[str]
    variable: ClassVar[str]
    drivername: ClassVar[str]
    default_url: ClassVar[str | None]
    install: ClassVar[str]

    @abstractmethod
    def version(self, server: URL) -> str:
        """Connect and return product and version; raise whatever the driver raises."""

    @abstractmethod
    def create(self, server: URL, name: str) -> URL:
        """Create an empty database that nobody else uses."""

    @abstractmethod
    def drop(self, server: URL, database: URL) -> None:
        """Remove it, whoever is still connected."""

    def container(self) -> Any:
        """Return a testcontainers container, not started, or None where there is none for this backend."""
        return None

    def container_url(self, container: Any) -> str:
        return container.get_connection_url()


class PostgreSQL(Backend):
    name = "postgres"
    label = "PostgreSQL"
    variable = "POSTGRES_URL"
    drivername = "postgresql+asyncpg"
    default_url = "postgresql+asyncpg://postgres@127.0.0.1:5432/test"
    install = "`apt install postgresql`"

    def version(self, server: URL) -> str:
        return f"PostgreSQL {self._fetch(server, 'SHOW server_version').split()[0]}"

    def create(self, server: URL, name: str) -> URL:
        # template0 alone may be copied in an encoding that differs from the cluster's.
        self._fetch(server, f"CREATE DATABASE {name} TEMPLATE template0 ENCODING 'UTF8'")
        return server.set(database=name)

    def drop(self, server: URL, database: URL) -> None:
        self._fetch(server, f"DROP DATABASE IF EXISTS {database.database} WITH (FORCE)")

    def container(self) -> Any:
        from testcontainers.community.postgres import PostgresContainer

        return PostgresContainer("postgres:16-alpine", driver="asyncpg")

    def _fetch(self, server: URL, sql: str) -> Any:
        async def fetch() -> Any:
            dsn = server.set(drivername="postgresql").render_as_string(hide_password=False)
            connection = await asyncpg.connect(dsn, timeout=CONNECT_SECONDS)
            try:
                return await connection.fetchval(sql)
            finally:
                await connection.close()

        return run_apart(fetch())


class MySQL(Backend):
    name = "mysql"
    label = "MySQL or MariaDB"
    variable = "MYSQL_URL"
    drivername = "mysql+aiomysql"
    default_url = "mysql+aiomysql://root@127.0.0.1:3306/test"
    install = "`apt install mariadb-server`"

    def version(self, server: URL) -> str:
        number, _, rest = self._rows(server, "SELECT version()")[0][0].partition("-")
        return f"{'MariaDB' if 'MariaDB' in rest else 'MySQL'} {number}"

    def create(self, server: URL, name: str) -> URL:
        self._rows(server, f"CREATE DATABASE {name} CHARACTER SET utf8mb4")
        return server.set(database=name)

    def drop(self, server: URL, database: URL) -> None:
        # DROP DATABASE would wait for the metadata locks of transactions that a failed test left open.
        left_open = self._rows(server, "SELECT id FROM information_schema.processlist WHERE db = %s", database.database)
        for (connection,) in left_open:
            self._rows(server, f"KILL {connection}", ignore=pymysql.err.OperationalError)  # gone meanwhile
        self._rows(server, f"DROP DATABASE IF EXISTS {database.database}")

    def container(self) -> Any:
        from testcontainers.community.mysql import MySqlContainer

        # MySQL rather than MariaDB: it has no RETURNING, which is the path that a local MariaDB hides.
        return MySqlContainer("mysql:8.4", dialect="aiomysql", username="root", password=secrets.token_hex(8))

    def _rows(
        self, server: URL, sql: str, *parameters: Any, ignore: type[Exception] | tuple[()] = ()
    ) -> tuple[Any, ...]:
        connection = pymysql.connect(
            host=server.host or "127.0.0.1",
            port=server.port or 3306,
            user=server.username,
            password=server.password or "",
            unix_socket=server.query.get("unix_socket"),
            connect_timeout=CONNECT_SECONDS,
            init_command="SET lock_wait_timeout = 10",
        )
        with connection, connection.cursor() as cursor:
            try:
                cursor.execute(sql, parameters)
            except ignore:
                return ()
            return cursor.fetchall()


class Redis(Backend):
    """A numbered database of the server, claimed by a key in the database that the server's URL names."""

    name = "redis"
    label = "Redis"
    variable = "REDIS_URL"
    drivername = "redis"
    default_url = "redis://127.0.0.1:6379/0"
    install = "`apt install redis-server`"

    def version(self, server: URL) -> str:
        with self._client(server) as client:
            return f"Redis {client.info('server')['redis_version']}"

    def create(self, server: URL, name: str) -> URL:
        with self._client(server) as client:
            for number in range(15, 0, -1):
                claim = self._claim(number)
                # The claim ends by itself, so that a killed run does not hold a database for ever.
                if not client.set(claim, name, nx=True, ex=REDIS_CLAIM_SECONDS):
                    continue
                database = server.set(database=str(number))
                with self._client(database) as numbered:
                    if number != int(server.database or 0) and numbered.dbsize() == 0:
                        return database
                client.delete(claim)
        message = "all numbered databases 1 to 15 are in use"
        raise RuntimeError(message)

    def drop(self, server: URL, database: URL) -> None:
        with self._client(database) as client:
            client.flushdb()
        with self._client(server) as client:
            client.delete(self._claim(database.database))

    def container(self) -> Any:
        from testcontainers.community.redis import RedisContainer

        return RedisContainer("redis:7-alpine")

    def container_url(self, container: Any) -> str:
        return f"redis://{container.get_container_host_ip()}:{container.get_exposed_port(6379)}/0"

    @staticmethod
    def _claim(number: int | str | None) -> str:
        return f"fastapi-building-blocks:tests:database:{number}"

    @staticmethod
    def _client(url: URL) -> Any:
        address = url.render_as_string(hide_password=False)
        return redis.Redis.from_url(address, socket_connect_timeout=CONNECT_SECONDS, socket_timeout=CONNECT_SECONDS)


class SQLServer(Backend):
    """From a URL only: there is no free server that starts on any machine."""

    name = "mssql"
    label = "SQL Server"
    variable = "MSSQL_URL"
    drivername = "mssql+aioodbc"
    default_url = None
    install = "unixODBC and Microsoft's ODBC driver here, and a server elsewhere"

    def version(self, server: URL) -> str:
        with self._connection(server) as connection:
            number = connection.exec_driver_sql("SELECT SERVERPROPERTY('ProductVersion')").scalar_one()
            return f"SQL Server {number}"

    def create(self, server: URL, name: str) -> URL:
        with self._connection(server) as connection:
            connection.exec_driver_sql(f"CREATE DATABASE {name}")
        return server.set(database=name)

    def drop(self, server: URL, database: URL) -> None:
        with self._connection(server) as connection:
            connection.exec_driver_sql(f"ALTER DATABASE {database.database} SET SINGLE_USER WITH ROLLBACK IMMEDIATE")
            connection.exec_driver_sql(f"DROP DATABASE {database.database}")

    @staticmethod
    @contextmanager
    def _connection(server: URL) -> Iterator[Connection]:
        engine = create_engine(server.set(drivername="mssql+pyodbc"), isolation_level="AUTOCOMMIT")
        try:
            with engine.connect() as connection:
                yield connection
        finally:
            engine.dispose()


SERVERS: dict[str, Backend] = {backend.name: backend for backend in (PostgreSQL(), MySQL(), Redis(), SQLServer())}
NAMES = ("sqlite", *SERVERS)


class Backends:
    """The backends of one pytest process: servers found, databases given out, and what to say about them at the end."""

    def __init__(self, required: frozenset[str], found: dict[str, Server | Missing] | None = None) -> None:
        self._required = required
        self._found = dict(found or {})
        self._containers = ExitStack()
        self.ran: dict[str, str] = {"sqlite": f"SQLite {sqlite3.sqlite_version}, always here"}
        self.skipped: dict[str, str] = {}

    def server(self, name: str) -> Server | Missing:
        """Return where this backend runs; the first call may start a container."""
        if name not in self._found:
            self._found[name] = self._find(SERVERS[name])
        return self._found[name]

    @contextmanager
    def database(self, name: str) -> Iterator[str]:
        """Give the URL of an empty private database, and drop it afterwards, whatever happened.

        Skips the test where the server is missing, and fails it where that server is required.
        """
        server = self.server(name)
        if isinstance(server, Missing):
            self.skipped[name] = server.reason
            if name in self._required:
                pytest.fail(f"REQUIRE_BACKENDS lists {name}: {server.reason}", pytrace=False)
            pytest.skip(server.reason)
        backend, address = SERVERS[name], make_url(server.url)
        if name not in self.ran:
            self.ran[name] = f"{backend.version(address)}, {server.found}"
        worker = os.environ.get("PYTEST_XDIST_WORKER", "main")
        database = backend.create(address, f"fbb_{worker}_{os.getpid()}_{secrets.token_hex(4)}")
        try:
            yield database.render_as_string(hide_password=False)
        finally:
            backend.drop(address, database)

    @contextmanager
    def database_by_driver(self, name: str, sqlite_url: str) -> Iterator[str]:
        """Give the URL of an empty private database: ``sqlite``, ``postgres``, ``mysql``, or ``asyncmy`` on MySQL."""
        if name == "sqlite":
            yield sqlite_url
        elif name == "asyncmy":
            with self.database("mysql") as url:
                yield str_of(make_url(url).set(drivername="mysql+asyncmy"))
        else:
            with self.database(name) as url:
                yield url

    def report(self) -> Iterator[str]:
        """Say for each backend, in a line, whether its tests ran."""
        for name in NAMES:
            if name in self.ran:
                yield f"{name:9} ran      {self.ran[name]}"
            elif name in self.skipped:
                yield f"{name:9} {'MISSING' if name in self._required else 'skipped'}  {self.skipped[name]}"
            else:
                yield f"{name:9} unused   no selected test asked for it"

    def close(self) -> None:
        """Stop the containers that this process started."""
        self._containers.close()

    def _find(self, backend: Backend) -> Server | Missing:
        if given := os.environ.get(backend.variable):
            url = make_url(given)
            plain = "+" not in url.drivername
            return Server(str_of(url.set(drivername=backend.drivername) if plain else url), f"by {backend.variable}")
        if backend.default_url is None:
            return Missing(f"no {backend.label}: set {backend.variable} ({backend.install})")
        notes = []
        if container_engine_answers():
            started = self._start_container(backend)
            if isinstance(started, Server):
                return started
            notes.append(started.reason)
        local = local_server(backend, make_url(backend.default_url))
        if isinstance(local, Server):
            return local
        notes.append(local.reason)
        return Missing(
            f"no {backend.label}: {'; '.join(notes)}. Set {backend.variable}, start a container engine, "
            f"or {backend.install} and start it"
        )

    def _start_container(self, backend: Backend) -> Server | Missing:
        # testcontainers warns about its own internals; under filterwarnings=error that would end the run.
        with warnings.catch_warnings(action="ignore"):
            try:
                container = backend.container()
                self._containers.enter_context(container)
                return Server(backend.container_url(container), f"in a container of {container.image}")
            except Exception as error:  # noqa: BLE001 - an image that cannot be pulled has many faces, none fatal
                return Missing(f"its container did not start ({type(error).__name__})")


def local_server(backend: Backend, url: URL) -> Server | Missing:
    """Look for a server on its default port that lets us in."""
    place = f"{url.host}:{url.port}"
    try:
        with closing(socket.create_connection((url.host, url.port), PROBE_SECONDS)):
            pass
    except OSError:
        return Missing(f"nothing listens on {place}")
    try:
        backend.version(url)
    except Exception as error:  # noqa: BLE001 - each driver has its own tree, and something else may own the port
        return Missing(f"what listens on {place} does not let us in as {url} ({error})")
    return Server(str_of(url), f"on {place}")


@cache
def container_engine_answers() -> bool:
    """Say quickly whether a Docker or Podman socket is alive."""
    address = os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock")
    if address.startswith("unix://") and not Path(address.removeprefix("unix://")).is_socket():
        return False
    try:
        with closing(docker.from_env(timeout=PROBE_SECONDS)) as client:
            return bool(client.ping())
    except (docker.errors.DockerException, OSError):
        return False


def required_backends() -> frozenset[str]:
    """Read ``REQUIRE_BACKENDS``: names whose absence is a failure."""
    names = frozenset(filter(None, (name.strip() for name in os.environ.get("REQUIRE_BACKENDS", "").split(","))))
    if unknown := names.difference(NAMES):
        message = f"REQUIRE_BACKENDS: unknown {', '.join(sorted(unknown))}; known are {', '.join(NAMES)}"
        raise pytest.UsageError(message)
    return names


_APART = ThreadPoolExecutor(4, thread_name_prefix="apart")


def run_apart(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end in another thread.

    A fixture may be set up inside a running loop, and must not disturb the loop that pytest-asyncio prepared. The threads
    stay: asyncpg leaks a list of free rows with each one that ends.
    """
    return _APART.submit(asyncio.run, coroutine).result()


def str_of(url: URL) -> str:
    """Return the URL with its password, which ``str`` hides."""
    return url.render_as_string(hide_password=False)
