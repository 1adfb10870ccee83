"""Rivals of the codecs, written plainly from their papers, with the size of the whole object counted honestly.

KVTC (NVIDIA, ICLR 2026): principal components of all layers' K, and of all layers' V, as one vector a token, the rotary
embedding undone; groups of components with a number of bits each, chosen by dynamic programming; for every token and
group a scale and a shift of 16 bits; DEFLATE over the packed integers. The first four tokens of a prompt stay exact.

TurboQuant (Zandieh et al., 2025), its variant for mean square error: every head's vector is divided by its norm (16
bits), rotated by one random orthogonal matrix, and each coordinate quantised by the Lloyd-Max quantiser of a Gaussian.

Both get the benefit of the doubt: model-wide tables are free, and nothing is added but the header and alignment that
any container has.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvstore.bench.kv_samples import Samples, float_parts
from kvstore.codecs.floats import from_float32
from kvstore.codecs.rotary import Rotation, rotated_part
from kvstore.container import LEVEL0_ALIGN, align, header_size
from kvstore.spec import KVArrays, KVSpec

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]

SINK_TOKENS = 4
GROUP_SIZES = (1, 16, 64, 256, 1024)
GROUP_BITS = (0, 2, 4, 8)
SCALE_BITS = 32
"""Scale and shift of one token's group."""

LLOYD_STEPS = 200


@dataclass(frozen=True, eq=False)
class Result:
    """One chunk through a rival: bytes of the object, and what comes back."""

    nbytes: int
    arrays: KVArrays


def container_overhead(spec: KVSpec) -> int:
    """Bytes of a container with one segment before that segment."""
    return align(header_size(spec, 1), LEVEL0_ALIGN)


class Kvtc:
    """KVTC with a basis fitted to the samples' calibration chunks.

    Args:
        samples: whose calibration chunks to fit.
        bits: target of the integers and scales, bits an element, before DEFLATE.
    """

    def __init__(self, samples: Samples, basis: KvtcBasis, bits: float) -> None:
        self._spec = samples.spec
        self._basis = basis
        self._plans = [_allocate(variance, bits * basis.width(part)) for part, variance in enumerate(basis.variances)]

    def run(self, arrays: KVArrays, first_position: int) -> Result:
        """Encode and decode one chunk."""
        tokens = arrays[0][0].shape[1]
        exact = SINK_TOKENS if first_position == 0 else 0
        vectors = self._basis.vectors(arrays, first_position)
        packed: list[bytes] = []
        decoded: list[Float32] = []
        for part, rows in enumerate(vectors):
            components = (rows - self._basis.means[part]) @ self._basis.bases[part]
            back, pieces = _quantise_groups(components[exact:], self._plans[part])
            packed += pieces
            components[exact:] = back
            values = components @ self._basis.bases[part].T + self._basis.means[part]
            values[:exact] = rows[:exact]
            decoded.append(values.astype(np.float32))
        nbytes = len(zlib.compress(b"".join(packed), 9)) + exact * self._spec.token_bytes
        out = self._basis.arrays(decoded, first_position, tokens)
        for (keys, values_), (own_keys, own_values) in zip(out, arrays, strict=True):
            keys[:, :exact], values_[:, :exact] = own_keys[:, :exact], own_values[:, :exact]
        return Result(nbytes + container_overhead(self._spec), out)


class KvtcBasis:
    """Means and principal components of K and V, all layers and heads together, the best components first."""

    def __init__(self, samples: Samples) -> None:
        self._spec = samples.spec
        rows: list[list[Float32]] = [[], []]
        for chunk in samples.calibration:
            exact = SINK_TOKENS if chunk.first_position == 0 else 0
            for part, own in enumerate(self.vectors(chunk.arrays, chunk.first_position)):
                rows[part].append(own[exact:])
        stacked = [np.concatenate(own) for own in rows]
        self.means = [own.mean(axis=0) for own in stacked]
        self.bases: list[Float32] = []
        self.variances: list[Float64] = []
        for own, mean in zip(stacked, self.means, strict=True):
            centred = (own - mean).astype(np.float64)
            values, vectors = np.linalg.eigh(centred.T @ centred / len(centred))
            self.bases.append(vectors[:, ::-1].astype(np.float32))
            self.variances.append(np.maximum(values[::-1], 0.0))

    def width(self, part: int) -> int:
        """Elements of one token."""
        return len(self.means[part])

    def vectors(self, arrays: KVArrays, first_position: int) -> list[Float32]:
        """K and V as one row a token, rotary embedding undone."""
        out = []
        for part, values in enumerate(float_parts(arrays, self._spec)):
            if part == rotated_part(self._spec):
                self._rotation(first_position, values.shape[2]).undo(values)
            out.append(values.transpose(2, 0, 1, 3).reshape(values.shape[2], -1))
        return out

    def arrays(self, rows: list[Float32], first_position: int, tokens: int) -> KVArrays:
        """Undo `vectors`."""
        spec = self._spec
        parts = []
        for part, own in enumerate(rows):
            values = np.ascontiguousarray(own.reshape(tokens, spec.layers, spec.kv_heads, -1).transpose(1, 2, 0, 3))
            if part == rotated_part(spec):
                self._rotation(first_position, tokens).apply(values)
            parts.append(from_float32(values, spec.dtype))
        return [(keys, values) for keys, values in zip(*parts, strict=True)]

    def _rotation(self, first_position: int, tokens: int) -> Rotation:
        return Rotation(self._spec.rope, first_position + np.arange(tokens))


@dataclass(frozen=True)
class _Group:
    start: int
    size: int
    bits: int


