"""`ladder` with fitted profiles: every grouping, the rate that grouping buys, and profiles that do not fit."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest

from kvstore.bench.kv_samples import SampleChunk, Samples, float_parts, synthetic
from kvstore.chunk import decode_chunk, group_segments
from kvstore.codecs import profiles
from kvstore.codecs.ladder import LadderCodec
from kvstore.codecs.ladder_fit import Grouping, Moments, TableCounter, fit_transforms
from kvstore.codecs.ladder_profile import LadderProfile
from kvstore.codecs.profile import Profile, pack_profile, parse_profile
from kvstore.codecs.rotary import Rotation
from kvstore.container import parse
from kvstore.errors import CodecError, ConfigError, ContainerError
from kvstore.outcome import Reason
from kvstore.spec import KVArrays, KVSpec, Rope
from kvstore.testing.lossy import decibels, gaussian, pack, unpack

GROUPINGS = ("x0", "head", "layer", "group:2", "all")


def fit(samples: Samples, grouping: str, weighted: bool = False) -> Profile:
    """A profile of the samples' calibration chunks: moments of one half, tables of the other."""
    spec = samples.spec
    sequences = []
    for chunk in samples.calibration:
        parts = list(float_parts(chunk.arrays, spec))
        Rotation.consecutive(spec.rope, chunk.first_position, parts[0].shape[2]).undo(parts[0])
        sequences.append([np.ascontiguousarray(part[:, :, 4:]) for part in parts])
    moments = Moments(spec, Grouping.parse(grouping, spec.layers))
    half = len(sequences) // 2
    for parts in sequences[:half]:
        moments.add(parts)
    weights = None
    if weighted:
        rng = np.random.default_rng(0)
        factors = rng.normal(size=(2, spec.layers, spec.kv_heads, spec.key_dim, spec.key_dim))
        weights = list(factors @ factors.swapaxes(-1, -2))
    counter = TableCounter(fit_transforms(moments, weights))
    for parts in sequences[half:]:
        counter.measure(parts)
    for parts in sequences[half:]:
        counter.add(parts)
    return parse_profile(pack_profile(*counter.finish()))


@pytest.fixture(scope="module")
def samples() -> Samples:
    return synthetic(quick=True)


@pytest.fixture(scope="module")
def fitted(samples: Samples) -> dict[str, Profile]:
    found = {name: fit(samples, name) for name in GROUPINGS}
    for profile in found.values():
        profiles.add(profile)
    return found


@pytest.mark.parametrize("grouping", GROUPINGS)
def test_every_level_of_every_grouping_decodes_alone_and_better_than_the_one_before(
    samples: Samples, fitted: dict[str, Profile], grouping: str
) -> None:
    codec = LadderCodec(fitted[grouping].id)
    for chunk in samples.chunks:
        container = pack(codec, samples.spec, chunk.arrays, chunk.first_position)
        assert parse(memoryview(container)).profile == fitted[grouping].id
        quality = [decibels(samples.spec, chunk.arrays, unpack(codec, container, level)) for level in range(4)]
        assert quality == sorted(quality)
        assert quality[1] > 10
        assert quality[3] > 28


def test_wider_blocks_take_fewer_bits(samples: Samples, fitted: dict[str, Profile]) -> None:
    sizes = []
    for grouping in ("x0", "head", "layer", "all"):
        container = pack(LadderCodec(fitted[grouping].id), samples.spec, samples.chunks[1].arrays, 256)
        sizes.append(sum(s.length for s in parse(memoryview(container)).segments if s.level == 0))
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < 0.5 * sizes[0]


def test_only_profiles_of_one_head_keep_heads_apart(samples: Samples, fitted: dict[str, Profile]) -> None:
    assert {name: LadderCodec(fitted[name].id).mixes_heads for name in GROUPINGS} == {
        "x0": False, "head": False, "layer": True, "group:2": True, "all": True
    }  # fmt: skip
    assert not LadderCodec().mixes_heads


def test_a_weighted_profile_errs_less_where_it_matters(samples: Samples) -> None:
    plain, weighted = fit(samples, "head"), fit(samples, "head", weighted=True)
    root = LadderProfile(weighted).parts[0].root
    errors = []
    for profile in (plain, weighted):
        profiles.add(profile)
        codec = LadderCodec(profile.id)
        chunk = samples.chunks[1]
        before, _ = float_parts(chunk.arrays, samples.spec)
        after, _ = float_parts(unpack(codec, pack(codec, samples.spec, chunk.arrays, 256), 1), samples.spec)
        difference = before - after
        Rotation.consecutive(samples.spec.rope, 256, 256).undo(difference)
        size = sum(s.length for s in parse(memoryview(pack(codec, samples.spec, chunk.arrays, 256))).segments)
        errors.append((float(np.square(np.matmul(difference, root)).sum()), size))
    assert errors[1][0] < errors[0][0]


def test_a_shift_of_a_profile_is_read_back(samples: Samples, fitted: dict[str, Profile]) -> None:
    chunk = samples.chunks[1]
    codec = LadderCodec(fitted["layer"].id, shift=4)
    assert codec.variant == "shift +4"
    container = pack(codec, samples.spec, chunk.arrays, 256)
    decoded = unpack(LadderCodec(fitted["layer"].id), container)
    assert decibels(samples.spec, chunk.arrays, decoded) > 24
    assert len(container) < len(pack(LadderCodec(fitted["layer"].id), samples.spec, chunk.arrays, 256))


