"""R32 against the entropy of what it codes and against `zstd -1` on the same values packed two to a byte.

Values are unit Gaussians, quantised uniformly with the base step of the rate, (tiles, tokens, channels) as int8. Speeds
are elements (values) a second of one thread, and compare in pairs measured in turn; both decoders write packed values,
one byte a symbol here and one byte a pair there.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import zstandard

from kvstore.bench.timing import paired
from kvstore.codecs.r32 import Layout, Packing, TableSet, coder, escapes, quantise

GIGA = 1e9
CHANNELS = 128


class Rate(NamedTuple):
    """A quantiser of unit Gaussians, and how its levels share symbols."""

    name: str
    step: float
    levels: int
    values_per_symbol: int


RATES = (Rate("1.24bit", 2.0, 5, 3), Rate("2.66bit", 0.667, 13, 2))
"""The ladder's base level in triples; a 3-bit class quantiser in pairs."""


class Sample(NamedTuple):
    """Quantised values and everything needed to code them."""

    values: npt.NDArray[np.int8]
    packing: Packing
    layout: Layout
    tables: TableSet
    symbols: npt.NDArray[np.uint8]
    listed: escapes.SideList
    target: npt.NDArray[np.uint8]
    lengths: npt.NDArray[np.uint32]
    nbytes: int
    """Of the stream, the lane states and the side list."""

    @property
    def stream(self) -> npt.NDArray[np.uint8]:
        """The encoded tiles."""
        return self.target[: int(self.lengths.sum())]


def measure(directory: Path, quick: bool) -> dict[str, float]:
    """Rate, and speed against zstd, at two rates. `directory` is not used: nothing is written."""
    del directory
    metrics: dict[str, float] = {}
    tiles, rounds = (16, 3) if quick else (256, 25)
    for rate in RATES:
        metrics |= _excess(rate, elements=1 << 20 if quick else 1 << 24)
        metrics |= _speed(rate, tiles, rounds)
    metrics["codec.r32.excess_bits"] = max(metrics[f"codec.r32.{rate.name}.excess_bits"] for rate in RATES)
    # At 2 to 3 bits, and near 1.25 bits.
    metrics["codec.r32.decode_vs_zstd1"] = metrics["codec.r32.2.66bit.decode_vs_zstd1"]
    metrics["codec.r32.decode_vs_zstd1_low_rate"] = metrics["codec.r32.1.24bit.decode_vs_zstd1"]
    metrics["codec.r32.encode_vs_zstd1"] = min(metrics[f"codec.r32.{rate.name}.encode_vs_zstd1"] for rate in RATES)
    return metrics


