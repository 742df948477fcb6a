"""The data layer of a FastAPI service: sessions, units of work, repositories.

The names that most services need are here; they are imported when they are first asked for, so that a
service's own domain can use ``fastapi_building_blocks.domain`` without loading a database toolkit.
"""

import typing as _typing
from importlib import import_module as _import_module

if _typing.TYPE_CHECKING:
    from fastapi_building_blocks.domain import CursorRequest, PageRequest, Sort, field
    from fastapi_building_blocks.infrastructure import (
        BaseRepository,
        DatabaseSettings,
        InMemorySession,
        SQLAlchemyRepository,
        SQLAlchemySession,
        UnitOfWork,
    )

__all__ = [
    "BaseRepository",
    "CursorRequest",
    "DatabaseSettings",
    "InMemorySession",
    "PageRequest",
    "SQLAlchemyRepository",
    "SQLAlchemySession",
    "Sort",
    "UnitOfWork",
    "field",
]

_OF_THE_DOMAIN = frozenset({"CursorRequest", "PageRequest", "Sort", "field"})


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    package = "domain" if name in _OF_THE_DOMAIN else "infrastructure"
    value: object = getattr(_import_module(f"{__name__}.{package}"), name)
    globals()[name] = value
    return value
