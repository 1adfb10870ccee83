"""The hbm tier's Triton kernels, in a process of their own: Triton decides at its import whether to interpret."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CASES = Path(__file__).parent / "interpreted" / "hbm_triton.py"
SECONDS_MAX = 300


def test_triton_agrees_with_torch() -> None:
    pytest.importorskip("torch", reason="needs the torch extra")
    pytest.importorskip("triton", reason="needs the triton extra")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(CASES)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=SECONDS_MAX, cwd=CASES.parents[2], check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