def _excess(rate: Rate, elements: int) -> dict[str, float]:
    """Bits an element beyond the values' entropy, by elements a lane; the plain name is that of a 256-token head."""
    found: dict[str, float] = {}
    for lanes, tokens in ((32, 128), (32, 256), (16, 256), (32, 1024)):
        sample = _sample(rate, max(1, elements // (tokens * CHANNELS)), tokens, lanes)
        excess = 8 * sample.nbytes / sample.values.size - _entropy(sample.values)
        found[f"codec.r32.{rate.name}.excess_bits_{tokens * CHANNELS // lanes}_el_per_lane"] = excess
        if (lanes, tokens) == (16, 256):
            found[f"codec.r32.{rate.name}.excess_bits"] = excess
    return found


def _speed(rate: Rate, tiles: int, rounds: int) -> dict[str, float]:
    sample = _sample(rate, tiles, 512, 32)
    elements = sample.values.size
    pairs = _pairs(sample.values, rate.levels // 2)
    compressor, decompressor = zstandard.ZstdCompressor(level=1), zstandard.ZstdDecompressor()
    frame = compressor.compress(pairs)
    symbols, values = np.empty_like(sample.symbols), np.empty_like(sample.values)
    coded = sample.stream.copy()
    common = (coded, sample.lengths, sample.layout, sample.tables)

    def encode() -> object:
        return coder.encode(sample.target, sample.symbols, sample.layout, sample.tables)

    def decode(threads: int = 1) -> object:
        return coder.decode(symbols, *common, threads=threads)

    def decode_values() -> object:
        return coder.decode_values(values, *common, sample.packing)

    def unzstd() -> object:
        return decompressor.decompress(frame)

    decoded, zstd_decoded, decode_ratio = paired(decode, unzstd, rounds=rounds)
    encoded, zstd_encoded, encode_ratio = paired(encode, lambda: compressor.compress(pairs), rounds=rounds)
    unpacked, _, values_ratio = paired(decode_values, unzstd, rounds=rounds)
    _, _, two_threads = paired(lambda: decode(2), decode, rounds=rounds)
    name = f"codec.r32.{rate.name}"
    return {
        f"{name}.decode_vs_zstd1": decode_ratio,
        f"{name}.decode_values_vs_zstd1": values_ratio,
        f"{name}.encode_vs_zstd1": encode_ratio,
        f"{name}.bytes_vs_zstd1": sample.nbytes / len(frame),
        f"{name}.decode_elements_giga_per_second": elements / decoded / GIGA,
        f"{name}.decode_values_elements_giga_per_second": elements / unpacked / GIGA,
        f"{name}.encode_elements_giga_per_second": elements / encoded / GIGA,
        f"{name}.zstd1_decode_elements_giga_per_second": elements / zstd_decoded / GIGA,
        f"{name}.zstd1_encode_elements_giga_per_second": elements / zstd_encoded / GIGA,
        f"{name}.decode_two_threads_vs_one": two_threads,
        **_by_instructions(f"{name}.decode_vs_zstd1", decode, unzstd, rounds),
    }


def _by_instructions(
    name: str, decode: Callable[[], object], unzstd: Callable[[], object], rounds: int
) -> dict[str, float]:
    """The same ratio with the instruction sets that the best one hides."""
    if not coder.NATIVE:
        return {}
    from kvstore import _native

    best = _native.r32_isa()
    found: dict[str, float] = {}
    for other in ("avx2", "scalar"):
        try:
            _native.r32_use_isa(other)
        except ValueError:
            continue
        found[f"{name}_{other}"] = paired(decode, unzstd, rounds=max(3, rounds // 3))[2]
    _native.r32_use_isa(best)
    return found


def _sample(rate: Rate, tiles: int, tokens: int, lanes: int) -> Sample:
    top = rate.levels // 2
    random = np.random.default_rng(3)
    gaussian = random.standard_normal((tiles, tokens, CHANNELS), dtype=np.float32)
    values = np.clip(np.rint(gaussian / rate.step), -top, top).astype(np.int8)
    packing = Packing(rate.levels, rate.values_per_symbol, top, tokens, CHANNELS)
    layout = Layout.of(tiles=tiles, symbols=packing.symbols, lanes=lanes)
    packed = coder.pack(values, packing).reshape(-1)
    counts = np.bincount(packed, minlength=packing.alphabet)
    tables = TableSet(quantise(counts[None], escape_bits=escapes.ENTRY_BITS))
    symbols, listed = escapes.take_out(packed, layout, tables)
    target = np.empty(layout.bytes_max, dtype=np.uint8)
    lengths = coder.encode(target, symbols, layout, tables)
    nbytes = int(lengths.sum()) + (len(listed.to_bytes(tiles)) if listed.tiles.size else 0)
    return Sample(values, packing, layout, tables, symbols, listed, target, lengths, nbytes)


def _entropy(values: npt.NDArray[np.int8]) -> float:
    """Bits an element of independent values with these frequencies."""
    counts = np.bincount(values.reshape(-1).astype(np.int64) + 128)
    shares = counts[counts > 0] / values.size
    return float(-np.sum(shares * np.log2(shares)))


def _pairs(values: npt.NDArray[np.int8], zero: int) -> bytes:
    """Two neighbouring values a byte."""
    digits = (values.reshape(-1, 2) + zero).astype(np.uint8)
    return (digits[:, 0] | digits[:, 1] << 4).tobytes()
