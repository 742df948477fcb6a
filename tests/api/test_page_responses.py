"""A page written straight from its entities is what FastAPI answers for the declared response model, byte for byte."""

import datetime as dt
import enum
import uuid
from collections import deque, namedtuple
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, make_dataclass, replace
from decimal import Decimal
from functools import cache
from types import SimpleNamespace
from typing import Annotated, Any, Generic, Literal, Self, TypeVar

import attrs
import pytest
from fastapi import FastAPI
from fastapi.exceptions import ResponseValidationError
from fastapi.routing import APIRoute, serialize_response
from hypothesis import given
from hypothesis import strategies as st
from pydantic import (
    AfterValidator,
    AliasChoices,
    AliasGenerator,
    AliasPath,
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    EmailStr,
    Field,
    PlainSerializer,
    RootModel,
    ValidationInfo,
    WrapSerializer,
    computed_field,
    create_model,
    field_serializer,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic.alias_generators import to_camel
from starlette.testclient import TestClient

from fastapi_building_blocks.api import CursorPageResponse, PageResponse, page_response
from fastapi_building_blocks.api.page_responses import _writers
from fastapi_building_blocks.domain import CursorPage, Page

T = TypeVar("T")
NOON = dt.datetime(2026, 1, 1, 12, tzinfo=dt.UTC)
EARLIEST = NOON.min
LATEST = NOON.max


class Color(enum.Enum):
    RED = "red"
    NUMBER = 2


class Status(enum.StrEnum):
    ACTIVE = "active"


class Level(enum.IntEnum):
    LOW = 1


class OddText(str):
    __slots__ = ()

    def __str__(self) -> str:
        return "odd"


class OddNumber(int):
    def __repr__(self) -> str:
        return "7777"

    __str__ = __repr__


class OddDecimal(Decimal):
    def __str__(self) -> str:
        return "5"


class OddTime(dt.datetime):
    def isoformat(self, sep: str = "T", timespec: str = "auto") -> str:
        return "odd"


class OddUuid(uuid.UUID):
    def __str__(self) -> str:
        return "odd"


class OddZone(dt.tzinfo):
    def utcoffset(self, _: dt.datetime | None) -> dt.timedelta:
        return dt.timedelta(hours=1, seconds=13)

    def dst(self, _: dt.datetime | None) -> None:
        return None


class Point(BaseModel):
    model_config = ConfigDict(from_attributes=True)

    x: int
    y: float | None = None


@dataclass(slots=True)
class Place:
    x: Any
    y: Any


@cache
def route(response_model: Any) -> APIRoute:
    return APIRoute("/", lambda: None, response_model=response_model)


def as_fastapi(page: Any, response_model: Any) -> Any:
    """What FastAPI writes for a page, or the error that it raises."""
    field = route(response_model).response_field
    writing = serialize_response(field=field, response_content=page, dump_json=True)
    return outcome(lambda: writing.send(None))


def outcome(answer: Callable[[], Any]) -> Any:
    try:
        return answer()
    except StopIteration as done:
        return done.value
    except ResponseValidationError as error:
        return [(item["type"], item["loc"], item["msg"]) for item in error.errors()]
    except Exception as error:  # noqa: BLE001 - whatever it is, both raise it
        return type(error), str(error)


def assert_same(model: Any, *entities: Any) -> Any:
    """Hold both answers against each other, for both kinds of page."""
    of_cursor = CursorPage(list(entities), "next", None)
    page = Page(list(entities), None, 100, 0, has_next=False, has_prev=True)
    straight = outcome(lambda: page_response(of_cursor, model).body)
    assert straight == as_fastapi(of_cursor, CursorPageResponse[model])
    straight = outcome(lambda: page_response(page, model).body)
    assert straight == as_fastapi(page, PageResponse[model])
    return straight


def is_straight(model: Any, entity_class: type) -> bool:
    return _writers.get((PageResponse, model, entity_class)) is not None


# Any value for any type

HOSTILE: list[Any] = [
    *(None, True, False, 0, 1, -1, 2**31, 2**63, 2**64, 10**30, -(10**400), 10**5000),
    *(1.0, -0.0, 1.5, 1e22, 1e300, 5e-324, float("nan"), float("inf"), float("-inf")),
    *("", "a", "1", "true", "é", "\u2028", '\x00\x1f"\\\x7f', "😀", "\ud800", "x" * 5000, " padded ", "a@b.de"),
    *(b"a", b"\xff", bytearray(b"a"), OddText("a"), OddNumber(1)),
    *(Color.RED, Color.NUMBER, Status.ACTIVE, Level.LOW, "red", "active"),
    *(uuid.UUID(int=1), OddUuid(int=1), str(uuid.UUID(int=1))),
    *(NOON, NOON.replace(tzinfo=None), NOON.replace(fold=1), NOON.replace(microsecond=1), EARLIEST),
    *(
        LATEST,
        "2026-01-01T00:00:00Z",
        OddTime(2026, 1, 1, 5),
        OddTime(2026, 1, 1, tzinfo=dt.UTC),
    ),
    *(NOON.replace(tzinfo=zone) for zone in (dt.timezone(dt.timedelta(hours=5, minutes=30)), OddZone())),
    *(dt.date(2026, 1, 1), "2026-01-01", dt.time(1, 2, 3, 4), dt.time(1, tzinfo=dt.UTC), dt.time(1, tzinfo=OddZone())),
    *(dt.timedelta(1, 2, 3), dt.timedelta(-1), dt.timedelta.max, "P1D"),
    *(Decimal(number) for number in ("1.10", "NaN", "sNaN", "Infinity", "1E+30", "-0")),
    OddDecimal("1.5"),
    *([], [1], ["a"], [None], (1,), {1}, {}, {"a": 1}, {1: 2}, {"a": {"b": [float("nan"), NOON]}}, range(3)),
    *(object(), int, len, 1j, Place(1, None), Place("1", 2), Place(None, 1), Point(x=1), Point.model_construct(x="a")),
]

TYPES: list[Any] = [
    *(str, int, float, bool, bytes, uuid.UUID, dt.datetime, dt.date, dt.time, dt.timedelta, Decimal, Any, object),
    *(Color, Status, Level, Literal["a", 1], type(None), EmailStr, AwareDatetime, Point, Point | None),
    *(str | None, int | None, dt.datetime | None, Status | None, Decimal | None, int | str, float | bool | None),
    *(list[int], list[str] | None, dict[str, Any], dict[str, dt.datetime], tuple[int, ...], set[int], list[Point]),
    Annotated[str, Field(max_length=3)],
    Annotated[str, Field(pattern="^a")],
    Annotated[int, Field(ge=0, lt=100)],
    Annotated[int, Field(strict=True)],
    Annotated[float, Field(allow_inf_nan=False)],
    Annotated[Decimal, Field(max_digits=4, decimal_places=2)],
    Annotated[str, AfterValidator(str.upper)],
    Annotated[str, BeforeValidator(repr)],
    Annotated[int, PlainSerializer(lambda value: value * 2)],
    Annotated[dt.datetime, PlainSerializer(lambda value: value.timestamp())],
    Annotated[str, WrapSerializer(lambda value, serialize: f"<{serialize(value)}>")],
    Annotated[str, PlainSerializer(lambda value: value, when_used="unless-none")] | None,
]


class Entity:
    """Whatever it is given, as attributes."""

    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)


