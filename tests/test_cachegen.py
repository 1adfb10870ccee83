"""`cachegen`: the contract, its arithmetic against a plain one, calibrated and not, and what it does with bad input."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore import kernels
from kvstore.bench.kv_samples import SampleChunk, Samples, float_parts, synthetic
from kvstore.chunk import decode_chunk, encode_chunk, encoded_bytes_max
from kvstore.codec import Codec
from kvstore.codecs import profiles
from kvstore.codecs.cachegen import CODED, RAW, SCALINGS, CacheGenCodec
from kvstore.codecs.cachegen_classes import BINS
from kvstore.codecs.cachegen_fit import Meter
from kvstore.codecs.cachegen_part import GROUP_TOKENS, deltas_of, quantise_anchors, rebuild
from kvstore.codecs.cachegen_part import Shape as PartShape
from kvstore.codecs.floats import from_float32, to_float32
from kvstore.codecs.profile import pack_profile, parse_profile
from kvstore.container import parse
from kvstore.errors import CodecError, ContainerError
from kvstore.outcome import Reason
from kvstore.spec import KVArrays, KVSpec, Rope
from kvstore.testing.codec import CodecContract, meta_of


class TestContract(CodecContract):
    make = CacheGenCodec

    def check_values(self, spec: KVSpec, original: KVArrays, decoded: KVArrays) -> None:
        """Random bits hold no numbers worth coding: raw where not finite or not smaller, else near."""
        for before, after in zip(original, decoded, strict=True):
            for a, b in zip(before, after, strict=True):
                one, other = (to_float32(x, spec.dtype) for x in (a, b))
                assert np.isfinite(other).all() == np.isfinite(one).all()


@pytest.fixture(scope="module")
def samples() -> Samples:
    return synthetic(quick=True)


@pytest.fixture(scope="module")
def profile_id(samples: Samples) -> bytes:
    meter = Meter(samples.spec)
    for chunk in samples.calibration:
        meter.add(float_parts(chunk.arrays, samples.spec))
    profile = parse_profile(pack_profile({}, meter.arrays()))
    profiles.add(profile)
    return profile.id


def round_trip(codec: Codec, spec: KVSpec, arrays: KVArrays) -> tuple[bytes, KVArrays]:
    tokens = arrays[0][0].shape[1]
    buffer = bytearray(encoded_bytes_max(codec, spec, tokens))
    container = bytes(buffer[: encode_chunk(codec, meta_of(spec, tokens), arrays, memoryview(buffer))])
    decoded = spec.arrays(bytearray(spec.chunk_bytes(tokens)), tokens)
    decode_chunk(memoryview(container), decoded, lambda _id, _profile: codec)
    return container, decoded


def kinds(container: bytes) -> set[int]:
    return {segment.params[0] for segment in parse(memoryview(container)).segments}


def mean_square_error(chunk: SampleChunk, decoded: KVArrays, spec: KVSpec) -> float:
    pairs = zip(float_parts(chunk.arrays, spec), float_parts(decoded, spec), strict=True)
    return float(sum(np.square(before - after).mean() for before, after in pairs))


@pytest.mark.parametrize("calibrated", [False, True])
def test_finer_scalings_cost_bits_and_err_less(samples: Samples, profile_id: bytes, calibrated: bool) -> None:
    chunk = samples.chunks[0]
    sizes, errors = [], []
    for scaling in SCALINGS:
        codec = CacheGenCodec(profile_id, scaling=scaling) if calibrated else CacheGenCodec(scaling=scaling)
        container, decoded = round_trip(codec, samples.spec, chunk.arrays)
        assert kinds(container) == {CODED}
        sizes.append(len(container))
        errors.append(mean_square_error(chunk, decoded, samples.spec))
    assert sizes == sorted(sizes)
    assert errors == sorted(errors, reverse=True)


def test_a_profile_saves_what_tables_take(samples: Samples, profile_id: bytes) -> None:
    chunk = samples.chunks[1]
    own, _ = round_trip(CacheGenCodec(), samples.spec, chunk.arrays)
    calibrated, _ = round_trip(CacheGenCodec(profile_id), samples.spec, chunk.arrays)
    assert len(calibrated) < len(own)


@pytest.mark.parametrize("tokens", [1, 2, 10, 11, 25])
def test_values_are_anchor_plus_whole_bins(tokens: int) -> None:
    """Against the definition, value by value."""
    spec = KVSpec(layers=3, kv_heads=2, key_dim=16, value_dim=16, dtype="float32", rope=Rope(kind="none"))
    rng = np.random.default_rng(tokens)
    shape = (2, tokens, 16)
    arrays = [tuple(from_float32(rng.normal(size=shape).astype(np.float32), "float32") for _ in "KV") for _ in range(3)]
    codec = CacheGenCodec()
    parts = [np.stack([to_float32(pair[part], "float32") for pair in arrays]) for part in range(2)]
    pieces = [codec._encode_part(values, part, 0, spec) for part, values in enumerate(parts)]
    for values, own in zip(parts, pieces, strict=True):
        assert own is not None
        steps = own[0].view("<f4")
        flat = values.reshape(6, tokens, 16)
        anchors = quantise_anchors(flat)
        deltas = deltas_of(flat, anchors)
        for layer, width in enumerate(BINS):
            spread = np.sqrt(np.square(deltas[2 * layer : 2 * layer + 2]).mean(axis=1)) if deltas.size else np.zeros(1)
            assert steps[layer] == pytest.approx(width * np.median(spread) or 1.0, rel=1e-5)
        step = np.repeat(steps, 2)[:, None, None]
        expected = rebuild(PartShape(3, 2, tokens, 16), anchors, (np.rint(deltas / step) * step).astype(np.float32))
        limit = np.where(np.arange(tokens)[:, None] % GROUP_TOKENS == 0, np.abs(flat).max() / 126, step / 2 + 1e-6)
        assert (np.abs(expected - flat) <= limit).all()


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_errors_stay_within_half_a_bin(data: st.DataObject) -> None:
    tokens = data.draw(st.integers(1, 40))
    heads, dim = data.draw(st.integers(1, 2)), data.draw(st.integers(8, 40))
    spec = KVSpec(layers=2, kv_heads=heads, key_dim=dim, value_dim=dim, dtype="float32", rope=Rope(kind="none"))
    rng = np.random.default_rng(data.draw(st.integers(0, 1 << 30)))
    scale = 10.0 ** data.draw(st.integers(-6, 6))
    values = [(rng.standard_t(3, size=(2, heads, tokens, dim)) * scale).astype(np.float32) for _ in range(2)]
    arrays = [(from_float32(values[0][i], "float32"), from_float32(values[1][i], "float32")) for i in range(2)]
    container, decoded = round_trip(CacheGenCodec(scaling=0.5), spec, arrays)
    if kinds(container) == {RAW}:
        return
    for part in range(2):
        after = np.stack([to_float32(pair[part], "float32") for pair in decoded])
        largest = np.abs(values[part]).max(axis=-1, keepdims=True)
        flat = values[part].reshape(2 * heads, tokens, dim)
        spread = (
            np.sqrt(np.square(deltas_of(flat, quantise_anchors(flat))).mean(axis=1)) if tokens > 1 else np.ones((1, 1))
        )
        bound = max(0.5 * 1.5 / 2 * float(spread.max()), float(largest.max()) / 126)
        assert (np.abs(after - values[part]) <= bound * 1.001).all()


SPEC = KVSpec(layers=2, kv_heads=2, key_dim=32, value_dim=32, dtype="bfloat16", rope=Rope(kind="none"))


def normal(spec: KVSpec, tokens: int) -> KVArrays:
    rng = np.random.default_rng(0)
    dims = (spec.key_dim, spec.value_dim)
    return [
        tuple(from_float32(rng.normal(size=(spec.kv_heads, tokens, d)).astype(np.float32), spec.dtype) for d in dims)  # type: ignore[misc]
        for _ in range(spec.layers)
    ]


class TestBadInput:
    @pytest.mark.parametrize("bits", [0x7F80, 0xFF80, 0x7FC1])
    def test_what_is_not_finite_is_kept_as_it_is(self, bits: int) -> None:
        arrays = normal(SPEC, 64)
        arrays[1][0][1, 5, 7] = bits
        container, decoded = round_trip(CacheGenCodec(), SPEC, arrays)
        assert kinds(container) == {RAW}
        for before, after in zip(arrays, decoded, strict=True):
            np.testing.assert_array_equal(before[0], after[0])
            np.testing.assert_array_equal(before[1], after[1])

    @pytest.mark.parametrize("tokens", [1, 9, 11, 256, 4096])
    def test_zeros_and_constant_channels_come_back(self, tokens: int) -> None:
        arrays = normal(SPEC, tokens)
        for pair in arrays:
            pair[0][:] = 0
            pair[1][:] = from_float32(np.arange(1, 33, dtype=np.float32), "bfloat16")
        _, decoded = round_trip(CacheGenCodec(), SPEC, arrays)
        for pair in decoded:
            assert not pair[0].any()
            expected = np.broadcast_to(np.arange(1, 33, dtype=np.float32), pair[1].shape)
            assert np.abs(to_float32(pair[1], "bfloat16") - expected).max() <= 32 / 120

    @pytest.mark.parametrize(("dim", "heads"), [(80, 1), (96, 3)])
    def test_odd_heads(self, dim: int, heads: int) -> None:
        spec = msgspec.structs.replace(SPEC, kv_heads=heads, key_dim=dim, value_dim=dim)
        container, decoded = round_trip(CacheGenCodec(), spec, normal(spec, 256))
        assert kinds(container) == {CODED}
        assert (
            np.abs(to_float32(decoded[0][0], "bfloat16") - to_float32(normal(spec, 256)[0][0], "bfloat16")).max() < 1.5
        )

    @pytest.mark.parametrize("value_dim", [0, 16])
    def test_latent_attention(self, value_dim: int) -> None:
        spec = KVSpec(
            layers=2,
            kv_heads=1,
            key_dim=128,
            value_dim=value_dim,
            dtype="bfloat16",
            rope=Rope(kind="none"),
            attention="mla",
        )
        container, decoded = round_trip(CacheGenCodec(), spec, normal(spec, 256))
        assert kinds(container) == {CODED}
        assert decoded[0][1].shape == (1, 256, value_dim)

    def test_huge_values_do_not_overflow(self) -> None:
        arrays = normal(SPEC, 64)
        arrays[0][0][0, ::3] = 0x7F7F  # the largest finite number
        _, decoded = round_trip(CacheGenCodec(), SPEC, arrays)
        assert np.isfinite(to_float32(decoded[0][0], "bfloat16")).all()

    @pytest.mark.parametrize("scaling", [0.0, -1.0, 1e9, float("nan")])
    def test_a_scaling_out_of_range_is_refused(self, scaling: float) -> None:
        with pytest.raises(CodecError, match="scaling"):
            CacheGenCodec(scaling=scaling)


class TestProfiles:
    def test_an_unknown_profile_is_a_miss(self) -> None:
        with pytest.raises(ContainerError) as caught:
            CacheGenCodec(b"n" * 32)
        assert caught.value.reason == Reason.UNKNOWN_PROFILE

    def test_a_profile_without_its_tables_is_a_miss(self) -> None:
        profile = parse_profile(pack_profile({}, {"other": np.zeros(3, dtype=np.uint8)}))
        profiles.add(profile)
        with pytest.raises(ContainerError) as caught:
            CacheGenCodec(profile.id)
        assert caught.value.reason == Reason.UNKNOWN_PROFILE

    def test_a_profile_of_another_geometry_is_a_miss(self, profile_id: bytes) -> None:
        with pytest.raises(ContainerError) as caught:
            round_trip(CacheGenCodec(profile_id), SPEC, normal(SPEC, 32))
        assert caught.value.reason == Reason.UNKNOWN_PROFILE

    def test_a_chunk_written_with_a_profile_needs_it(self, samples: Samples, profile_id: bytes) -> None:
        chunk = samples.chunks[0]
        container, decoded = round_trip(CacheGenCodec(profile_id), samples.spec, chunk.arrays)
        (segment, *_) = parse(memoryview(container)).segments
        data = memoryview(container)[segment.offset :][: segment.length]
        with pytest.raises(ContainerError) as caught:
            CacheGenCodec().decode([(segment, data)], decoded, samples.spec)
        assert caught.value.reason == Reason.UNKNOWN_PROFILE

    def test_calibration_wants_deltas_and_numbers(self) -> None:
        with pytest.raises(CodecError, match="two tokens"):
            Meter(SPEC).arrays()
        arrays = normal(SPEC, 20)
        arrays[0][0][0, 0, 0] = 0x7F80
        with pytest.raises(CodecError, match="finite"):
            Meter(SPEC).add(float_parts(arrays, SPEC))


def test_hashes_are_of_what_was_written(samples: Samples) -> None:
    container, _ = round_trip(CacheGenCodec(), samples.spec, samples.chunks[0].arrays)
    for segment in parse(memoryview(container)).segments:
        assert segment.xxh3 == kernels.xxh3(container[segment.offset : segment.offset + segment.length])
