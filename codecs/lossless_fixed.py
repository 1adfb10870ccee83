"""Block format 2 of `lossless`: four-bit codes of each head's sixteen commonest tops, and a list of the other ones.

A segment holds, for each of its layers, K then V, one block a head:

    directory   u32 LE bytes of every block, in the order layer, K | V, head
    blocks      in that order without gaps

A block of n elements that takes all their bytes has the elements as they are, in the order token, dimension. Any other
is:

    tops        u8[16], the top of each code
    escapes     u32, number of elements whose top is not in the list
    planes      the bytes of the rotated elements below the top, lowest first, n each
    codes       four bits an element, the even one in the low half of a byte
    positions   u32 each, ascending, of the escapes
    values      u8 each, their tops
"""

from __future__ import annotations

from kvstore.codecs import exponents
from kvstore.errors import ContainerError
from kvstore.outcome import Reason
from kvstore.spec import KVArrays, KVSpec

FORMAT = 2
_ENTRY_BYTES = 4


def bytes_max(spec: KVSpec, tokens: int, layers: int) -> int:
    """Most bytes of a segment of that many layers."""
    return layers * (spec.layer_bytes(tokens) + 2 * spec.kv_heads * _ENTRY_BYTES)


def encode(target: memoryview, layers: KVArrays) -> int:
    """Write the segment of `layers` to the start of `target`; answers its bytes, at most `bytes_max`."""
    return exponents.encode_fixed(target, [array for pair in layers for array in pair])


def decode(data: memoryview, layers: KVArrays, spec: KVSpec) -> None:
    """Fill `layers` from a segment. Raises ContainerError (malformed)."""
    wrong = exponents.decode_fixed([array for pair in layers for array in pair], data)
    if wrong:
        raise ContainerError(Reason.MALFORMED, wrong)
