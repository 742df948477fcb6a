import uuid
from collections.abc import AsyncIterator
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal, localcontext
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy.dialects import mssql, mysql, postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from fastapi_building_blocks.domain import InvalidInputError
from fastapi_building_blocks.infrastructure.database.types import (
    BinaryString,
    ExactDecimal,
    UtcDateTime,
    adapt_dialect,
    timestamp_columns,
    utc_now,
    version_column,
)

INDIA = timezone(timedelta(hours=5, minutes=30))
MOMENT = datetime(2026, 1, 2, 3, 4, 5, 678901, UTC)
INSTANTS = st.datetimes(timezones=st.timezones() | st.just(UTC)).filter(lambda value: 2 <= value.year <= 9998)
TEXTS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=50)


def decimals(precision: int, scale: int) -> st.SearchStrategy[Decimal]:
    most = 10**precision - 1
    return st.integers(-most, most).map(lambda units: Decimal(f"{units}E-{scale}"))


def dialect(name: str) -> Any:
    made = {
        "postgresql": postgresql.asyncpg.dialect,
        "mysql": mysql.aiomysql.dialect,
        "mariadb": lambda: mysql.aiomysql.dialect(is_mariadb=True),
        "sqlite": sqlite.aiosqlite.dialect,
        "mssql": mssql.aioodbc.dialect,
    }[name]()
    if name == "mssql":
        made.server_version_info = (16,)
        made._setup_version_attributes()
    adapt_dialect(made)
    return made


def ddl(kind: Any, on: str) -> str:
    table = sa.Table("t", sa.MetaData(), sa.Column("c", kind))
    text = str(sa.schema.CreateTable(table).compile(dialect=dialect(on)))
    return text.partition("\tc ")[2].partition("\n")[0].replace(" NULL", "").strip()


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        (UtcDateTime(), ["TIMESTAMP WITH TIME ZONE", "DATETIME(6)", "DATETIME(6)", "DATETIME", "DATETIME2(6)"]),
        (ExactDecimal(10, 2), ["NUMERIC(10, 2)", "NUMERIC(10, 2)", "NUMERIC(10, 2)", "BIGINT", "NUMERIC(10, 2)"]),
        (ExactDecimal(38, 9), ["NUMERIC(38, 9)", "NUMERIC(38, 9)", "NUMERIC(38, 9)", "VARCHAR(39)", "NUMERIC(38, 9)"]),
        (
            BinaryString(50),
            [
                'VARCHAR(50) COLLATE "C"',
                "VARCHAR(50) CHARACTER SET utf8mb4 COLLATE utf8mb4_0900_bin",
                "VARCHAR(50) CHARACTER SET utf8mb4 COLLATE utf8mb4_nopad_bin",
                "VARCHAR(50)",
                "VARCHAR(200) COLLATE Latin1_General_100_BIN2_UTF8",
            ],
        ),
        (sa.Uuid(), ["UUID", "CHAR(32)", "CHAR(32)", "CHAR(32)", "UNIQUEIDENTIFIER"]),
        (sa.DateTime(), ["TIMESTAMP WITHOUT TIME ZONE", "DATETIME(6)", "DATETIME(6)", "DATETIME", "DATETIME2(6)"]),
        (sa.Time(), ["TIME WITHOUT TIME ZONE", "TIME(6)", "TIME(6)", "TIME", "TIME"]),
        (sa.Float(), ["FLOAT", "DOUBLE", "DOUBLE", "FLOAT", "FLOAT"]),
        (sa.Text(), ["TEXT", "LONGTEXT", "LONGTEXT", "TEXT", "NVARCHAR(max)"]),
        (sa.String(20), ["VARCHAR(20)", "VARCHAR(20)", "VARCHAR(20)", "VARCHAR(20)", "NVARCHAR(20)"]),
        (sa.String(5000), ["VARCHAR(5000)", "VARCHAR(5000)", "VARCHAR(5000)", "VARCHAR(5000)", "NVARCHAR(max)"]),
        (sa.Enum("a", "bb", native_enum=False), [*["VARCHAR(2)"] * 4, "NVARCHAR(2)"]),
        (sa.LargeBinary(), ["BYTEA", "LONGBLOB", "LONGBLOB", "BLOB", "VARBINARY(max)"]),
        (sa.Numeric(), ["NUMERIC", "NUMERIC(65, 30)", "NUMERIC(65, 30)", "NUMERIC", "NUMERIC(38, 12)"]),
        (sa.Numeric(8, 2), ["NUMERIC(8, 2)", "NUMERIC(8, 2)", "NUMERIC(8, 2)", "NUMERIC(8, 2)", "NUMERIC(8, 2)"]),
    ],
    ids=repr,
)
def test_every_database_has_a_column_for_every_type(kind: Any, names: list[str]) -> None:
    assert [ddl(kind, on) for on in ("postgresql", "mysql", "mariadb", "sqlite", "mssql")] == names


