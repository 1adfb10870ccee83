"""R32: entropy coding of small symbols, the same bits from C++, NumPy and Triton.

Byte symbols in, a stream of interleaved range asymmetric numeral systems (rANS, Duda 2013) out: 8, 16 or 32 lanes of
32-bit state, 16-bit words, static tables of 12-bit frequencies, one stream of words a tile. docs/format.md says it in
full ("R32 stream"). A symbol that stands for several small values (`Packing`) makes coding faster and lets one table
describe their dependence.

    tables = TableSet(quantise(counts))                    # one row a table
    layout = Layout.of(tiles=512, symbols=packing.symbols, lanes=32)
    lengths = coder.encode(target, symbols, layout, tables)
    ok = coder.decode_values(values, target[: lengths.sum()], lengths, layout, tables, packing, threads=2)

`coder` picks the C++ kernels or `reference`, the NumPy oracle; `triton_kernels` is imported where it is used.
"""

from __future__ import annotations

from kvstore.codecs.r32.layout import Layout, Packing
from kvstore.codecs.r32.tables import TableSet, quantise

__all__ = ["Layout", "Packing", "TableSet", "quantise"]
