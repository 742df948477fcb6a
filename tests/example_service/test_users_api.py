"""The users resource over HTTP, the same on every database."""

import json
import uuid
from typing import Any
from urllib.parse import quote

import bcrypt
import httpx2
import pytest

USERS = "/api/v1/users/"
ALICE = {"first_name": "Alice", "last_name": "Test", "email": "alice@test.com", "username": "alice"}
SOME_ID = "01900000-0000-7000-8000-000000000000"
UNKNOWN = f"{USERS}{SOME_ID}"


def path_of(user: dict[str, Any]) -> str:
    return f"{USERS}{user['id']}"


def fields_of(response: httpx2.Response) -> list[str]:
    return [error["field"] for error in response.json().get("errors", [])]


async def create(client: httpx2.AsyncClient, username: str, **fields: Any) -> dict[str, Any]:
    body = {"email": f"{username}@test.com", "username": username, **fields}
    response = await client.post(USERS, json=body)
    assert response.status_code == 201, response.text
    return dict(response.json())


# Creating


async def test_the_seeds_body_creates_a_user(client: httpx2.AsyncClient):
    response = await client.post(USERS, json=ALICE)
    user = response.json()
    assert response.status_code == 201
    assert response.headers["location"] == path_of(user)
    assert response.headers["etag"] == '"1"'
    assert ALICE.items() <= user.items()
    assert user["full_name"] == "Alice Test"
    assert (user["bio"], user["status"], user["is_verified"], user["is_admin"]) == (None, "active", False, False)
    assert uuid.UUID(user["id"]).version == 7
    assert user["created_at"] == user["updated_at"]
    assert user["created_at"].endswith("Z")


async def test_what_was_answered_is_what_is_stored(client: httpx2.AsyncClient, alice: dict[str, Any]):
    response = await client.get(path_of(alice))
    assert response.status_code == 200
    assert response.json() == alice
    assert response.headers["etag"] == '"1"'


async def test_a_full_name_of_ones_own_is_kept(client: httpx2.AsyncClient):
    user = await create(client, "alice", first_name="Alice", last_name="Test", full_name="Dr. Alice Test")
    assert user["full_name"] == "Dr. Alice Test"


async def test_names_and_biography_come_back_as_they_were_sent(client: httpx2.AsyncClient):
    sent = {"first_name": "Zoë", "last_name": "O'Neill 👩‍🚀", "bio": "  line\n\ttwo \\ % _ “quotes” 日本語 "}
    user = await create(client, "zoe", **sent)
    assert sent.items() <= (await client.get(path_of(user))).json().items()


async def test_a_password_hash_is_never_answered(client: httpx2.AsyncClient):
    secret = "$2b$12$" + "x" * 53
    user = await create(client, "alice", hashed_password=secret)
    assert "hashed_password" not in user
    for response in (
        await client.get(path_of(user)),
        await client.get(USERS),
        await client.patch(path_of(user), json={"hashed_password": secret}),
        await client.post(USERS, json={**ALICE, "hashed_password": secret}),
        await client.get(USERS, params={"hashed_password": secret}),
    ):
        assert secret not in response.text


@pytest.mark.parametrize("email", ["alice@test.com", "ALICE@Test.COM"])
async def test_an_email_is_unique_in_whatever_case(client: httpx2.AsyncClient, alice: dict[str, Any], email: str):
    response = await client.post(USERS, json={"email": email, "username": "other"})
    assert response.status_code == 409
    assert response.json()["code"] == "duplicate_key"
    assert fields_of(response) == ["email"]


