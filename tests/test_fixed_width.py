"""`int8`, `int4` and `fp8`: the contract, their error bounds, their sizes, and bad input."""

from __future__ import annotations

from typing import get_args

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.chunk import decode_chunk, encode_chunk, encoded_bytes_max
from kvstore.codecs.fixed_width import CODED, RAW, FixedWidthCodec, Fp8Codec, Int4Codec, Int8Codec
from kvstore.codecs.fixed_width_groups import GroupShape, decode_groups, encode_groups
from kvstore.codecs.floats import from_float32, to_float32
from kvstore.container import parse
from kvstore.errors import ContainerError
from kvstore.outcome import Reason
from kvstore.spec import DType, KVArrays, KVSpec, Rope
from kvstore.testing.codec import CodecContract, meta_of, with_dtype

Float32 = npt.NDArray[np.float32]
SPEC = KVSpec(layers=2, kv_heads=2, key_dim=64, value_dim=64, dtype="bfloat16", rope=Rope(kind="none"))
CODECS = [Int8Codec(), Int4Codec(), Fp8Codec()]
INTEGERS = [Int8Codec(), Int4Codec()]
SPACING = {
    "float32": 2.0**-23,
    "float16": 2.0**-10,
    "bfloat16": 2.0**-7,
    "float8_e4m3": 2.0**-3,
    "float8_e5m2": 2.0**-2,
}


class _Contract(CodecContract):
    def check_values(self, spec: KVSpec, original: KVArrays, decoded: KVArrays) -> None:
        """Bits where the original is not finite; else numbers, however far apart random ones may be."""
        for before, after in zip(original, decoded, strict=True):
            for a, b in zip(before, after, strict=True):
                one, other = (to_float32(x, spec.dtype) for x in (a, b))
                assert np.isfinite(other).all() == np.isfinite(one).all()


class TestInt8(_Contract):
    make = Int8Codec


class TestInt4(_Contract):
    make = Int4Codec


class TestFp8(_Contract):
    make = Fp8Codec


def normal(spec: KVSpec, tokens: int, seed: int = 0, scale: float = 1.0) -> KVArrays:
    rng = np.random.default_rng(seed)
    dims = (spec.key_dim, spec.value_dim)
    return [
        tuple(
            from_float32((rng.normal(size=(spec.kv_heads, tokens, d)) * scale).astype(np.float32), spec.dtype)
            for d in dims
        )  # type: ignore[misc]
        for _ in range(spec.layers)
    ]


def round_trip(codec: FixedWidthCodec, spec: KVSpec, arrays: KVArrays) -> tuple[set[int], float, KVArrays]:
    """Kinds of the segments, bits an element in segments, decoded arrays."""
    tokens = arrays[0][0].shape[1]
    buffer = bytearray(encoded_bytes_max(codec, spec, tokens))
    container = memoryview(buffer)[: encode_chunk(codec, meta_of(spec, tokens), arrays, memoryview(buffer))]
    decoded = spec.arrays(bytearray(spec.chunk_bytes(tokens)), tokens)
    decode_chunk(container, decoded, lambda _id, _profile: codec)
    segments = parse(container).segments
    elements = spec.chunk_bytes(tokens) // spec.itemsize
    return {s.params[0] for s in segments}, 8 * sum(s.length for s in segments) / elements, decoded


def reach(values: Float32, codec: Int8Codec, part: int) -> Float32:
    """Highest less lowest of each element's group."""
    shape = GroupShape(part, values.shape[1], values.shape[2], codec.bits, codec.group)
    return shape.spread(shape.folded(values, np.maximum) - shape.folded(values, np.minimum))


@pytest.mark.parametrize(("codec", "bits"), [(Int8Codec(), 8.5), (Int4Codec(), 5.0), (Fp8Codec(), 8.0)])
def test_sizes_are_what_the_names_say(codec: FixedWidthCodec, bits: float) -> None:
    kinds, found, _ = round_trip(codec, SPEC, normal(SPEC, 256))
    assert kinds == {CODED}
    assert found == pytest.approx(bits, abs=0.01)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_integers_keep_their_stated_bound(data: st.DataObject) -> None:
    codec = data.draw(st.sampled_from(INTEGERS))
    dtype: DType = data.draw(st.sampled_from(["float32", "float16", "bfloat16"]))
    spec = KVSpec(
        layers=1,
        kv_heads=data.draw(st.integers(1, 3)),
        key_dim=data.draw(st.integers(1, 70)),
        value_dim=data.draw(st.integers(1, 70)),
        dtype=dtype,
        rope=Rope(kind="none"),
    )
    arrays = normal(
        spec, data.draw(st.integers(1, 70)), data.draw(st.integers(0, 99)), 10.0 ** data.draw(st.integers(-3, 3))
    )
    _, _, decoded = round_trip(codec, spec, arrays)
    for part in range(2):
        before, after = (to_float32(side[0][part], spec.dtype) for side in (arrays, decoded))
        lowest_error = 2.0**-10 * np.abs(before).max() + 2.0**-24
        step = (reach(before, codec, part) + lowest_error) / ((1 << codec.bits) - 1) * (1 + 2.0**-10) + 2.0**-24
        rounding = np.abs(before).max() * SPACING[dtype] + lowest_error * 2.0**-4
        assert (np.abs(after - before) <= step / 2 + rounding).all()


