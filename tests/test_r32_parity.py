"""R32: every implementation writes the same bytes and reads them back, over shapes of tables and tiles."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.codecs.r32 import Layout, TableSet, quantise
from kvstore.testing import r32
from kvstore.testing.r32 import IMPLEMENTATIONS, Coded

GOLDEN = Path(__file__).parent / "golden" / "r32" / "cases.json"

SIZES = (0, 1, 2, 7, 8, 9, 15, 31, 32, 33, 64, 100, 1000, 2049)


def id_arrays(random: np.random.Generator, tiles: int, tables: int, lanes: int) -> list[np.typing.NDArray[np.uint16]]:
    """Table ids of every shape: one table, one a group, one a lane, each tile its own."""
    shapes = ((1, 1, 1), (1, 4, 1), (1, 3, lanes), (tiles, 2, 1), (tiles, 2, lanes))
    return [random.integers(0, tables, shape).astype(np.uint16) for shape in shapes]


def assert_round_trip(symbols: r32.Bytes, layout: Layout, tables: TableSet, coded: Coded, name: str) -> None:
    decoded, ok = r32.decode(name, coded, layout, tables)
    assert ok.all()
    assert np.array_equal(decoded, symbols)


@pytest.mark.parametrize("skew", [0.1, 4.0, 30.0])
@pytest.mark.parametrize("alphabet", [1, 2, 3, 15, 81, 243, 256])
@pytest.mark.parametrize("lanes", [8, 16, 32])
def test_every_implementation_agrees(lanes: int, alphabet: int, skew: float) -> None:
    random = np.random.default_rng(alphabet * 100 + lanes)
    tables = r32.random_tables(random, 5, alphabet, skew)
    counts = np.array(SIZES, dtype=np.uint32)
    for ids in id_arrays(random, len(counts), len(tables), lanes):
        layout = Layout(counts, ids, lanes)
        symbols = r32.random_symbols(random, layout, tables)
        expected = r32.encode("reference", symbols, layout, tables)
        assert_round_trip(symbols, layout, tables, expected, "reference")
        for name in IMPLEMENTATIONS[1:]:
            coded = r32.encode(name, symbols, layout, tables)
            assert np.array_equal(coded.lengths, expected.lengths)
            assert np.array_equal(coded.stream, expected.stream)
            assert_round_trip(symbols, layout, tables, coded, name)


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_any_symbols_come_back(data: st.DataObject) -> None:
    lanes = data.draw(st.sampled_from([8, 16, 32]))
    weights = data.draw(st.lists(st.integers(0, 1 << 40), min_size=1, max_size=256).filter(any))
    tables = TableSet(quantise(np.array([weights])))
    usable = np.flatnonzero(tables.frequencies[0])
    counts = data.draw(st.lists(st.integers(0, 300), max_size=6))
    layout = Layout(np.array(counts, dtype=np.uint32), np.zeros((1, 1, 1), dtype=np.uint16), lanes)
    # Uniform over the alphabet, so that rare symbols, which take most room, come often.
    random = np.random.default_rng(data.draw(st.integers(0, 1 << 30)))
    symbols = random.choice(usable, layout.symbols).astype(np.uint8)
    name = data.draw(st.sampled_from(IMPLEMENTATIONS))
    coded = r32.encode(name, symbols, layout, tables)
    assert len(coded.stream) <= layout.bytes_max
    assert_round_trip(symbols, layout, tables, coded, name)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_rare_symbols_only_fill_all_the_room(name: str) -> None:
    tables = TableSet(np.array([[1] * 255 + [4096 - 255]]))
    layout = Layout.of(tiles=3, symbols=2000)
    symbols = np.full(layout.symbols, 7, dtype=np.uint8)
    coded = r32.encode(name, symbols, layout, tables)
    assert len(coded.stream) > layout.symbols * 12 // 8
    assert_round_trip(symbols, layout, tables, coded, name)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_a_table_of_one_symbol_takes_no_words(name: str) -> None:
    tables = TableSet(np.array([[0, 4096, 0]]))
    layout = Layout.of(tiles=2, symbols=10_000)
    coded = r32.encode(name, np.ones(layout.symbols, dtype=np.uint8), layout, tables)
    assert coded.lengths.tolist() == [128, 128]
    assert_round_trip(np.ones(layout.symbols, dtype=np.uint8), layout, tables, coded, name)


@pytest.mark.parametrize("name", IMPLEMENTATIONS[1:])
@pytest.mark.parametrize("threads", [2, 5, 1000])
def test_threads_change_nothing(name: str, threads: int) -> None:
    random = np.random.default_rng(threads)
    tables = r32.random_tables(random, 2, 100, 3.0)
    counts = random.integers(0, 3000, 50).astype(np.uint32)
    layout = Layout(counts, random.integers(0, 2, (50, 2, 1)).astype(np.uint16))
    symbols = r32.random_symbols(random, layout, tables)
    alone = r32.encode(name, symbols, layout, tables)
    coded = r32.encode(name, symbols, layout, tables, threads=threads)
    assert np.array_equal(coded.stream, alone.stream)
    decoded, ok = r32.decode(name, coded, layout, tables, threads=threads)
    assert ok.all()
    assert np.array_equal(decoded, symbols)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", json.loads(GOLDEN.read_text()), ids=lambda case: str(case["name"]))
def test_golden_streams_stay_as_they_are(case: dict[str, object], name: str) -> None:
    tables = TableSet(np.array(case["frequencies"]))
    ids = np.array(case["ids"], dtype=np.uint16)
    layout = Layout(np.array(case["counts"], dtype=np.uint32), ids, int(str(case["lanes"])))
    symbols = np.frombuffer(bytes.fromhex(str(case["symbols"])), dtype=np.uint8)
    expected = np.frombuffer(bytes.fromhex(str(case["stream"])), dtype=np.uint8)
    coded = r32.encode(name, symbols, layout, tables)
    assert coded.lengths.tolist() == case["lengths"]
    assert np.array_equal(coded.stream, expected)
    assert_round_trip(symbols, layout, tables, Coded(expected, coded.lengths), name)
