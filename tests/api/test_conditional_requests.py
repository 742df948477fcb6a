import pytest
from fastapi import FastAPI, Response
from starlette.requests import Request
from starlette.testclient import TestClient

from fastapi_building_blocks.api import (
    NO_VERSION,
    IfMatchVersion,
    etag_of,
    if_match_version,
    if_match_versions,
    install_problem_details,
    is_not_modified,
)
from fastapi_building_blocks.domain import InvalidInputError, StaleVersionError


def request(name: str, *values: str) -> Request:
    headers = [(name.encode(), value.encode("latin-1")) for value in values]
    return Request({"type": "http", "method": "GET", "path": "/", "headers": headers})


def test_an_etag_is_strong_and_quoted() -> None:
    assert etag_of(3) == '"3"'


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], None),
        (["*"], None),
        (['"3"'], 3),
        (['"0"'], 0),
        (['  "3"  '], 3),
        (['W/"3"'], NO_VERSION),
        (['"abc"'], NO_VERSION),
        (['"03"'], NO_VERSION),
        (['"-1"'], NO_VERSION),
        (['""'], NO_VERSION),
        (['"9223372036854775807"'], 2**63 - 1),
        (['"9223372036854775808"'], NO_VERSION),
        (['"99999999999999999999999"'], NO_VERSION),
        (['"3", "5" ,"abc"'], 5),
        (['"3"', '"5"'], 5),
        ([', "3",,'], 3),
        (['"a,b", "2"'], 2),
    ],
)
def test_if_match_gives_the_expected_version(values: list[str], expected: int | None) -> None:
    assert if_match_version(request("if-match", *values)) == expected


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], None),
        (["*"], None),
        (['"3"'], {3}),
        (['"1", "5"', '"7"'], {1, 5, 7}),
        (['W/"3", "x", "9223372036854775808"'], set()),
        (['W/"3", "2"'], {2}),
    ],
)
def test_if_match_lists_every_version_that_could_match(values: list[str], expected: set[int] | None) -> None:
    assert if_match_versions(request("if-match", *values)) == expected


@pytest.mark.parametrize("value", ["3", '"3', "", ",", '"3" "4"', 'w/"3"', "*, *", '"a b"', "'3'"])
def test_a_malformed_if_match_is_refused(value: str) -> None:
    with pytest.raises(InvalidInputError) as refusal:
        if_match_version(request("if-match", value))
    assert refusal.value.fields == ("If-Match",)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], False),
        (["*"], True),
        (['"3"'], True),
        (['W/"3"'], True),
        (['"2", W/"3"'], True),
        (['"2"', '"3"'], True),
        (['"2"'], False),
        (["3"], False),
        (['"3'], False),
    ],
)
def test_if_none_match_compares_weakly_and_ignores_what_is_malformed(values: list[str], expected: bool) -> None:
    assert is_not_modified(request("if-none-match", *values), etag_of(3)) is expected


def test_a_long_malformed_header_is_refused_in_linear_time() -> None:
    with pytest.raises(InvalidInputError):
        if_match_version(request("if-match", '"a", ' * 20_000 + "\x01"))


def test_over_http_a_stale_tag_is_412_a_malformed_one_400_and_the_header_is_documented() -> None:
    app = FastAPI()
    install_problem_details(app)

    @app.patch("/thing")
    async def change(version: IfMatchVersion) -> Response:
        if version not in (None, 3):
            raise StaleVersionError("it has changed")
        return Response(headers={"ETag": etag_of(4)})

    client = TestClient(app)
    assert client.patch("/thing").status_code == 200
    assert client.patch("/thing", headers={"If-Match": '"3"'}).headers["etag"] == '"4"'
    assert client.patch("/thing", headers={"If-Match": '"2"'}).status_code == 412
    assert client.patch("/thing", headers={"If-Match": 'W/"3"'}).status_code == 412
    malformed = client.patch("/thing", headers={"If-Match": "3"})
    assert (malformed.status_code, malformed.json()["errors"][0]["field"]) == (400, "If-Match")
    operation = app.openapi()["paths"]["/thing"]["patch"]
    assert [(item["in"], item["name"]) for item in operation["parameters"]] == [("header", "If-Match")]
    assert "400" in operation["responses"]
