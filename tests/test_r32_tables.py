"""R32's tables, layouts, packing and side lists."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.codecs.r32 import Layout, Packing, TableSet, coder, escapes, quantise, reference
from kvstore.codecs.r32.escapes import SideList
from kvstore.codecs.r32.tables import SLOTS
from kvstore.errors import CodecError, ContainerError
from kvstore.testing import r32


@settings(deadline=None)
@given(weights=st.lists(st.floats(0, 1e30, allow_subnormal=False), min_size=1, max_size=256).filter(any))
def test_frequencies_sum_up_and_keep_every_used_symbol(weights: list[float]) -> None:
    frequencies = quantise(np.array([weights]))[0]
    assert frequencies.sum() == SLOTS
    assert ((frequencies > 0) == (np.array(weights) > 0)).all()


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 1000), symbols=st.integers(2, 256))
def test_no_exchange_makes_a_table_better(seed: int, symbols: int) -> None:
    weights = np.random.default_rng(seed).random((1, symbols)) ** 8 + 1e-12
    frequencies = quantise(weights)[0].astype(np.float64)
    gain = weights[0] * np.log2((frequencies + 1) / frequencies)
    with np.errstate(divide="ignore"):
        loss = np.where(frequencies > 1, weights[0] * np.log2(frequencies / (frequencies - 1)), np.inf)
    assert gain.max() <= loss.min() * (1 + 1e-9)


def test_escaping_rare_symbols_saves_bits() -> None:
    counts = np.round(1e7 * np.exp(-0.08 * np.arange(256)) + 1)[None]
    plain, sparse = TableSet(quantise(counts)), TableSet(quantise(counts, escape_bits=escapes.ENTRY_BITS))
    escaped = (sparse.frequencies == 0) & (counts > 0)
    assert escaped.any()
    listed = float(counts[escaped].sum()) * escapes.ENTRY_BITS
    assert sparse.bits(np.where(escaped, 0, counts)) + listed < plain.bits(counts)


def test_reciprocals_divide_exactly() -> None:
    random = np.random.default_rng(0)
    for frequency in range(1, SLOTS + 1):
        others = [[SLOTS - frequency]] if frequency < SLOTS else [[]]
        entry = int(TableSet(np.array([[frequency, *others[0]]])).encode[0, 0])
        reciprocal, shift, extra = entry & 0xFFFFFFFF, entry >> 44 & 15, entry >> 48 & 1
        quotients = np.concatenate([random.integers(0, 1 << 20, 50), [0, 1, (1 << 20) - 1]])
        states = np.concatenate([quotients * frequency, quotients * frequency + frequency - 1])
        found = [(int(state) + extra) * reciprocal >> 32 + shift for state in states]
        assert found == (states // frequency).tolist(), frequency


@pytest.mark.parametrize(
    "frequencies",
    [[[4095]], [[4097]], [[]], [[2048, 2048], [4096, 1]], [[5000, -904]], [4096], [[4096.0]], [[16] * 256 + [0]]],
)
def test_impossible_tables_are_refused(frequencies: list[object]) -> None:
    with pytest.raises(CodecError, match="frequencies"):
        TableSet(np.array(frequencies))


@pytest.mark.parametrize("weights", [[[0.0, 0.0]], [[1.0, -1.0]], [[np.nan, 1.0]], [[np.inf]], [1.0], [[]]])
def test_impossible_weights_are_refused(weights: list[object]) -> None:
    with pytest.raises(CodecError, match="weights"):
        quantise(np.array(weights))


def test_tables_come_back_from_bytes() -> None:
    tables = r32.random_tables(np.random.default_rng(0), 3, 100, 4.0)
    assert np.array_equal(TableSet.from_bytes(tables.to_bytes()).frequencies, tables.frequencies)


@settings(deadline=None)
@given(data=st.binary(max_size=60), cut=st.integers(0, 40), at=st.integers(0, 39))
def test_bytes_that_are_no_tables_are_refused(data: bytes, cut: int, at: int) -> None:
    with pytest.raises(ContainerError):
        TableSet.from_bytes(data)
    whole = bytearray(TableSet(quantise(np.arange(1.0, 19.0)[None])).to_bytes())
    whole[at] ^= 0x11
    for hurt in (bytes(whole), bytes(whole[:cut])):
        with pytest.raises(ContainerError):
            TableSet.from_bytes(hurt)


@pytest.mark.parametrize(
    ("counts", "ids", "lanes"),
    [
        (np.zeros(2, np.uint32), np.zeros((1, 1, 1), np.uint16), 4),
        (np.zeros(2, np.int64), np.zeros((1, 1, 1), np.uint16), 32),
        (np.zeros(2, np.uint32), np.zeros((3, 1, 1), np.uint16), 32),
        (np.zeros(2, np.uint32), np.zeros((1, 1, 16), np.uint16), 32),
        (np.zeros(2, np.uint32), np.zeros((1, 0, 1), np.uint16), 32),
        (np.zeros(2, np.uint32), np.zeros((1, 1), np.uint16), 32),
        (np.full(2, 1 << 29, np.uint32), np.zeros((1, 1, 1), np.uint16), 32),
    ],
)
def test_impossible_layouts_are_refused(counts: object, ids: object, lanes: int) -> None:
    with pytest.raises(CodecError, match="Layout"):
        Layout(counts, ids, lanes)  # type: ignore[arg-type]


@pytest.mark.parametrize("tokens", [0, 1, 4, 5, 64, 67])
@pytest.mark.parametrize("channels", [1, 63, 64, 80, 130])
@pytest.mark.parametrize(("radix", "per_symbol", "zero"), [(3, 5, 1), (15, 2, 7), (6, 3, 2), (256, 1, 128), (2, 8, 0)])
def test_packing_agrees_with_the_reference(radix: int, per_symbol: int, zero: int, channels: int, tokens: int) -> None:
    packing = Packing(radix, per_symbol, zero, tokens, channels)
    random = np.random.default_rng(tokens)
    values = random.integers(-zero, radix - zero, (3, tokens, channels)).astype(np.int8)
    symbols = coder.pack(values, packing)
    assert np.array_equal(symbols, reference.pack(values, packing))
    assert np.array_equal(reference.unpack(symbols, packing), values)
    tables = TableSet(quantise(np.bincount(np.append(symbols, 0), minlength=256)[None]))
    layout = Layout.of(tiles=3, symbols=packing.symbols)
    coded = r32.encode("reference", symbols.reshape(-1), layout, tables)
    back = np.full_like(values, 99)
    assert coder.decode_values(back, *coded, layout, tables, packing).all()
    assert np.array_equal(back, values)


@pytest.mark.parametrize(("value", "channel"), [(2, 0), (-2, 5), (127, 69), (-128, 69)])
def test_values_beyond_their_digit_are_refused(value: int, channel: int) -> None:
    packing = Packing(radix=3, values_per_symbol=5, zero=1, tokens=7, channels=70)
    values = np.zeros((2, 7, 70), dtype=np.int8)
    values[1, 6, channel] = value
    for pack in (coder.pack, reference.pack):
        with pytest.raises(CodecError, match=r"not in -1\.\.1"):
            pack(values, packing)


@pytest.mark.parametrize(
    "fields", [(1, 1, 0, 1, 1), (7, 3, 0, 1, 1), (3, 0, 0, 1, 1), (3, 5, 3, 1, 1), (256, 1, 0, 1, 1), (3, 5, 1, 1, 0)]
)
def test_impossible_packings_are_refused(fields: tuple[int, int, int, int, int]) -> None:
    with pytest.raises(CodecError):
        Packing(*fields)


def test_rare_symbols_travel_in_the_side_list() -> None:
    random = np.random.default_rng(0)
    weights = np.exp(-0.3 * np.arange(64))[None] * np.array([[1.0], [1.5]])
    tables = TableSet(quantise(weights, escape_bits=escapes.ENTRY_BITS))
    layout = Layout.of(tiles=5, symbols=20_000, ids=np.array([[[0], [1]]], dtype=np.uint16))
    symbols = np.minimum(random.geometric(0.26, layout.symbols) - 1, 63).astype(np.uint8)
    coded, listed = escapes.take_out(symbols, layout, tables)
    assert 0 < len(listed.tiles) < layout.symbols // 100
    stream = r32.encode("reference", coded, layout, tables)
    decoded, ok = r32.decode("reference", stream, layout, tables)
    assert ok.all()
    read = SideList.from_bytes(listed.to_bytes(layout.tiles), layout.counts)
    decoded.reshape(5, -1)[read.tiles, read.positions] = read.values
    assert np.array_equal(decoded, symbols)


def test_side_lists_out_of_order_are_refused() -> None:
    for tiles, positions in (([0, 0], [3, 3]), ([1, 0], [1, 2]), ([0], [1 << 16]), ([0], [-1])):
        with pytest.raises(CodecError, match="side list"):
            SideList(np.array(tiles), np.array(positions), np.zeros(len(tiles), dtype=np.int16))


@settings(deadline=None)
@given(data=st.binary(max_size=40))
def test_any_bytes_are_a_side_list_or_refused(data: bytes) -> None:
    counts = np.array([5, 300, 0], dtype=np.uint32)
    try:
        read = SideList.from_bytes(data, counts)
    except ContainerError:
        return
    assert read.to_bytes(3) == data
    assert (read.positions < counts[read.tiles]).all()