async def test_usernames_that_differ_in_case_are_two(client: httpx2.AsyncClient, alice: dict[str, Any]):
    other = await create(client, "Alice", email="other@test.com")
    response = await client.get(f"{USERS}by_username/Alice")
    assert response.json()["id"] == other["id"]
    taken = await client.post(USERS, json={"email": "third@test.com", "username": "alice"})
    assert (taken.status_code, fields_of(taken)) == (409, ["username"])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("email", "alice"),
        ("email", "alice@localhost"),
        ("email", "Alice <alice@test.com>"),
        ("email", f"{'a' * 250}@test.com"),
        ("email", None),
        ("email", 7),
        ("username", "al"),
        ("username", "a" * 51),
        ("username", "al ice"),
        ("username", "alice\n"),
        ("username", "älice"),
        ("first_name", "a" * 51),
        ("first_name", "a\0"),
        ("first_name", "\ud800"),
        ("full_name", "a" * 101),
        ("bio", "a" * 1001),
        ("bio", ["a"]),
        ("hashed_password", "a" * 59),
        ("hashed_password", "a" * 256),
        ("hashed_password", "ä" * 60),
        ("shoe_size", 42),
        ("id", SOME_ID),
        ("is_admin", True),
    ],
)
async def test_a_bad_field_is_refused_by_name(client: httpx2.AsyncClient, field: str, value: Any):
    # As ASCII: the client would not encode a lone surrogate.
    content = json.dumps({**ALICE, field: value})
    response = await client.post(USERS, content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert response.headers["content-type"] == "application/problem+json"
    assert fields_of(response) == [field]
    assert (await client.get(USERS)).json()["total"] == 0


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b'"text"', b'{"email": NaN}', b'{"email": "\xff"}', b"[" * 100_000, b"\xef\xbb\xbf{}"],
)
async def test_a_body_that_is_no_object_is_refused(client: httpx2.AsyncClient, content: bytes):
    response = await client.post(USERS, content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert response.headers["content-type"] == "application/problem+json"


# Reading


async def test_a_user_that_is_as_the_client_has_it_is_not_sent_again(client: httpx2.AsyncClient, alice: dict[str, Any]):
    for path in (path_of(alice), f"{USERS}by_username/alice"):
        for known in ('"1"', 'W/"1"', '"9", "1"', "*"):
            response = await client.get(path, headers={"If-None-Match": known})
            assert (response.status_code, response.content, response.headers["etag"]) == (304, b"", '"1"')
        response = await client.get(path, headers={"If-None-Match": '"2"'})
        assert response.status_code == 200


async def test_head_is_answered_like_get(client: httpx2.AsyncClient, alice: dict[str, Any]):
    for path in (USERS, path_of(alice), f"{USERS}by_username/alice", UNKNOWN, f"{USERS}?shoe_size=42"):
        get, head = await client.get(path), await client.head(path)
        assert (head.status_code, head.content) == (get.status_code, b"")
        for name in ("content-type", "content-length", "etag"):
            assert head.headers.get(name) == get.headers.get(name)


async def test_a_user_is_found_by_username(client: httpx2.AsyncClient, alice: dict[str, Any]):
    response = await client.get(f"{USERS}by_username/alice")
    assert response.json() == alice
    assert response.headers["etag"] == '"1"'


NOBODYS_NAMES = ["nobody", "no.such", "nobody@test.com", "x", "älice", "a b", "n" * 51, "n" * 255]


@pytest.mark.parametrize(
    "path", [UNKNOWN, *(f"{USERS}by_username/{quote(name)}" for name in NOBODYS_NAMES), "/api/v1/nothing"]
)
async def test_what_is_missing_is_a_404(client: httpx2.AsyncClient, path: str):
    response = await client.get(path)
    assert response.status_code == 404
    assert response.headers["content-type"] == "application/problem+json"


async def test_a_malformed_id_is_refused(client: httpx2.AsyncClient):
    response = await client.get(f"{USERS}42")
    assert (response.status_code, fields_of(response)) == (400, ["id"])


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("PUT", USERS, "GET, HEAD, POST"),
        ("OPTIONS", UNKNOWN, "DELETE, GET, HEAD, PATCH"),
        ("GET", f"{USERS}verify_credentials", "POST"),
        ("PATCH", f"{USERS}verify_credentials", "POST"),
        ("POST", f"{USERS}by_username/alice", "GET, HEAD"),
    ],
)
async def test_a_method_that_is_not_there_is_a_405_with_those_that_are(
    client: httpx2.AsyncClient, method: str, path: str, allowed: str
):
    response = await client.request(method, path)
    assert (response.status_code, response.headers["allow"]) == (405, allowed)
    assert response.json()["code"] == "method_not_allowed"


# Lists


async def test_a_list_begins_with_the_newest(client: httpx2.AsyncClient):
    for name in ("one", "two", "three"):
        await create(client, name)
    page = (await client.get(USERS)).json()
    assert [user["username"] for user in page["items"]] == ["three", "two", "one"]
    assert {name: page[name] for name in page if name != "items"} == {
        "total": 3,
        "limit": 20,
        "offset": 0,
        "has_next": False,
        "has_prev": False,
    }


