"""LMCache's own CacheGen on the same samples: size, error and time beside ours.

LMCache needs versions of its own, so it lives in a virtual environment of its own, whose interpreter `LMCACHE_PYTHON`
names; without it nothing is measured and the reason is said. docs/codecs.md tells how to make one.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from kvstore.bench.attention_error import attention_error
from kvstore.bench.codec_baselines import container_overhead
from kvstore.bench.kv_samples import Samples, float_parts
from kvstore.codecs.floats import from_float32
from kvstore.spec import KVArrays

INTERPRETER_VARIABLE = "LMCACHE_PYTHON"
SECONDS_MAX = 900
WORKER = Path(__file__).resolve().parent / "lmcache_worker.py"


def measure(samples: Samples) -> dict[str, float]:
    """`codec.lmcache_cachegen.{bits,error,encode_gb_per_second,decode_gb_per_second}.<sample>`; {} if it cannot run."""
    interpreter = os.environ.get(INTERPRETER_VARIABLE)
    if not interpreter:
        _skipped(f"{INTERPRETER_VARIABLE} does not name the interpreter of an environment with lmcache and torch")
        return {}
    if samples.spec.key_dim != samples.spec.value_dim:
        _skipped(f"{samples.name} has heads of unequal K and V, which it cannot split")
        return {}
    with tempfile.TemporaryDirectory() as directory:
        source, target = Path(directory) / "in.npz", Path(directory) / "out.npz"
        np.savez(source, kv=np.stack([_to_lmcache(chunk.arrays, samples) for chunk in samples.chunks]))
        environment = os.environ | {"LMCACHE_TRACK_USAGE": "false", "DO_NOT_TRACK": "1", "CUDA_VISIBLE_DEVICES": ""}
        try:
            done = subprocess.run(
                [interpreter, str(WORKER), str(source), str(target)],
                env=environment,
                capture_output=True,
                text=True,
                timeout=SECONDS_MAX,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            _skipped(str(error))
            return {}
        if done.returncode:
            _skipped((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
            return {}
        with np.load(target, allow_pickle=False) as found:
            result = {name: found[name] for name in found.files}
    errors = [
        attention_error(chunk, _from_lmcache(kv, samples), samples.spec)
        for chunk, kv in zip(samples.chunks, result["kv"], strict=True)
    ]
    nbytes = samples.elements * samples.spec.itemsize
    stored = float(result["nbytes"].mean()) + container_overhead(samples.spec)
    return {
        f"codec.lmcache_cachegen.bits.{samples.name}": 8 * stored / samples.elements,
        f"codec.lmcache_cachegen.error.{samples.name}": sum(errors) / len(errors),
        f"codec.lmcache_cachegen.encode_gb_per_second.{samples.name}": nbytes / float(result["encode_seconds"]) / 1e9,
        f"codec.lmcache_cachegen.decode_gb_per_second.{samples.name}": nbytes / float(result["decode_seconds"]) / 1e9,
    }


def _to_lmcache(arrays: KVArrays, samples: Samples) -> np.typing.NDArray[np.float32]:
    """(layers, 2, tokens, heads, dim)."""
    return np.stack([part.transpose(0, 2, 1, 3) for part in float_parts(arrays, samples.spec)], axis=1)


def _from_lmcache(kv: np.typing.NDArray[np.float32], samples: Samples) -> KVArrays:
    bits = from_float32(np.ascontiguousarray(kv.transpose(0, 1, 3, 2, 4)), samples.spec.dtype)
    return [(layer[0], layer[1]) for layer in bits]


def _skipped(reason: str) -> None:
    print(f"LMCache's CacheGen is not measured: {reason}", file=sys.stderr)
