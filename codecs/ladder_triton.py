"""The ladder's entropy decoding in Triton: from the tiles of a level, and the values of the level below, to its values.

One program decodes the tile of a block, one thread a lane, as in `r32.triton_kernels`. The place of a symbol says which
components and tokens it has, and its table depends on nothing but their own values, so each lane writes what it has
decoded where it belongs. Runs compiled on CUDA, and in Triton's interpreter on the CPU.
"""

# Triton has no types, and its functions are a language of their own.
# mypy: disable-error-code="import-untyped,import-not-found,untyped-decorator,no-untyped-def,no-untyped-call"
from __future__ import annotations

import torch
import triton
import triton.language as tl

from kvstore.codecs.ladder_classes import FIRST_ROWS, PITCH
from kvstore.codecs.r32.triton_kernels import share_out

FIELDS = ("word_start", "word_count", "packed_start", "value_start", "class_start", "width", "packed", "refined")
"""What the kernels are told of a block, i32 each, and then where its first values of each alphabet end."""

RUNS = 3
COLUMNS = len(FIELDS) + RUNS
_FIRST_ROWS = tl.constexpr(FIRST_ROWS)
_PITCH = tl.constexpr(PITCH)
_COLUMNS = tl.constexpr(COLUMNS)
_PART = 1024