@pytest.mark.parametrize(
    ("name", "clock"),
    [
        ("postgresql", "CURRENT_TIMESTAMP"),
        ("mysql", "(UTC_TIMESTAMP(6))"),
        ("mariadb", "(UTC_TIMESTAMP(6))"),
        ("sqlite", "(strftime('%Y-%m-%d %H:%M:%f', 'now') || '000')"),
        ("mssql", "(SYSUTCDATETIME())"),
    ],
)
def test_the_databases_clock_is_in_utc(name: str, clock: str) -> None:
    assert str(utc_now().compile(dialect=dialect(name))) == clock


def test_types_print_as_they_are_written() -> None:
    for kind in (UtcDateTime(), ExactDecimal(precision=10, scale=2), BinaryString(length=50)):
        assert repr(eval(repr(kind))) == repr(kind)


def test_types_name_their_python_type() -> None:
    kinds = (UtcDateTime(), ExactDecimal(10, 2), BinaryString(50))
    assert [kind.python_type for kind in kinds] == [datetime, Decimal, str]


@pytest.mark.parametrize(("precision", "scale"), [(0, 0), (39, 2), (5, 6), (5, -1), (38, 31)])
def test_a_decimal_that_some_database_cannot_hold_is_refused_when_declared(precision: int, scale: int) -> None:
    with pytest.raises(ValueError, match="digits"):
        ExactDecimal(precision, scale)


def test_a_text_needs_a_length() -> None:
    with pytest.raises(ValueError, match="length"):
        BinaryString(0)


def round_trip(kind: Any, name: str, value: Any) -> tuple[Any, Any]:
    on = dialect(name)
    bind, result = kind.bind_processor(on), kind.result_processor(on, None)
    stored = bind(value) if bind else value
    return stored, result(stored) if result else stored


