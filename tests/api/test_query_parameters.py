import enum
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Annotated, Any
from urllib.parse import quote, urlencode
from uuid import UUID

import pytest
import sqlalchemy as sa
from fastapi import APIRouter, Depends, FastAPI, Query
from fastapi.security import APIKeyQuery
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel
from starlette.testclient import TestClient

from fastapi_building_blocks.api import (
    CursorPageResponse,
    ListQuery,
    PageResponse,
    database_lifespan,
    install_problem_details,
    list_query,
)
from fastapi_building_blocks.domain import CursorPage, InvalidQueryError, Page, Sort
from fastapi_building_blocks.domain.query import Comparison, Operator, Or
from fastapi_building_blocks.infrastructure.database.in_memory_session import InMemorySession
from fastapi_building_blocks.infrastructure.persistence.repositories.base import BaseRepository


class Status(enum.Enum):
    ACTIVE = "active"
    CLOSED = "closed"


@dataclass
class Account:
    id: int
    name: str
    secret: str = ""
    status: Status = Status.ACTIVE
    age: int | None = None
    ratio: float = 0.5
    balance: Decimal = Decimal(0)
    verified: bool = False
    token: UUID | None = None
    birthday: date | None = None
    created_at: datetime = datetime(2026, 1, 1, tzinfo=UTC)
    labels: dict[str, str] = field(default_factory=dict)


accounts_table = sa.Table(
    "accounts",
    sa.MetaData(),
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("name", sa.String(200), nullable=False),
    sa.Column("secret", sa.String(200), nullable=False),
    sa.Column("status", sa.Enum(Status, values_callable=lambda kind: [member.value for member in kind])),
    sa.Column("age", sa.BigInteger),
    sa.Column("ratio", sa.Float),
    sa.Column("balance", sa.Numeric(20, 6)),
    sa.Column("verified", sa.Boolean),
    sa.Column("token", sa.Uuid),
    sa.Column("birthday", sa.Date),
    sa.Column("created_at", sa.DateTime(timezone=True)),
    sa.Column("labels", sa.JSON),
)


class Accounts(BaseRepository[Account]):
    table = accounts_table
    hidden_columns = frozenset({"secret"})
    search_fields = ("name",)


class AccountShown(BaseModel):
    id: int
    name: str


ListAccounts = Annotated[ListQuery, Depends(list_query(Accounts, default_sort="-created_at"))]


def application(session: InMemorySession) -> FastAPI:
    app = FastAPI(lifespan=database_lifespan(session))
    install_problem_details(app)
    router = APIRouter()

    @router.get("/accounts", response_model=PageResponse[AccountShown] | CursorPageResponse[AccountShown])
    async def accounts(query: ListAccounts) -> Page[Account] | CursorPage[Account]:
        return await query.page_of(Accounts(session))

    @router.get("/parsed")
    async def parsed(query: ListAccounts, verbose: bool = False, tag: Annotated[list[str], Query()] = []) -> str:  # noqa: B006
        return f"{verbose} {tag} {query}"

    app.include_router(router, prefix="/api")
    return app


@pytest.fixture
def client() -> Iterator[TestClient]:
    session = InMemorySession()
    with TestClient(application(session)) as client:
        assert client.portal is not None
        client.portal.call(fill, session)
        yield client


async def fill(session: InMemorySession) -> None:
    start = datetime(2026, 1, 1, tzinfo=UTC)
    await Accounts(session).add_many(
        Account(
            number,
            f"name {number} 100%" if number == 7 else f"name {number}",
            age=number if number % 5 else None,
            status=Status.CLOSED if number % 2 else Status.ACTIVE,
            verified=number > 10,
            balance=Decimal(number) / 4,
            token=UUID(int=number),
            birthday=date(2000, 1, number),
            created_at=start + timedelta(days=number),
        )
        for number in range(1, 21)
    )


