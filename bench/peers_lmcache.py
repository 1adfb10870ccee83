"""kvstore and LMCache beside each other, both driven by LMCache's own benchmarks where it has one.

Needs LMCache in an interpreter of its own that can import kvstore too: `make test-lmcache` builds one; LMCACHE_PYTHON
names another.

engine.l2_load_vs_ADAPTER    `lmcache bench l2 --only load`, cold: kvstore's L2 plugin over an nvme tier against
                             LMCache's own adapter on the same disk, times faster; `l2_store_vs_*` likewise
engine.retrieve_vs_lmcache   warm retrieve of the same bytes into the same paged layout: a fetch from a kvstore daemon
                             over shared memory, every byte verified, against RETRIEVE of `lmcache server`, by `lmcache
                             bench server --mode cpu --transfer-mode lmcache_driven`, times faster;
                             `lookup_vs_lmcache`: the question before it
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path

from kvstore.bench.cli import BenchError
from kvstore.bench.peers_lmcache_l2 import measure_l2
from kvstore.bench.peers_lmcache_server import measure_server

ROOT = Path(__file__).resolve().parents[1]
PYTHON_DEFAULT = ROOT / ".venv-lmcache" / "bin" / "python"


def measure(directory: Path, quick: bool) -> dict[str, float]:
    """Metrics `engine.*`; less data and fewer rounds when quick. Raises BenchError without LMCache."""
    python = Path(os.environ.get("LMCACHE_PYTHON", PYTHON_DEFAULT))
    command = python.with_name("lmcache")
    if not command.exists():
        raise BenchError(f"there is no {command}; build it with `make test-lmcache`, or set LMCACHE_PYTHON")
    if subprocess.run([python, "-c", "import kvstore, lmcache"], env=environment(), check=False).returncode:
        raise BenchError(f"{python} cannot import kvstore and lmcache; build another with `make test-lmcache`")
    metrics = measure_l2(command, directory, environment(), quick=quick)
    # A UNIX socket's path is short; the benchmark's own directory may not be.
    with tempfile.TemporaryDirectory(prefix="kvstore-") as short:
        return metrics | measure_server(command, Path(short), environment(), quick=quick)


def environment() -> dict[str, str]:
    """Of LMCache's processes: no telemetry, this kvstore, no spinning threads."""
    return {
        **os.environ,
        "LMCACHE_TRACK_USAGE": "false",
        "DO_NOT_TRACK": "1",
        "PYTHONPATH": str(ROOT),
        "OMP_WAIT_POLICY": "passive",
    }
