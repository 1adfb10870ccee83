"""R32 and bytes that no encoder wrote: every implementation judges them alike, and none is harmed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.codecs.r32 import Layout, TableSet, coder
from kvstore.codecs.r32.layout import Packing
from kvstore.errors import CodecError
from kvstore.testing import r32
from kvstore.testing.r32 import IMPLEMENTATIONS, Coded


def sample(seed: int, lanes: int = 32) -> tuple[r32.Bytes, Layout, TableSet, Coded]:
    random = np.random.default_rng(seed)
    tables = r32.random_tables(random, 2, 30, 3.0)
    counts = random.integers(0, 400, 6).astype(np.uint32)
    layout = Layout(counts, np.array([[[0], [1]]], dtype=np.uint16), lanes)
    symbols = r32.random_symbols(random, layout, tables)
    return symbols, layout, tables, r32.encode("reference", symbols, layout, tables)


@settings(deadline=None, max_examples=80)
@given(seed=st.integers(0, 20), lanes=st.sampled_from([8, 16, 32]), data=st.data())
def test_damaged_streams_are_judged_alike(seed: int, lanes: int, data: st.DataObject) -> None:
    _, layout, tables, coded = sample(seed, lanes)
    stream = coded.stream.copy()
    at = data.draw(st.integers(0, len(stream) - 1))
    kind = data.draw(st.sampled_from(["flip", "fill", "noise"]))
    if kind == "flip":
        stream[at] ^= 1 << data.draw(st.integers(0, 7))
    else:
        part = stream[at : at + data.draw(st.integers(1, 200))]
        noise = np.random.default_rng(at).integers(0, 256, len(part))
        part[:] = 255 * data.draw(st.integers(0, 1)) if kind == "fill" else noise
    hurt = Coded(stream, coded.lengths)
    expected_symbols, expected = r32.decode("reference", hurt, layout, tables)
    begin = np.cumsum(layout.counts) - layout.counts
    for name in IMPLEMENTATIONS[1:]:
        decoded, ok = r32.decode(name, hurt, layout, tables)
        assert np.array_equal(ok, expected), name
        for tile in np.flatnonzero(ok):
            own = slice(begin[tile], begin[tile] + layout.counts[tile])
            assert np.array_equal(decoded[own], expected_symbols[own])


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_every_single_bit_matters(name: str) -> None:
    tables = TableSet(np.array([[2000, 1000, 1000, 96]]))
    layout = Layout.of(tiles=1, symbols=150, lanes=8)
    symbols = r32.random_symbols(np.random.default_rng(1), layout, tables)
    coded = r32.encode("reference", symbols, layout, tables)
    for bit in range(8 * len(coded.stream)):
        stream = coded.stream.copy()
        stream[bit // 8] ^= 1 << bit % 8
        decoded, ok = r32.decode(name, Coded(stream, coded.lengths), layout, tables)
        assert not ok[0] or not np.array_equal(decoded, symbols)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("lanes", [8, 16, 32])
def test_shorter_and_longer_tiles_are_not_whole(name: str, lanes: int) -> None:
    _, _, tables, _ = sample(3)
    layout = Layout.of(tiles=1, symbols=700, lanes=lanes)
    symbols = r32.random_symbols(np.random.default_rng(2), layout, tables)
    stream, lengths = r32.encode("reference", symbols, layout, tables)
    whole = int(lengths[0])
    for length in (*range(0, whole, 7), whole - 2, whole - 1, whole + 1, whole + 2, whole + 500):
        cut = np.resize(stream, length) if length > whole else stream[:length].copy()
        hurt = Coded(cut, np.array([length], dtype=np.uint32))
        assert not r32.decode(name, hurt, layout, tables)[1].any(), length


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_one_bad_tile_leaves_its_neighbours_whole(name: str) -> None:
    symbols, layout, tables, coded = sample(5)
    begin = np.cumsum(coded.lengths) - coded.lengths
    for bad in np.flatnonzero(layout.counts):
        stream = coded.stream.copy()
        stream[begin[bad] + 2 : begin[bad] + 4] = 0  # a state below its minimum
        decoded, ok = r32.decode(name, Coded(stream, coded.lengths), layout, tables)
        assert np.flatnonzero(~ok).tolist() == [bad]
        keep = np.repeat(np.arange(layout.tiles), layout.counts) != bad
        assert np.array_equal(decoded[keep], symbols[keep])


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_a_tile_of_odd_length_is_bad_alone(name: str) -> None:
    symbols, layout, tables, coded = sample(6)
    begin = int(coded.lengths[0])
    stream = np.insert(coded.stream, begin, 0)
    lengths = coded.lengths.copy()
    lengths[0] += 1
    decoded, ok = r32.decode(name, Coded(stream, lengths), layout, tables)
    assert ok.tolist() == [False] + [True] * (layout.tiles - 1)
    assert np.array_equal(decoded[layout.counts[0] :], symbols[layout.counts[0] :])


def test_a_bad_tile_leaves_its_values_as_they_were() -> None:
    packing = Packing(radix=3, values_per_symbol=5, zero=1, tokens=64, channels=32)
    tables = TableSet(np.array([[16] * 243 + [208]]))
    layout = Layout.of(tiles=2, symbols=packing.symbols)
    values = np.random.default_rng(0).integers(-1, 2, (2, 64, 32)).astype(np.int8)
    symbols = coder.pack(values, packing).reshape(-1)
    coded = r32.encode("reference", symbols, layout, tables)
    stream = coded.stream.copy()
    stream[coded.lengths[0] + 2 : coded.lengths[0] + 4] = 0  # a state below its minimum
    target = np.full_like(values, 77)
    ok = coder.decode_values(target, stream, coded.lengths, layout, tables, packing)
    assert ok.tolist() == [True, False]
    assert np.array_equal(target[0], values[0])
    assert (target[1] == 77).all()


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_symbols_without_a_frequency_are_refused(name: str) -> None:
    tables = TableSet(np.array([[4000, 0, 96]]))
    layout = Layout.of(tiles=3, symbols=70)
    for symbol in (1, 3, 255):
        for at in (0, 69, 140, 209):  # first step, partial step, another tile
            symbols = np.zeros(layout.symbols, dtype=np.uint8)
            symbols[at] = symbol
            with pytest.raises(CodecError, match="no frequency"):
                r32.encode(name, symbols, layout, tables)


def test_sizes_that_do_not_fit_are_refused() -> None:
    symbols, layout, tables, coded = sample(8)
    room = np.empty(layout.bytes_max, dtype=np.uint8)
    with pytest.raises(CodecError, match="symbols must be"):
        coder.encode(room, symbols[:-1], layout, tables)
    with pytest.raises(CodecError, match="at least"):
        coder.encode(room[:-1], symbols, layout, tables)
    with pytest.raises(CodecError, match="target must be"):
        coder.decode(symbols[:-1].copy(), *coded, layout, tables)
    with pytest.raises(CodecError, match="add up to"):
        coder.decode(symbols.copy(), coded.stream[:-1], coded.lengths, layout, tables)
    with pytest.raises(CodecError, match="lengths must be"):
        coder.decode(symbols.copy(), coded.stream, coded.lengths[:-1], layout, tables)
    alone = TableSet(tables.frequencies[:1])
    with pytest.raises(CodecError, match="table id 1 of 1"):
        coder.decode(symbols.copy(), *coded, layout, alone)
    packing = Packing(radix=2, values_per_symbol=8, zero=0, tokens=8, channels=3)
    with pytest.raises(CodecError, match="int8 of shape"):
        coder.decode_values(np.zeros((1, 8, 3), dtype=np.int8), *coded, layout, tables, packing)
