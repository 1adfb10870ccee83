"""kvstore's L2 plugin and LMCache's own file adapters inside `lmcache bench l2`.

Every adapter stores into a directory of its own on the disk under test, in one process; then the files' pages are
dropped from the page cache; then another process loads them. The adapters take turns, several times over.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvstore.bench.cli import BenchError
from kvstore.bench.timing import median

OBJECT_KIB = 4096
KEYS = 8
IN_FLIGHT = 4
RUN_SECONDS_MAX = 600


def adapters(directory: Path, capacity_bytes: int) -> dict[str, dict[str, Any]]:
    """Adapter -> its LMCache configuration; each lives in `directory`/its name."""
    memory = 256 << 20

    def kvstore(name: str, **params: object) -> dict[str, Any]:
        return {
            "type": "plugin",
            "module_path": "kvstore.connectors.lmcache",
            "class_name": "KVStoreL2Adapter",
            "adapter_params": {"url": f"embedded:{directory / name}?dram={memory}&nvme={capacity_bytes}", **params},
        }

    def files(name: str, kind: str, **params: object) -> dict[str, Any]:
        return {"type": kind, "base_path": str(directory / name), **params}

    return {
        "kvstore": kvstore("kvstore", durable=True),
        "fs": files("fs", "fs"),
        "fs_native": files("fs_native", "fs_native", num_workers=4),
        "fs_native_direct": files("fs_native_direct", "fs_native", num_workers=4, use_odirect=True),
    }


def measure_l2(command: Path, directory: Path, environment: Mapping[str, str], *, quick: bool) -> dict[str, float]:
    """Metrics `engine.l2_*`: MB/s of each adapter and how much faster kvstore is than each of LMCache's."""
    rounds, turns = (1, 1) if quick else (6, 3)
    total = OBJECT_KIB * 1024 * KEYS * IN_FLIGHT * (rounds + 1)
    times: dict[tuple[str, str], list[float]] = {}
    for _ in range(turns):
        for name, config in adapters(directory, 2 * total).items():
            (directory / name).mkdir()
            for operation in ("store", "load"):
                times.setdefault((name, operation), []).append(
                    _run(command, config, operation, rounds, directory, environment)
                )
                drop_from_page_cache(directory / name)
            shutil.rmtree(directory / name)
    round_mb = OBJECT_KIB * KEYS * IN_FLIGHT / 1024
    metrics: dict[str, float] = {}
    for (name, operation), milliseconds in times.items():
        metrics[f"engine.l2_{operation}_{name}_mib_per_s"] = round_mb / median(milliseconds) * 1e3
        if name != "kvstore":
            ours = times["kvstore", operation]
            ratios = [theirs / mine for theirs, mine in zip(milliseconds, ours, strict=True)]
            metrics[f"engine.l2_{operation}_vs_{name}"] = median(ratios)
    return metrics


def drop_from_page_cache(directory: Path) -> None:
    """Write back every file below a directory and have the kernel forget its pages; needs no privilege."""
    for path in directory.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            try:
                os.fsync(fd)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)


def _run(
    command: Path,
    config: Mapping[str, Any],
    operation: str,
    rounds: int,
    directory: Path,
    environment: Mapping[str, str],
) -> float:
    """Median milliseconds of a round of `IN_FLIGHT` tasks, as LMCache reports it; every object must succeed."""
    report = directory / "l2.json"
    flags = {
        "--l2-adapter": json.dumps(config),
        "--only": operation,
        "--num-keys": KEYS,
        "--in-flight": IN_FLIGHT,
        "--data-size-kb": OBJECT_KIB,
        "--l1-align-bytes": 4096,
        "--rounds": rounds,
        "--warmup-rounds": 1,
        "--format": "json",
        "--output": report,
    }
    arguments = [str(part) for pair in flags.items() for part in pair]
    done = subprocess.run(
        [command, "bench", "l2", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=RUN_SECONDS_MAX,
        check=False,
    )
    if done.returncode:
        raise BenchError(f"lmcache bench l2 failed on {config}:\n{(done.stdout + done.stderr)[-2000:]}")
    result = json.loads(report.read_text())["metrics"]["op_0"]
    if not result["total_success"] == result["total_keys"] > 0:
        raise BenchError(f"{operation} of {config}: {result['total_success']} of {result['total_keys']} objects")
    return float(result["duration_p50_ms"])
