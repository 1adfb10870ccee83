"""Speed of whole-chunk encode and decode, of lossless codecs against memcpy, and with two threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import msgspec
import numpy as np

from kvstore import kernels
from kvstore.bench.kv_samples import SampleChunk, Samples
from kvstore.bench.ladder_samples import ladder_profile
from kvstore.bench.timing import cpu_seconds, median, paired, seconds
from kvstore.chunk import decode_groups, encode_chunk, encoded_bytes_max, group_segments
from kvstore.codec import Codec, LayerSegments
from kvstore.codecs import registry
from kvstore.codecs.floats import from_float32
from kvstore.codecs.ladder import LadderCodec
from kvstore.container import ChunkMeta, parse
from kvstore.parallel import for_each
from kvstore.spec import KVArrays, KVSpec, Rope

TOKENS = 256
CODECS = ("raw", "lossless", "lossless_dense", "cachegen", "int8", "int4", "fp8", "ladder")
GROUPINGS = ("x0", "head", "layer")
YARDSTICK_BYTES, YARDSTICK_HASHES = 1 << 18, 512
TURNOVER = 3
"""Chunks visited in turn, so that sources and targets do not sit in the processor's cache."""


def measure(quick: bool) -> dict[str, float]:
    """`codec.<id>.{encode,decode}_gb_per_second` of bf16 and ratios, on chunks of Llama-3-8B's layers.

    `{encode,decode}_cpu_gb_per_second` is by the processor time of one thread. `codec.ladder_<grouping>` is the ladder
    with a profile. `decode_two_threads` is the speed with two threads over that with one, median of rounds;
    `decode_two_threads_best` that of the fastest rounds, and `decode_two_threads_vs_yardstick` the median over the same
    of hashing in the cache, measured in turn: what this machine gives to any code at the moment.
    """
    rounds = 3 if quick else 9
    spec = _spec(layers=2 if quick else 16)
    chunks = [_chunk(spec, seed) for seed in range(TURNOVER)]
    metrics: dict[str, float] = {}
    for name in CODECS:
        metrics |= _measure_codec(name, registry.get(name), spec, chunks, rounds)
    for grouping in GROUPINGS[:1] if quick else GROUPINGS:
        codec = LadderCodec(ladder_profile(_samples(spec, chunks), grouping))
        metrics |= _measure_codec(f"ladder_{grouping}", codec, spec, chunks, rounds)
    return metrics


