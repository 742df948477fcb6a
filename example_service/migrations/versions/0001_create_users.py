"""Create users."""

import sqlalchemy as sa
from alembic import op

from fastapi_building_blocks.infrastructure.database.types import BinaryString, UtcDateTime, utc_now

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

# The extension comes with PostgreSQL but may not be installed, or not be ours to create: search works without it.
SEARCH_INDEX = """
DO $$
BEGIN
    CREATE EXTENSION IF NOT EXISTS pg_trgm;
    CREATE INDEX ix_users_search ON users
        USING gin (
            lower(username COLLATE "default") gin_trgm_ops,
            lower(email COLLATE "default") gin_trgm_ops,
            lower(full_name COLLATE "default") gin_trgm_ops
        );
EXCEPTION
    WHEN insufficient_privilege OR undefined_file OR undefined_object OR feature_not_supported THEN
        RAISE NOTICE USING MESSAGE = 'no trigram index for the search of users: ' || SQLERRM;
END
$$
"""


def upgrade() -> None:
    op.create_table(
        "users",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("email", BinaryString(length=255), nullable=False),
        sa.Column("username", BinaryString(length=50), nullable=False),
        sa.Column("first_name", BinaryString(length=50), nullable=True),
        sa.Column("last_name", BinaryString(length=50), nullable=True),
        sa.Column("full_name", BinaryString(length=101), nullable=True),
        sa.Column("bio", BinaryString(length=1000), nullable=True),
        sa.Column("hashed_password", sa.String(length=255), nullable=True),
        sa.Column(
            "status",
            sa.Enum("active", "inactive", "suspended", name="userstatus", native_enum=False, length=20),
            server_default="active",
            nullable=False,
        ),
        sa.Column("is_verified", sa.Boolean(), server_default=sa.false(), nullable=False),
        sa.Column("is_admin", sa.Boolean(), server_default=sa.false(), nullable=False),
        sa.Column("version", sa.Integer(), server_default="1", nullable=False),
        sa.Column("created_at", UtcDateTime(), server_default=utc_now(), nullable=False),
        sa.Column("updated_at", UtcDateTime(), server_default=utc_now(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_users")),
        sa.UniqueConstraint("email", name=op.f("uq_users_email")),
        sa.UniqueConstraint("username", name=op.f("uq_users_username")),
    )
    op.create_index(op.f("ix_users_created_at"), "users", ["created_at"])
    op.create_index(op.f("ix_users_status_created_at"), "users", ["status", "created_at"])
    op.create_index(op.f("ix_users_status_is_verified"), "users", ["status", "is_verified"])
    if op.get_context().dialect.name == "postgresql":
        op.execute(SEARCH_INDEX)


def downgrade() -> None:
    op.drop_table("users")
