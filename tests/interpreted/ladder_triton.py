"""The ladder decoded into tensors by Triton's interpreter, on the CPU, against the host; see test_interpreted.py."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
import torch

from kvstore.bench.kv_samples import Samples, synthetic
from kvstore.bench.ladder_samples import ladder_profile
from kvstore.chunk import group_segments
from kvstore.codec import DecodesOnDevice, LayerSegments
from kvstore.codecs import ladder_device, ladder_loops, ladder_reference, ladder_segment
from kvstore.codecs.ladder import LadderCodec
from kvstore.codecs.ladder_classes import LEVELS
from kvstore.container import parse
from kvstore.errors import CodecError, ContainerError
from kvstore.kernels import xxh3
from kvstore.spec import DType, KVArrays, KVSpec, Rope
from kvstore.testing.lossy import gaussian, numbers, pack, unpack

ROPE = Rope(kind="default", theta=10000.0, dims=8)
SPEC = KVSpec(layers=2, kv_heads=1, key_dim=10, value_dim=4, dtype="bfloat16", rope=ROPE)
PRODUCT_ERROR = 2.0**-18
"""Of the largest number: what sums of the same products may differ by."""


def segments_of(container: bytes, level: int) -> list[LayerSegments]:
    view = memoryview(container)
    return list(group_segments(parse(view), view, level))


def on_device(
    codec: LadderCodec, spec: KVSpec, groups: list[LayerSegments], tokens: int, position: int | None = None
) -> KVArrays:
    """Bits of what was decoded into a part of larger tensors, as an engine's cache is."""
    dtype = ladder_device.DTYPES[spec.dtype]
    dims = spec.key_dim, spec.value_dim
    room = [[torch.zeros((2, spec.kv_heads, tokens + 3, dim), dtype=dtype) for dim in dims] for _ in range(spec.layers)]
    parts = [[own[1, :, 1 : tokens + 1] for own in pair] for pair in room]
    ladder_device.decode(codec, groups, [(keys, values) for keys, values in parts], spec, first_position=position)
    whole = torch.int16 if spec.itemsize == 2 else torch.int32
    keys, values = ([pair[part].view(whole).numpy().view(spec.bit_dtype) for pair in parts] for part in (0, 1))
    return list(zip(keys, values, strict=True))


def same(one: KVArrays, other: KVArrays) -> None:
    for pair, again in zip(one, other, strict=True):
        np.testing.assert_array_equal(pair[0], again[0])
        np.testing.assert_array_equal(pair[1], again[1])


@pytest.mark.parametrize(("dtype", "tokens"), [("float16", 15), ("float32", 13)])
def test_without_a_profile_the_bits_are_those_of_the_host(dtype: DType, tokens: int) -> None:
    spec = msgspec.structs.replace(SPEC, dtype=dtype)
    original = gaussian(spec, tokens)
    original[1][0][0, tokens // 2] *= 3
    original[1][1][0, :, 2] |= np.arange(tokens).astype(spec.bit_dtype) % 2 << (8 * spec.itemsize - 4)  # patches
    codec = LadderCodec(shift=3)
    container = pack(codec, spec, original, 0 if dtype == "float32" else 5)  # with sinks, and without
    assert codec.open(segments_of(container, 0)[0], spec, tokens, None) is not None
    for level in (0, LEVELS - 1):
        position = 100 if level else None
        expected = unpack(codec, container, level, first_position=position)
        same(on_device(codec, spec, segments_of(container, level), tokens, position), expected)


def test_tiles_of_more_lanes(monkeypatch: pytest.MonkeyPatch) -> None:
    """As larger blocks have, which would take the interpreter too long."""
    monkeypatch.setattr(ladder_segment, "_LANE_SYMBOLS_MIN", 30)
    monkeypatch.setattr(ladder_loops, "encode", ladder_reference.encode)
    monkeypatch.setattr(ladder_loops, "decode", ladder_reference.decode)
    spec = msgspec.structs.replace(SPEC, layers=1, key_dim=40, value_dim=12)
    codec = LadderCodec()
    container = pack(codec, spec, gaussian(spec, 40), 1)
    assert codec.open(segments_of(container, 0)[0], spec, 40, None) is not None
    same(on_device(codec, spec, segments_of(container, 2), 40), unpack(codec, container, 2))


def test_raw_groups() -> None:
    spoilt = gaussian(SPEC, 16)
    spoilt[0][0][0, 0, 0] = 0x7FC0
    codec = LadderCodec()
    container = pack(codec, SPEC, spoilt)
    assert codec.open(segments_of(container, 0)[0], SPEC, 16, None) is None
    same(on_device(codec, SPEC, segments_of(container, 3), 16), spoilt)


@pytest.fixture(scope="module")
def samples() -> Samples:
    return synthetic(quick=True)


@pytest.mark.parametrize("grouping", ["x0", "all"])
def test_with_a_profile(samples: Samples, grouping: str) -> None:
    codec = LadderCodec(ladder_profile(samples, grouping))
    assert isinstance(codec, DecodesOnDevice)
    chunk, tokens = samples.chunks[1], 6
    arrays = [(keys[:, :tokens], values[:, :tokens]) for keys, values in chunk.arrays]
    container = pack(codec, samples.spec, arrays, chunk.first_position)
    expected = unpack(codec, container, 1)
    decoded = on_device(codec, samples.spec, segments_of(container, 1), tokens)
    if grouping == "x0":
        same(decoded, expected)
    own, host = numbers(samples.spec, decoded), numbers(samples.spec, expected)
    one_bit = 2.0**-7 * np.abs(host)  # of bfloat16, where a sum was at its edge
    assert (np.abs(own - host) <= one_bit + PRODUCT_ERROR * np.abs(host).max()).all()


def test_elements_that_torch_lacks_are_refused() -> None:
    spec = msgspec.structs.replace(SPEC, dtype="float8_e4m3")
    with pytest.raises(CodecError, match="decoded on the host"):
        ladder_device.decode(LadderCodec(), [], [], spec)


def test_damage_is_judged_as_by_the_host() -> None:
    """Also where the hash has been made to fit, so that only the decoder can notice."""
    random = np.random.default_rng(3)
    codec = LadderCodec(shift=6)
    container = pack(codec, SPEC, gaussian(SPEC, 12), 1)
    refused = 0
    for _ in range(12):
        [group] = segments_of(container, 1)
        at = int(random.integers(len(group)))
        segment, data = group[at]
        hurt = bytearray(data)
        hurt[random.integers(len(hurt))] ^= 1 << random.integers(8)
        forged = msgspec.structs.replace(segment, xxh3=xxh3(hurt))
        damaged = [*group[:at], (forged, memoryview(hurt)), *group[at + 1 :]]
        room = SPEC.arrays(bytearray(SPEC.chunk_bytes(12)), 12)
        try:
            codec.decode(damaged, room, SPEC)
        except ContainerError:
            refused += 1
            with pytest.raises(ContainerError):
                on_device(codec, SPEC, [damaged], 12)
        else:
            same(on_device(codec, SPEC, [damaged], 12), room)
    assert 2 < refused < 12
