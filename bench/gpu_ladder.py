"""The ladder decoded on a CUDA GPU, for `make gpu-check`: the elements of the host, and how many a second."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch

from kvstore.bench.kv_samples import Samples, synthetic
from kvstore.bench.ladder_samples import ladder_profile
from kvstore.chunk import decode_chunk, encode_chunk, encoded_bytes_max, group_segments
from kvstore.codec import LayerSegments
from kvstore.codecs.ladder import LadderCodec
from kvstore.codecs.ladder_classes import LEVELS
from kvstore.container import ChunkMeta, parse
from kvstore.spec import KVArrays, KVSpec, Rope

ROUNDS = 10
TOKENS = 256
PRODUCT_ERROR = 2.0**-16
"""Of the largest number: what sums of the same products may differ by."""


def checks() -> list[tuple[str, Callable[[], str]]]:
    """(name, check) pairs; a check returns what it measured, or raises."""
    return [("ladder on the GPU", same_elements), *((f"ladder decode, level {i}", _timed(i)) for i in (0, 1, 3))]


def same_elements() -> str:
    """Without a basis the bits of the host, at every level; with one, its numbers within a sum's rounding."""
    samples = synthetic(quick=True)
    worst = 0.0
    for grouping in (None, "x0", "head", "layer", "all"):
        codec = LadderCodec(bytes(32) if grouping is None else ladder_profile(samples, grouping))
        for level in range(LEVELS):
            worst = max(worst, _difference(codec, samples, level, exact=grouping in (None, "x0")))
    return f"5 profiles, {LEVELS} levels; with a basis within {worst:.1e} of the largest number"


def _difference(codec: LadderCodec, samples: Samples, level: int, *, exact: bool) -> float:
    chunk = samples.chunks[0]
    buffer = _encoded(codec, samples.spec, chunk.arrays)
    host = samples.spec.arrays(bytearray(samples.spec.chunk_bytes(TOKENS)), TOKENS)
    decode_chunk(buffer, host, lambda _id, _profile: codec, level_max=level)
    tensors = _room(samples.spec)
    codec.decode_on_device(list(group_segments(parse(buffer), buffer, level)), tensors, samples.spec)
    worst = 0.0
    for pair, own in zip(tensors, host, strict=True):
        for tensor, bits in zip(pair, own, strict=True):
            expected = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16).cuda()
            assert not exact or torch.equal(tensor, expected), f"level {level}: other elements"
            difference = (tensor.float() - expected.float()).abs() - 2.0**-7 * expected.float().abs()
            worst = max(worst, float((difference.max() / expected.float().abs().max()).clamp(min=0)))
    assert worst <= PRODUCT_ERROR, f"level {level}: numbers differ by {worst} of the largest"
    return worst


def _timed(level: int) -> Callable[[], str]:
    return lambda: _speed(level)


def _speed(level: int) -> str:
    """A chunk of all of Llama-3-8B's layers without a profile, from bytes in host memory; hashes are checked."""
    rope = Rope(kind="default", theta=5e5, dims=128)
    spec = KVSpec(layers=32, kv_heads=8, key_dim=128, value_dim=128, dtype="bfloat16", rope=rope)
    random = np.random.default_rng(0)
    shape = (spec.kv_heads, TOKENS, spec.key_dim)
    arrays: KVArrays = []
    for _ in range(spec.layers):
        keys, values = (random.standard_normal(shape, dtype=np.float32).view(np.uint32) >> 16 for _ in "kv")
        arrays.append((keys.astype(np.uint16), values.astype(np.uint16)))
    codec = LadderCodec()
    buffer = _encoded(codec, spec, arrays)
    groups: list[LayerSegments] = list(group_segments(parse(buffer), buffer, level))
    tensors = _room(spec)
    codec.decode_on_device(groups, tensors, spec)
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(ROUNDS):
        codec.decode_on_device(groups, tensors, spec)
    torch.cuda.synchronize()
    seconds = (time.perf_counter() - started) / ROUNDS
    return (
        f"{spec.chunk_bytes(TOKENS) / spec.itemsize / seconds / 1e9:.2f} G elements/s, {1e3 * seconds:.1f} ms a chunk"
    )


def _encoded(codec: LadderCodec, spec: KVSpec, arrays: KVArrays) -> memoryview:
    meta = ChunkMeta(fingerprint=bytes(32), key=bytes(32), spec=spec, tokens=TOKENS)
    buffer = memoryview(bytearray(encoded_bytes_max(codec, spec, TOKENS)))
    return buffer[: encode_chunk(codec, meta, arrays, buffer)]


def _room(spec: KVSpec) -> list[tuple[torch.Tensor, torch.Tensor]]:
    def empty(dim: int) -> torch.Tensor:
        return torch.empty((spec.kv_heads, TOKENS, dim), dtype=torch.bfloat16, device="cuda")

    return [(empty(spec.key_dim), empty(spec.value_dim)) for _ in range(spec.layers)]