def _measure_codec(name: str, codec: Codec, spec: KVSpec, chunks: Sequence[KVArrays], rounds: int) -> dict[str, float]:
    nbytes = spec.chunk_bytes(TOKENS)
    meta = ChunkMeta(fingerprint=bytes(32), key=bytes(32), spec=spec, tokens=TOKENS)
    buffers = [memoryview(bytearray(encoded_bytes_max(codec, spec, TOKENS))) for _ in chunks]
    turn = _Turn(len(chunks))

    def encode() -> int:
        at = turn.next()
        return encode_chunk(codec, meta, chunks[at], buffers[at])

    encode_seconds = median([seconds(encode) for _ in range(max(rounds, len(chunks)))])
    encode_cpu_seconds = median([cpu_seconds(encode) for _ in range(rounds)])
    groups = [list(group_segments(parse(buffer), buffer)) for buffer in buffers]
    targets = [spec.arrays(bytearray(nbytes), TOKENS) for _ in chunks]
    flat = [np.full(nbytes, at, dtype=np.uint8) for at in range(len(chunks))]

    def decode(threads: int = 1, levels: int | None = None) -> None:
        at = turn.next()
        decode_groups(codec, [own[:levels] for own in groups[at]], targets[at], spec, threads=threads)

    def copy() -> None:
        at = turn.next()
        flat[at][:] = flat[at - 1]

    decode_seconds, _, ratio = paired(decode, copy, rounds=rounds)
    decode_cpu_seconds = median([cpu_seconds(decode) for _ in range(rounds)])
    gains = [(_times(decode), _times(_hash)) for _ in range(2 * rounds)]
    metrics = {
        f"codec.{name}.encode_gb_per_second": nbytes / encode_seconds / 1e9,
        f"codec.{name}.decode_gb_per_second": nbytes / decode_seconds / 1e9,
        f"codec.{name}.chunk_bits": _segment_bits(groups[0], nbytes // spec.itemsize),
        f"codec.{name}.encode_cpu_gb_per_second": nbytes / encode_cpu_seconds / 1e9,
        f"codec.{name}.decode_cpu_gb_per_second": nbytes / decode_cpu_seconds / 1e9,
        f"codec.{name}.decode_two_threads": median([own.gain for own, _ in gains]),
        f"codec.{name}.decode_two_threads_best": _best_gain([own for own, _ in gains]),
        f"codec.{name}.decode_two_threads_vs_yardstick": median([own.gain / other.gain for own, other in gains]),
    }
    for levels in range(1, len(groups[0][0]) if isinstance(codec, LadderCodec) else 0):
        level_seconds = median([seconds(partial(decode, levels=levels)) for _ in range(rounds)])
        metrics[f"codec.{name}.decode_level_{levels - 1}_gb_per_second"] = nbytes / level_seconds / 1e9
    if name == "lossless":
        metrics["codec.lossless_fast.decode_vs_memcpy"] = ratio
    return metrics


class _Times(msgspec.Struct, frozen=True):
    """Seconds that some work took on one thread and on two."""

    one: float
    two: float

    @property
    def gain(self) -> float:
        """Speed on two threads over that on one."""
        return self.one / self.two


def _times(work: Callable[[int], None]) -> _Times:
    return _Times(seconds(lambda: work(1)), seconds(lambda: work(2)))


def _best_gain(times: Sequence[_Times]) -> float:
    """The gain by the fastest round of each: what the code does while two cores are free."""
    return min(own.one for own in times) / min(own.two for own in times)


def _hash(threads: int) -> None:
    """The yardstick: bytes that stay in the cache."""
    for_each(kernels.xxh3, [bytes(YARDSTICK_BYTES)] * YARDSTICK_HASHES, threads)


class _Turn:
    """Numbers 0, 1, ... count - 1, over and over."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._at = 0

    def next(self) -> int:
        """The next one."""
        self._at = (self._at + 1) % self._count
        return self._at


def _segment_bits(groups: list[LayerSegments], elements: int) -> float:
    return 8 * sum(segment.length for group in groups for segment, _ in group) / elements


def _spec(layers: int) -> KVSpec:
    rope = Rope(kind="default", theta=5e5, dims=128)
    return KVSpec(layers=layers, kv_heads=8, key_dim=128, value_dim=128, dtype="bfloat16", rope=rope)


def _samples(spec: KVSpec, chunks: Sequence[KVArrays]) -> Samples:
    """The chunks as what a profile is fitted to; only its shape matters to speed."""
    queries = np.random.default_rng(0).standard_normal((spec.layers, spec.kv_heads, 8, spec.key_dim), dtype=np.float32)
    pairs = [SampleChunk(arrays, TOKENS, queries) for arrays in chunks for _ in range(2)]
    return Samples("speed", spec, pairs, [])


def _chunk(spec: KVSpec, seed: int) -> KVArrays:
    """Normal values; every channel has a scale of its own and some a mean, the same in every chunk."""
    model, random = np.random.default_rng(0), np.random.default_rng(seed + 1)

    def one(dim: int) -> np.typing.NDArray[np.unsignedinteger]:
        scale = np.exp(model.normal(0, 0.7, (spec.kv_heads, 1, dim))).astype(np.float32)
        mean = (model.normal(0, 8, scale.shape) * (model.random(scale.shape) < 0.05)).astype(np.float32)
        values = random.standard_normal((spec.kv_heads, TOKENS, dim), dtype=np.float32)
        return from_float32((values + mean) * scale, spec.dtype)

    return [(one(spec.key_dim), one(spec.value_dim)) for _ in range(spec.layers)]