@settings(max_examples=60, deadline=None)
@given(
    st.integers(-20, 20), st.integers(1, 40), st.sampled_from(["float32", "float16", "bfloat16"]), st.integers(0, 99)
)
def test_fp8_keeps_its_stated_bound(exponent: int, tokens: int, dtype: DType, seed: int) -> None:
    spec = with_dtype(SPEC, dtype)
    arrays = normal(spec, tokens, seed, 2.0 ** (exponent if dtype != "float16" else exponent // 4))
    _, _, decoded = round_trip(Fp8Codec(), spec, arrays)
    for before, after in zip((a for pair in arrays for a in pair), (a for pair in decoded for a in pair), strict=True):
        one, other = (to_float32(x, dtype) for x in (before, after))
        scale = np.abs(one).max(axis=(1, 2), keepdims=True) / 448
        bound = np.maximum(np.abs(one) / 16, scale / 1024) * 1.001 + np.abs(one) * SPACING[dtype] + 2.0**-24
        assert (np.abs(one - other) <= bound).all()


@pytest.mark.parametrize("dtype", ["float8_e4m3", "float8_e5m2"])
def test_fp8_passes_float8_through(dtype: DType) -> None:
    spec = with_dtype(SPEC, dtype)
    arrays = spec.arrays(np.random.default_rng(0).integers(0, 256, spec.chunk_bytes(40), dtype=np.uint8), 40)
    kinds, bits, decoded = round_trip(Fp8Codec(), spec, arrays)
    assert kinds == {RAW}
    assert bits == 8.0
    assert all(
        (a == b).all() for one, other in zip(arrays, decoded, strict=True) for a, b in zip(one, other, strict=True)
    )


class TestBadInput:
    @pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.id)
    @pytest.mark.parametrize("dtype", [d for d in get_args(DType) if d != "float8_e4m3"])
    def test_what_is_not_finite_is_kept_as_it_is(self, codec: FixedWidthCodec, dtype: DType) -> None:
        infinity = {"float32": 0x7F800000, "float16": 0x7C00, "bfloat16": 0x7F80, "float8_e5m2": 0x7C}[dtype]
        spec = with_dtype(SPEC, dtype)
        arrays = normal(spec, 64)
        arrays[1][1][0, 3, 3] = infinity
        kinds, _, decoded = round_trip(codec, spec, arrays)
        assert kinds == {RAW}
        np.testing.assert_array_equal(arrays[1][1], decoded[1][1])

    @pytest.mark.parametrize("codec", INTEGERS, ids=lambda codec: codec.id)
    def test_numbers_beyond_fp16_are_kept_as_they_are(self, codec: FixedWidthCodec) -> None:
        arrays = normal(SPEC, 64, scale=1e30)
        kinds, _, decoded = round_trip(codec, SPEC, arrays)
        assert kinds == {RAW}
        np.testing.assert_array_equal(arrays[0][0], decoded[0][0])

    @pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.id)
    @pytest.mark.parametrize("tokens", [1, 31, 256, 4096])
    def test_zeros_and_constants_come_back(self, codec: FixedWidthCodec, tokens: int) -> None:
        arrays = normal(SPEC, tokens)
        arrays[0][0][:] = 0
        arrays[0][1][:] = 0x4040  # 3.0
        _, _, decoded = round_trip(codec, SPEC, arrays)
        assert not to_float32(decoded[0][0], "bfloat16").any()
        np.testing.assert_array_equal(decoded[0][1], arrays[0][1])

    @pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.id)
    @pytest.mark.parametrize(
        "fields",
        [
            {"key_dim": 80, "value_dim": 96},
            {"kv_heads": 1, "key_dim": 7, "value_dim": 33},
            {"kv_heads": 1, "key_dim": 512, "value_dim": 64, "attention": "mla"},
            {"kv_heads": 1, "key_dim": 512, "value_dim": 0, "attention": "mla"},
        ],
    )
    def test_odd_geometries(self, codec: FixedWidthCodec, fields: dict[str, object]) -> None:
        spec = msgspec.structs.replace(SPEC, **fields)
        kinds, _, decoded = round_trip(codec, spec, normal(spec, 100))
        assert kinds == {CODED}
        assert (
            np.abs(to_float32(decoded[0][0], "bfloat16") - to_float32(normal(spec, 100)[0][0], "bfloat16")).max() < 0.5
        )

    def test_forged_bounds_that_are_not_finite_are_refused(self) -> None:
        codec, arrays = Int4Codec(), normal(SPEC, 64)
        buffer = bytearray(encoded_bytes_max(codec, SPEC, 64))
        container = memoryview(buffer)[: encode_chunk(codec, meta_of(SPEC, 64), arrays, memoryview(buffer))]
        (segment,) = parse(container).segments
        bad = bytearray(container[segment.offset :][: segment.length])
        bad[0:2] = b"\x00\x7c"
        from kvstore import kernels

        forged = msgspec.structs.replace(segment, xxh3=kernels.xxh3(bad))
        with pytest.raises(ContainerError) as caught:
            codec.decode([(forged, memoryview(bad))], arrays, SPEC)
        assert caught.value.reason == Reason.MALFORMED


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("bits", [4, 8])
def test_groups_are_those_of_the_plain_definition(index: int, bits: int) -> None:
    values = np.random.default_rng(0).normal(size=(2, 37, 21)).astype(np.float32)
    shape = GroupShape(index, 37, 21, bits, 8)
    blocks = encode_groups(values, shape)
    assert blocks is not None
    assert blocks.shape == (2, shape.nbytes)
    decoded = decode_groups(blocks, shape)
    for head in range(2):
        lines = values[head].T if index == 0 else values[head]
        got = decoded[head].T if index == 0 else decoded[head]
        for line, other in zip(lines, got, strict=True):
            for start in range(0, len(line), 8):
                group = line[start : start + 8]
                step = (group.max() - group.min() + 0.002) / ((1 << bits) - 1) * 1.001
                assert np.abs(group - other[start : start + 8]).max() <= step / 2 + 1e-6
