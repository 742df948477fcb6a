"""The users resource."""

from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Depends, HTTPException, Path, Query, Request, Response

from example_service.app.api.dependencies import Users, UsersInUnit
from example_service.app.application.change_user import change_user
from example_service.app.application.register_user import register_user
from example_service.app.application.remove_user import remove_user
from example_service.app.application.verify_credentials import verify_credentials
from example_service.app.domain.user import User
from example_service.app.infrastructure.repositories.user_repository import UserRepository
from example_service.app.schemas.user import (
    Credentials,
    LookedUpUsername,
    SearchText,
    UserCreate,
    UserResponse,
    UserUpdate,
)
from fastapi_building_blocks.api import (
    NO_VERSION,
    CursorPageResponse,
    IfMatchVersions,
    ListQuery,
    PageResponse,
    etag_of,
    is_not_modified,
    list_query,
    page_response,
    problem_response,
    problem_responses,
)
from fastapi_building_blocks.domain import InvalidInputError, NotFoundError, field

router = APIRouter(prefix="/api/v1/users", tags=["users"])

UserId = Annotated[UUID, Path(alias="id", description="The user's id")]
UserListQuery = Annotated[ListQuery, Depends(list_query(UserRepository, default_sort="-created_at"))]

UserPage = PageResponse[UserResponse] | CursorPageResponse[UserResponse]

_ETAG = {"ETag": {"description": "The user's version, for If-Match and If-None-Match", "schema": {"type": "string"}}}
_LOCATION = {"Location": {"description": "The user's path", "schema": {"type": "string", "format": "uri-reference"}}}
_NOT_MODIFIED: dict[int | str, dict[str, Any]] = {
    304: {"description": "The user is still as the client has it", "headers": _ETAG}
}
_IF_NONE_MATCH: dict[str, Any] = {
    "parameters": [
        {
            "name": "If-None-Match",
            "in": "header",
            "required": False,
            "schema": {"type": "string"},
            "description": "The ETag that the client has; 304 if it is still the current.",
        }
    ]
}


async def _expected_version(id: UserId, users: UsersInUnit, versions: IfMatchVersions) -> int | None:
    """Return the version that a change is for: of several under ``If-Match``, the current one if it is among them."""
    if versions is None or len(versions) == 1:
        return None if versions is None else min(versions)
    user = await users.find_one(field("id") == id) if versions else None
    return user.version if user and user.version in versions else NO_VERSION


ExpectedVersion = Annotated[int | None, Depends(_expected_version, scope="function")]


@router.post("/", status_code=201, responses={201: {"headers": _ETAG | _LOCATION}, **problem_responses(400, 409)})
async def create_user(body: UserCreate, users: UsersInUnit, response: Response) -> UserResponse:
    """Create a user; 409 where the e-mail or the username is taken."""
    user = await register_user(users, body.to_command())
    response.headers["Location"] = f"{router.prefix}/{user.id}"
    response.headers["ETag"] = etag_of(user.version)
    return UserResponse.model_validate(user)


@router.get("/", response_model=UserPage)
@router.head("/", response_model=UserPage, include_in_schema=False)
async def list_users(
    query: UserListQuery,
    users: Users,
    search: Annotated[SearchText | None, Query(description="Text in username, e-mail or full name")] = None,
) -> Response:
    """List users, the newest first unless ``sort`` says otherwise, by page or by cursor."""
    page = await query.page_of(users, *([users.search(search)] if search else []))
    return page_response(page, UserResponse)


@router.get(
    "/by_username/{username}",
    response_model=UserResponse,
    responses={200: {"headers": _ETAG}, **_NOT_MODIFIED, **problem_responses(404)},
    openapi_extra=_IF_NONE_MATCH,
)
@router.head("/by_username/{username}", response_model=UserResponse, include_in_schema=False)
async def get_user_by_username(
    username: Annotated[LookedUpUsername, Path()], users: Users, request: Request, response: Response
) -> UserResponse | Response:
    """Return the user with exactly this username; 304 where ``If-None-Match`` has the current ETag."""
    user = await users.get_by_username(username)
    if user is None:
        raise NotFoundError("there is no user with this username", fields=("username",))
    return _answer_unless_known(user, request, response)


@router.post("/verify_credentials", responses=problem_responses(400, 401))
async def check_credentials(body: Credentials, users: Users) -> UserResponse:
    """Return the active user with this username and password; 401 does not say what was wrong."""
    user = await verify_credentials(users, body.username, body.password)
    if user is None:
        # RFC 9110, 15.5.2 wants a challenge; a scheme of our own, since no Authorization header would help.
        raise HTTPException(
            401, "the username or the password is wrong", headers={"WWW-Authenticate": 'Credentials realm="users"'}
        )
    return UserResponse.model_validate(user)


@router.api_route(
    "/verify_credentials",
    methods=["GET", "HEAD", "OPTIONS", "PUT", "PATCH", "DELETE", "TRACE", "QUERY"],
    include_in_schema=False,
)
async def refuse_method(request: Request) -> Response:
    """Answer 405 where ``verify_credentials`` would be taken for a user's id."""
    return problem_response(request, 405, "Method Not Allowed", headers={"Allow": "POST"})


@router.get(
    "/{id}",
    response_model=UserResponse,
    responses={200: {"headers": _ETAG}, **_NOT_MODIFIED, **problem_responses(404)},
    openapi_extra=_IF_NONE_MATCH,
)
@router.head("/{id}", response_model=UserResponse, include_in_schema=False)
async def get_user(id: UserId, users: Users, request: Request, response: Response) -> UserResponse | Response:
    """Return one user; 304 where ``If-None-Match`` has the current ETag."""
    return _answer_unless_known(await users.get(id), request, response)


@router.patch("/{id}", responses={200: {"headers": _ETAG}, **problem_responses(400, 404, 409, 412)})
async def update_user(
    id: UserId, body: UserUpdate, users: UsersInUnit, response: Response, version: ExpectedVersion
) -> UserResponse:
    """Change the fields that are sent: null is written, what is absent stays."""
    changes = body.to_changes()
    if not changes:
        raise InvalidInputError("there is nothing to change: send at least one field")
    user = await change_user(users, id, changes, version)
    response.headers["ETag"] = etag_of(user.version)
    return UserResponse.model_validate(user)


@router.delete("/{id}", status_code=204, response_class=Response, responses=problem_responses(404, 412))
async def delete_user(id: UserId, users: UsersInUnit, version: ExpectedVersion) -> None:
    """Delete a user; a second time it is a 404."""
    await remove_user(users, id, version)


def _answer_unless_known(user: User, request: Request, response: Response) -> UserResponse | Response:
    etag = etag_of(user.version)
    if is_not_modified(request, etag):
        return Response(status_code=304, headers={"ETag": etag})
    response.headers["ETag"] = etag
    return UserResponse.model_validate(user)