async def test_pages_by_offset_and_by_cursor_cover_the_same_users(client: httpx2.AsyncClient):
    names = [f"user{number}" for number in range(7)]
    for name in names:
        await create(client, name)
    by_offset = []
    for offset in range(0, 9, 3):
        page = (await client.get(USERS, params={"sort": "username", "limit": 3, "offset": offset})).json()
        assert page["total"] == 7
        by_offset += [user["username"] for user in page["items"]]
    by_cursor: list[str] = []
    cursor = ""
    while cursor is not None:
        page = (await client.get(USERS, params={"sort": "username", "limit": 3, "cursor": cursor})).json()
        by_cursor += [user["username"] for user in page["items"]]
        cursor = page["next_cursor"]
    assert by_offset == by_cursor == names


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("status=suspended", ["bob"]),
        ("status__ne=suspended&sort=username", ["alice", "carol"]),
        ("is_verified=true", ["alice"]),
        ("is_admin=true", ["carol"]),
        ("username__in=alice,bob&sort=-username", ["bob", "alice"]),
        ("email=bob@test.com", ["bob"]),
        ("first_name__is_null=true&sort=username", ["bob", "carol"]),
        ("username__starts_with=c", ["carol"]),
        ("created_at__lt=2020-01-01T00:00:00Z", []),
        ("created_at__ge=2020-01-01T00:00:00%2B02:00&sort=username", ["alice", "bob", "carol"]),
        ("version__gt=1&sort=username", ["alice", "bob", "carol"]),
        ("search=BOB", ["bob"]),
        ("search=test.com&sort=username", ["alice", "bob", "carol"]),
        ("search=o&sort=username", ["alice", "bob", "carol"]),
        ("search=l%C3%9CCKE", ["carol"]),
        ("search=%25", []),
        ("search=_", []),
        ("search=%5C", []),
        ("search=100%25", []),
        ("search=&sort=username", ["alice", "bob", "carol"]),
        ("search=o&status=suspended", ["bob"]),
        ("sort_by=username&sort_order=desc", ["carol", "bob", "alice"]),
        ("sort=status,-username", ["carol", "alice", "bob"]),
        ("sort=first_name", ["alice", "bob", "carol"]),
    ],
)
async def test_a_list_is_filtered_sorted_and_searched(client: httpx2.AsyncClient, query: str, expected: list[str]):
    alice = await create(client, "alice", first_name="Alice", last_name="Lovelace")
    bob = await create(client, "bob")
    carol = await create(client, "carol", full_name="Carol Glücke")
    await client.patch(path_of(alice), json={"is_verified": True})
    await client.patch(path_of(bob), json={"status": "suspended"})
    await client.patch(path_of(carol), json={"is_admin": True})
    response = await client.get(f"{USERS}?{query}")
    assert response.status_code == 200, response.text
    assert [user["username"] for user in response.json()["items"]] == expected


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("limit", "0"),
        ("limit", "-1"),
        ("limit", "101"),
        ("limit", "1" + "0" * 20),
        ("limit", "ten"),
        ("offset", "-1"),
        ("offset", str(2**63)),
        ("cursor", "nonsense"),
        ("sort", "shoe_size"),
        ("sort", "hashed_password"),
        ("sort", "bio"),
        ("sort", "username;DROP TABLE users"),
        ("sort_by", "hashed_password"),
        ("sort_order", "sideways"),
        ("hashed_password", "x"),
        ("hashed_password__is_null", "true"),
        ("shoe_size", "42"),
        ("username__resembles", "x"),
        ("status", "asleep"),
        ("is_admin", "perhaps"),
        ("id", "42"),
        ("version__ge", str(2**63)),
        ("version", "NaN"),
        ("created_at__ge", "2026-01-01T00:00:00"),
        ("created_at__ge", "yesterday"),
        ("search", "x" * 101),
        ("search", "a\0b"),
        ("username", "a\0b"),
    ],
)
async def test_a_bad_parameter_is_refused_by_name(client: httpx2.AsyncClient, name: str, value: str):
    response = await client.get(USERS, params={name: value})
    assert response.status_code == 400
    assert fields_of(response) == [name]


