"""What the settings of a session promise."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from fastapi_building_blocks.infrastructure import DatabaseSettings


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No ``.env`` and no variable of the machine."""
    monkeypatch.chdir(tmp_path)
    for name in DatabaseSettings.model_fields:
        monkeypatch.delenv(f"DATABASE_{name.upper()}", raising=False)


def test_the_default_pool_is_5_and_10_more() -> None:
    settings = DatabaseSettings()
    assert (settings.pool_size, settings.max_overflow, settings.pool_timeout) == (5, 10, 5.0)
    assert settings.url.startswith("sqlite+aiosqlite://")
    assert settings.replica_urls == ()


def test_every_knob_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {
        "URL": "postgresql+asyncpg://h/d",
        "POOL_SIZE": "7",
        "MAX_OVERFLOW": "0",
        "POOL_TIMEOUT": "1.5",
        "CONNECT_TIMEOUT": "2",
        "CONNECT_ATTEMPTS": "3",
        "STATEMENT_TIMEOUT": "4.5",
        "RECYCLE": "60",
        "LEAK_THRESHOLD": "2.5",
        "SHUTDOWN_TIMEOUT": "3",
        "REPLICA_URLS": "postgresql+asyncpg://a/d, postgresql+asyncpg://b/d,",
        "MAX_LAG": "2.5",
        "CONSISTENCY_WAIT": "0",
        "PGBOUNCER": "true",
    }
    for name, value in given.items():
        monkeypatch.setenv(f"DATABASE_{name}", value)
    assert DatabaseSettings().model_dump() == {
        "url": "postgresql+asyncpg://h/d",
        "pool_size": 7,
        "max_overflow": 0,
        "pool_timeout": 1.5,
        "connect_timeout": 2.0,
        "connect_attempts": 3,
        "statement_timeout": 4.5,
        "recycle": 60.0,
        "leak_threshold": 2.5,
        "shutdown_timeout": 3.0,
        "replica_urls": ("postgresql+asyncpg://a/d", "postgresql+asyncpg://b/d"),
        "max_lag": 2.5,
        "consistency_wait": 0.0,
        "pgbouncer": True,
    }


def test_a_dot_env_file_is_read_and_the_environment_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".env").write_text("DATABASE_POOL_SIZE=8\nDATABASE_MAX_OVERFLOW=1\nOTHER=x\n", encoding="utf-8")
    monkeypatch.setenv("DATABASE_MAX_OVERFLOW", "2")
    settings = DatabaseSettings()
    assert (settings.pool_size, settings.max_overflow) == (8, 2)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("POOL_SIZE", "0"),
        ("POOL_SIZE", "many"),
        ("MAX_OVERFLOW", "-1"),
        ("POOL_TIMEOUT", "0"),
        ("CONNECT_TIMEOUT", "0"),
        ("CONNECT_ATTEMPTS", "0"),
        ("STATEMENT_TIMEOUT", "-1"),
        ("POOL_TIMEOUT", "nan"),
        ("STATEMENT_TIMEOUT", "inf"),
        ("MAX_LAG", "0"),
        ("CONSISTENCY_WAIT", "-1"),
    ],
)
def test_a_value_that_makes_no_sense_is_refused_by_name(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"DATABASE_{name}", value)
    with pytest.raises(ValidationError, match=name.lower()):
        DatabaseSettings()


def test_neither_repr_nor_an_error_shows_the_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql+asyncpg://user:s3cr3t@h/d")
    monkeypatch.setenv("DATABASE_REPLICA_URLS", "postgresql+asyncpg://user:s3cr3t@r/d")
    assert "s3cr3t" not in f"{DatabaseSettings()!r} {DatabaseSettings()}"
    monkeypatch.setenv("DATABASE_POOL_SIZE", "s3cr3t")
    with pytest.raises(ValidationError) as caught:
        DatabaseSettings()
    assert "s3cr3t" not in str(caught.value)
