import copy
import dataclasses
import enum
import pickle
import uuid
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from decimal import Decimal
from typing import Annotated, Any, ClassVar, Generic, Literal, NewType, Optional, TypeVar

import attrs
import pydantic
import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st
from typing_extensions import TypeAliasType

from fastapi_building_blocks.domain import InvalidInputError
from fastapi_building_blocks.infrastructure.database.types import ExactDecimal, UtcDateTime
from fastapi_building_blocks.infrastructure.persistence.repositories.row_mapping import MISSING, RowMapping


class Status(enum.StrEnum):
    ACTIVE = "active"
    GONE = "gone"


class Colour(enum.Enum):
    RED = "r"


users = sa.Table(
    "users",
    sa.MetaData(),
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("name", sa.String(10), nullable=False),
    sa.Column("status", sa.String(10), nullable=False),
    sa.Column("created_at", UtcDateTime()),
)
NOW = datetime(2026, 1, 2, 3, 4, 5, 6, UTC)


@dataclasses.dataclass
class PlainUser:
    id: int
    name: str
    status: Status = Status.ACTIVE
    created_at: datetime | None = None
    kinds: ClassVar[int] = 3


@dataclasses.dataclass(frozen=True)
class FrozenUser:
    id: int
    name: str
    status: Status = Status.ACTIVE
    created_at: datetime | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SlottedUser:
    id: int
    name: str
    status: Optional[Status] = Status.ACTIVE  # noqa: UP045 - both spellings of an optional field are met
    created_at: datetime | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class _Named:
    id: int
    name: str


@dataclasses.dataclass(frozen=True, slots=True)
class InheritingUser(_Named):
    status: Status = Status.ACTIVE
    created_at: datetime | None = None


K = TypeVar("K")


@dataclasses.dataclass
class GenericUser(Generic[K]):
    id: K
    name: str
    status: Status = Status.ACTIVE
    created_at: datetime | None = None


class HookedUser:
    """Its ``__init_subclass__`` must not run because a repository was made."""

    seen: ClassVar[list[type]] = []

    def __init_subclass__(cls) -> None:
        HookedUser.seen.append(cls)


@dataclasses.dataclass(frozen=True)
class HookedFrozenUser(HookedUser):
    id: int
    name: str
    status: Status = Status.ACTIVE
    created_at: datetime | None = None


@attrs.define
class AttrsUser:
    id: int
    name: str
    status: Status = Status.ACTIVE
    created_at: datetime | None = None


@attrs.frozen
class FrozenAttrsUser:
    id: int
    name: str
    status: Status = Status.ACTIVE
    created_at: datetime | None = None


@attrs.define
class PrivateAttrsUser:
    id: int
    _name: str = attrs.field(validator=attrs.validators.instance_of(str))
    status: Status = Status.ACTIVE
    created_at: datetime | None = None


class ModelUser(pydantic.BaseModel):
    id: int
    name: str = pydantic.Field(alias="userName", max_length=10)
    status: Status = Status.ACTIVE
    created_at: datetime | None = None

    def __init__(self, **values: Any) -> None:
        if "name" in values:
            values["userName"] = values.pop("name")
        super().__init__(**values)


class FrozenModelUser(pydantic.BaseModel, frozen=True, extra="allow"):
    id: int
    name: str
    status: Status = Status.ACTIVE
    created_at: datetime | None = None
    _loaded: bool = pydantic.PrivateAttr(default=False)

    def model_post_init(self, _context: Any) -> None:
        self._loaded = True


USERS: list[Any] = [
    PlainUser,
    FrozenUser,
    SlottedUser,
    InheritingUser,
    GenericUser,
    HookedFrozenUser,
    AttrsUser,
    FrozenAttrsUser,
    PrivateAttrsUser,
    ModelUser,
    FrozenModelUser,
]


def stored(mapping: RowMapping[Any]) -> list[None]:
    return [None] * len(mapping.columns)


def table(*columns: sa.Column[Any]) -> sa.Table:
    return sa.Table("things", sa.MetaData(), sa.Column("id", sa.Integer, primary_key=True), *columns)


