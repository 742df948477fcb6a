"""Importing the library costs what SQLAlchemy and FastAPI cost: it brings no other package along, and no driver.

Not timed, since a busy machine would decide; what is imported decides the time.
"""

import subprocess
import sys

import pytest

FOUNDATION = "import sqlalchemy.ext.asyncio, fastapi"
# pydantic-settings is a hard dependency and reads .env with dotenv.
OWN = {"fastapi_building_blocks", "pydantic_settings", "dotenv"}
# pydantic-settings' command line, SQLAlchemy's SQLite dialect, and thread pools.
OWN_OF_THE_STANDARD_LIBRARY = {"argparse", "gettext", "_sqlite3", "sqlite3", "_queue", "queue"}
EXPENSIVE = {
    "alembic",
    "aiomysql",
    "aioodbc",
    "aiosqlite",
    "asyncmy",
    "asyncpg",
    "hypothesis",
    "pymysql",
    "pytest",
    "redis",
}


def imported_by(statement: str) -> set[str]:
    """The modules of a fresh process after a statement."""
    code = f"import sys; before = set(sys.modules)\n{statement}\nprint(*(set(sys.modules) - before), sep='\\n')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    return set(done.stdout.split())


def packages(modules: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in modules}


@pytest.mark.parametrize("name", ["fastapi_building_blocks.infrastructure", "fastapi_building_blocks.api"])
def test_it_brings_no_package_but_the_named_few(name: str):
    more = packages(imported_by(f"import {name}")) - packages(imported_by(FOUNDATION))
    assert more - sys.stdlib_module_names == OWN
    assert not more & EXPENSIVE
    assert more & sys.stdlib_module_names <= OWN_OF_THE_STANDARD_LIBRARY


def test_the_infrastructure_does_without_fastapi():
    assert not packages(imported_by("import fastapi_building_blocks.infrastructure")) & {"fastapi", "starlette"}


def test_the_package_itself_and_the_domain_load_the_standard_library_only():
    for name in ("fastapi_building_blocks", "fastapi_building_blocks.domain"):
        assert packages(imported_by(f"import {name}")) - sys.stdlib_module_names == {"fastapi_building_blocks"}


def test_what_only_some_services_need_is_not_loaded():
    modules = imported_by("import fastapi_building_blocks.api, fastapi_building_blocks.infrastructure")
    assert "fastapi_building_blocks.infrastructure.database.migrations" not in modules
    assert "fastapi_building_blocks.testing" not in modules
    assert "sqlalchemy.dialects.oracle" not in modules
