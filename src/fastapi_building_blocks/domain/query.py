"""The query vocabulary: criteria, sorts, pages and cursors, the same for every store.

Criteria follow SQL's three-valued logic everywhere: a comparison with NULL is neither true nor
false, so neither it nor its negation matches. ``field("age") == None`` therefore matches nothing;
``field("age").is_null()`` is the question that was meant.
"""

import base64
import binascii
import dataclasses
import enum
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import Any, Generic, Literal, NamedTuple, NoReturn, TypeVar
from uuid import UUID

from .errors import InvalidQueryError

T_co = TypeVar("T_co", covariant=True)

Nulls = Literal["first", "last"]
CountMode = Literal["exact", "capped", "estimated", "none"]

_LARGEST_LIMIT = 2**31 - 1
_LARGEST_OFFSET = 2**63 - 1
_DEEPEST_CRITERION = 64
# SQLite takes expressions of 1,000 levels, and a chain of ORs is as deep as it is long.
_MOST_COMPARISONS = 900
MOST_VALUES = 10_000
"""How many values the criteria of one call may name together."""


class Operator(enum.StrEnum):
    """What a comparison asks; the value is its spelling over HTTP (``age__ge=18``)."""

    EQ = "eq"
    NE = "ne"
    LT = "lt"
    LE = "le"
    GT = "gt"
    GE = "ge"
    IN = "in"
    NOT_IN = "not_in"
    IS_NULL = "is_null"
    CONTAINS = "contains"
    ICONTAINS = "icontains"
    STARTS_WITH = "starts_with"
    BETWEEN = "between"


class Criterion:
    """A condition on an entity, combined with ``&``, ``|`` and ``~``."""

    __slots__ = ()
    extent: "Extent"

    def __and__(self, other: "Criterion") -> "Criterion":
        return And((*_parts(self, And), *_parts(_criterion(other), And)))

    def __or__(self, other: "Criterion") -> "Criterion":
        return Or((*_parts(self, Or), *_parts(_criterion(other), Or)))

    def __invert__(self) -> "Criterion":
        return self.part if isinstance(self, Not) else Not(self)

    def __bool__(self) -> NoReturn:
        raise TypeError("a criterion has no truth value of its own: combine with & | ~, not with and, or, not")


class Extent(NamedTuple):
    """How large a criterion is."""

    depth: int
    comparisons: int
    values: int


def _parts(criterion: Criterion, kind: "type[And | Or]") -> tuple[Criterion, ...]:
    """Return what a criterion combines, so that a chain stays flat however long it grows."""
    return criterion.parts if isinstance(criterion, kind) else (criterion,)


def extent_of(criteria: Iterable[Any], depth: int = 0) -> Extent:
    """Return how large criteria are together.

    Args:
        criteria: what a call was given; what is none of the vocabulary does not count.
        depth: the levels of what combines them.

    Raises:
        InvalidQueryError: larger than every database takes.
    """
    comparisons = values = 0
    deepest = depth
    for criterion in criteria:
        if isinstance(criterion, Criterion):
            extent = criterion.extent
            deepest = max(deepest, depth + extent.depth)
            comparisons += extent.comparisons
            values += extent.values
    if deepest > _DEEPEST_CRITERION:
        raise InvalidQueryError(f"criteria may be nested {_DEEPEST_CRITERION} levels deep")
    if comparisons > _MOST_COMPARISONS:
        raise InvalidQueryError(f"criteria may hold {_MOST_COMPARISONS} comparisons; is_in() takes a long list as one")
    if values > MOST_VALUES:
        raise InvalidQueryError(f"criteria may name {MOST_VALUES} values")
    return Extent(deepest, comparisons, values)


def _extent_of_parts(criterion: "And | Or") -> Extent:
    if not criterion.parts:
        # A condition that was lost would let a write through that meant a few rows, to all of them.
        raise InvalidQueryError(f"{type(criterion).__name__} combines at least one criterion")
    return extent_of(criterion.parts, depth=1)


def _criterion(value: Any) -> Criterion:
    if not isinstance(value, Criterion):
        raise TypeError(f"expected a criterion such as field('name') == 'Ada', got {type(value).__name__}")
    return value


@dataclass(frozen=True, slots=True)
class Comparison(Criterion):
    """``field operator value``. For BETWEEN the value is ``(low, high)``, for IN a tuple, for IS_NULL a bool."""

    field: str
    operator: Operator
    value: Any

    def __post_init__(self) -> None:
        if type(self.operator) is not Operator:
            object.__setattr__(self, "operator", Operator(self.operator))

    @property
    def extent(self) -> Extent:  # type: ignore[override]
        return Extent(0, 1, len(self.value) if isinstance(self.value, tuple) else 1)


@dataclass(frozen=True, slots=True)
class And(Criterion):
    """True where every part is."""

    parts: tuple[Criterion, ...]
    extent: Extent = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "extent", _extent_of_parts(self))


@dataclass(frozen=True, slots=True)
class Or(Criterion):
    """True where at least one part is."""

    parts: tuple[Criterion, ...]
    extent: Extent = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "extent", _extent_of_parts(self))


