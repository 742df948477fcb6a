"""README.md and docs/ are held to what they say: code runs, requests are answered as shown, names and links exist."""

import ast
import asyncio
import inspect
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx2
import pytest
import sqlalchemy as sa
from fastapi import FastAPI

from example_service.app.core.config import ServiceSettings, get_database_settings
from example_service.app.infrastructure.tables import metadata
from example_service.app.main import create_app
from fastapi_building_blocks import api, domain, infrastructure
from fastapi_building_blocks.domain import BuildingBlocksError
from fastapi_building_blocks.infrastructure import DatabaseSettings, SQLAlchemySession

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LANGUAGES = {"python", "shell", "http", "text", "ini"}
ANYTHING = "…"

FENCE = re.compile(
    r"^(?:<!-- (?P<directive>file|not executed): (?P<argument>[^\n]+?) -->\n)?"
    r"```(?P<language>\w*)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
LINK = re.compile(r"(?<!`)\[[^\]\n]+\]\((?P<target>[^)\s]+)\)|<img[^>]+src=\"(?P<image>[^\"]+)\"")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
ADDRESS = re.compile(r"https?://(localhost|127\.0\.0\.1)(:\d+)?")
INSTALLS = re.compile(r"fastapi-building-blocks\[([\w,]+)\]")
TEST_NAME = re.compile(r"`(test_\w+)`")
TREE_PATH = re.compile(r"`((?:src|tests|docs|example_service|\.ci)/[\w./]+)`")


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block of a page."""

    language: str
    text: str
    line: int
    directive: str | None
    argument: str | None


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@cache
def blocks_of(page: Path) -> tuple[Block, ...]:
    text = page.read_text()
    return tuple(
        Block(
            found["language"],
            found["text"],
            text.count("\n", 0, found.start("text")),
            found["directive"],
            found["argument"],
        )
        for found in FENCE.finditer(text)
    )


def prose_of(page: Path) -> str:
    return FENCE.sub("", page.read_text())


every_page = pytest.mark.parametrize("page", PAGES, ids=name_of)


# What runs


class Walk:
    """One reading of a page from top to bottom: what its code has made, and the application that its requests reach."""

    def __init__(self, page: Path, folder: Path, stack: AsyncExitStack) -> None:
        self.page = page
        self.folder = folder
        self.stack = stack
        self.module = ModuleType(f"page_{page.stem.replace('-', '_')}")
        self.client: httpx2.AsyncClient | None = None
        self.answer: httpx2.Response | None = None

    async def read(self, block: Block) -> None:
        if block.directive == "not executed":
            return
        if block.directive == "file":
            assert block.argument is not None
            path = self.folder / block.argument
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text)
            if path.suffix == ".py" and not path.name.startswith("test_"):
                self.module = ModuleType(path.stem)  # as `import` would: other files import it by this name
                self.module.__file__ = str(path)
        match block.language:
            case "python" if not (block.argument or "").startswith("test_"):
                await self.run(block)
            case "shell":
                for command in commands(block.text):
                    await self.command(command)
            case "http":
                self.compare(block)

    async def run(self, block: Block) -> None:
        sys.modules[self.module.__name__] = self.module
        source = "\n" * block.line + block.text  # a traceback names the line of the page
        code = compile(source, str(self.page), "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        answer = eval(code, vars(self.module))
        if inspect.iscoroutine(answer):
            await answer

    async def command(self, command: str) -> None:
        words = [word for word in shlex.split(command, comments=True) if word != "\\"]
        settings = {}
        while words and re.match(r"[A-Z_]+=", words[0]):
            name, _, value = words.pop(0).partition("=")
            settings[name] = value
        check_settings(settings)
        match words:
            case ["curl", *arguments]:
                self.answer = await self.send(arguments)
            case ["make", *targets]:
                unknown = [target for target in targets if "=" not in target and target not in make_targets()]
                assert not unknown, f"the Makefile has no {unknown}"
            case ["pip" | "python", *arguments] if "install" in arguments:
                extras = ",".join(INSTALLS.findall(command)).split(",")
                assert set(filter(None, extras)) <= set(project()["optional-dependencies"])
            case ["python", "-m", "pytest", *arguments]:
                await asyncio.to_thread(run_pytest, self.folder, arguments)
            case ["docker", "exec", "-it", container, "psql", *arguments]:
                service = (ROOT / "docker-compose.observability.yml").read_text()
                assert f"container_name: {container}" in service
                assert f"POSTGRES_DB: {arguments[arguments.index('-d') + 1]}" in service
            case ["docker", "compose", "-f", file, *_]:
                assert (ROOT / file).is_file()
            case ["alembic", "-c", file, *_]:
                assert (ROOT / file).is_file()
            case ["mkdir" | "cd" | "cp" | ".", *_] | ["python3", "-m", "venv", _] | ["uvicorn", _, *_]:
                pass
            case _:
                pytest.fail(f"nothing checks the command {command!r}: teach {name_of(Path(__file__))} to")

    async def send(self, arguments: list[str]) -> httpx2.Response:
        method, headers, body, address = "", {}, None, ""
        rest = iter(arguments)
        for word in rest:
            match word:
                case "-X":
                    method = next(rest)
                case "-H":
                    name, _, value = next(rest).partition(":")
                    headers[name] = value.strip()
                case "-d":
                    body = next(rest)
                case "-i" | "-s":
                    pass
                case _:
                    assert not address, f"curl is given {word!r} besides {address!r}"
                    address = word
        assert ADDRESS.match(address), address
        client = self.client = self.client or await self.stack.enter_async_context(self.application())
        if body is not None and not any(name.lower() == "content-type" for name in headers):
            headers["Content-Type"] = "application/x-www-form-urlencoded"  # what curl says by itself
        return await client.request(
            method or ("GET" if body is None else "POST"), ADDRESS.sub("", address), headers=headers, content=body
        )

    @asynccontextmanager
    async def application(self) -> AsyncIterator[httpx2.AsyncClient]:
        """The application that the page's own files make, or else the example service."""
        async with AsyncExitStack() as stack:
            app = vars(self.module).get("app") if self.module.__name__ == "main" else None
            if app is None:
                session = await stack.enter_async_context(SQLAlchemySession("sqlite+aiosqlite:///example.db"))
                await session.create_tables(metadata)
                app = create_app(session)
            else:
                assert isinstance(app, FastAPI)
                await stack.enter_async_context(app.router.lifespan_context(app))
            transport = httpx2.ASGITransport(app, raise_app_exceptions=False)
            yield await stack.enter_async_context(httpx2.AsyncClient(transport=transport, base_url="http://docs"))

    def compare(self, block: Block) -> None:
        """Hold the last answer against what the page shows of it."""
        answer = self.answer
        assert answer is not None, "an answer is shown before any request"
        head, _, body = block.text.partition("\n\n")
        status, *headers = head.strip().splitlines()
        assert status == f"HTTP/1.1 {answer.status_code} {answer.reason_phrase}", answer.text
        for line in headers:
            name, _, value = line.partition(": ")
            pattern = re.escape(value).replace(re.escape(ANYTHING), ".+")
            assert re.fullmatch(pattern, answer.headers.get(name, "")), (name, answer.headers)
        if body.strip():
            assert matches(json.loads(body), answer.json()), answer.text

    async def close(self) -> None:
        """Close what a page that failed has left open, so that its threads do not outlive it."""
        for value in list(vars(self.module).values()):
            if isinstance(value, SQLAlchemySession):
                await value.disconnect()


def matches(shown: Any, given: Any) -> bool:
    """Whether an answer is what is shown: the same keys in the same order, the ellipsis standing for any value."""
    if shown == ANYTHING:
        return given is not None
    if isinstance(shown, dict) and isinstance(given, dict):
        return list(shown) == list(given) and all(matches(value, given[name]) for name, value in shown.items())
    if isinstance(shown, list) and isinstance(given, list):
        return len(shown) == len(given) and all(map(matches, shown, given))
    return bool(shown == given)


def commands(text: str) -> Iterator[str]:
    for line in text.replace("\\\n", " ").splitlines():
        if shlex.split(line, comments=True):
            yield line


def run_pytest(folder: Path, arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-W", "error", *arguments],
        cwd=folder,
        env={name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "COV_"))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def check_settings(settings: dict[str, str]) -> None:
    """Hold names and values against the settings that there are."""
    for name, value in settings.items():
        assert name in known_settings(), name
        if name == "DATABASE_URL":
            SQLAlchemySession(value)
        if name == "REQUIRE_BACKENDS":
            assert set(value.split(",")) <= {"sqlite", "postgres", "mysql", "redis", "mssql"}


def known_settings() -> set[str]:
    of_database = {f"DATABASE_{name.upper()}" for name in DatabaseSettings.model_fields}
    return of_database | {name.upper() for name in ServiceSettings.model_fields} | {"REQUIRE_BACKENDS"}


@cache
def project() -> dict[str, Any]:
    parsed: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return parsed


@cache
def make_targets() -> frozenset[str]:
    return frozenset(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@every_page
async def test_the_code_of_a_page_runs_and_its_requests_are_answered_as_shown(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    async with AsyncExitStack() as stack:
        walk = Walk(page, tmp_path, stack)
        stack.push_async_callback(walk.close)
        try:
            for block in blocks_of(page):
                await walk.read(block)
        finally:
            for name in set(sys.modules) - before:
                if str(getattr(sys.modules[name], "__file__", "") or "").startswith(str(tmp_path)):
                    del sys.modules[name]
            sys.modules.pop(walk.module.__name__, None)


# What is named


@every_page
def test_every_block_has_a_language_and_is_closed(page: Path):
    languages = {block.language for block in blocks_of(page)}
    assert languages <= LANGUAGES
    assert "```" not in prose_of(page), "a fence that is not closed, or an indented one"


def test_what_is_not_executed_is_the_exception():
    skipped = [
        (name_of(page), block.argument)
        for page in PAGES
        for block in blocks_of(page)
        if block.directive == "not executed"
    ]
    assert len(skipped) <= 2, skipped


@every_page
def test_every_link_leads_somewhere(page: Path):
    broken = []
    for found in LINK.finditer(prose_of(page)):
        target = found["target"] or found["image"]
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert not broken


@every_page
def test_every_test_and_every_file_that_a_page_names_exists(page: Path):
    text = prose_of(page)
    missing = [name for name in TEST_NAME.findall(text) if name not in every_test()]
    missing += [path for path in TREE_PATH.findall(text) if not (ROOT / path).exists()]
    assert not missing


@every_page
def test_every_error_that_a_page_names_exists(page: Path):
    known = {*vars(domain), *vars(api), *vars(infrastructure), *vars(__import__("builtins")), "DependencyScopeError"}
    named = set(re.findall(r"`(\w+Error)`", prose_of(page)))
    assert not named - known


def test_the_errors_page_draws_the_whole_tree():
    drawn = (ROOT / "docs" / "errors.md").read_text()
    every = [
        value for value in vars(domain).values() if isinstance(value, type) and issubclass(value, BuildingBlocksError)
    ]
    assert not [kind.__name__ for kind in every if kind.__name__ not in drawn or f"`{kind.code}`" not in drawn]


def test_the_repositories_page_names_every_method():
    text = (ROOT / "docs" / "repositories.md").read_text()
    methods = [name for name in vars(domain.Repository) if not name.startswith("_") and name != "field_types"]
    assert not [name for name in methods if f"`{name}" not in text]


def test_the_readme_covers_every_requirement_of_the_spine():
    covered = set(re.findall(r"^\| ([A-Z]\d+) \|", (ROOT / "README.md").read_text(), re.MULTILINE))
    spine = {*numbered("F", 1, 17), *numbered("U", 1, 11), "U13", *numbered("U", 15, 21), *numbered("D", 4, 8)}
    spine |= {"D17", "D19", "D20", "D23", "D24", "D27", "D31", "D32"}
    assert not spine - covered


def test_the_readme_has_the_curl_commands_of_the_seed():
    text = (ROOT / "README.md").read_text()
    assert '{"first_name":"Alice","last_name":"Test","email":"alice@test.com","username":"alice"}' in text
    assert 'curl -X GET "http://localhost:8000/api/v1/users/"' in text


def test_the_example_environment_names_settings_with_their_defaults(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    for name in known_settings():
        monkeypatch.delenv(name, raising=False)
    get_database_settings.cache_clear()
    try:
        actual = get_database_settings()
    finally:
        get_database_settings.cache_clear()
    lines = [line for line in (ROOT / ".env.example").read_text().splitlines() if line and not line.startswith("# ")]
    given = dict(line.removeprefix("#").split("=", 1) for line in lines)
    assert set(given) == known_settings() - {"REQUIRE_BACKENDS"}
    for name, value in given.items():
        if name.startswith("DATABASE_") and value:
            field = name.removeprefix("DATABASE_").lower()
            assert getattr(DatabaseSettings(**{field: value}), field) == getattr(actual, field), name
    for url in re.findall(r"\w+\+\w+://\S+", (ROOT / ".env.example").read_text()):
        assert sa.make_url(url).get_backend_name() in ("sqlite", "postgresql", "mysql", "mssql")


def numbered(letter: str, first: int, last: int) -> set[str]:
    return {f"{letter}{number}" for number in range(first, last + 1)}


@cache
def every_test() -> frozenset[str]:
    files = [*(ROOT / "tests").rglob("*.py"), *(ROOT / "src/fastapi_building_blocks/testing").rglob("*.py")]
    return frozenset(name for file in files for name in re.findall(r"def (test_\w+)", file.read_text())) | frozenset(
        file.stem for file in files
    )


@cache
def anchors(page: Path) -> frozenset[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = HEADING.findall(FENCE.sub("", page.read_text()))
    return frozenset(re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings)
