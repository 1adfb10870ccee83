"""`lossless`: K and V bit for bit, in fewer bytes because the exponents of neighbouring elements are alike.

An element's top byte (rotated left by one bit, so that it is the exponent of bfloat16 and float32) is coded, the rest
of it, which is noise, is kept. Three block formats; the first encoding parameter of a segment says which:

    1   byte planes through zstandard; read only                       `kvstore.codecs.lossless_planes`
    2   four-bit codes of the commonest tops and a list of the others  `kvstore.codecs.lossless_fixed`
    3   tops through R32 with tables for classes of channels           `kvstore.codecs.lossless_tables`

This codec writes format 2 where the top is an exponent (12.0 bits an element of bfloat16, decoded about as fast as
memory is copied) and format 3 for the other types. Its sibling `lossless_dense` writes format 3 always.
"""

from __future__ import annotations

from kvstore import kernels
from kvstore.codec import Codec, Encoded, LayerSegments, SegmentPlan, layers_per_group
from kvstore.codecs import lossless_fixed, lossless_planes, lossless_tables
from kvstore.container import PART_KV, check_segment, segment_label
from kvstore.errors import CodecError, ContainerError
from kvstore.outcome import Reason
from kvstore.spec import KVArrays, KVSpec, layer_groups

HEAD_BYTES_MAX = 0xFFFFFFFF
_FORMATS = {module.FORMAT: module.decode for module in (lossless_planes, lossless_fixed, lossless_tables)}


class LosslessCodec(Codec):
    """Writes four-bit exponent codes, or entropy-coded ones for element types that have no room for such codes.

    Decoding allocates, beyond the caller's arrays, at most three times the segment's layers.
    """

    id = "lossless"
    exact = True

    def plan(self, spec: KVSpec, tokens: int) -> tuple[SegmentPlan, ...]:
        """One segment a layer group; the bound is the directory and every element as it is."""
        if tokens * max(spec.key_dim, spec.value_dim) * spec.itemsize > HEAD_BYTES_MAX:
            raise CodecError(f"{self.id} stores heads of at most {HEAD_BYTES_MAX} bytes; use smaller chunks")
        return tuple(
            SegmentPlan(0, PART_KV, start, stop, lossless_fixed.bytes_max(spec, tokens, layers=stop - start))
            for start, stop in layer_groups(spec.layers, layers_per_group(spec, tokens))
        )

    def encode(self, plan: SegmentPlan, arrays: KVArrays, spec: KVSpec, target: memoryview) -> Encoded:
        """Write the layers of `plan` in the format that suits their type, never larger than `plan.bytes_max`."""
        layers = arrays[slice(*plan.layers)]
        nbytes = lossless_tables.encode(target, layers, spec) if self.wants_tables(spec) else 0
        block_format = lossless_tables.FORMAT
        if not nbytes:
            nbytes = lossless_fixed.encode(target, layers)
            block_format = lossless_fixed.FORMAT
        return Encoded(nbytes, kernels.xxh3(target[:nbytes]), bytes([block_format]))

    def wants_tables(self, spec: KVSpec) -> bool:
        """Whether to write format 3: four-bit codes gain nothing where mantissa bits share the exponent's byte."""
        return spec.dtype not in ("bfloat16", "float32")

    def decode(self, segments: LayerSegments, arrays: KVArrays, spec: KVSpec) -> None:
        """Check the segment's hash, then fill its layers."""
        if len(segments) != 1 or segments[0][0].part != PART_KV or segments[0][0].level != 0:
            raise ContainerError(Reason.MALFORMED, f"{self.id} has one segment a layer group: level 0, part KV")
        segment, data = segments[0]
        decode = _FORMATS.get(segment.params[0])
        if decode is None or any(segment.params[1:]):
            raise ContainerError(Reason.UNKNOWN_CODEC, f"{segment_label(segment)} has block format {segment.params[0]}")
        check_segment(segment, data)
        try:
            decode(data, arrays[slice(*segment.layers)], spec)
        except ContainerError as error:
            raise ContainerError(error.reason, f"{segment_label(segment)}: {error.detail}") from error
