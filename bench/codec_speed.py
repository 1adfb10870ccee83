"""Speed of whole-chunk encode and decode, of lossless codecs against memcpy, and on two cores."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from kvstore.bench.timing import median, paired, seconds
from kvstore.chunk import encode_chunk, encoded_bytes_max, group_segments
from kvstore.codec import Codec, LayerSegments
from kvstore.codecs import registry
from kvstore.codecs.floats import from_float32
from kvstore.container import ChunkMeta, parse
from kvstore.spec import KVArrays, KVSpec, Rope

TOKENS = 256
CODECS = ("raw", "lossless", "lossless_dense", "cachegen", "int8", "int4", "fp8", "ladder")
TURNOVER = 3
"""Chunks visited in turn, so that sources and targets do not sit in the processor's cache."""


def measure(quick: bool) -> dict[str, float]:
    """`codec.<id>.{encode,decode}_gb_per_second` of bf16 and ratios, on chunks of Llama-3-8B's layers."""
    spec = KVSpec(
        layers=2 if quick else 16,
        kv_heads=8,
        key_dim=128,
        value_dim=128,
        dtype="bfloat16",
        rope=Rope(kind="default", theta=5e5, dims=128),
    )
    rounds = 3 if quick else 9
    chunks = [_chunk(spec, seed) for seed in range(TURNOVER)]
    metrics: dict[str, float] = {}
    for name in CODECS:
        metrics |= _measure_codec(registry.get(name), spec, chunks, rounds if name != "ladder" else 3)
    return metrics


def _measure_codec(codec: Codec, spec: KVSpec, chunks: Sequence[KVArrays], rounds: int) -> dict[str, float]:
    nbytes = spec.chunk_bytes(TOKENS)
    meta = ChunkMeta(fingerprint=bytes(32), key=bytes(32), spec=spec, tokens=TOKENS)
    buffers = [memoryview(bytearray(encoded_bytes_max(codec, spec, TOKENS))) for _ in chunks]
    turn = _Turn(len(chunks))

    def encode() -> int:
        at = turn.next()
        return encode_chunk(codec, meta, chunks[at], buffers[at])

    encode_seconds = median([seconds(encode) for _ in range(max(rounds, len(chunks)))])
    groups = [list(group_segments(parse(buffer), buffer)) for buffer in buffers]
    targets = [spec.arrays(bytearray(nbytes), TOKENS) for _ in chunks]
    flat = [np.full(nbytes, at, dtype=np.uint8) for at in range(len(chunks))]

    def decode() -> None:
        at = turn.next()
        for segments in groups[at]:
            codec.decode(segments, targets[at], spec)

    def copy() -> None:
        at = turn.next()
        flat[at][:] = flat[at - 1]

    decode_seconds, _, ratio = paired(decode, copy, rounds=rounds)
    metrics = {
        f"codec.{codec.id}.encode_gb_per_second": nbytes / encode_seconds / 1e9,
        f"codec.{codec.id}.decode_gb_per_second": nbytes / decode_seconds / 1e9,
        f"codec.{codec.id}.chunk_bits": _segment_bits(groups[0], nbytes // spec.itemsize),
        f"codec.{codec.id}.decode_two_cores": _two_cores(codec, spec, groups, targets, rounds),
    }
    if codec.id == "lossless":
        metrics["codec.lossless_fast.decode_vs_memcpy"] = ratio
    return metrics


def _two_cores(
    codec: Codec, spec: KVSpec, groups: list[list[LayerSegments]], targets: list[KVArrays], rounds: int
) -> float:
    """Speed with two threads taking layer groups in turn, over that with one."""
    turn = _Turn(len(groups))

    def work(at: int, first: int, every: int) -> None:
        for segments in groups[at][first::every]:
            codec.decode(segments, targets[at], spec)

    with ThreadPoolExecutor(2) as pool:

        def two() -> None:
            at = turn.next()
            for done in [pool.submit(work, at, first, 2) for first in range(2)]:
                done.result()

        def one() -> None:
            pool.submit(work, turn.next(), 0, 1).result()

        return paired(two, one, rounds=rounds)[2]


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


def _chunk(spec: KVSpec, seed: int) -> KVArrays:
    """Normal values, every channel with a scale of its own, some with a mean."""
    rng = np.random.default_rng(seed)

    def one(dim: int) -> np.typing.NDArray[np.unsignedinteger]:
        scale = np.exp(rng.normal(0, 0.7, (spec.kv_heads, 1, dim))).astype(np.float32)
        mean = (rng.normal(0, 8, scale.shape) * (rng.random(scale.shape) < 0.05)).astype(np.float32)
        values = rng.standard_normal((spec.kv_heads, TOKENS, dim), dtype=np.float32)
        return from_float32((values + mean) * scale, spec.dtype)

    return [(one(spec.key_dim), one(spec.value_dim)) for _ in range(spec.layers)]
