"""The bytes of a ladder segment: one level of one layer group.

A raw group has its K and V as they are at level 0 (the bytes of codec `raw`) and nothing at the other levels. A coded
one:

    level 0 only   exact tokens, then without a profile, the scales of K and of V
    patches        count u32 | column u32 each | token u16 each | value i16 each
    tiles          bytes of every block's R32 tile, u32 each
    packed         the packed digits of every block, one block behind the other
    streams        the R32 tiles, one behind the other

Blocks are K's, then V's; columns count components over all blocks of the group. A patch replaces a first value or one
of an absent component.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from kvstore.codecs.cursor import Cursor
from kvstore.codecs.ladder_bank import Bank
from kvstore.codecs.ladder_classes import LEVELS, SHIFT_MAX
from kvstore.codecs.ladder_level import (
    VALUE_MAX,
    Bytes,
    Coded,
    Ids,
    Ints,
    LevelPlan,
    code_level,
    ids_of,
    level_plan,
    read_level,
)
from kvstore.codecs.r32 import Layout, coder
from kvstore.codecs.r32.layout import LANES
from kvstore.errors import ContainerError
from kvstore.outcome import Reason

RAW, CODED = 0, 1
FLAG_UNROTATED = 1
"""K (with latent attention the rotary slice) was coded without its rotary embedding."""

STEP_MIN, STEP_MAX = 2.0**-110, 2.0**80
"""Steps beyond these could take decoded numbers out of fp32's range; no encoder writes them."""

_PARAMS = struct.Struct("<BBbBfQ")
_LANE_SYMBOLS_MIN = 1024


class Params(msgspec.Struct, frozen=True):
    """A segment's encoding parameters: the same 16 bytes at every level of a group.

    Kind (raw or coded), flags, by how many classes the base step was moved, the base step where a profile sets it (else
    0), and the position of the first token when it was encoded.
    """

    kind: int
    flags: int = 0
    shift: int = 0
    step: float = 0.0
    first_position: int = 0

    def pack(self) -> bytes:
        """The 16 bytes."""
        return _PARAMS.pack(self.kind, self.flags, self.shift, 0, self.step, self.first_position)

    @classmethod
    def parse(cls, data: bytes) -> Params:
        """Undo `pack`. Raises ContainerError on what no encoder writes."""
        kind, flags, shift, zero, step, first_position = _PARAMS.unpack(data)
        sized = step == 0 or STEP_MIN <= step <= STEP_MAX
        known = kind in (RAW, CODED) and not flags & ~FLAG_UNROTATED and not zero
        if not known or not sized or abs(shift) > SHIFT_MAX or first_position >= 1 << 63:
            raise ContainerError(Reason.UNKNOWN_CODEC, "ladder segment with unknown encoding parameters")
        return cls(kind, flags, shift, step, first_position)


class Numbers(Cursor):
    """A cursor that also takes numbers wider than a byte."""

    def numbers(self, count: int, dtype: str) -> npt.NDArray[Any]:
        """A copy of the next `count` numbers, aligned. Raises ContainerError if there are fewer."""
        return np.frombuffer(self.take(np.dtype(dtype).itemsize * count).tobytes(), dtype=dtype)

    def rest(self) -> Bytes:
        """All that is left."""
        return self.take(len(self._flat) - self._at)


class BlockSet:
    """The blocks of a layer group: their classes, and where their columns and tiles are."""

    def __init__(self, classes: Sequence[npt.NDArray[np.int64]], tokens: int) -> None:
        self.classes = classes
        self.tokens = tokens
        self.first_columns = np.cumsum([0, *(len(own) for own in classes)])

    def plans(self, level: int) -> list[LevelPlan]:
        """Every block's plan at a level."""
        return [level_plan(own, level, self.tokens) for own in self.classes]


def write_level(
    blocks: BlockSet, level: int, values: Sequence[Ints], parents: Sequence[Ints | None], bank: Bank
) -> tuple[list[Bytes], list[Ints]]:
    """The parts of a segment from its patches on, and what a decoder then sees of every block.

    `values` are those of every block at this level, `parents` what was seen at the level below.
    """
    coded = [
        code_level(plan, own, above, bank)
        for plan, own, above in zip(blocks.plans(level), values, parents, strict=True)
    ]
    layout = _layout([one.ids for one in coded])
    stream = np.empty(layout.bytes_max, dtype=np.uint8)
    symbols = np.concatenate([np.zeros(0, np.uint8), *(one.symbols for one in coded)])
    lengths = coder.encode(stream, symbols, layout, bank.tables)
    parts = [
        *_patch_bytes(blocks, coded),
        lengths.astype("<u4").view(np.uint8),
        *(one.packed for one in coded),
        stream[: int(lengths.sum(dtype=np.int64))],
    ]
    return parts, [one.seen for one in coded]


