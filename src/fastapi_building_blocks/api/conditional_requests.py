"""Conditional requests (RFC 9110, section 13) on entities with a version."""

import re
from collections.abc import Callable
from typing import Annotated, Generic, TypeVar

from fastapi import Depends
from starlette.requests import Request

from fastapi_building_blocks.domain.errors import InvalidInputError

NO_VERSION = -1
"""A version that no entity has: what an ``If-Match`` expects that cannot hold."""

_LARGEST = 2**63 - 1
_TAG = r'(?:W/)?"[\x21\x23-\x7e\x80-\xff]*"'
# RFC 9110, 5.6.1: empty elements of a list are allowed, and mean nothing.
_TAGS = re.compile(rf"[ \t,]*{_TAG}(?:[ \t]*,[ \t,]*{_TAG})*[ \t,]*")
_EACH_TAG = re.compile(_TAG)
_VERSION = re.compile(r'"(0|[1-9][0-9]{0,18})"')
_DOCUMENTED = '^(\\*|(W/)?"[!#-~]*"( *, *(W/)?"[!#-~]*")*)$'


def etag_of(version: int) -> str:
    """Return the strong entity tag of a version: ``"3"``, quotes included."""
    return f'"{version}"'


def if_match_version(request: Request) -> int | None:
    """Return the version that ``If-Match`` expects, for ``patch`` or ``update``; None: any version will do.

    The comparison is strong, so a weak tag, like one that is no version, never matches: that is ``NO_VERSION``, and
    the repository answers ``StaleVersionError`` (412). Of several versions the newest counts; a service that lets
    any of them pass, as RFC 9110 has it, takes ``if_match_versions`` and picks the current one.

    Raises:
        InvalidInputError: the header is malformed.
    """
    versions = if_match_versions(request)
    return None if versions is None else max(versions, default=NO_VERSION)


def if_match_versions(request: Request) -> frozenset[int] | None:
    """Return the versions that ``If-Match`` lists, any of which may be the current one; None: any version will do.

    Tags that cannot match are left out: an empty set lets no version pass.

    Raises:
        InvalidInputError: the header is malformed.
    """
    given = request.headers.getlist("if-match")
    if not given:
        return None
    header = ", ".join(given).strip()
    if header == "*":
        return None
    if not _TAGS.fullmatch(header):
        raise InvalidInputError('If-Match: expected entity tags such as "3", or *', fields=("If-Match",))
    versions = (int(found[1]) for tag in _EACH_TAG.findall(header) if (found := _VERSION.fullmatch(tag)))
    return frozenset(version for version in versions if version <= _LARGEST)


def is_not_modified(request: Request, etag: str) -> bool:
    """Return whether ``If-None-Match`` names what the client would get, so that 304 is the answer.

    The comparison is weak; a malformed header is as good as none, since the whole answer is never wrong.
    """
    header = ", ".join(request.headers.getlist("if-none-match")).strip()
    if header == "*":
        return True
    if not _TAGS.fullmatch(header):
        return False
    return etag.removeprefix("W/") in {tag.removeprefix("W/") for tag in _EACH_TAG.findall(header)}


T = TypeVar("T")


class _IfMatch(Generic[T]):
    """A reader of ``If-Match`` as a dependency."""

    def __init__(self, read: Callable[[Request], T]) -> None:
        self._read = read
        self.openapi_parameters = [
            {
                "name": "If-Match",
                "in": "header",
                "required": False,
                "schema": {"type": "string", "pattern": _DOCUMENTED},
                "description": "The version that the change is for, as its ETag; 412 if it is no longer the current.",
            }
        ]

    async def __call__(self, request: Request) -> T:
        return self._read(request)


IfMatchVersion = Annotated[int | None, Depends(_IfMatch(if_match_version))]
"""``if_match_version`` as a parameter of an endpoint, with the header in the OpenAPI document."""

IfMatchVersions = Annotated[frozenset[int] | None, Depends(_IfMatch(if_match_versions))]
"""``if_match_versions`` as a parameter of an endpoint, with the header in the OpenAPI document."""
