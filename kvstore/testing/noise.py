"""A codec that does a known amount of harm, to test what judges codecs: level 0 is noisy, level 1 exact.

Register one under its id to have connectors and commands find it:

    entry = EntryPoint("noise", "kvstore.testing.noise:NoiseCodec", registry.GROUP)
    monkeypatch.setitem(registry._entries(), "noise", entry)
"""

from __future__ import annotations

import numpy as np

from kvstore import kernels
from kvstore.codec import Codec, Encoded, LayerSegments, SegmentPlan
from kvstore.codecs.floats import from_float32, to_float32
from kvstore.container import PART_KV, check_segment
from kvstore.keys import ROOT
from kvstore.spec import Bits, KVArrays, KVSpec

DEVIATION_DEFAULT = 0.001


class NoiseCodec(Codec):
    """Level 0 is K and V with Gaussian noise of `deviation` times their own deviation, level 1 K and V as they were.

    The noise is the same for the same values. One layer group has all layers.
    """

    id = "noise"
    exact = False

    def __init__(self, profile: bytes = ROOT, *, deviation: float = DEVIATION_DEFAULT) -> None:
        super().__init__(profile)
        self.deviation = deviation
        self.variant = "" if deviation == DEVIATION_DEFAULT else f"deviation={deviation:g}"

    def plan(self, spec: KVSpec, tokens: int) -> tuple[SegmentPlan, ...]:
        nbytes = spec.chunk_bytes(tokens)
        return tuple(SegmentPlan(level, PART_KV, 0, spec.layers, nbytes) for level in (0, 1))

    def encode(self, plan: SegmentPlan, arrays: KVArrays, spec: KVSpec, target: memoryview) -> Encoded:
        bits = _flat(arrays)
        if plan.level == 0:
            bits = [self._noisy(array, spec) for array in bits]
        nbytes = sum(array.nbytes for array in bits)
        return Encoded(nbytes, kernels.gather_xxh3(target[:nbytes], bits))

    def decode(self, segments: LayerSegments, arrays: KVArrays, spec: KVSpec) -> None:
        segment, data = segments[-1]
        check_segment(segment, data)
        kernels.scatter_xxh3(_flat(arrays), data)

    def _noisy(self, bits: Bits, spec: KVSpec) -> Bits:
        values = to_float32(bits, spec.dtype)
        noise = np.random.default_rng(kernels.xxh3(np.ascontiguousarray(bits))).standard_normal(values.shape)
        return from_float32((values + self.deviation * values.std() * noise).astype(np.float32), spec.dtype)


def _flat(arrays: KVArrays) -> list[Bits]:
    return [array for pair in arrays for array in pair]
