"""Every implementation of R32 under one face, for tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvstore.codecs.r32 import Layout, TableSet, coder, quantise, reference

Bytes = npt.NDArray[np.uint8]


class Coded(NamedTuple):
    """Tiles, and the bytes of each."""

    stream: Bytes
    lengths: npt.NDArray[np.uint32]


@contextmanager
def instructions(name: str) -> Iterator[None]:
    """Uses the C++ kernels of one instruction set.

    Raises:
        ValueError: this processor lacks it.
    """
    from kvstore import _native

    before = _native.r32_isa()
    _native.r32_use_isa(name)
    try:
        yield
    finally:
        _native.r32_use_isa(before)


def _runs_here(name: str) -> bool:
    try:
        with instructions(name):
            return True
    except ValueError:
        return False


IMPLEMENTATIONS = ("reference", *filter(_runs_here, ("scalar", "neon", "avx2", "avx512") if coder.NATIVE else ()))
"""Those that run here: the reference in NumPy, then the C++ kernels of each instruction set of this processor."""


def encode(name: str, symbols: Bytes, layout: Layout, tables: TableSet, *, threads: int = 1) -> Coded:
    """The tiles as the named implementation codes them, in memory that held other bytes."""
    target = np.full(layout.bytes_max, 0xA5, dtype=np.uint8)
    if name == "reference":
        lengths = reference.encode(target, symbols, layout, tables)
    else:
        with instructions(name):
            lengths = coder.encode(target, symbols, layout, tables, threads=threads)
    return Coded(target[: int(lengths.sum())].copy(), lengths)


def decode(
    name: str, coded: Coded, layout: Layout, tables: TableSet, *, threads: int = 1
) -> tuple[Bytes, npt.NDArray[np.bool_]]:
    """(symbols, which tiles were whole) as the named implementation sees them."""
    target = np.full(layout.symbols, 0xA5, dtype=np.uint8)
    if name == "reference":
        return target, reference.decode(target, *coded, layout, tables)
    with instructions(name):
        return target, coder.decode(target, *coded, layout, tables, threads=threads)


def random_tables(random: np.random.Generator, tables: int, symbols: int, skew: float) -> TableSet:
    """Tables of random weights; the higher the skew, the fewer symbols have most of it."""
    weights = random.random((tables, symbols)) ** skew + 1e-9
    return TableSet(quantise(weights))


def random_symbols(random: np.random.Generator, layout: Layout, tables: TableSet) -> Bytes:
    """Symbols that follow the tables, by the inverse of their cumulative frequencies."""
    starts = np.concatenate([[0], np.cumsum(layout.counts.astype(np.int64))])
    out = np.empty(layout.symbols, dtype=np.uint8)
    slots = random.integers(0, 4096, layout.symbols)
    for tile, count in enumerate(layout.counts.tolist()):
        index = np.arange(count)
        ids = layout.ids[tile if len(layout.ids) > 1 else 0]
        table = ids[index // layout.lanes % ids.shape[0], index % layout.lanes if ids.shape[1] > 1 else 0]
        own = slice(int(starts[tile]), int(starts[tile + 1]))
        out[own] = tables.decode[table, slots[own]] & 0xFF
    return out
