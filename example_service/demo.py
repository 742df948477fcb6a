"""A walk through the service: starts it, sends real requests, checks each answer, and stops it.

``python -m example_service.demo`` uses a temporary SQLite file, or a database of its own on the server that
``DATABASE_URL`` names. It exits with 0 only if every answer was the expected one.
"""

import argparse
import asyncio
import http.client
import json
import os
import re
import secrets
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from fastapi_building_blocks.infrastructure.database.migrations import downgrade

ROOT = Path(__file__).parents[1]
MIGRATIONS = Path(__file__).parent / "migrations"
USERS = "/api/v1/users/"
START_SECONDS = 60
STOP_SECONDS = 10
REQUEST_SECONDS = 30

PASSWORD = "correct horse battery staple"  # noqa: S105 - the demo's own
PASSWORD_HASH = "$2b$12$4cQjRWB/KZOP/sZ6yhpK3e8tj8grQsDYjkt1SUsgx8GM6og3yuZmi"  # noqa: S105
SHOWN_HEADERS = ("Content-Type", "Location", "ETag", "Allow", "Retry-After", "X-Request-ID")

Parameters = Mapping[str, str | int]
Check = Callable[[Any], bool]


# What is sent and what came back


@dataclass(frozen=True, slots=True)
class Answer:
    """An HTTP response, as far as the walk looks at it."""

    status: int
    reason: str
    headers: Mapping[str, str]
    text: str

    def json(self) -> Any:
        """Return the body, or None where it is no JSON."""
        try:
            return json.loads(self.text)
        except ValueError:
            return None

    @property
    def etag(self) -> str:
        """The entity tag, or nothing."""
        return self.headers.get("etag", "")


@dataclass(frozen=True, slots=True)
class Request:
    """An HTTP request, and how curl would send it."""

    method: str
    target: str
    headers: Mapping[str, str]
    body: bytes | None

    def as_curl(self, base: str) -> str:
        """Return a command line that sends the same."""
        parts = ["curl"]
        if self.method != "GET":
            parts.append(f"-X {self.method}")
        parts.append(shlex.quote(base + self.target))
        lines = [" ".join(parts)]
        lines += [f"-H {shlex.quote(f'{name}: {value}')}" for name, value in self.headers.items()]
        prefix = ""
        if self.body is not None and self.body.isascii():
            lines.append(f"-d {shlex.quote(self.body.decode())}")
        elif self.body is not None:
            octal = "".join(chr(byte) if 32 <= byte < 127 else f"\\{byte:03o}" for byte in self.body)
            prefix = f"printf {shlex.quote(octal)} | "
            lines.append("--data-binary @-")
        return prefix + " \\\n    ".join(lines)


@dataclass(frozen=True, slots=True)
class Expectation:
    """What an answer must be."""

    status: int
    code: str | None
    names: str | None
    check: Check | None

    def broken_by(self, answer: Answer) -> list[str]:
        """Return what is wrong with an answer."""
        content = answer.json()
        wrong = []
        if answer.status != self.status:
            wrong.append(f"status {answer.status} instead of {self.status}")
        if answer.status >= 400 and answer.headers.get("content-type") != "application/problem+json":
            wrong.append("not a problem (RFC 9457)")
        if self.code is not None and _in(content, "code") != self.code:
            wrong.append(f"code {_in(content, 'code')!r} instead of {self.code!r}")
        if self.names is not None and self.names not in [_in(item, "field") for item in _in(content, "errors") or []]:
            wrong.append(f"errors does not name {self.names!r}")
        if "x-request-id" not in answer.headers:
            wrong.append("no request id")
        if self.check is not None and not wrong and not _holds(self.check, content):
            wrong.append("the body is not as expected")
        return wrong