async def test_a_cursor_is_bound_to_its_query(client: httpx2.AsyncClient):
    for name in ("one", "two"):
        await create(client, name)
    cursor = (await client.get(USERS, params={"limit": 1, "cursor": ""})).json()["next_cursor"]
    for other in ({"sort": "username"}, {"status": "active"}, {"search": "o"}):
        response = await client.get(USERS, params={"limit": 1, "cursor": cursor, **other})
        assert (response.status_code, fields_of(response)) == (400, ["cursor"])


# Changing


async def test_w4_null_is_written_and_what_is_absent_stays(client: httpx2.AsyncClient):
    user = await create(client, "alice", first_name="Alice", last_name="Test", bio="Hello")
    response = await client.patch(path_of(user), json={"bio": None, "is_verified": True})
    changed = response.json()
    assert response.status_code == 200
    assert response.headers["etag"] == '"2"'
    assert changed["updated_at"] > user["updated_at"]
    moved = {"bio": None, "is_verified": True, "version": 2, "updated_at": changed["updated_at"]}
    assert changed == user | moved
    assert (await client.get(path_of(user))).json() == changed


async def test_every_field_can_be_changed(client: httpx2.AsyncClient, alice: dict[str, Any]):
    changes = {
        "email": "Ada@Test.com",
        "username": "ada",
        "first_name": "Ada",
        "last_name": None,
        "full_name": "Ada L.",
        "bio": "…",
        "status": "inactive",
        "is_verified": True,
        "is_admin": True,
    }
    response = await client.patch(path_of(alice), json=changes | {"hashed_password": "x" * 60})
    assert response.status_code == 200
    assert changes | {"email": "ada@test.com"} == {name: response.json()[name] for name in changes}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"email": None},
        {"username": None},
        {"status": None},
        {"status": "asleep"},
        {"is_admin": None},
        {"is_admin": "yes"},
        {"shoe_size": 42},
        {"version": 7},
        {"id": SOME_ID},
        {"created_at": "2026-01-01T00:00:00Z"},
        {"first_name": "x" * 51},
        {"bio": 2**63},
    ],
)
async def test_a_bad_change_is_refused_and_nothing_changes(
    client: httpx2.AsyncClient, alice: dict[str, Any], changes: dict[str, Any]
):
    response = await client.patch(path_of(alice), json=changes)
    assert response.status_code == 400
    assert fields_of(response) == list(changes)
    assert (await client.get(path_of(alice))).json() == alice


async def test_a_change_to_what_is_taken_is_a_409(client: httpx2.AsyncClient, alice: dict[str, Any]):
    bob = await create(client, "bob")
    for field, value in (("email", "ALICE@test.com"), ("username", "alice")):
        response = await client.patch(path_of(bob), json={field: value, "bio": "x"})
        assert (response.status_code, fields_of(response)) == (409, [field])
    assert (await client.get(path_of(bob))).json() == bob


async def test_w3_a_stale_version_changes_nothing(client: httpx2.AsyncClient, alice: dict[str, Any]):
    first = await client.patch(path_of(alice), json={"bio": "first"}, headers={"If-Match": '"1"'})
    assert first.status_code == 200
    for stale in ('"1"', 'W/"2"', '"x"', '"99"'):
        for response in (
            await client.patch(path_of(alice), json={"bio": "second"}, headers={"If-Match": stale}),
            await client.delete(path_of(alice), headers={"If-Match": stale}),
        ):
            assert (response.status_code, response.json()["code"]) == (412, "stale_version")
    assert (await client.get(path_of(alice))).json() == first.json()


async def test_a_change_is_for_any_of_the_versions_that_if_match_lists(
    client: httpx2.AsyncClient, alice: dict[str, Any]
):
    for headers in ({"If-Match": '"1", "5"'}, {"If-Match": '"7", W/"2", "2", "x"'}):
        response = await client.patch(path_of(alice), json={"bio": "x"}, headers=headers)
        assert response.status_code == 200, response.text
    for method in ("PATCH", "DELETE"):
        for stale in ('"1", "5"', 'W/"3", "4"', '"x", "y"'):
            body = {"bio": "y"} if method == "PATCH" else None
            response = await client.request(method, path_of(alice), json=body, headers={"If-Match": stale})
            assert response.status_code == 412
    assert (await client.patch(UNKNOWN, json={"bio": "x"}, headers={"If-Match": '"1", "2"'})).status_code == 404
    assert (await client.delete(path_of(alice), headers={"If-Match": '"1", "3"'})).status_code == 204