def ids(client: TestClient, query: str) -> list[int]:
    response = client.get(f"/api/accounts?{query}")
    assert response.status_code == 200, response.text
    return [item["id"] for item in response.json()["items"]]


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("limit=3", [20, 19, 18]),
        ("limit=3&offset=18", [2, 1]),
        ("offset=9223372036854775807", []),
        ("limit=2&sort=name", [1, 10]),
        ("limit=2&sort=-verified,id", [11, 12]),
        ("limit=2&sort=id,-id,id", [1, 2]),
        ("limit=2&sort_by=id&sort_order=asc", [1, 2]),
        ("limit=2&sort_by=id&sort_order=desc", [20, 19]),
        ("limit=2&sort_by=id", [20, 19]),
        ("limit=2&sort_order=asc", [1, 2]),
        ("id=7", [7]),
        ("status=closed&sort=id&limit=2", [1, 3]),
        ("status__ne=closed&sort=id&limit=2", [2, 4]),
        ("status__in=closed,active&sort=id&limit=2", [1, 2]),
        ("id__in=3,1,99&sort=id", [1, 3]),
        ("id__not_in=20,19&limit=1", [18]),
        ("id__lt=3&sort=id", [1, 2]),
        ("id__le=3&sort=id", [1, 2, 3]),
        ("id__gt=18&sort=id", [19, 20]),
        ("id__ge=19&sort=id", [19, 20]),
        ("id__between=4,6&sort=id", [4, 5, 6]),
        ("age__is_null=true&sort=id", [5, 10, 15, 20]),
        ("age__is_null=0&sort=id&limit=1", [1]),
        ("verified=true&sort=id&limit=1", [11]),
        ("verified=FALSE&sort=id&limit=1", [1]),
        ("balance=1.25", [5]),
        ("balance__ge=4.75&sort=id", [19, 20]),
        (f"token={UUID(int=9)}", [9]),
        ("birthday=2000-01-09", [9]),
        ("birthday__between=2000-01-01,2000-01-02&sort=id", [1, 2]),
        ("created_at__ge=2026-01-20T00:00:00Z&sort=id", [19, 20]),
        ("created_at__ge=2026-01-20T02:00:00%2B02:00&sort=id", [19, 20]),
        ("created_at__ge=2026-01-20T02:00:00+02:00&sort=id", [19, 20]),
        ("name__contains=0%25", [7]),
        ("name__icontains=NAME+7", [7]),
        ("name__starts_with=name+20", [20]),
        ("name__starts_with=ame", []),
        ("name=", []),
        ("search=NAME%207", [7]),
        ("search=%25", [7]),
        ("search=&limit=1", [20]),
        ("ratio__gt=4e-1&limit=1", [20]),
        ("&&limit=1&", [20]),
    ],
)
def test_a_list_answers_what_the_query_asks(client: TestClient, query: str, expected: list[int]) -> None:
    assert ids(client, query) == expected


def test_a_page_by_offset_has_the_keys_of_the_seed(client: TestClient) -> None:
    page = client.get("/api/accounts?limit=2&offset=2&status=active").json()
    assert [item["id"] for item in page.pop("items")] == [16, 14]
    assert page == {"total": 10, "limit": 2, "offset": 2, "has_next": True, "has_prev": True}


def test_an_empty_cursor_asks_for_the_first_page_and_leads_through_all_of_them_and_back(client: TestClient) -> None:
    seen: list[int] = []
    cursor: str | None = ""
    while cursor is not None:
        page = client.get("/api/accounts", params={"limit": 7, "sort": "age,-id", "cursor": cursor}).json()
        assert set(page) == {"items", "next_cursor", "prev_cursor"}
        seen.extend(item["id"] for item in page["items"])
        cursor, before = page["next_cursor"], page["prev_cursor"]
    assert sorted(seen) == list(range(1, 21))
    back = client.get("/api/accounts", params={"limit": 7, "sort": "age,-id", "cursor": before}).json()
    assert [item["id"] for item in back["items"]] == seen[7:14]