@dataclass(frozen=True, slots=True)
class Not(Criterion):
    """True where the part is false; unknown where it is unknown."""

    part: Criterion
    extent: Extent = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "extent", extent_of((self.part,), depth=1))


class Field:
    """A field of an entity, to be compared; made by ``field("name")``."""

    __slots__ = ("name",)
    __hash__ = None  # type: ignore[assignment]  # == answers a criterion, so a field cannot be a key

    def __init__(self, name: str) -> None:
        self.name = name

    def __eq__(self, value: object) -> Criterion:  # type: ignore[override]
        return Comparison(self.name, Operator.EQ, value)

    def __ne__(self, value: object) -> Criterion:  # type: ignore[override]
        return Comparison(self.name, Operator.NE, value)

    def __lt__(self, value: Any) -> Criterion:
        return Comparison(self.name, Operator.LT, value)

    def __le__(self, value: Any) -> Criterion:
        return Comparison(self.name, Operator.LE, value)

    def __gt__(self, value: Any) -> Criterion:
        return Comparison(self.name, Operator.GT, value)

    def __ge__(self, value: Any) -> Criterion:
        return Comparison(self.name, Operator.GE, value)

    def is_in(self, values: Iterable[Any]) -> Criterion:
        """Equal to one of ``values``; an empty list matches nothing."""
        return Comparison(self.name, Operator.IN, _values(self.name, values))

    def not_in(self, values: Iterable[Any]) -> Criterion:
        """Equal to none of ``values``; an empty list matches everything, NULL fields included."""
        return Comparison(self.name, Operator.NOT_IN, _values(self.name, values))

    def is_null(self) -> Criterion:
        """Without a value."""
        return Comparison(self.name, Operator.IS_NULL, True)

    def is_not_null(self) -> Criterion:
        """With a value."""
        return Comparison(self.name, Operator.IS_NULL, False)

    def contains(self, text: str) -> Criterion:
        """With ``text`` somewhere in it, taken literally, case-sensitive."""
        return Comparison(self.name, Operator.CONTAINS, _text(self.name, text))

    def icontains(self, text: str) -> Criterion:
        """With ``text`` somewhere in it, taken literally, without regard to case."""
        return Comparison(self.name, Operator.ICONTAINS, _text(self.name, text))

    def starts_with(self, text: str) -> Criterion:
        """Beginning with ``text``, taken literally, case-sensitive."""
        return Comparison(self.name, Operator.STARTS_WITH, _text(self.name, text))

    def between(self, low: Any, high: Any) -> Criterion:
        """From ``low`` to ``high``, both included."""
        return Comparison(self.name, Operator.BETWEEN, (low, high))


def field(name: str) -> Field:
    """Return the field ``name`` to compare: ``field("age") >= 18``.

    Whether the repository has such a field is checked when the criterion is used (``InvalidQueryError``).
    """
    if not isinstance(name, str):
        raise TypeError(f"a field's name is a string, got {type(name).__name__}")
    return Field(name)


def _values(name: str, values: Iterable[Any]) -> tuple[Any, ...]:
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable):
        raise InvalidQueryError(f"{name}: expected a list of values", fields=(name,))
    return tuple(values)


def _text(name: str, text: str) -> str:
    if not isinstance(text, str):
        raise InvalidQueryError(f"{name}: expected text to search for", fields=(name,))
    return text


@dataclass(frozen=True, slots=True)
class Sort:
    """One key of an order. Without ``nulls``, NULL sorts as larger than every value, on every store."""

    field: str
    descending: bool = False
    nulls: Nulls | None = None

    def __post_init__(self) -> None:
        if self.nulls not in (None, "first", "last"):
            raise InvalidQueryError("nulls is 'first' or 'last'", fields=(self.field,))

    @property
    def nulls_last(self) -> bool:
        """Whether NULLs come after the values."""
        return self.nulls == "last" if self.nulls else not self.descending

    @property
    def reversed(self) -> "Sort":
        """The same key in the opposite order, NULLs included."""
        return Sort(self.field, not self.descending, "first" if self.nulls_last else "last")

    @classmethod
    def parse(cls, text: str) -> "Sort":
        """Read ``name`` or ``-name`` (descending)."""
        return cls(text.removeprefix("-"), text.startswith("-"))


def sorts(keys: "str | Sort | Iterable[str | Sort]") -> tuple[Sort, ...]:
    """Normalise what a caller gave as ``sort=``: a Sort, ``"-name"``, or several of either."""
    if isinstance(keys, str | Sort):
        keys = (keys,)
    result = tuple(Sort.parse(key) if isinstance(key, str) else key for key in keys)
    for key in result:
        if not isinstance(key, Sort):
            raise InvalidQueryError(f"a sort is a Sort or a field's name, got {type(key).__name__}")
    return result


def _whole_number(name: str, value: Any, least: int, most: int) -> None:
    if type(value) is not int or not least <= value <= most:
        raise InvalidQueryError(f"{name} must be a whole number from {least} to {most}", fields=(name,))


