"""Users on PostgreSQL: what it can do better than any database."""

import re

import sqlalchemy as sa

from example_service.app.infrastructure.repositories.user_repository import SEARCHED_FIELDS, UserRepository
from example_service.app.infrastructure.tables import users_table


class PostgresUserRepository(UserRepository):
    """Users as rows of ``users``, searched through a trigram index where the migration could make one."""

    def search(self, text: str) -> sa.ColumnElement[bool]:
        """Return the condition of every ``UserRepository``, spelled as the index ``ix_users_search`` is."""
        literally = re.sub(r"([\\%_])", r"\\\1", text)
        pattern = _in_lower_case(sa.literal(f"%{literally}%"))
        return sa.or_(*(_in_lower_case(users_table.c[name]).like(pattern) for name in SEARCHED_FIELDS))


def _in_lower_case(text: sa.ColumnElement[str]) -> sa.ColumnElement[str]:
    # The columns compare by code point, a collation that knows the case of ASCII letters only.
    return sa.func.lower(sa.collate(text, "default"))
