"""Runs the tests with vLLM: builds an environment once (3.5 GB), then runs the tests in it.

    python tests/engines/run.py [--venv DIRECTORY] [--report FILE] [pytest arguments]

An environment that has vLLM already is used as it is; it must have pytest and what kvstore needs, too. With --report
the outcome of every test is written to a file, in the form that `report.py` describes.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
TESTS = (*sorted(ROOT.glob("tests/test_vllm_*.py")), *sorted(HERE.glob("test_vllm*.py")))
SECONDS_MAX = 900
"""Longest silence of a test before it prints where it is: engines start slowly on busy cores."""


def main() -> int:
    """Run everything; answers the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv-vllm", help="the environment")
    parser.add_argument("--report", type=Path, help="write each test's outcome to this file, as JSON lines")
    arguments, rest = parser.parse_known_args()
    python = build(ROOT / arguments.venv)
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "passive",
        "PYTHONPATH": str(ROOT),
    }
    # vLLM and what it imports warn of their own deprecations.
    command: list[str | Path] = [
        python,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-o",
        "filterwarnings=default",
        *TESTS,
        *rest,
    ]
    if arguments.report:
        report = arguments.report.absolute()
        report.write_text("")
        command += ["-p", "tests.engines.report", "--outcomes", report]
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


def build(venv: Path) -> Path:
    """The interpreter of an environment with vLLM; made if there is none, and again when the requirements change."""
    python = venv / "bin" / "python"
    stamp = venv / ".installed"
    wanted = (HERE / "requirements.txt").read_text()
    if python.exists() and not stamp.exists():
        return python
    if not stamp.exists() or stamp.read_text() != wanted:
        subprocess.run([sys.executable, "-m", "venv", venv], check=True)
        stamp.write_text("")
        pip: list[str | Path] = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*pip, "-r", HERE / "requirements.txt"], check=True)
        stamp.write_text(wanted)
    return python


if __name__ == "__main__":
    sys.exit(main())
