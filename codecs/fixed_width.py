"""`int8`, `int4` and `fp8`: a fixed number of bits an element, for engines that want next to no decoding work.

Integers are grouped as in KIVI (Liu et al., ICML 2024): K per channel over runs of tokens, V per token over runs of
channels, because K has outlier channels and V has not. A group of values has a lowest one and a step, both fp16,

    value = lowest + integer * step        |decoded - value| <= step / 2, and the rounding to the model's type
    step <= (highest - lowest) / (2**bits - 1), rounded up, lowest rounded down

`int8` takes runs of 64 (8.5 bits an element), `int4` of 32 (5.0). `fp8` writes float8_e4m3 with one fp32 scale a head,
its largest value / 448 (8.0 bits); |decoded - value| <= max(|value| / 16, scale / 1024) and the rounding to the model's
type. Elements that are float8 already pass through.

A segment holds, for each of its layers, K then V, one block a head, so that heads are separable:

    int8, int4   lowest fp16 and then step fp16 of every group, the groups in the order run, channel for K and
                 token, run for V; then the integers, token, dimension, those of 4 bits two to a byte, the first in
                 the low half, a token's row filled to a whole byte
    fp8          the scale, then one byte an element

A layer group with a value that is not finite, or with one beyond fp16 for the integers, has its elements as they are.
Parameters: 1 for coded or 2 for raw, then zeros.
"""

from __future__ import annotations

from abc import abstractmethod

import numpy as np

from kvstore import kernels
from kvstore.codec import Codec, Encoded, LayerSegments, SegmentPlan, layers_per_group
from kvstore.codecs import cursor
from kvstore.codecs.fixed_width_groups import Bytes, Float32, GroupShape, decode_groups, encode_groups
from kvstore.codecs.floats import from_float32, to_float32
from kvstore.container import PART_KV, check_segment, segment_label
from kvstore.errors import ContainerError
from kvstore.outcome import Reason
from kvstore.spec import Bits, KVArrays, KVSpec, layer_groups

CODED, RAW = 1, 2
_E4M3_MAX = 448.0
_SCALE_BYTES = 4


class FixedWidthCodec(Codec):
    """What the three have in common: one segment a layer group, blocks of a size known beforehand, raw where one cannot
    be."""

    exact = False

    @abstractmethod
    def block_bytes(self, index: int, tokens: int, dim: int) -> int:
        """Bytes of one head of K (0) or V (1)."""

    @abstractmethod
    def encode_part(self, values: Float32, index: int) -> Bytes | None:
        """Blocks (heads, bytes) of finite K (0) or V (1), (heads, tokens, dim); None if they cannot be written."""

    @abstractmethod
    def decode_part(self, blocks: Bytes, index: int, tokens: int, dim: int) -> Float32:
        """Undo `encode_part`. Any bytes may come; numbers that are not finite are refused by the caller."""

    def stores_raw(self, spec: KVSpec) -> bool:
        """Whether elements of this type are kept as they are."""
        return False

    def plan(self, spec: KVSpec, tokens: int) -> tuple[SegmentPlan, ...]:
        """One segment a layer group; the bound is that of raw elements or, for tiny heads, of the blocks."""
        layer_bytes = max(spec.layer_bytes(tokens), self._layer_bytes(spec, tokens))
        return tuple(
            SegmentPlan(0, PART_KV, start, stop, (stop - start) * layer_bytes)
            for start, stop in layer_groups(spec.layers, layers_per_group(spec, tokens))
        )

    def encode(self, plan: SegmentPlan, arrays: KVArrays, spec: KVSpec, target: memoryview) -> Encoded:
        """Write the layers of `plan`."""
        own = [array for pair in arrays[slice(*plan.layers)] for array in pair]
        tokens = own[0].shape[1]
        nbytes = (plan.layer_stop - plan.layer_start) * self._layer_bytes(spec, tokens)
        raw_bytes = sum(array.nbytes for array in own)
        pieces: list[Bytes] = []
        if not self.stores_raw(spec) and nbytes < raw_bytes:
            for at, array in enumerate(own):
                blocks = self._encode_array(array, at % 2, spec)
                if blocks is None:
                    break
                pieces.append(blocks)
        if len(pieces) < len(own):
            return Encoded(raw_bytes, kernels.gather_xxh3(target[:raw_bytes], own), bytes([RAW]))
        cursor.write(target, pieces)
        return Encoded(nbytes, kernels.xxh3(target[:nbytes]), bytes([CODED]))

    def decode(self, segments: LayerSegments, arrays: KVArrays, spec: KVSpec) -> None:
        """Check the segment's hash, then fill its layers."""
        if len(segments) != 1 or segments[0][0].part != PART_KV or segments[0][0].level != 0:
            raise ContainerError(Reason.MALFORMED, f"{self.id} has one segment a layer group: level 0, part KV")
        segment, data = segments[0]
        label = segment_label(segment)
        own = [array for pair in arrays[slice(*segment.layers)] for array in pair]
        if segment.params[0] not in (CODED, RAW) or any(segment.params[1:]):
            raise ContainerError(Reason.MALFORMED, f"{label} has unknown parameters")
        coded = segment.params[0] == CODED
        sizes = [
            self.block_bytes(at % 2, *array.shape[1:]) * len(array) if coded else array.nbytes
            for at, array in enumerate(own)
        ]
        if segment.length != sum(sizes):
            raise ContainerError(Reason.MALFORMED, f"{label} has {segment.length} bytes; expected {sum(sizes)}")
        check_segment(segment, data)
        if not coded:
            kernels.scatter_xxh3(own, data)
            return
        reader = cursor.Cursor(data)
        for at, (array, nbytes) in enumerate(zip(own, sizes, strict=True)):
            heads, tokens, dim = array.shape
            with np.errstate(over="ignore", invalid="ignore"):  # a forged segment may say any number
                values = self.decode_part(reader.take(nbytes).reshape(heads, -1), at % 2, tokens, dim)
            if not np.isfinite(values).all():
                raise ContainerError(Reason.MALFORMED, f"{label} has a value that is not finite")
            array[...] = from_float32(values, spec.dtype)

    def _encode_array(self, array: Bits, index: int, spec: KVSpec) -> Bytes | None:
        values = to_float32(array, spec.dtype)
        return self.encode_part(values, index) if np.isfinite(values).all() else None

    def _layer_bytes(self, spec: KVSpec, tokens: int) -> int:
        dims = (spec.key_dim, spec.value_dim)
        return spec.kv_heads * sum(self.block_bytes(index, tokens, dim) for index, dim in enumerate(dims))