@pytest.mark.parametrize("kind", USERS)
class TestEveryKindOfEntity:
    def test_goes_into_a_row_and_comes_back_equal(self, kind: Any) -> None:
        mapping = RowMapping(kind, users)
        entity = kind(id=1, name="Ada", status=Status.GONE, created_at=NOW)
        row = mapping.dump(entity)
        assert row == (1, "Ada", "gone", NOW)
        assert type(row[2]) is str
        (loaded,) = mapping.loader(stored(mapping))([row])
        assert loaded == entity
        assert type(loaded) is kind
        assert loaded.status is Status.GONE
        assert repr(loaded) == repr(entity)
        assert mapping.one(stored(mapping))(row) == entity

    def test_has_a_key(self, kind: Any) -> None:
        assert RowMapping(kind, users).key_of(kind(id=7, name="Ada")) == 7

    def test_is_refused_with_a_value_that_its_column_cannot_hold(self, kind: Any) -> None:
        mapping = RowMapping(kind, users)
        for name, value in [("name", "a" * 11), ("id", 2**31), ("created_at", NOW.replace(tzinfo=None))]:
            values: dict[str, Any] = {"id": 1, "name": "Ada", "status": Status.ACTIVE, "created_at": None}
            entity = mapping.one(stored(mapping))(list((values | {name: value}).values()))
            with pytest.raises(InvalidInputError) as refusal:
                mapping.dump(entity)
            assert refusal.value.fields == (name,)

    def test_extends_the_derived_mapping(self, kind: Any) -> None:
        mapping = RowMapping(kind, users)
        entity = kind(id=1, name="Ada", created_at=NOW)
        assert mapping.to_dict(entity) == {"id": 1, "name": "Ada", "status": "active", "created_at": NOW}
        assert mapping.load((1, "Ada", "active", NOW)) == entity


def test_making_a_mapping_runs_no_code_of_the_entity_class() -> None:
    before = list(HookedUser.seen)
    RowMapping(HookedFrozenUser, users).loader([None] * 4)
    assert HookedUser.seen == before


def test_a_frozen_entity_is_frozen_when_it_was_loaded() -> None:
    for kind in (FrozenUser, SlottedUser, InheritingUser, HookedFrozenUser, FrozenAttrsUser):
        loaded = RowMapping(kind, users).one([None] * 4)((1, "Ada", "active", None))
        with pytest.raises(AttributeError):
            loaded.name = "Eve"  # type: ignore[misc]
        assert hash(loaded) == hash(kind(id=1, name="Ada"))


def test_a_loaded_model_behaves_like_a_constructed_one() -> None:
    load = RowMapping(FrozenModelUser, users).loader([None] * 4)
    first, second = load([(1, "Ada", "active", None), (2, "Eve", "gone", None)])
    assert first._loaded
    assert first.model_dump_json() == FrozenModelUser(id=1, name="Ada").model_dump_json()
    assert first.model_copy(update={"id": 2}).id == 2
    assert first.model_fields_set == set(FrozenModelUser.model_fields)
    assert first.model_fields_set is not second.model_fields_set
    assert first.model_extra == {}


def test_post_init_runs_and_gives_way_to_what_is_stored() -> None:
    @dataclasses.dataclass(frozen=True)
    class Person:
        id: int
        first: str
        full: str = dataclasses.field(init=False)

        def __post_init__(self) -> None:
            object.__setattr__(self, "full", self.first.upper())
            object.__setattr__(self, "noted", True)

    mapping = RowMapping(Person, table(sa.Column("first", sa.String(9)), sa.Column("full", sa.String(9))))
    person: Any = mapping.one([None] * 3)((1, "ada", "Ada L."))
    assert (person.full, person.noted) == ("Ada L.", True)
    assert mapping.dump(Person(1, "ada")) == (1, "ada", "ADA")


def test_attrs_post_init_runs() -> None:
    @attrs.define(slots=False)
    class Person:
        id: int
        first: str

        def __attrs_post_init__(self) -> None:
            self.noted = True

    person: Any = RowMapping(Person, table(sa.Column("first", sa.String(9)))).one([None] * 2)((1, "ada"))
    assert person.noted