@dataclass
class Walk:
    """Sends one request after another, and notes and prints what came back."""

    port: int
    colours: bool
    transcript: list[str] = field(default_factory=list)
    steps: int = 0
    failures: list[str] = field(default_factory=list)
    _names: dict[str, str] = field(default_factory=dict)

    def chapter(self, title: str) -> None:
        """Begin a group of steps."""
        self._print(f"\n{title}\n{'=' * len(title)}", "1")
        self.transcript.append(f"# {title}")

    def send(
        self,
        title: str,
        method: str,
        path: str,
        *,
        query: Parameters | str = "",
        body: Any = None,
        raw: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        expect: int,
        code: str | None = None,
        names: str | None = None,
        check: Check | None = None,
    ) -> Answer:
        """Send a request and compare the answer with what is expected.

        Args:
            title: what the step shows.
            method: of the request.
            path: already quoted.
            query: parameters, or a query string already quoted.
            body: sent as JSON.
            raw: sent as it is, as if it were JSON.
            headers: in addition.
            expect: the status.
            code: the problem's code.
            names: a field that the problem names.
            check: what else must hold for the body.
        """
        self.steps += 1
        text = query if isinstance(query, str) else urlencode(query)
        sent = {"X-Request-ID": f"demo-{self.steps:02}", **(headers or {})}
        payload = raw if body is None else json.dumps(body, separators=(",", ":")).encode()
        if payload is not None:
            sent = {"Content-Type": "application/json", **sent}
        request = Request(method, f"{path}?{text}" if text else path, sent, payload)
        answer = self._exchange(request)
        self._show(title, request, answer)
        self._verdict(title, Expectation(expect, code, names, check).broken_by(answer))
        return answer

    def expect(self, title: str, holds: bool, otherwise: str) -> None:
        """Note something that is not an answer."""
        self.steps += 1
        self._print(f"\n{self.steps}. {title}", "1")
        self._verdict(title, [] if holds else [otherwise])

    def _exchange(self, request: Request) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=REQUEST_SECONDS)
        try:
            connection.request(request.method, request.target, request.body, dict(request.headers))
            response = connection.getresponse()
            headers = {name.lower(): value for name, value in response.getheaders()}
            return Answer(response.status, response.reason, headers, response.read().decode())
        except (OSError, http.client.HTTPException) as error:
            return Answer(0, f"no answer: {error!r}", {}, "")
        finally:
            connection.close()

    def _show(self, title: str, request: Request, answer: Answer) -> None:
        curl = request.as_curl(f"http://127.0.0.1:{self.port}")
        lines = [f"{answer.status} {answer.reason}"]
        lines += [f"{name}: {value}" for name in SHOWN_HEADERS if (value := answer.headers.get(name.lower()))]
        content = answer.json()
        if content is not None:
            lines.append(json.dumps(content, indent=2, ensure_ascii=False))
        elif answer.text:
            lines.append(answer.text)
        self._print(f"\n{self.steps}. {title}", "1")
        self._print(f"$ {curl}", "36")
        self._print("\n".join(lines))
        self.transcript += [f"## {title}", self._normalized(curl), self._normalized("\n".join(lines))]

    def _verdict(self, title: str, wrong: Sequence[str]) -> None:
        if wrong:
            self.failures.append(f"{self.steps}. {title}: {'; '.join(wrong)}")
        self._print(f"NOT AS EXPECTED: {'; '.join(wrong)}" if wrong else "as expected", "31" if wrong else "32")

    def _print(self, text: str, colour: str = "") -> None:
        # What cannot be shown on this terminal must not end the walk.
        shown = text.encode(sys.stdout.encoding or "utf-8", "backslashreplace").decode(sys.stdout.encoding or "utf-8")
        print(f"\033[{colour}m{shown}\033[0m" if self.colours and colour else shown, flush=True)

    def _normalized(self, text: str) -> str:
        """Return the text with ids, times and cursors named by their order of appearance."""
        text = text.replace(f"127.0.0.1:{self.port}", "127.0.0.1:8000")
        text = re.sub(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", lambda found: self._name("id", found[0]), text)
        text = re.sub(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z", "<time>", text)
        return re.sub(
            r'((?:_cursor": "|[?&]cursor=))([\w-]+)', lambda found: found[1] + self._name("cursor", found[2]), text
        )

    def _name(self, kind: str, value: str) -> str:
        number = sum(name.startswith(f"<{kind} ") for name in self._names.values()) + 1
        return self._names.setdefault(value, f"<{kind} {number}>")


def _in(content: Any, name: str) -> Any:
    return content.get(name) if isinstance(content, dict) else None


def _holds(check: Check, content: Any) -> bool:
    try:
        return check(content)
    except (KeyError, TypeError, IndexError):
        return False


# The walk


def walk_through(walk: Walk) -> None:
    """Send every request of the demo."""
    show_health(walk)
    alice, bob = show_creation(walk)
    show_reading(walk, alice)
    show_lists(walk)
    show_credentials(walk, bob)
    show_changes(walk, alice)
    show_conflicts(walk, alice)
    show_refused_queries(walk)
    show_refused_bodies(walk, alice)
    show_missing(walk)
    show_deletion(walk, bob)


def show_health(walk: Walk) -> None:
    """Liveness and readiness."""
    walk.chapter("Health")
    walk.send("The process lives", "GET", "/health/live", expect=200)
    walk.send("It can reach its database", "GET", "/health/ready", expect=200)


def show_creation(walk: Walk) -> tuple[str, str]:
    """Create two users, and return their paths."""
    walk.chapter("Creating users")
    alice = walk.send(
        "Create a user",
        "POST",
        USERS,
        body={"first_name": "Alice", "last_name": "Test", "email": "alice@test.com", "username": "alice"},
        expect=201,
        check=lambda user: user["full_name"] == "Alice Test" and user["status"] == "active" and user["version"] == 1,
    )
    walk.send(
        "Get all users",
        "GET",
        USERS,
        expect=200,
        check=lambda page: page["total"] == 1 and [user["username"] for user in page["items"]] == ["alice"],
    )
    bob = walk.send(
        "Create one with a profile and a password hash, which is never answered",
        "POST",
        USERS,
        body={
            "email": "Bob@Test.com",
            "username": "bob",
            "full_name": "Bob the Böttcher",
            "bio": "Makes barrels. 🛢️",
            "hashed_password": PASSWORD_HASH,
        },
        expect=201,
        check=lambda user: user["email"] == "bob@test.com" and "hashed_password" not in user,
    )
    return alice.headers.get("location", USERS), bob.headers.get("location", USERS)


def show_reading(walk: Walk, alice: str) -> None:
    """Read one user, conditionally as well."""
    walk.chapter("Reading one user")
    answer = walk.send("By id", "GET", alice, expect=200, check=lambda user: user["username"] == "alice")
    walk.send("Unchanged since this ETag", "GET", alice, headers={"If-None-Match": answer.etag}, expect=304)
    walk.send(
        "By username",
        "GET",
        f"{USERS}by_username/alice",
        expect=200,
        check=lambda user: user["email"] == "alice@test.com",
    )


def show_lists(walk: Walk) -> None:
    """Filters, sorts, search and both kinds of pages."""
    walk.chapter("Lists")

    def usernames(*expected: str) -> Check:
        return lambda page: [user["username"] for user in page["items"]] == list(expected)

    walk.send(
        "Filter and sort",
        "GET",
        USERS,
        query={"status": "active", "is_admin": "false", "sort": "-full_name"},
        expect=200,
        check=usernames("bob", "alice"),
    )
    walk.send(
        "Operators",
        "GET",
        USERS,
        query={"username__in": "alice,carol", "created_at__ge": "2020-01-01T00:00:00+01:00"},
        expect=200,
        check=usernames("alice"),
    )
    walk.send(
        "Without a value",
        "GET",
        USERS,
        query={"first_name__is_null": "true"},
        expect=200,
        check=usernames("bob"),
    )
    walk.send(
        "Search, without regard to case", "GET", USERS, query={"search": "BÖTT"}, expect=200, check=usernames("bob")
    )
    walk.send("% and _ are literal", "GET", USERS, query={"search": "%_"}, expect=200, check=usernames())
    walk.send(
        "Sort in the long spelling",
        "GET",
        USERS,
        query={"sort_by": "username", "sort_order": "desc"},
        expect=200,
        check=usernames("bob", "alice"),
    )
    walk.send(
        "A page by offset",
        "GET",
        USERS,
        query={"sort": "username", "limit": 1, "offset": 1},
        expect=200,
        check=lambda page: page["total"] == 2 and page["has_prev"] and not page["has_next"],
    )
    first = walk.send(
        "The first page by cursor",
        "GET",
        USERS,
        query={"sort": "username", "limit": 1, "cursor": ""},
        expect=200,
        check=usernames("alice"),
    )
    cursor = str(_in(first.json(), "next_cursor"))
    walk.send(
        "The next page by cursor",
        "GET",
        USERS,
        query={"sort": "username", "limit": 1, "cursor": cursor},
        expect=200,
        check=usernames("bob"),
    )
    walk.send(
        "A cursor belongs to its query",
        "GET",
        USERS,
        query={"sort": "-username", "limit": 1, "cursor": cursor},
        expect=400,
        code="invalid_query",
        names="cursor",
    )


def show_credentials(walk: Walk, bob: str) -> None:
    """Check passwords."""
    walk.chapter("Credentials")
    path = f"{USERS}verify_credentials"

    def claim(title: str, username: str, password: str, expect: int) -> None:
        walk.send(title, "POST", path, body={"username": username, "password": password}, expect=expect)

    claim("The right password", "bob", PASSWORD, 200)
    claim("A wrong password", "bob", "hunter2", 401)
    claim("An unknown user takes as long", "nobody", PASSWORD, 401)
    claim("A user without a password", "alice", "anything", 401)
    walk.send("Suspend Bob", "PATCH", bob, body={"status": "suspended"}, expect=200)
    claim("The right password of a suspended user", "bob", PASSWORD, 401)


def show_changes(walk: Walk, alice: str) -> None:
    """Change fields, and never overwrite what somebody else has changed."""
    walk.chapter("Changing a user")
    changed = walk.send(
        "Change what is sent and nothing else",
        "PATCH",
        alice,
        body={"bio": "Hello", "is_verified": True},
        expect=200,
        check=lambda user: user["bio"] == "Hello" and user["first_name"] == "Alice" and user["version"] == 2,
    )
    walk.send(
        "null is written",
        "PATCH",
        alice,
        body={"bio": None},
        headers={"If-Match": changed.etag},
        expect=200,
        check=lambda user: user["bio"] is None and user["is_verified"] is True,
    )
    walk.send(
        "No lost update: that version is gone",
        "PATCH",
        alice,
        body={"bio": "Mine!"},
        headers={"If-Match": changed.etag},
        expect=412,
        code="stale_version",
    )
    walk.send(
        "Nor a lost delete", "DELETE", alice, headers={"If-Match": changed.etag}, expect=412, code="stale_version"
    )


def show_conflicts(walk: Walk, alice: str) -> None:
    """Run into what is taken."""
    walk.chapter("Conflicts")
    walk.send(
        "The e-mail is taken, in whatever case",
        "POST",
        USERS,
        body={"email": "ALICE@TEST.COM", "username": "alice2"},
        expect=409,
        code="duplicate_key",
        names="email",
    )
    walk.send(
        "The username is taken",
        "POST",
        USERS,
        body={"email": "alice2@test.com", "username": "alice"},
        expect=409,
        code="duplicate_key",
        names="username",
    )
    walk.send(
        "The username is taken, by a change",
        "PATCH",
        alice,
        body={"username": "bob"},
        expect=409,
        code="duplicate_key",
        names="username",
    )


def show_refused_queries(walk: Walk) -> None:
    """Ask lists for what they do not answer."""
    walk.chapter("Refused queries")

    def refuse(title: str, name: str, value: str) -> None:
        walk.send(title, "GET", USERS, query=f"{name}={value}", expect=400, names=name)

    refuse("An unknown sort field", "sort", "shoe_size")
    refuse("A hidden sort field", "sort", "hashed_password")
    refuse("SQL for a sort field", "sort", quote("id;DROP TABLE users"))
    refuse("An unknown filter", "shoe_size", "42")
    refuse("A hidden filter", "hashed_password", "x")
    refuse("An unknown operator", "username__resembles", "x")
    refuse("A bad value", "status", "asleep")
    for limit in ("0", "-1", "101", "100000000000000000000"):
        refuse(f"limit={limit}", "limit", limit)
    refuse("offset=-1", "offset", "-1")
    refuse("An offset beyond 64 bits", "offset", "9223372036854775808")
    refuse("A malformed cursor", "cursor", "nonsense")
    refuse("A number beyond 64 bits", "version__ge", "9223372036854775808")
    refuse("A naive timestamp", "created_at__ge", "2026-01-01T00:00:00")
    refuse("A NUL character", "search", "%00")
    refuse("What is not UTF-8", "search", "%FF")
    refuse("A search that is too long", "search", "x" * 101)


def show_refused_bodies(walk: Walk, alice: str) -> None:
    """Send what cannot be stored."""
    walk.chapter("Refused bodies")
    good = {"email": "carol@test.com", "username": "carol"}

    def refuse(title: str, names: str, **changes: Any) -> None:
        walk.send(title, "POST", USERS, body=good | changes, expect=400, code="request_validation", names=names)

    refuse("No e-mail address", "email", email="carol")
    refuse("A username that is too long", "username", username="c" * 51)
    refuse("A username with a space", "username", username="ca rol")
    refuse("A name that is too long", "first_name", first_name="c" * 51)
    refuse("A password hash that is too short", "hashed_password", hashed_password="short")  # noqa: S106
    refuse("A NUL character", "first_name", first_name="Car\0ol")
    refuse("A lone surrogate", "first_name", first_name="\ud800")
    refuse("The wrong type", "bio", bio=2**63)
    refuse("An unknown field", "shoe_size", shoe_size=42)
    walk.send("A missing field", "POST", USERS, body={"username": "carol"}, expect=400, names="email")
    walk.send("Malformed JSON", "POST", USERS, raw=b'{"email": ', expect=400, code="request_validation")
    walk.send("What is not UTF-8", "POST", USERS, raw=b'{"email": "\xff\xfe"}', expect=400)
    walk.send("An empty change", "PATCH", alice, body={}, expect=400)
    walk.send("null where there must be a value", "PATCH", alice, body={"email": None}, expect=400, names="email")


def show_missing(walk: Walk) -> None:
    """Ask for what is not there."""
    walk.chapter("Missing")
    nobody = f"{USERS}00000000-0000-7000-8000-000000000000"
    walk.send("An unknown id", "GET", nobody, expect=404, code="not_found")
    walk.send("Changing it", "PATCH", nobody, body={"bio": "x"}, expect=404, code="not_found")
    walk.send("Deleting it", "DELETE", nobody, expect=404, code="not_found")
    walk.send("No id at all", "GET", f"{USERS}42", expect=400, names="id")
    walk.send("An unknown username", "GET", f"{USERS}by_username/nobody", expect=404, code="not_found")
    walk.send("An unknown path", "GET", "/api/v1/shoes/", expect=404)
    walk.send("A method that is not there", "PUT", USERS, body={}, expect=405)


def show_deletion(walk: Walk, bob: str) -> None:
    """Delete a user, once."""
    walk.chapter("Deleting")
    walk.send("Delete", "DELETE", bob, expect=204)
    walk.send("Delete again", "DELETE", bob, expect=404, code="not_found")
    walk.send("It is gone", "GET", bob, expect=404, code="not_found")


# The service and its database


@contextmanager
def running_service(url: str, port: int, log: Path, redis_url: str = "") -> Iterator[subprocess.Popen[bytes]]:
    """Start the service, wait until it is ready, and stop it at the end."""
    # No cache unless it is asked for: a Redis that REDIS_URL names belongs to another database.
    environment = os.environ | {
        "DATABASE_URL": url,
        "REDIS_URL": redis_url,
        "HOST": "127.0.0.1",
        "PORT": str(port),
    }
    command = [sys.executable, "-m", "example_service.app.main"]
    with (
        log.open("wb") as output,
        subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output) as process,  # noqa: S603
    ):
        try:
            wait_until_ready(process, port)
            yield process
        finally:
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()


def wait_until_ready(process: "subprocess.Popen[bytes]", port: int) -> None:
    """Return once the service answers that it is ready.

    Raises:
        RuntimeError: it ended, or is not ready in time.
    """
    give_up = time.monotonic() + START_SECONDS
    while time.monotonic() < give_up:
        if process.poll() is not None:
            raise RuntimeError(f"the service ended with exit code {process.returncode} before it was ready")
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=1)
        try:
            connection.request("GET", "/health/ready")
            if connection.getresponse().status == 200:
                return
        except (OSError, http.client.HTTPException):
            pass
        finally:
            connection.close()
        time.sleep(0.05)
    raise RuntimeError(f"the service was not ready within {START_SECONDS} seconds")


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@contextmanager
def own_database(given: str, directory: Path) -> Iterator[str]:
    """Give the URL of an empty database that is gone afterwards.

    It is a file in ``directory`` where nothing or an SQLite URL is given, and otherwise a new database on the server;
    where the user may not create one it is the given database itself, if the service's tables are not there yet.
    """
    if not given or sa.make_url(given).get_backend_name() == "sqlite":
        yield f"sqlite+aiosqlite:///{directory / 'demo.db'}"
        return
    server, name = sa.make_url(given), f"demo_{secrets.token_hex(6)}"
    created = asyncio.run(create_database(server, name))
    try:
        yield (server.set(database=name) if created else server).render_as_string(hide_password=False)
    finally:
        if created:
            asyncio.run(execute(server, f"DROP DATABASE {name}"))
        else:
            asyncio.run(downgrade(server, MIGRATIONS, "base"))
            asyncio.run(execute(server, "DROP TABLE alembic_version"))


