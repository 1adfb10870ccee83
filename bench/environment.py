"""What a benchmark ran on: written beside every set of numbers, so that they can be compared or doubted."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path

import kvstore
from kvstore import kernels

PACKAGES = ("numpy", "lmdb", "zstandard", "aiohttp", "msgspec", "xxhash", "torch", "transformers")


def describe() -> dict[str, str | int | float]:
    """Machine, software and load at this moment; JSON types only."""
    environment: dict[str, str | int | float] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "kvstore": kvstore.__version__,
        "commit": _commit(),
        "kernels": kernels.NAME,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load_1min": os.getloadavg()[0],
        "gpu": _gpu(),
    }
    for package in PACKAGES:
        try:
            environment[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            environment[package] = "not installed"
    return environment


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _commit() -> str:
    try:
        command = ["git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "--short", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _gpu() -> str:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return "none used"
    return str(torch.cuda.get_device_name())