class OpenedLevel(NamedTuple):
    """A level taken apart: every block's plan, patches by block, bytes of the tiles, packed digits and the tiles."""

    plans: list[LevelPlan]
    patches: Patched
    lengths: npt.NDArray[np.uint32]
    packed: list[Bytes]
    stream: Bytes


def open_level(blocks: BlockSet, level: int, cursor: Numbers) -> OpenedLevel:
    """What a level has. Raises ContainerError on anything that `write_level` never writes, but for what tiles say."""
    plans = blocks.plans(level)
    patches = _read_patches(blocks, level, plans, cursor)
    lengths = cursor.numbers(len(plans), "<u4").astype(np.uint32)
    packed = [cursor.take(plan.packed_bytes) for plan in plans]
    stream = cursor.rest()
    if int(lengths.sum(dtype=np.int64)) != len(stream):
        raise ContainerError(Reason.MALFORMED, "the tiles of a ladder segment do not add up to its bytes")
    return OpenedLevel(plans, patches, lengths, packed, stream)


def read_segment_level(
    blocks: BlockSet, level: int, parents: Sequence[Ints | None], cursor: Numbers, bank: Bank
) -> list[Ints]:
    """The values of every block at a level; undoes `write_level`. Raises ContainerError on anything it never writes."""
    plans, patches, lengths, packed, stream = open_level(blocks, level, cursor)
    layout = _layout([ids_of(plan, above) for plan, above in zip(plans, parents, strict=True)])
    symbols = np.zeros(layout.symbols, dtype=np.uint8)
    if not coder.decode(symbols, stream, lengths, layout, bank.tables).all():
        raise ContainerError(Reason.MALFORMED, "a tile of a ladder segment does not decode")
    out, end = [], 0
    for index, (plan, above) in enumerate(zip(plans, parents, strict=True)):
        own = read_level(plan, symbols[end : end + plan.symbols], packed[index], above)
        end += plan.symbols
        mine = patches.blocks == index
        own[patches.tokens[mine], patches.components[mine]] = patches.values[mine]
        out.append(own)
    return out


def lanes_of(symbols: int, tiles: int) -> int:
    """Lanes of the tiles of a level: as many as so many symbols are worth."""
    return max(lanes for lanes in LANES if lanes * _LANE_SYMBOLS_MIN <= symbols // max(1, tiles) or lanes == LANES[0])


def _layout(ids: Sequence[Ids]) -> Layout:
    """A batch of one tile a block."""
    counts = np.array([len(own) for own in ids], dtype=np.uint32)
    lanes = lanes_of(int(counts.sum(dtype=np.int64)), len(counts))
    steps = max(1, -(-int(counts.max(initial=0)) // lanes))
    table = np.zeros((len(ids), steps * lanes), dtype=np.uint16)
    for row, own in zip(table, ids, strict=True):
        row[: len(own)] = own
    return Layout(counts, table.reshape(len(ids), steps, lanes), lanes)


def _patch_bytes(blocks: BlockSet, coded: Sequence[Coded]) -> list[Bytes]:
    tokens = np.concatenate([one.patches[0] for one in coded])
    pairs = zip(blocks.first_columns[:-1], coded, strict=True)
    columns = np.concatenate([first + one.patches[1] for first, one in pairs])
    values = np.concatenate([one.patches[2] for one in coded])
    fields = ((np.array([len(tokens)]), "<u4"), (columns, "<u4"), (tokens, "<u2"), (values, "<i2"))
    return [field.astype(dtype).view(np.uint8) for field, dtype in fields]


class Patched(NamedTuple):
    """Values that stand apart from their tile, in the order of the bytes: the last one of a place counts."""

    blocks: npt.NDArray[np.int64]
    components: npt.NDArray[np.int64]
    tokens: npt.NDArray[np.int64]
    values: npt.NDArray[np.int16]


def _read_patches(blocks: BlockSet, level: int, plans: Sequence[LevelPlan], cursor: Numbers) -> Patched:
    count = int(cursor.numbers(1, "<u4")[0])
    columns = cursor.numbers(count, "<u4").astype(np.int64)
    tokens = cursor.numbers(count, "<u2").astype(np.int64)
    values = cursor.numbers(count, "<i2").astype(np.int16)
    largest = VALUE_MAX // 3 ** (LEVELS - 1 - level)
    outside = columns >= blocks.first_columns[-1], tokens >= blocks.tokens, values < -largest, values > largest
    if any(bool(wrong.any()) for wrong in outside):
        raise ContainerError(Reason.MALFORMED, "a patch lies outside the chunk or is too large")
    block = np.searchsorted(blocks.first_columns, columns, side="right") - 1
    components = columns - blocks.first_columns[block]
    if (components < np.array([plan.refined for plan in plans], dtype=np.int64)[block]).any():
        raise ContainerError(Reason.MALFORMED, "a patch is for a value that is refined")
    return Patched(block, components, tokens, values)
