"""Integers in groups with a lowest value and a step: the arithmetic of `int8` and `int4`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]
Float16 = npt.NDArray[np.float16]
Bytes = npt.NDArray[np.uint8]

_FP16_MAX = 65504.0


@dataclass(frozen=True)
class GroupShape:
    """Sizes of one head: K (index 0) is grouped over `group` tokens, V (1) over `group` channels; the last may be
    shorter."""

    index: int
    tokens: int
    dim: int
    bits: int
    group: int

    @property
    def axis(self) -> int:
        """The axis of (heads, tokens, dim) along which groups run."""
        return 1 if self.index == 0 else 2

    @property
    def runs(self) -> int:
        """Groups along that axis."""
        return -(-(self.tokens if self.index == 0 else self.dim) // self.group)

    @property
    def groups(self) -> int:
        """Groups of a head."""
        return self.runs * (self.dim if self.index == 0 else self.tokens)

    @property
    def row_bytes(self) -> int:
        """Bytes of one token's integers."""
        return self.dim if self.bits == 8 else -(-self.dim // 2)

    @property
    def nbytes(self) -> int:
        """Bytes of a block."""
        return 4 * self.groups + self.tokens * self.row_bytes

    def spread(self, by_group: npt.NDArray[np.float32]) -> Float32:
        """One value a group, repeated for its elements: to (heads, tokens, dim) or (heads, tokens | runs..., dim)."""
        length = self.tokens if self.index == 0 else self.dim
        return np.repeat(by_group, self.group, axis=self.axis).take(range(length), axis=self.axis)

    def folded(self, values: Float32, reduce: np.ufunc) -> Float32:
        """`reduce` over every group: (heads, runs, dim) for K, (heads, tokens, runs) for V."""
        starts = np.arange(0, values.shape[self.axis], self.group)
        out: Float32 = reduce.reduceat(values, starts, axis=self.axis)
        return out


def encode_groups(values: Float32, shape: GroupShape) -> Bytes | None:
    """Blocks (heads, bytes) of finite values (heads, tokens, dim); None where fp16 cannot hold a group's bounds."""
    heads = len(values)
    if not values.size:
        return np.zeros((heads, shape.nbytes), dtype=np.uint8)
    low, high = shape.folded(values, np.minimum), shape.folded(values, np.maximum)
    levels = np.float32((1 << shape.bits) - 1)
    if max(float(np.abs(low).max()), float(np.abs(high).max())) > _FP16_MAX / 2:
        return None
    lowest = _rounded(low, down=True)
    step = _rounded((high - lowest.astype(np.float32)) / levels, down=False)
    divisor = np.where(step > 0, step, np.float16(1.0)).astype(np.float32)
    scaled = (values - shape.spread(lowest.astype(np.float32))) / shape.spread(divisor)
    integers = np.clip(np.rint(scaled), 0, levels).astype(np.uint8)
    return np.concatenate(
        [
            *(np.ascontiguousarray(bound, dtype="<f2").reshape(heads, -1).view(np.uint8) for bound in (lowest, step)),
            _pack(integers, shape).reshape(heads, -1),
        ],
        axis=1,
    )


def decode_groups(blocks: Bytes, shape: GroupShape) -> Float32:
    """Undo `encode_groups`."""
    heads, bounds = len(blocks), 2 * shape.groups
    by_group = (heads, shape.runs, shape.dim) if shape.index == 0 else (heads, shape.tokens, shape.runs)
    lowest, step = (
        np.ascontiguousarray(blocks[:, at : at + bounds]).view("<f2").astype(np.float32).reshape(by_group)
        for at in (0, bounds)
    )
    packed = blocks[:, 2 * bounds :].reshape(heads, shape.tokens, shape.row_bytes)
    integers = _unpack(packed, shape).astype(np.float32)
    values: Float32 = shape.spread(lowest) + integers * shape.spread(step)
    return values


def _rounded(values: Float32, *, down: bool) -> Float16:
    """fp16 next to the values, never above them if `down`, else never below."""
    nearest = values.astype(np.float16)
    wrong = nearest.astype(np.float32) > values if down else nearest.astype(np.float32) < values
    return np.where(wrong, np.nextafter(nearest, np.float16(-np.inf if down else np.inf)), nearest).astype(np.float16)


def _pack(integers: Bytes, shape: GroupShape) -> Bytes:
    if shape.bits == 8:
        return integers
    padded = np.zeros((*integers.shape[:2], 2 * shape.row_bytes), dtype=np.uint8)
    padded[..., : shape.dim] = integers
    packed: Bytes = padded[..., 0::2] | padded[..., 1::2] << np.uint8(4)
    return packed


def _unpack(packed: Bytes, shape: GroupShape) -> Bytes:
    if shape.bits == 8:
        return packed
    out = np.empty((*packed.shape[:2], 2 * shape.row_bytes), dtype=np.uint8)
    out[..., 0::2] = packed & np.uint8(15)
    out[..., 1::2] = packed >> np.uint8(4)
    return out[..., : shape.dim]
