"""Gather and scatter of blocks in Triton, run by its interpreter on the CPU. Run by tests/test_interpreted.py."""

from __future__ import annotations

import pytest
import torch

from kvstore.tiers import hbm_kernels


@pytest.mark.parametrize("block_bytes", [4096, 16 << 10, 20 << 10, 64 << 10])
@pytest.mark.parametrize("numbers", [[], [3], [5, 0, 1], [6, 5, 4, 3, 2, 1, 0]])
def test_triton_agrees_with_torch(block_bytes: int, numbers: list[int]) -> None:
    generator = torch.Generator().manual_seed(len(numbers))
    pool = torch.randint(0, 256, (7, block_bytes), dtype=torch.uint8, generator=generator)
    index = torch.tensor(numbers, dtype=torch.int64)
    gathered = torch.full((len(numbers), block_bytes), 9, dtype=torch.uint8)
    hbm_kernels.gather(gathered, pool, index)
    assert torch.equal(gathered, pool.index_select(0, index))
    data = torch.randint(0, 256, gathered.shape, dtype=torch.uint8, generator=generator)
    expected = pool.index_copy(0, index, data)
    hbm_kernels.scatter(pool, index, data)
    assert torch.equal(pool, expected)
