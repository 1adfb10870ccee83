"""`cachegen`: the codec of CacheGen (Liu et al., SIGCOMM 2024), as the paper describes it, on R32.

Deltas against the anchor of every ten tokens, coarser bins in deeper layers, 8-bit anchors, entropy coding with static
distributions from a profile; without a profile the distributions are measured on the chunk and stored with it. Quality
levels are scalings of the bins and separate objects: `scaling` 2, 1, 0.5, 0.25 are the usual four.

A segment has, first for K and then for V:

    steps      fp32 a layer: width of the bins
    channels   u8 a channel, layer, head, channel: anchors' class | deltas' class << 4     only without a profile
    means      i8 a channel: mean of the anchors' integers                                 only without a profile
    scales     bfloat16 a layer, head, anchor
    anchors, then deltas, each:
      tables   as `kvstore.codecs.stored_tables`                                           only without a profile
      lengths  u32 a tile (head of a layer), then the R32 tiles; symbols in the order token, channel
      escapes  u32 how many, i32 positions among the part's integers, i32 integers

symbol = integer + 128; an anchor's less its channel's mean, modulo 256. Values are anchor = integer * scale and anchor
+ integer * step, fp32, rounded to the model's type. A group with values that are not finite or absurdly large, or that
would not become smaller, has its elements as they are. Parameters: 1 for coded or 2 for raw, 1 if a profile was used,
zeros.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvstore import kernels
from kvstore.codec import Codec, Encoded, LayerSegments, SegmentPlan, layers_per_group
from kvstore.codecs import profiles, stored_tables
from kvstore.codecs.cachegen_classes import (
    ANCHORS_LOWEST,
    CLASSES,
    DELTAS_LOWEST,
    ZERO,
    CacheGenProfile,
    centre,
    class_of,
    step_of,
    symbols_of,
)
from kvstore.codecs.cachegen_part import Anchors, Bytes, Float32, Int32, Shape, deltas_of, quantise_anchors, rebuild
from kvstore.codecs.cursor import Cursor, write
from kvstore.codecs.floats import from_float32, to_float32
from kvstore.codecs.r32 import TableSet, coder
from kvstore.container import PART_KV, check_segment, segment_label
from kvstore.errors import CodecError, ContainerError
from kvstore.keys import ROOT
from kvstore.outcome import Reason
from kvstore.spec import KVArrays, KVSpec, layer_groups

CODED, RAW = 1, 2
SCALINGS = (2.0, 1.0, 0.5, 0.25)
"""The usual quality levels, coarsest first."""

VALUE_MAX = 2.0**60
"""Numbers from here on are no keys or values of a working model, and would overflow on the way."""

_INTEGER_MAX = 1 << 30


class CacheGenCodec(Codec):
    """Lossy; one quality an object.

    Args:
        profile: id of a profile with CacheGen's tables; ROOT for none.
        scaling: factor on the widths of all bins; smaller is finer and larger.
    """

    id = "cachegen"
    exact = False

    def __init__(self, profile: bytes = ROOT, *, scaling: float = 1.0) -> None:
        if not 2.0**-10 <= scaling <= 2.0**10:
            raise CodecError(f"scaling is {scaling}; it must be in 2**-10..2**10")
        self.profile = profile
        self.scaling = scaling
        self.variant = "" if scaling == 1.0 else f"scaling {scaling:g}"
        self._tables = None if profile == ROOT else CacheGenProfile(profiles.get(profile))

    def plan(self, spec: KVSpec, tokens: int) -> tuple[SegmentPlan, ...]:
        """One segment a layer group, never larger than the group's elements as they are."""
        layer_bytes = spec.layer_bytes(tokens)
        return tuple(
            SegmentPlan(0, PART_KV, start, stop, (stop - start) * layer_bytes)
            for start, stop in layer_groups(spec.layers, layers_per_group(spec, tokens))
        )

    def encode(self, plan: SegmentPlan, arrays: KVArrays, spec: KVSpec, target: memoryview) -> Encoded:
        """Write the layers of `plan`, coded if that is possible and smaller, else as they are."""
        own = arrays[slice(*plan.layers)]
        pieces = self._pieces(own, plan.layer_start, spec)
        if pieces is None or sum(piece.nbytes for piece in pieces) >= plan.bytes_max:
            xxh3 = kernels.gather_xxh3(target[: plan.bytes_max], [array for pair in own for array in pair])
            return Encoded(plan.bytes_max, xxh3, bytes([RAW, 0]))
        nbytes = write(target, pieces)
        return Encoded(nbytes, kernels.xxh3(target[:nbytes]), bytes([CODED, self._tables is not None]))

    def decode(self, segments: LayerSegments, arrays: KVArrays, spec: KVSpec) -> None:
        """Check the segment's hash, then fill its layers."""
        if len(segments) != 1 or segments[0][0].part != PART_KV or segments[0][0].level != 0:
            raise ContainerError(Reason.MALFORMED, "cachegen has one segment a layer group: level 0, part KV")
        segment, data = segments[0]
        label = segment_label(segment)
        kind, calibrated = segment.params[:2]
        if kind not in (CODED, RAW) or any(segment.params[2:]) or calibrated not in (0, 1):
            raise ContainerError(Reason.MALFORMED, f"{label} has unknown parameters")
        check_segment(segment, data)
        own = arrays[slice(*segment.layers)]
        if kind == RAW:
            flat = [array for pair in own for array in pair]
            if len(data) != sum(array.nbytes for array in flat):
                raise ContainerError(Reason.MALFORMED, f"{label} is not the size of its elements")
            kernels.scatter_xxh3(flat, data)
            return
        if bool(calibrated) != (self._tables is not None):
            raise ContainerError(
                Reason.UNKNOWN_PROFILE, f"{label} was written {'with' if calibrated else 'without'} one"
            )
        cursor = Cursor(data)
        for index in (0, 1):
            part = [pair[index] for pair in own]
            values = self._decode_part(cursor, part[0].shape, index, segment.layers, spec)
            for array, numbers in zip(part, values, strict=True):
                array[...] = from_float32(numbers, spec.dtype)
        cursor.end()

    def _pieces(self, layers: KVArrays, first_layer: int, spec: KVSpec) -> list[Bytes] | None:
        """The parts of a coded segment; None if a value cannot be coded."""
        pieces: list[Bytes] = []
        for index in (0, 1):
            values = np.stack([to_float32(pair[index], spec.dtype) for pair in layers])
            coded = self._encode_part(values, index, first_layer, spec) if (np.abs(values) < VALUE_MAX).all() else None
            if coded is None:
                return None
            pieces += coded
        return pieces

    def _encode_part(self, values: Float32, index: int, first_layer: int, spec: KVSpec) -> list[Bytes] | None:
        """The pieces of K or V, values being (layers, heads, tokens, dim); None if a delta has too many bins."""
        layers = values.shape[0]
        shape = Shape(*values.shape)
        flat = values.reshape(shape.tiles, shape.tokens, shape.dim)
        anchors = quantise_anchors(flat)
        deltas = deltas_of(flat, anchors)
        channels = self._known(shape, index, first_layer, spec)
        deviation = _spread(deltas) if channels is None else channels.deviation
        by_layer = deviation.reshape(layers, -1)
        steps = np.asarray(
            [step_of(own, self.scaling, first_layer + i, spec.layers) for i, own in enumerate(by_layer)],
            dtype=np.float32,
        )
        step = np.repeat(steps, shape.heads)[:, None, None]
        with np.errstate(over="ignore"):
            bins = np.rint(deltas / step)
        if not (np.abs(bins) < _INTEGER_MAX).all():
            return None
        integers = bins.astype(np.int32)
        delta_classes = class_of(deviation / step[:, 0], DELTAS_LOWEST)
        if channels is None:
            mean = np.rint(anchors.values.mean(axis=1)).astype(np.int32)
            anchor_classes = class_of(anchors.values.std(axis=1).astype(np.float32), ANCHORS_LOWEST)
        else:
            mean, anchor_classes = channels.mean, channels.anchor_classes
        centred = centre(anchors.values, mean)
        head = [steps.view(np.uint8)]
        scales = anchors.scales.astype("<u2").view(np.uint8)
        if self._tables is not None:
            coded = _code(shape, centred, anchor_classes, self._tables.anchors)
            return [*head, scales, *coded, *_code(shape, integers, delta_classes, self._tables.deltas)]
        anchor_tables, anchor_ids = _tables_for(centred, anchor_classes)
        delta_tables, delta_ids = _tables_for(integers, delta_classes)
        return [
            *head,
            anchor_ids | delta_ids << 4,
            mean.astype(np.int8).view(np.uint8),
            scales,
            stored_tables.pack(anchor_tables),
            *_code(shape, centred, anchor_ids, anchor_tables),
            stored_tables.pack(delta_tables),
            *_code(shape, integers, delta_ids, delta_tables),
        ]

    def _decode_part(
        self, cursor: Cursor, array_shape: tuple[int, ...], index: int, layers: tuple[int, int], spec: KVSpec
    ) -> Float32:
        heads, tokens, dim = array_shape
        shape = Shape(layers[1] - layers[0], heads, tokens, dim)
        steps = cursor.take(4 * shape.layers).view("<f4").astype(np.float32)
        if not (np.isfinite(steps).all() and (steps > 0).all()):
            raise ContainerError(Reason.MALFORMED, "a step is not a positive number")
        channels = self._known(shape, index, layers[0], spec)
        step = np.repeat(steps, heads)[:, None, None]
        if channels is None:
            ids = cursor.take(shape.tiles * dim).reshape(shape.tiles, dim)
            anchor_ids, delta_ids = ids & np.uint8(15), ids >> np.uint8(4)
            mean = cursor.take(shape.tiles * dim).view(np.int8).astype(np.int32).reshape(shape.tiles, dim)
        else:
            anchor_ids, mean = channels.anchor_classes, channels.mean
            delta_ids = class_of(channels.deviation / step[:, 0], DELTAS_LOWEST)
        scales = cursor.take(2 * shape.tiles * shape.groups).view("<u2").reshape(shape.tiles, shape.groups)
        if (scales >= 0x7F80).any():
            raise ContainerError(Reason.MALFORMED, "a scale is not a positive number")
        anchor_tables = stored_tables.unpack(cursor) if self._tables is None else self._tables.anchors
        centred = _decode(cursor, shape, shape.groups, anchor_ids, anchor_tables)
        delta_tables = stored_tables.unpack(cursor) if self._tables is None else self._tables.deltas
        integers = _decode(cursor, shape, shape.deltas, delta_ids, delta_tables)
        anchors = Anchors(centre(centred, -mean), scales.astype(np.uint16))
        with np.errstate(over="ignore", invalid="ignore"):  # a forged segment may say any number
            values = rebuild(shape, anchors, integers.astype(np.float32) * step)
        if not np.isfinite(values).all():
            raise ContainerError(Reason.MALFORMED, "a value is not finite")
        return values.reshape(shape.layers, heads, tokens, dim)

    def _known(self, shape: Shape, index: int, first_layer: int, spec: KVSpec) -> _Channels | None:
        """What the profile says of these channels, (tiles, dim) each."""
        if self._tables is None:
            return None
        part = self._tables.part(index, spec)
        own = slice(first_layer, first_layer + shape.layers)
        flat = (shape.tiles, shape.dim)
        return _Channels(
            part.deviation[own].reshape(flat),
            part.mean[own].reshape(flat).astype(np.int32),
            part.classes[own].reshape(flat),
        )