def test_an_attrs_class_that_caches_its_hash_is_hashable_when_loaded() -> None:
    for slots in (True, False):
        kind: Any = attrs.make_class(
            "Thing",
            {"id": attrs.field(), "name": attrs.field()},
            frozen=True,
            cache_hash=True,
            unsafe_hash=True,
            slots=slots,
        )
        loaded = RowMapping(kind, table(sa.Column("name", sa.String(9)))).one([None] * 2)((1, "x"))
        assert hash(loaded) == hash(kind(1, "x"))


def test_field_names_that_are_no_python_words_work() -> None:
    names = ("first name", "class", "it's")
    fields: dict[str, Any] = dict.fromkeys(names, (str, ...))
    model = pydantic.create_model("Odd", id=(int, ...), **fields)
    mapping = RowMapping(model, table(*(sa.Column(name, sa.String(9)) for name in names)))
    row = (1, "Ada", "b", "c")
    assert mapping.dump(mapping.load(row)) == row


class TestMisuse:
    def test_a_mismatch_names_both_sides_and_the_remedy(self) -> None:
        @dataclasses.dataclass
        class User:
            id: int
            name: str
            nickname: str = ""

        with pytest.raises(TypeError) as error:
            RowMapping(User, users)
        message = str(error.value)
        assert "User" in message
        assert "'users'" in message
        assert "fields without a column: nickname" in message
        assert "columns without a field: status, created_at" in message
        assert "_row_to_entity() and _entity_to_dict()" in message

    def test_a_table_without_a_primary_key_is_refused(self) -> None:
        keyless = sa.Table("keyless", sa.MetaData(), sa.Column("id", sa.Integer))
        with pytest.raises(ValueError, match="'keyless' has no primary key"):
            RowMapping(PlainUser, keyless)

    def test_a_class_without_declared_fields_needs_both_mappers(self) -> None:
        class User:
            pass

        with pytest.raises(TypeError, match="User is no dataclass"):
            RowMapping(User, users)
        with pytest.raises(TypeError, match="User is no dataclass"):
            RowMapping(User, users, row_to_entity=lambda row: User())
        RowMapping(User, users, row_to_entity=lambda row: User(), entity_to_dict=lambda user: {})

    def test_an_argument_that_is_not_kept_needs_both_mappers(self) -> None:
        @dataclasses.dataclass
        class User:
            id: int
            seed: dataclasses.InitVar[int]

        with pytest.raises(TypeError, match="seed"):
            RowMapping(User, table())

    def test_a_type_that_no_column_keeps_needs_both_mappers(self) -> None:
        class Money:
            pass

        @dataclasses.dataclass
        class Thing:
            id: int
            price: Money

        with pytest.raises(TypeError, match="price"):
            RowMapping(Thing, table(sa.Column("price", sa.String(9))))

    def test_a_hand_written_mapper_that_answers_an_unknown_column_is_told(self) -> None:
        mapping = RowMapping(PlainUser, users, entity_to_dict=lambda user: {"id": 1, "nmae": "Ada"})
        with pytest.raises(TypeError, match=r"answers nmae.*id, name, status, created_at"):
            mapping.dump(PlainUser(1, "Ada"))


class TestHandWrittenMappers:
    def test_a_row_is_readable_by_attribute_name_and_position(self) -> None:
        rows: list[Any] = []
        mapping = RowMapping(PlainUser, users, rows.append, lambda user: {})
        mapping.loader([None, str.upper, None, None])([(1, "Ada", "active", None)])
        (row,) = rows
        assert (row.id, row.name, row["name"], row[1], row[-1]) == (1, "ADA", "ADA", "ADA", None)
        assert dict(row) == {"id": 1, "name": "ADA", "status": "active", "created_at": None}
        assert {**row} == dict(row)
        assert tuple(row) == (1, "ADA", "active", None)
        assert len(row) == 4
        assert "ADA" in repr(row)
        with pytest.raises(KeyError):
            row["nmae"]
        with pytest.raises(AttributeError):
            _ = row.nmae

    def test_columns_with_odd_names_are_readable_too(self) -> None:
        odd = table(sa.Column("class", sa.Integer), sa.Column("first name", sa.String(9)), sa.Column("_x", sa.Integer))
        rows: list[Any] = []
        RowMapping(PlainUser, odd, rows.append, lambda user: {}).one([None] * 4)((1, 2, "Ada", 3))
        (row,) = rows
        assert dict(row) == {"id": 1, "class": 2, "first name": "Ada", "_x": 3}
        assert getattr(row, "class") == 2
        assert row._x == 3

    def test_what_is_left_out_is_missing_and_the_rest_is_checked(self) -> None:
        mapping = RowMapping(PlainUser, users, entity_to_dict=lambda user: {"name": user.name, "status": user.status})
        assert mapping.dump(PlainUser(1, "Ada")) == (MISSING, "Ada", "active", MISSING)
        with pytest.raises(InvalidInputError) as refusal:
            mapping.dump(PlainUser(1, "Ada\0"))
        assert refusal.value.fields == ("name",)

    def test_one_of_the_two_may_be_derived(self) -> None:
        reads = RowMapping(PlainUser, users, row_to_entity=lambda row: PlainUser(row.id, row.name.upper()))
        assert reads.one([None] * 4)((1, "Ada", "active", None)).name == "ADA"
        assert reads.dump(PlainUser(1, "Ada")) == (1, "Ada", "active", None)
        writes = RowMapping(PlainUser, users, entity_to_dict=lambda user: {"id": user.id, "name": "x"})
        assert writes.one([None] * 4)((1, "Ada", "active", None)) == PlainUser(1, "Ada")
        assert writes.key_of(PlainUser(5, "Ada")) == 5


