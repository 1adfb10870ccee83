"""A short run of tests/fuzz/ladder_fuzz.cpp under AddressSanitizer and UndefinedBehaviorSanitizer."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NATIVE = ROOT / "codecs" / "native"
PARTS = ("avx512", "decode", "encode", "loops", "output")
R32_PARTS = ("decode", "encode", "pack", "dispatch", "scalar", "avx2", "avx512", "avx512_digits", "neon")
CASES = 3000
SECONDS_MAX = 600


@pytest.mark.slow
def test_no_levels_make_the_decoder_leave_its_buffers(tmp_path: Path) -> None:
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("needs g++ or clang++")
    driver = tmp_path / "ladder_fuzz"
    options = ["-std=c++17", "-O1", "-g", "-ffp-contract=off", "-fsanitize=address,undefined"]
    folders = [f"-I{NATIVE}", f"-I{ROOT / 'kvstore' / 'native'}"]
    sources = [NATIVE / f"ladder_{part}.cpp" for part in PARTS] + [NATIVE / f"r32_{part}.cpp" for part in R32_PARTS]
    files = map(str, [ROOT / "tests" / "fuzz" / "ladder_fuzz.cpp", *sources])
    command = [compiler, *options, "-fno-sanitize-recover=all", *folders, *files, "-lpthread", "-o", str(driver)]
    built = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS_MAX, check=False)
    if built.returncode and "san" in built.stderr.splitlines()[-1]:
        pytest.skip("needs the sanitizers' run-time libraries (libasan, libubsan)")
    assert built.returncode == 0, built.stderr[-2000:]
    done = subprocess.run([str(driver), str(CASES)], capture_output=True, text=True, timeout=SECONDS_MAX, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