REFUSED = [
    ("limit=0", "limit"),
    ("limit=-1", "limit"),
    ("limit=101", "limit"),
    ("limit=1e1", "limit"),
    ("limit=", "limit"),
    (f"limit={10**20}", "limit"),
    ("limit=%D9%A3", "limit"),
    ("limit=1_0", "limit"),
    ("limit=+5", "limit"),
    ("limit=5&limit=6", "limit"),
    ("offset=-1", "offset"),
    (f"offset={2**63}", "offset"),
    ("offset=0&cursor=", "offset"),
    ("cursor=garbage", "cursor"),
    ("cursor=" + "A" * 9000, "cursor"),
    ("cursor=%00", "cursor"),
    ("sort=", "sort"),
    ("sort=name,", "sort"),
    ("sort=--name", "sort"),
    ("sort=secret", "sort"),
    ("sort=labels", "sort"),
    ("sort=name;drop table", "sort"),
    ("sort=name&sort_by=name", "sort_by"),
    ("sort=name&sort_order=asc", "sort_order"),
    ("sort_by=secret", "sort_by"),
    ("sort_by=-name", "sort_by"),
    ("sort_by=name&sort_order=up", "sort_order"),
    ("unknown=1", "unknown"),
    ("name__like=1", "name__like"),
    ("name__", "name__"),
    ("__class__=1", "__class__"),
    ("secret=x", "secret"),
    ("secret__contains=x", "secret__contains"),
    ("labels=x", "labels"),
    ("Name=x", "Name"),
    ("=1", ""),
    ("name=a&name=b", "name"),
    ("name=a%00b", "name"),
    ("name=%ED%A0%80", "name"),
    ("name=%FF", "name"),
    ("name__in=a,%00", "name__in"),
    ("search=%00", "search"),
    ("search=" + "x" * 101, "search"),
    ("status=ACTIVE", "status"),
    ("status=", "status"),
    ("status__in=active,", "status__in"),
    ("status__contains=a", "status__contains"),
    ("age=", "age"),
    ("age=x", "age"),
    ("age=1.5", "age"),
    (f"age={2**63}", "age"),
    (f"age={-(2**63) - 1}", "age"),
    ("age=" + "9" * 5000, "age"),
    ("age__in=1,,2", "age__in"),
    ("age__in=" + ",".join(["1"] * 101), "age__in"),
    ("age__between=1", "age__between"),
    ("age__between=1,2,3", "age__between"),
    ("age__is_null=maybe", "age__is_null"),
    ("age__contains=1", "age__contains"),
    ("ratio=nan", "ratio"),
    ("ratio=inf", "ratio"),
    ("ratio=1e999", "ratio"),
    ("balance=NaN", "balance"),
    ("balance=Infinity", "balance"),
    ("balance=1e1000", "balance"),
    ("balance=1e1000000", "balance"),
    ("verified=yes", "verified"),
    ("verified__lt=true", "verified__lt"),
    ("token=1234", "token"),
    ("birthday=2000-02-30", "birthday"),
    ("birthday=0", "birthday"),
    ("created_at__ge=2026-01-20T00:00:00", "created_at__ge"),
    ("created_at__ge=2026-01-20", "created_at__ge"),
    ("created_at__ge=2026", "created_at__ge"),
    ("created_at=0001-01-01T00:00:00%2B23:59", "created_at"),
    ("created_at=9999-12-31T23:59:59-23:59", "created_at"),
]


@pytest.mark.parametrize(("query", "parameter"), REFUSED)
def test_whatever_is_not_declared_is_a_400_that_names_the_parameter(
    client: TestClient, query: str, parameter: str
) -> None:
    response = client.get(f"/api/accounts?{query}")
    assert response.status_code == 400, response.text
    problem = response.json()
    assert problem["code"] == "invalid_query"
    assert [item["field"] for item in problem["errors"]] == [parameter]
    assert parameter in problem["detail"] or parameter == "cursor"


def test_a_cursor_of_another_sort_is_refused(client: TestClient) -> None:
    cursor = client.get("/api/accounts?limit=2&cursor=&sort=name").json()["next_cursor"]
    assert client.get("/api/accounts", params={"cursor": cursor, "sort": "-name"}).status_code == 400


def test_the_endpoints_own_parameters_are_not_unknown(client: TestClient) -> None:
    response = client.get("/api/parsed?verbose=true&tag=a&tag=b&limit=1")
    assert response.status_code == 200
    assert response.json().startswith("True ['a', 'b'] ListQuery")
    assert client.get("/api/accounts?verbose=true").status_code == 400


