"""The contract suite every codec passes unchanged: subclass, name how a codec is made, run pytest.

    class TestMyCodec(CodecContract):
        make = MyCodec

A codec that is not exact also overrides `check_values`; one that cannot serve some geometry narrows `specs`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import ClassVar, get_args

import msgspec
import numpy as np
import numpy.typing as npt
import pytest

from kvstore import kernels, kernels_numpy
from kvstore.chunk import decode_chunk, encode_chunk, encoded_bytes_max, group_segments
from kvstore.codec import Codec, LayerSegments
from kvstore.container import ChunkMeta, Header, parse
from kvstore.errors import ContainerError
from kvstore.spec import DType, KVArrays, KVSpec, Rope

KERNELS = ("xxh3", "copy_xxh3", "gather_xxh3", "scatter_xxh3", "split_planes", "merge_planes")
LAYOUTS = ("canonical", "token_major", "strided")
DTYPES: tuple[DType, ...] = get_args(DType)
ROPE = Rope(kind="none")

GEOMETRIES: dict[str, KVSpec] = {
    "mha": KVSpec(layers=3, kv_heads=2, key_dim=8, value_dim=8, dtype="float16", rope=ROPE),
    "odd": KVSpec(layers=2, kv_heads=3, key_dim=7, value_dim=5, dtype="float16", rope=ROPE),
    "mla": KVSpec(layers=2, kv_heads=1, key_dim=24, value_dim=6, dtype="float16", rope=ROPE, attention="mla"),
    "mla_latent_only": KVSpec(
        layers=2, kv_heads=1, key_dim=5, value_dim=0, dtype="float16", rope=ROPE, attention="mla"
    ),
    "tiny": KVSpec(layers=1, kv_heads=1, key_dim=1, value_dim=1, dtype="float16", rope=ROPE),
}


def with_dtype(spec: KVSpec, dtype: DType) -> KVSpec:
    """The same geometry with another element type."""
    return msgspec.structs.replace(spec, dtype=dtype)


def all_specs() -> list[KVSpec]:
    """Every geometry with every element type."""
    return [with_dtype(spec, dtype) for spec in GEOMETRIES.values() for dtype in DTYPES]


def spec_name(spec: KVSpec) -> str:
    """Short name of a spec for test ids."""
    return f"{spec.attention}-{spec.layers}x{spec.kv_heads}x{spec.key_dim}+{spec.value_dim}-{spec.dtype}"


def random_bytes(nbytes: int, seed: int, *, smooth: bool) -> npt.NDArray[np.uint8]:
    """Reproducible bytes; smooth ones compress, the others do not."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 4 if smooth else 256, nbytes, dtype=np.uint8)


def lay_out(arrays: KVArrays, layout: str) -> KVArrays:
    """Copies of the arrays with equal elements and other strides."""

    def one(array: npt.NDArray[np.unsignedinteger]) -> npt.NDArray[np.unsignedinteger]:
        heads, tokens, dim = array.shape
        if layout == "token_major":
            view = np.zeros((tokens, heads, dim), dtype=array.dtype).transpose(1, 0, 2)
        elif layout == "strided":
            view = np.zeros((heads, 2 * tokens, 2 * dim), dtype=array.dtype)[:, ::-2, ::2]
        else:
            view = np.zeros_like(array)
        view[...] = array
        return view

    return [(one(keys), one(values)) for keys, values in arrays]


def meta_of(spec: KVSpec, tokens: int) -> ChunkMeta:
    """A header's metadata for tests."""
    return ChunkMeta(fingerprint=b"f" * 32, key=b"k" * 32, spec=spec, tokens=tokens)


