"""What a repository in memory takes from its declaration, with a table and without one."""

import dataclasses
import enum
import types
from collections.abc import AsyncIterator
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from typing import Any, Generic, Literal, TypeVar
from uuid import UUID, uuid4

import pydantic
import pytest
import sqlalchemy as sa

from fastapi_building_blocks.domain import (
    ConstraintError,
    CursorRequest,
    DuplicateKeyError,
    InvalidInputError,
    InvalidQueryError,
    UnsupportedOperationError,
    field,
)
from fastapi_building_blocks.infrastructure.database.in_memory_session import InMemorySession
from fastapi_building_blocks.infrastructure.database.types import UtcDateTime, version_column
from fastapi_building_blocks.infrastructure.persistence.repositories.base import BaseRepository

T = TypeVar("T")


@pytest.fixture
async def session() -> AsyncIterator[InMemorySession]:
    async with InMemorySession() as session:
        yield session


# Defaults


class Colour(enum.Enum):
    RED = "r"
    BLUE = "b"


@dataclasses.dataclass
class Thing:
    id: int | None = None
    scalar: int | None = None
    called: str | None = None
    text: str | None = None
    number: int | None = None
    decimal: Decimal | None = None
    flag: bool | None = None
    day: date | None = None
    moment: datetime | None = None
    token: UUID | None = None
    document: dict[str, Any] | None = None
    colour: Colour | None = None
    nothing: str | None = None
    touched: int | None = None


calls = iter(range(1, 1000))
things = sa.Table(
    "things",
    sa.MetaData(),
    sa.Column("id", sa.Integer(), primary_key=True),
    sa.Column("scalar", sa.Integer(), default=5),
    sa.Column("called", sa.String(), default=lambda: "called"),
    sa.Column("text", sa.String(), server_default="it's"),
    sa.Column("number", sa.Integer(), server_default=sa.text("-3")),
    sa.Column("decimal", sa.Numeric(10, 2), server_default=sa.text("'1.50'::numeric")),
    sa.Column("flag", sa.Boolean(), server_default=sa.true()),
    sa.Column("day", sa.Date(), server_default=sa.func.current_date()),
    sa.Column("moment", UtcDateTime(), server_default=sa.func.now()),
    sa.Column("token", sa.Uuid(), server_default=sa.text("gen_random_uuid()")),
    sa.Column("document", sa.JSON(), server_default=sa.text("'{\"a\": [1]}'")),
    sa.Column("colour", sa.Enum(Colour), server_default="BLUE"),
    sa.Column("nothing", sa.String(), server_default=sa.text("NULL")),
    sa.Column("touched", sa.Integer(), onupdate=lambda: next(calls)),
)


class Things(BaseRepository[Thing]):
    table = things


async def test_defaults_of_column_and_server_fill_what_is_none(session: InMemorySession) -> None:
    stored = await Things(session).add(Thing())
    now = datetime.now(UTC)
    assert isinstance(stored.token, UUID)
    assert stored.moment is not None
    assert timedelta(0) <= now - stored.moment < timedelta(minutes=1)
    assert stored == Thing(
        id=1, scalar=5, called="called", text="it's", number=-3, decimal=Decimal("1.50"), flag=True,
        day=now.date(), moment=stored.moment, token=stored.token, document={"a": [1]}, colour=Colour.BLUE,
    )  # fmt: skip


async def test_a_given_value_wins_over_a_default_and_an_update_writes_none(session: InMemorySession) -> None:
    stored = await Things(session).add(Thing(scalar=0, text="", flag=False))
    assert (stored.scalar, stored.text, stored.flag) == (0, "", False)
    assert (await Things(session).patch(1, {"text": None})).text is None
    assert (await Things(session).update(dataclasses.replace(stored, scalar=None))).scalar is None


async def test_onupdate_runs_with_every_update_unless_given(session: InMemorySession) -> None:
    stored = await Things(session).add(Thing())
    assert stored.touched is None
    first = (await Things(session).patch(1, {"scalar": 1})).touched
    second = (await Things(session).patch(1, {"scalar": 2})).touched
    assert first is not None
    assert second == first + 1
    assert (await Things(session).patch(1, {"touched": 77})).touched == 77


