"""The demo is the same walk on every database, and notices when the service is wrong."""

import os
import secrets
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
import sqlalchemy as sa

from example_service.demo import Answer, Expectation, Walk, execute, tables_of
from tests.backends import Backends, run_apart

ROOT = Path(__file__).parents[2]


def demo(url: str, transcript: Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "DATABASE_URL"}
    if url:
        environment["DATABASE_URL"] = url
    command = [sys.executable, "-m", "example_service.demo", "--transcript", str(transcript)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.slow
def test_the_transcripts_on_all_databases_are_equal(backends: Backends, tmp_path: Path):
    with ExitStack() as stack:
        urls = {name: stack.enter_context(backends.database(name)) for name in ("postgres", "mysql")} | {"sqlite": ""}
        with ThreadPoolExecutor(2) as executor:
            done = dict(zip(urls, executor.map(lambda name: demo(urls[name], tmp_path / name), urls), strict=True))
        for name, result in done.items():
            assert result.returncode == 0, f"{name}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
            assert "\033[" not in result.stdout  # not a terminal
        for name in ("postgres", "mysql"):
            assert run_apart(tables_of(sa.make_url(urls[name]))) == set()  # the demo had a database of its own
    transcripts = {name: (tmp_path / name).read_text() for name in urls}
    assert len(transcripts["sqlite"].splitlines()) > 500
    assert transcripts["postgres"] == transcripts["sqlite"]
    assert transcripts["mysql"] == transcripts["sqlite"]


@pytest.mark.slow
def test_a_user_who_may_not_create_databases_gets_the_given_one_back_as_it_was(backends: Backends, tmp_path: Path):
    role, password = f"demo_{secrets.token_hex(4)}", secrets.token_hex(8)
    with backends.database("postgres") as url:
        admin = sa.make_url(url)
        run_apart(execute(admin, f"CREATE ROLE {role} LOGIN PASSWORD '{password}'"))
        try:
            run_apart(execute(admin, f"ALTER DATABASE {admin.database} OWNER TO {role}"))
            run_apart(execute(admin, f"GRANT ALL ON SCHEMA public TO {role}"))
            limited = admin.set(username=role, password=password)
            result = demo(limited.render_as_string(hide_password=False), tmp_path / "transcript")
            assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
            assert password not in result.stdout
            assert run_apart(tables_of(limited)) == set()

            run_apart(execute(limited, "CREATE TABLE users (id int)"))
            result = demo(limited.render_as_string(hide_password=False), tmp_path / "transcript")
            assert result.returncode == 2
            assert "may not create a database" in result.stderr
            assert run_apart(tables_of(limited)) == {"users"}
        finally:
            run_apart(execute(admin, f"REASSIGN OWNED BY {role} TO CURRENT_USER"))
            run_apart(execute(admin, f"DROP OWNED BY {role}"))
            run_apart(execute(admin, f"DROP ROLE {role}"))


def test_an_unreachable_server_ends_the_demo_with_a_sentence(tmp_path: Path):
    done = demo("postgresql+asyncpg://user:hunter2@127.0.0.1:1/x", tmp_path / "transcript")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "hunter2" not in done.stdout + done.stderr


PROBLEM = '{"code": "duplicate_key", "errors": [{"field": "email"}]}'
HEADERS = {"content-type": "application/problem+json", "x-request-id": "x"}


@pytest.mark.parametrize(
    ("answer", "expectation", "wrong"),
    [
        (Answer(409, "", HEADERS, PROBLEM), Expectation(409, "duplicate_key", "email", None), None),
        (Answer(500, "", HEADERS, PROBLEM), Expectation(409, None, None, None), "status 500 instead of 409"),
        (Answer(0, "no answer", {}, ""), Expectation(200, None, None, None), "status 0 instead of 200"),
        (Answer(409, "", {**HEADERS, "content-type": "text/html"}, ""), Expectation(409, None, None, None), "RFC 9457"),
        (Answer(409, "", HEADERS, PROBLEM), Expectation(409, "conflict", None, None), "code 'duplicate_key'"),
        (Answer(409, "", HEADERS, PROBLEM), Expectation(409, None, "username", None), "does not name 'username'"),
        (Answer(200, "", {}, "{}"), Expectation(200, None, None, None), "no request id"),
        (Answer(200, "", HEADERS, "{}"), Expectation(200, None, None, lambda body: body["x"]), "body"),
    ],
)
def test_a_wrong_answer_is_noticed(answer: Answer, expectation: Expectation, wrong: str | None):
    found = expectation.broken_by(answer)
    assert found == [] if wrong is None else wrong in found[0]


def test_a_transcript_holds_no_ids_times_cursors_and_ports():
    walk = Walk(port=4711, colours=False)
    text = walk._normalized(
        'http://127.0.0.1:4711/x?cursor=WyJh_-MQ "next_cursor": "WyJh_-MQ" "at": "2026-11-21T01:02:03.000004Z" '
        "019aa000-0000-7000-8000-000000000001 019aa000-0000-7000-8000-000000000002 "
        "019aa000-0000-7000-8000-000000000001"
    )
    assert text == (
        'http://127.0.0.1:8000/x?cursor=<cursor 1> "next_cursor": "<cursor 1>" "at": "<time>" <id 1> <id 2> <id 1>'
    )
