"""The codecs of this package: the shared contract, and what each one promises beyond it."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import EntryPoint

import msgspec
import numpy as np
import pytest
import zstandard

from kvstore import kernels
from kvstore.chunk import decode_chunk, encode_chunk, encoded_bytes_max
from kvstore.codec import Codec, LayerSegments
from kvstore.codecs import registry
from kvstore.codecs.cachegen import CacheGenCodec
from kvstore.codecs.fixed_width import Fp8Codec, Int4Codec, Int8Codec
from kvstore.codecs.lossless import LosslessCodec
from kvstore.codecs.lossless_dense import LosslessDenseCodec
from kvstore.codecs.raw import RawCodec
from kvstore.container import parse
from kvstore.errors import CodecError, ContainerError
from kvstore.outcome import Reason
from kvstore.spec import KVArrays, KVSpec, Rope
from kvstore.testing.codec import CodecContract, meta_of, random_bytes

SPEC = KVSpec(layers=1, kv_heads=2, key_dim=16, value_dim=16, dtype="bfloat16", rope=Rope(kind="none"))
TOKENS = 8


class TestRaw(CodecContract):
    make = RawCodec


def one_segment(codec: Codec, spec: KVSpec = SPEC, tokens: int = TOKENS) -> tuple[LayerSegments, KVArrays]:
    arrays = spec.arrays(random_bytes(spec.chunk_bytes(tokens), 0, smooth=True), tokens)
    buffer = bytearray(encoded_bytes_max(codec, spec, tokens))
    container = memoryview(buffer)[: encode_chunk(codec, meta_of(spec, tokens), arrays, memoryview(buffer))]
    (segment,) = parse(container).segments
    return [(segment, container[segment.offset :][: segment.length])], arrays


def forged(segments: LayerSegments, data: bytes, **fields: object) -> LayerSegments:
    """The same segment with other bytes, and a table entry that says so."""
    segment = msgspec.structs.replace(segments[0][0], length=len(data), xxh3=kernels.xxh3(data), **fields)
    return [(segment, memoryview(data))]


def reason_of(codec: Codec, segments: LayerSegments, arrays: KVArrays) -> Reason:
    with pytest.raises(ContainerError) as caught:
        codec.decode(segments, arrays, SPEC)
    return caught.value.reason


SINGLE_LEVEL: list[Codec] = [
    RawCodec(),
    LosslessCodec(),
    LosslessDenseCodec(),
    CacheGenCodec(),
    Int8Codec(),
    Int4Codec(),
    Fp8Codec(),
]


@pytest.mark.parametrize("codec", SINGLE_LEVEL, ids=lambda codec: codec.id)
class TestSegments:
    def test_a_group_has_exactly_one(self, codec: Codec) -> None:
        segments, arrays = one_segment(codec)
        assert reason_of(codec, [], arrays) == Reason.MALFORMED
        assert reason_of(codec, [*segments, *segments], arrays) == Reason.MALFORMED

    @pytest.mark.parametrize("fields", [{"level": 1}, {"part": 1}])
    def test_another_level_or_part_is_refused(self, codec: Codec, fields: dict[str, int]) -> None:
        segments, arrays = one_segment(codec)
        assert reason_of(codec, forged(segments, bytes(segments[0][1]), **fields), arrays) == Reason.MALFORMED

    def test_unknown_parameters_are_refused(self, codec: Codec) -> None:
        segments, arrays = one_segment(codec)
        bad = forged(segments, bytes(segments[0][1]), params=b"\x09" + bytes(15))
        assert reason_of(codec, bad, arrays) in (Reason.MALFORMED, Reason.UNKNOWN_CODEC)

    def test_missing_bytes_are_truncated_and_changed_ones_corrupt(self, codec: Codec) -> None:
        segments, arrays = one_segment(codec)
        segment, data = segments[0]
        assert reason_of(codec, [(segment, data[:-1])], arrays) == Reason.TRUNCATED
        changed = bytearray(data)
        changed[-1] ^= 1
        assert reason_of(codec, [(segment, memoryview(changed))], arrays) == Reason.CORRUPT

    def test_a_profile_is_refused(self, codec: Codec) -> None:
        with pytest.raises(ContainerError) as caught:
            registry.get(codec.id, b"p" * 32)
        assert caught.value.reason == Reason.UNKNOWN_PROFILE


class TestLosslessTable:
    """Block format 1, which is read only: tables and frames that lie, behind hashes that are right."""

    codec = LosslessCodec()
    planes = SPEC.kv_heads * 2 * SPEC.itemsize
    plane_bytes = TOKENS * SPEC.key_dim

    def segment(self, planes: list[bytes], lengths: list[int] | None = None) -> tuple[LayerSegments, KVArrays]:
        segments, arrays = one_segment(self.codec)
        table = np.asarray(lengths or [len(plane) for plane in planes], dtype="<u4").tobytes()
        return forged(segments, table + b"".join(planes), params=b"\1" + bytes(15)), arrays

    def test_stored_planes_decode(self) -> None:
        segments, arrays = self.segment([bytes(self.plane_bytes)] * self.planes)
        self.codec.decode(segments, arrays, SPEC)
        assert not any(array.any() for pair in arrays for array in pair)

    def test_a_plane_longer_than_its_elements_is_refused(self) -> None:
        segments, arrays = self.segment([bytes(self.plane_bytes + 1)] * self.planes)
        assert reason_of(self.codec, segments, arrays) == Reason.MALFORMED

    def test_a_table_that_does_not_add_up_is_refused(self) -> None:
        for wrong in (0, 1, self.plane_bytes - 1, 0xFFFFFFFF):
            lengths = [self.plane_bytes] * (self.planes - 1) + [wrong]
            segments, arrays = self.segment([bytes(self.plane_bytes)] * self.planes, lengths)
            assert reason_of(self.codec, segments, arrays) == Reason.MALFORMED

    @pytest.mark.parametrize("promised", [0, 1, 127, 129, 1 << 20, 1 << 40])
    def test_a_frame_of_another_size_is_refused_before_it_is_decompressed(self, promised: int) -> None:
        if promised < 1 << 30:
            frame = zstandard.ZstdCompressor().compress(bytes(promised))
        else:  # magic, single segment with an 8-byte content size, one empty raw block
            frame = b"\x28\xb5\x2f\xfd\xe0" + promised.to_bytes(8, "little") + b"\1\0\0"
        segments, arrays = self.segment([frame] + [bytes(self.plane_bytes)] * (self.planes - 1))
        assert reason_of(self.codec, segments, arrays) == Reason.MALFORMED

    def test_a_frame_without_a_size_or_with_more_behind_it_is_refused(self) -> None:
        sizeless = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(self.plane_bytes))
        followed = zstandard.ZstdCompressor().compress(bytes(self.plane_bytes)) + b"\0"
        for frame in (sizeless, followed, b"", b"\x28\xb5\x2f\xfd", b"nonsense"):
            segments, arrays = self.segment([frame] + [bytes(self.plane_bytes)] * (self.planes - 1))
            assert reason_of(self.codec, segments, arrays) == Reason.MALFORMED

    def test_a_frame_that_wants_a_large_window_is_refused(self) -> None:
        frame = b"\x28\xb5\x2f\xfd\x40\xa8" + (self.plane_bytes - 256 & 0xFFFF).to_bytes(2, "little") + b"\1\0\0"
        segments, arrays = self.segment([frame] + [bytes(self.plane_bytes)] * (self.planes - 1))
        assert reason_of(self.codec, segments, arrays) == Reason.MALFORMED

    def test_a_head_of_4_gib_is_refused_when_planning(self) -> None:
        spec = KVSpec(layers=1, kv_heads=1, key_dim=65536, value_dim=1, dtype="float16", rope=Rope(kind="none"))
        with pytest.raises(CodecError, match="smaller chunks"):
            self.codec.plan(spec, 65536)


class TestRegistry:
    def test_the_names_are_the_codecs_own(self) -> None:
        for name in registry.available():
            assert registry.get(name).id == name
            assert registry.get(name) is registry.get(name)

    def test_an_unknown_name_lists_the_known_ones(self) -> None:
        with pytest.raises(ContainerError, match=r"unknown_codec: 'gzip' is not one of .*lossless, .*raw"):
            registry.get("gzip")

    @pytest.fixture
    def plugin(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, EntryPoint]]:
        entries = {entry.name: entry for entry in registry._BUILTIN.values()}
        monkeypatch.setattr(registry, "_entries", lambda: entries)
        registry.get.cache_clear()
        yield entries
        registry.get.cache_clear()

    def test_a_third_party_codec_is_found_by_its_entry_point(self, plugin: dict[str, EntryPoint]) -> None:
        plugin["plugin"] = EntryPoint("plugin", f"{__name__}:PluginCodec", registry.GROUP)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(EntryPoint, "load", lambda _: PluginCodec)
            assert isinstance(registry.get("plugin"), PluginCodec)
        assert "plugin" in registry.available()

    @pytest.mark.parametrize(
        "value", ["no_such_module_here:Codec", "kvstore.codecs.raw:Nothing", "kvstore.codecs.raw:RawCodec"]
    )
    def test_a_broken_plug_in_is_an_unknown_codec(self, plugin: dict[str, EntryPoint], value: str) -> None:
        plugin["broken"] = EntryPoint("broken", value, registry.GROUP)
        with pytest.raises(ContainerError) as caught:
            registry.get("broken")
        assert caught.value.reason == Reason.UNKNOWN_CODEC

    def test_decode_chunk_reports_an_unknown_codec(self) -> None:
        buffer = bytearray(encoded_bytes_max(PluginCodec(), SPEC, TOKENS))
        arrays = SPEC.arrays(bytearray(SPEC.chunk_bytes(TOKENS)), TOKENS)
        encode_chunk(PluginCodec(), meta_of(SPEC, TOKENS), arrays, memoryview(buffer))
        with pytest.raises(ContainerError, match="unknown_codec"):
            decode_chunk(memoryview(buffer), arrays, registry.get)


class PluginCodec(RawCodec):
    """A codec of another distribution."""

    id = "plugin"