class Address(pydantic.BaseModel):
    street: str = pydantic.Field(alias="streetName")
    since: datetime | None = None


@dataclasses.dataclass
class Point:
    x: int
    y: float


@dataclasses.dataclass
class Document:
    id: int
    address: Address | None = None
    points: list[Point] = dataclasses.field(default_factory=list)
    free: dict[str, Any] | None = None
    tags: tuple[str, ...] = ()


documents = table(
    sa.Column("address", sa.JSON),
    sa.Column("points", sa.JSON, nullable=False),
    sa.Column("free", sa.JSON),
    sa.Column("tags", sa.JSON),
)


class TestConversions:
    def test_nested_models_and_lists_live_in_json_columns(self) -> None:
        mapping = RowMapping(Document, documents)
        entity = Document(1, Address(streetName="Main", since=NOW), [Point(1, 2.5)], {"a": [1]}, ("x", "y"))
        row = mapping.dump(entity)
        assert row == (
            1,
            {"street": "Main", "since": "2026-01-02T03:04:05.000006Z"},
            [{"x": 1, "y": 2.5}],
            {"a": [1]},
            ["x", "y"],
        )
        assert mapping.one([None] * 5)(row) == entity
        assert mapping.one([None] * 5)((1, None, [], None, None)).address is None

    def test_a_partial_update_takes_the_model_or_its_fields(self) -> None:
        mapping = RowMapping(Document, documents)
        expected = {"street": "Main", "since": None}
        assert mapping.check("address", Address(streetName="Main")) == expected
        assert mapping.check("address", {"street": "Main"}) == expected
        assert mapping.check("address", None) is None
        for value in ({"city": "x"}, 7, Point(1, 2)):
            with pytest.raises(InvalidInputError) as refusal:
                mapping.check("address", value)
            assert refusal.value.fields == ("address",)

    def test_what_could_not_be_read_again_is_not_written(self) -> None:
        point: Any = Point(1, 2)
        point.x = "one"
        with pytest.raises(InvalidInputError) as refusal:
            RowMapping(Document, documents).dump(Document(1, points=[point]))
        assert refusal.value.fields == ("points",)

    def test_a_secret_inside_a_document_is_refused_rather_than_stored_masked(self) -> None:
        class Login(pydantic.BaseModel):
            password: pydantic.SecretStr

        @dataclasses.dataclass
        class Thing:
            id: int
            login: Login

        with pytest.raises(TypeError, match="login: a secret"):
            RowMapping(Thing, table(sa.Column("login", sa.JSON)))

    def test_an_enum_lives_in_a_text_column(self) -> None:
        @dataclasses.dataclass
        class Thing:
            id: int
            colour: Annotated[Colour | None, "of the thing"]

        mapping = RowMapping(Thing, table(sa.Column("colour", sa.String(1))))
        assert mapping.dump(Thing(1, Colour.RED)) == (1, "r")
        load = mapping.one([None] * 2)
        assert load((1, "r")).colour is Colour.RED
        assert load((1, None)).colour is None
        assert mapping.check("colour", "r") == "r"
        for value in ("x", 7, Status.ACTIVE):
            with pytest.raises(InvalidInputError) as refusal:
                mapping.check("colour", value)
            assert refusal.value.fields == ("colour",)

    def test_an_enum_column_is_left_to_sqlalchemy(self) -> None:
        @dataclasses.dataclass
        class Thing:
            id: int
            status: Status

        mapping = RowMapping(Thing, table(sa.Column("status", sa.Enum(Status))))
        assert mapping.dump(Thing(1, Status.GONE)) == (1, Status.GONE)
        assert mapping.one([None] * 2)((1, Status.GONE)) == Thing(1, Status.GONE)

    def test_fields_of_other_types_than_their_column_are_converted(self) -> None:
        class Code(str):
            __slots__ = ()

        class Thing(pydantic.BaseModel):
            id: Annotated[int, pydantic.Field(gt=0)]
            site: pydantic.HttpUrl
            mail: pydantic.EmailStr
            secret: pydantic.SecretStr
            kind: Literal["a", "b"]
            code: Any
            price: Decimal | None = None

        wide = table(
            *(sa.Column(name, sa.String(40)) for name in ("site", "mail", "secret", "kind", "code")),
            sa.Column("price", ExactDecimal(6, 2)),
        )
        mapping = RowMapping(Thing, wide)
        thing = Thing(
            id=1, site="https://example.org/", mail="a@example.org", secret="s3", kind="a", code=Code("c"), price="1.5"
        )
        row = mapping.dump(thing)
        assert row == (1, "https://example.org/", "a@example.org", "s3", "a", "c", Decimal("1.50"))
        assert [type(value) for value in row[1:6]] == [str] * 5
        loaded = mapping.one([None] * 7)(row)
        assert loaded == thing
        assert type(loaded.site) is pydantic.HttpUrl
        assert loaded.secret.get_secret_value() == "s3"

    def test_unions_new_types_and_plain_json_need_no_conversion(self) -> None:
        @dataclasses.dataclass
        class Thing:
            id: UserId
            mixed: int | str | None
            tree: Annotated[dict[str, list[int | None]], "plain"]
            choice: Literal["a"]
            alias: Text_

        columns = (sa.Column("mixed", sa.String(9)), sa.Column("tree", sa.JSON), sa.Column("choice", sa.JSON))
        mapping = RowMapping(Thing, table(*columns, sa.Column("alias", sa.String(9))))
        thing = Thing(UserId(1), "x", {"a": [1, None]}, "a", "y")
        assert mapping.dump(thing) == (1, "x", {"a": [1, None]}, "a", "y")
        assert mapping.load((1, "x", thing.tree, "a", "y")).tree is thing.tree  # nothing was rebuilt

    def test_a_secret_may_be_given_plain_in_a_partial_update(self) -> None:
        @dataclasses.dataclass
        class Thing:
            id: int
            secret: pydantic.SecretStr

        mapping = RowMapping(Thing, table(sa.Column("secret", sa.String(9))))
        assert mapping.check("secret", "s3") == mapping.check("secret", pydantic.SecretStr("s3")) == "s3"

    def test_a_type_without_a_json_schema_can_still_be_kept(self) -> None:
        @dataclasses.dataclass
        class Thing:
            id: int
            shape: Annotated[complex, pydantic.WithJsonSchema({"type": "string"})]
            pair: tuple[int, str]

        columns = (sa.Column("shape", sa.JSON), sa.Column("pair", sa.JSON))
        mapping = RowMapping(Thing, table(*columns))
        thing = Thing(1, 1 + 2j, (1, "x"))
        assert mapping.load(mapping.dump(thing)) == thing

    def test_a_subclass_of_the_columns_type_comes_back_as_such(self) -> None:
        @dataclasses.dataclass
        class Thing:
            id: int
            code: "Code"

        mapping = RowMapping(Thing, table(sa.Column("code", sa.String(9))))
        row = mapping.dump(Thing(1, Code("x")))
        assert type(row[1]) is str
        assert type(mapping.one([None] * 2)(row).code) is Code

    def test_a_name_that_cannot_be_resolved_is_taken_as_the_columns_type(self) -> None:
        @dataclasses.dataclass
        class Thing:
            id: int
            code: "Unknown"  # type: ignore[name-defined]  # noqa: F821

        mapping = RowMapping(Thing, table(sa.Column("code", sa.String(9))))
        assert mapping.one([None] * 2)((1, "x")) == Thing(1, "x")