@pytest.mark.parametrize("tokens", [1, 5, 64])
def test_short_chunks_and_other_positions(samples: Samples, fitted: dict[str, Profile], tokens: int) -> None:
    codec = LadderCodec(fitted["layer"].id)
    arrays = [(keys[:, :tokens], values[:, :tokens]) for keys, values in samples.chunks[1].arrays]
    container = pack(codec, samples.spec, arrays, 256)
    here, there = unpack(codec, container), unpack(codec, container, first_position=9)
    assert decibels(samples.spec, arrays, here) > 20
    np.testing.assert_array_equal(here[0][1], there[0][1])


def test_data_unlike_the_calibration_cost_bytes_and_not_quality(samples: Samples, fitted: dict[str, Profile]) -> None:
    spec = samples.spec
    codec = LadderCodec(fitted["all"].id)
    eight_times = np.uint16(3 << 7)  # in the exponent of a bfloat16
    loud = [(keys + eight_times, values + eight_times) for keys, values in gaussian(spec, 256)]
    assert decibels(spec, loud, unpack(codec, pack(codec, spec, loud, 256))) > 20


def test_groups_that_do_not_divide_the_layers() -> None:
    whole = synthetic(quick=False)
    spec = msgspec.structs.replace(whole.spec, layers=3)
    cut = Samples("cut", spec, [lower_layers(c) for c in whole.calibration], [lower_layers(c) for c in whole.chunks])
    profile = fit(cut, "group:2")
    profiles.add(profile)
    codec = LadderCodec(profile.id)
    chunk = cut.chunks[1]
    assert decibels(spec, chunk.arrays, unpack(codec, pack(codec, spec, chunk.arrays, 256))) > 28


def lower_layers(chunk: SampleChunk) -> SampleChunk:
    return SampleChunk(chunk.arrays[:3], chunk.first_position, chunk.queries[:3])


class TestUnfit:
    def test_a_profile_of_another_model_encodes_nothing_and_decodes_nothing(
        self, samples: Samples, fitted: dict[str, Profile]
    ) -> None:
        codec = LadderCodec(fitted["layer"].id)
        other = msgspec.structs.replace(samples.spec, rope=Rope(kind="none"))
        with pytest.raises(CodecError, match="another model"):
            codec.plan(other, 256)
        container = pack(LadderCodec(), other, samples.chunks[1].arrays, 256)
        with pytest.raises(ContainerError) as caught:
            unpack(codec, container)
        assert caught.value.reason == Reason.UNKNOWN_PROFILE

    def test_a_container_decoded_with_the_wrong_profile_never_gives_numbers_silently(
        self, samples: Samples, fitted: dict[str, Profile]
    ) -> None:
        chunk = samples.chunks[1]
        container = pack(LadderCodec(fitted["layer"].id), samples.spec, chunk.arrays, 256)
        header = parse(memoryview(container))
        asked: list[bytes] = []

        def codec_for(_codec: str, profile: bytes) -> LadderCodec:
            asked.append(profile)
            return LadderCodec(profile)

        decode_chunk(memoryview(container), empty(samples.spec), codec_for)
        assert asked == [fitted["layer"].id]
        (segments,) = group_segments(header, memoryview(container))
        with pytest.raises(ContainerError):
            LadderCodec(fitted["x0"].id).decode(segments, empty(samples.spec), samples.spec)

    @pytest.mark.parametrize(
        ("name", "change"),
        [
            ("ladder.codes.k", lambda a: a[:, ::-1]),
            ("ladder.codes.k", lambda a: a + np.uint8(70)),
            ("ladder.codes.k", lambda a: a[:, :-1]),
            ("ladder.codes.v", lambda a: a.astype(np.int8)),
            ("ladder.frequencies", lambda a: a + np.uint16(1)),
            ("ladder.centroids", lambda a: a * np.float32(np.nan)),
            ("ladder.mean.k", lambda a: a[:1]),
            ("ladder.root.v", lambda a: a[..., 0]),
            ("ladder.basis.k", lambda a: a.astype(np.float32)),
        ],
        ids=["order", "range", "size", "sign", "sum", "number", "layers", "axes", "dtype"],
    )
    def test_arrays_that_do_not_fit_are_malformed(self, fitted: dict[str, Profile], name: str, change: Any) -> None:
        profile = fitted["layer"]
        arrays = profile.arrays | {name: change(profile.arrays[name])}
        with pytest.raises(ContainerError) as caught:
            LadderProfile(parse_profile(pack_profile(profile.attributes, arrays)))
        assert caught.value.reason == Reason.MALFORMED

    @pytest.mark.parametrize(
        "change",
        [{"format": 2}, {"layers": 0}, {"layers": 99}, {"heads": "x"}, {"heads": "one", "layers": 2}, {"shift": 999}],
    )
    def test_attributes_that_do_not_fit_are_refused(self, fitted: dict[str, Profile], change: dict[str, Any]) -> None:
        profile = fitted["layer"]
        attributes = {"ladder": profile.attributes["ladder"] | change}
        with pytest.raises(ContainerError):
            LadderProfile(parse_profile(pack_profile(attributes, profile.arrays)))

    def test_a_profile_of_another_codec_is_unknown_to_the_ladder(self) -> None:
        profile = parse_profile(pack_profile({"other": {}}, {}))
        profiles.add(profile)
        with pytest.raises(ContainerError, match="unknown_profile"):
            LadderCodec(profile.id)

    @pytest.mark.parametrize("name", ["x1", "group:0", "group:9", "group:x", ""])
    def test_unknown_groupings_are_refused(self, name: str) -> None:
        with pytest.raises(ConfigError, match="use x0, head"):
            Grouping.parse(name, 8)


def empty(spec: KVSpec) -> KVArrays:
    return spec.arrays(bytearray(spec.chunk_bytes(256)), 256)
