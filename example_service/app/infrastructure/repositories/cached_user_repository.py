"""Users with a cache in front of the database."""

import sqlalchemy as sa

from example_service.app.domain.user import User
from example_service.app.infrastructure.repositories.user_repository import FindsUsers, UserRepository
from fastapi_building_blocks.domain import Criterion
from fastapi_building_blocks.infrastructure import Cache, CachedRepository


class CachedUserRepository(FindsUsers, CachedRepository[User]):
    """Users found in the cache by id, e-mail or username, and in the database by anything else."""

    def __init__(self, users: UserRepository, cache: Cache) -> None:
        super().__init__(users, cache, finders=[("email",), ("username",)])
        self._users = users

    def search(self, text: str) -> Criterion | sa.ColumnElement[bool]:
        return self._users.search(text)