class Code(str):
    __slots__ = ()


UserId = NewType("UserId", int)
Text_ = TypeAliasType("Text_", str)


class TestCheck:
    def test_an_unknown_name_is_named(self) -> None:
        mapping = RowMapping(PlainUser, users)
        for name in ("nickname", "kinds", "__class__", "", 7, ["id"]):
            with pytest.raises(InvalidInputError) as refusal:
                mapping.check(name, 1)  # type: ignore[arg-type]
            assert refusal.value.fields == (str(name),)

    def test_a_value_is_converted_and_checked(self) -> None:
        mapping = RowMapping(PlainUser, users)
        assert mapping.check("status", Status.GONE) == "gone"
        assert mapping.check("created_at", None) is None
        with pytest.raises(InvalidInputError) as refusal:
            mapping.check("name", 1)
        assert refusal.value.fields == ("name",)


def test_a_composite_key_is_a_tuple_in_the_order_of_the_key() -> None:
    @dataclasses.dataclass
    class Line:
        quantity: int
        order_id: uuid.UUID
        position: int

    lines = sa.Table(
        "lines",
        sa.MetaData(),
        sa.Column("quantity", sa.Integer),
        sa.Column("order_id", sa.Uuid, primary_key=True),
        sa.Column("position", sa.Integer, primary_key=True),
    )
    mapping = RowMapping(Line, lines)
    order = uuid.uuid4()
    assert mapping.key_names == ("order_id", "position")
    assert mapping.key_indexes == (1, 2)
    assert mapping.key_of(Line(5, order, 2)) == (order, 2)
    with pytest.raises(InvalidInputError):
        mapping.key_of(Line(5, order, 2**40))


