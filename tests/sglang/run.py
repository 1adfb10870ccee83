"""Runs the SGLang tests on SGLang's own classes: fetches its wheel once, then runs the tests with it.

    python tests/sglang/run.py [--report FILE] [pytest arguments]

The wheel is unpacked into .venv-sglang beside the few packages that its host-side classes use; everything else comes
from the interpreter that runs this, which must have kvstore's development environment with torch and transformers.
With --report the outcome of every test is written to a file, in the form that tests/engines/report.py describes.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PACKAGES = ROOT / ".venv-sglang"
TESTS = sorted(HERE.glob("test_*.py"))


def main() -> int:
    """Run everything; answers the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", type=Path, help="write each test's outcome to this file, as JSON lines")
    arguments, rest = parser.parse_known_args()
    install()
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "passive",
        "PYTHONPATH": os.pathsep.join((str(ROOT), str(PACKAGES))),
    }
    # SGLang and what it imports warn of devices that are not there.
    command: list[str | Path] = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "tests.sglang.without_gpu",
        "-o",
        "filterwarnings=default",
        "-W",
        "ignore::UserWarning",
        *TESTS,
        *rest,
    ]
    if arguments.report:
        report = arguments.report.absolute()
        report.write_text("")
        command += ["-p", "tests.engines.report", "--outcomes", report]
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


def install() -> None:
    """Fill the folder of packages; done once for each list of requirements."""
    stamp = PACKAGES / ".installed"
    wanted = (HERE / "requirements.txt").read_text()
    if stamp.exists() and stamp.read_text() == wanted:
        return
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    pip += ["--no-deps", "--upgrade", "--target", str(PACKAGES), "-r", str(HERE / "requirements.txt")]
    subprocess.run(pip, check=True)
    stamp.write_text(wanted)


if __name__ == "__main__":
    sys.exit(main())
