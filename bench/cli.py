"""`kvstore bench`: runs one suite, prints its metrics, and writes them as JSON on request.

JSON = {"environment": {...}, "metrics": {dotted.name: number}}. Metrics named `*_vs_*` are ratios of two things
measured in turn in the same run; the thing behind `vs` is the anchor.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from kvstore.bench import blend_plot, codec_plot, environment
from kvstore.errors import KVStoreError

SUITES: dict[str, tuple[tuple[str, ...], str]] = {
    "blend": (
        (
            "kvstore.bench.blend_exact",
            "kvstore.bench.blend_quality",
            "kvstore.bench.blend_links",
            "kvstore.bench.blend_ttft",
        ),
        "blended prefill against full prefill and plain concatenation, every policy; time to first token from dram and "
        "nvme (needs the torch extra, and the trained test models of the repository)",
    ),
    "tiers": (
        (
            "kvstore.bench.tiers_dram",
            "kvstore.bench.tiers_nvme",
            "kvstore.bench.tiers_fio",
            "kvstore.bench.tiers_events",
        ),
        "the dram and nvme tiers against memcpy, plain O_DIRECT and (where it is installed) fio",
    ),
    "codec": (
        ("kvstore.bench.codec", "kvstore.bench.codec_r32"),
        "codecs: bits for error against rivals, speed, the entropy coder (trained models need the torch extra)",
    ),
    "engine": (
        (
            "kvstore.bench.engine_index",
            "kvstore.bench.engine_plan",
            "kvstore.bench.engine_movement",
            "kvstore.bench.engine_promotion",
            "kvstore.bench.engine_spans",
        ),
        "the index of 10^4 to 10^6 chunks; load or recompute: the controller on simulated links against an oracle; "
        "parking and resuming contexts; what memory should keep; plans of prompts with known documents",
    ),
    "peers": (
        ("kvstore.bench.peers_lmcache",),
        "kvstore and LMCache on the same disk and memory (needs what `make test-lmcache` builds)",
    ),
    "replay": (
        ("kvstore.bench.replay", "kvstore.bench.replay_store"),
        "hit ratios and writes of every cache policy on a trace (--trace) or a made-up one",
    ),
    "service": (("kvstore.bench.service",), "the daemon against memcpy and a bare socket"),
    "ttft": (
        ("kvstore.bench.ttft",),
        "time to first token, cold against warm, on a model of 0.5B geometry (needs the torch extra, or vLLM)",
    ),
}
"""Suite -> modules with `measure(directory, quick) -> {metric: number}`, and what it measures."""

PLOTS = {"codec": codec_plot.draw, "blend": blend_plot.draw}

ENGINES = {
    "transformers": ("kvstore.bench.ttft",),
    "vllm": ("kvstore.bench.ttft_vllm", "kvstore.bench.ttft_vllm_blend"),
}
"""What the suite ttft measures with each engine."""


class BenchError(KVStoreError):
    """A benchmark cannot run here; says what it needs."""


def main(argv: Sequence[str]) -> int:
    """Run `kvstore bench ARGV`; answers the exit code."""
    parser = argparse.ArgumentParser(
        prog="kvstore bench", description="Storage and service benchmarks.", allow_abbrev=False
    )
    parser.add_argument(
        "suite", choices=sorted(SUITES), help="; ".join(f"{name}: {text}" for name, (_, text) in SUITES.items())
    )
    parser.add_argument(
        "--json", metavar="FILE", help="also write environment and metrics here; - for standard output only"
    )
    parser.add_argument(
        "--dir", metavar="DIR", help="where test files go (the disk under test); default: a new one here"
    )
    parser.add_argument(
        "--quick", action="store_true", help="small sizes and few rounds: shows that it runs, not how fast"
    )
    parser.add_argument(
        "--plot",
        metavar="FILE",
        type=Path,
        help="draw to this .svg or .png (bench extra); codec: bits against error; blend: quality over the ratio",
    )
    parser.add_argument(
        "--trace", metavar="FILE", type=Path, help="suite replay: JSON lines with timestamp, input_length, hash_ids, …"
    )
    parser.add_argument(
        "--engine", choices=sorted(ENGINES), help="suite ttft: transformers (the default), or vllm if it is installed"
    )
    arguments = parser.parse_args(argv)
    if arguments.engine and arguments.suite != "ttft":
        parser.error("--engine is for the suite ttft")
    if arguments.trace and arguments.suite != "replay":
        parser.error("--trace is for the suite replay")
    options = {"trace": arguments.trace} if arguments.trace else {}
    if arguments.plot:
        if arguments.suite not in PLOTS:
            parser.error(f"--plot is for the suites {' and '.join(PLOTS)}")
        codec_plot.check(arguments.plot)
    for flag, target in (("--json", arguments.json if arguments.json != "-" else None), ("--plot", arguments.plot)):
        if target and (Path(target).is_dir() or not Path(target).absolute().parent.is_dir()):
            parser.error(f"{flag} {target}: name a file in a directory that exists")
    modules = ENGINES[arguments.engine] if arguments.engine else SUITES[arguments.suite][0]
    metrics: dict[str, float] = {}
    if arguments.dir and not Path(arguments.dir).is_dir():
        parser.error(f"--dir: there is no directory {arguments.dir}")
    # Not the system's temporary directory: that is often memory, and this measures a disk.
    with tempfile.TemporaryDirectory(prefix=".kvstore-bench-", dir=arguments.dir or ".") as directory:
        for name in modules:
            module = importlib.import_module(name)
            metrics |= module.measure(Path(directory).resolve(), arguments.quick, **options)
    if arguments.plot:
        PLOTS[arguments.suite](metrics, arguments.plot)
    report = {"environment": environment.describe(), "metrics": dict(sorted(metrics.items()))}
    if arguments.json == "-":
        json.dump(report, sys.stdout, indent=2)
        return 0
    for name, value in sorted(metrics.items()):
        print(f"{name:48s} {value:12.4g}")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(report, indent=2) + "\n")
        print(f"written to {arguments.json}")
    return 0