async def test_an_upsert_is_no_update_to_onupdate_and_defaults_of_what_is_there(session: InMemorySession) -> None:
    @dataclasses.dataclass
    class Paper:
        id: int
        title: str
        stamp: int | None = None

    class Papers(BaseRepository[Paper]):
        table = sa.Table(
            "papers",
            sa.MetaData(),
            sa.Column("id", sa.Integer(), primary_key=True),
            sa.Column("title", sa.String(20)),
            sa.Column("stamp", sa.Integer(), default=1, onupdate=9),
        )

    repository = Papers(session)
    assert await repository.upsert(Paper(1, "a")) == Paper(1, "a", 1)
    assert await repository.upsert(Paper(1, "b")) == Paper(1, "b", 1)
    assert await repository.upsert_many([Paper(1, "c")]) == 1
    assert await repository.get(1) == Paper(1, "c", 1)
    assert await repository.upsert(Paper(1, "c", 5)) == Paper(1, "c", 5)
    assert await repository.patch(1, {"title": "d"}) == Paper(1, "d", 9)


async def test_generated_keys_go_on_behind_a_given_one_and_a_rollback_leaves_a_gap(session: InMemorySession) -> None:
    assert (await Things(session).add(Thing())).id == 1
    assert (await Things(session).add(Thing(id=10))).id == 10
    assert (await Things(session).add(Thing())).id == 11
    with pytest.raises(LookupError):
        await add_and_fail(session)
    assert (await Things(session).add(Thing())).id == 13


async def add_and_fail(session: InMemorySession) -> None:
    async with session.transaction() as unit:
        await Things(unit).add(Thing())
        raise LookupError


async def test_what_only_a_database_can_compute_is_said(session: InMemorySession) -> None:
    @dataclasses.dataclass
    class Computed:
        id: int | None
        a: int | None = None
        b: int | None = None

    class Defaults(BaseRepository[Computed]):
        table = sa.Table(
            "defaults",
            sa.MetaData(),
            sa.Column("id", sa.Integer(), primary_key=True),
            sa.Column("a", sa.Integer(), server_default=sa.text("nextval('numbers')")),
            sa.Column("b", sa.Integer(), sa.Computed("a + 1")),
        )

    with pytest.raises(UnsupportedOperationError) as caught:
        await Defaults(session).add(Computed(1))
    assert caught.value.fields == ("a",)
    with pytest.raises(UnsupportedOperationError) as caught:
        await Defaults(session).add(Computed(1, a=1))
    assert caught.value.fields == ("b",)


async def test_none_in_a_required_column_names_it(session: InMemorySession) -> None:
    @dataclasses.dataclass
    class Strict:
        id: UUID | None
        name: str | None

    class Stricts(BaseRepository[Strict]):
        table = sa.Table(
            "stricts",
            sa.MetaData(),
            sa.Column("id", sa.Uuid(), primary_key=True),
            sa.Column("name", sa.String(3), nullable=False),
        )

    repository, key = Stricts(session), uuid4()
    for entity, name in ((Strict(key, None), "name"), (Strict(None, "x"), "id")):
        with pytest.raises(ConstraintError) as caught:
            await repository.add(entity)
        assert caught.value.fields == (name,)
    with pytest.raises(InvalidInputError) as too_long:
        await repository.add(Strict(key, "four"))
    assert too_long.value.fields == ("name",)
    await repository.add(Strict(key, "abc"))
    with pytest.raises(ConstraintError):
        await repository.patch(key, {"name": None})


