"""R32 decode and encode in Triton, one program a tile and one thread a lane; bits as in `reference`.

Needs triton and torch (the `triton` extra). On a CUDA device it runs compiled; with TRITON_INTERPRET=1 in the
environment before triton is imported it runs on CPU tensors, slowly, which is how it is tested where there is no GPU.

The words of a step are shared out by a ballot of the warp (`ballot=True`, CUDA only) or by a prefix sum.
"""

# Triton has no types, and its functions are a language of their own.
# mypy: disable-error-code="import-untyped,import-not-found,untyped-decorator,no-untyped-def,no-untyped-call"
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl

from kvstore.codecs.r32.layout import Layout
from kvstore.codecs.r32.tables import TableSet
from kvstore.errors import CodecError


@triton.jit
def share_out(low, lane, LANES: tl.constexpr, BALLOT: tl.constexpr):  # noqa: N803
    """(number of set lanes before each lane, number of all set lanes), both (LANES,)."""
    if BALLOT:
        votes = tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.s32 p, $1, 0; vote.sync.ballot.b32 $0, p, 0xffffffff; }",
            "=r,r",
            [low.to(tl.int32)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
        if LANES < 32:  # fewer lanes are repeated over the warp
            votes = votes & ((1 << LANES) - 1)
        below = votes & ((1 << lane) - 1)
        before = tl.inline_asm_elementwise("popc.b32 $0, $1;", "=r,r", [below], dtype=tl.int32, is_pure=True, pack=1)
        total = tl.inline_asm_elementwise("popc.b32 $0, $1;", "=r,r", [votes], dtype=tl.int32, is_pure=True, pack=1)
    else:
        counted = low.to(tl.int32)
        before = tl.cumsum(counted, 0) - counted
        total = tl.zeros_like(counted) + tl.sum(counted, 0)
    return before, total


@triton.jit
def _decode_tiles(
    symbols,
    ok,
    words,  # all tiles, 16 bits each
    word_starts,
    word_counts,
    symbol_starts,
    counts,
    ids,
    id_tile_stride,
    id_row_stride,
    id_lane_stride,
    period,
    tables,
    LANES: tl.constexpr,  # noqa: N803
    BALLOT: tl.constexpr,  # noqa: N803
):
    tile = tl.program_id(0)
    lane = tl.arange(0, LANES)
    count = tl.load(counts + tile)
    end = tl.load(word_counts + tile)
    words += tl.load(word_starts + tile)
    symbols += tl.load(symbol_starts + tile)
    ids += tile * id_tile_stride + lane * id_lane_stride
    stored = tl.minimum(count, LANES)
    has_state = (lane < stored) & (2 * lane + 1 < end)
    low_half = tl.load(words + 2 * lane, mask=has_state, other=0).to(tl.uint32) & 0xFFFF
    high_half = tl.load(words + 2 * lane + 1, mask=has_state, other=1).to(tl.uint32) & 0xFFFF
    state = high_half << 16 | low_half
    whole = (tl.min(high_half, 0) > 0) & (end >= 2 * stored)
    position = tl.zeros([LANES], dtype=tl.int32) + 2 * stored
    row = 0
    for step in range((count + LANES - 1) // LANES):
        active = step * LANES + lane < count
        table = tl.load(ids + row * id_row_stride, mask=active, other=0).to(tl.int32)
        entry = tl.load(tables + table * 4096 + (state & 4095).to(tl.int32), mask=active, other=0).to(
            tl.uint32, bitcast=True
        )
        high = state >> 12
        decoded = ((entry >> 8) & 4095) * high + high + (entry >> 20)
        low = active & (decoded < 65536)
        before, taken = share_out(low, lane, LANES, BALLOT)
        at = position + before
        word = tl.load(words + at, mask=low & (at < end), other=0).to(tl.uint32) & 0xFFFF
        position += taken
        state = tl.where(active, tl.where(low, decoded << 16 | word, decoded), state)
        tl.store(symbols + step * LANES + lane, (entry & 255).to(tl.uint8), mask=active)
        row = tl.where(row + 1 == period, 0, row + 1)
    whole = whole & (tl.max((position != end).to(tl.int32), 0) == 0) & (tl.max((state != 65536).to(tl.int32), 0) == 0)
    tl.store(ok + tile, whole.to(tl.uint8))


@triton.jit
def _encode_tiles(
    words,  # room for every tile's worst case, 16 bits each
    word_counts,  # -1 if a symbol has no entry
    room_ends,
    symbols,
    symbol_starts,
    counts,
    ids,
    id_tile_stride,
    id_row_stride,
    id_lane_stride,
    period,
    tables,
    LANES: tl.constexpr,  # noqa: N803
    BALLOT: tl.constexpr,  # noqa: N803
):
    tile = tl.program_id(0)
    lane = tl.arange(0, LANES)
    count = tl.load(counts + tile)
    words += tl.load(room_ends + tile)
    symbols += tl.load(symbol_starts + tile)
    ids += tile * id_tile_stride + lane * id_lane_stride
    state = tl.zeros([LANES], dtype=tl.uint32) + 65536
    position = tl.zeros([LANES], dtype=tl.int32)
    missing = tl.zeros([LANES], dtype=tl.int32)
    steps = (count + LANES - 1) // LANES
    for done in range(steps):
        step = steps - 1 - done
        active = step * LANES + lane < count
        table = tl.load(ids + (step % period) * id_row_stride, mask=active, other=0).to(tl.int32)
        symbol = tl.load(symbols + step * LANES + lane, mask=active, other=0).to(tl.int32)
        entry = tl.load(tables + table * 256 + symbol, mask=active, other=0).to(tl.uint64, bitcast=True)
        missing = missing | (active & (entry == 0)).to(tl.int32)
        reciprocal = (entry & 0xFFFFFFFF).to(tl.uint32)
        fields = (entry >> 32).to(tl.uint32)
        frequency_less_1 = fields & 4095
        full = active & ((state >> 20) > frequency_less_1)
        before, emitted = share_out(full, lane, LANES, BALLOT)
        position -= emitted
        tl.store(words + position + before, (state & 0xFFFF).to(tl.int16), mask=full)
        shifted = tl.where(full, state >> 16, state)
        quotient = tl.umulhi(shifted + ((fields >> 16) & 1), reciprocal) >> ((fields >> 12) & 15)
        coded = shifted + quotient * (4095 - frequency_less_1) + (fields >> 20)
        state = tl.where(active, coded, state)
    stored = tl.minimum(count, LANES)
    position -= 2 * stored
    tl.store(words + position + 2 * lane, (state & 0xFFFF).to(tl.int16), mask=lane < stored)
    tl.store(words + position + 2 * lane + 1, (state >> 16).to(tl.int16), mask=lane < stored)
    tl.store(word_counts + tile, tl.where(tl.max(missing, 0) > 0, -1, -tl.min(position, 0)))


@dataclass(frozen=True, eq=False)
class DeviceTables:
    """A `TableSet` on a device, to be kept and used for many calls."""

    decode: torch.Tensor
    encode: torch.Tensor

    @classmethod
    def of(cls, tables: TableSet, device: torch.device | str) -> DeviceTables:
        """The tables, copied to `device`."""
        decode, encode = tables.decode.view(np.int32), tables.encode.view(np.int64)
        return cls(torch.from_numpy(decode.copy()).to(device), torch.from_numpy(encode.copy()).to(device))


def decode(
    stream: torch.Tensor,
    lengths: npt.NDArray[np.uint32],
    layout: Layout,
    tables: DeviceTables,
    *,
    ballot: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(symbols of all tiles (u8), which tiles were whole (bool)), on the device of `stream` (u8).

    Safe for any bytes; the symbols of a tile that is not whole are unspecified.

    Raises:
        CodecError: the stream is not as long as `lengths` (bytes of each tile) say, or a table id is too high.
    """
    if (
        stream.dtype != torch.uint8
        or stream.shape != (int(lengths.sum(dtype=np.int64)),)
        or len(lengths) != layout.tiles
    ):
        raise CodecError("stream must be one axis of as many uint8 as lengths, one a tile, add up to")
    device = stream.device
    odd = lengths % 2 != 0
    if odd.any():  # damaged; the others must begin at whole words nevertheless
        parts = torch.split(stream.cpu(), lengths.tolist())
        stream = torch.cat([part[: len(part) // 2 * 2] for part in parts]).to(device)
    word_counts = lengths.astype(np.int64) // 2
    symbols = torch.empty(layout.symbols, dtype=torch.uint8, device=device)
    ok = torch.zeros(layout.tiles, dtype=torch.uint8, device=device)
    if layout.tiles:
        _decode_tiles[(layout.tiles,)](
            symbols,
            ok,
            stream.view(torch.int16),
            _starts(word_counts, device),
            torch.from_numpy(word_counts.astype(np.int32)).to(device),
            *_described(layout, tables.decode),
            LANES=layout.lanes,
            BALLOT=ballot,
            num_warps=1,
        )
    return symbols, ok.bool() & torch.from_numpy(~odd).to(device)


def encode(
    symbols: torch.Tensor, layout: Layout, tables: DeviceTables, *, ballot: bool = False
) -> tuple[torch.Tensor, npt.NDArray[np.uint32]]:
    """(the tiles one behind the other (u8), bytes of each), on the device of `symbols` (u8).

    Raises:
        CodecError: the symbols are not as many as the layout says, or one has no frequency in its table.
    """
    if symbols.dtype != torch.uint8 or symbols.shape != (layout.symbols,):
        raise CodecError(f"symbols must be one axis of {layout.symbols} uint8 (layout.symbols)")
    device = symbols.device
    room = 2 * layout.stored + layout.counts
    ends = np.cumsum(room)
    words = torch.empty(int(room.sum()), dtype=torch.int16, device=device)
    counts = torch.zeros(layout.tiles, dtype=torch.int32, device=device)
    if layout.tiles:
        _encode_tiles[(layout.tiles,)](
            words,
            counts,
            torch.from_numpy(ends).to(device),
            symbols,
            *_described(layout, tables.encode),
            LANES=layout.lanes,
            BALLOT=ballot,
            num_warps=1,
        )
    used = counts.cpu().numpy()
    if (used < 0).any():
        raise CodecError("a symbol has no frequency in its table")
    parts = [words[end - count : end] for end, count in zip(ends.tolist(), used.tolist(), strict=True)]
    return torch.cat(parts or [words]).view(torch.uint8), (2 * used).astype(np.uint32)


def _described(layout: Layout, tables: torch.Tensor) -> tuple[Any, ...]:
    """The kernels' arguments about symbols and tables."""
    if layout.ids.size and int(layout.ids.max()) >= len(tables):
        raise CodecError(f"table id {layout.ids.max()} of {len(tables)} tables")
    device = tables.device
    tiles, period, lanes = layout.ids.shape
    ids = torch.from_numpy(np.ascontiguousarray(layout.ids).view(np.int16)).to(device)
    return (
        _starts(layout.counts.astype(np.int64), device),
        torch.from_numpy(layout.counts.astype(np.int32)).to(device),
        ids,
        period * lanes if tiles > 1 else 0,
        lanes,
        1 if lanes > 1 else 0,
        period,
        tables,
    )


def _starts(sizes: npt.NDArray[np.int64], device: torch.device) -> torch.Tensor:
    """Where each of consecutive runs begins."""
    return torch.from_numpy(np.cumsum(sizes) - sizes).to(device)