@dataclass(frozen=True, slots=True)
class PageRequest:
    """One page by offset. ``count`` chooses what the total costs: exact, capped at ``count_cap``, estimated, none."""

    limit: int = 20
    offset: int = 0
    count: CountMode = "exact"
    count_cap: int = 10_000

    def __post_init__(self) -> None:
        _whole_number("limit", self.limit, 1, _LARGEST_LIMIT)
        _whole_number("offset", self.offset, 0, _LARGEST_OFFSET)
        _whole_number("count_cap", self.count_cap, 1, _LARGEST_LIMIT)
        if self.count not in ("exact", "capped", "estimated", "none"):
            raise InvalidQueryError("count is 'exact', 'capped', 'estimated' or 'none'", fields=("count",))


@dataclass(frozen=True)  # slots would break Page[User](...) on Python 3.11
class Page(Generic[T_co]):
    """One page by offset. ``total`` is None where it was not counted, a lower bound where it is capped."""

    items: Sequence[T_co]
    total: int | None
    limit: int
    offset: int
    has_next: bool
    has_prev: bool
    total_is_capped: bool = False


@dataclass(frozen=True, slots=True)
class CursorRequest:
    """One page by keyset (https://use-the-index-luke.com/no-offset). Without a cursor it is the first one."""

    limit: int = 20
    cursor: str | None = None

    def __post_init__(self) -> None:
        _whole_number("limit", self.limit, 1, _LARGEST_LIMIT)
        if self.cursor is not None and not isinstance(self.cursor, str):
            raise InvalidQueryError("a cursor is a string from an earlier page", fields=("cursor",))


@dataclass(frozen=True)
class CursorPage(Generic[T_co]):
    """One page by keyset, always in the order of the sort; a cursor is None where nothing lies beyond."""

    items: Sequence[T_co]
    next_cursor: str | None
    prev_cursor: str | None


# Cursors: opaque to clients, typed, and bound to the query that made them.

_LONGEST_CURSOR = 8192
_BAD_CURSOR = "the cursor is not one that this list has given out"

_ENCODERS: dict[type, tuple[str, Any]] = {
    str: ("s", str),
    int: ("i", str),
    float: ("f", float.hex),
    bool: ("b", lambda value: "1" if value else "0"),
    datetime: ("t", datetime.isoformat),
    date: ("d", date.isoformat),
    time: ("c", time.isoformat),
    Decimal: ("n", str),
    UUID: ("u", lambda value: value.hex),
    bytes: ("x", bytes.hex),
    timedelta: ("l", lambda value: str(value // timedelta(microseconds=1))),
}
_DECODERS: dict[str, Any] = {
    "s": str,
    "i": int,
    "f": float.fromhex,
    "b": lambda text: {"1": True, "0": False}[text],
    "t": datetime.fromisoformat,
    "d": date.fromisoformat,
    "c": time.fromisoformat,
    "n": Decimal,
    "u": UUID,
    "x": bytes.fromhex,
    "l": lambda text: timedelta(microseconds=int(text)),
}


def _encode_value(value: Any) -> list[str] | None:
    if value is None:
        return None
    if isinstance(value, enum.Enum):
        value = value.value
    for kind in type(value).__mro__:
        if kind in _ENCODERS:
            tag, encode = _ENCODERS[kind]
            return [tag, encode(value)]
    raise InvalidQueryError(f"a value of type {type(value).__name__} cannot be a sort key of a cursor")


def encode_cursor(values: Sequence[Any], *, query: str, backwards: bool) -> str:
    """Return an opaque cursor that stands at a row.

    Args:
        values: the row's sort keys, primary key last; none at all: the cursor stands at the end of the list.
        query: what identifies the query (its sorts and criteria); a cursor is refused by any other query.
        backwards: whether the page lies before the row.
    """
    body = [_fingerprint(query), 1 if backwards else 0, [_encode_value(value) for value in values]]
    packed = json.dumps(body, separators=(",", ":")).encode()
    return base64.urlsafe_b64encode(packed).rstrip(b"=").decode()


def decode_cursor(cursor: str, *, query: str, width: int) -> tuple[tuple[Any, ...], bool]:
    """Return the sort keys, ``width`` of them or none, and the direction of a cursor.

    Raises:
        InvalidQueryError: it is malformed, or was made by another query.
    """
    try:
        if len(cursor) > _LONGEST_CURSOR:
            raise ValueError("too long")
        packed = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True)
        fingerprint, backwards, encoded = json.loads(packed)
        if not isinstance(encoded, list) or backwards not in (0, 1):
            raise ValueError("not a cursor")
        values = tuple(None if item is None else _DECODERS[item[0]](item[1]) for item in encoded)
    except (ValueError, TypeError, KeyError, IndexError, ArithmeticError, RecursionError, binascii.Error) as error:
        raise InvalidQueryError(_BAD_CURSOR, fields=("cursor",)) from error
    if fingerprint != _fingerprint(query) or len(values) not in (0, width):
        raise InvalidQueryError(
            "the cursor belongs to another sort or filter; start again without a cursor", fields=("cursor",)
        )
    return values, bool(backwards)


def _fingerprint(query: str) -> str:
    return hashlib.blake2b(query.encode("utf-8", "surrogatepass"), digest_size=9).hexdigest()