async def test_an_enumeration_sorts_as_it_is_declared(session: InMemorySession) -> None:
    await Things(session).add(Thing(colour=Colour.BLUE))
    await Things(session).add(Thing(colour=Colour.RED))
    assert [thing.colour for thing in await Things(session).get_all(sort="colour")] == [Colour.RED, Colour.BLUE]
    assert await Things(session).count(field("colour") > Colour.RED) == 1
    first = await Things(session).paginate_by_cursor(CursorRequest(limit=1), sort="colour")
    second = await Things(session).paginate_by_cursor(CursorRequest(limit=1, cursor=first.next_cursor), sort="colour")
    assert [thing.colour for thing in second.items] == [Colour.BLUE]


async def test_a_json_field_has_no_order(session: InMemorySession) -> None:
    with pytest.raises(InvalidQueryError) as caught:
        await Things(session).get_all(sort="document")
    assert caught.value.fields == ("document",)


# Without a table


class Kind(enum.StrEnum):
    SMALL = "small"
    LARGE = "large"


class Opaque:
    """A class that no column type knows."""

    def __init__(self, value: list[int]) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Opaque) and self.value == other.value

    __hash__ = None  # type: ignore[assignment]


class Model(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(arbitrary_types_allowed=True)

    id: UUID = pydantic.Field(default_factory=uuid4)
    email: pydantic.EmailStr = "a@example.org"
    kind: Kind = Kind.SMALL
    size: Literal["s", "l"] = "s"
    at: datetime | None = None
    price: Decimal = Decimal("1.10")
    parts: list[dict[str, int]] = pydantic.Field(default_factory=list)
    opaque: Opaque = pydantic.Field(default_factory=lambda: Opaque([1]))


class Models(BaseRepository[Model]):
    unique = (("email",), ("kind", "size"))


async def test_an_entity_without_a_table_comes_out_as_it_went_in(session: InMemorySession) -> None:
    moment = datetime(2026, 1, 2, 3, 4, 5, 6, tzinfo=timezone(timedelta(hours=2)))
    model = Model(at=moment, parts=[{"a": 1}], opaque=Opaque([1, 2]))
    stored = await Models(session).add(model)
    assert stored == model
    assert isinstance(stored.kind, Kind)
    stored.parts[0]["a"] = 99
    stored.opaque.value.append(99)
    assert await Models(session).get(model.id) == model
    assert await Models(session).find_one(field("kind") == Kind.SMALL, field("email").contains("@")) == model
    assert await Models(session).find_one(field("at") == moment.astimezone(UTC)) == model


async def test_unique_names_the_fields_of_the_key(session: InMemorySession) -> None:
    await Models(session).add(Model())
    with pytest.raises(DuplicateKeyError) as caught:
        await Models(session).add(Model(kind=Kind.LARGE))
    assert caught.value.fields == ("email",)
    with pytest.raises(DuplicateKeyError) as caught:
        await Models(session).add(Model(email="b@example.org"))
    assert caught.value.fields == ("kind", "size")


async def test_a_naive_datetime_is_refused(session: InMemorySession) -> None:
    with pytest.raises(InvalidInputError) as caught:
        await Models(session).add(Model(at=datetime(2026, 1, 1)))  # noqa: DTZ001 - that is what is refused
    assert caught.value.fields == ("at",)


async def test_values_without_an_order_are_refused_by_name(session: InMemorySession) -> None:
    await Models(session).add(Model())
    await Models(session).add(Model(email="b@example.org", size="l", opaque=Opaque([2])))
    for call in (
        Models(session).get_all(sort="opaque"),
        Models(session).get_all(field("opaque") > Opaque([0])),
    ):
        with pytest.raises(InvalidQueryError) as caught:
            await call
        assert caught.value.fields == ("opaque",)


def test_field_types_are_those_of_the_entity() -> None:
    found = Models.field_types()
    assert (found["id"], found["email"], found["at"], found["price"]) == (UUID, str, datetime, Decimal)


def test_keys_that_the_entity_has_not_are_named() -> None:
    @dataclasses.dataclass
    class NoId:
        name: str

    class NoIds(BaseRepository[NoId]):
        pass

    with pytest.raises(TypeError, match=r"'id'.*name"):
        NoIds.field_types()

    class BadUnique(BaseRepository[NoId]):
        id_field = "name"
        unique = (("email",),)

    with pytest.raises(TypeError, match="'email'"):
        BadUnique.field_types()


# The declaration


def test_a_class_that_does_not_say_what_it_stores_is_an_error(session: InMemorySession) -> None:
    class Nothing(BaseRepository):  # type: ignore[type-arg]
        table = things

    with pytest.raises(TypeError, match=r"BaseRepository\[YourEntity\]"):
        Nothing(session)


async def test_the_entity_is_found_through_generic_classes_in_between(session: InMemorySession) -> None:
    class Audited(BaseRepository[T], Generic[T]):
        pass

    class AuditedThings(Audited[Thing]):
        table = things

    class MoreThings(AuditedThings):
        pass

    assert (await MoreThings(session).add(Thing())).scalar == 5


class LateThings(BaseRepository["Late"]):
    pass


@dataclasses.dataclass
class Late:
    id: int | None


async def test_an_entity_may_be_declared_behind_its_repository(session: InMemorySession) -> None:
    assert await LateThings(session).add(Late(None)) == Late(1)


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"version_column": "nope"}, "version_column names 'nope'"),
        ({"version_column": "text"}, "not an integer"),
        ({"soft_delete_column": "text"}, "no timestamp"),
        ({"created_at_column": "day"}, "no timestamp"),
        ({"hidden_columns": {"secret"}}, "hidden_columns names 'secret'"),
        ({"hidden_columns": "text"}, "not one string"),
        ({"search_fields": ("nope",)}, "search_fields names 'nope'"),
        ({"hidden_columns": {"text"}, "sortable_fields": ("text",)}, "hidden_columns hides"),
        ({"table": sa.Table("no_key", sa.MetaData(), sa.Column("id", sa.Integer()))}, "no primary key"),
        ({"table": sa.Table("fewer", sa.MetaData(), sa.Column("id", sa.Integer(), primary_key=True))}, "do not match"),
    ],
)
def test_a_declaration_that_contradicts_itself_fails_when_the_class_is_made(
    attributes: dict[str, Any], message: str
) -> None:
    with pytest.raises(TypeError, match=message):
        types.new_class(
            "Contradiction",
            (BaseRepository[Thing],),
            exec_body=lambda body: body.update({"table": things, **attributes}),
        )


