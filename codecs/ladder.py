"""`ladder`: four qualities of K and V as byte prefixes of one object, 1.2 to 5.8 bits an element, calibrated fewer.

    undo the rotary embedding - set exact tokens apart - centre - transform - quantise - code

Each value is quantised to n = round(y / step) at the finest of four steps that shrink by 3, and every level's value
is that of the next one divided by 3 and rounded, so a level adds one ternary digit (ladder_classes) and costs nothing
against a quantiser made for its step alone (successive refinement, Equitz and Cover 1991). Without a profile
components are channels and their scales travel with the chunk; a profile (ladder_profile) sets means, a
Karhunen-Loeve basis over one head, all heads of a layer or of several, error weights and trained tables.

The integers are the same on every machine. Without a profile so are the numbers decoded; with a basis they are the
result of an fp32 matrix product. docs/codecs.md and docs/format.md tell the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from kvstore import kernels
from kvstore.codec import Codec, Encoded, LayerSegments, SegmentPlan
from kvstore.codecs import profiles
from kvstore.codecs.ladder_bank import Bank, parametric
from kvstore.codecs.ladder_classes import LEVELS, SHIFT_MAX
from kvstore.codecs.ladder_group import GroupCoder, OpenedGroup, group_arrays
from kvstore.codecs.ladder_profile import LadderProfile
from kvstore.codecs.ladder_segment import RAW, Params
from kvstore.container import PART_KV, ChunkMeta, check_segment, segment_label
from kvstore.errors import CodecError, ContainerError
from kvstore.keys import ROOT
from kvstore.outcome import Reason
from kvstore.spec import KVArrays, KVSpec, layer_groups

GROUP_BYTES = 4 << 20
"""Layers are grouped until their uncompressed KV reaches this size: about 1 MiB at the finest level."""


class LadderCodec(Codec):
    """Lossy; `levels` quality levels. See the module's text.

    Args:
        profile: id of a calibrated profile; ROOT for none.
        shift: move the base step by 3**(shift / 8); None for the profile's choice. Larger is coarser.
    """

    id = "ladder"
    exact = False
    levels = LEVELS

    def __init__(self, profile: bytes = ROOT, *, shift: int | None = None) -> None:
        self.profile = profile
        self._tables = None if profile == ROOT else LadderProfile(profiles.get(profile))
        self._bank = parametric() if self._tables is None else self._tables.bank
        default = 0 if self._tables is None else self._tables.shift
        self.shift = default if shift is None else shift
        if not -SHIFT_MAX <= self.shift <= SHIFT_MAX:
            raise CodecError(f"shift is {self.shift}; it must be in -{SHIFT_MAX}..{SHIFT_MAX}")
        self.variant = "" if self.shift == default else f"shift {self.shift:+d}"

    @property
    def mixes_heads(self) -> bool:
        """Whether a head can only be decoded together with the others of its layer group."""
        return self._tables is not None and self._tables.mixes_heads

    def plan(self, spec: KVSpec, tokens: int) -> tuple[SegmentPlan, ...]:
        """One segment a level and layer group; a group that gains too little is raw, which bounds level 0."""
        if self._tables is not None and not _same_geometry(self._tables.spec, spec):
            raise CodecError(f"profile {self.profile.hex()[:12]} is of another model geometry; calibrate this model")
        layer_bytes = spec.layer_bytes(tokens)
        whole = 1 if self._tables is None else self._tables.layers
        layers = max(1, GROUP_BYTES // max(1, layer_bytes) // whole) * whole
        groups = list(layer_groups(spec.layers, layers))
        return tuple(
            SegmentPlan(level, PART_KV, start, stop, (stop - start) * _bytes_max(level, layer_bytes, spec.itemsize))
            for level in range(LEVELS)
            for start, stop in groups
        )

    def encoder(self, meta: ChunkMeta, arrays: KVArrays) -> Callable[[SegmentPlan, memoryview], Encoded]:
        """Writes segments of one chunk; a group is quantised once, when its first segment is asked for."""
        waiting: dict[tuple[int, int], dict[int, tuple[Params, bytes]]] = {}
        sizes = meta.spec.layer_bytes(meta.tokens), meta.spec.itemsize

        def bounds_of(plan: SegmentPlan) -> list[int]:
            return [(plan.layer_stop - plan.layer_start) * _bytes_max(level, *sizes) for level in range(LEVELS)]

        def write(plan: SegmentPlan, target: memoryview) -> Encoded:
            if plan.layers not in waiting:
                group = self._group(meta.spec, meta.tokens, plan.layers)
                params, levels = group.encode(arrays, meta.first_position, self.shift, bounds_of(plan))
                waiting[plan.layers] = {level: (params, data) for level, data in enumerate(levels)}
            params, data = waiting[plan.layers].pop(plan.level)
            if not waiting[plan.layers]:
                del waiting[plan.layers]
            if params.kind == RAW and plan.level == 0:
                xxh3 = kernels.gather_xxh3(target[: bounds_of(plan)[0]], group_arrays(arrays, plan.layers))
                return Encoded(bounds_of(plan)[0], xxh3, params.pack())
            return Encoded(len(data), kernels.copy_xxh3(target[: len(data)], data), params.pack())

        return write

    def encode(self, plan: SegmentPlan, arrays: KVArrays, spec: KVSpec, target: memoryview) -> Encoded:
        """Write one segment alone, as for a chunk at position 0; `encoder` shares the work of a group's levels."""
        meta = ChunkMeta(fingerprint=ROOT, key=ROOT, spec=spec, tokens=arrays[0][0].shape[1])
        return self.encoder(meta, arrays)(plan, target)

    def decode(
        self, segments: LayerSegments, arrays: KVArrays, spec: KVSpec, *, first_position: int | None = None
    ) -> None:
        """Fill one layer group from its lowest levels, as many as are given.

        Args:
            segments: levels 0, 1, ... of one group; the last is the quality.
            arrays: of all layers.
            spec: geometry of the arrays.
            first_position: where in a prompt the first token goes; None for where it was encoded.

        Raises:
            ContainerError: a segment is damaged or missing, or the profile is of another model.
            CodecError: the chunk cannot be moved, for its rope is unknown.
        """
        params = self._params(segments, spec)
        group = self._group(spec, arrays[0][0].shape[1], segments[0][0].layers)
        group.decode(params, [data for _, data in segments], arrays, first_position)

    def decode_on_device(
        self, groups: Sequence[LayerSegments], tensors: Sequence[tuple[Any, Any]], spec: KVSpec
    ) -> None:
        """`decode` of many layer groups, into torch tensors on a device; see `kvstore.codec.DecodesOnDevice`."""
        from kvstore.codecs import ladder_device

        ladder_device.decode(self, groups, tensors, spec)

    @property
    def bank(self) -> Bank:
        """Tables and centroids that this instance codes with."""
        return self._bank

    def open(
        self, segments: LayerSegments, spec: KVSpec, tokens: int, first_position: int | None
    ) -> OpenedGroup | None:
        """What the segments of a layer group hold, verified, before entropy decoding; None for a raw group.

        Raises what `decode` raises.
        """
        params = self._params(segments, spec)
        if params.kind == RAW:
            return None
        group = self._group(spec, tokens, segments[0][0].layers)
        return group.open(params, [data for _, data in segments], first_position)

    def _params(self, segments: LayerSegments, spec: KVSpec) -> Params:
        if self._tables is not None and not _same_geometry(self._tables.spec, spec):
            raise ContainerError(Reason.UNKNOWN_PROFILE, f"profile {self.profile.hex()[:12]} is of another model")
        return _check(segments, spec)

    def _group(self, spec: KVSpec, tokens: int, layers: tuple[int, int]) -> GroupCoder:
        return GroupCoder(spec, tokens, layers, self._bank, self._tables)