class CodecContract:
    """What `kvstore.codec` promises, for one codec."""

    make: Callable[[], Codec]
    """Makes the codec under test."""

    specs: ClassVar[list[KVSpec]] = all_specs()
    """Geometries that the codec serves."""

    @pytest.fixture(params=["native", "numpy"], autouse=True)
    def kernel_module(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
        """Run every test with the C++ kernels and with the reference ones."""
        module = kernels_numpy
        if request.param == "native":
            module = pytest.importorskip("kvstore._native")
        for name in KERNELS:
            monkeypatch.setattr(kernels, name, getattr(module, name))

    @pytest.fixture
    def codec(self) -> Codec:
        """The codec under test."""
        return type(self).make()

    def check_values(self, spec: KVSpec, original: KVArrays, decoded: KVArrays) -> None:
        """Assert that decoded values are what the codec promises: the same bits, unless overridden."""
        for before, after in zip(original, decoded, strict=True):
            for a, b in zip(before, after, strict=True):
                np.testing.assert_array_equal(a, b)

    def pack(self, codec: Codec, spec: KVSpec, arrays: KVArrays, tokens: int) -> bytes:
        """The container of a chunk, written into memory that was not zero before."""
        buffer = bytearray(b"\xa5" * encoded_bytes_max(codec, spec, tokens))
        return bytes(buffer[: encode_chunk(codec, meta_of(spec, tokens), arrays, memoryview(buffer))])

    def small(self, codec: Codec, *, smooth: bool = True) -> tuple[Header, bytes, KVArrays]:
        """Header, container and arrays of a chunk small enough to try every byte of."""
        spec, tokens = self.specs[0], 3
        arrays = spec.arrays(random_bytes(spec.chunk_bytes(tokens), 5, smooth=smooth), tokens)
        container = self.pack(codec, spec, arrays, tokens)
        return parse(memoryview(container)), container, arrays

    def test_the_id_is_a_name_for_headers(self, codec: Codec) -> None:
        assert 1 <= len(codec.id) <= 16
        assert codec.id.isascii()

    @pytest.mark.parametrize("smooth", [True, False], ids=["smooth", "noise"])
    @pytest.mark.parametrize("tokens", [1, 7, 40])
    def test_round_trip_in_every_geometry_and_layout(self, codec: Codec, tokens: int, smooth: bool) -> None:
        for spec in self.specs:
            original = spec.arrays(random_bytes(spec.chunk_bytes(tokens), tokens, smooth=smooth), tokens)
            containers = set()
            for layout in LAYOUTS:
                container = self.pack(codec, spec, lay_out(original, layout), tokens)
                containers.add(container)
                decoded = lay_out(spec.arrays(bytearray(spec.chunk_bytes(tokens)), tokens), layout)
                decode_chunk(memoryview(container), decoded, lambda _id, _profile: codec)
                self.check_values(spec, original, decoded)
            assert len(containers) == 1, f"{spec_name(spec)}: strides changed what was written"

    def test_round_trip_of_4096_tokens(self, codec: Codec) -> None:
        spec, tokens = self.specs[0], 4096
        original = spec.arrays(random_bytes(spec.chunk_bytes(tokens), 1, smooth=True), tokens)
        container = self.pack(codec, spec, original, tokens)
        decoded = spec.arrays(bytearray(spec.chunk_bytes(tokens)), tokens)
        decode_chunk(memoryview(container), decoded, lambda _id, _profile: codec)
        self.check_values(spec, original, decoded)

    def test_plans_are_ordered_cover_every_layer_and_bound_what_is_written(self, codec: Codec) -> None:
        for spec in self.specs:
            for tokens in (1, 33):
                arrays = spec.arrays(random_bytes(spec.chunk_bytes(tokens), 2, smooth=False), tokens)
                plans = codec.plan(spec, tokens)
                order = [(plan.level, plan.layer_start, plan.part) for plan in plans]
                assert order == sorted(set(order))
                lowest = [plan.layers for plan in plans if plan.level == 0 and plan.part == plans[0].part]
                assert [layer for start, stop in lowest for layer in range(start, stop)] == list(range(spec.layers))
                for plan in plans:
                    target = bytearray(plan.bytes_max + 1)
                    target[-1] = 0x5A
                    encoded = codec.encode(plan, arrays, spec, memoryview(target))
                    assert encoded.nbytes <= plan.bytes_max
                    assert encoded.xxh3 == kernels_numpy.xxh3(target[: encoded.nbytes])
                    assert len(encoded.params) <= 16
                    assert target[-1] == 0x5A

    def test_a_layer_group_decodes_alone_and_touches_no_other_layer(self, codec: Codec) -> None:
        spec, tokens = self.grouped()
        original = spec.arrays(random_bytes(spec.chunk_bytes(tokens), 3, smooth=True), tokens)
        container = memoryview(self.pack(codec, spec, original, tokens))
        header = parse(container)
        groups = list(group_segments(header, container))
        assert len(groups) > 1
        for segments in reversed(groups):
            decoded = spec.arrays(bytearray(b"\x77" * spec.chunk_bytes(tokens)), tokens)
            codec.decode(segments, decoded, spec)
            start, stop = segments[0][0].layers
            self.check_values(spec, original[start:stop], decoded[start:stop])
            for layer in (*range(start), *range(stop, spec.layers)):
                assert all((array.view(np.uint8) == 0x77).all() for array in decoded[layer])

    def grouped(self) -> tuple[KVSpec, int]:
        """A geometry and a number of tokens that make more than one layer group."""
        return KVSpec(layers=3, kv_heads=2, key_dim=96, value_dim=96, dtype="float32", rope=ROPE), 400

    @pytest.mark.parametrize("smooth", [True, False], ids=["smooth", "noise"])
    def test_any_changed_byte_of_a_segment_is_refused(self, codec: Codec, smooth: bool) -> None:
        header, container, arrays = self.small(codec, smooth=smooth)
        for segments in group_segments(header, memoryview(container)):
            for at, (_, data) in enumerate(segments):
                for byte in range(len(data)):
                    bad = bytearray(data)
                    bad[byte] ^= 1 << byte % 8
                    self.refused(codec, header, replaced(segments, at, memoryview(bad)), arrays)

    def test_any_truncation_of_a_segment_is_refused(self, codec: Codec) -> None:
        header, container, arrays = self.small(codec)
        for segments in group_segments(header, memoryview(container)):
            for at, (segment, data) in enumerate(segments):
                for length in range(len(data)):
                    cut = data[:length]
                    self.refused(codec, header, replaced(segments, at, cut), arrays)
                    honest = msgspec.structs.replace(segment, length=length, xxh3=kernels_numpy.xxh3(cut))
                    self.refused(codec, header, [*segments[:at], (honest, cut), *segments[at + 1 :]], arrays)

    def refused(self, codec: Codec, header: Header, segments: LayerSegments, arrays: KVArrays) -> None:
        """Assert that these segments raise ContainerError."""
        with pytest.raises(ContainerError):
            codec.decode(segments, lay_out(arrays, "canonical"), header.meta.spec)

    def test_one_instance_serves_many_threads(self, codec: Codec) -> None:
        spec, tokens = self.grouped()
        failures: list[BaseException] = []

        def work(seed: int) -> None:
            try:
                original = spec.arrays(random_bytes(spec.chunk_bytes(tokens), seed, smooth=True), tokens)
                container = self.pack(codec, spec, original, tokens)
                decoded = spec.arrays(bytearray(spec.chunk_bytes(tokens)), tokens)
                decode_chunk(memoryview(container), decoded, lambda _id, _profile: codec)
                self.check_values(spec, original, decoded)
            except BaseException as error:  # reported by the main thread below
                failures.append(error)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not failures


def replaced(segments: LayerSegments, at: int, data: memoryview) -> LayerSegments:
    """The same segments, one with other bytes."""
    return [(segment, data if i == at else own) for i, (segment, own) in enumerate(segments)]
