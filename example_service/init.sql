-- The schema on PostgreSQL, as the migrations make it: `alembic upgrade head` on this does nothing. A test keeps the
-- two equal.

BEGIN;

CREATE TABLE users (
    id uuid NOT NULL CONSTRAINT pk_users PRIMARY KEY,
    email varchar(255) COLLATE "C" NOT NULL CONSTRAINT uq_users_email UNIQUE,
    username varchar(50) COLLATE "C" NOT NULL CONSTRAINT uq_users_username UNIQUE,
    first_name varchar(50) COLLATE "C",
    last_name varchar(50) COLLATE "C",
    full_name varchar(101) COLLATE "C",
    bio varchar(1000) COLLATE "C",
    hashed_password varchar(255),
    status varchar(20) NOT NULL DEFAULT 'active',
    is_verified boolean NOT NULL DEFAULT false,
    is_admin boolean NOT NULL DEFAULT false,
    version integer NOT NULL DEFAULT 1,
    created_at timestamptz NOT NULL DEFAULT CURRENT_TIMESTAMP,
    updated_at timestamptz NOT NULL DEFAULT CURRENT_TIMESTAMP
);

CREATE INDEX ix_users_created_at ON users (created_at);
CREATE INDEX ix_users_status_created_at ON users (status, created_at);
CREATE INDEX ix_users_status_is_verified ON users (status, is_verified);

-- The extension comes with PostgreSQL but may not be installed, or not be ours to create: search works without it.
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
$$;

-- Alembic's own table: the revision that this file is.
CREATE TABLE alembic_version (
    version_num varchar(32) NOT NULL CONSTRAINT alembic_version_pkc PRIMARY KEY
);
INSERT INTO alembic_version (version_num) VALUES ('0001');

COMMIT;