@pytest.mark.parametrize("name", ["postgresql", "mysql", "sqlite", "mssql"])
class TestProcessors:
    @given(INSTANTS)
    def test_an_instant_comes_back_in_utc(self, name: str, value: datetime) -> None:
        _, answer = round_trip(UtcDateTime(), name, value)
        assert answer == value.astimezone(UTC)  # of two zones, == is never true in the hour that a clock is set back
        assert answer.tzinfo is UTC

    @given(st.lists(INSTANTS, min_size=2, max_size=2))
    def test_the_stored_order_is_the_order_in_time(self, name: str, values: list[datetime]) -> None:
        first, second = (value.astimezone(UTC) for value in values)
        stored = [round_trip(UtcDateTime(), name, value)[0] for value in values]
        assert (stored[0] < stored[1]) is (first < second)

    @pytest.mark.parametrize(
        "value",
        [
            pytest.param(MOMENT.replace(tzinfo=None), id="naive"),
            pytest.param(MOMENT.date(), id="date"),
            pytest.param(datetime.max.replace(tzinfo=timezone(-timedelta(hours=1))), id="after the last year"),
        ],
    )
    def test_what_is_no_instant_is_refused(self, name: str, value: Any) -> None:
        with pytest.raises(InvalidInputError):
            round_trip(UtcDateTime(), name, value)

    @pytest.mark.parametrize(("precision", "scale"), [(18, 2), (1, 1), (38, 30), (19, 0)])
    @given(st.data())
    def test_a_decimal_comes_back_with_all_its_digits(self, name: str, precision: int, scale: int, data: Any) -> None:
        value = data.draw(decimals(precision, scale))
        other = data.draw(decimals(precision, scale))
        with localcontext(prec=3):  # what the service computes with must not round what it stores
            stored, answer = round_trip(ExactDecimal(precision, scale), name, value)
            compared = round_trip(ExactDecimal(precision, scale), name, other)[0]
        assert answer == value
        assert str(answer.copy_abs()) == str(value.copy_abs())
        assert (stored < compared) is (value < other)

    @pytest.mark.parametrize("value", ["NaN", "Infinity", "100.001", "100000", "1E+9999"])
    def test_a_decimal_that_does_not_fit_is_refused_rather_than_rounded(self, name: str, value: str) -> None:
        with pytest.raises(InvalidInputError):
            round_trip(ExactDecimal(7, 2), name, Decimal(value))

    def test_null_is_null(self, name: str) -> None:
        for kind in (UtcDateTime(), ExactDecimal(7, 2), ExactDecimal(30, 2), BinaryString(3)):
            assert round_trip(kind, name, None) == (None, None)


@pytest.mark.parametrize(
    ("kind", "value"),
    [(UtcDateTime(), MOMENT), (ExactDecimal(9, 2), Decimal("-1.50")), (ExactDecimal(30, 2), Decimal("-1.50"))],
    ids=repr,
)
def test_a_literal_in_sql_is_what_a_parameter_would_be(kind: Any, value: Any) -> None:
    engine = sa.create_engine("sqlite://")
    adapt_dialect(engine.dialect)
    table = sa.Table("t", sa.MetaData(), sa.Column("c", kind))
    with engine.begin() as connection:
        table.create(connection)
        connection.execute(table.insert().values(c=value))
        literal = (
            sa.select(table.c.c).where(table.c.c == value).compile(connection, compile_kwargs={"literal_binds": True})
        )
        assert len(connection.exec_driver_sql(str(literal)).all()) == 1
    engine.dispose()


def test_a_service_may_keep_uuids_as_text() -> None:
    for name in ("postgresql", "mysql", "sqlite"):
        on = dialect(name)
        kind = sa.Uuid(as_uuid=False).dialect_impl(on)
        bind, result = kind.bind_processor(on), kind.result_processor(on, None)
        text = "00000000-0000-0000-0000-00000000000a"
        stored = bind(text) if bind else text
        assert (result(stored) if result else stored) == text


def test_a_uuid_written_with_hyphens_is_read_too() -> None:
    on = dialect("mysql")
    result = sa.Uuid().dialect_impl(on).result_processor(on, None)
    assert result is not None
    assert result("00000000-0000-0000-0000-00000000000a") == uuid.UUID(int=10)
    assert result(None) is None


def test_another_database_is_left_as_it_is() -> None:
    other = sa.engine.default.DefaultDialect()
    before = dict(other.colspecs)
    adapt_dialect(other)
    assert other.colspecs == before


def test_sqlite_refuses_a_plain_decimal_that_it_would_round() -> None:
    column = sa.Column("c", sa.Numeric(30, 10))
    on = dialect("sqlite")
    bind = column.type.dialect_impl(on).bind_processor(on)
    assert bind is not None
    assert bind(Decimal("12345678901234.5")) == 12345678901234.5
    assert bind(Decimal("1.50000000000000000000")) == 1.5
    assert bind(None) is None
    with pytest.raises(InvalidInputError, match="ExactDecimal"):
        bind(Decimal("12345678901234567.1234567891"))