def _allocate(variances: Float64, budget_bits: float) -> list[_Group]:
    """Consecutive groups with the smallest squared error for at most that many bits a token.

    Dynamic programming over the components for a price of bits, the price found by bisection. The error of a group is
    that of a uniform quantiser over the range of its values: components of one group share a range, so unequal
    variances cost.
    """
    low, high = 1e-12, float(variances[0]) * 4 + 1e-9
    best = _groups_for(variances, high)
    for _ in range(40):
        price = math.sqrt(low * high)
        groups = _groups_for(variances, price)
        if sum(_cost_bits(group) for group in groups) > budget_bits:
            low = price
        else:
            high, best = price, groups
    return best


def _groups_for(variances: Float64, price: float) -> list[_Group]:
    count = len(variances)
    cumulative = np.append(0.0, np.cumsum(variances))
    least = np.full(count + 1, np.inf)
    least[0] = 0.0
    choice: list[_Group | None] = [None] * (count + 1)
    for start in range(count):
        if not np.isfinite(least[start]):
            continue
        for size in GROUP_SIZES:
            stop = min(count, start + size)
            tail = float(cumulative[stop] - cumulative[start])
            reach = 2 * math.sqrt(2 * math.log(max(2, stop - start))) * math.sqrt(float(variances[start]))
            for bits in GROUP_BITS:
                group = _Group(start, stop - start, bits)
                step = reach / max(1, (1 << bits) - 1)
                error = tail if bits == 0 else min(tail, (stop - start) * step * step / 12)
                total = least[start] + error + price * _cost_bits(group)
                if total < least[stop]:
                    least[stop], choice[stop] = total, group
    groups: list[_Group] = []
    at = count
    while (chosen := choice[at]) is not None:
        groups.append(chosen)
        at = chosen.start
    return groups[::-1]


def _cost_bits(group: _Group) -> int:
    return 0 if group.bits == 0 else group.size * group.bits + SCALE_BITS


def _quantise_groups(components: Float32, groups: list[_Group]) -> tuple[Float32, list[bytes]]:
    """What comes back, and the bytes of scales, shifts and packed integers."""
    back = np.zeros_like(components)
    pieces = []
    for group in groups:
        if not group.bits or not len(components):
            continue
        own = components[:, group.start : group.start + group.size]
        levels = (1 << group.bits) - 1
        shift = own.min(axis=1, keepdims=True).astype(np.float16)
        spread = own.max(axis=1, keepdims=True) - shift.astype(np.float32)
        scale = (spread / np.float32(levels)).astype(np.float16)
        divisor = np.where(scale > 0, scale, 1).astype(np.float32)
        integers = np.clip(np.rint((own - shift.astype(np.float32)) / divisor), 0, levels).astype(np.uint8)
        back[:, group.start : group.start + group.size] = integers * scale.astype(np.float32) + shift.astype(np.float32)
        pieces += [shift.tobytes(), scale.tobytes(), _pack_bits(integers, group.bits)]
    return back, pieces


def _pack_bits(integers: npt.NDArray[np.uint8], bits: int) -> bytes:
    """Integers of 2, 4 or 8 bits, packed to bytes."""
    per_byte = 8 // bits
    padded = np.append(integers.reshape(-1), np.zeros(-integers.size % per_byte, dtype=np.uint8))
    out = np.zeros(padded.size // per_byte, dtype=np.uint8)
    for at in range(per_byte):
        out |= padded[at::per_byte] << np.uint8(at * bits)
    return out.tobytes()


class Lloyd:
    """Rotated Lloyd-Max with `bits` bits a coordinate and 16 bits a vector."""

    def __init__(self, spec: KVSpec, bits: int, seed: int = 0) -> None:
        self._spec = spec
        self._bits = bits
        self._centroids = _lloyd_max(bits)
        rng = np.random.default_rng(seed)
        self._rotations = [
            np.linalg.qr(rng.normal(size=(dim, dim)))[0].astype(np.float32) for dim in (spec.key_dim, spec.value_dim)
        ]

    def run(self, arrays: KVArrays, first_position: int) -> Result:
        """Encode and decode one chunk."""
        bits_total = 0
        parts = []
        for values, rotation in zip(float_parts(arrays, self._spec), self._rotations, strict=True):
            dim = values.shape[-1]
            norm = np.linalg.norm(values, axis=-1, keepdims=True).astype(np.float16).astype(np.float32)
            unit = values / np.where(norm > 0, norm, np.float32(1.0)) @ rotation * np.float32(math.sqrt(dim))
            edges = (self._centroids[1:] + self._centroids[:-1]) / 2
            chosen = self._centroids[np.searchsorted(edges, unit)].astype(np.float32)
            back = chosen @ rotation.T / np.float32(math.sqrt(dim)) * norm
            bits_total += values.size * self._bits + values.size // dim * 16
            parts.append(from_float32(np.ascontiguousarray(back), self._spec.dtype))
        pairs = [(keys, values) for keys, values in zip(*parts, strict=True)]
        return Result(-(-bits_total // 8) + container_overhead(self._spec), pairs)


def _lloyd_max(bits: int) -> Float64:
    """Centroids of the quantiser with the least squared error on a unit Gaussian."""
    grid = np.linspace(-6, 6, 24001)
    density = np.exp(-grid * grid / 2)
    centroids = np.linspace(-2.5, 2.5, 1 << bits)
    for _ in range(LLOYD_STEPS):
        cell = np.searchsorted((centroids[1:] + centroids[:-1]) / 2, grid)
        mass = np.bincount(cell, density, 1 << bits)
        centroids = np.bincount(cell, density * grid, 1 << bits) / mass
    return centroids
