"""`ladder` without a profile: the contract, its rates and errors, every level, every position, and bad input."""

from __future__ import annotations

import hashlib

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore import kernels
from kvstore.bench.kv_samples import synthetic
from kvstore.chunk import decode_chunk, decode_group, group_segments
from kvstore.codecs.floats import to_float32
from kvstore.codecs.ladder import LadderCodec
from kvstore.codecs.ladder_bank import parametric
from kvstore.codecs.ladder_segment import CODED, RAW
from kvstore.container import Header, parse
from kvstore.errors import CodecError, ContainerError
from kvstore.outcome import Reason
from kvstore.spec import DType, KVArrays, KVSpec, Rope
from kvstore.testing.codec import CodecContract
from kvstore.testing.lossy import arrays_of, decibels, gaussian, numbers, pack, unpack

ROPE = Rope(kind="default", theta=10000.0, dims=64)
SPEC = KVSpec(layers=2, kv_heads=2, key_dim=64, value_dim=64, dtype="bfloat16", rope=ROPE)
LEVEL_DB = (6.0, 14.5, 23.9, 33.4)


def kinds(header: Header) -> set[int]:
    return {segment.params[0] for segment in header.segments}


class TestLadder(CodecContract):
    make = LadderCodec

    def grouped(self) -> tuple[KVSpec, int]:
        return KVSpec(layers=3, kv_heads=2, key_dim=96, value_dim=96, dtype="float32", rope=Rope(kind="none")), 2000

    def check_values(self, spec: KVSpec, original: KVArrays, decoded: KVArrays) -> None:
        """Bits, where there is anything that is not a number to be coded; else near to the numbers."""
        for pair, got in zip(original, decoded, strict=True):
            for before, after in zip(pair, got, strict=True):
                if np.array_equal(before, after):
                    continue
                x, y = to_float32(before, spec.dtype), to_float32(after, spec.dtype)
                assert np.isfinite(x).all()
                spread = np.abs(x - x.mean(axis=1, keepdims=True)).max(axis=(1, 2), keepdims=True)
                rounding = {"float32": 0.0, "float16": 2e-3, "bfloat16": 2e-2}.get(spec.dtype, 0.3)
                assert (np.abs(x - y) <= 0.2 * spread + rounding * np.abs(x)).all()


class TestQuality:
    def test_a_gaussian_chunk_has_the_rates_and_errors_of_the_design(self) -> None:
        spec = KVSpec(layers=1, kv_heads=2, key_dim=128, value_dim=128, dtype="float32", rope=Rope(kind="none"))
        original = gaussian(spec, 2048)
        container = pack(LadderCodec(), spec, original, first_position=2048)
        header = parse(memoryview(container))
        elements = spec.chunk_bytes(2048) // spec.itemsize
        for level, (expected_bits, expected_db) in enumerate(zip((1.24, 2.66, 4.22, 5.80), LEVEL_DB, strict=True)):
            bits = 8 * sum(s.length for s in header.segments if s.level <= level) / elements
            assert bits == pytest.approx(expected_bits, abs=0.06)
            decoded = unpack(LadderCodec(), container, level)
            assert decibels(spec, original, decoded) == pytest.approx(expected_db, abs=0.3)

    def test_a_shift_moves_the_step_and_the_reader_needs_not_know_it(self) -> None:
        original = gaussian(SPEC, 256)
        sizes = []
        for shift in (-8, 0, 8):
            container = pack(LadderCodec(shift=shift), SPEC, original, 512)
            decoded = unpack(LadderCodec(), container)
            expected = LEVEL_DB[3] - 20 * np.log10(3) * shift / 8
            assert decibels(SPEC, original, decoded) == pytest.approx(expected, abs=1.0)
            sizes.append(len(container))
        assert sizes == sorted(sizes, reverse=True)

    def test_the_first_tokens_of_a_sequence_are_exact(self) -> None:
        original = gaussian(SPEC, 64)
        decoded = unpack(LadderCodec(), pack(LadderCodec(), SPEC, original), 0)
        for pair, got in zip(original, decoded, strict=True):
            for before, after in zip(pair, got, strict=True):
                np.testing.assert_array_equal(before[:, :4], after[:, :4])

    def test_tokens_unlike_the_others_are_exact_and_few(self) -> None:
        rng = np.random.default_rng(0)
        parts = rng.normal(size=(2, 2, 2, 256, 64)).astype(np.float32)
        parts[:, :, :, [100, 200]] *= 50
        original = arrays_of(SPEC, parts)
        decoded = unpack(LadderCodec(), pack(LadderCodec(), SPEC, original, 256), 0)
        for before, after in zip(original[1], decoded[1], strict=True):
            np.testing.assert_array_equal(before[:, [100, 200]], after[:, [100, 200]])
        parts[:, :, :, ::2] *= 50
        many = arrays_of(SPEC, parts)
        container = pack(LadderCodec(), SPEC, many, 256)
        assert len(container) < 0.6 * SPEC.chunk_bytes(256)

    def test_a_sample_with_outlier_channels_and_a_sink_keeps_its_error_small_at_every_level(self) -> None:
        samples = synthetic(quick=True)
        for chunk in samples.chunks:
            container = pack(LadderCodec(), samples.spec, chunk.arrays, chunk.first_position)
            errors = [
                decibels(samples.spec, chunk.arrays, unpack(LadderCodec(), container, level)) for level in range(4)
            ]
            assert errors == sorted(errors)
            assert errors[0] > 5
            assert errors[3] > 30