def test_a_repository_takes_a_session_in_memory_and_nothing_else() -> None:
    with pytest.raises(TypeError, match="session"):
        Things("sqlite://")  # type: ignore[arg-type]


# Mappers written by hand


async def test_a_mapper_may_call_the_derived_one_and_use_its_repository(session: InMemorySession) -> None:
    class Shouting(BaseRepository[Thing]):
        table = things

        def __init__(self, session: Any, mark: str) -> None:
            super().__init__(session)
            self._mark = mark

        def _row_to_entity(self, row: Any) -> Thing:
            thing = super()._row_to_entity(row)
            thing.called = f"{thing.called}{self._mark}"
            return thing

        def _entity_to_dict(self, entity: Thing) -> dict[str, Any]:
            return super()._entity_to_dict(entity) | {"text": (entity.text or "").upper()}

    stored = await Shouting(session, "!").add(Thing(text="loud"))
    assert (stored.text, stored.called) == ("LOUD", "called!")
    assert (await Shouting(session, "?").get(1)).called == "called?"
    assert (await Things(session).get(1)).called == "called"


async def test_what_a_mapper_leaves_out_is_filled_on_add_and_left_alone_on_update(session: InMemorySession) -> None:
    @dataclasses.dataclass
    class Slim:
        id: int
        name: str

    class Slims(BaseRepository[Slim]):
        table = sa.Table(
            "slims",
            sa.MetaData(),
            sa.Column("id", sa.Integer(), primary_key=True),
            sa.Column("name", sa.String(20)),
            sa.Column("note", sa.String(20), server_default="new"),
            sa.Column("deleted_at", UtcDateTime()),
            version_column(),
        )
        soft_delete_column = "deleted_at"

        def _row_to_entity(self, row: Any) -> Slim:
            return Slim(row.id, f"{row['name']} {row.note} {row.version}")

        def _entity_to_dict(self, entity: Slim) -> dict[str, Any]:
            return {"id": entity.id, "name": entity.name}

    repository = Slims(session)
    assert await repository.add(Slim(1, "a")) == Slim(1, "a new 1")
    await repository.patch(1, {"note": "old"})
    assert await repository.update(Slim(1, "b")) == Slim(1, "b old 1")
    await repository.delete(1)
    assert await repository.upsert(Slim(1, "c")) == Slim(1, "c old 1"), "an upsert brings a deleted entity back"
    await repository.delete(1)
    with pytest.raises(DuplicateKeyError):
        await repository.get_or_add(Slim(1, "d"))