# On the real databases


METADATA = sa.MetaData()
THINGS = sa.Table(
    "things",
    METADATA,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("instant", UtcDateTime()),
    sa.Column("amount", ExactDecimal(18, 2)),
    sa.Column("huge", ExactDecimal(38, 10)),
    sa.Column("code", BinaryString(50)),
    sa.Column("uuid", sa.Uuid()),
    sa.Column("json", sa.JSON()),
    sa.Column("flag", sa.Boolean()),
    sa.Column("bytes", sa.LargeBinary()),
    sa.Column("numeric", sa.Numeric(12, 3)),
    sa.Column("wall_clock", sa.DateTime()),
    sa.Column("zoned", sa.DateTime(timezone=True)),
    sa.Column("float", sa.Float()),
    sa.Column("large", sa.BigInteger()),
    sa.Column("text", sa.Text()),
    sa.Column("time", sa.Time()),
    sa.Column("date", sa.Date()),
    sa.Column("interval", sa.Interval()),
    version_column(),
    *timestamp_columns(),
)
VALUES: dict[str, Any] = {
    "instant": MOMENT,
    "amount": Decimal("1234567890123456.78"),
    "huge": Decimal("-1234567890123456789012345678.0123456789"),
    "code": "Äé😀 ",
    "uuid": uuid.UUID(int=1),
    "json": {"a": [1, "é😀", None, {"b": 1.5}], "empty": {}},
    "flag": True,
    "bytes": b"\0\xff'\\" * 30_000,
    "numeric": Decimal("123456789.125"),
    "wall_clock": MOMENT.replace(tzinfo=None),
    "zoned": MOMENT,
    "float": 0.1 + 0.2,
    "large": 2**63 - 1,
    "text": "😀x" * 50_000,
    "time": time(1, 2, 3, 4),
    "date": date(1, 1, 1),
    "interval": timedelta(days=-3, microseconds=7),
}


@pytest.fixture
async def engine(database_url: str) -> AsyncIterator[AsyncEngine]:
    made = create_async_engine(database_url)
    adapt_dialect(made.dialect)
    async with made.begin() as connection:
        await connection.run_sync(METADATA.create_all)
    yield made
    await made.dispose()


async def stored(connection: AsyncConnection, **values: Any) -> Any:
    await connection.execute(THINGS.delete())
    await connection.execute(THINGS.insert(), [{"id": 1, **values}])
    return (await connection.execute(sa.select(THINGS))).one()


async def found(connection: AsyncConnection, criterion: Any) -> list[int]:
    return list((await connection.execute(sa.select(THINGS.c.id).where(criterion).order_by(THINGS.c.id))).scalars())


async def test_what_goes_in_comes_out_the_same_on_every_database(engine: AsyncEngine) -> None:
    async with engine.begin() as connection:
        row = (await stored(connection, **VALUES))._mapping
        for name, value in VALUES.items():
            assert row[name] == value
            assert type(row[name]) is type(value)
        assert str(row["amount"]) == "1234567890123456.78"
        assert (row["instant"].tzinfo, row["zoned"].tzinfo) == (UTC, UTC)
        for name in ("instant", "amount", "huge", "code", "uuid", "numeric", "wall_clock", "zoned", "float", "large"):
            assert await found(connection, THINGS.c[name] == VALUES[name]) == [1], name


async def test_server_defaults_are_utc_now_and_the_first_version(engine: AsyncEngine) -> None:
    async with engine.begin() as connection:
        row = await stored(connection)
        assert row.version == 1
        for moment in (row.created_at, row.updated_at):
            assert moment.tzinfo is UTC
            assert abs(moment - datetime.now(UTC)) < timedelta(minutes=1)
        assert await found(connection, THINGS.c.created_at == row.created_at) == [1]
        assert await found(connection, THINGS.c.created_at <= datetime.now(UTC) + timedelta(minutes=1)) == [1]


