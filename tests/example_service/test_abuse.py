"""E3: whatever is sent, no answer is a 5xx, and neither answer nor log shows SQL, a stack or a secret."""

import json
import logging
import re
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import quote

import httpx2
import pytest

USERS = "/api/v1/users/"
SECRET = "$2b$12$" + "SECRETSECRETSECRETSEC" + "e" + "SECRETSECRETSECRETSECRETSECRETS"
ALICE = {"email": "alice@test.com", "username": "alice", "hashed_password": SECRET}

# After the families of the Big List of Naughty Strings: what breaks parsers, encoders, queries, formats and terminals.
NAUGHTY = [
    "",
    " ",
    "\0",
    "a\0b",
    "\ud800",
    "\udfff\ud800",
    "\ufeff",
    "\uffff",
    "\u202etest\u202c",
    "\x01\x02\x03\x1b[31m\x7f\x85",
    "\r\nX-Injected: yes",
    "undefined",
    "null",
    "NaN",
    "-Infinity",
    "true",
    "0x7fffffffffffffff",
    "9223372036854775808",
    "-9223372036854775809",
    "1e309",
    "1" * 400,
    "0.1.2",
    "½",
    "٣",
    "Ω≈ç√∫˜µ≤≥÷",
    "田中さんにあげて下さい",
    "👩‍👩‍👧‍👦🏳️‍🌈",
    "Z͑ͫ̓ͪ̂ͫ̽͏̴̙̤̞͉͚̯̞̠͍A̴̵̜̰͔ͫ͗͢",
    "ﷺ" * 50,
    "İıſK",
    "' OR '1'='1",
    "1;DROP TABLE users",
    "'; EXEC sp_MSForEachTable 'DROP TABLE ?'; --",
    '"; SELECT pg_sleep(9) --',
    "admin'/*",
    "UNION SELECT hashed_password FROM accounts",
    "%s%s%n%x",
    "{0.__class__}",
    "${jndi:ldap://x/y}",
    "{{7*7}}",
    "$(touch /tmp/x)",
    "../../../../etc/passwd%00.png",
    "<script>alert(1)</script>",
    "\\",
    "\\x00",
    "%",
    "_",
    "%00",
    "%FF%FE",
    "a" * 10_000,
    "__proto__",
    "constructor",
    "*",
    "?",
    "[a-z]",
]
PLACES = ["sort", "sort_by", "cursor", "search", "limit", "offset", "status", "id", "version__ge", "created_at__ge"]
PLACES += ["username", "username__contains", "username__in", "full_name__starts_with", "email__between", "is_admin"]

# What SQLAlchemy, a driver or Python would say; a client's own words may well be SQL.
LEAKS = re.compile(
    r"INSERT INTO users|FROM users|UPDATE users SET|\[SQL|sqlalche\.me|(asyncpg|pymysql)\.e|Traceback|\.py\""
)


