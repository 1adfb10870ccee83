"""A short run of tests/fuzz/r32_fuzz.cpp under AddressSanitizer and UndefinedBehaviorSanitizer."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NATIVE = ROOT / "codecs" / "native"
PARTS = ("decode", "encode", "pack", "dispatch", "scalar", "avx2", "avx512", "avx512_digits", "neon")
CASES = 2000
SECONDS_MAX = 600


@pytest.mark.slow
def test_no_stream_makes_the_decoders_leave_their_buffers(tmp_path: Path) -> None:
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("needs g++ or clang++")
    driver = tmp_path / "r32_fuzz"
    options = ["-std=c++17", "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    sources = [ROOT / "tests" / "fuzz" / "r32_fuzz.cpp", *(NATIVE / f"r32_{part}.cpp" for part in PARTS)]
    command = [compiler, *options, f"-I{NATIVE}", *map(str, sources), "-lpthread", "-o", str(driver)]
    built = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS_MAX, check=False)
    if built.returncode and "san" in built.stderr.splitlines()[-1]:
        pytest.skip("needs the sanitizers' run-time libraries (libasan, libubsan)")
    assert built.returncode == 0, built.stderr[-2000:]
    done = subprocess.run([str(driver), str(CASES)], capture_output=True, text=True, timeout=SECONDS_MAX, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
