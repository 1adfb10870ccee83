"""The ladder's loops in C++: `encode` and `decode` do what those of `kvstore.codecs.ladder_reference` do, bit for bit.

Where components are channels (no profile, or one without a basis), decoding is one pass: a few blocks at a time go from
entropy-coded bytes to the caller's arrays without leaving the processor's cache. With a basis the components come back
for a matrix product, and the channels go out in a second pass. A product of fp32 numbers is the BLAS library's; here
and in the reference it is the same one on the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from kvstore import _native
from kvstore.codecs.ladder_bank import Bank
from kvstore.codecs.ladder_level import Ints
from kvstore.codecs.ladder_reference import Part
from kvstore.codecs.ladder_segment import BlockSet
from kvstore.errors import ContainerError
from kvstore.outcome import Reason
from kvstore.spec import Bits, DType

Float32 = npt.NDArray[np.float32]


def quantise(numbers: Sequence[Float32], places: npt.NDArray[np.uint32], exact: npt.NDArray[np.int64]) -> Ints | None:
    """Values at the finest level; see `ladder_reference.quantise`."""
    tokens = len(numbers[0]) if numbers else 0
    finest = np.empty(sum(own.size for own in numbers), dtype=np.int16)
    marks = np.zeros(tokens, dtype=np.uint8)
    marks[exact] = 1
    return finest if _native.ladder_quantise(finest, numbers, places, marks) else None


def encode(blocks: BlockSet, finest: Ints, bank: Bank) -> list[bytes]:
    """The bytes of every level from its patches on; `finest` (values,) has every block's (tokens, components)."""
    return _native.ladder_encode(*_group(blocks), finest, bank.tables.encode)


def decode(blocks: BlockSet, levels: Sequence[memoryview], bank: Bank, parts: Sequence[Part], dtype: DType) -> None:
    """Fill the targets of every part from some levels, each from its patches on. Raises ContainerError."""
    source = levels, bank.tables.decode, bank.centroids
    group, targets = _group(blocks), _targets(parts, dtype, blocks.tokens)
    steps = np.concatenate([part.transform.steps for part in parts])
    placings = [part.transform.placing for part in parts]
    if None not in placings:
        places = np.concatenate([own.places for own in placings if own is not None])
        gains = np.concatenate([own.gains for own in placings if own is not None])
        means = np.concatenate([part.transform.means.reshape(-1) for part in parts])
        _check(_native.ladder_decode_heads(*targets, *group, steps, places, gains, means, *source))
        return
    widths = [len(own) for own in blocks.classes]
    numbers = np.empty(blocks.tokens * sum(widths), dtype=np.float32)
    present = np.empty(len(widths), dtype=np.uint32)
    _check(_native.ladder_decode_components(numbers, present, *group, steps, *source))
    ends = blocks.first_columns * blocks.tokens
    components = [
        numbers[start:stop].reshape(blocks.tokens, -1)[:, :used]
        for (start, stop), used in zip(pairwise(ends), present.tolist(), strict=True)
    ]
    channels: list[Float32] = []
    for part in parts:
        channels += part.transform.products(components[: len(part.transform.classes)])
        components = components[len(part.transform.classes) :]
    _native.ladder_write_channels(
        *targets, blocks.tokens, channels, [own for part in parts for own in part.transform.means]
    )


def _group(blocks: BlockSet) -> tuple[int, npt.NDArray[np.int8], npt.NDArray[np.uint32]]:
    """Tokens, classes and widths."""
    classes = np.concatenate([np.zeros(0, np.int64), *blocks.classes]).astype(np.int8)
    return blocks.tokens, classes, np.diff(blocks.first_columns).astype(np.uint32)


def _targets(parts: Sequence[Part], dtype: DType, tokens: int) -> tuple[list[Bits], DType, Float32, Float32, int, int]:
    """Arrays, their element type, cosines and sines, and which arrays are rotated."""
    arrays: list[Bits] = []
    cosine, sine, start, stop = np.zeros((tokens, 0), np.float32), np.zeros((tokens, 0), np.float32), 0, 0
    for part in parts:
        if part.rotation is not None:
            cosine, sine = part.rotation.cosine, part.rotation.sine
            start, stop = len(arrays), len(arrays) + len(part.targets)
        arrays += part.targets
    return arrays, dtype, cosine, sine, start, stop


def _check(wrong: str) -> None:
    if wrong:
        raise ContainerError(Reason.MALFORMED, wrong)
