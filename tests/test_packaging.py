"""What a user gets from the wheel alone, installed with no extras into an environment with nothing else in it."""

import subprocess
import sys
import venv
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Without isolation the build back-end is the one of the development environment: nothing is downloaded.
    target = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(target), str(ROOT))
    (built,) = target.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment that holds the wheel and what it requires, and not even pip."""
    home = tmp_path_factory.mktemp("empty")
    venv.create(home, with_pip=False, symlinks=True)
    python = home / "bin" / "python"
    run(
        *(sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--disable-pip-version-check"),
        *("--no-compile", "--constraint", str(ROOT / "constraints.txt"), str(wheel)),
    )
    return python


def test_the_wheel_holds_the_package_its_types_and_its_license_only(wheel: Path):
    names = ZipFile(wheel).namelist()
    assert "fastapi_building_blocks/py.typed" in names
    assert [name for name in names if name.endswith("licenses/LICENSE")]
    outside = {name for name in names if not name.startswith("fastapi_building_blocks/")}
    assert {name.split("/")[0] for name in outside} == {f"{'-'.join(wheel.name.split('-')[:2])}.dist-info"}


def test_without_extras_no_optional_package_is_installed(python: Path):
    listed = run(sys.executable, "-m", "pip", "--python", str(python), "list", "--format", "freeze")
    installed = {line.partition("==")[0].lower() for line in listed.splitlines()}
    assert installed.isdisjoint({"aiosqlite", "asyncpg", "aiomysql", "pymysql", "asyncmy", "aioodbc", "redis"})
    assert installed.isdisjoint({"alembic", "httpx2", "pytest", "uvicorn", "attrs"})


def test_without_extras_every_floor_of_a_service_imports(python: Path):
    run(
        *(str(python), "-W", "error", "-c"),
        "import fastapi_building_blocks.domain, fastapi_building_blocks.infrastructure, fastapi_building_blocks.api",
    )


@pytest.mark.parametrize(
    ("url", "extra"),
    [
        ("postgresql+asyncpg://u@127.0.0.1/x", "postgres"),
        ("mysql+aiomysql://u@127.0.0.1/x", "mysql"),
        ("mysql+asyncmy://u@127.0.0.1/x", "asyncmy"),
        ("sqlite+aiosqlite:///x.db", "sqlite"),
        ("mssql+aioodbc://u@127.0.0.1/x", "mssql"),
    ],
)
def test_a_url_whose_driver_is_missing_names_the_install_command(python: Path, url: str, extra: str):
    script = (
        "from fastapi_building_blocks.infrastructure import SQLAlchemySession\n"
        f"try:\n    SQLAlchemySession({url!r})\nexcept Exception as error:\n    print(error)\n"
    )
    assert f"pip install 'fastapi-building-blocks[{extra}]'" in run(str(python), "-c", script)


def run(*command: str) -> str:
    """Run a command away from the source tree and return what it printed; its output explains a failure."""
    done = subprocess.run(command, cwd=Path(sys.executable).parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
    return done.stdout
