"""`lossless` and `lossless_dense`: the contract with both kinds of kernels, what they promise in size, and their
parity."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.chunk import decode_chunk, encode_chunk, encoded_bytes_max
from kvstore.codec import Codec
from kvstore.codecs import exponents, exponents_reference, lossless_fixed, lossless_tables
from kvstore.codecs.floats import from_float32
from kvstore.codecs.lossless import LosslessCodec
from kvstore.codecs.lossless_dense import LosslessDenseCodec
from kvstore.codecs.r32 import coder
from kvstore.container import parse
from kvstore.errors import CodecError, ContainerError
from kvstore.outcome import Reason
from kvstore.spec import Bits, KVArrays, KVSpec, Rope
from kvstore.testing.codec import CodecContract, lay_out, meta_of, random_bytes, with_dtype

_native = pytest.importorskip("kvstore._native")

SPEC = KVSpec(layers=2, kv_heads=2, key_dim=64, value_dim=64, dtype="bfloat16", rope=Rope(kind="none"))
FUNCTIONS = ("encode_fixed", "decode_fixed", "split_rotated", "merge_rotated", "channel_sums", "count_tops")
BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32}


class LosslessContract(CodecContract):
    @pytest.fixture(autouse=True)
    def exponent_kernels(
        self, kernel_module: None, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The exponent kernels and R32 of the same kind as the others."""
        native = request.node.callspec.params["kernel_module"] == "native"
        for name in FUNCTIONS:
            monkeypatch.setattr(exponents, name, getattr(_native if native else exponents_reference, name))
        monkeypatch.setattr(coder, "NATIVE", native)


class TestLossless(LosslessContract):
    make = LosslessCodec


class TestLosslessDense(LosslessContract):
    make = LosslessDenseCodec


def gaussian(spec: KVSpec, tokens: int, seed: int = 0) -> KVArrays:
    """Normal values, each channel with a scale of its own, and one in ten with a mean."""
    rng = np.random.default_rng(seed)

    def one(dim: int) -> Bits:
        scale = np.exp(rng.normal(0, 0.7, (spec.kv_heads, 1, dim)))
        mean = rng.normal(0, 8, scale.shape) * (rng.random(scale.shape) < 0.1)
        values = (rng.normal(size=(spec.kv_heads, tokens, dim)) + mean) * scale
        return from_float32(values.astype(np.float32), spec.dtype)

    return [(one(spec.key_dim), one(spec.value_dim)) for _ in range(spec.layers)]


def pack(codec: Codec, spec: KVSpec, arrays: KVArrays, tokens: int) -> bytes:
    buffer = bytearray(encoded_bytes_max(codec, spec, tokens))
    return bytes(buffer[: encode_chunk(codec, meta_of(spec, tokens), arrays, memoryview(buffer))])


def segment_bits(container: bytes, spec: KVSpec, tokens: int) -> float:
    """Bits of segments for each element."""
    elements = spec.chunk_bytes(tokens) // spec.itemsize
    return 8 * sum(segment.length for segment in parse(memoryview(container)).segments) / elements


class TestSizes:
    @pytest.mark.parametrize(
        ("codec", "dtype", "bits_max"),
        [
            (LosslessCodec(), "bfloat16", 12.15),
            (LosslessCodec(), "float32", 28.15),
            (LosslessCodec(), "float16", 13.8),
            (LosslessCodec(), "float8_e4m3", 6.8),
            (LosslessCodec(), "float8_e5m2", 6.0),
            (LosslessDenseCodec(), "bfloat16", 10.8),
            (LosslessDenseCodec(), "float32", 26.8),
            (LosslessDenseCodec(), "float16", 13.8),
        ],
    )
    def test_normal_values_with_outlier_channels(self, codec: Codec, dtype: str, bits_max: float) -> None:
        spec = with_dtype(SPEC, dtype)  # type: ignore[arg-type]
        container = pack(codec, spec, gaussian(spec, 256), 256)
        assert segment_bits(container, spec, 256) <= bits_max

    @pytest.mark.parametrize("codec", [LosslessCodec(), LosslessDenseCodec()], ids=lambda codec: codec.id)
    def test_noise_is_stored_as_it_is(self, codec: Codec) -> None:
        arrays = SPEC.arrays(random_bytes(SPEC.chunk_bytes(64), 1, smooth=False), 64)
        (segment,) = parse(memoryview(pack(codec, SPEC, arrays, 64))).segments
        assert segment.params[0] == lossless_fixed.FORMAT
        assert segment.length == lossless_fixed.bytes_max(SPEC, 64, layers=2)

    def test_a_head_of_4_gib_is_refused_when_planning(self) -> None:
        spec = KVSpec(layers=1, kv_heads=1, key_dim=65536, value_dim=1, dtype="float16", rope=Rope(kind="none"))
        with pytest.raises(CodecError, match="smaller chunks"):
            LosslessCodec().plan(spec, 65536)