@triton.jit
def _raise_values(values, blocks, packed_bytes, tokens, PART: tl.constexpr):  # noqa: N803
    """Values of packed and of absent components, in terms of the next level; the others are the tiles' business."""
    block = blocks + tl.program_id(0) * _COLUMNS
    width = tl.load(block + 5)
    packed = tl.load(block + 6)
    coded = tl.load(block + 10)
    at = tl.program_id(1) * PART + tl.arange(0, PART)
    component = at % tl.maximum(width, 1)
    token = at // tl.maximum(width, 1)
    in_packed = component < packed
    mask = (token < tokens) & (at < tokens * width) & (in_packed | (component >= coded))
    place = values + tl.load(block + 3) + at
    number = token * packed + component
    byte = tl.load(packed_bytes + tl.load(block + 2) + number // 5, mask=mask & in_packed, other=0).to(tl.int32)
    digit = number % 5
    scale = tl.where(digit == 0, 1, tl.where(digit == 1, 3, tl.where(digit == 2, 9, tl.where(digit == 3, 27, 81))))
    value = 3 * tl.load(place, mask=mask, other=0).to(tl.int32) + tl.where(in_packed, byte // scale % 3 - 1, 0)
    tl.store(place, value.to(tl.int16), mask=mask)


@triton.jit
def _of_run(number, pairs_end, wide_end, middle_end, pairs, wide, middle, narrow):
    """What the run has that a symbol is of: pairs of digits, or first values of one of the three alphabets."""
    return tl.where(
        number < pairs_end, pairs, tl.where(number < wide_end, wide, tl.where(number < middle_end, middle, narrow))
    )


@triton.jit
def _digit_table(scale, one, other):
    """The table of the digits of two tokens, by the values that they refine."""
    return _FIRST_ROWS + (scale - _PITCH) // 2 * 9 + tl.minimum(tl.abs(one), 2) * 3 + tl.minimum(tl.abs(other), 2)


@triton.jit
def _read_states(words, end, stored, lane):
    """(the lanes' first states, whether they can be), from the words that a tile begins with."""
    has_state = (lane < stored) & (2 * lane + 1 < end)
    low_half = tl.load(words + 2 * lane, mask=has_state, other=0).to(tl.uint32) & 0xFFFF
    high_half = tl.load(words + 2 * lane + 1, mask=has_state, other=1).to(tl.uint32) & 0xFFFF
    return high_half << 16 | low_half, (tl.min(high_half, 0) > 0) & (end >= 2 * stored)


@triton.jit
def _decode_level(
    values,
    ok,
    words,
    blocks,
    classes,
    tables,
    tokens,
    raised,  # by how many classes this level is above level 0
    LANES: tl.constexpr,  # noqa: N803
    BALLOT: tl.constexpr,  # noqa: N803
):
    tile = tl.program_id(0)
    lane = tl.arange(0, LANES)
    block = blocks + tile * _COLUMNS
    words += tl.load(block)
    end = tl.load(block + 1)
    values += tl.load(block + 3)
    classes += tl.load(block + 4)
    width = tl.load(block + 5)
    packed = tl.load(block + 6)
    refined = tl.load(block + 7)
    wide = tl.load(block + 8)
    middle = tl.load(block + 9)
    coded = tl.load(block + 10)
    pairs_end = (tokens + 1) // 2 * (refined - packed)
    wide_end = pairs_end + tokens * (wide - refined)
    middle_end = wide_end + (tokens + 1) // 2 * (middle - wide)
    count = middle_end + (tokens + 2) // 3 * (coded - middle)
    stored = tl.minimum(count, LANES)
    state, whole = _read_states(words, end, stored, lane)
    position = tl.zeros([LANES], dtype=tl.int32) + 2 * stored
    for step in range((count + LANES - 1) // LANES):
        number = step * LANES + lane
        active = number < count
        in_pairs = number < pairs_end
        start = _of_run(number, pairs_end, wide_end, middle_end, packed, refined, wide, middle)
        stop = _of_run(number, pairs_end, wide_end, middle_end, refined, wide, middle, coded)
        begin = _of_run(number, pairs_end, wide_end, middle_end, 0, pairs_end, wide_end, middle_end)
        span = _of_run(number, pairs_end, wide_end, middle_end, 2, 1, 2, 3)  # tokens of a symbol
        radix = _of_run(number, pairs_end, wide_end, middle_end, 3, 255, 15, 5)
        components = tl.maximum(stop - start, 1)
        token = (number - begin) // components * span
        component = start + (number - begin) % components
        place = values + token * width + component
        has_second = active & (span > 1) & (token + 1 < tokens)
        has_third = active & (span > 2) & (token + 2 < tokens)
        one = tl.load(place, mask=active & in_pairs, other=0).to(tl.int32)
        other = tl.load(place + width, mask=has_second & in_pairs, other=0).to(tl.int32)
        scale = tl.load(classes + component, mask=active, other=0).to(tl.int32) + raised
        table = tl.where(in_pairs, _digit_table(scale, one, other), scale)
        entry = tl.load(tables + table * 4096 + (state & 4095).to(tl.int32), mask=active, other=0).to(
            tl.uint32, bitcast=True
        )
        decoded = (((entry >> 8) & 4095) + 1) * (state >> 12) + (entry >> 20)
        low = active & (decoded < 65536)
        before, taken = share_out(low, lane, LANES, BALLOT)
        at = position + before
        word = tl.load(words + at, mask=low & (at < end), other=0).to(tl.uint32) & 0xFFFF
        position += taken
        state = tl.where(active, tl.where(low, decoded << 16 | word, decoded), state)
        symbol = (entry & 255).to(tl.int32)
        first = symbol % radix - radix // 2
        second = symbol // radix % radix - radix // 2
        third = symbol // (radix * radix) % radix - radix // 2
        tl.store(place, (3 * one + tl.where(one < 0, -first, first)).to(tl.int16), mask=active)
        tl.store(place + width, (3 * other + tl.where(other < 0, -second, second)).to(tl.int16), mask=has_second)
        tl.store(place + 2 * width, third.to(tl.int16), mask=has_third)
    whole = whole & (tl.max((position != end).to(tl.int32), 0) == 0) & (tl.max((state != 65536).to(tl.int32), 0) == 0)
    tl.store(ok + tile, whole.to(tl.uint8))


def raise_values(values: torch.Tensor, blocks: torch.Tensor, packed: torch.Tensor, tokens: int, widest: int) -> None:
    """Bring packed and absent components to the next level, in place.

    Args:
        values: i16 of all blocks, (tokens, components) each. blocks: (blocks, COLUMNS) i32. packed: bytes of packed
        digits of all blocks. widest: most components of a block.
    """
    if len(blocks) and tokens and widest:
        _raise_values[(len(blocks), triton.cdiv(tokens * widest, _PART))](values, blocks, packed, tokens, PART=_PART)


def decode_level(
    values: torch.Tensor,
    blocks: torch.Tensor,
    words: torch.Tensor,
    classes: torch.Tensor,
    tables: torch.Tensor,
    tokens: int,
    raised: int,
    lanes: int,
    *,
    ballot: bool = False,
) -> torch.Tensor:
    """Decode some blocks' tiles of a level into `values`, in place; answers which were whole, (blocks,) u8.

    Args:
        values: as for `raise_values`. blocks: likewise. words: of all tiles, i16. classes: i8 of all blocks at level 0.
        tables: R32 decoder entries of the bank, (tables, 4096) i32.
        raised: by how many classes the level is above level 0. lanes: of the tiles.
        ballot: share out words by a ballot of the warp; CUDA only.
    """
    ok = torch.zeros(len(blocks), dtype=torch.uint8, device=values.device)
    if len(blocks):
        _decode_level[(len(blocks),)](
            values, ok, words, blocks, classes, tables, tokens, raised, LANES=lanes, BALLOT=ballot, num_warps=1
        )
    return ok
