"""CacheGen's tensors of one part, K or V, of some layers: anchors and deltas as small integers, and back.

Tokens go in groups of ten. The first of a group is its anchor, kept at 8 bits with a scale a token and head; the others
are differences from the decoded anchor, all from the same one, in bins of one width a layer. So the groups can be
decoded in parallel, and nothing drifts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

GROUP_TOKENS = 10
ANCHOR_MAX = 127

Float32 = npt.NDArray[np.float32]
Int32 = npt.NDArray[np.int32]
Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Shape:
    """Sizes of one part of a layer group; a tile is one head of one layer."""

    layers: int
    heads: int
    tokens: int
    dim: int

    @property
    def tiles(self) -> int:
        """Heads of all layers."""
        return self.layers * self.heads

    @property
    def groups(self) -> int:
        """Anchors of a tile."""
        return -(-self.tokens // GROUP_TOKENS)

    @property
    def deltas(self) -> int:
        """Tokens of a tile that are no anchors."""
        return self.tokens - self.groups


@dataclass(frozen=True)
class Anchors:
    """Anchor tokens: `values` (tiles, groups, dim) in -127..127, `scales` (tiles, groups) as bfloat16 patterns."""

    values: Int32
    scales: npt.NDArray[np.uint16]

    def numbers(self) -> Float32:
        """What the integers stand for, (tiles, groups, dim)."""
        scale = (self.scales.astype(np.uint32) << np.uint32(16)).view(np.float32)
        numbers: Float32 = self.values.astype(np.float32) * scale[..., None]
        return numbers


def quantise_anchors(values: Float32) -> Anchors:
    """Anchors of (tiles, tokens, dim) finite values: the largest of each token and head becomes 127.

    Error at most half a scale, which is at most 1/126 of the largest.
    """
    anchors = values[:, ::GROUP_TOKENS]
    largest = np.abs(anchors).max(axis=2, initial=0.0) / np.float32(ANCHOR_MAX)
    patterns = np.ascontiguousarray(largest, dtype=np.float32).view(np.uint32)
    scales = (patterns + np.uint32(0xFFFF) >> np.uint32(16)).astype(np.uint16)  # rounded up, so that nothing clips
    scale = (scales.astype(np.uint32) << np.uint32(16)).view(np.float32)
    divisor = np.where(scale > 0, scale, np.float32(1.0))
    return Anchors(np.rint(anchors / divisor[..., None]).astype(np.int32), scales)


def deltas_of(values: Float32, anchors: Anchors) -> Float32:
    """Differences (tiles, deltas, dim) of the other tokens from their group's decoded anchor."""
    tokens = values.shape[1]
    other = np.arange(tokens) % GROUP_TOKENS != 0
    return values[:, other] - anchors.numbers()[:, np.flatnonzero(other) // GROUP_TOKENS]


def rebuild(shape: Shape, anchors: Anchors, deltas: Float32) -> Float32:
    """Values (tiles, tokens, dim) from anchors and differences."""
    out = np.empty((shape.tiles, shape.tokens, shape.dim), dtype=np.float32)
    numbers = anchors.numbers()
    out[:, ::GROUP_TOKENS] = numbers
    other = np.flatnonzero(np.arange(shape.tokens) % GROUP_TOKENS)
    out[:, other] = numbers[:, other // GROUP_TOKENS] + deltas
    return out
