"""The users resource."""

from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Depends, HTTPException, Path, Query, Request, Response

from example_service.app.api.dependencies import Users, UsersInUnit
from example_service.app.application.change_user import change_user
from example_service.app.application.register_user import register_user
from example_service.app.application.remove_user import remove_user
from example_service.app.application.verify_credentials import verify_credentials
from example_service.app.domain.user import User
from example_service.app.infrastructure.repositories.user_repository import UserRepository
from example_service.app.schemas.user import Credentials, SearchText, UserCreate, Username, UserResponse, UserUpdate
from fastapi_building_blocks.api import (
    CursorPageResponse,
    IfMatchVersion,
    ListQuery,
    PageResponse,
    etag_of,
    is_not_modified,
    list_query,
    problem_response,
    problem_responses,
)
from fastapi_building_blocks.domain import CursorPage, InvalidInputError, NotFoundError, Page

router = APIRouter(prefix="/api/v1/users", tags=["users"])

UserId = Annotated[UUID, Path(description="The user's id")]
UserListQuery = Annotated[ListQuery, Depends(list_query(UserRepository, default_sort="-created_at"))]


@router.post("/", status_code=201, responses=problem_responses(400, 409))
async def create_user(body: UserCreate, users: UsersInUnit, response: Response) -> UserResponse:
    """Create a user; 409 where the e-mail or the username is taken."""
    user = await register_user(users, body.to_command())
    response.headers["Location"] = f"{router.prefix}/{user.id}"
    return _answer(user, response)


@router.get("/", response_model=PageResponse[UserResponse] | CursorPageResponse[UserResponse])
async def list_users(
    query: UserListQuery,
    users: Users,
    search: Annotated[SearchText | None, Query(description="Text in username, e-mail or full name")] = None,
) -> Page[User] | CursorPage[User]:
    """List users, the newest first unless ``sort`` says otherwise, by page or by cursor."""
    return await query.page_of(users, *([users.search(search)] if search else []))


@router.get("/by_username/{username}", responses=problem_responses(404))
async def get_user_by_username(username: Annotated[Username, Path()], users: Users, response: Response) -> UserResponse:
    """Return the user with exactly this username."""
    user = await users.get_by_username(username)
    if user is None:
        raise NotFoundError("there is no user with this username", fields=("username",))
    return _answer(user, response)


@router.post("/verify_credentials", responses=problem_responses(400, 401))
async def check_credentials(body: Credentials, users: Users, response: Response) -> UserResponse:
    """Return the active user with this username and password; 401 does not say what was wrong."""
    user = await verify_credentials(users, body.username, body.password)
    if user is None:
        raise HTTPException(401, "the username or the password is wrong")
    return _answer(user, response)


@router.api_route(
    "/verify_credentials",
    methods=["GET", "HEAD", "OPTIONS", "PUT", "PATCH", "DELETE", "TRACE", "QUERY"],
    include_in_schema=False,
)
async def refuse_method(request: Request) -> Response:
    """Answer 405 where ``verify_credentials`` would be taken for a user's id."""
    return problem_response(request, 405, "Method Not Allowed", headers={"Allow": "POST"})


@router.get(
    "/{user_id}",
    response_model=UserResponse,
    responses={304: {"description": "The user is still as the client has it"}, **problem_responses(404)},
)
async def get_user(user_id: UserId, users: Users, request: Request, response: Response) -> UserResponse | Response:
    """Return one user; 304 where ``If-None-Match`` has the current ETag."""
    user = await users.get(user_id)
    etag = etag_of(user.version)
    if is_not_modified(request, etag):
        return Response(status_code=304, headers={"ETag": etag})
    return _answer(user, response)


@router.patch("/{user_id}", responses=problem_responses(400, 404, 409, 412))
async def update_user(
    user_id: UserId, body: UserUpdate, users: UsersInUnit, response: Response, version: IfMatchVersion
) -> UserResponse:
    """Change the fields that are sent: null is written, what is absent stays."""
    changes = body.to_changes()
    if not changes:
        raise InvalidInputError("there is nothing to change: send at least one field")
    return _answer(await change_user(users, user_id, changes, version), response)


@router.delete("/{user_id}", status_code=204, responses=problem_responses(404, 412))
async def delete_user(user_id: UserId, users: UsersInUnit, version: IfMatchVersion) -> None:
    """Delete a user; a second time it is a 404."""
    await remove_user(users, user_id, version)


def _answer(user: User, response: Response) -> UserResponse:
    response.headers["ETag"] = etag_of(user.version)
    return UserResponse.model_validate(user)
