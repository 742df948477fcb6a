"""Pages as response models, ``response_model=PageResponse[UserResponse]``, and pages written straight as JSON."""

import keyword
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Generic, TypeVar

from fastapi.exceptions import ResponseValidationError
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import SchemaSerializer, SchemaValidator, core_schema

from fastapi_building_blocks.domain import CursorPage, Page

T = TypeVar("T")


class PageResponse(BaseModel, Generic[T]):
    """One page by offset; made from a ``Page`` by returning it."""

    model_config = ConfigDict(from_attributes=True)

    items: list[T] = Field(description="The entities on this page.")
    total: int | None = Field(description="How many match on all pages; null where it was not counted.")
    limit: int = Field(description="How many a page holds at most.")
    offset: int = Field(description="How many come before this page.")
    has_next: bool = Field(description="Whether a page follows.")
    has_prev: bool = Field(description="Whether a page comes before.")
    total_is_capped: bool = Field(
        default=False,
        exclude_if=lambda capped: not capped,
        description="Present and true where total is only a lower bound.",
    )


class CursorPageResponse(BaseModel, Generic[T]):
    """One page by keyset; made from a ``CursorPage`` by returning it."""

    model_config = ConfigDict(from_attributes=True)

    items: list[T] = Field(description="The entities on this page.")
    next_cursor: str | None = Field(description="The cursor of the page that follows, if one does.")
    prev_cursor: str | None = Field(description="The cursor of the page before, if there is one.")


def page_response(page: Page[Any] | CursorPage[Any], item_model: Any) -> Response:
    """Answer a page byte for byte as ``response_model=PageResponse[item_model]`` would, without a model per row.

    The route keeps its ``response_model`` for the OpenAPI document. As with every ``Response`` that an endpoint
    returns, FastAPI applies neither the route's ``status_code`` and ``response_model_*`` options nor the headers of
    an injected ``Response``.

    Args:
        page: what a repository answered.
        item_model: the model of one item. What it does to a value (validators, constraints, conversions, serializers
            of fields) is done here as well; a model that needs itself whole (computed fields, validators and
            serializers of the model or with its ``info``) is made for every row, as FastAPI does.

    Raises:
        ResponseValidationError: an entity does not fit the model, as FastAPI would say.
    """
    kind: type[BaseModel] = CursorPageResponse if isinstance(page, CursorPage) else PageResponse
    content = _straight(page, kind, item_model) or _validated(page, kind, item_model)
    return Response(content, media_type="application/json")


_adapter: Callable[[Any], TypeAdapter[Any]] = cache(TypeAdapter)


def _validated(page: Any, kind: Any, item_model: Any) -> bytes:
    """Write a page as FastAPI does."""
    adapter = _adapter(kind[item_model])
    try:
        shown = adapter.validate_python(page, from_attributes=True)
    except ValidationError as error:
        errors = [{**item, "loc": ("response", *item["loc"])} for item in error.errors(include_url=False)]
        raise ResponseValidationError(errors, body=page) from error
    return adapter.dump_json(shown, by_alias=True)


def _straight(page: Any, kind: Any, item_model: Any) -> bytes | None:
    """Write a page without a model per row; None where this cannot be known to answer the same."""
    items = page.items
    classes = set(map(type, items)) if type(items) in (list, tuple) else ()
    if len(classes) != 1:
        return None
    key = (kind, item_model, *classes)
    try:
        if key not in _writers:
            _writers[key] = _writer(kind, item_model, items[0])
        writer = _writers[key]
        if writer is None:
            return None
        envelope = vars(_adapter(kind[Any]).validate_python(page, from_attributes=True))
        shown = envelope | {"items": writer.rows(items)}
        return writer.serializer.to_json(shown, by_alias=True, warnings="error")
    except Exception:  # noqa: BLE001 - validating says what is wrong, as FastAPI does
        return None


# How rows are written: a dict of each entity's attributes, and for it the serializers of the model's own fields.


@dataclass(frozen=True, slots=True)
class _Writer:
    """How a page of entities of one class becomes JSON."""

    rows: Callable[[Sequence[Any]], list[dict[str, Any]]]
    serializer: SchemaSerializer


_writers: dict[tuple[Any, ...], _Writer | None] = {}

