"""Which R32 kernels run, and the benchmark, run small."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvstore.bench import codec_r32
from kvstore.codecs.r32 import coder

SHOW = "from kvstore.codecs.r32 import coder; from kvstore import _native; print(_native.r32_isa())"
ROUND_TRIP = """
import numpy as np
from kvstore.codecs.r32 import Layout, Packing, TableSet, coder
packing = Packing(radix=3, values_per_symbol=2, zero=1, tokens=7, channels=40)
values = np.random.default_rng(0).integers(-1, 2, (3, 7, 40)).astype(np.int8)
tables, layout = TableSet(np.array([[456] * 8 + [448]])), Layout.of(tiles=3, symbols=packing.symbols)
target = np.empty(layout.bytes_max, dtype=np.uint8)
lengths = coder.encode(target, coder.pack(values, packing).reshape(-1), layout, tables)
stream, back = target[: lengths.sum()], np.empty_like(values)
assert coder.decode_values(back, stream, lengths, layout, tables, packing).all() and np.array_equal(back, values)
symbols = np.empty(layout.symbols, dtype=np.uint8)
assert coder.decode(symbols, stream, lengths, layout, tables).all()
print(coder.NATIVE)
"""


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.skipif(not coder.NATIVE, reason="needs the C++ kernels")
def test_the_environment_chooses_the_instructions() -> None:
    assert run(SHOW, KVSTORE_ISA="scalar").stdout.strip() == "scalar"
    refused = run(SHOW, KVSTORE_ISA="mmx")
    assert refused.returncode
    assert "KVSTORE_ISA: instruction set 'mmx' is unknown" in refused.stderr


def test_numpy_alone_codes_too() -> None:
    done = run(ROUND_TRIP, KVSTORE_KERNELS="numpy")
    assert done.stdout.strip() == "False", done.stderr


def test_the_benchmark_reports(tmp_path: Path) -> None:
    metrics = codec_r32.measure(tmp_path, quick=True)
    wanted = ("excess_bits", "decode_vs_zstd1", "decode_vs_zstd1_low_rate", "encode_vs_zstd1")
    assert {f"codec.r32.{name}" for name in wanted} <= metrics.keys()
    assert metrics["codec.r32.excess_bits"] <= 0.02
    assert all(metrics[f"codec.r32.{rate.name}.bytes_vs_zstd1"] < 1 for rate in codec_r32.RATES)
