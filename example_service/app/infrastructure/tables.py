"""The tables, the same on every database. The migrations create them; tests hold the two together."""

import sqlalchemy as sa

from example_service.app.domain.user import UserStatus
from fastapi_building_blocks.infrastructure import BinaryString, timestamp_columns, version_column

# Every constraint has a name, so that a later migration can change it, on SQLite too.
metadata = sa.MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
        "pk": "pk_%(table_name)s",
    }
)

users_table = sa.Table(
    "users",
    metadata,
    sa.Column("id", sa.Uuid(), primary_key=True),
    sa.Column("email", BinaryString(255), nullable=False, unique=True),
    sa.Column("username", BinaryString(50), nullable=False, unique=True),
    sa.Column("first_name", BinaryString(50)),
    sa.Column("last_name", BinaryString(50)),
    # A first and a last name, and the space between.
    sa.Column("full_name", BinaryString(101)),
    sa.Column("bio", BinaryString(1000)),
    sa.Column("hashed_password", sa.String(255)),
    sa.Column(
        "status",
        sa.Enum(UserStatus, native_enum=False, length=20, values_callable=lambda statuses: [s.value for s in statuses]),
        nullable=False,
        server_default=UserStatus.ACTIVE.value,
    ),
    sa.Column("is_verified", sa.Boolean(), nullable=False, server_default=sa.false()),
    sa.Column("is_admin", sa.Boolean(), nullable=False, server_default=sa.false()),
    version_column(),
    *timestamp_columns(),
    sa.Index(None, "status", "created_at"),
    sa.Index(None, "status", "is_verified"),
)
