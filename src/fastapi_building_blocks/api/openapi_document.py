"""What FastAPI cannot know about the OpenAPI document: every error is a problem, and what lists take."""

import json
from collections.abc import Callable, Iterator
from typing import Any, Protocol, runtime_checkable

from fastapi import FastAPI
from fastapi.routing import iter_route_contexts
from pydantic import BaseModel

from .route_dependants import every_dependant

PROBLEM_MEDIA_TYPE = "application/problem+json"

_SCHEMAS = "#/components/schemas/"
_PROBLEM = "ProblemDetails"
_FASTAPI_ERROR = "HTTPValidationError"
_METHODS = frozenset({"get", "put", "post", "delete", "options", "head", "patch", "trace"})


@runtime_checkable
class DocumentsParameters(Protocol):
    """A dependency that reads the query string by itself, and says what it takes there."""

    openapi_parameters: list[dict[str, Any]]


def problem_reference(description: str) -> dict[str, Any]:
    """Return an OpenAPI response that refers to the problem's schema."""
    return {
        "description": description,
        "content": {PROBLEM_MEDIA_TYPE: {"schema": {"$ref": _SCHEMAS + _PROBLEM}}},
    }


def described(app: FastAPI, problem: type[BaseModel]) -> Callable[[], dict[str, Any]]:
    """Return a replacement of ``app.openapi`` that completes each document that FastAPI makes, once.

    Every operation gets the problem as its default response, and as 400 where FastAPI would list 422.
    """
    generate = app.openapi
    complete: dict[str, Any] | None = None

    def openapi() -> dict[str, Any]:
        nonlocal complete
        document = generate()  # the same object again until routes are added
        if document is not complete:
            _document_lists(app, document)
            _document_problems(document, problem)
            complete = document
        return document

    return openapi


def _operations(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for path in document.get("paths", {}).values():
        for method, operation in path.items():
            if method in _METHODS:
                yield operation


def _document_lists(app: FastAPI, document: dict[str, Any]) -> None:
    for route in iter_route_contexts(app.routes):
        dependant = getattr(route, "dependant", None)
        path = document.get("paths", {}).get(route.path_format)
        if dependant is None or path is None:
            continue
        calls: list[Any] = [dependency.call for dependency in every_dependant(dependant)]
        parameters = [
            parameter
            for call in calls
            if isinstance(call, DocumentsParameters)
            for parameter in call.openapi_parameters
        ]
        for method in route.methods or () if parameters else ():
            operation = path.get(method.lower())
            if operation is not None:
                listed = operation.setdefault("parameters", [])
                known = {(parameter["in"], parameter["name"]) for parameter in listed}
                listed.extend(item for item in parameters if (item["in"], item["name"]) not in known)


def _document_problems(document: dict[str, Any], problem: type[BaseModel]) -> None:
    for operation in _operations(document):
        responses = operation["responses"]
        if _is_fastapi_error(responses.get("422")):
            del responses["422"]
        if operation.get("parameters") or "requestBody" in operation:
            responses.setdefault("400", problem_reference("The request is not valid"))
        responses.setdefault("default", problem_reference("Any other problem"))
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    if f'"{_SCHEMAS}{_FASTAPI_ERROR}"' not in json.dumps(document):
        schemas.pop(_FASTAPI_ERROR, None)
        if f'"{_SCHEMAS}ValidationError"' not in json.dumps(document):
            schemas.pop("ValidationError", None)
    schema = problem.model_json_schema(mode="serialization", ref_template=_SCHEMAS + "{model}")
    schemas.update(schema.pop("$defs", {}))
    schemas[_PROBLEM] = schema


def _is_fastapi_error(response: dict[str, Any] | None) -> bool:
    content = (response or {}).get("content", {}).get("application/json", {})
    return bool(content.get("schema", {}).get("$ref") == _SCHEMAS + _FASTAPI_ERROR)
