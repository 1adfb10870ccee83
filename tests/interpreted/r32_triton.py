"""R32 in Triton, run by its interpreter on the CPU, against the reference. Run by tests/test_interpreted.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvstore.codecs.r32 import Layout, TableSet
from kvstore.codecs.r32 import triton_kernels as kernels
from kvstore.errors import CodecError
from kvstore.testing import r32
from kvstore.testing.r32 import Coded


def sample(
    seed: int, *, lanes: int, alphabet: int, skew: float, ids: tuple[int, int, int], counts: tuple[int, ...]
) -> tuple[r32.Bytes, Layout, TableSet, Coded]:
    random = np.random.default_rng(seed)
    tables = r32.random_tables(random, 3, alphabet, skew)
    layout = Layout(np.array(counts, dtype=np.uint32), random.integers(0, 3, ids).astype(np.uint16), lanes)
    symbols = r32.random_symbols(random, layout, tables)
    return symbols, layout, tables, r32.encode("reference", symbols, layout, tables)


@pytest.mark.parametrize("alphabet", [1, 15, 256])
@pytest.mark.parametrize("lanes", [8, 16, 32])
def test_triton_agrees_with_the_reference(lanes: int, alphabet: int) -> None:
    shapes = ((1, 1, 1), (1, 3, 1), (1, 2, lanes), (4, 2, 1))
    for seed, ids in enumerate(shapes):
        symbols, layout, tables, coded = sample(
            seed, lanes=lanes, alphabet=alphabet, skew=4.0, ids=ids, counts=(0, 1, 33, 70)
        )
        on_device = kernels.DeviceTables.of(tables, "cpu")
        stream, lengths = kernels.encode(torch.from_numpy(symbols), layout, on_device)
        assert np.array_equal(lengths, coded.lengths)
        assert np.array_equal(stream.numpy(), coded.stream)
        decoded, ok = kernels.decode(torch.from_numpy(coded.stream), coded.lengths, layout, on_device)
        assert ok.all()
        assert np.array_equal(decoded.numpy(), symbols)


def test_damaged_tiles_are_judged_as_by_the_reference() -> None:
    _, layout, tables, coded = sample(9, lanes=8, alphabet=30, skew=3.0, ids=(1, 1, 1), counts=(40, 3, 64, 50))
    on_device = kernels.DeviceTables.of(tables, "cpu")
    random = np.random.default_rng(9)
    for _ in range(25):
        stream, lengths = coded.stream.copy(), coded.lengths.copy()
        stream[random.integers(len(stream))] ^= 1 << random.integers(8)
        if random.random() < 0.5:  # move a boundary, to odd places too
            moved = random.integers(1, min(lengths[1], 9) + 1)
            lengths[:2] += np.array([moved, -moved], dtype=np.int64).astype(np.uint32)
        expected = r32.decode("reference", Coded(stream, lengths), layout, tables)[1]
        _, ok = kernels.decode(torch.from_numpy(stream), lengths, layout, on_device)
        assert ok.tolist() == expected.tolist()


def test_what_cannot_be_coded_is_refused() -> None:
    layout = Layout.of(tiles=2, symbols=20, lanes=8)
    on_device = kernels.DeviceTables.of(TableSet(np.array([[4000, 0, 96]])), "cpu")
    symbols = torch.zeros(40, dtype=torch.uint8)
    symbols[31] = 1
    with pytest.raises(CodecError, match="no frequency"):
        kernels.encode(symbols, layout, on_device)
    with pytest.raises(CodecError, match="symbols must be"):
        kernels.encode(symbols[1:], layout, on_device)
    with pytest.raises(CodecError, match="add up to"):
        kernels.decode(symbols, np.array([20, 19], dtype=np.uint32), layout, on_device)
    other = Layout.of(tiles=2, symbols=20, lanes=8, ids=np.ones((1, 1, 1), dtype=np.uint16))
    with pytest.raises(CodecError, match="table id 1 of 1"):
        kernels.encode(symbols, other, on_device)
