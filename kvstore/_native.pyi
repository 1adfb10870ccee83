from collections.abc import Sequence

from kvstore.kernels_numpy import Buffer
from kvstore.spec import Bits

def xxh3(data: Buffer, /) -> int: ...
def copy_xxh3(target: Buffer, source: Buffer, /) -> int: ...
def gather_xxh3(target: Buffer, arrays: Sequence[Bits], /) -> int: ...
def scatter_xxh3(arrays: Sequence[Bits], source: Buffer, /) -> int: ...
def split_planes(target: Buffer, source: Buffer, itemsize: int, /) -> None: ...
def merge_planes(target: Buffer, source: Buffer, itemsize: int, /) -> None: ...
def isa() -> str: ...
def use_isa(name: str, /) -> None: ...
def r32_decode(
    target: Buffer,
    ok: Buffer,
    stream: Buffer,
    lengths: Buffer,
    counts: Buffer,
    ids: Buffer,
    lanes: int,
    tables: Buffer,
    threads: int,
    /,
) -> None: ...
def r32_decode_values(
    values: Buffer,
    ok: Buffer,
    stream: Buffer,
    lengths: Buffer,
    counts: Buffer,
    ids: Buffer,
    lanes: int,
    tables: Buffer,
    radix: int,
    values_per_symbol: int,
    zero: int,
    threads: int,
    /,
) -> None: ...
def r32_encode(
    target: Buffer,
    lengths: Buffer,
    symbols: Buffer,
    counts: Buffer,
    ids: Buffer,
    lanes: int,
    tables: Buffer,
    threads: int,
    /,
) -> int: ...
def r32_pack(symbols: Buffer, values: Buffer, radix: int, values_per_symbol: int, zero: int, /) -> bool: ...
def r32_isa() -> str: ...
def r32_use_isa(name: str, /) -> None: ...
def encode_fixed(target: Buffer, arrays: Sequence[Bits], /) -> int: ...
def decode_fixed(arrays: Sequence[Bits], source: Buffer, /) -> str: ...
def split_rotated(planes: Buffer, array: Bits, /) -> None: ...
def merge_rotated(array: Bits, planes: Buffer, /) -> None: ...
def channel_sums(sums: Buffer, tops: Buffer, /) -> None: ...
def count_tops(counts: Buffer, tops: Buffer, ids: Buffer, /) -> None: ...
def exponents_use_isa(name: str, /) -> None: ...
def ladder_decode_heads(
    targets: Sequence[Bits],
    dtype: str,
    cosine: Buffer,
    sine: Buffer,
    rotated_start: int,
    rotated_stop: int,
    tokens: int,
    classes: Buffer,
    widths: Buffer,
    steps: Buffer,
    places: Buffer,
    gains: Buffer,
    centres: Buffer,
    levels: Sequence[Buffer],
    tables: Buffer,
    centroids: Buffer,
    /,
) -> str: ...
def ladder_decode_components(
    numbers: Buffer,
    present: Buffer,
    tokens: int,
    classes: Buffer,
    widths: Buffer,
    steps: Buffer,
    levels: Sequence[Buffer],
    tables: Buffer,
    centroids: Buffer,
    /,
) -> str: ...
def ladder_write_channels(
    targets: Sequence[Bits],
    dtype: str,
    cosine: Buffer,
    sine: Buffer,
    rotated_start: int,
    rotated_stop: int,
    tokens: int,
    channels: Sequence[Buffer],
    means: Sequence[Buffer],
    /,
) -> str: ...
def ladder_quantise(finest: Buffer, numbers: Sequence[Buffer], places: Buffer, marks: Buffer, /) -> bool: ...
def ladder_encode(tokens: int, classes: Buffer, widths: Buffer, finest: Buffer, tables: Buffer, /) -> list[bytes]: ...
def ladder_use_isa(name: str, /) -> None: ...