# What may stand in a schema and has no say in what is answered. Where anything else stands, also what pydantic has
# yet to think of, the value is validated, or the whole model.
_IDLE = frozenset({"type", "ref", "metadata"})
_IDLE_IN_MODEL = _IDLE | {"cls", "schema", "config", "custom_init", "root_model", "frozen"}
_IDLE_IN_FIELDS = _IDLE | {"fields", "model_name", "computed_fields"}
_IDLE_IN_FIELD = _IDLE | {"schema", "validation_alias", "serialization_alias", "frozen"}
_EXCLUDING = frozenset({"serialization_exclude", "serialization_exclude_if"})
_IDLE_IN_CONFIG = frozenset(
    {
        *("title", "from_attributes", "extra_fields_behavior", "hide_input_in_errors"),
        *("validate_by_alias", "validate_by_name", "serialize_by_alias"),
    }
)
# Of these types a validator lets every value pass unchanged that the serializer takes without a warning. None is the
# exception: serializers take it for anything.
_PASSING = {
    **dict.fromkeys(("any", "str", "int", "float", "bool", "uuid", "date"), _IDLE),
    **dict.fromkeys(("datetime", "time", "timedelta"), _IDLE | {"microseconds_precision"}),
    "enum": _IDLE | {"cls", "members", "sub_type"},
}
_WRAPPING = {
    "nullable": _IDLE | {"schema"},
    "default": _IDLE | {"schema", "default", "default_factory", "default_factory_takes_data", "validate_default"},
}


def _writer(kind: Any, item_model: Any, entity: Any) -> _Writer | None:
    """Return how entities of this one's class are written; None where each of them has to become a model."""
    schema: Any = _adapter(item_model).core_schema
    definitions: list[Any] = []
    if schema["type"] == "definitions":
        definitions, schema = schema["definitions"], schema["schema"]
    if schema["type"] == "definition-ref":
        schema = next(item for item in definitions if item["ref"] == schema["schema_ref"])
    if not _is_only_fields(schema) or any(map(_wants_the_model, _parts([schema, definitions]))):
        return None
    if isinstance(entity, schema["cls"] | Mapping) or type(entity).__module__ == "builtins":
        return None  # pydantic reads none of these by attributes
    rows = _rows(schema["schema"]["fields"], schema["config"], definitions, entity)
    if rows is None:
        return None
    row = core_schema.typed_dict_schema(_typed_dict_fields(schema["schema"]["fields"]))
    envelope: Any = _adapter(kind[Any]).core_schema
    page = _typed_dict_fields(envelope["schema"]["fields"])
    page["items"] = core_schema.typed_dict_field(core_schema.list_schema(row))
    written = _whole(core_schema.typed_dict_schema(page), definitions)
    return _Writer(rows, SchemaSerializer(written))


def _rows(fields: Mapping[str, Any], config: Any, definitions: list[Any], entity: Any) -> Any:
    """Generate the function that reads entities of this one's class; None where it cannot be known what to read."""
    attributes, preferred = _attributes(fields, config)
    if None in attributes or (preferred and not _lacks(preferred, entity)):
        return None
    names: dict[str, Any] = {"preferred": preferred}
    columns, values, refused, each = [], [], [], {"entity": "entities"}
    if preferred and hasattr(entity, "__dict__"):
        refused.append("not preferred.isdisjoint(entity.__dict__)")
    for number, (field, attribute) in enumerate(zip(fields.values(), attributes, strict=True)):
        part = _whole(field["schema"], definitions)
        value = f"getattr(entity, {attribute!r})"
        if attribute.isascii() and attribute.isidentifier() and not keyword.iskeyword(attribute):
            value = f"entity.{attribute}"
        if _passes(field) and _takes(SchemaSerializer(part, config), getattr(entity, attribute, None)):
            values.append(f"  f{number} = {value}")
            if not _is_nullable(field["schema"]):
                refused.append(f"f{number} is None")
        else:  # one call of the validator for all entities costs a tenth of one for each
            validator = SchemaValidator(core_schema.list_schema(part), config)
            names[f"validate{number}"] = partial(validator.validate_python, from_attributes=True)
            columns.append(f" c{number} = validate{number}([{value} for entity in entities])")
            each[f"f{number}"] = f"c{number}"
    if refused:
        values += [f"  if {' or '.join(refused)}:", "   raise TypeError"]
    shown = ", ".join(f"{name!r}: f{number}" for number, name in enumerate(fields))
    loop = f" for {', '.join(each)}, in zip({', '.join(each.values())}):"
    lines = [
        "def rows(entities):",
        " rows = []",
        *columns,
        loop,
        *values,
        f"  rows.append({{{shown}}})",
        " return rows",
    ]
    exec(compile("\n".join(lines), "<generated rows>", "exec"), names)  # noqa: S102 - from identifiers and literals
    return names["rows"]