@pytest.fixture(autouse=True)
def nothing_leaks_into_the_log(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    caplog.set_level(logging.INFO)
    yield
    formatted = [logging.Formatter().format(record) for record in caplog.records]
    assert not [line for line in formatted if LEAKS.search(line) or SECRET in line]


def judge(response: httpx2.Response) -> None:
    assert response.status_code < 500, response.text
    assert not LEAKS.search(response.text)
    assert SECRET not in response.text
    assert "x-injected" not in response.headers
    if response.status_code >= 400:
        assert response.headers["content-type"] == "application/problem+json"
        assert response.json()["status"] == response.status_code


def as_json(value: Any) -> dict[str, Any]:
    # ASCII: Python escapes what UTF-8 cannot hold.
    return {"content": json.dumps(value), "headers": {"Content-Type": "application/json"}}


def quoted(text: str) -> str:
    return quote(text.encode("utf-8", "surrogatepass"), safe="")


@pytest.fixture
async def path(client: httpx2.AsyncClient) -> str:
    response = await client.post(USERS, json=ALICE)
    return response.headers["location"]


@pytest.fixture
def share(request: pytest.FixtureRequest, effort: Callable[[int, int], int]) -> list[str]:
    """A quarter of the strings for each way to run the service, all of them for each under ``--full``."""
    place = ["sqlite", "postgres", "postgres, redis", "mysql"].index(request.node.callspec.params["migrated_url"])
    step = effort(4, 1)
    return NAUGHTY[place % step :: step]


async def test_e3_naughty_strings_in_bodies(client: httpx2.AsyncClient, path: str, share: list[str]):
    for text in share:  # a password takes its time to check
        for field in ("email", "username", "first_name", "hashed_password", "status", text):
            judge(await client.post(USERS, **as_json({"email": "bob@test.com", "username": "bob", field: text})))
            judge(await client.patch(path, **as_json({field: text})))
        credentials = {"username": text, "password": text}
        if len(text) < 50:
            judge(await client.post(f"{USERS}verify_credentials", **as_json(credentials)))
        judge(await client.post(USERS, content=text.encode("utf-8", "surrogatepass")))


async def test_e3_what_was_taken_comes_back_as_it_was(client: httpx2.AsyncClient, path: str):
    for text in NAUGHTY:
        response = await client.patch(path, **as_json({"bio": text}))
        if response.status_code == 200:
            assert (await client.get(path)).json()["bio"] == text
        else:
            assert len(text) > 1000 or "\0" in text or re.search("[\ud800-\udfff]", text)


async def test_e3_naughty_strings_in_queries(client: httpx2.AsyncClient, path: str):
    for text in NAUGHTY:
        for place in PLACES:
            judge(await client.get(f"{USERS}?{place}={quoted(text)}"))
        judge(await client.get(f"{USERS}?{quoted(text)}={quoted(text)}"))
        judge(await client.get(f"{USERS}?{quoted(text)}"))


async def test_e3_naughty_strings_in_paths_and_headers(client: httpx2.AsyncClient, path: str):
    for text in NAUGHTY:
        for place in (f"{USERS}{quoted(text)}", f"{USERS}by_username/{quoted(text)}", f"/{quoted(text)}"):
            judge(await client.get(place))
        header = text.encode("utf-8", "surrogatepass")
        for name in (b"X-Request-ID", b"If-Match", b"If-None-Match", b"Accept", b"Cookie"):
            judge(await client.get(path, headers=[(name, header)]))
            judge(await client.patch(path, json={"bio": "x"}, headers=[(name, header)]))


@pytest.mark.parametrize(
    "value",
    [2**31, 2**63, -(2**63) - 1, 10**400, 1.5, float("nan"), float("inf"), True, [], {}, [[]], {"a": {}}],
    ids=lambda value: repr(value)[:20],
)
async def test_e3_values_of_another_type(client: httpx2.AsyncClient, path: str, value: Any):
    for field in (*ALICE, "first_name", "bio", "status", "is_admin", "version"):
        judge(await client.post(USERS, **as_json({**ALICE, field: value})))
        judge(await client.patch(path, **as_json({field: value})))
    judge(await client.post(f"{USERS}verify_credentials", **as_json({"username": value, "password": value})))
    judge(await client.post(USERS, **as_json(value)))


@pytest.mark.parametrize("opening", ["[", '{"a":', '{"bio":[', '"', "{"])
async def test_e3_deep_and_broken_json(client: httpx2.AsyncClient, path: str, opening: str):
    for method, place in (("POST", USERS), ("PATCH", path), ("POST", f"{USERS}verify_credentials")):
        headers = {"Content-Type": "application/json"}
        response = await client.request(method, place, content=opening * 50_000, headers=headers)
        judge(response)
        assert response.status_code == 400


async def test_e3_sql_in_names_and_sorts_is_refused_by_name(client: httpx2.AsyncClient):
    for text in ("username;DROP TABLE users", "(SELECT 1)", "users.username", 'username" DESC --', "1", "id,1"):
        judge(response := await client.get(USERS, params={"sort": text}))
        assert response.status_code == 400
        judge(response := await client.get(USERS, params={text: "x"}))
        assert response.status_code == 400