def modelled(annotation: Any, default: Any = ..., **config: Any) -> Any:
    return create_model("Shown", x=(annotation, default), __config__=ConfigDict(**config))


MODELS = [modelled(annotation) for annotation in TYPES]
MODEL_IDS = [f"{number}-{getattr(annotation, '__name__', '')}" for number, annotation in enumerate(TYPES)]


@pytest.mark.parametrize("model", MODELS, ids=MODEL_IDS)
def test_every_hostile_value_is_answered_as_fastapi_answers_it(model: Any):
    for value in HOSTILE:
        assert_same(model, Entity(x=value))


@pytest.mark.parametrize("model", MODELS, ids=MODEL_IDS)
def test_a_hostile_value_between_fitting_ones_is_answered_as_fastapi_answers_it(model: Any):
    fitting = [value for value in HOSTILE if isinstance(assert_same(model, Entity(x=value)), bytes)]
    assert isinstance(assert_same(model, *(Entity(x=value) for value in fitting)), bytes)
    for value in HOSTILE[::3]:
        assert_same(model, *(Entity(x=fit) for fit in fitting[:2]), Entity(x=value))


@pytest.mark.parametrize(
    "config",
    [
        {"strict": True},
        {"str_strip_whitespace": True},
        {"str_to_upper": True},
        {"str_max_length": 3},
        {"coerce_numbers_to_str": True},
        {"allow_inf_nan": False},
        {"ser_json_inf_nan": "strings"},
        {"ser_json_inf_nan": "constants"},
        {"ser_json_timedelta": "float"},
        {"ser_json_temporal": "milliseconds"},
        {"ser_json_bytes": "base64"},
        {"use_enum_values": True},
        {"revalidate_instances": "always"},
        {"frozen": True},
        {"extra": "forbid"},
        {"extra": "allow"},
        {"from_attributes": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("annotation", [str, float, dt.timedelta, dt.datetime, bytes, Color, Status | None, Any])
def test_a_models_configuration_is_kept(annotation: Any, config: dict[str, Any]):
    model = modelled(annotation, **config)
    for value in HOSTILE:
        assert_same(model, Entity(x=value))


# Whole rows


class Wide(BaseModel):
    model_config = ConfigDict(from_attributes=True)

    id: uuid.UUID
    name: str
    nick: str | None
    age: int
    ratio: float
    balance: Decimal
    active: bool
    status: Status
    color: Color | None = None
    born: dt.date
    created_at: dt.datetime
    updated_at: dt.datetime | None = None
    slept: dt.timedelta
    labels: dict[str, Any]
    points: list[Point]


WIDE = make_dataclass("WideEntity", list(Wide.model_fields), slots=True)
zones = st.one_of(
    st.none(), st.just(dt.UTC), st.integers(-1439, 1439).map(lambda m: dt.timezone(dt.timedelta(minutes=m)))
)
texts = st.text(st.characters())
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=5,
)
fitting_entities = st.builds(
    WIDE,
    id=st.uuids(),
    name=texts,
    nick=st.none() | texts,
    age=st.integers(),
    ratio=st.floats(),
    balance=st.decimals(allow_nan=False, allow_infinity=False),
    active=st.booleans(),
    status=st.sampled_from(Status),
    color=st.none() | st.sampled_from(Color),
    born=st.dates(),
    created_at=st.datetimes(timezones=zones),
    updated_at=st.none() | st.datetimes(timezones=zones),
    slept=st.timedeltas(),
    labels=st.dictionaries(texts, json_values, max_size=3),
    points=st.lists(st.builds(Place, x=st.integers(), y=st.none() | st.floats()), max_size=2),
)


@given(st.lists(fitting_entities, max_size=4))
def test_rows_of_any_fitting_values_are_the_same(entities: list[Any]):
    assert_same(Wide, *entities)


@given(
    st.lists(fitting_entities, min_size=1, max_size=3),
    st.integers(min_value=0),
    st.sampled_from(sorted(Wide.model_fields)),
    st.sampled_from(HOSTILE),
)
def test_one_wrong_value_in_a_row_is_answered_as_fastapi_answers_it(
    entities: list[Any], row: int, name: str, value: Any
):
    setattr(entities[row % len(entities)], name, value)
    assert_same(Wide, *entities)


def test_most_models_are_written_without_a_model_per_row():
    made = WIDE(
        *(uuid.UUID(int=1), "Ada", None, 36, 0.5, Decimal("1.10"), True, Status.ACTIVE, None, dt.date(2026, 1, 1)),
        *(NOON, None, dt.timedelta(1), {"a": [1]}, [Place(1, 2.0)]),
    )
    body = assert_same(Wide, made, made)
    assert body.startswith(b'{"items":[{"id":"00000000-0000-0000-0000-000000000001","name":"Ada","nick":null,"age":36,')
    assert is_straight(Wide, WIDE)


# What a model can be


class Aliased(BaseModel):
    first_name: str = Field(alias="firstName")
    last_name: str = Field(serialization_alias="lastName")
    odd: int = Field(alias="odd name")
    word: int = Field(alias="class")


class ByName(BaseModel):
    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True)

    first_name: str
    age: int | None


class OnlyByName(BaseModel):
    model_config = ConfigDict(alias_generator=to_camel, validate_by_alias=False, validate_by_name=True)

    first_name: str


class ShownAsCamel(BaseModel):
    model_config = ConfigDict(alias_generator=AliasGenerator(serialization_alias=to_camel))

    first_name: str


class FromPath(BaseModel):
    x: int = Field(validation_alias=AliasPath("numbers", 1))


class FromChoice(BaseModel):
    x: int = Field(validation_alias=AliasChoices("other", "x"))


class Defaults(BaseModel):
    x: int = 5
    y: list[int] = Field(default_factory=list)
    z: str | None = None


class Hiding(BaseModel):
    x: int
    secret: str = Field(exclude=True)
    empty: list[int] = Field(exclude_if=lambda value: not value)
    flag: bool = Field(default=False, exclude_if=lambda value: not value)


class Computed(BaseModel):
    x: int

    @computed_field
    @property
    def double(self) -> int:
        return self.x * 2


class FieldSerializer(BaseModel):
    x: int
    y: int

    @field_serializer("x")
    def _with_y(self, value: int) -> str:
        return f"{value} of {self.y}"


class FieldValidator(BaseModel):
    x: int
    y: int

    @field_validator("y")
    @classmethod
    def _twice(cls, value: int) -> int:
        return value * 2


class FieldValidatorWithInfo(BaseModel):
    x: int
    y: int

    @field_validator("y")
    @classmethod
    def _plus_x(cls, value: int, info: ValidationInfo) -> int:
        return value + int(info.data["x"])


class ModelValidator(BaseModel):
    x: int

    @model_validator(mode="after")
    def _twice(self) -> Self:
        self.x *= 2
        return self


class ModelValidatorBefore(BaseModel):
    x: int

    @model_validator(mode="before")
    @classmethod
    def _other(cls, value: Any) -> Any:
        return {"x": value.x + 1}


class ModelSerializer(BaseModel):
    x: int

    @model_serializer
    def _as_text(self) -> str:
        return f"x is {self.x}"


class PostInit(BaseModel):
    x: int

    def model_post_init(self, _: Any) -> None:
        self.x += 1


class OwnInit(BaseModel):
    x: int

    def __init__(self, **values: Any) -> None:
        super().__init__(**{name: value + 1 for name, value in values.items()})


class Tree(BaseModel):
    x: int
    color: Color
    other_color: Color
    point: Point | None
    other_point: Point
    children: list["Tree"]


class Boxed(BaseModel, Generic[T]):
    x: T


class Twice(BaseModel):
    x: Annotated[int, AfterValidator(lambda value: value * 2)]


class Number(RootModel[int]):
    pass


class Many(BaseModel):
    x: int | str
    model_config = ConfigDict(title="Many")


@dataclass
class ShownDataclass:
    x: int


def tree(x: Any, *children: Any) -> Entity:
    return Entity(
        x=x, color=Color.RED, other_color=Color.NUMBER, point=None, other_point=Place(1, 2), children=children
    )


@attrs.define
class AttrsEntity:
    x: Any


class PydanticEntity(BaseModel):
    x: Any


class PointLike(PydanticEntity):
    y: Any = None


class SlotsEntity:
    __slots__ = ("age", "firstName", "first_name")

    def __init__(self, **values: Any) -> None:
        for name, value in values.items():
            setattr(self, name, value)


class Dynamic:
    def __getattr__(self, name: str) -> Any:
        return {"x": 3, "firstName": "dynamic", "age": 1}.get(name, 4)


class Raising:
    @property
    def x(self) -> int:
        raise ValueError("no")


class Mapped(dict[str, Any]):
    x = 7


row = namedtuple("row", ["x", "y"])
named = {"firstName": "A", "first_name": "B", "last_name": "C", "lastName": "D", "odd name": 1, "class": 2, "age": 3}


CASES: list[tuple[Any, Any, bool]] = [
    (Aliased, Entity(**named), True),
    (Aliased, Entity(first_name="B", last_name="C", odd=1, word=2), True),
    (ByName, Entity(first_name="B", age=3), True),
    (ByName, Entity(firstName="A", age=3), False),
    (ByName, Entity(**named), False),
    (ByName, SlotsEntity(first_name="B", age=None), True),
    (ByName, Dynamic(), False),
    (OnlyByName, Entity(**named), True),
    (ShownAsCamel, Entity(**named), True),
    (FromPath, Entity(numbers=[1, 2], x=3), False),
    (FromChoice, Entity(other=1, x=3), False),
    (Defaults, Entity(x=1, y=[2], z="3"), True),
    (Defaults, Entity(x=None, y=[2], z=None), True),
    (Defaults, Entity(), True),
    (Hiding, Entity(x=1, secret="s", empty=[], flag=False), True),
    (Hiding, Entity(x=1, secret="s", empty=[1], flag=1), True),
    (Hiding, Entity(x=1, secret=2, empty=[], flag=False), True),
    (Hiding, Entity(x=1, secret="s", empty="", flag=False), True),
    (Hiding, Entity(x=1, secret="s", empty=[], flag=None), True),
    (Computed, Entity(x=1, double=7), False),
    (FieldSerializer, Entity(x=1, y=2), False),
    (FieldValidator, Entity(x=1, y=2), True),
    (FieldValidatorWithInfo, Entity(x=1, y=2), False),
    (ModelValidator, Entity(x=1), False),
    (ModelValidatorBefore, Entity(x=1), False),
    (ModelSerializer, Entity(x=1), False),
    (PostInit, Entity(x=1), False),
    (OwnInit, Entity(x=1), False),
    (Tree, tree(1, tree(2), tree(3)), True),
    (Tree, tree(1, tree("a")), True),
    (Boxed[int], Entity(x=1), False),
    (Boxed[int], Boxed[Any](x="2"), False),
    (Twice, Twice.model_construct(x=1), False),
    (Twice, type("More", (Twice,), {}).model_construct(x=1), False),
    (Twice, Entity(x=1), True),
    (Number, 5, False),
    (Many, Entity(x=1), True),
    (ShownDataclass, Entity(x=1), False),
    (int, 5, False),
    (Point | Twice, Entity(x=1), False),
    (Point, AttrsEntity(1), True),
    (Point, PydanticEntity(x=1), True),
    (Point, PointLike(x=1), True),
    (Point, row(1, 2.5), True),
    (Point, (1, 2), False),
    (Point, SimpleNamespace(x=1, y=None), True),
    (Point, Dynamic(), True),
    (Point, Raising(), False),
    (Point, {"x": 1}, False),
    (Point, Mapped(x=1), False),
    (Point, "text", False),
    (Point, None, False),
    (Twice, [1], False),
]


@pytest.mark.parametrize(
    ("model", "entity", "straight"),
    CASES,
    ids=[f"{getattr(model, '__name__', model)}-{number}" for number, (model, _, _) in enumerate(CASES)],
)
def test_a_model_and_an_entity_of_any_make_are_answered_as_fastapi_answers_them(
    model: Any, entity: Any, straight: bool
):
    _writers.clear()
    assert_same(model, entity, entity)
    assert is_straight(model, type(entity)) is straight


# Pages and applications


def test_a_page_of_several_classes_none_or_an_odd_list_is_the_same():
    assert_same(Point)
    assert_same(Point, Place(1, 2), Entity(x=1, y=2), Point(x=1), {"x": 1})
    for items in [(Place(1, 2),), {Point: 1}, deque([Place(1, 2)]), iter([Place(1, 2)]), "text", None, 5]:
        made = [Page(copy(items), 1, 1, 0, False, False) for _ in range(2)]
        assert outcome(lambda page=made[0]: page_response(page, Point).body) == as_fastapi(made[1], PageResponse[Point])


@pytest.mark.parametrize("value", [None, "5", True, 1.0, 1.5, 2**70, "no"])
@pytest.mark.parametrize("name", ["total", "limit", "offset", "has_next", "has_prev", "total_is_capped"])
def test_the_page_itself_is_held_to_its_model(name: str, value: Any):
    page = replace(Page([Place(1, 2)], 1, 1, 0, has_next=False, has_prev=False), **{name: value})
    assert outcome(lambda: page_response(page, Point).body) == as_fastapi(page, PageResponse[Point])


def test_a_value_that_changes_in_the_same_class_is_noticed_each_time():
    for first, second in [(1, "2"), (None, 2.0), ("3", None), (Decimal(4), True)]:
        model = modelled(float | None)
        assert_same(model, Entity(x=first))
        assert_same(model, Entity(x=second))
        assert_same(model, Entity(x=first), Entity(x=second))


def test_an_alias_is_preferred_where_one_entity_has_it():
    named = Entity(first_name="B", age=3)
    assert b'"A"' in assert_same(ByName, named, Entity(first_name="B", firstName="A", age=3), named)


def test_an_application_answers_the_same_and_documents_its_model():
    app = FastAPI()
    pages = [
        Page([Place(1, 0.5)], 1, 1, 0, has_next=False, has_prev=False),
        Page([Place("no", 0.5)], 1, 1, 0, has_next=False, has_prev=False),
        CursorPage([Place(1, None)], "next", None),
    ]

    @app.get("/declared/{number}", response_model=PageResponse[Point] | CursorPageResponse[Point])
    async def listed(number: int) -> Any:
        return pages[number]

    @app.get("/straight/{number}", response_model=PageResponse[Point] | CursorPageResponse[Point], name="listed")
    async def listed_straight(number: int) -> Any:
        return page_response(pages[number], Point)

    client = TestClient(app, raise_server_exceptions=False)
    for number, status in enumerate([200, 500, 200]):
        answers = [client.get(f"/{kind}/{number}") for kind in ("declared", "straight")]
        assert {answer.status_code for answer in answers} == {status}
        assert answers[0].content == answers[1].content
        assert answers[0].headers == answers[1].headers
    paths = app.openapi()["paths"]
    responses = [
        paths[f"/{kind}/{{number}}"]["get"]["responses"]["200"]["content"] for kind in ("declared", "straight")
    ]
    assert responses[0]["application/json"]["schema"]["anyOf"] == responses[1]["application/json"]["schema"]["anyOf"]