async def create_database(server: sa.URL, name: str) -> bool:
    """Create a database and return True, or False where that is not allowed and the given one is free to be used.

    Raises:
        RuntimeError: that is not allowed, and the given one has the service's tables.
    """
    try:
        await execute(server, f"CREATE DATABASE {name}")
    except DBAPIError as error:
        if {"users", "alembic_version"} & await tables_of(server):
            raise RuntimeError(
                "DATABASE_URL's user may not create a database, and the one it names has the service's tables"
            ) from error
        return False
    return True


async def execute(url: sa.URL, statement: str) -> None:
    """Run a statement outside of a transaction."""
    engine = create_async_engine(url, poolclass=NullPool, isolation_level="AUTOCOMMIT")
    async with engine.connect() as connection:
        await connection.exec_driver_sql(statement)


async def tables_of(url: sa.URL) -> set[str]:
    """Return the names of the tables in a database."""
    async with create_async_engine(url, poolclass=NullPool).connect() as connection:
        return set(await connection.run_sync(lambda sync_connection: sa.inspect(sync_connection).get_table_names()))


def run(transcript: Path | None) -> int:
    """Run the demo and return the exit code."""
    colours = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    with (
        tempfile.TemporaryDirectory() as directory,
        own_database(os.environ.get("DATABASE_URL", ""), Path(directory)) as url,
    ):
        walk, log = Walk(free_port(), colours), Path(directory) / "service.log"
        print(f"Starting the service on {sa.make_url(url)!r} ...", flush=True)
        try:
            with running_service(url, walk.port, log):
                walk_through(walk)
        finally:
            logged = log.read_text(errors="replace")
            if not walk.steps or walk.failures:
                print(f"The service's log:\n{logged}", file=sys.stderr)
    stacks = logged.count("Traceback (most recent call last)")
    walk.expect("The service's log holds no stack", stacks == 0, f"{stacks} stacks in the log")
    if transcript is not None:
        transcript.write_text("\n".join(walk.transcript) + "\n", encoding="utf-8")
    print(f"\n{walk.steps - len(walk.failures)} of {walk.steps} steps as expected.")
    for failure in walk.failures:
        print(f"  {failure}")
    return 1 if walk.failures else 0


def main() -> int:
    """Run the demo as a command."""
    parser = argparse.ArgumentParser(prog="python -m example_service.demo", description=__doc__)
    parser.add_argument("--transcript", type=Path, help="write what was sent and answered here, without ids and times")
    try:
        return run(parser.parse_args().transcript)
    except (OSError, RuntimeError, SQLAlchemyError) as error:
        print(f"The demo could not run: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
