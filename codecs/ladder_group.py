"""One layer group of the ladder: from K and V to the bytes of its four levels, and back from any number of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvstore import kernels
from kvstore.codecs import ladder_loops
from kvstore.codecs.floats import from_float32, to_float32
from kvstore.codecs.ladder_bank import Bank
from kvstore.codecs.ladder_classes import LEVELS, shifted_step
from kvstore.codecs.ladder_level import Ints
from kvstore.codecs.ladder_profile import LadderProfile, PartProfile
from kvstore.codecs.ladder_reference import Part
from kvstore.codecs.ladder_segment import (
    CODED,
    FLAG_UNROTATED,
    RAW,
    BlockSet,
    Numbers,
    Params,
)
from kvstore.codecs.ladder_transform import BASE_STEP, ChunkScales, Transform
from kvstore.codecs.rotary import Rotation, rotated_part
from kvstore.errors import CodecError, ContainerError
from kvstore.outcome import Reason
from kvstore.spec import Bits, KVArrays, KVSpec

Float32 = npt.NDArray[np.float32]
Tokens = npt.NDArray[np.int64]

SINKS = 4
"""Tokens at the start of a sequence that are kept exactly: attention sinks, whose K and V are unlike all others."""

OUTLIER_ENERGY = 16.0
"""A token with this many times the median energy is kept exactly, if there are few of them."""

OUTLIER_SHARE = 0.01
TOKENS_MIN = 8
"""Shorter chunks have no statistics of their own: without a profile they are stored raw."""

MAGNITUDE_MAX = 2.0**50
MAGNITUDE_MIN = 2.0**-50
"""Groups whose largest number is beyond these, so that fp32 cannot sum squares, are stored raw."""

RAW_SHARE = 0.95
"""A group that does not get smaller than this share of its raw bytes is stored raw."""


def group_arrays(arrays: KVArrays, layers: tuple[int, int]) -> list[Bits]:
    """K and V of the layers of a group, in canonical order."""
    return [array for pair in arrays[slice(*layers)] for array in pair]


@dataclass(frozen=True)
class OpenedGroup:
    """A coded layer group taken apart: what its components are, and what becomes of them.

    `levels` are each from its patches on. `parts` says for each transform and rotation whether it is of K (0) or V (1);
    `exact` has (part, tokens, their bits (layers, heads, tokens, dim)).
    """

    blocks: BlockSet
    levels: list[memoryview]
    parts: list[int]
    transforms: list[Transform]
    rotations: list[Rotation | None]
    exact: list[tuple[int, Tokens, Bits]]


class GroupCoder:
    """Codes layers start..stop of chunks of `tokens` tokens, with a profile's tables or none."""

    def __init__(
        self, spec: KVSpec, tokens: int, layers: tuple[int, int], bank: Bank, tables: LadderProfile | None
    ) -> None:
        self._spec = spec
        self._tokens = tokens
        self._layers = layers
        self._bank = bank
        self._tables = tables
        self._parts = [part for part, dim in enumerate((spec.key_dim, spec.value_dim)) if dim]
        self._rotated = rotated_part(spec)

    def encode(
        self, arrays: KVArrays, first_position: int, shift: int, bounds: Sequence[int]
    ) -> tuple[Params, list[bytes]]:
        """Parameters and bytes of every level; kind raw, and no bytes, if that is better or the values need it."""
        raw = Params(RAW, first_position=first_position), [b""] * LEVELS
        values = [self._load(arrays, part) for part in self._parts]
        if self._tables is None and self._tokens < TOKENS_MIN:
            return raw
        if not all(_codable(x) for x in values):
            return raw
        if self._rotated is not None:
            rotated = values[self._parts.index(self._rotated)]
            Rotation.consecutive(self._spec.rope, first_position, self._tokens).undo(rotated)
        sinks = np.arange(min(SINKS, self._tokens) if first_position == 0 else 0)
        step = np.float32(0) if self._tables is None else shifted_step(BASE_STEP, shift)
        transforms, ladders, exact = [], [], []
        for index, x in enumerate(values):
            transform, finest, tokens = self._quantise(index, x, sinks, shift, step)
            if finest is None:
                return raw
            transforms.append(transform)
            ladders.append(finest)
            exact.append(tokens)
        blocks = BlockSet([own for transform in transforms for own in transform.classes], self._tokens)
        out = ladder_loops.encode(blocks, np.concatenate(ladders), self._bank)
        scales = [data for t in transforms if isinstance(t, ChunkScales) for data in t.to_bytes()]
        out[0] = b"".join([*(piece.tobytes() for piece in (*self._exact_bytes(arrays, exact), *scales)), out[0]])
        if any(len(own) > bound for own, bound in zip(out, bounds, strict=True)):
            return raw
        if sum(map(len, out)) > RAW_SHARE * bounds[0]:
            return raw
        flags = FLAG_UNROTATED if self._rotated is not None else 0
        return Params(CODED, flags, shift, float(step), first_position), out

    def decode(
        self, params: Params, levels: Sequence[memoryview], arrays: KVArrays, first_position: int | None
    ) -> None:
        """Fill the group from its lowest levels; `first_position` None leaves it where it was encoded."""
        position = self._position(params, first_position)
        if params.kind == RAW:
            self._decode_raw(params, levels[0], arrays, position)
            return
        group = self.open(params, levels, position)
        layers = arrays[slice(*self._layers)]
        targets = [[pair[part] for pair in layers] for part in self._parts]
        parts = [Part(*own) for own in zip(group.transforms, targets, group.rotations, strict=True)]
        ladder_loops.decode(group.blocks, group.levels, self._bank, parts, self._spec.dtype)
        for part, tokens, bits in group.exact:
            for array, own in zip(layers, bits, strict=True):
                array[part][:, tokens] = own

    def open(self, params: Params, levels: Sequence[memoryview], first_position: int | None) -> OpenedGroup:
        """What the levels of a coded group hold, for a first token at `first_position` (None: where it was encoded)."""
        position = self._position(params, first_position)
        if bool(params.flags & FLAG_UNROTATED) != (self._rotated is not None):
            raise ContainerError(Reason.MALFORMED, "the segment and the KVSpec disagree about the rotary embedding")
        cursor = Numbers(levels[0])
        exact = self._read_exact(cursor)
        transforms = [self._read_transform(index, params, cursor) for index in range(len(self._parts))]
        blocks = BlockSet([own for transform in transforms for own in transform.classes], self._tokens)
        rotations = [
            Rotation.consecutive(self._spec.rope, position, self._tokens) if part == self._rotated else None
            for part in self._parts
        ]
        if position != params.first_position:
            exact = [
                (part, tokens, self._moved(bits, part, params.first_position, position, tokens))
                for part, tokens, bits in exact
            ]
        return OpenedGroup(blocks, [cursor.rest().data, *levels[1:]], self._parts, transforms, rotations, exact)

    def _position(self, params: Params, first_position: int | None) -> int:
        """Where the first token goes. Raises CodecError if the chunk cannot be moved there."""
        if first_position is None or first_position == params.first_position:
            return params.first_position
        if self._rotated is None and self._spec.rope.kind != "none":
            raise CodecError("the chunk's rope is unknown: it can be reused in place only")
        return first_position

    def _quantise(
        self, index: int, x: Float32, sinks: Tokens, shift: int, step: np.float32
    ) -> tuple[Transform, Ints | None, Tokens]:
        """Transform, finest values of every block and exact tokens; no values if one does not fit a patch."""
        transform: Transform
        if self._tables is None:
            transform = ChunkScales.measure(x, sinks, shift)
        else:
            transform = PartProfile(self._tables.parts[index], self._layers, shift, step)
        numbers = transform.analyse(x)
        exact = np.union1d(sinks, _outliers(numbers, self._tokens))
        if self._tables is None and len(exact) > len(sinks):
            transform = ChunkScales.measure(x, exact, shift)
            numbers = transform.analyse(x)
        places = (
            np.concatenate([np.arange(own.shape[1], dtype=np.uint32) for own in numbers])
            if transform.placing is None
            else transform.placing.places
        )
        return transform, ladder_loops.quantise(numbers, places, exact), exact

    def _read_transform(self, index: int, params: Params, cursor: Numbers) -> Transform:
        if self._tables is not None:
            if params.step <= 0:
                raise ContainerError(Reason.MALFORMED, "a ladder segment of a profile has no step")
            return PartProfile(self._tables.parts[index], self._layers, params.shift, np.float32(params.step))
        dim = (self._spec.key_dim, self._spec.value_dim)[self._parts[index]]
        return ChunkScales.read(cursor, self._layers[1] - self._layers[0], self._spec.kv_heads, dim)

    def _exact_bytes(self, arrays: KVArrays, exact: Sequence[Tokens]) -> list[npt.NDArray[np.uint8]]:
        """Count u16 and tokens u16 of each part, then their elements in the order part, layer, head, token, dim."""
        lists = [np.concatenate([[len(tokens)], tokens]).astype("<u2").view(np.uint8) for tokens in exact]
        bits = [
            np.ascontiguousarray(array[part][:, tokens]).reshape(-1).view(np.uint8)
            for part, tokens in zip(self._parts, exact, strict=True)
            for array in arrays[slice(*self._layers)]
        ]
        return [*lists, *bits]

    def _read_exact(self, cursor: Numbers) -> list[tuple[int, Tokens, Bits]]:
        """(part, tokens, bits (layers, heads, tokens, dim)) of every part."""
        lists = []
        for part in self._parts:
            tokens = cursor.numbers(int(cursor.numbers(1, "<u2")[0]), "<u2").astype(np.int64)
            if len(tokens) and (tokens.max() >= self._tokens or (np.diff(tokens) <= 0).any()):
                raise ContainerError(Reason.MALFORMED, "exact tokens are not tokens of the chunk in order")
            lists.append((part, tokens))
        out = []
        for part, tokens in lists:
            dim = (self._spec.key_dim, self._spec.value_dim)[part]
            shape = (self._layers[1] - self._layers[0], self._spec.kv_heads, len(tokens), dim)
            bits = cursor.numbers(int(np.prod(shape)), self._spec.bit_dtype.newbyteorder("<").str)
            out.append((part, tokens, bits.astype(self._spec.bit_dtype).reshape(shape)))
        return out

    def _decode_raw(self, params: Params, data: memoryview, arrays: KVArrays, position: int) -> None:
        group = group_arrays(arrays, self._layers)
        expected = sum(array.nbytes for array in group)
        if len(data) != expected:
            raise ContainerError(Reason.MALFORMED, f"a raw ladder group has {len(data)} bytes instead of {expected}")
        kernels.scatter_xxh3(group, data)
        if position != params.first_position and self._rotated is not None:
            tokens = np.arange(self._tokens)
            for pair in arrays[slice(*self._layers)]:
                target = pair[self._rotated]
                target[...] = self._moved(target, self._rotated, params.first_position, position, tokens)

    def _moved(self, bits: Bits, part: int, old: int, new: int, tokens: Tokens) -> Bits:
        """Bits of some tokens (..., tokens, dim) as they would be with the first token elsewhere."""
        if part != self._rotated or not len(tokens):
            return bits
        values = to_float32(bits, self._spec.dtype)
        everything = np.zeros((*values.shape[:-2], self._tokens, values.shape[-1]), dtype=np.float32)
        everything[..., tokens, :] = values
        Rotation.consecutive(self._spec.rope, old, self._tokens).undo(everything)
        Rotation.consecutive(self._spec.rope, new, self._tokens).apply(everything)
        finite = np.isfinite(values)
        return np.where(finite, from_float32(everything[..., tokens, :], self._spec.dtype), bits)

    def _load(self, arrays: KVArrays, part: int) -> Float32:
        """(layers, heads, tokens, dim) fp32 of K or V."""
        return np.stack([to_float32(pair[part], self._spec.dtype) for pair in arrays[slice(*self._layers)]])


def _codable(x: Float32) -> bool:
    """Whether all numbers are finite and of a magnitude that can be coded, or 0."""
    largest = float(np.abs(x).max(initial=0.0))  # NaN if there is one, and then no comparison holds
    return largest == 0 or MAGNITUDE_MIN < largest < MAGNITUDE_MAX


def _outliers(blocks: Sequence[Float32], tokens: int) -> Tokens:
    """Tokens of far more energy than the median of a block, the largest first if there are too many, ascending."""
    most = int(tokens * OUTLIER_SHARE)
    if not most or not blocks:
        return np.zeros(0, dtype=np.int64)
    energy = np.stack([np.einsum("tc,tc->t", own, own) for own in blocks])
    median = np.maximum(np.median(energy, axis=1, keepdims=True), np.finfo(np.float32).tiny)
    excess = (energy / median).max(axis=0)
    largest = np.argsort(-excess, kind="stable")[:most]
    return np.sort(largest[excess[largest] > OUTLIER_ENERGY])
