"""What a route declares through its dependencies, read from FastAPI's own tree of them."""

from collections.abc import Iterator
from typing import Any

from fastapi.dependencies.models import Dependant
from fastapi.routing import iter_route_contexts
from fastapi.security import APIKeyQuery
from starlette._utils import get_route_path
from starlette.types import Scope


def every_dependant(dependant: Dependant) -> Iterator[Dependant]:
    """Iterate over a dependant and everything that it depends on."""
    yield dependant
    for dependency in dependant.dependencies:
        yield from every_dependant(dependency)


def declared_query_parameters(scope: Scope) -> set[str]:
    """Return the names of the query parameters that the request's endpoint and its dependencies declare."""
    # Dependencies given to include_router() are only in the route's context there.
    routes: list[Any] = [scope.get("route"), scope.get("fastapi", {}).get("effective_route_context")]
    names: set[str] = set()
    for route in routes:
        root = getattr(route, "dependant", None)
        if not isinstance(root, Dependant):
            continue
        for dependant in every_dependant(root):
            for parameter in dependant.query_params:
                fields = getattr(parameter.field_info.annotation, "model_fields", None)
                names.update(fields if fields is not None else (parameter.alias,))
            if isinstance(dependant.call, APIKeyQuery):
                names.add(dependant.call.model.name)
    return names


def methods_of_path(scope: Scope) -> set[str]:
    """Return the methods that the request's path has, whichever routes they belong to."""
    path = get_route_path(scope)
    methods: set[str] = set()
    for route in iter_route_contexts(scope["app"].routes):
        regex = getattr(route, "path_regex", None)
        if regex is not None and regex.match(path):
            methods.update(route.methods or ())
    return methods
