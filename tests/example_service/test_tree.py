"""What the service's files promise: no database by name, one layout, a valid Compose file."""

import ast
import json
import re
import tomllib
from pathlib import Path

import jsonschema
import pytest
import sqlalchemy as sa
import yaml

ROOT = Path(__file__).parents[2]
SERVICE = ROOT / "example_service"
APP = SERVICE / "app"
COMPOSE = ROOT / "docker-compose.observability.yml"
SPECIFICATION = Path(__file__).parent / "compose_specification" / "compose-spec.json"

DIALECTS = re.compile(r"postgres|psycopg|mysql|maria|sqlite|mssql|oracle|asyncpg|aioodbc", re.IGNORECASE)
SPECIAL = Path("infrastructure/repositories/postgres_user_repository.py")
WIRING = Path("api/dependencies.py")


def without_prose(path: Path) -> str:
    """The code of a module without its docstrings and comments."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if (
            isinstance(body, list)
            and body
            and isinstance(body[0], ast.Expr)
            and isinstance(body[0].value, ast.Constant)
        ):
            body[0].value.value = ""
    return ast.unparse(tree)


def test_the_app_names_no_database_but_in_the_special_repository_and_the_wiring():
    named = {
        path.relative_to(APP)
        for path in APP.rglob("*")
        if path.suffix == ".py" and DIALECTS.search(without_prose(path))
    }
    assert named == {SPECIAL, WIRING}


def test_the_wiring_names_one_database_once():
    assert re.findall(r"dialect_name == '(\w+)'", without_prose(APP / WIRING)) == ["postgresql"]


@pytest.mark.parametrize(
    "name",
    [
        "app/main.py",
        "app/core/config.py",
        "app/core/database.py",
        "app/domain/user.py",
        "app/infrastructure/tables.py",
        "app/infrastructure/repositories/user_repository.py",
        "app/infrastructure/repositories/postgres_user_repository.py",
        "app/api/dependencies.py",
        "app/api/v1/users.py",
        "migrations/alembic.ini",
        "migrations/env.py",
        "init.sql",
        "requirements.txt",
        "Dockerfile",
    ],
)
def test_the_layout_is_that_of_the_architecture(name: str):
    assert (SERVICE / name).is_file()


def test_the_domain_and_the_application_know_no_framework_and_no_database():
    known = re.compile(r"^(from|import) (fastapi\b|starlette|sqlalchemy|pydantic|fastapi_building_blocks\.(infra|api))")
    for floor in ("domain", "application"):
        for path in (APP / floor).rglob("*.py"):
            assert not [line for line in path.read_text().splitlines() if known.match(line)], path


def test_requirements_name_what_the_extra_installs():
    lines = (SERVICE / "requirements.txt").read_text().splitlines()
    required = {re.split(r"[\[<>=]", line)[0] for line in lines if line and not line.startswith("#")}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    installed = {
        re.split(r"[\[<>=]", name)[0]
        for extra in ("sqlite", "postgres", "mysql", "redis", "migrations", "example")
        for name in (*extras[extra], *project["dependencies"])
    }
    # httpx2 is for tests; pydantic comes with FastAPI and is used by name here.
    assert required == installed - {"fastapi-building-blocks", "httpx2"} | {"pydantic"}


# Compose


@pytest.fixture(scope="module")
def compose():
    return yaml.safe_load(COMPOSE.read_text())


def test_the_compose_file_is_valid(compose):
    schema = json.loads(SPECIFICATION.read_text())
    validator = jsonschema.Draft202012Validator(schema)
    assert [error.message for error in validator.iter_errors(compose)] == []
    # Or the line above would prove nothing.
    broken = {**compose, "services": {"x": {"image": 42, "depends_on": {"y": {"condition": "some day"}}}}}
    assert len(list(validator.iter_errors(broken))) >= 1


def test_the_compose_file_runs_what_the_seed_says(compose):
    database = compose["services"]["user-management-db"]
    assert database["image"] == "postgres:16-alpine"
    assert database["container_name"] == "user-management-db"
    assert database["environment"]["POSTGRES_DB"] == "user_management"
    service = compose["services"]["user-management"]
    raw = service["environment"]["DATABASE_URL"].replace("${POSTGRES_PASSWORD:-postgres}", "postgres")
    url = sa.make_url(raw)
    assert (url.drivername, url.host, url.database) == ("postgresql+asyncpg", "user-management-db", "user_management")


def test_every_container_is_checked_and_waited_for(compose):
    services = compose["services"]
    assert all("healthcheck" in service for service in services.values())
    waited_for = services["user-management"]["depends_on"]
    assert waited_for == {name: {"condition": "service_healthy"} for name in services if name != "user-management"}


def test_what_the_compose_file_refers_to_exists(compose):
    service = compose["services"]["user-management"]
    assert (ROOT / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
    mounts = [volume for one in compose["services"].values() for volume in one.get("volumes", [])]
    for source in (mount.split(":")[0] for mount in mounts):
        assert (ROOT / source).is_file() if source.startswith(".") else source in compose["volumes"]


def test_the_image_keeps_its_database_where_its_user_may_write():
    lines = (SERVICE / "Dockerfile").read_text().splitlines()
    (variables,) = (line for line in lines if line.startswith("ENV HOST"))
    (made,) = (line for line in lines if "install --directory" in line)
    settings = dict(pair.split("=", 1) for pair in variables.split()[1:])
    database = Path(sa.make_url(settings["DATABASE_URL"]).database or "")
    assert database.is_absolute()
    assert made.endswith(f"--owner service {database.parent}")
    assert lines.index(made) < lines.index("USER service")


def test_what_the_image_copies_is_in_its_context():
    """.dockerignore keeps everything out that is not named."""
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for line in (SERVICE / "Dockerfile").read_text().splitlines():
        if line.startswith("COPY "):
            for source in line.split()[1:-1]:
                assert source.split("/")[0] in allowed
                assert source == "README.md" or (ROOT / source).exists()