def test_parameters_of_router_dependencies_are_not_unknown() -> None:
    async def tenant(tenant: str) -> None:
        """Takes a parameter."""

    app, router = FastAPI(), APIRouter()
    install_problem_details(app)

    @router.get("/list", dependencies=[Depends(APIKeyQuery(name="api_key"))])
    async def listed(query: ListAccounts) -> None:
        """Answers nothing."""

    app.include_router(router, dependencies=[Depends(tenant)])
    client = TestClient(app)
    assert client.get("/list?tenant=a&api_key=b&limit=2").status_code == 200
    assert client.get("/list?tenant=a&api_key=b&other=2").status_code == 400


@given(st.dictionaries(st.text(max_size=8), st.text(max_size=12), max_size=3))
def test_no_query_string_is_a_server_error(parameters: dict[str, str]) -> None:
    session = InMemorySession()
    with TestClient(application(session)) as client:
        query = urlencode(parameters, errors="surrogatepass")
        assert client.get(f"/api/accounts?{query}").status_code in {200, 400}
        first = quote(next(iter(parameters.values()), ""), errors="surrogatepass")
        for name in ("name__icontains", "cursor", "sort", "age", "created_at", "balance", "token__in", "search"):
            assert client.get(f"/api/accounts?{name}={first}").status_code in {200, 400}


@given(
    st.one_of(
        st.integers(-(2**63), 2**63 - 1).map(lambda value: ("age", value, str(value))),
        st.floats(allow_nan=False, allow_infinity=False).map(lambda value: ("ratio", value, repr(value))),
        st.decimals(-(10**12), 10**12, allow_nan=False, places=6).map(lambda value: ("balance", value, str(value))),
        st.uuids().map(lambda value: ("token", value, str(value))),
        st.dates().map(lambda value: ("birthday", value, value.isoformat())),
        st.datetimes(timezones=st.just(UTC)).map(lambda value: ("created_at", value, value.isoformat())),
        st.sampled_from(Status).map(lambda value: ("status", value, value.value)),
        st.text(st.characters(codec="utf-8", exclude_characters="\0")).map(lambda value: ("name", value, value)),
    )
)
async def test_a_value_that_is_written_out_is_read_back_with_its_type(case: tuple[str, Any, str]) -> None:
    name, value, text = case
    (criterion,) = (await parse(urlencode({name: text}))).criteria
    assert criterion == Comparison(name, Operator.EQ, value)
    assert type(criterion.value) is type(value)


async def parse(query: str, dependency: Any = None) -> ListQuery:
    from starlette.requests import Request

    scope = {"type": "http", "query_string": query.encode(), "headers": [], "path": "/"}
    return await (dependency or list_query(Accounts))(Request(scope))


async def test_search_looks_into_every_declared_field() -> None:
    class Searched(Accounts):
        hidden_columns = frozenset[str]()
        search_fields = ("name", "secret")

    (criterion,) = (await parse("search=x", list_query(Searched))).criteria
    assert criterion == Or((Comparison("name", Operator.ICONTAINS, "x"), Comparison("secret", Operator.ICONTAINS, "x")))


async def test_only_declared_fields_filter_and_sort_and_search_needs_a_declaration() -> None:
    class Few(Accounts):
        search_fields = ()
        filterable_fields = ("status",)
        sortable_fields = ("name",)

    dependency = list_query(Few)
    assert (await parse("status=active&sort=name", dependency)).sort == (Sort("name"),)
    assert (await parse("", dependency)).sort == ()
    for query in ("name=x", "sort=status", "search=x", "sort_order=asc"):
        with pytest.raises(InvalidQueryError):
            await parse(query, dependency)


async def test_a_field_that_is_called_like_a_control_is_filtered_by_its_operators() -> None:
    @dataclass
    class Rule:
        id: int
        limit: int

    class Rules(BaseRepository[Rule]):
        pass

    query = await parse("limit=5&limit__eq=7", list_query(Rules))
    assert query.page is not None
    assert query.page.limit == 5
    assert query.criteria == [Comparison("limit", Operator.EQ, 7)]


