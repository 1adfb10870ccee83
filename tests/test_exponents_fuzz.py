"""A short run of tests/fuzz/exponents_fuzz.cpp under AddressSanitizer and UndefinedBehaviorSanitizer."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NATIVE = ROOT / "codecs" / "native"
PARTS = ("loops", "fixed", "planes")
CASES = 3000
SECONDS_MAX = 600


@pytest.mark.slow
def test_no_segment_makes_the_decoder_leave_its_buffers(tmp_path: Path) -> None:
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("needs g++ or clang++")
    driver = tmp_path / "exponents_fuzz"
    options = ["-std=c++17", "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    folders = [f"-I{NATIVE}", f"-I{ROOT / 'kvstore' / 'native'}"]
    sources = [ROOT / "tests" / "fuzz" / "exponents_fuzz.cpp", *(NATIVE / f"exponents_{part}.cpp" for part in PARTS)]
    command = [compiler, *options, *folders, *map(str, sources), "-o", str(driver)]
    built = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS_MAX, check=False)
    if built.returncode and "san" in built.stderr.splitlines()[-1]:
        pytest.skip("needs the sanitizers' run-time libraries (libasan, libubsan)")
    assert built.returncode == 0, built.stderr[-2000:]
    done = subprocess.run([str(driver), str(CASES)], capture_output=True, text=True, timeout=SECONDS_MAX, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