@dataclass(frozen=True)
class _Channels:
    deviation: Float32
    mean: Int32
    anchor_classes: Bytes


def _spread(deltas: Float32) -> Float32:
    """Root of the mean square of each channel, (tiles, dim)."""
    rows = max(1, deltas.shape[1])
    spread: Float32 = np.sqrt(np.square(deltas, dtype=np.float64).sum(axis=1) / rows).astype(np.float32)
    return spread


def _tables_for(integers: Int32, classes: Bytes) -> tuple[TableSet, Bytes]:
    """Tables of the integers in each class, and the table of each channel, (tiles, dim)."""
    rows = np.broadcast_to(classes[:, None].astype(np.int64), integers.shape)
    fits = (integers >= -ZERO) & (integers < ZERO)
    index = (rows * 256 + integers + ZERO)[fits]
    counts = np.bincount(index, minlength=CLASSES * 256).astype(np.uint64).reshape(CLASSES, 256)
    tables, names = stored_tables.from_counts(counts)
    return tables, names[np.minimum(classes, len(names) - 1)]


def _code(shape: Shape, integers: Int32, ids: Bytes, tables: TableSet) -> list[Bytes]:
    """Lengths, tiles and escapes of the integers (tiles, rows, dim)."""
    symbols, positions, values = symbols_of(integers, ids, tables)
    stream, lengths = np.empty(0, dtype=np.uint8), np.zeros(shape.tiles, dtype=np.uint32)
    if symbols.size:
        layout = stored_tables.channel_layout(integers.shape[1], ids)
        stream = np.empty(layout.bytes_max, dtype=np.uint8)
        lengths = coder.encode(stream, symbols.reshape(-1), layout, tables)
    escapes = np.concatenate([np.asarray([len(positions)], dtype="<i4"), positions.astype("<i4"), values.astype("<i4")])
    return [lengths.astype("<u4").view(np.uint8), stream[: int(lengths.sum(dtype=np.int64))], escapes.view(np.uint8)]


