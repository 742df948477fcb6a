"""Lists over HTTP: filters, sort, search and pages from the query string, against declared fields only."""

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar
from urllib.parse import unquote_plus

from starlette.requests import Request
from starlette.types import Scope

from fastapi_building_blocks.domain.errors import InvalidQueryError
from fastapi_building_blocks.domain.query import (
    Comparison,
    CountMode,
    Criterion,
    CursorPage,
    CursorRequest,
    Operator,
    Or,
    Page,
    PageRequest,
    Sort,
    sorts,
)
from fastapi_building_blocks.domain.repository import Repository, SortKeys

from .query_values import BOOLEAN, TEXT, TEXT_SCHEMA, ValueKind, kind_of, parse_text, parse_whole_number
from .route_dependants import declared_query_parameters

T = TypeVar("T")

_CONTROLS = frozenset({"limit", "offset", "cursor", "sort", "sort_by", "sort_order", "search"})
_USUAL_SORT = "-created_at"
_LONGEST_SEARCH = 100
_MOST_VALUES = 100
_LONGEST_NAME = 100
_LARGEST_OFFSET = 2**63 - 1

_LISTS = (Operator.IN, Operator.NOT_IN)
_TEXTUAL = (Operator.CONTAINS, Operator.ICONTAINS, Operator.STARTS_WITH)
_DESCRIPTIONS = {
    Operator.EQ: "{0} equal to this.",
    Operator.NE: "{0} not equal to this.",
    Operator.LT: "{0} less than this.",
    Operator.LE: "{0} at most this.",
    Operator.GT: "{0} greater than this.",
    Operator.GE: "{0} at least this.",
    Operator.IN: "{0} one of these, separated by commas.",
    Operator.NOT_IN: "{0} none of these, separated by commas.",
    Operator.IS_NULL: "{0} without a value (true), or with one (false).",
    Operator.CONTAINS: "{0} with this text in it, taken literally.",
    Operator.ICONTAINS: "{0} with this text in it, taken literally, without regard to case.",
    Operator.STARTS_WITH: "{0} beginning with this text, taken literally.",
    Operator.BETWEEN: "{0} from the first to the second, both included, separated by a comma.",
}


@dataclass(frozen=True, slots=True)
class ListQuery:
    """What a request for a list asks: ``return await query.page_of(UserRepository(session))``.

    Either ``page`` or ``cursor`` is set; ``criteria`` may be extended before the query is used.
    """

    criteria: list[Criterion]
    sort: tuple[Sort, ...]
    page: PageRequest | None
    cursor: CursorRequest | None

    async def page_of(self, repository: Repository[T], *criteria: Any) -> Page[T] | CursorPage[T]:
        """Return the page that was asked for, by offset or by cursor.

        Args:
            criteria: what every entity must match besides, such as the tenant; whatever the repository takes.

        Raises:
            InvalidQueryError: the cursor is malformed, or belongs to another sort or filter.
        """
        if self.cursor is not None:
            return await repository.paginate_by_cursor(self.cursor, *self.criteria, *criteria, sort=self.sort)
        assert self.page is not None  # noqa: S101 - one of them is set
        return await repository.paginate(self.page, *self.criteria, *criteria, sort=self.sort)


def list_query(
    repository_class: type[Repository[Any]],
    *,
    default_sort: SortKeys | None = None,
    default_limit: int = 20,
    max_limit: int = 100,
    count: CountMode = "exact",
) -> "ListQueryDependency":
    """Return the dependency that reads a list's query string: ``Annotated[ListQuery, Depends(list_query(Users))]``.

    It takes ``limit``, ``offset`` or ``cursor``, ``sort`` or ``sort_by`` and ``sort_order``, ``search`` where the
    repository declares ``search_fields``, and ``name=value`` or ``name__op=value`` for its filterable fields.
    Anything else that the endpoint does not declare itself is an ``InvalidQueryError`` that names the parameter.
    ``install_problem_details`` puts every parameter into the OpenAPI document.

    Args:
        default_sort: None: the newest first where there is a sortable ``created_at``, else by primary key.
        count: what a page's total costs (see ``PageRequest``).

    Raises:
        ValueError: a declared field does not exist, is hidden, or cannot be read from text.
    """
    return ListQueryDependency(repository_class, default_sort, default_limit, max_limit, count)