def _whole(part: Any, definitions: list[Any]) -> Any:
    return core_schema.definitions_schema(part, definitions) if definitions else part


def _is_only_fields(schema: Any) -> bool:
    """Whether a model is nothing but its fields: no validators, serializers, computed fields or initialisation."""
    if schema["type"] != "model" or schema["schema"]["type"] != "model-fields":
        return False
    config, fields = schema["config"], schema["schema"]
    if _says(schema, _IDLE_IN_MODEL) or _says(fields, _IDLE_IN_FIELDS) or _says(config, _IDLE_IN_CONFIG):
        return False
    if any(_says(field, _IDLE_IN_FIELD | _EXCLUDING) for field in fields["fields"].values()):
        return False
    own = schema["custom_init"] or schema["root_model"] or fields["computed_fields"]
    return not own and config.get("extra_fields_behavior") != "allow"


def _says(schema: Mapping[str, Any], idle: frozenset[str]) -> bool:
    return not schema.keys() <= idle


def _parts(schema: Any) -> Iterator[Mapping[str, Any]]:
    """Return every mapping in a schema."""
    if isinstance(schema, dict):
        yield schema
    children: Iterable[Any] = schema.values() if isinstance(schema, dict) else schema
    for child in children:
        if isinstance(child, dict | list):
            yield from _parts(child)


def _wants_the_model(part: Mapping[str, Any]) -> bool:
    """Whether this is a function that is given the model, or the values of other fields."""
    return part.get("type") == "with-info" or bool(part.get("is_field_serializer"))


def _attributes(fields: Mapping[str, Any], config: Mapping[str, Any]) -> tuple[list[Any], frozenset[str]]:
    """Return what each field is read from (None where that is a path or a choice), and the aliases tried before."""
    by_alias, by_name = config.get("validate_by_alias", True), config.get("validate_by_name", False)
    attributes: list[Any] = []
    preferred = set()
    for name, field in fields.items():
        alias = field.get("validation_alias", name) if by_alias else name
        if by_name and alias != name:
            preferred.add(alias if isinstance(alias, str) else None)
            alias = name
        attributes.append(alias if isinstance(alias, str) and None not in preferred else None)
    return attributes, frozenset(filter(None, preferred))


def _lacks(names: frozenset[str], entity: Any) -> bool:
    """Whether no entity of this class has these attributes, unless in its ``__dict__``."""
    own = {name for kind in type(entity).__mro__[:-1] for name in vars(kind)}
    return own.isdisjoint({"__getattr__", "__getattribute__"}) and not any(hasattr(entity, name) for name in names)


def _passes(field: Mapping[str, Any]) -> bool:
    """Whether validation would change no value of this field that its serializer takes, except for None."""
    schema, idle = field, _IDLE_IN_FIELD
    while not _says(schema, idle) and "schema" in schema:
        schema = schema["schema"]
        idle = _WRAPPING.get(schema["type"], _PASSING.get(schema["type"], frozenset()))
    return not _says(schema, idle)


def _is_nullable(schema: Mapping[str, Any]) -> bool:
    return schema["type"] in ("nullable", "any") or (schema["type"] == "default" and _is_nullable(schema["schema"]))


def _takes(serializer: SchemaSerializer, value: Any) -> bool:
    try:
        serializer.to_json(value, warnings="error")
    except Exception:  # noqa: BLE001 - a value can fail as it likes
        return False
    return True


def _typed_dict_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    kept = {"schema", "serialization_alias", *_EXCLUDING}
    return {
        name: {"type": "typed-dict-field", **{key: value for key, value in field.items() if key in kept}}
        for name, field in fields.items()
    }
