"""Helpers for tests of lossy codecs: chunks as numbers, containers, errors in decibels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from kvstore.chunk import encode_chunk, encoded_bytes_max, group_segments
from kvstore.codec import Codec
from kvstore.codecs.floats import from_float32, to_float32
from kvstore.container import parse
from kvstore.spec import KVArrays, KVSpec
from kvstore.testing.codec import meta_of

Float32 = npt.NDArray[np.float32]


def arrays_of(spec: KVSpec, parts: Sequence[npt.NDArray[Any]] | npt.NDArray[Any]) -> KVArrays:
    """Bits of K and V given as numbers, each (layers, heads, tokens, dim)."""

    def bits(numbers: npt.NDArray[Any]) -> npt.NDArray[np.unsignedinteger]:
        return from_float32(np.ascontiguousarray(numbers, dtype=np.float32), spec.dtype)

    return [(bits(keys), bits(values)) for keys, values in zip(*parts, strict=True)]


def gaussian(spec: KVSpec, tokens: int, seed: int = 0) -> KVArrays:
    """Independent unit Gaussian K and V."""
    random = np.random.default_rng(seed)
    shape = (spec.layers, spec.kv_heads, tokens)
    return arrays_of(spec, [random.normal(size=(*shape, dim)) for dim in (spec.key_dim, spec.value_dim)])


def pack(codec: Codec, spec: KVSpec, arrays: KVArrays, first_position: int = 0) -> bytes:
    """The container of a chunk that starts at a position."""
    tokens = arrays[0][0].shape[1]
    meta = msgspec.structs.replace(meta_of(spec, tokens), first_position=first_position)
    buffer = bytearray(encoded_bytes_max(codec, spec, tokens))
    return bytes(buffer[: encode_chunk(codec, meta, arrays, memoryview(buffer))])


def unpack(codec: Codec, container: bytes, level: int | None = None, **options: Any) -> KVArrays:
    """What a container decodes to, up to a level; `options` are the codec's own."""
    view = memoryview(container)
    header = parse(view)
    spec, tokens = header.meta.spec, header.meta.tokens
    arrays = spec.arrays(bytearray(spec.chunk_bytes(tokens)), tokens)
    for segments in group_segments(header, view, level):
        codec.decode(segments, arrays, spec, **options)
    return arrays


def numbers(spec: KVSpec, arrays: KVArrays) -> Float32:
    """All numbers of a chunk in one row."""
    return np.concatenate([to_float32(array, spec.dtype).ravel() for pair in arrays for array in pair])


def decibels(spec: KVSpec, original: KVArrays, decoded: KVArrays) -> float:
    """Energy of a chunk over that of its error, in dB; very large if there is none."""
    before = numbers(spec, original).astype(np.float64)
    error = before - numbers(spec, decoded)
    return float(10 * np.log10(np.square(before).sum() / max(float(np.square(error).sum()), 1e-12)))
