"""Entity classes as derived mappers see them: dataclasses, Pydantic models and attrs classes.

Which fields one declares, and how an instance is made from stored values without its ``__init__``: loading trusts the
database, so nothing is validated or converted again. ``__post_init__``, ``__attrs_post_init__`` and ``model_post_init``
run. attrs is recognised by what it leaves on a class and never imported.
"""

import dataclasses
import keyword
from abc import ABCMeta
from collections.abc import Callable, Collection, Mapping
from typing import Any, Generic

import pydantic
import sqlalchemy as sa

Names = dict[str, Any]
"""What generated source refers to."""


@dataclasses.dataclass(frozen=True, slots=True)
class EntityField:
    """Where an entity keeps a column's value."""

    attribute: str
    init: bool = True


def _entity_fields(entity_class: type[Any], columns: Collection[str]) -> dict[str, EntityField] | None:
    """Return each field by the name of its column, or None where the class declares none."""
    if isinstance(entity_class, type) and issubclass(entity_class, pydantic.BaseModel):
        return {name: EntityField(name) for name in entity_class.model_fields}
    attributes: Any = getattr(entity_class, "__attrs_attrs__", None)
    if attributes is not None:
        # A private attribute is known to callers by its alias: ``_secret`` is given as ``secret``.
        return {
            attribute.name if attribute.name in columns else attribute.alias: EntityField(
                attribute.name, attribute.init
            )
            for attribute in attributes
        }
    if dataclasses.is_dataclass(entity_class):
        every: Mapping[str, Any] = entity_class.__dataclass_fields__
        arguments = [name for name, field in every.items() if field._field_type is dataclasses._FIELD_INITVAR]  # type: ignore[attr-defined]
        if arguments:
            raise TypeError(
                f"{entity_class.__name__} takes {', '.join(arguments)} without keeping it (InitVar), so an entity cannot "
                "be made from a row alone: write _row_to_entity() and _entity_to_dict()"
            )
        return {field.name: EntityField(field.name, field.init) for field in dataclasses.fields(entity_class)}
    return None


def matching_fields(entity_class: type[Any], table: sa.Table) -> dict[str, EntityField]:
    """Return where an entity keeps each column, in the order of the class.

    Raises:
        TypeError: the class declares no fields, or fields and columns differ; the message names both sides.
    """
    columns = [column.key for column in table.columns]
    fields = _entity_fields(entity_class, columns)
    remedy = "write _row_to_entity() and _entity_to_dict()"
    name = getattr(entity_class, "__name__", repr(entity_class))
    if fields is None:
        raise TypeError(f"{name} is no dataclass, Pydantic model or attrs class: {remedy}")
    strangers = [key for key in fields if key not in columns]
    homeless = [key for key in columns if key not in fields]
    if strangers or homeless:
        raise TypeError(
            f"{name} and table {table.name!r} do not match: "
            f"fields without a column: {', '.join(strangers) or 'none'}; "
            f"columns without a field: {', '.join(homeless) or 'none'}. Make them match, or {remedy}"
        )
    return fields


def construction_source(
    entity_class: type[Any], attributes: Mapping[str, str], late: list[str]
) -> tuple[list[str], Names]:
    """Return the lines that make an entity ``e`` without its ``__init__``, from attribute to source of its value."""
    names: Names = {"new": object.__new__, "C": entity_class}
    if issubclass(entity_class, pydantic.BaseModel):
        return _pydantic_construction(entity_class, attributes, names)
    code = getattr(entity_class.__hash__, "__code__", None)
    if code is not None and "_attrs_cached_hash" in code.co_names:
        attributes = {**attributes, "_attrs_cached_hash": "None"}  # attrs' __init__ would prepare the cache
    lines = ["e = new(C)"]
    setters = {name: f"e.{name} = {place}" for name, place in attributes.items()}
    if vars(object)["__setattr__"] is entity_class.__setattr__:
        lines += setters.values()
    else:
        # Frozen classes and attrs' hooks have a __setattr__ of their own, and going past it costs a call a field.
        twin = _unguarded_twin(entity_class)
        names["put"] = object.__setattr__
        late_setters = {name: f"put(e, {name!r}, {place})" for name, place in attributes.items()}
        if twin is None:
            lines += late_setters.values()
        else:
            names["Twin"] = twin
            lines = ["e = new(Twin)", *setters.values(), "e.__class__ = C"]
        setters = late_setters
    for hook in ("__post_init__", "__attrs_post_init__"):
        if hasattr(entity_class, hook):
            lines.append(f"e.{hook}()")
            lines += [setters[name] for name in late]  # what it computed gives way to what is stored
    return lines, names


def _unguarded_twin(entity_class: type[Any]) -> type[Any] | None:
    """Return a class of the same layout with the ordinary ``__setattr__``, whose instances can become the entity's."""
    ordinary = {"__setattr__": object.__setattr__, "__delattr__": object.__delattr__}  # one slot of the C type
    candidates: list[Callable[[], type[Any]]] = [lambda: type("Twin", (), {})]
    hooked = any("__init_subclass__" in vars(base) for base in entity_class.__mro__ if base not in (object, Generic))
    if type(entity_class) in (type, ABCMeta) and not hooked:
        # Slots only match those of a subclass; making one may not run code of the service's own.
        candidates.append(lambda: type("Twin", (entity_class,), {"__slots__": (), **ordinary}))
    for candidate in candidates:
        try:
            twin = candidate()
            object.__setattr__(object.__new__(twin), "__class__", entity_class)
        except TypeError:
            continue
        return twin
    return None


def _pydantic_construction(
    model: type[pydantic.BaseModel], attributes: Mapping[str, str], names: Names
) -> tuple[list[str], Names]:
    slots = vars(pydantic.BaseModel)
    names |= {
        "fields": set(attributes),
        "put_values": slots["__dict__"].__set__,
        "put_fields": slots["__pydantic_fields_set__"].__set__,
        "put_extra": slots["__pydantic_extra__"].__set__,
        "put_private": slots["__pydantic_private__"].__set__,
    }
    values = ", ".join(f"{name!r}: {place}" for name, place in attributes.items())
    lines = [
        "e = new(C)",
        f"put_values(e, {{{values}}})",
        "put_fields(e, fields.copy())",
        f"put_extra(e, {'{}' if model.model_config.get('extra') == 'allow' else 'None'})",
        "put_private(e, None)",
    ]
    if model.__pydantic_post_init__:
        lines.append("e.model_post_init(None)")
    return lines, names


def read_source(attribute: str) -> str:
    """Return the source that reads an attribute of ``e``; a model made at run time may have names that are no words."""
    plain = attribute.isidentifier() and not keyword.iskeyword(attribute)
    return f"e.{attribute}" if plain else f"getattr(e, {attribute!r})"
