"""Contiguous views of scattered blocks, and the way back: what attention kernels and decoders want to read.

On the host this is an index_select; on CUDA a Triton kernel, enqueued on the caller's current stream.
"""

from __future__ import annotations

import torch

from kvstore.tiers.hbm_blocks import Blocks


def contiguous(pool: torch.Tensor, blocks: Blocks, nbytes: int) -> torch.Tensor:
    """The first `nbytes` bytes of these blocks in one run, (nbytes,) uint8 on the pool's device.

    It is the pool's own memory if the blocks are neighbours in rising order, else a copy.

    Args:
        pool: (blocks, block_bytes) uint8, contiguous.
        blocks: numbers of blocks in the order wanted.
        nbytes: at most what the blocks have.
    """
    first = int(blocks[0])
    if int(blocks[-1]) - first == len(blocks) - 1 and bool((blocks[1:] > blocks[:-1]).all()):
        return pool.view(-1)[first * pool.shape[1] :][:nbytes]
    out = torch.empty((len(blocks), pool.shape[1]), dtype=torch.uint8, device=pool.device)
    gather(out, pool, torch.from_numpy(blocks).to(pool.device))
    return out.view(-1)[:nbytes]


def gather(out: torch.Tensor, pool: torch.Tensor, blocks: torch.Tensor) -> None:
    """Fill `out`, (count, block_bytes) uint8, with the blocks of `pool` numbered by `blocks`, (count,) int64."""
    if pool.is_cuda:
        from kvstore.tiers import hbm_kernels

        hbm_kernels.gather(out, pool, blocks)
    else:
        torch.index_select(pool, 0, blocks, out=out)


def scatter(pool: torch.Tensor, blocks: Blocks, data: torch.Tensor) -> None:
    """Fill these blocks of `pool` with `data`, (nbytes,) uint8 on its device; the rest of the last one stays."""
    block_bytes = pool.shape[1]
    whole = len(data) // block_bytes
    body = data[: whole * block_bytes].view(whole, block_bytes)
    numbers = torch.from_numpy(blocks[:whole]).to(pool.device)
    if pool.is_cuda and whole and body.data_ptr() % 8 == 0:
        from kvstore.tiers import hbm_kernels

        hbm_kernels.scatter(pool, numbers, body)
    else:
        pool.index_copy_(0, numbers, body)
    if whole < len(blocks):
        tail = data[whole * block_bytes :]
        pool[int(blocks[whole]), : len(tail)] = tail