class TestPositions:
    @pytest.mark.parametrize("new", [0, 100, 5000])
    def test_a_chunk_decodes_anywhere_as_if_computed_there(self, new: int) -> None:
        samples = synthetic(quick=True, dtype="float32")
        spec, chunk = samples.spec, samples.chunks[1]
        container = pack(LadderCodec(), spec, chunk.arrays, chunk.first_position)
        there = unpack(LadderCodec(), container, first_position=new)
        finer = pack(LadderCodec(shift=-24), spec, there, new)
        back = unpack(LadderCodec(), finer, first_position=chunk.first_position)
        here = unpack(LadderCodec(), container)
        assert decibels(spec, here, back) > 50
        for kept, moved in zip(here, there, strict=True):
            np.testing.assert_array_equal(kept[1], moved[1])
            assert (kept[0] != moved[0]).any()

    def test_raw_groups_and_exact_tokens_move_too(self) -> None:
        spec = msgspec.structs.replace(SPEC, dtype="float32")
        for tokens in (3, 64):
            original = gaussian(spec, tokens)
            moved = unpack(LadderCodec(), pack(LadderCodec(), spec, original), first_position=70)
            first = [(k[:, :3], v[:, :3]) for k, v in moved]
            again = unpack(LadderCodec(), pack(LadderCodec(), spec, first, 70), 0, first_position=0)
            for pair, got in zip(original, again, strict=True):
                difference = to_float32(pair[0][:, :3], "float32") - to_float32(got[0], "float32")
                assert np.abs(difference).max() < 1e-5

    def test_an_unknown_rope_stays_in_place(self) -> None:
        spec = msgspec.structs.replace(SPEC, rope=Rope(kind="unknown"))
        container = pack(LadderCodec(), spec, gaussian(spec, 64), 256)
        assert decibels(spec, gaussian(spec, 64), unpack(LadderCodec(), container, first_position=256)) > 30
        with pytest.raises(CodecError, match="in place only"):
            unpack(LadderCodec(), container, first_position=0)