@pytest.mark.parametrize(
    ("attributes", "arguments"),
    [
        ({"filterable_fields": ("secret",)}, {}),
        ({"filterable_fields": ("missing",)}, {}),
        ({"filterable_fields": ("labels",)}, {}),
        ({"sortable_fields": ("missing",)}, {}),
        ({"search_fields": ("age",)}, {}),
        ({"search_fields": ("missing",)}, {}),
        ({}, {"default_sort": "missing"}),
        ({}, {"default_sort": "secret"}),
        ({}, {"default_limit": 101}),
        ({}, {"max_limit": 0}),
    ],
)
def test_a_wrong_declaration_is_refused_at_once(attributes: dict[str, Any], arguments: dict[str, Any]) -> None:
    def declare() -> None:
        repository = type("Wrong", (Accounts,), attributes)  # some are refused by the repository already
        list_query(repository, **arguments)

    with pytest.raises((ValueError, TypeError), match=r"Wrong|default_limit|max_limit"):
        declare()


async def test_counting_is_the_services_choice_and_a_capped_total_says_so() -> None:
    query = await parse("", list_query(Accounts, count="none"))
    assert query.page is not None
    assert query.page.count == "none"
    page = Page[Account](items=[], total=9, limit=1, offset=0, has_next=True, has_prev=False, total_is_capped=True)
    shown = PageResponse[AccountShown].model_validate(page)
    assert shown.model_dump()["total_is_capped"] is True
    assert "total_is_capped" not in shown.model_copy(update={"total_is_capped": False}).model_dump()


async def test_a_query_takes_the_endpoints_own_criteria_besides() -> None:
    async with InMemorySession() as session:
        await fill(session)
        query = await parse("sort=id&status=active")
        page = await query.page_of(Accounts(session), Comparison("id", Operator.LT, 5))
        assert [account.id for account in page.items] == [2, 4]


# The OpenAPI document


@pytest.fixture(scope="module")
def parameters() -> dict[str, Any]:
    document = application(InMemorySession()).openapi()
    return {item["name"]: item for item in document["paths"]["/api/accounts"]["get"]["parameters"]}


def test_every_parameter_is_documented_with_type_bounds_and_description(parameters: dict[str, Any]) -> None:
    assert parameters["limit"]["schema"] == {"type": "integer", "minimum": 1, "maximum": 100, "default": 20}
    assert parameters["offset"]["schema"]["minimum"] == 0
    assert parameters["search"]["schema"]["maxLength"] == 100
    assert parameters["sort_by"]["schema"]["enum"][:2] == ["id", "name"]
    assert parameters["status"]["schema"] == {"type": "string", "enum": ["active", "closed"]}
    assert parameters["created_at__ge"]["schema"] == {"type": "string", "format": "date-time"}
    assert parameters["age__is_null"]["schema"] == {"type": "boolean"}
    assert parameters["age__in"]["explode"] is False
    assert all(item["description"] and item["in"] == "query" for item in parameters.values())


def test_only_operators_that_make_sense_for_the_type_are_documented(parameters: dict[str, Any]) -> None:
    def operators(name: str) -> set[str]:
        return {item.removeprefix(name).removeprefix("__") for item in parameters if item.split("__")[0] == name}

    ordered = {"", "ne", "lt", "le", "gt", "ge", "in", "not_in", "between", "is_null"}
    assert operators("age") == ordered
    assert operators("name") == ordered | {"contains", "icontains", "starts_with"}
    assert operators("verified") == {"", "ne", "is_null"}
    assert operators("status") == operators("token") == {"", "ne", "in", "not_in", "is_null"}
    assert not operators("secret")
    assert not operators("labels")


def test_own_parameters_of_an_endpoint_stay_documented() -> None:
    document = application(InMemorySession()).openapi()
    names = [item["name"] for item in document["paths"]["/api/parsed"]["get"]["parameters"]]
    assert {"verbose", "tag", "limit", "name__contains"} <= set(names)
    assert len(names) == len(set(names))
