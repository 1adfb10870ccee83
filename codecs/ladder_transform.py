"""What the ladder does to K or V before it quantises, and after: centring, scaling, decorrelating, in blocks.

A block is a set of channels that are transformed together: one head of one layer, or all heads of a group of layers.
Its components are counted in base steps, and come in descending order of their class. Two transforms share the
interface:

    ChunkScales    no profile: means, steps and classes of the chunk itself, stored with it; components are channels
    PartProfile    calibrated: everything but the base step is the profile's (codecs/ladder_profile.py)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from kvstore.codecs.ladder_classes import CODES, class_of, code_of, shifted_step
from kvstore.codecs.ladder_segment import STEP_MAX, STEP_MIN, Numbers
from kvstore.errors import ContainerError
from kvstore.outcome import Reason

Float32 = npt.NDArray[np.float32]

BASE_STEP = 2.0
"""Base step in standard deviations of an average channel: 6, 14.5, 24 and 33.4 dB at the four levels."""

MEAN_STEPS = 16
"""Steps of a mean's unit in a base step, before its exponent."""


@dataclass(frozen=True)
class Placing:
    """How components become channels where each is one, for all blocks of a part, one behind the other.

    Component i of a block, times the base step, is channel `places[i]` (u32) of its head, and that channel is
    multiplied by its `gains` (fp32, in channel order) before its mean is added.
    """

    places: npt.NDArray[np.uint32]
    gains: Float32


class Transform(Protocol):
    """K or V of one layer group, x of shape (layers, heads, tokens, dim), to blocks (tokens, components) and back."""

    @property
    def classes(self) -> Sequence[npt.NDArray[np.int64]]:
        """Scale classes of every block's components at level 0, descending."""

    @property
    def steps(self) -> Float32:
        """Every block's base step."""

    @property
    def means(self) -> Float32:
        """What is added to the channels in the end, (layers, heads, dim)."""

    @property
    def placing(self) -> Placing | None:
        """How components become channels; None where a matrix makes them. Blocks are then more than a head, perhaps."""

    def analyse(self, x: Float32) -> list[Float32]:
        """Every block's components in base steps; in the order of channels where they are channels."""

    def products(self, blocks: Sequence[Float32]) -> list[Float32]:
        """Channels less their means, (heads, tokens, dim) a layer, from every block's components times its step.

        Components behind the last one given are 0. A token's channels are consecutive.
        """