async def test_a_condition_on_nobody_is_a_404(client: httpx2.AsyncClient):
    for headers in ({}, {"If-Match": '"1"'}, {"If-Match": "*"}):
        assert (await client.patch(UNKNOWN, json={"bio": "x"}, headers=headers)).status_code == 404
        assert (await client.delete(UNKNOWN, headers=headers)).status_code == 404


# Deleting


@pytest.mark.parametrize("headers", [{}, {"If-Match": '"1"'}, {"If-Match": "*"}], ids=["plain", "version", "any"])
async def test_w7_a_user_is_deleted_once(client: httpx2.AsyncClient, alice: dict[str, Any], headers: dict[str, str]):
    first = await client.delete(path_of(alice), headers=headers)
    assert (first.status_code, first.content) == (204, b"")
    assert "content-type" not in first.headers
    assert (await client.delete(path_of(alice), headers=headers)).status_code == 404
    assert (await client.get(path_of(alice))).status_code == 404
    assert (await client.get(USERS)).json()["total"] == 0


# Credentials


def hash_of(password: str, rounds: int = 4) -> str:
    return bcrypt.hashpw(password.encode(), bcrypt.gensalt(rounds)).decode()


async def verify(client: httpx2.AsyncClient, username: str, password: str) -> httpx2.Response:
    return await client.post(f"{USERS}verify_credentials", json={"username": username, "password": password})


@pytest.mark.parametrize("password", ["secret", "pässwörd 🔑", "x" * 72, "é" * 36], ids=len)
async def test_the_right_password_answers_the_user(client: httpx2.AsyncClient, password: str):
    user = await create(client, "alice", hashed_password=hash_of(password))
    right, wrong = await verify(client, "alice", password), await verify(client, "alice", f"y{password}")
    assert (right.status_code, right.json()) == (200, user)
    assert "etag" not in right.headers  # it would be that of another resource
    assert (wrong.status_code, wrong.json()["code"]) == (401, "unauthorized")


@pytest.mark.parametrize("status", ["inactive", "suspended"])
async def test_only_active_users_are_verified(client: httpx2.AsyncClient, status: str):
    user = await create(client, "alice", hashed_password=hash_of("secret"))
    await client.patch(path_of(user), json={"status": status})
    assert (await verify(client, "alice", "secret")).status_code == 401


async def test_a_401_does_not_say_what_was_wrong(client: httpx2.AsyncClient):
    await create(client, "alice", hashed_password=hash_of("secret"))
    await create(client, "nopassword")
    answers = [await verify(client, username, "guess") for username in ("alice", "Alice", "nopassword", "nobody")]
    answers += [await verify(client, "nobody@test.com", "x"), await verify(client, "alice", "")]
    assert {answer.status_code for answer in answers} == {401}
    assert len({answer.json()["detail"] for answer in answers}) == 1
    # RFC 9110, 15.5.2; not Basic, for which browsers would ask the user.
    assert {answer.headers["www-authenticate"] for answer in answers} == {'Credentials realm="users"'}


async def test_headers_of_conditional_requests_are_documented(client: httpx2.AsyncClient):
    paths = (await client.get("/openapi.json")).json()["paths"]

    def headers(path: str, method: str, status: str) -> set[str]:
        return set(paths[path][method]["responses"][status].get("headers", {}))

    def sent(path: str, method: str) -> set[str]:
        return {item["name"] for item in paths[path][method]["parameters"] if item["in"] == "header"}

    assert headers(USERS, "post", "201") == {"ETag", "Location"}
    for path in (f"{USERS}{{id}}", f"{USERS}by_username/{{username}}"):
        assert headers(path, "get", "200") == headers(path, "get", "304") == {"ETag"}
        assert sent(path, "get") == {"If-None-Match"}
    assert headers(f"{USERS}{{id}}", "patch", "200") == {"ETag"}
    assert sent(f"{USERS}{{id}}", "patch") == sent(f"{USERS}{{id}}", "delete") == {"If-Match"}
