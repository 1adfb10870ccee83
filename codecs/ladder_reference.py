"""The ladder's loops in plain NumPy: what the C++ kernels must equal, and what runs where they were not built.

`quantise`, `encode` and `decode` stand between the values of a layer group's blocks and the bytes of its levels from
their patches on (codecs/ladder_segment.py), and between components and the elements of the caller's arrays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from kvstore.codecs.floats import from_float32
from kvstore.codecs.ladder_bank import Bank
from kvstore.codecs.ladder_classes import LEVELS, PITCH
from kvstore.codecs.ladder_level import VALUE_MAX, Ints, ladder_values
from kvstore.codecs.ladder_segment import BlockSet, Numbers, read_segment_level, write_level
from kvstore.codecs.ladder_transform import Transform
from kvstore.codecs.rotary import Rotation
from kvstore.spec import Bits, DType

Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Part:
    """K or V of a layer group, to be decoded: how its components become channels, where these go, and how rotated."""

    transform: Transform
    targets: Sequence[Bits]
    rotation: Rotation | None


def quantise(numbers: Sequence[Float32], places: npt.NDArray[np.uint32], exact: npt.NDArray[np.int64]) -> Ints | None:
    """Values of every block at the finest level, one behind the other; None if one is not finite or too large.

    Args:
        numbers: of every block, (tokens, width) in base steps.
        places: where each component of a block stands in its numbers, for all blocks.
        exact: tokens whose values are 0.
    """
    out, end = [np.zeros(0, dtype=np.int16)], 0
    for own in numbers:
        scaled = np.rint(own * np.float32(3 ** (LEVELS - 1)))
        scaled[exact] = 0
        if not bool(np.all(np.abs(scaled) <= VALUE_MAX)):
            return None
        order = places[end : end + own.shape[1]]
        end += len(order)
        out.append(scaled.astype(np.int16)[:, order].reshape(-1))
    return np.concatenate(out)


def encode(blocks: BlockSet, finest: Ints, bank: Bank) -> list[bytes]:
    """The bytes of every level from its patches on; `finest` (values,) has every block's (tokens, components)."""
    ends = blocks.first_columns * blocks.tokens
    ladders = [ladder_values(finest[start:stop].reshape(blocks.tokens, -1)) for start, stop in pairwise(ends)]
    levels = []
    seen: Sequence[Ints | None] = [None] * len(ladders)
    for level in range(LEVELS):
        parts, seen = write_level(blocks, level, [ladder[level] for ladder in ladders], seen, bank)
        levels.append(b"".join(np.ascontiguousarray(piece).data for piece in parts))
    return levels


def decode(blocks: BlockSet, levels: Sequence[memoryview], bank: Bank, parts: Sequence[Part], dtype: DType) -> None:
    """Fill the targets of every part from some levels, each from its patches on. Raises ContainerError."""
    values: Sequence[Ints | None] = [None] * len(blocks.classes)
    for level, data in enumerate(levels):
        values = read_segment_level(blocks, level, values, Numbers(data), bank)
    numbers = [
        _dequantise(own, classes, len(levels) - 1, bank)
        for own, classes in zip(values, blocks.classes, strict=True)
        if own is not None
    ]
    for part in parts:
        transform = part.transform
        own, numbers = numbers[: len(transform.classes)], numbers[len(transform.classes) :]
        x = np.stack(transform.products([block * step for block, step in zip(own, transform.steps, strict=True)]))
        x += transform.means[:, :, None, :]
        if part.rotation is not None:
            part.rotation.apply(x)
        for channels, target in zip(x, part.targets, strict=True):
            target[...] = from_float32(channels, dtype)


def _dequantise(values: Ints, classes: npt.NDArray[np.int64], level: int, bank: Bank) -> Float32:
    """Components in base steps: the centroid of each value's bin; the last ones are left out if they are absent."""
    scale = classes + PITCH * level
    present = int(np.searchsorted(-scale, 0, side="right"))
    if values[:, present:].any():  # patches
        present = len(classes)
    numbers = values[:, :present].astype(np.float32)
    known = np.maximum(scale[:present], 0)
    numbers -= np.sign(numbers) * np.where(scale[:present] < 0, np.float32(0), bank.centroids[known])
    numbers *= np.float32(1 / 3**level)
    return numbers