class TestBadInput:
    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38])
    def test_a_group_with_numbers_that_cannot_be_coded_is_raw(self, bad: float) -> None:
        spec = msgspec.structs.replace(SPEC, dtype="float32")
        original = gaussian(spec, 64)
        original[1][1].view(np.float32)[1, 20, 3] = bad
        container = pack(LadderCodec(), spec, original)
        assert kinds(parse(memoryview(container))) == {RAW}
        for pair, got in zip(original, unpack(LadderCodec(), container, 0), strict=True):
            np.testing.assert_array_equal(pair[0], got[0])
            np.testing.assert_array_equal(pair[1], got[1])

    @pytest.mark.parametrize("tokens", [1, 7, 8, 9, 4096])
    @pytest.mark.parametrize("dim", [80, 96])
    def test_odd_sizes(self, tokens: int, dim: int) -> None:
        rope = Rope(kind="default", theta=10000.0, dims=dim // 2)
        spec = KVSpec(layers=1, kv_heads=1, key_dim=dim, value_dim=dim, dtype="bfloat16", rope=rope)
        original = gaussian(spec, tokens)
        assert decibels(spec, original, unpack(LadderCodec(), pack(LadderCodec(), spec, original))) > 30

    def test_zero_tokens_constant_channels_and_nothing_at_all(self) -> None:
        rng = np.random.default_rng(0)
        parts = rng.normal(size=(2, 2, 2, 256, 64)).astype(np.float32)
        parts[..., 50:60, :] = 0
        parts[..., 7] = 3.0
        parts[1, 1] = 0.0
        original = arrays_of(SPEC, parts)
        decoded = unpack(LadderCodec(), pack(LadderCodec(), SPEC, original, 256))
        assert decibels(SPEC, original, decoded) > 30
        assert np.abs(to_float32(decoded[0][1], "bfloat16")[..., 7] - 3.0).max() < 0.1
        assert not to_float32(decoded[1][1], "bfloat16").any()

    def test_a_lone_number_in_an_empty_channel_keeps_its_size(self) -> None:
        rng = np.random.default_rng(0)
        parts = rng.normal(size=(2, 2, 2, 1024, 64)).astype(np.float32)
        parts[..., 9] = 0
        parts[1, 0, 1, 500, 9] = 1.7
        decoded = unpack(LadderCodec(), pack(LadderCodec(), SPEC, arrays_of(SPEC, parts), 256))
        assert to_float32(decoded[0][1], "bfloat16")[1, 500, 9] == pytest.approx(1.7, abs=0.3)

    def test_latent_attention_rotates_its_slice(self) -> None:
        rope = Rope(kind="default", theta=10000.0, dims=16)
        spec = KVSpec(layers=2, kv_heads=1, key_dim=96, value_dim=16, dtype="bfloat16", rope=rope, attention="mla")
        original = gaussian(spec, 128)
        container = pack(LadderCodec(), spec, original, 128)
        moved = unpack(LadderCodec(), container, first_position=0)
        here = unpack(LadderCodec(), container)
        assert decibels(spec, original, here) > 30
        np.testing.assert_array_equal(moved[0][0], here[0][0])
        assert (moved[0][1] != here[0][1]).any()

    @pytest.mark.parametrize("dtype", ["float32", "float16", "float8_e4m3", "float8_e5m2"])
    def test_other_element_types(self, dtype: DType) -> None:
        spec = msgspec.structs.replace(SPEC, dtype=dtype)
        original = gaussian(spec, 256)
        assert decibels(spec, original, unpack(LadderCodec(), pack(LadderCodec(), spec, original))) > 20

    def test_a_group_that_would_not_shrink_is_raw(self) -> None:
        container = pack(LadderCodec(shift=-64), SPEC, gaussian(SPEC, 64))
        assert kinds(parse(memoryview(container))) == {RAW}


class TestDamage:
    def container(self) -> bytes:
        return pack(LadderCodec(), SPEC, gaussian(SPEC, 32), 256)

    def test_flipped_bits_and_truncation_are_refused_at_every_level(self) -> None:
        container = self.container()
        header = parse(memoryview(container))
        assert kinds(header) == {CODED}
        spec = header.meta.spec
        arrays = spec.arrays(bytearray(spec.chunk_bytes(32)), 32)
        (segments,) = group_segments(header, memoryview(container))
        for at, (_, data) in enumerate(segments):
            for byte in range(0, len(data), 7):
                bad = bytearray(data)
                bad[byte] ^= 1 << byte % 8
                for changed in (memoryview(bad), data[:byte]):
                    with pytest.raises(ContainerError):
                        LadderCodec().decode(
                            [*segments[:at], (segments[at][0], changed), *segments[at + 1 :]], arrays, spec
                        )
            LadderCodec().decode(segments[: at + 1], arrays, spec)

    def test_a_lower_level_serves_for_a_damaged_one_where_that_is_allowed(self) -> None:
        container = bytearray(self.container())
        header = parse(memoryview(container))
        spec = header.meta.spec
        damaged = next(segment for segment in header.segments if segment.level == 2)
        container[damaged.offset] ^= 1
        (segments,) = group_segments(header, memoryview(container))
        arrays = spec.arrays(bytearray(spec.chunk_bytes(32)), 32)
        assert decode_group(LadderCodec(), segments, arrays, spec, level_min=0) == 1
        np.testing.assert_array_equal(numbers(spec, arrays), numbers(spec, unpack(LadderCodec(), bytes(container), 1)))
        for level_min in (None, 2):
            with pytest.raises(ContainerError, match="corrupt"):
                decode_group(LadderCodec(), segments, arrays, spec, level_min=level_min)
        decode_chunk(memoryview(container), arrays, lambda _id, _profile: LadderCodec(), level_min=1)

    def test_levels_out_of_order_or_of_another_group_are_refused(self) -> None:
        container = self.container()
        (segments,) = group_segments(parse(memoryview(container)), memoryview(container))
        other = msgspec.structs.replace(segments[1][0], params=b"\1\1\5" + segments[1][0].params[3:])
        strangers = [segments[0], (other, segments[1][1])]
        for wrong in (segments[1:], segments[::-1], [segments[0], segments[2]], [], strangers):
            with pytest.raises(ContainerError):
                LadderCodec().decode(wrong, gaussian(SPEC, 32), SPEC)

    @settings(max_examples=150, deadline=None)
    @given(st.data())
    def test_mutations_behind_right_hashes_decode_or_are_refused(self, data: st.DataObject) -> None:
        container = self.container()
        (segments,) = group_segments(parse(memoryview(container)), memoryview(container))
        at = data.draw(st.integers(0, 3))
        bad = bytearray(segments[at][1])
        for _ in range(data.draw(st.integers(1, 3))):
            bad[data.draw(st.integers(0, len(bad) - 1))] = data.draw(st.integers(0, 255))
        cut = bad[: data.draw(st.one_of(st.just(len(bad)), st.integers(0, len(bad))))]
        segment = msgspec.structs.replace(segments[at][0], length=len(cut), xxh3=kernels.xxh3(cut))
        decoded = gaussian(SPEC, 32)
        try:
            LadderCodec().decode([*segments[:at], (segment, memoryview(cut)), *segments[at + 1 :]], decoded, SPEC)
        except ContainerError:
            return
        assert np.isfinite(numbers(SPEC, decoded)).all()

    @pytest.mark.parametrize("params", [b"\2" + bytes(15), b"\1\2" + bytes(14), b"\1\0\0\1" + bytes(12)])
    def test_unknown_parameters_are_refused(self, params: bytes) -> None:
        container = self.container()
        (segments,) = group_segments(parse(memoryview(container)), memoryview(container))
        changed = [(msgspec.structs.replace(segment, params=params), data) for segment, data in segments]
        with pytest.raises(ContainerError, match="unknown_codec"):
            LadderCodec().decode(changed, gaussian(SPEC, 32), SPEC)

    def test_an_unknown_profile_is_a_miss(self) -> None:
        container = bytearray(self.container())
        with pytest.raises(ContainerError) as caught:
            LadderCodec(b"p" * 32)
        assert caught.value.reason == Reason.UNKNOWN_PROFILE
        assert decode_chunk(memoryview(container), gaussian(SPEC, 32), lambda _id, _profile: LadderCodec())


def test_the_parametric_bank_is_the_one_of_the_format() -> None:
    bank = parametric()
    digest = hashlib.sha256(bank.tables.frequencies.astype("<u2").tobytes() + bank.centroids.astype("<f4").tobytes())
    assert digest.hexdigest() == "fb039bbfe1549ea5094eb8d0f4563398e3ff952010c5e37714adac77fbf7cc35"


def test_a_shift_out_of_range_is_refused() -> None:
    with pytest.raises(CodecError, match="shift"):
        LadderCodec(shift=100)
