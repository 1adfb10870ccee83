"""KV to measure codecs on: a seeded generator with what makes real KV hard; `kv_models` has that of real models.

The generator's K has a few channels with a large mean and a few with a large scale, correlation between neighbouring
tokens, a sink at the first token, and the rotary embedding on top; its V is smoother and has no outliers. Both are
mixed from components that all layers share, whose variance falls as (1 + r / 8)^-2, and 5 % noise: then the first 24,
48, 96 principal components of all layers hold about the shares that they hold in the trained test models (0.66-0.85,
0.82-0.95, 0.94-0.98). Queries lean towards the keys they will meet, so that attention is peaked, as it is in models.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvstore.codecs.floats import from_float32, to_float32
from kvstore.codecs.rotary import Rotation
from kvstore.spec import DType, KVArrays, KVSpec, Rope

Float32 = npt.NDArray[np.float32]

CHUNK_TOKENS = 256
QUERY_TOKENS = 64


@dataclass(frozen=True, eq=False)
class SampleChunk:
    """One chunk, where it stands, and queries of later tokens that attend to it.

    `queries` has the shape (layers, query heads, queries, key_dim), after rotary embedding; query heads come in equal
    groups, one a KV head.
    """

    arrays: KVArrays
    first_position: int
    queries: Float32


@dataclass(frozen=True, eq=False)
class Samples:
    """Chunks of one model: those to calibrate with and, of other text, those to measure on."""

    name: str
    spec: KVSpec
    calibration: list[SampleChunk]
    chunks: list[SampleChunk]

    @property
    def elements(self) -> int:
        """Elements of one chunk."""
        return self.spec.chunk_bytes(self.chunks[0].arrays[0][0].shape[1]) // self.spec.itemsize


def synthetic(*, quick: bool = False, dtype: DType = "bfloat16", seed: int = 0) -> Samples:
    """Samples of the generator: 4 layers of 4 KV heads of 64, or half of it when quick."""
    layers, heads, dim = (2, 2, 64) if quick else (4, 4, 64)
    rope = Rope(kind="default", theta=10000.0, dims=dim)
    spec = KVSpec(layers=layers, kv_heads=heads, key_dim=dim, value_dim=dim, dtype=dtype, rope=rope)
    generator = _Generator(spec, seed)
    calibration = [generator.chunk(position) for position in [0, CHUNK_TOKENS] * (4 if quick else 8)]
    return Samples("synthetic", spec, calibration, [generator.chunk(position) for position in (0, CHUNK_TOKENS)])


class _Generator:
    """A model that never was: fixed means, scales and mixing, then as many chunks as are asked for."""

    RANK = 256
    KNEE = 8
    NOISE_SHARE = 0.05
    CORRELATION = 0.25
    SINK = 6.0

    def __init__(self, spec: KVSpec, seed: int) -> None:
        self._random = np.random.default_rng(seed)
        self._spec = spec
        shape = (spec.layers, spec.kv_heads, 1, spec.key_dim)
        rare = self._random.random((2, *shape)) < 0.05
        self._mean = self._normal(shape) * np.where(rare[0], 8.0, 0.3)
        self._scale = [
            np.exp(0.5 * self._normal(shape)) * np.where(rare[1], 5.0, 1.0),
            np.exp(0.3 * self._normal(shape)),
        ]
        variances = (1 + np.arange(self.RANK) / self.KNEE) ** -2.0
        strengths = np.sqrt((1 - self.NOISE_SHARE) * variances / variances.sum()).astype(np.float32)
        self._mixing = [strengths.reshape(-1, *[1] * 4) * self._normal((self.RANK, *shape)) for _ in range(2)]

    def chunk(self, first_position: int) -> SampleChunk:
        """The next chunk. A chunk at position 0 starts with a sink."""
        tokens = CHUNK_TOKENS
        keys, values = (self._part(part, tokens) for part in range(2))
        keys += self._mean
        values *= 0.5
        if first_position == 0:
            keys[:, :, 0] *= self.SINK
            values[:, :, 0] *= 0.1
        queries = self._queries(keys)
        Rotation(self._spec.rope, first_position + np.arange(tokens)).apply(keys)
        behind = first_position + tokens + np.arange(QUERY_TOKENS)
        Rotation(self._spec.rope, behind).apply(queries)
        dtype = self._spec.dtype
        arrays = [
            (from_float32(np.ascontiguousarray(k), dtype), from_float32(np.ascontiguousarray(v), dtype))
            for k, v in zip(keys, values, strict=True)
        ]
        return SampleChunk(arrays, first_position, queries)

    def _part(self, part: int, tokens: int) -> Float32:
        """(layers, heads, tokens, dim) of components that layers share, each token leaning on the one before it."""
        shared = self._normal((tokens, self.RANK))
        low_rank = np.einsum("tr,rlhod->lhtd", shared, self._mixing[part], optimize=True)
        own = self._normal(low_rank.shape)
        mixed = low_rank + self.NOISE_SHARE**0.5 * own
        for token in range(1, tokens):
            mixed[:, :, token] += self.CORRELATION * mixed[:, :, token - 1]
        out: Float32 = (mixed * self._scale[part]).astype(np.float32)
        return out

    def _queries(self, keys: Float32) -> Float32:
        """Queries (layers, 2 * heads, QUERY_TOKENS, dim), each near the direction of a key it looks for."""
        layers, heads, tokens, dim = keys.shape
        wanted = self._random.integers(0, tokens, 2 * QUERY_TOKENS)
        centred = keys - keys.mean(axis=2, keepdims=True)
        direction = centred[:, :, wanted] / (np.square(centred).mean(axis=(2, 3), keepdims=True) + 1e-6)
        queries = 1.0 / dim**0.5 * direction + self._normal(direction.shape)
        both = queries.reshape(layers, heads, 2, QUERY_TOKENS, dim)
        flat: Float32 = both.reshape(layers, 2 * heads, QUERY_TOKENS, dim).astype(np.float32)
        return flat

    def _normal(self, shape: tuple[int, ...]) -> Float32:
        return self._random.standard_normal(shape, dtype=np.float32)


def float_parts(arrays: KVArrays, spec: KVSpec) -> tuple[Float32, Float32]:
    """K and V as numbers, each (layers, heads, tokens, dim)."""
    keys, values = (np.stack([to_float32(pair[part], spec.dtype) for pair in arrays]) for part in range(2))
    return keys, values
