"""E4: generated requests find no server error, and nothing that the OpenAPI document does not say."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import bcrypt
import pytest
import schemathesis
from schemathesis.config import SchemathesisConfig
from schemathesis.core.failures import Failure
from schemathesis.engine import Status, events, from_schema
from schemathesis.python.asgi import shutdown_lifespans
from schemathesis.schemas import BaseSchema

from example_service.app.application import verify_credentials
from example_service.app.main import MIGRATIONS, create_app
from example_service.demo import running_service
from fastapi_building_blocks.infrastructure import SQLAlchemySession
from fastapi_building_blocks.infrastructure.database.migrations import upgrade
from fastapi_building_blocks.testing.fault_proxy import free_port
from tests.backends import run_apart

ROOT = Path(__file__).parents[2]
USERS = "/api/v1/users/"
SECONDS = 25
PASSES = 5
LEAST_CASES = 500  # of thousands, on an idle machine

pytestmark = pytest.mark.slow


@pytest.fixture
def config() -> SchemathesisConfig:
    config = SchemathesisConfig.from_path(ROOT / "schemathesis.toml")
    config.max_time = SECONDS
    config.projects.default.generation.max_examples = 200
    return config


@pytest.fixture
def in_process(tmp_path: Path, config: SchemathesisConfig) -> Iterator[BaseSchema]:
    url = f"sqlite+aiosqlite:///{tmp_path / 'service.db'}"
    run_apart(upgrade(url, MIGRATIONS))
    try:
        yield schemathesis.openapi.from_asgi("/openapi.json", create_app(SQLAlchemySession(url)), config=config)
    finally:
        shutdown_lifespans()


def findings(schema: BaseSchema) -> tuple[Counter[str], list[str]]:
    """Run every phase, and return how many requests each operation got, and what was wrong."""
    requests: Counter[str] = Counter()
    wrong: list[str] = []
    for event in from_schema(schema).execute():
        if isinstance(event, events.ScenarioFinished):
            for case in event.recorder.cases.values():
                requests[case.value.operation.label] += 1
            for checks in event.recorder.checks.values():
                wrong += [
                    describe(check.name, check.failure_info) for check in checks if check.status is Status.FAILURE
                ]
        elif isinstance(event, events.NonFatalError):
            wrong.append(f"{event.label}: {event.value!r}")
        elif isinstance(event, events.FatalError):
            raise event.exception
        elif isinstance(event, events.EngineFinished):
            wrong += [str(failure) for failure in event.failures]
    return requests, wrong


def describe(name: str, info: object) -> str:
    failure: Failure = info.failure
    return f"{failure.operation}: {name}: {failure.message}\n{info.code_sample}"


def judge(schema: BaseSchema) -> None:
    requests, wrong = findings(schema)
    for _ in range(PASSES):  # a slow machine gets less done in the time
        if wrong or requests.total() >= LEAST_CASES:
            break
        more, wrong = findings(schema)
        requests += more
    assert not wrong, f"{len(wrong)} findings\n" + "\n".join(wrong[:5])
    assert requests.total() >= LEAST_CASES, requests
    assert set(requests) >= {operation.ok().label for operation in schema.get_all_operations()}


def test_e4_in_process(in_process: BaseSchema, monkeypatch: pytest.MonkeyPatch):
    # Checking a password takes a quarter of a second by design; here the cheapest hash stands in.
    monkeypatch.setattr(verify_credentials, "_NOBODYS_HASH", bcrypt.hashpw(b"", bcrypt.gensalt(4)))
    judge(in_process)


@pytest.mark.parametrize("database_url", ["postgres"], indirect=True)
def test_e4_against_a_real_server(database_url: str, config: SchemathesisConfig, tmp_path: Path):
    port, log = free_port(), tmp_path / "log"
    with running_service(database_url, port, log):
        schema = schemathesis.openapi.from_url(f"http://127.0.0.1:{port}/openapi.json", config=config)
        judge(schema.exclude(path=f"{USERS}verify_credentials"))  # all others, for the whole time
    logged = log.read_text()
    assert "Traceback" not in logged
    assert " ERROR " not in logged