SPECIAL = np.asarray([0x0000, 0x8000, 0x7F80, 0xFF80, 0x7FC0, 0x7FFF, 0x0001, 0x8001, 0x3F80, 0x7F7F], dtype=np.uint16)


class TestBadInput:
    @pytest.mark.parametrize("codec", [LosslessCodec(), LosslessDenseCodec()], ids=lambda codec: codec.id)
    @pytest.mark.parametrize("tokens", [1, 2, 31, 256])
    def test_nan_inf_zeros_and_constants_come_back_bit_for_bit(self, codec: Codec, tokens: int) -> None:
        arrays = gaussian(SPEC, tokens)
        arrays[0][0][0] = np.resize(SPECIAL, arrays[0][0][0].shape)
        arrays[0][1][1] = 0
        arrays[1][0][:, :, 3] = 0x4049
        arrays[1][1][:, 0] = 0x7F80
        decoded = SPEC.arrays(bytearray(SPEC.chunk_bytes(tokens)), tokens)
        decode_chunk(memoryview(pack(codec, SPEC, arrays, tokens)), decoded, lambda _id, _profile: codec)
        for before, after in zip(arrays, decoded, strict=True):
            np.testing.assert_array_equal(before[0], after[0])
            np.testing.assert_array_equal(before[1], after[1])

    @pytest.mark.parametrize("dim", [80, 96, 576])
    def test_odd_head_sizes_keep_their_rate(self, dim: int) -> None:
        spec = msgspec.structs.replace(SPEC, key_dim=dim, value_dim=dim)
        container = pack(LosslessDenseCodec(), spec, gaussian(spec, 256), 256)
        assert segment_bits(container, spec, 256) < 10.9

    @pytest.mark.parametrize("block_format", [0, 4, 255])
    def test_an_unknown_format_is_an_unknown_codec(self, block_format: int) -> None:
        codec = LosslessCodec()
        container = memoryview(pack(codec, SPEC, gaussian(SPEC, 8), 8))
        (segment,) = parse(container).segments
        data = container[segment.offset :][: segment.length]
        odd = msgspec.structs.replace(segment, params=bytes([block_format]) + bytes(15))
        with pytest.raises(ContainerError) as caught:
            codec.decode([(odd, data)], gaussian(SPEC, 8), SPEC)
        assert caught.value.reason == Reason.UNKNOWN_CODEC


def block(heads: int, tokens: int, dim: int, itemsize: int, seed: int, *, distinct: int) -> Bits:
    """An array whose tops take about `distinct` values, some commoner than others."""
    rng = np.random.default_rng(seed)
    tops = (rng.geometric(0.3, (heads, tokens, dim)) * 7 % distinct + 100).astype(np.uint32)
    low = rng.integers(0, 1 << (8 * itemsize - 8), tops.shape, dtype=np.uint32) if itemsize > 1 else np.uint32(0)
    rotated = (tops << np.uint32(8 * itemsize - 8) | low).astype(BITS[itemsize])
    one, rest = rotated.dtype.type(1), rotated.dtype.type(8 * itemsize - 1)
    elements: Bits = rotated >> one | rotated << rest
    return elements


