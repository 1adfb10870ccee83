"""The C++ kernels on 64-bit Arm: fuzz programs under emulation and sanitizers, and a build of the extension.

Where the host is no Arm machine this needs a cross compiler and an emulator (Debian: g++-aarch64-linux-gnu, qemu-user).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NATIVE = ROOT / "codecs" / "native"
COMPILER = shutil.which("aarch64-linux-gnu-g++")
EMULATOR = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
SECONDS_MAX = 900
CASES = {"r32": 600, "ladder": 400, "exponents": 400}
ELF_AARCH64 = (183).to_bytes(2, "little")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(COMPILER is None, reason="needs aarch64-linux-gnu-g++ (Debian: g++-aarch64-linux-gnu)"),
]


def run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*map(str, command)],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=SECONDS_MAX,
        check=False,
    )


def parts(*names: str) -> list[Path]:
    """The sources of these codecs' kernels, but for their Python faces."""
    return [path for name in names for path in sorted(NATIVE.glob(f"{name}_*.cpp")) if path.stem != f"{name}_python"]


SOURCES = {"r32": parts("r32"), "ladder": parts("ladder", "r32"), "exponents": parts("exponents")}


def system_root() -> Path:
    """The folder that has the libraries of Arm programs in lib/."""
    loader = run(COMPILER or "", "-print-file-name=ld-linux-aarch64.so.1").stdout.strip()
    return Path(loader).resolve().parents[1]


@pytest.mark.skipif(EMULATOR is None, reason="needs qemu-aarch64 (Debian: qemu-user)")
@pytest.mark.parametrize("name", CASES)
def test_the_kernels_agree_and_stay_in_their_buffers(tmp_path: Path, name: str) -> None:
    driver = tmp_path / f"{name}_fuzz"
    options = ["-std=c++17", "-O1", "-g", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror"]
    checks = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    folders = [f"-I{NATIVE}", f"-I{ROOT / 'kvstore' / 'native'}"]
    sources = [ROOT / "tests" / "fuzz" / f"{name}_fuzz.cpp", *SOURCES[name]]
    built = run(COMPILER or "", *options, *checks, *folders, *sources, "-lpthread", "-o", driver)
    if built.returncode and "san" in built.stderr.splitlines()[-1]:
        pytest.skip("needs the sanitizers' run-time libraries for aarch64 (libasan, libubsan)")
    assert built.returncode == 0, built.stderr[-2000:]
    # Leaks are looked for by tracing, which the emulator does not do.
    done = run(EMULATOR or "", "-L", system_root(), driver, str(CASES[name]), ASAN_OPTIONS="detect_leaks=0")
    assert done.returncode == 0, done.stderr[-4000:]


def test_the_extension_builds(tmp_path: Path) -> None:
    headers = sysconfig.get_path("include")
    probe = tmp_path / "probe.cpp"
    probe.write_text("#include <Python.h>\n")
    if run(COMPILER or "", f"-I{headers}", "-fsyntax-only", probe).returncode:
        pytest.skip(f"needs Python headers that serve aarch64 too; those in {headers} do not")
    where = ("--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp"))
    built = run(
        *(sys.executable, "setup.py", "--quiet", "build_ext", *where),
        _PYTHON_HOST_PLATFORM="linux-aarch64",
        CC="aarch64-linux-gnu-gcc",
        CXX="aarch64-linux-gnu-g++",
        LDSHARED="aarch64-linux-gnu-g++ -shared",
        LDCXXSHARED="aarch64-linux-gnu-g++ -shared",
        CFLAGS="-Werror",
    )
    module = next((tmp_path / "lib").rglob("_native*.so"), None)
    assert module is not None, built.stderr[-2000:]
    assert module.read_bytes()[18:20] == ELF_AARCH64