class ListQueryDependency:
    """Reads one repository's lists; made by ``list_query``.

    It parses the query string itself, by a table made once: declaring some sixty parameters to FastAPI would cost
    several times what the rest of the request does.
    """

    openapi_parameters: list[dict[str, Any]]

    def __init__(
        self,
        repository_class: type[Repository[Any]],
        default_sort: SortKeys | None,
        default_limit: int,
        max_limit: int,
        count: CountMode,
    ) -> None:
        if not 1 <= default_limit <= max_limit:
            raise ValueError("default_limit is from 1 to max_limit")
        PageRequest(max_limit, count=count)
        types = repository_class.field_types()
        kinds = {name: kind for name, python_type in types.items() if (kind := kind_of(python_type)) is not None}
        filterable = _declared(repository_class, "filterable_fields", kinds)
        self._sortable = _declared(repository_class, "sortable_fields", kinds)
        self._search = tuple(_declared(repository_class, "search_fields", kinds))
        # Without search fields, search is the endpoint's own parameter, if it declares one.
        self._controls = _CONTROLS if self._search else _CONTROLS - {"search"}
        for name in self._search:
            if kinds[name].parse is not parse_text:
                raise ValueError(f"{repository_class.__name__}.search_fields: {name} is not text")
        if default_sort is None:
            default_sort = _USUAL_SORT if "created_at" in self._sortable else ()
        self._default_sort = sorts(default_sort)
        for key in self._default_sort:
            if key.field not in types:
                raise ValueError(f"default_sort: {repository_class.__name__} has no field {key.field!r} to sort by")
        self._default_limit = default_limit
        self._max_limit = max_limit
        self._count: CountMode = count
        self._filters: dict[str, Callable[[str], Criterion]] = {}
        self.openapi_parameters = self._documented_controls()
        for name in filterable:
            self._declare_filters(name, kinds[name])

    async def __call__(self, request: Request) -> ListQuery:
        """Read the query string.

        Raises:
            InvalidQueryError: it holds anything that is not declared; the error names the parameter.
        """
        criteria: list[Criterion] = []
        controls: dict[str, str] = {}
        seen: set[str] = set()
        for name, value in _parameters(request.scope):
            read = self._filters.get(name)
            if read is None and name not in self._controls:
                if name not in declared_query_parameters(request.scope):
                    raise _refused(name, "not a parameter of this list")
                continue
            if name in seen:
                raise _refused(name, "given more than once")
            seen.add(name)
            if read is not None:
                criteria.append(read(value))
            else:
                controls[name] = value
        if not controls:
            return ListQuery(criteria, self._default_sort, PageRequest(self._default_limit, 0, self._count), None)
        if "search" in controls:
            self._add_search(controls["search"], criteria)
        sort = self._sort(controls)
        limit = _whole(controls, "limit", self._default_limit, 1, self._max_limit)
        if "cursor" in controls:
            if "offset" in controls:
                raise _refused("offset", "a cursor and an offset exclude each other")
            return ListQuery(criteria, sort, None, CursorRequest(limit, controls["cursor"] or None))
        offset = _whole(controls, "offset", 0, 0, _LARGEST_OFFSET)
        return ListQuery(criteria, sort, PageRequest(limit, offset, self._count), None)

    def _sort(self, controls: dict[str, str]) -> tuple[Sort, ...]:
        if "sort" in controls:
            for other in ("sort_by", "sort_order"):
                if other in controls:
                    raise _refused(other, "sort excludes it")
            keys: dict[str, Sort] = {}
            for text in controls["sort"].split(","):
                key = Sort.parse(text)
                self._check_sortable("sort", key.field)
                keys.setdefault(key.field, key)  # a field's second appearance orders nothing
            return tuple(keys.values())
        order = controls.get("sort_order")
        if order not in (None, "asc", "desc"):
            raise _refused("sort_order", "expected asc or desc")
        if "sort_by" in controls:
            self._check_sortable("sort_by", controls["sort_by"])
            return (Sort(controls["sort_by"], descending=order != "asc"),)
        if order is None:
            return self._default_sort
        if not self._default_sort:
            raise _refused("sort_order", "it needs sort_by")
        return (Sort(self._default_sort[0].field, descending=order == "desc"),)

    def _check_sortable(self, parameter: str, name: str) -> None:
        if name not in self._sortable:
            raise _refused(parameter, f"expected {' or '.join(self._sortable) or 'nothing'}")

    def _add_search(self, text: str, criteria: list[Criterion]) -> None:
        if len(text) > _LONGEST_SEARCH:
            raise _refused("search", f"expected at most {_LONGEST_SEARCH} characters")
        if text:
            _value("search", TEXT, text)
            parts = tuple(Comparison(name, Operator.ICONTAINS, text) for name in self._search)
            criteria.append(Or(parts) if len(parts) > 1 else parts[0])

    # What is declared once

    def _declare_filters(self, name: str, kind: ValueKind) -> None:
        for operator in kind.operators:
            parameter = name if operator is Operator.EQ else f"{name}__{operator.value}"
            if parameter in _CONTROLS:
                parameter = f"{name}__{operator.value}"  # the plain name is taken by the list itself
            if parameter in self._filters:
                raise ValueError(f"two filters would be called {parameter}")
            self._filters[parameter] = _reader(parameter, name, operator, kind)
            self._document(parameter, _schema(operator, kind), _DESCRIPTIONS[operator].format(f"Only with {name}"))

    def _document(self, name: str, schema: dict[str, Any], description: str) -> None:
        parameter = {"name": name, "in": "query", "required": False, "schema": schema, "description": description}
        if schema.get("type") == "array":
            parameter |= {"style": "form", "explode": False}
        self.openapi_parameters.append(parameter)

    def _documented_controls(self) -> list[dict[str, Any]]:
        self.openapi_parameters = []
        default = ",".join(f"-{key.field}" if key.descending else key.field for key in self._default_sort)
        fields = list(self._sortable)
        limit = {"type": "integer", "minimum": 1, "maximum": self._max_limit, "default": self._default_limit}
        offset = {"type": "integer", "minimum": 0, "maximum": _LARGEST_OFFSET, "default": 0}
        keys = {"type": "string", "enum": [prefix + name for name in fields for prefix in ("", "-")]}
        order = {"type": "string", "enum": ["asc", "desc"]}
        self._document("limit", limit, "How many entities a page holds at most.")
        self._document("offset", offset, "How many entities to skip; not together with cursor.")
        self._document(
            "cursor",
            {"type": "string"},
            "A cursor from an earlier page, or empty for the first page by cursor; not together with offset.",
        )
        if fields:
            self._document(
                "sort",
                {"type": "array", "items": keys, "minItems": 1},
                f"Fields to sort by, separated by commas, with - for descending; {default or 'the key'} if absent.",
            )
            self._document("sort_by", {"type": "string", "enum": fields}, "A field to sort by; not together with sort.")
            self._document("sort_order", order, "The direction for sort_by; desc if absent.")
        if self._search:
            self._document(
                "search",
                {**TEXT_SCHEMA, "maxLength": _LONGEST_SEARCH},
                f"Only with this text in {' or '.join(self._search)}, taken literally, without regard to case.",
            )
        return self.openapi_parameters


