"""The service as a command: it says what is wrong, migrates, serves, and ends what it began."""

import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
from sqlalchemy import make_url
from starlette.testclient import TestClient

from example_service.app.core.config import get_database_settings, get_settings
from example_service.app.infrastructure.tables import metadata
from example_service.app.main import create_app
from example_service.demo import running_service, wait_until_ready
from fastapi_building_blocks.infrastructure import SQLAlchemySession
from fastapi_building_blocks.testing.fault_proxy import free_port
from tests.backends import Backends

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "example_service.app.main"]


def run(**environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        COMMAND,
        cwd=ROOT,
        env={**os.environ, "PORT": "0", **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("nonsense", "the database URL is not one that SQLAlchemy knows"),
        ("mongodb://user:hunter2@host/name", "the database URL is not one that SQLAlchemy knows"),
        ("postgresql://user:hunter2@host/name", "asyncpg"),
        ("postgresql+asyncpg://user:top@hunter2@127.0.0.1/name", "percent-encode the user and password in the URL"),
        ("mysql+aiomysql://user:hunter2@127.0.0.1/", "names no database"),
    ],
)
def test_a_wrong_url_is_said_in_a_line(url: str, said: str):
    done = run(DATABASE_URL=url)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert "hunter2" not in done.stdout + done.stderr


@pytest.mark.parametrize("setting", [{"PORT": "many"}, {"DATABASE_POOL_SIZE": "0"}], ids=str)
def test_a_wrong_setting_is_said_by_name(setting: dict[str, str], tmp_path: Path):
    done = run(DATABASE_URL=f"sqlite+aiosqlite:///{tmp_path}/x.db", **setting)
    assert done.returncode == 2
    assert f"the settings are wrong: {next(iter(setting))}: " in done.stderr
    assert "https://" not in done.stderr
    assert "Traceback" not in done.stderr


def test_replicas_without_a_secret_are_a_wrong_setting(tmp_path: Path):
    files = {"DATABASE_URL": "p.db", "DATABASE_REPLICA_URLS": "r.db"}
    done = run(**{name: f"sqlite+aiosqlite:///{tmp_path}/{file}" for name, file in files.items()})
    assert done.returncode == 2
    assert "the settings are wrong: DATABASE_REPLICA_URLS goes with a CONSISTENCY_SECRET" in done.stderr
    assert "Traceback" not in done.stderr


def test_with_replicas_a_client_gets_the_token_of_its_writes(fresh_settings: Path, monkeypatch):
    for name, file in (("DATABASE_URL", "p.db"), ("DATABASE_REPLICA_URLS", "r.db")):
        monkeypatch.setenv(name, f"sqlite+aiosqlite:///{fresh_settings}/{file}")
    monkeypatch.setenv("CONSISTENCY_SECRET", "a secret of some length")
    session = SQLAlchemySession.from_settings(get_database_settings())
    app = create_app(session)
    with TestClient(app) as client:
        client.portal.call(session.create_tables, metadata)
        body = {"email": "a@example.com", "username": "anna", "first_name": "Anna", "last_name": "A"}
        created = client.post("/api/v1/users/", json=body)
        assert created.status_code == 201, created.text
        headers = {"X-Consistency-Token": created.headers["X-Consistency-Token"]}
        found = client.get(created.headers["Location"], headers=headers)
        assert found.json()["username"] == "anna", "the other file has not even the table"


@pytest.mark.parametrize("backend", ["postgres", "mysql"])
def test_a_wrong_password_is_said_in_a_line(backend: str, backends: Backends):
    with backends.database(backend) as url:
        wrong = make_url(url).set(username="nobody_known", password="hunter2")
        done = run(DATABASE_URL=wrong.render_as_string(hide_password=False))
    assert done.returncode == 1
    assert "cannot start: cannot connect to" in done.stderr
    assert "the login was refused" in done.stderr
    assert "Traceback" not in done.stderr
    assert "hunter2" not in done.stdout + done.stderr


