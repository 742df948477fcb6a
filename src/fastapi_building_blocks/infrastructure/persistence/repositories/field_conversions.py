"""What lies between an entity's field and its column where the two are of different types.

An enum over a text column, a nested model over a JSON column, a URL over a text: derived from the annotation once per
repository class. A field whose type is the column's own needs nothing.
"""

import dataclasses
import enum
import json
import typing
from collections.abc import Callable, Mapping
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pydantic
import sqlalchemy as sa
from pydantic import TypeAdapter

from fastapi_building_blocks.domain.errors import InvalidInputError


@dataclasses.dataclass(frozen=True, slots=True)
class Conversion:
    """Both ways between a field and a column, for values that are not None.

    ``load`` is a dict where every value is known beforehand: a subscript is faster than a call.
    """

    load: Callable[[Any], Any] | dict[Any, Any]
    dump: Callable[[Any], Any]


# Their values are plain: the class only tells Pydantic what to validate, which loading does not repeat.
_PYDANTIC_MARKERS = (
    pydantic.EmailStr,
    pydantic.AwareDatetime,
    pydantic.NaiveDatetime,
    pydantic.PastDate,
    pydantic.FutureDate,
    pydantic.PastDatetime,
    pydantic.FutureDatetime,
)
_JSON_TYPES = (Any, object, dict, list, str, int, float, bool, NoneType, pydantic.JsonValue, Mapping, typing.Sequence)


def annotations_of(entity_class: type[Any]) -> Mapping[str, Any]:
    """Return each field's type; a name that cannot be resolved is taken as the column's own type."""
    if issubclass(entity_class, pydantic.BaseModel):
        return {name: field.annotation for name, field in entity_class.model_fields.items()}
    try:
        return typing.get_type_hints(entity_class, include_extras=True)
    except NameError:
        return {}


def conversion_for(name: str, annotation: Any, column: sa.Column[Any]) -> Conversion | None:
    """Return what converts between a field of this type and the column, or None where nothing has to.

    Raises:
        TypeError: the field's type cannot be kept in such a column by derived mappers.
    """
    if isinstance(column.type, sa.Enum):
        return None
    if isinstance(column.type, sa.JSON):
        return None if _is_json(annotation) else _adapted(name, annotation)
    core = core_type(annotation)
    if not isinstance(core, type) or core in (Any, object) or core in _PYDANTIC_MARKERS:
        return None
    if issubclass(core, enum.Enum):
        return _enum(name, core)
    if issubclass(core, pydantic.SecretStr | pydantic.SecretBytes):
        return Conversion(core, _secret_value)
    try:
        stored = column.type.python_type
    except NotImplementedError:
        return None
    if stored is object or issubclass(stored, core):
        return None
    if issubclass(core, stored):
        return Conversion(core, _same)
    return _adapted(name, annotation)


def _same(value: Any) -> Any:
    return value


def _secret_value(value: Any) -> Any:
    return value.get_secret_value() if hasattr(value, "get_secret_value") else value


def core_type(annotation: Any) -> Any:
    """Return the type under Annotated, Optional, NewType and a type alias."""
    while True:
        origin = get_origin(annotation)
        if origin is Annotated:
            annotation = get_args(annotation)[0]
        elif origin in (Union, UnionType):
            members = [member for member in get_args(annotation) if member is not NoneType]
            if len(members) != 1:
                return Any
            annotation = members[0]
        elif hasattr(annotation, "__supertype__"):
            annotation = annotation.__supertype__
        elif hasattr(annotation, "__value__") and not isinstance(annotation, type):
            annotation = annotation.__value__
        else:
            return annotation


def _is_json(annotation: Any) -> bool:
    """Whether values of this type are what ``json.loads`` answers, all the way down."""
    if annotation in _JSON_TYPES:
        return True
    origin = get_origin(annotation)
    if origin is Annotated:
        return _is_json(get_args(annotation)[0])
    if origin is Literal:
        return True
    return origin in (dict, list, Union, UnionType) and all(_is_json(argument) for argument in get_args(annotation))


class _Members(dict[Any, Any]):
    """The members of an enum by value; an unknown value is the enum's to refuse or to adopt (``_missing_``)."""

    def __init__(self, kind: type[enum.Enum]) -> None:
        super().__init__({member.value: member for member in kind})
        self._kind = kind

    def __missing__(self, value: Any) -> Any:
        return self._kind(value)


def _enum(name: str, kind: type[enum.Enum]) -> Conversion:
    def dump(value: Any) -> Any:
        if type(value) is kind:
            return value._value_
        try:
            return kind(value).value
        except ValueError as error:
            choices = ", ".join(str(member.value) for member in kind)
            raise InvalidInputError(f"{name}: expected one of {choices}", fields=(name,)) from error

    return Conversion(_Members(kind), dump)


def _adapted(name: str, annotation: Any) -> Conversion:
    remedy = "by derived mappers; write _row_to_entity() and _entity_to_dict()"
    try:
        adapter: TypeAdapter[Any] = TypeAdapter(annotation)
    except pydantic.errors.PydanticUserError as error:
        raise TypeError(f"{name}: a value of type {annotation} cannot be kept in its column {remedy}") from error
    if _holds_secret(adapter):
        raise TypeError(f"{name}: a secret inside {annotation} would be stored masked {remedy}")
    validate, serialize = adapter.validate_python, adapter.dump_python

    def load(value: Any) -> Any:
        return validate(value, strict=False, by_alias=False, by_name=True)

    def plain(value: Any) -> Any:
        document = serialize(value, mode="json", by_alias=False, warnings="error")
        load(document)  # what is written can be read again, whatever was assigned to the object meanwhile
        return document

    def dump(value: Any) -> Any:
        try:
            return plain(value)
        except (ValueError, TypeError):
            pass  # not an object of the type: perhaps its fields, as a partial update gives them
        try:
            return plain(load(value))
        except (ValueError, TypeError) as error:
            raise InvalidInputError(f"{name}: the value does not have the field's type", fields=(name,)) from error

    return Conversion(load, dump)


def _holds_secret(adapter: TypeAdapter[Any]) -> bool:
    try:
        return '"writeOnly": true' in json.dumps(adapter.json_schema())
    except pydantic.errors.PydanticUserError:
        return False  # JSON Schema has no words for the type, so it is none of Pydantic's own secrets