def _check(segments: LayerSegments, spec: KVSpec) -> Params:
    """The group's parameters, once every segment has been verified."""
    if [(segment.level, segment.part) for segment, _ in segments] != [(i, PART_KV) for i in range(len(segments))]:
        raise ContainerError(Reason.MALFORMED, "ladder needs levels 0 to the wanted one of a layer group, part KV")
    if not 1 <= len(segments) <= LEVELS:
        raise ContainerError(Reason.MALFORMED, f"ladder has 1 to {LEVELS} levels, not {len(segments)}")
    first = segments[0][0]
    if any(segment.layers != first.layers or segment.params != first.params for segment, _ in segments):
        raise ContainerError(Reason.MALFORMED, f"{segment_label(first)} and the levels above it do not belong together")
    for segment, data in segments:
        check_segment(segment, data)
    params = Params.parse(first.params)
    if params.kind == RAW and any(len(data) for _, data in segments[1:]):
        raise ContainerError(Reason.MALFORMED, f"{segment_label(first)} is raw; the levels above it must be empty")
    return params


def _same_geometry(one: KVSpec, other: KVSpec) -> bool:
    """Whether a profile made for one spec serves the other: all is equal but perhaps the dtype."""
    fields = ("layers", "kv_heads", "key_dim", "value_dim", "attention", "rope")
    return all(getattr(one, field) == getattr(other, field) for field in fields)


def _bytes_max(level: int, layer_bytes: int, itemsize: int) -> int:
    """Bound of a layer's bytes at a level: raw at level 0, 2 bits an element above."""
    return layer_bytes if level == 0 else -(-layer_bytes // itemsize // 4) + 64