class TestProcessors:
    def test_results_are_processed_but_null_is_null(self) -> None:
        mapping = RowMapping(PlainUser, users)
        load = mapping.loader([None, str.upper, str.lower, datetime.fromisoformat])
        first, second = load([(1, "Ada", "ACTIVE", NOW.isoformat()), (2, "Eve", "GONE", None)])
        assert first == PlainUser(1, "ADA", Status.ACTIVE, NOW)
        assert second == PlainUser(2, "EVE", Status.GONE, None)

    def test_a_services_own_type_decides_what_null_means(self) -> None:
        class Emptiable(sa.types.TypeDecorator[str]):
            impl = sa.String
            cache_ok = True

        @dataclasses.dataclass
        class Thing:
            id: int
            note: str

        mapping = RowMapping(Thing, table(sa.Column("note", Emptiable(9))))
        empty: Callable[[Any], Any] = lambda value: value or ""  # noqa: E731
        assert mapping.one([None, empty])((1, None)) == Thing(1, "")

    @given(
        st.integers(-(2**31), 2**31 - 1),
        st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=10),
        st.sampled_from(Status),
        st.none() | st.datetimes(timezones=st.just(UTC)),
    )
    def test_what_goes_in_comes_out(self, id: int, name: str, status: Status, at: datetime | None) -> None:
        for kind in (PlainUser, SlottedUser, ModelUser):
            mapping: RowMapping[Any] = RowMapping(kind, users)
            entity = kind(id=id, name=name, status=status, created_at=at)
            assert mapping.load(mapping.dump(entity)) == entity


def test_an_argument_is_left_as_it_was() -> None:
    entity = Document(1, None, [Point(1, 2)], {"a": [1]})
    before = dataclasses.asdict(entity)
    values: Mapping[str, Any] = dict(
        zip(RowMapping(Document, documents).names, RowMapping(Document, documents).dump(entity), strict=True)
    )
    values["free"]["a"].append(2)
    assert dataclasses.asdict(entity) == before


def test_a_copy_of_the_mark_for_a_left_out_field_is_the_mark_itself() -> None:
    for copied in (copy.copy(MISSING), copy.deepcopy([MISSING])[0], pickle.loads(pickle.dumps(MISSING))):
        assert copied is MISSING
