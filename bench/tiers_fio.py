"""The nvme tier against fio: same disk, same block size, same depth, chunks in random order.

fio moves blocks of the chunk's size with as many jobs as the tier has threads, O_DIRECT, positions at random, and
flushes once at the end; the tier reads and puts batches of BATCH_BYTES, and every put is durable when it is answered.
Both have their memory in transparent huge pages, which alone can double what a disk gives (docs/nvme.md); fio as it
comes, in ordinary pages, is `*_fio_base_pages`.
Without fio on the path there is nothing to compare with, which is said, and the metrics are left out.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from kvstore.bench.tiers_nvme import fill_container
from kvstore.bench.timing import seconds
from kvstore.buffers import aligned_buffer
from kvstore.tier import IO_ALIGN, PutItem, ReadItem
from kvstore.tiers.directio import THREADS_DEFAULT
from kvstore.tiers.nvme import NvmeTier
from kvstore.tiers.volume import JOURNAL_PAGES_MAX

MIB = 1 << 20
CHUNK_BYTES = (32 * MIB, 4 * MIB)
CHUNK_BYTES_QUICK = (1 * MIB,)
SPAN_BYTES = 1 << 30
ROUNDS = 7
BATCH_BYTES = 256 * MIB
SECONDS_MAX = 300.0


def measure(directory: Path, quick: bool = False) -> dict[str, float]:
    """`tiers.nvme.read_vs_fio` and `write_vs_fio`, the worst over the sizes, and GB/s of both; empty without fio."""
    fio = shutil.which("fio")
    if fio is None:
        print("tiers.nvme.*_vs_fio: left out, fio is not installed (apt-get install fio)", file=sys.stderr)
        return {}
    metrics: dict[str, float] = {}
    for nbytes in CHUNK_BYTES_QUICK if quick else CHUNK_BYTES:
        span_bytes = 16 * MIB if quick else SPAN_BYTES
        metrics |= _measure_size(directory, fio, nbytes, span_bytes, 3 if quick else ROUNDS)
    for verb in ("read", "write"):
        prefix = f"tiers.nvme.{verb}_vs_fio"
        metrics[prefix] = min(ratio for name, ratio in metrics.items() if name.startswith(prefix))
    return metrics


def _measure_size(directory: Path, fio: str, nbytes: int, span_bytes: int, rounds: int) -> dict[str, float]:
    """One size: fio and the tier in turn, each over a file of `span_bytes`, medians of the rounds."""
    count = span_bytes // nbytes
    batch = min(BATCH_BYTES // nbytes, count // 2)
    overhead_bytes = (1 + JOURNAL_PAGES_MAX) * IO_ALIGN
    room_bytes = batch * nbytes
    tier = NvmeTier(
        directory / f"fio-tier-{nbytes}", span_bytes + room_bytes + overhead_bytes, evict_ahead_bytes=room_bytes
    )
    buffers = [aligned_buffer(nbytes) for _ in range(batch)]
    for number, buffer in enumerate(buffers):
        fill_container(buffer, number)
    rng = random.Random(nbytes)
    numbers = itertools.count()

    def write() -> None:
        for _ in range(count // batch):
            items = [PutItem(next(numbers).to_bytes(32, "little"), buffer) for buffer in buffers]
            if not all(status.durable for status in tier.put(items)):
                raise OSError("the nvme tier did not store the benchmark's chunks")

    def read() -> None:
        keys = [entry.key for entry in tier.scan()]
        rng.shuffle(keys)
        for some in _batches(keys[: count // batch * batch], batch):
            items = [ReadItem(key, buffer) for key, buffer in zip(some, buffers, strict=True)]
            if tier.read(items) != [nbytes] * batch:
                raise OSError("the nvme tier did not read the benchmark's chunks")

    suffix = f"{nbytes // MIB}mib"
    metrics: dict[str, float] = {}
    moved_bytes = count // batch * batch * nbytes
    try:
        write()
        _fio_gbps(fio, directory, "write", nbytes, span_bytes)  # the first write to a place is slower
        for verb, ours in (("write", write), ("read", read)):
            our_gbps, fio_gbps, base_pages_gbps = [], [], []
            for _ in range(rounds):
                fio_gbps.append(_fio_gbps(fio, directory, verb, nbytes, span_bytes))
                our_gbps.append(moved_bytes / seconds(ours) / 1e9)
                base_pages_gbps.append(_fio_gbps(fio, directory, verb, nbytes, span_bytes, huge_pages=False))
            ratios = [one / other for one, other in zip(our_gbps, fio_gbps, strict=True)]
            metrics[f"tiers.nvme.{verb}_vs_fio_{suffix}"] = statistics.median(ratios)
            metrics[f"tiers.nvme.{verb}_random_{suffix}_gbps"] = statistics.median(our_gbps)
            metrics[f"tiers.nvme.{verb}_fio_{suffix}_gbps"] = statistics.median(fio_gbps)
            metrics[f"tiers.nvme.{verb}_fio_base_pages_{suffix}_gbps"] = statistics.median(base_pages_gbps)
    finally:
        tier.close()
        (directory / "fio-file").unlink(missing_ok=True)
        shutil.rmtree(directory / f"fio-tier-{nbytes}")
    return metrics


def _fio_gbps(fio: str, directory: Path, verb: str, nbytes: int, span_bytes: int, *, huge_pages: bool = True) -> float:
    """GB/s of one run of fio over the whole span: THREADS_DEFAULT jobs, one block each in flight."""
    per_job_bytes = span_bytes // THREADS_DEFAULT // nbytes * nbytes
    command = [
        fio, "--name=kvstore", f"--filename={directory / 'fio-file'}", f"--rw=rand{verb}", f"--bs={nbytes}",
        f"--size={per_job_bytes}", "--offset_increment=" + str(per_job_bytes), f"--numjobs={THREADS_DEFAULT}",
        "--thread", "--direct=1", "--ioengine=psync", "--group_reporting", "--output-format=json", "--end_fsync=1",
        "--fallocate=posix", "--randrepeat=1",
    ]  # fmt: skip
    environment = os.environ | ({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"} if huge_pages else {})
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS_MAX, check=True, env=environment)
    return float(json.loads(done.stdout)["jobs"][0][verb]["bw_bytes"]) / 1e9


def _batches(keys: list[bytes], count: int) -> Iterator[list[bytes]]:
    for start in range(0, len(keys), count):
        yield keys[start : start + count]
