"""Rotary position embedding (Su et al. 2021) undone and done again, so that K can be coded, and moved, without it.

Dimension i of the first half of the rotated dimensions pairs with dimension i of the second half, as in every model
whose KVSpec names a rope. The angle of a token is fp32(position) * fp32(inverse frequency), rounded to fp32 as
engines compute it; its cosine and sine are taken in float64, multiplied by the attention factor of the rope (yarn),
and rounded to fp32. Undoing divides by the square of that factor. With latent attention the rotary slice stands in
V's place, and it is what rotates.
"""

from __future__ import annotations

import functools
import math

import msgspec
import numpy as np
import numpy.typing as npt

from kvstore.decoding import decode_json
from kvstore.spec import KVSpec, Rope

Float32 = npt.NDArray[np.float32]


def rotated_part(spec: KVSpec) -> int | None:
    """Which array of a layer is rotated in a way that can be undone: 0 for K, 1 for V, None for neither."""
    part = 1 if spec.attention == "mla" else 0
    dim = (spec.key_dim, spec.value_dim)[part]
    rope = spec.rope
    if rope.kind in ("none", "unknown") or rope.theta <= 1 or rope.dims > dim or rope.dims % 2 or rope.dims == 0:
        return None
    return part if _inverse_frequencies(_key(rope)) is not None else None


class Rotation:
    """The rotation of tokens at these positions: `cosine` and `sine` (tokens, half) fp32.

    Args:
        rope: of a spec for which `rotated_part` is not None.
        positions: of the tokens, (tokens,).
    """

    def __init__(self, rope: Rope, positions: npt.NDArray[np.int64]) -> None:
        frequencies = _inverse_frequencies(_key(rope))
        if frequencies is None:
            raise ValueError(f"rope {rope.kind!r} cannot be undone; see rotated_part")
        angles = (positions.astype(np.float32)[:, None] * frequencies).astype(np.float64)
        factor = attention_factor(rope)
        self.half = len(frequencies)
        self.factor = factor
        self.cosine = (np.cos(angles) * factor).astype(np.float32)
        self.sine = (np.sin(angles) * factor).astype(np.float32)

    @classmethod
    def consecutive(cls, rope: Rope, first_position: int, tokens: int) -> Rotation:
        """The rotation of `tokens` tokens, the first at `first_position`; a chunk's layer groups share one."""
        return _consecutive(msgspec.json.encode(rope), first_position, tokens)

    def apply(self, values: Float32) -> None:
        """Rotate in place; (..., tokens, dim) fp32."""
        self._turn(values, self.cosine, self.sine)

    def undo(self, values: Float32) -> None:
        """Rotate back in place; (..., tokens, dim) fp32."""
        scale = np.float32(1 / (self.factor * self.factor))
        self._turn(values, self.cosine * scale, -self.sine * scale)

    def _turn(self, values: Float32, cosine: Float32, sine: Float32) -> None:
        first, second = values[..., : self.half], values[..., self.half : 2 * self.half]
        turned = first * cosine - second * sine
        second[...] = second * cosine + first * sine
        first[...] = turned


@functools.lru_cache(maxsize=8)
def _consecutive(rope: bytes, first_position: int, tokens: int) -> Rotation:
    """Of a rope as JSON, for a rope with parameters cannot be a key."""
    return Rotation(decode_json(rope, Rope), first_position + np.arange(tokens, dtype=np.int64))


def attention_factor(rope: Rope) -> float:
    """What cosines and sines are multiplied by: 1 but for yarn."""
    if rope.kind != "yarn":
        return 1.0
    given = rope.params.get("attention_factor")
    return given if given is not None else 0.1 * math.log(max(1.0, rope.params.get("factor", 1.0))) + 1.0


def inverse_frequencies(rope: Rope) -> Float32 | None:
    """Radians a position of every pair, (dims / 2,) fp32; None if the rope's kind or its parameters give none."""
    return _inverse_frequencies(_key(rope))


def _key(rope: Rope) -> tuple[str, float, int, tuple[tuple[str, float], ...]]:
    return rope.kind, rope.theta, rope.dims, tuple(sorted(rope.params.items()))


@functools.lru_cache(maxsize=64)
def _inverse_frequencies(key: tuple[str, float, int, tuple[tuple[str, float], ...]]) -> Float32 | None:
    """Radians a position of every pair, (dims / 2,) fp32; None if a parameter that the kind needs is missing."""
    kind, theta, dims, items = key
    params = dict(items)
    plain = 1.0 / theta ** (np.arange(0, dims, 2, dtype=np.float64) / dims)
    if kind == "default":
        return plain.astype(np.float32)
    factor, length = params.get("factor", 0.0), params.get("original_max_position_embeddings", 0.0)
    if factor <= 0 or (kind != "linear" and length <= 0):
        return None
    if kind == "linear":
        return (plain / factor).astype(np.float32)
    if kind == "llama3":
        return _llama3(plain, factor, length, params)
    if kind == "yarn":
        return _yarn(plain, factor, length, theta, params)
    return None


def _llama3(plain: npt.NDArray[np.float64], factor: float, length: float, params: dict[str, float]) -> Float32 | None:
    """Long wavelengths divided by the factor, short ones kept, those between blended (Llama 3.1)."""
    low, high = params.get("low_freq_factor", 0.0), params.get("high_freq_factor", 0.0)
    if not 0 < low < high:
        return None
    turns = length * plain / (2 * math.pi)
    share = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return ((1 - share) * plain / factor + share * plain).astype(np.float32)


def _yarn(
    plain: npt.NDArray[np.float64], factor: float, length: float, theta: float, params: dict[str, float]
) -> Float32:
    """Interpolated below `beta_slow` turns within the original length, kept above `beta_fast` (Peng et al. 2023)."""
    dims = 2 * len(plain)

    def dimension_of(turns: float) -> float:
        return dims * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension_of(params.get("beta_fast", 32.0)), dimension_of(params.get("beta_slow", 1.0))
    if params.get("truncate", 1.0):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dims - 1)
    if low == high:
        high += 0.001
    interpolated = np.clip((np.arange(len(plain)) - low) / (high - low), 0.0, 1.0)
    blended: Float32 = (interpolated * plain / factor + (1 - interpolated) * plain).astype(np.float32)
    return blended