class Int8Codec(FixedWidthCodec):
    """Eight-bit integers in groups of 64: 8.5 bits an element."""

    id = "int8"
    bits = 8
    group = 64

    def block_bytes(self, index: int, tokens: int, dim: int) -> int:
        """Lowest values, steps and integers."""
        return GroupShape(index, tokens, dim, self.bits, self.group).nbytes

    def encode_part(self, values: Float32, index: int) -> Bytes | None:
        """Blocks of integers."""
        _, tokens, dim = values.shape
        return encode_groups(values, GroupShape(index, tokens, dim, self.bits, self.group))

    def decode_part(self, blocks: Bytes, index: int, tokens: int, dim: int) -> Float32:
        """Values of integers."""
        return decode_groups(blocks, GroupShape(index, tokens, dim, self.bits, self.group))


class Int4Codec(Int8Codec):
    """Four-bit integers in groups of 32: 5.0 bits an element."""

    id = "int4"
    bits = 4
    group = 32


class Fp8Codec(FixedWidthCodec):
    """float8_e4m3 with a scale a head: 8 bits an element. float8 elements pass through."""

    id = "fp8"

    def stores_raw(self, spec: KVSpec) -> bool:
        """float8 of either kind is kept bit for bit."""
        return spec.itemsize == 1

    def block_bytes(self, index: int, tokens: int, dim: int) -> int:
        """The scale and the elements."""
        return _SCALE_BYTES + tokens * dim

    def encode_part(self, values: Float32, index: int) -> Bytes | None:
        """Blocks of a scale and elements."""
        heads = len(values)
        largest = np.abs(values).max(axis=(1, 2), initial=0.0)
        scales = np.where(largest > 0, largest / np.float32(_E4M3_MAX), np.float32(1.0)).astype("<f4")
        if (scales == 0).any():
            return None
        elements = from_float32(values / scales[:, None, None], "float8_e4m3").astype(np.uint8)
        return np.concatenate([scales.view(np.uint8).reshape(heads, -1), elements.reshape(heads, -1)], axis=1)

    def decode_part(self, blocks: Bytes, index: int, tokens: int, dim: int) -> Float32:
        """Values of scales and elements."""
        scales = np.ascontiguousarray(blocks[:, :_SCALE_BYTES]).view("<f4").reshape(-1, 1, 1)
        values = to_float32(blocks[:, _SCALE_BYTES:].reshape(len(blocks), tokens, dim), "float8_e4m3")
        scaled: Float32 = values * scales.astype(np.float32)
        return scaled
