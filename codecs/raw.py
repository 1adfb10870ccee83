"""`raw`: K and V as they are, one segment a layer group, in canonical order."""

from __future__ import annotations

from kvstore import kernels
from kvstore.codec import Codec, Encoded, LayerSegments, SegmentPlan, layers_per_group
from kvstore.container import PART_KV, segment_label
from kvstore.errors import ContainerError
from kvstore.outcome import Reason
from kvstore.spec import Bits, KVArrays, KVSpec, layer_groups


class RawCodec(Codec):
    """Stores the bits unchanged.

    A segment is, for each of its layers, K then V, each in the order head, token, dimension, without gaps. Encoding
    parameters: 16 zero bytes. Hashing and copying are one pass in both directions.
    """

    id = "raw"
    exact = True

    def plan(self, spec: KVSpec, tokens: int) -> tuple[SegmentPlan, ...]:
        """One segment a layer group; the bounds are exact."""
        layer_bytes = spec.layer_bytes(tokens)
        return tuple(
            SegmentPlan(
                level=0, part=PART_KV, layer_start=start, layer_stop=stop, bytes_max=(stop - start) * layer_bytes
            )
            for start, stop in layer_groups(spec.layers, layers_per_group(spec, tokens))
        )

    def encode(self, plan: SegmentPlan, arrays: KVArrays, spec: KVSpec, target: memoryview) -> Encoded:
        """Gather the layers of `plan` into `target`, hashing on the way."""
        xxh3 = kernels.gather_xxh3(target[: plan.bytes_max], _group(arrays, plan.layers))
        return Encoded(plan.bytes_max, xxh3)

    def decode(self, segments: LayerSegments, arrays: KVArrays, spec: KVSpec) -> None:
        """Scatter one segment into the arrays of its layers, hashing on the way."""
        if len(segments) != 1 or segments[0][0].part != PART_KV or segments[0][0].level != 0:
            raise ContainerError(Reason.MALFORMED, "raw has exactly one segment a layer group: level 0, part KV")
        segment, data = segments[0]
        group = _group(arrays, segment.layers)
        expected = sum(array.nbytes for array in group)
        if segment.length != expected or any(segment.params):
            raise ContainerError(Reason.MALFORMED, f"{segment_label(segment)} is not {expected} raw bytes")
        if len(data) != segment.length:
            raise ContainerError(
                Reason.TRUNCATED, f"{segment_label(segment)} has {len(data)} of {segment.length} bytes"
            )
        if kernels.scatter_xxh3(group, data) != segment.xxh3:
            raise ContainerError(Reason.CORRUPT, segment_label(segment))


def _group(arrays: KVArrays, layers: tuple[int, int]) -> list[Bits]:
    return [array for pair in arrays[slice(*layers)] for array in pair]