def test_the_command_migrates_serves_and_ends_on_sigterm(database_url: str, tmp_path: Path):
    port, log = free_port(), tmp_path / "log"
    with running_service(database_url, port, log) as process:
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/api/v1/users/",
            json.dumps({"email": "alice@test.com", "username": "alice"}).encode(),
            {"Content-Type": "application/json", "X-Request-ID": "the-id-of-this-test"},
        )
        with urllib.request.urlopen(request) as response:
            assert response.status == 201
            assert response.headers["X-Request-ID"] == "the-id-of-this-test"
        process.send_signal(signal.SIGTERM)
        assert process.wait(15) == 0
    logged = log.read_text()
    (line,) = (line for line in logged.splitlines() if "the-id-of-this-test" in line)
    assert re.search(r'INFO +\[the-id-of-this-test\] .*"POST /api/v1/users/ HTTP/1.1" 201', line)
    assert "Traceback" not in logged
    assert "ERROR" not in logged


def test_processes_that_start_at_once_on_an_empty_database_are_all_ready(database_url: str, tmp_path: Path):
    with ExitStack() as services, ThreadPoolExecutor(4) as starting:
        logs = [tmp_path / f"log {number}" for number in range(4)]
        entering = [
            starting.submit(services.enter_context, running_service(database_url, free_port(), log)) for log in logs
        ]
        for entered in entering:
            assert entered.result(120).poll() is None
    for log in logs:
        assert "ERROR" not in log.read_text()


def test_a_database_in_memory_is_migrated_and_served(tmp_path: Path):
    port = free_port()
    with (
        running_service("sqlite+aiosqlite:///:memory:", port, tmp_path / "log"),
        urllib.request.urlopen(f"http://127.0.0.1:{port}/api/v1/users/") as response,
    ):
        assert json.load(response)["items"] == []


def test_what_clients_search_for_is_not_logged(sqlite_url: str, tmp_path: Path):
    port, log = free_port(), tmp_path / "log"
    with (
        running_service(sqlite_url, port, log),
        urllib.request.urlopen(f"http://127.0.0.1:{port}/api/v1/users/?search=alice%40test.com") as response,
    ):
        assert response.status == 200
    assert '"GET /api/v1/users/ HTTP/1.1" 200' in log.read_text()
    assert "alice" not in log.read_text()


def test_a_refused_migration_is_said_without_its_sql(tmp_path: Path):
    file = tmp_path / "taken.db"
    with closing(sqlite3.connect(file)) as connection:
        connection.execute("CREATE TABLE users (id INTEGER)")
    done = run(DATABASE_URL=f"sqlite+aiosqlite:///{file}")
    assert done.returncode == 1
    assert "the database refused the migration: table users already exists" in done.stderr
    assert "CREATE TABLE" not in done.stderr
    assert "Traceback" not in done.stderr


def test_ctrl_c_ends_it_without_a_stack(sqlite_url: str, tmp_path: Path):
    port, log = free_port(), tmp_path / "log"
    # A shell's background job ignores SIGINT, and so would what it starts.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    with running_service(sqlite_url, port, log) as process:
        signal.signal(signal.SIGINT, handler)
        process.send_signal(signal.SIGINT)
        assert process.wait(15) == 130
    assert "Traceback" not in log.read_text()


def test_a_second_start_finds_what_the_first_has_left(sqlite_url: str, tmp_path: Path):
    for _ in range(2):
        port = free_port()
        with running_service(sqlite_url, port, tmp_path / "log") as process:
            wait_until_ready(process, port)
    assert "Traceback" not in (tmp_path / "log").read_text()


# Settings


@pytest.fixture
def fresh_settings(monkeypatch, tmp_path: Path):
    for name in ("DATABASE_URL", "HOST", "PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    get_settings.cache_clear()
    get_database_settings.cache_clear()
    yield tmp_path
    get_settings.cache_clear()
    get_database_settings.cache_clear()


def test_without_settings_it_is_a_file_and_port_8000(fresh_settings: Path):
    assert get_database_settings().url == "sqlite+aiosqlite:///./user_management.db"
    assert (get_settings().host, get_settings().port) == ("127.0.0.1", 8000)


def test_the_environment_wins_over_env_and_that_over_the_defaults(fresh_settings: Path, monkeypatch):
    (fresh_settings / ".env").write_text("HOST=0.0.0.0\nPORT=9000\nDATABASE_URL=sqlite+aiosqlite:///from_env_file\n")
    monkeypatch.setenv("PORT", "9001")
    assert (get_settings().host, get_settings().port) == ("0.0.0.0", 9001)
    assert get_database_settings().url == "sqlite+aiosqlite:///from_env_file"
