"""The shape of the repository that packaging, type checkers and imports rely on."""

from __future__ import annotations

import ast
import importlib
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LINKS = ("bench", "codecs", "connectors", "service", "tiers")
SOURCES = sorted(
    path
    for folder in ("kvstore", *LINKS)
    for path in (ROOT / folder).rglob("*.py")
    if not path.is_relative_to(ROOT / "build")
)
LINES_MAX = 400
FUNCTION_LINES_MAX = 70


@pytest.mark.parametrize("name", LINKS)
def test_every_sub_package_is_a_relative_link(name: str) -> None:
    link = ROOT / "kvstore" / name
    assert link.is_symlink()
    assert link.readlink() == Path("..") / name
    assert link.is_dir()


def test_codecs_is_a_namespace_so_that_it_never_hides_the_standard_library() -> None:
    assert not (ROOT / "codecs" / "__init__.py").exists()
    assert (ROOT / "kvstore" / "py.typed").exists()


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_stay_readable(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= LINES_MAX
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= FUNCTION_LINES_MAX, f"{node.name} has {length} lines"
    assert tree.body == [] or ast.get_docstring(tree), "a module says first what it is"


def imports_of(path: Path) -> set[str]:
    """Names of the modules that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize(
    ("folder", "banned"),
    [
        ("tiers", r"kvstore\.(codecs|connectors|service|bench|codec|spec|chunk)\b"),
        ("codecs", r"kvstore\.(tiers|connectors|service|bench|tier|store|client)\b"),
        ("service", r"kvstore\.(connectors|bench)\b"),
        ("connectors", r"kvstore\.(service|bench|tiers(?!\.arena))\b"),  # a client maps the arena that a tier made
    ],
)
def test_dependencies_point_one_way(folder: str, banned: str) -> None:
    for path in (ROOT / folder).rglob("*.py"):
        wrong = sorted(name for name in imports_of(path) if re.match(banned, name))
        assert not wrong, f"{path.relative_to(ROOT)} imports {', '.join(wrong)}"


def test_dangerous_or_heavy_modules_are_not_imported_by_the_core() -> None:
    for path in SOURCES:
        wrong = {name.split(".")[0] for name in imports_of(path)} & {
            "pickle",
            "marshal",
            "shelve",
            "dill",
            "cloudpickle",
        }
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"


def test_the_version_and_the_interpreter_are_what_the_package_says() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["name"] == "kvstore-tiered"
    assert sys.version_info >= tuple(map(int, project["requires-python"].removeprefix(">=").split(".")))


def test_core_requirements_and_pins_agree() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = {
        line.split("==")[0].lower().replace("_", "-") for line in (ROOT / "constraints.txt").read_text().splitlines()
    }
    wanted = list(project["dependencies"]) + [
        r for extra in ("torch", "dev") for r in project["optional-dependencies"][extra]
    ]
    names = {re.split(r"[><=\[ ]", requirement)[0].lower() for requirement in wanted}
    assert names <= pins


@pytest.mark.slow
def test_a_wheel_holds_the_package_and_nothing_else(tmp_path: Path) -> None:
    build = "from setuptools import build_meta; import sys; print(build_meta.build_wheel(sys.argv[1]))"
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "kvstore", *LINKS):
        if (ROOT / name).exists():
            subprocess.run(["cp", "-a", ROOT / name, source], check=True)
    done = subprocess.run(
        [sys.executable, "-c", build, tmp_path], cwd=source, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert {name.split("/")[0] for name in names} == {"kvstore"}
    assert not [name for name in names if name.endswith((".cpp", ".h", ".safetensors"))]
    modules = {path.relative_to(ROOT).as_posix() for path in SOURCES}
    assert {f"kvstore/{name}" if name.split("/")[0] in LINKS else name for name in modules} <= names
    assert {"kvstore/py.typed", "kvstore/_native.pyi"} <= names


def test_the_extension_was_built_where_there_is_a_compiler() -> None:
    if shutil.which("g++") is None or not Path(sysconfig.get_path("include"), "Python.h").exists():
        pytest.skip("needs g++ and the Python headers; without them the NumPy kernels are what is wanted")
    importlib.import_module("kvstore._native")
