"""What holds for the tree as a whole: names, addresses, and the lists that have to agree."""

import __future__

import ast
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "fastapi_building_blocks"
PUBLIC_PACKAGES = ("", ".domain", ".infrastructure", ".api", ".testing")

MACHINE_PATH = re.compile(r"(^|[^\w.])/(work|farm|root|home)/")
# Which index answers is the business of the machine that installs.
REGISTRY = re.compile(
    r"--(extra-)?index-url|--find-links|--trusted-host|(PIP|UV)_(EXTRA_|DEFAULT_)?INDEX"
    r"|pypi\.org/simple|files\.pythonhosted\.org|registry\.npmjs\.org"
    r"|https?://\S*(artifactory|nexus|mirror|/simple\b)",
    re.IGNORECASE,
)


def text_files() -> Iterator[tuple[str, str]]:
    """Name and text of every file that is, or would be, committed."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode:
        pytest.skip(f"not a git checkout: {listed.stderr.strip()}")
    for name in filter(None, listed.stdout.split("\0")):
        path = ROOT / name
        # A file may be deleted and not yet committed as such; a picture has no lines.
        if path.is_file() and b"\0" not in (content := path.read_bytes()):
            yield name, content.decode()


@pytest.mark.parametrize("forbidden", [MACHINE_PATH, REGISTRY], ids=["machine path", "registry address"])
def test_no_file_knows_the_machine_it_was_written_on(forbidden: re.Pattern[str]):
    this = str(Path(__file__).relative_to(ROOT))
    found = [
        f"{name}:{number}: {line.strip()}"
        for name, text in text_files()
        if name != this
        for number, line in enumerate(text.splitlines(), 1)
        if forbidden.search(line)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(("before", "folders"), [("see ", "home me notes"), ("", "root .cache"), ('"', "work main")])
def test_a_machine_path_is_recognised(before: str, folders: str):
    assert MACHINE_PATH.search(before + "/".join(["", *folders.split(), ""]))


@pytest.mark.parametrize("line", ["src/work/main.py", "https://example.com/docs", "./home/page"])
def test_other_paths_may_stand(line: str):
    assert not MACHINE_PATH.search(line)


@pytest.mark.parametrize("package", PUBLIC_PACKAGES)
def test_all_lists_exactly_the_public_names(package: str):
    module = importlib.import_module(f"fastapi_building_blocks{package}")
    for name in module.__all__:
        getattr(module, name)  # the outermost package loads its names when they are asked for
    public = {
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and not inspect.ismodule(value) and not isinstance(value, __future__._Feature)
    }
    listed = list(module.__all__)
    assert len(listed) == len(set(listed))
    # __version__ and the like are public by being listed.
    assert {name for name in listed if not name.startswith("__")} == public


@pytest.mark.parametrize("package", PUBLIC_PACKAGES)
def test_every_public_name_says_what_it_promises(package: str):
    """A method may leave it to the base class that states the contract."""
    module = importlib.import_module(f"fastapi_building_blocks{package}")
    silent = [
        promise
        for name in module.__all__
        for promise, value in promises(name, getattr(module, name))
        if not inspect.getdoc(value)
    ]
    assert not silent


def test_the_domain_imports_the_standard_library_only():
    allowed = sys.stdlib_module_names | {"fastapi_building_blocks"}
    strangers = {
        f"{path.relative_to(SOURCE)}: {name}"
        for path in (SOURCE / "domain").rglob("*.py")
        for name in imported_modules(path)
        if name.partition(".")[0] not in allowed
    }
    assert not strangers


def test_importing_the_library_imports_no_optional_package():
    optional = (
        "aiosqlite asyncpg aiomysql pymysql asyncmy aioodbc pyodbc redis alembic httpx2 attr attrs pytest hypothesis"
    )
    script = (
        "import sys, fastapi_building_blocks.infrastructure, fastapi_building_blocks.api\n"
        f"print(*sorted(set({optional.split()}) & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""


def test_no_room_is_named_after_nothing():
    vague = {"utils", "util", "helpers", "helper", "common", "core", "misc"}
    found = [info.name for info in pkgutil.walk_packages([str(SOURCE)]) if info.name.rpartition(".")[2] in vague]
    assert not found


def test_the_dev_extra_is_the_dev_dependency_group():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extra, *rest = project["project"]["optional-dependencies"]["dev"]
    assert extra.startswith("fastapi-building-blocks[")
    groups = project["dependency-groups"]
    included = [name for entry in groups["dev"] for name in groups[entry["include-group"]]]
    assert sorted(rest) == sorted(included)


def test_all_names_every_extra_of_the_library():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (everything,) = extras["all"]
    named = everything.removeprefix("fastapi-building-blocks[").removesuffix("]").split(",")
    assert set(named) == set(extras) - {"all", "example", "dev", "bench"}


def test_constraints_are_names_and_versions_only():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = [line for line in lines if not line.startswith("#")]
    assert not [line for line in pinned if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][\w.!+]*", line)]
    assert "fastapi-building-blocks" not in {line.partition("==")[0].lower() for line in pinned}


def promises(name: str, value: object) -> Iterator[tuple[str, object]]:
    """A class or function, and what a class defines in public (what it inherits is its base's)."""
    if inspect.isroutine(value):
        yield name, value
    if inspect.isclass(value) and value.__module__.startswith("fastapi_building_blocks"):
        yield name, value
        for attribute, member in vars(value).items():
            if not attribute.startswith("_") and (inspect.isroutine(member) or isinstance(member, property)):
                # getattr, so that getdoc finds an overridden method's base.
                yield f"{name}.{attribute}", getattr(value, attribute)


def imported_modules(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