class ChunkScales:
    """Means, base steps and stored classes of the heads of a layer group, measured on the chunk.

    `steps` (blocks,) fp32, `exponents` (blocks,) i8 and `means` (blocks, dim) i8 with the unit step * 2**exponent / 16,
    `codes` (blocks, dim) u8, in channel order; a block is one head, in the order layer, head.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        steps: Float32,
        exponents: npt.NDArray[np.int8],
        means: npt.NDArray[np.int8],
        codes: npt.NDArray[np.uint8],
    ) -> None:
        self._shape = shape
        self._exponents = exponents
        self._means = means
        self._codes = codes
        self._order = np.argsort(CODES - codes, axis=1, kind="stable")
        units = np.ldexp(steps * np.float32(1 / MEAN_STEPS), exponents.astype(np.int32))
        self.steps = steps
        self.means = (means.astype(np.float32) * units[:, None]).reshape(*shape, -1)
        self.classes = list(class_of(np.take_along_axis(codes, self._order, axis=1), 0))

    @classmethod
    def measure(cls, x: Float32, exact: npt.NDArray[np.int64], shift: int) -> ChunkScales:
        """Scales of x (layers, heads, tokens, dim) without its exact tokens."""
        layers, heads, tokens, dim = x.shape
        leading = len(exact) == 0 or int(exact[-1]) == len(exact) - 1  # as sinks alone are: then nothing needs copying
        others = x[:, :, len(exact) :] if leading else np.delete(x, exact, axis=2)
        rows = (others if len(exact) < tokens else x[:, :, :1]).reshape(layers * heads, -1, dim)
        mean = rows.mean(axis=1, dtype=np.float64)
        centred = rows - mean.astype(np.float32)[:, None, :]
        variance = np.einsum("btc,btc->bc", centred, centred) / np.float32(max(1, rows.shape[1]))
        deviation = np.sqrt(variance.astype(np.float64))
        largest = np.abs(mean).max(axis=1, initial=0.0)
        average = deviation.mean(axis=1) if dim else np.zeros(len(rows))
        constant = np.where(largest > 0, largest / 64, 1.0)
        wanted = np.where(average > 0, average, constant)
        steps = np.maximum(shifted_step(BASE_STEP, shift) * wanted, 2.0**-100).astype(np.float32)
        units = steps.astype(np.float64) / MEAN_STEPS
        exponents = np.ceil(np.log2(np.maximum(largest / (127 * units), 1.0))).clip(0, 100).astype(np.int8)
        units = np.ldexp(units, exponents.astype(np.int32))[:, None]
        means = np.rint(mean / units).clip(-127, 127).astype(np.int8)
        ratio = np.sqrt(deviation**2 + (mean - means * units) ** 2) / steps[:, None]
        return cls((layers, heads), steps, exponents, means, code_of(ratio))

    def to_bytes(self) -> list[npt.NDArray[np.uint8]]:
        """Steps, exponents, means, then four stored classes to three bytes."""
        return [
            self.steps.astype("<f4").view(np.uint8),
            self._exponents.view(np.uint8),
            self._means.reshape(-1).view(np.uint8),
            _pack_codes(self._codes.reshape(-1)),
        ]

    @classmethod
    def read(cls, cursor: Numbers, layers: int, heads: int, dim: int) -> ChunkScales:
        """Undo `to_bytes`. Raises ContainerError."""
        blocks = layers * heads
        steps = cursor.numbers(blocks, "<f4").astype(np.float32)
        exponents = cursor.numbers(blocks, "i1")
        means = cursor.numbers(blocks * dim, "i1").reshape(blocks, dim)
        packed = cursor.take(-(-blocks * dim * 3 // 4))
        sized = (steps >= STEP_MIN) & (steps <= STEP_MAX) & (exponents >= 0)  # not so for NaN
        if not sized.all() or (np.ldexp(steps.astype(np.float64), exponents.astype(np.int32)) > STEP_MAX).any():
            raise ContainerError(Reason.MALFORMED, "a ladder segment has a step or an exponent out of range")
        return cls((layers, heads), steps, exponents, means, _unpack_codes(packed, blocks * dim).reshape(blocks, dim))

    def analyse(self, x: Float32) -> list[Float32]:
        """Channels less their means, in base steps."""
        scaled = x.reshape(len(self.steps), -1, x.shape[-1]) - self.means.reshape(len(self.steps), 1, -1)
        scaled /= self.steps[:, None, None]
        return list(scaled)

    @property
    def placing(self) -> Placing:
        """Channels in the order of their classes."""
        return Placing(self._order.reshape(-1).astype(np.uint32), np.ones(self._order.size, dtype=np.float32))

    def products(self, blocks: Sequence[Float32]) -> list[Float32]:
        """Channels from the components, which they are."""
        out = np.zeros((len(blocks), len(blocks[0]) if blocks else 0, self._codes.shape[1]), dtype=np.float32)
        for target, block, order in zip(out, blocks, self._order, strict=True):
            target[:, order[: block.shape[1]]] = block
        return list(out.reshape(*self._shape, *out.shape[1:]))


def _pack_codes(codes: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    padded = np.zeros(-(-len(codes) // 4) * 4, dtype=np.uint32)
    padded[: len(codes)] = codes
    a, b, c, d = padded.reshape(-1, 4).T
    words = a | b << 6 | c << 12 | d << 18
    triples = np.stack([words & 0xFF, words >> 8 & 0xFF, words >> 16], axis=1).astype(np.uint8)
    return triples.reshape(-1)[: -(-len(codes) * 3 // 4)]


def _unpack_codes(packed: npt.NDArray[np.uint8], count: int) -> npt.NDArray[np.uint8]:
    padded = np.zeros(-(-count // 4) * 3, dtype=np.uint32)
    padded[: len(packed)] = packed
    a, b, c = padded.reshape(-1, 3).T
    words = a | b << 8 | c << 16
    codes = np.stack([words & 63, words >> 6 & 63, words >> 12 & 63, words >> 18], axis=1)
    return codes.reshape(-1)[:count].astype(np.uint8)