# What a table says beyond its columns


async def test_a_mutable_field_that_a_mapper_leaves_out_is_left_as_it_is(session: InMemorySession) -> None:
    @dataclasses.dataclass
    class Page:
        id: int
        title: str
        tags: list[str] | None = None

    class Pages(BaseRepository[Page]):
        table = sa.Table(
            "pages",
            sa.MetaData(),
            sa.Column("id", sa.Integer(), primary_key=True),
            sa.Column("title", sa.String()),
            sa.Column("tags", sa.JSON()),
        )

        def _entity_to_dict(self, entity: Page) -> dict[str, Any]:
            return {"id": entity.id, "title": entity.title}

    pages = Pages(session)
    assert (await pages.add(Page(1, "one", ["given"]))).tags is None
    await pages.patch(1, {"tags": ["kept"]})
    assert (await pages.update(Page(1, "two"))).tags == ["kept"]
    assert (await pages.upsert(Page(1, "three"))).tags == ["kept"]


async def test_a_partial_unique_index_is_no_unique_key(session: InMemorySession) -> None:
    @dataclasses.dataclass
    class Seat:
        id: int
        place: str
        taken: bool

    seats = sa.Table(
        "seats",
        sa.MetaData(),
        sa.Column("id", sa.Integer(), primary_key=True),
        sa.Column("place", sa.String()),
        sa.Column("taken", sa.Boolean()),
    )
    sa.Index("one_taken", seats.c.place, unique=True, postgresql_where=seats.c.taken, sqlite_where=seats.c.taken)
    sa.Index("one_pair", seats.c.id, seats.c.taken, unique=True, postgresql_where=None)

    class Seats(BaseRepository[Seat]):
        table = seats

    assert Seats.declaration().unique_keys == (("id",), ("id", "taken"))
    await Seats(session).add(Seat(1, "A1", False))
    await Seats(session).add(Seat(2, "A1", False))
    with pytest.raises(ValueError, match="unique"):
        await Seats(session).upsert(Seat(3, "A1", True), on=["place"])


async def test_an_identity_outside_the_key_is_written_by_the_store_alone(session: InMemorySession) -> None:
    @dataclasses.dataclass
    class Invoice:
        id: str
        note: str
        number: int | None = None

    class Invoices(BaseRepository[Invoice]):
        table = sa.Table(
            "invoices",
            sa.MetaData(),
            sa.Column("id", sa.String(10), primary_key=True),
            sa.Column("note", sa.String(10)),
            sa.Column("number", sa.Integer(), sa.Identity(always=True), nullable=False),
        )

    invoices = Invoices(session)
    assert Invoices.declaration().never_written == {"number"}
    assert await invoices.add(Invoice("a", "first", 77)) == Invoice("a", "first", 1)
    assert await invoices.add(Invoice("b", "second")) == Invoice("b", "second", 2)
    assert await invoices.update(Invoice("a", "again", 9)) == Invoice("a", "again", 1)
    assert await invoices.upsert(Invoice("b", "again", 9)) == Invoice("b", "again", 2)
    with pytest.raises(InvalidInputError, match="number"):
        await invoices.patch("a", {"number": 5})
