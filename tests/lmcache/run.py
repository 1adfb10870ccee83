"""Runs the LMCache tests with LMCache: builds an environment once, then kvstore's tests and LMCache's own on kvstore.

    python tests/lmcache/run.py [--python PYTHON] [--report FILE] [pytest arguments]

The environment and LMCache's source archive, which has the tests, are kept in .venv-lmcache. With --python an existing
environment is used; it must have LMCache and what kvstore needs. With --report the outcome of every test is written to
a file, in the form that tests/engines/report.py describes.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

VERSION = "0.5.6"
HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
ENVIRONMENT = ROOT / ".venv-lmcache"
OURS = ("tests/test_lmcache_adapter.py", "tests/test_lmcache_server.py")
THEIRS = (
    "examples/lmc_external_l2_adapter/tests/test_plugin.py",
    "tests/v1/distributed/test_mock_l2_adapter.py",
    "tests/v1/distributed/test_native_connector_l2_adapter.py",
)
"""LMCache's tests of its interface: the example plugin's, the contract's, the native connector's."""


def main() -> int:
    """Run everything; answers the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", type=Path, help="an interpreter that has LMCache already")
    parser.add_argument("--report", type=Path, help="write each test's outcome to this file, as JSON lines")
    arguments, rest = parser.parse_known_args()
    python = arguments.python or build()
    theirs = fetch_tests(python)
    environment = {
        **os.environ,
        "LMCACHE_TRACK_USAGE": "false",
        "DO_NOT_TRACK": "1",
        "OMP_WAIT_POLICY": "passive",
        "PYTHONPATH": os.pathsep.join((str(ROOT), str(HERE))),
    }
    pytest: list[str | Path] = [
        python,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-W",
        "ignore::DeprecationWarning",
    ]
    if arguments.report:
        report = arguments.report.absolute()
        report.write_text("")
        pytest += ["-p", "tests.engines.report", "--outcomes", report]
    ours = run([*pytest, "-o", "filterwarnings=default", *OURS, *rest], ROOT, environment)
    # From a folder without LMCache's sources: those would hide the installed package.
    return ours or run([*pytest, "-p", "on_kvstore", "--rootdir", theirs, theirs, *rest], theirs, environment)


def build() -> Path:
    """The interpreter of an environment with LMCache; built once for each list of requirements."""
    python = ENVIRONMENT / "bin" / "python"
    stamp = ENVIRONMENT / ".installed"
    wanted = VERSION + (HERE / "requirements.txt").read_text()
    if not stamp.exists() or stamp.read_text() != wanted:
        subprocess.run([sys.executable, "-m", "venv", ENVIRONMENT], check=True)
        pip: list[str | Path] = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*pip, "-r", HERE / "requirements.txt", f"lmcache=={VERSION}"], check=True)
        stamp.write_text(wanted)
    return python


def fetch_tests(python: Path) -> Path:
    """A folder with LMCache's own tests, out of its source archive; fetched once."""
    folder = ENVIRONMENT / f"tests-{VERSION}"
    if not folder.exists():
        ENVIRONMENT.mkdir(exist_ok=True)
        download: list[str | Path] = [python, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "lmcache"]
        environment = {**os.environ, "NO_NATIVE_EXT": "1", "NO_GPU_EXT": "1"}  # pip asks the archive for its metadata
        subprocess.run([*download, "-d", ENVIRONMENT, f"lmcache=={VERSION}"], env=environment, check=True)
        contents: dict[str, bytes] = {}
        with tarfile.open(ENVIRONMENT / f"lmcache-{VERSION}.tar.gz") as archive:
            for name in THEIRS:
                member = archive.extractfile(f"lmcache-{VERSION}/{name}")
                assert member is not None, name
                contents[Path(name).name] = member.read()
        folder.mkdir()
        for name, content in contents.items():
            (folder / name).write_bytes(content)
    return folder


def run(command: Sequence[str | Path], folder: Path, environment: Mapping[str, str]) -> int:
    """Run a command in a folder; answers its exit code."""
    return subprocess.run(command, cwd=folder, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