def _declared(
    repository_class: type[Repository[Any]], attribute: str, kinds: dict[str, ValueKind]
) -> dict[str, ValueKind]:
    names: Iterable[str] | None = getattr(repository_class, attribute)
    declared: Collection[str] = kinds if names is None else tuple(names)
    for name in declared:
        if name not in kinds:
            raise ValueError(
                f"{repository_class.__name__}.{attribute}: {name!r} is not a visible field that can be read from text"
            )
    return {name: kinds[name] for name in declared}


def _reader(parameter: str, name: str, operator: Operator, kind: ValueKind) -> Callable[[str], Criterion]:
    if operator in _LISTS:
        return partial(_read_list, parameter, name, operator, kind)
    if operator is Operator.BETWEEN:
        return partial(_read_range, parameter, name, kind)
    if operator is Operator.IS_NULL:
        return partial(_read_value, parameter, name, operator, BOOLEAN)
    return partial(_read_value, parameter, name, operator, kind)


def _read_value(parameter: str, name: str, operator: Operator, kind: ValueKind, text: str) -> Criterion:
    return Comparison(name, operator, _value(parameter, kind, text))


def _read_list(parameter: str, name: str, operator: Operator, kind: ValueKind, text: str) -> Criterion:
    parts = text.split(",")
    if len(parts) > _MOST_VALUES:
        raise _refused(parameter, f"expected at most {_MOST_VALUES} values")
    return Comparison(name, operator, tuple(_value(parameter, kind, part) for part in parts))


def _read_range(parameter: str, name: str, kind: ValueKind, text: str) -> Criterion:
    parts = text.split(",")
    if len(parts) != 2:
        raise _refused(parameter, "expected two values separated by a comma")
    low, high = parts
    return Comparison(name, Operator.BETWEEN, (_value(parameter, kind, low), _value(parameter, kind, high)))


def _value(parameter: str, kind: ValueKind, text: str) -> Any:
    try:
        return kind.parse(text)
    except ValueError as error:
        raise _refused(parameter, f"expected {kind.expected}") from error


def _whole(controls: dict[str, str], name: str, default: int, least: int, most: int) -> int:
    if name not in controls:
        return default
    try:
        number = parse_whole_number(controls[name])
    except ValueError:
        number = least - 1
    if not least <= number <= most:
        raise _refused(name, f"expected a whole number from {least} to {most}")
    return number


def _schema(operator: Operator, kind: ValueKind) -> dict[str, Any]:
    if operator is Operator.IS_NULL:
        return BOOLEAN.schema
    if operator in _LISTS:
        return {"type": "array", "items": kind.schema, "minItems": 1, "maxItems": _MOST_VALUES}
    if operator is Operator.BETWEEN:
        return {"type": "array", "items": kind.schema, "minItems": 2, "maxItems": 2}
    return kind.schema


def _parameters(scope: Scope) -> Iterator[tuple[str, str]]:
    # Starlette turns what is not UTF-8 into replacement characters, which would then be searched for.
    query: bytes = scope["query_string"]
    for part in filter(None, query.split(b"&")):
        raw_name, _, raw_value = part.partition(b"=")
        name = unquote_plus(raw_name.decode("utf-8", "replace"), errors="replace")
        try:
            value = unquote_plus(raw_value.decode(), errors="strict")
        except UnicodeDecodeError as error:
            raise _refused(name, "not UTF-8") from error
        yield name, value


def _refused(parameter: str, reason: str) -> InvalidQueryError:
    name = parameter[:_LONGEST_NAME]
    return InvalidQueryError(f"{name}: {reason}", fields=(name,))