def _decode(cursor: Cursor, shape: Shape, rows: int, ids: Bytes, tables: TableSet) -> Int32:
    """Undo `_code`."""
    if ids.size and int(ids.max()) >= len(tables):
        raise ContainerError(Reason.MALFORMED, f"table {ids.max()} of {len(tables)}")
    lengths = cursor.take(4 * shape.tiles).view("<u4").astype(np.uint32)
    stream = cursor.take(int(lengths.sum(dtype=np.int64)))
    symbols = np.empty(shape.tiles * rows * shape.dim, dtype=np.uint8)
    if not symbols.size and stream.size:
        raise ContainerError(Reason.MALFORMED, "a stream of nothing has bytes")
    if (
        symbols.size
        and not coder.decode(symbols, stream, lengths, stored_tables.channel_layout(rows, ids), tables).all()
    ):
        raise ContainerError(Reason.CORRUPT, "a stream is damaged")
    integers = symbols.astype(np.int32) - ZERO
    count = int(cursor.take(4).view("<u4")[0])
    positions = cursor.take(4 * count).view("<u4").astype(np.int64)
    values = cursor.take(4 * count).view("<i4")
    if (positions >= len(integers)).any() or (np.abs(values.astype(np.int64)) > _INTEGER_MAX).any():
        raise ContainerError(Reason.MALFORMED, "an escape is out of range")
    integers[positions] = values
    return integers.reshape(shape.tiles, rows, shape.dim)
