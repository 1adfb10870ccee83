"""The Triton kernels, in processes of their own: whether Triton interprets is decided when it is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "interpreted"
SECONDS_MAX = 600


@pytest.mark.parametrize("cases", sorted(path.name for path in FOLDER.glob("*_triton.py")))
def test_triton_agrees_with_the_reference(cases: str) -> None:
    pytest.importorskip("torch", reason="needs the torch extra")
    pytest.importorskip("triton", reason="needs the triton extra")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(FOLDER / cases)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        command,
        env=environment,
        capture_output=True,
        text=True,
        timeout=SECONDS_MAX,
        cwd=FOLDER.parents[1],
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
