"""Gather and scatter of blocks in Triton: one program a piece of a block, eight bytes a step and lane.

Needs triton (the `triton` extra). On CUDA tensors it runs compiled; with TRITON_INTERPRET=1 in the environment before
triton is imported it runs on CPU tensors, which is how it is tested where there is no GPU.
"""

# Triton has no types, and its functions are a language of their own.
# mypy: disable-error-code="import-untyped,import-not-found,untyped-decorator,no-untyped-def,no-untyped-call"
from __future__ import annotations

import torch
import triton
import triton.language as tl

WORD_BYTES = 8
PIECE_WORDS = 2048
"""Words that one program moves: 16 KiB, enough that its start costs nothing, and many programs even for one chunk."""


@triton.jit
def _move_blocks(
    target,
    source,
    numbers,
    block_words,
    GATHER: tl.constexpr,  # noqa: N803
    PIECE: tl.constexpr,  # noqa: N803
):
    """Move piece `program_id(1)` of block `program_id(0)`, between its place in a run and its place in the pool."""
    place = tl.program_id(0).to(tl.int64) * block_words
    in_pool = tl.load(numbers + tl.program_id(0)).to(tl.int64) * block_words
    word = tl.program_id(1) * PIECE + tl.arange(0, PIECE)
    inside = word < block_words
    if GATHER:
        tl.store(target + place + word, tl.load(source + in_pool + word, mask=inside), mask=inside)
    else:
        tl.store(target + in_pool + word, tl.load(source + place + word, mask=inside), mask=inside)


def gather(out: torch.Tensor, pool: torch.Tensor, numbers: torch.Tensor) -> None:
    """Fill `out`, (count, block_bytes) uint8, with blocks of `pool`, numbered by `numbers`, (count,) int64.

    All are contiguous, on one device, and begin at a multiple of eight bytes; so does every block.
    """
    _launch(out, pool, numbers, gathering=True)


def scatter(pool: torch.Tensor, numbers: torch.Tensor, data: torch.Tensor) -> None:
    """Fill blocks of `pool` with `data`, (count, block_bytes) uint8; otherwise as `gather`."""
    _launch(pool, data, numbers, gathering=False)


def _launch(target: torch.Tensor, source: torch.Tensor, numbers: torch.Tensor, *, gathering: bool) -> None:
    if len(numbers):
        words = target.shape[1] // WORD_BYTES
        _move_blocks[(len(numbers), triton.cdiv(words, PIECE_WORDS))](
            target.view(torch.int64), source.view(torch.int64), numbers, words, GATHER=gathering, PIECE=PIECE_WORDS
        )