@pytest.fixture(params=["avx512", "avx2", "scalar"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set in turn, if the processor has it."""
    name: str = request.param
    try:
        _native.exponents_use_isa(name)
    except ValueError:
        pytest.skip(f"this processor lacks {name}")
    yield name
    restore_isa()


def restore_isa() -> None:
    for name in ("avx512", "avx2"):
        try:
            _native.exponents_use_isa(name)
        except ValueError:
            continue
        return


class TestParity:
    """The C++ kernels against the NumPy ones, bit for bit."""

    @pytest.mark.parametrize("itemsize", [1, 2, 4])
    @pytest.mark.parametrize(
        ("heads", "tokens", "dim"),
        [(1, 1, 1), (2, 3, 7), (1, 5, 64), (2, 70, 80), (3, 33, 33), (1, 300, 128), (1, 4, 0)],
    )
    @pytest.mark.parametrize("distinct", [1, 12, 40, 156])
    def test_segments_of_format_2(
        self, isa: str, itemsize: int, heads: int, tokens: int, dim: int, distinct: int
    ) -> None:
        array = block(heads, tokens, dim, itemsize, seed=tokens, distinct=distinct)
        room = 2 * 4 * heads + 2 * array.nbytes
        expected, got = np.zeros(room, dtype=np.uint8), np.full(room, 0xA5, dtype=np.uint8)
        written = exponents_reference.encode_fixed(expected, [array, array])
        for layout in ("canonical", "token_major", "strided"):
            ((first, second),) = lay_out([(array, array)], layout)
            assert _native.encode_fixed(got, [first, second]) == written
            np.testing.assert_array_equal(got[:written], expected[:written])
            ((into, also),) = lay_out([(np.zeros_like(array), np.zeros_like(array))], layout)
            assert _native.decode_fixed([into, also], got[:written]) == ""
            np.testing.assert_array_equal(into, array)
            np.testing.assert_array_equal(also, array)
        slow = np.zeros_like(array)
        assert exponents_reference.decode_fixed([slow, slow], got[:written]) == ""
        np.testing.assert_array_equal(slow, array)

    @pytest.mark.parametrize("itemsize", [1, 2, 4])
    @pytest.mark.parametrize(("heads", "tokens", "dim"), [(2, 1, 1), (3, 5, 80), (1, 67, 129), (2, 4, 0)])
    def test_planes_sums_and_counts(self, isa: str, itemsize: int, heads: int, tokens: int, dim: int) -> None:
        array = block(heads, tokens, dim, itemsize, seed=dim, distinct=30)
        planes = [np.zeros((itemsize, heads, tokens, dim), dtype=np.uint8) for _ in range(2)]
        for own, module in zip(planes, (_native, exponents_reference), strict=True):
            module.split_rotated(own, array)
            merged = np.zeros_like(array)
            module.merge_rotated(merged, own)
            np.testing.assert_array_equal(merged, array)
        np.testing.assert_array_equal(planes[0], planes[1])
        tops = np.ascontiguousarray(planes[0][-1])
        ids = np.random.default_rng(0).integers(0, 5, (heads, dim), dtype=np.uint8)
        sums = [np.ones((heads, dim, 2), dtype=np.uint64) for _ in range(2)]
        counts = [np.ones((5, 256), dtype=np.uint64) for _ in range(2)]
        for at, module in enumerate((_native, exponents_reference)):
            module.channel_sums(sums[at], tops)
            module.count_tops(counts[at], tops, ids)
        np.testing.assert_array_equal(sums[0], sums[1])
        np.testing.assert_array_equal(counts[0], counts[1])

    def test_sums_of_many_large_tokens_do_not_overflow(self) -> None:
        tops = np.full((1, 65536, 3), 255, dtype=np.uint8)
        sums = np.zeros((1, 3, 2), dtype=np.uint64)
        _native.channel_sums(sums, tops)
        assert sums[0, 2].tolist() == [65536 * 255, 65536 * 255 * 255]

    @settings(max_examples=60, deadline=None)
    @given(st.data())
    def test_dense_segments_are_the_same_from_both_kernels(self, data: st.DataObject) -> None:
        tokens = data.draw(st.integers(1, 40))
        spec = KVSpec(
            layers=data.draw(st.integers(1, 2)),
            kv_heads=data.draw(st.integers(1, 2)),
            key_dim=data.draw(st.integers(1, 40)),
            value_dim=data.draw(st.integers(1, 40)),
            dtype=data.draw(st.sampled_from(["bfloat16", "float16", "float32", "float8_e4m3"])),
            rope=Rope(kind="none"),
        )
        arrays = gaussian(spec, tokens, seed=data.draw(st.integers(0, 1000)))
        segments = [self.dense(spec, arrays, tokens, native) for native in (True, False)]
        assert segments[0] == segments[1]
        if not segments[0]:
            return
        decoded = spec.arrays(bytearray(spec.chunk_bytes(tokens)), tokens)
        lossless_tables.decode(memoryview(segments[0]), decoded, spec)
        for before, after in zip(arrays, decoded, strict=True):
            np.testing.assert_array_equal(before[0], after[0])
            np.testing.assert_array_equal(before[1], after[1])

    def dense(self, spec: KVSpec, arrays: KVArrays, tokens: int, native: bool) -> bytes:
        target = bytearray(lossless_fixed.bytes_max(spec, tokens, spec.layers))
        with pytest.MonkeyPatch.context() as patch:
            for name in FUNCTIONS:
                patch.setattr(exponents, name, getattr(_native if native else exponents_reference, name))
            patch.setattr(coder, "NATIVE", native)
            return bytes(target[: lossless_tables.encode(memoryview(target), arrays, spec)])


class TestRefusals:
    """Sizes that do not fit are the caller's mistake."""

    @pytest.mark.parametrize("module", [_native, exponents_reference], ids=["native", "numpy"])
    def test_buffers_of_another_size(self, module: object) -> None:
        array = np.zeros((1, 4, 4), dtype=np.uint16)
        with pytest.raises(ValueError, match="smaller than"):
            module.encode_fixed(bytearray(35), [array])  # type: ignore[attr-defined]
        for call in ("split_rotated", "merge_rotated"):
            first, second = np.zeros(31, dtype=np.uint8), array
            with pytest.raises(ValueError, match="different sizes"):
                getattr(module, call)(*((first, second) if call == "split_rotated" else (second, first)))
        with pytest.raises(ValueError, match="sums must"):
            module.channel_sums(np.zeros((1, 3, 2), dtype=np.uint64), np.zeros((1, 4, 4), dtype=np.uint8))  # type: ignore[attr-defined]
        with pytest.raises(ValueError, match="number of tables"):
            module.count_tops(  # type: ignore[attr-defined]
                np.zeros((2, 256), dtype=np.uint64),
                np.zeros((1, 4, 4), dtype=np.uint8),
                np.full((1, 4), 2, dtype=np.uint8),
            )