async def test_the_extremes_of_an_instant_survive(engine: AsyncEngine) -> None:
    async with engine.begin() as connection:
        for value in (datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC)):
            row = await stored(connection, instant=value, zoned=value)
            assert (row.instant, row.zoned) == (value, value)


async def test_another_offset_is_the_same_instant(engine: AsyncEngine) -> None:
    async with engine.begin() as connection:
        row = await stored(connection, instant=MOMENT.astimezone(INDIA), zoned=MOMENT.astimezone(INDIA))
        assert (row.instant, row.zoned) == (MOMENT, MOMENT)
        assert await found(connection, THINGS.c.instant == MOMENT.astimezone(INDIA)) == [1]


async def test_a_naive_datetime_is_refused_by_plain_core_statements_too(engine: AsyncEngine) -> None:
    with pytest.raises((sa.exc.StatementError, InvalidInputError), match="naive"):
        async with engine.begin() as connection:
            await stored(connection, instant=MOMENT.replace(tzinfo=None))


async def test_the_order_is_the_same_on_every_database(engine: AsyncEngine) -> None:
    cases: dict[str, list[Any]] = {
        "code": ["", " ", "A", "A ", "B", "a", "a\x01", "a ", "aa", "Ä", "ä", "\uffee", "😀"],
        "amount": [Decimal(text) for text in ("-10.00", "-9.99", "-0.01", "0.00", "0.10", "9.00", "10.00")],
        "huge": [Decimal(text) for text in ("-1E+27", "-9.5", "-1E-10", "0", "1E-10", "2", "10", "1E+27")],
        "uuid": [uuid.UUID(int=number << 64 | 1) for number in (0, 1, 2**15, 2**31, 2**47, 2**63)],
        "instant": [MOMENT + timedelta(microseconds=step) for step in (-(10**15), -1, 0, 1, 10**6, 10**12)],
        "float": [-1e308, -1.5, 0.0, 5e-324, 1e-10, 0.1, 1.5, 1e308],
    }
    cases["code"].sort()
    async with engine.begin() as connection:
        for name, ordered in cases.items():
            column = THINGS.c[name]
            await connection.execute(THINGS.delete())
            rows = [{"id": place, name: value} for place, value in enumerate(ordered, start=1)]
            await connection.execute(THINGS.insert(), rows[::-1])
            in_order = (await connection.execute(sa.select(THINGS.c.id).order_by(column))).scalars().all()
            assert list(in_order) == list(range(1, len(ordered) + 1)), name
            middle = len(ordered) // 2
            assert await found(connection, column == ordered[middle]) == [middle + 1], name
            assert await found(connection, column < ordered[middle]) == list(range(1, middle + 1)), name


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.fixed_dictionaries(
        {
            "instant": INSTANTS.map(lambda value: value.astimezone(UTC)),
            "amount": decimals(18, 2),
            "huge": decimals(38, 10),
            "code": TEXTS,
            "text": TEXTS,
            "uuid": st.uuids(),
            "flag": st.booleans(),
            "bytes": st.binary(max_size=100),
            "wall_clock": st.datetimes(),
            "float": st.floats(allow_nan=False, allow_infinity=False),
            "large": st.integers(-(2**63), 2**63 - 1),
            "time": st.times(),
            "date": st.dates(),
            "json": st.dictionaries(TEXTS, st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | TEXTS),
        }
    )
)
async def test_any_value_survives_and_is_found_again(engine: AsyncEngine, values: dict[str, Any]) -> None:
    async with engine.begin() as connection:
        row = (await stored(connection, **values))._mapping
        for name, value in values.items():
            assert row[name] == value, name
            assert type(row[name]) is type(value), name
        for name in ("instant", "amount", "huge", "code", "uuid", "wall_clock", "float", "large", "date"):
            assert await found(connection, THINGS.c[name] == values[name]) == [1], name
