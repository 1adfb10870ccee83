"""The ladder's C++ loops against NumPy: the same bytes, elements and verdicts, on every instruction set."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.bench.kv_samples import Samples, synthetic
from kvstore.bench.ladder_samples import ladder_profile
from kvstore.codecs import ladder_loops, ladder_reference
from kvstore.codecs.floats import from_float32, to_float32
from kvstore.codecs.ladder import LadderCodec
from kvstore.codecs.ladder_bank import parametric
from kvstore.codecs.ladder_classes import CLASS_MAX, LEVELS, PITCH
from kvstore.codecs.ladder_level import VALUE_MAX
from kvstore.codecs.ladder_reference import Part
from kvstore.codecs.ladder_segment import BlockSet
from kvstore.codecs.ladder_transform import Placing
from kvstore.codecs.rotary import Rotation
from kvstore.errors import ContainerError
from kvstore.spec import DType, KVArrays, KVSpec, Rope
from kvstore.testing.codec import DTYPES
from kvstore.testing.lossy import gaussian, numbers, pack, unpack

if not ladder_loops.NATIVE:
    pytest.skip("the C++ kernels were not built", allow_module_level=True)

from kvstore import _native
from kvstore.codecs import ladder_native

ROPE = Rope(kind="default", theta=10000.0, dims=32)
SPEC = KVSpec(layers=2, kv_heads=2, key_dim=40, value_dim=24, dtype="bfloat16", rope=ROPE)
ISAS = ("avx512", "avx2", "neon", "scalar")
BEST = _native.r32_isa()
PRODUCT_ERROR = 2.0**-18
"""Of the largest number: what two products of the same matrices may differ by, if BLAS sums in another order."""


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set of this processor in turn."""
    try:
        _native.ladder_use_isa(request.param)
        _native.r32_use_isa(request.param)
    except ValueError:
        pytest.skip(f"no {request.param} here")
    yield request.param
    _native.ladder_use_isa(BEST)
    _native.r32_use_isa(BEST)


@pytest.fixture
def in_numpy(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A switch to the reference, and back."""

    def switch(module: Any) -> None:
        monkeypatch.setattr(ladder_loops, "encode", module.encode)
        monkeypatch.setattr(ladder_loops, "decode", module.decode)

    return switch


def same(one: KVArrays, other: KVArrays) -> None:
    for pair, again in zip(one, other, strict=True):
        np.testing.assert_array_equal(pair[0], again[0])
        np.testing.assert_array_equal(pair[1], again[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [9, 64, 255])
def test_chunks_without_a_profile(dtype: DType, tokens: int, isa: str, in_numpy: Any) -> None:
    spec = msgspec.structs.replace(SPEC, dtype=dtype)
    original = gaussian(spec, tokens)
    original[1][0][0, tokens // 2] *= 3
    codec = LadderCodec(shift=-5)
    container = pack(codec, spec, original, 3)
    decoded = [unpack(codec, container, level, first_position=100) for level in range(LEVELS)]
    in_numpy(ladder_reference)
    assert pack(codec, spec, original, 3) == container
    for level in range(LEVELS):
        same(decoded[level], unpack(codec, container, level, first_position=100))


@pytest.fixture(scope="module")
def samples() -> Samples:
    return synthetic(quick=True)


@pytest.mark.parametrize("grouping", ["x0", "head", "layer", "all"])
def test_chunks_with_a_profile(samples: Samples, grouping: str, isa: str, in_numpy: Any) -> None:
    codec = LadderCodec(ladder_profile(samples, grouping))
    for chunk in samples.chunks:
        container = pack(codec, samples.spec, chunk.arrays, chunk.first_position)
        decoded = [unpack(codec, container, level) for level in range(LEVELS)]
        in_numpy(ladder_reference)
        assert pack(codec, samples.spec, chunk.arrays, chunk.first_position) == container
        for level in range(LEVELS):
            again = unpack(codec, container, level)
            if grouping == "x0":
                same(decoded[level], again)
            difference = np.abs(numbers(samples.spec, decoded[level]) - numbers(samples.spec, again))
            rounding = 2.0**-7 * np.abs(
                numbers(samples.spec, again)
            )  # one bit of bfloat16, where a sum was at its edge
            assert (difference <= rounding + PRODUCT_ERROR * np.abs(numbers(samples.spec, again)).max()).all()
        in_numpy(ladder_native)


class Channels:
    """Components that are channels, in any order, as a transform."""

    def __init__(self, random: np.random.Generator, shape: tuple[int, int, int], classes: list[Any]) -> None:
        layers, heads, dim = shape
        self.classes = classes
        self.steps = random.random(layers * heads, dtype=np.float32) + np.float32(0.1)
        self.means = random.normal(size=shape).astype(np.float32)
        places = [random.permutation(dim) for _ in range(layers * heads)]
        gains = random.normal(size=layers * heads * dim).astype(np.float32)
        self.placing = Placing(np.concatenate([np.zeros(0, np.int64), *places]).astype(np.uint32), gains)
        self._shape = shape

    def analyse(self, x: Any) -> Any:
        raise AssertionError("nothing is encoded from channels here")

    def products(self, blocks: Any) -> list[Any]:
        layers, heads, dim = self._shape
        out = np.zeros((layers * heads, len(blocks[0]), dim), dtype=np.float32)
        for target, block, places in zip(out, blocks, self.placing.places.reshape(-1, dim), strict=True):
            target[:, places[: block.shape[1]]] = block
        out *= self.placing.gains.reshape(-1, 1, dim)
        return list(out.reshape(layers, heads, -1, dim))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_classes_and_values(data: st.DataObject) -> None:
    """Also those that no transform makes: patches everywhere, far beyond every alphabet."""
    random = np.random.default_rng(data.draw(st.integers(0, 1 << 30)))
    tokens, dim = data.draw(st.integers(1, 40)), data.draw(st.sampled_from([2, 6, 33, 130]))
    shape = (data.draw(st.integers(1, 2)), data.draw(st.integers(1, 3)), dim)
    lowest, highest = sorted(data.draw(st.tuples(*2 * [st.integers(-PITCH * LEVELS, CLASS_MAX)])))
    classes = [-np.sort(-random.integers(lowest, highest + 1, dim)) for _ in range(shape[0] * shape[1])]
    blocks = BlockSet(classes, tokens)
    spread = data.draw(st.sampled_from([0.5, 4.0, 200.0, 20000.0]))
    finest = np.rint(random.normal(0, spread, tokens * dim * len(classes))).clip(-VALUE_MAX, VALUE_MAX).astype(np.int16)
    levels = ladder_reference.encode(blocks, finest, parametric())
    assert ladder_native.encode(blocks, finest, parametric()) == levels
    transform = Channels(random, shape, classes)
    rotation = Rotation.consecutive(msgspec.structs.replace(ROPE, dims=2), 7, tokens) if dim < 100 else None
    dtype: DType = data.draw(st.sampled_from(DTYPES))
    spec = KVSpec(layers=1, kv_heads=1, key_dim=1, value_dim=1, dtype=dtype, rope=ROPE)
    for count in range(1, LEVELS + 1):
        views = [memoryview(own) for own in levels[:count]]
        decoded = []
        for module in (ladder_reference, ladder_native):
            targets = [np.zeros((shape[1], tokens, dim), dtype=spec.bit_dtype) for _ in range(shape[0])]
            module.decode(blocks, views, parametric(), [Part(transform, targets, rotation)], dtype)
            decoded.append(np.stack(targets))
        np.testing.assert_array_equal(decoded[0], decoded[1])


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_damaged_levels_are_judged_alike(data: st.DataObject) -> None:
    random = np.random.default_rng(1)
    classes = [-np.sort(-random.integers(-10, 20, 12)) for _ in range(3)]
    blocks = BlockSet(classes, 21)
    finest = np.rint(random.normal(0, 40, 21 * 12 * 3)).astype(np.int16)
    levels = [bytearray(own) for own in ladder_reference.encode(blocks, finest, parametric())]
    level = data.draw(st.integers(0, LEVELS - 1))
    bad = levels[level]
    for _ in range(data.draw(st.integers(1, 3))):
        bad[data.draw(st.integers(0, len(bad) - 1))] = data.draw(st.integers(0, 255))
    del bad[data.draw(st.one_of(st.just(len(bad)), st.integers(0, len(bad)))) :]
    transform = Channels(random, (1, 3, 12), classes)
    verdicts = []
    for module in (ladder_reference, ladder_native):
        target = np.zeros((3, 21, 12), dtype=np.uint32)
        try:
            module.decode(
                blocks, [memoryview(own) for own in levels], parametric(), [Part(transform, [target], None)], "float32"
            )
        except ContainerError:
            target[:] = 1
        verdicts.append(target)
    np.testing.assert_array_equal(verdicts[0], verdicts[1])


class TestConversions:
    """Every element type's rounding, at and between its numbers."""

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_any_number_becomes_the_same_element(self, dtype: DType, isa: str) -> None:
        random = np.random.default_rng(0)
        patterns = random.integers(0, 1 << 32, 1 << 16, dtype=np.uint32)
        patterns[: 1 << 12] &= np.uint32(0xFFFF8000)
        patterns[1 << 12 : 1 << 13] |= np.uint32(0x3F800000)
        values = patterns.view(np.float32)
        values = np.concatenate(
            [values[np.isfinite(values)], np.array([0.0, -0.0, 448.0, 464.0, 65504.0, 65520.0, -3.4e38])]
        )
        x = values.astype(np.float32).reshape(1, -1, 1)
        spec = KVSpec(layers=1, kv_heads=1, key_dim=1, value_dim=1, dtype=dtype, rope=ROPE)
        target = np.zeros(x.shape, dtype=spec.bit_dtype)
        nothing = np.zeros((x.shape[1], 0), dtype=np.float32)
        zero = np.zeros((1, 1), dtype=np.float32)
        _native.ladder_write_channels([target], dtype, nothing, nothing, 0, 0, x.shape[1], [x], [zero])
        np.testing.assert_array_equal(target, from_float32(x + np.float32(0), dtype))
        assert np.isfinite(to_float32(target, dtype)).all()


class TestArguments:
    """A size that does not fit is refused before anything is read or written."""

    def arguments(self) -> dict[str, Any]:
        return {
            "targets": [np.zeros((1, 4, 2), np.uint16)],
            "dtype": "bfloat16",
            "cosine": np.zeros((4, 1), np.float32),
            "sine": np.zeros((4, 1), np.float32),
            "rotated_start": 0,
            "rotated_stop": 1,
            "tokens": 4,
            "classes": np.array([3, 1], np.int8),
            "widths": np.array([2], np.uint32),
            "steps": np.ones(1, np.float32),
            "places": np.array([1, 0], np.uint32),
            "gains": np.ones(2, np.float32),
            "centres": np.ones(2, np.float32),
            "levels": [b""],
            "tables": parametric().tables.decode,
            "centroids": parametric().centroids,
        }

    def test_these_fit_and_the_level_is_empty(self) -> None:
        assert "ends before its patches" in _native.ladder_decode_heads(*self.arguments().values())

    @pytest.mark.parametrize(
        ("name", "wrong"),
        [
            ("targets", [np.zeros((1, 4, 2), np.uint32)]),
            ("targets", [np.zeros((1, 3, 2), np.uint16)]),
            ("targets", [np.zeros((1, 4, 3), np.uint16)]),
            ("targets", []),
            ("dtype", "int8"),
            ("cosine", np.zeros((4, 2), np.float32)),
            ("sine", np.zeros((3, 1), np.float32)),
            ("tokens", 5),
            ("classes", np.array([1, 3], np.int8)),
            ("classes", np.array([99, 3], np.int8)),
            ("widths", np.array([1], np.uint32)),
            ("widths", np.array([3], np.uint32)),
            ("steps", np.ones(2, np.float32)),
            ("places", np.array([1, 2], np.uint32)),
            ("gains", np.ones(3, np.float32)),
            ("centres", np.ones(1, np.float32)),
            ("levels", []),
            ("levels", [b""] * 5),
            ("tables", parametric().tables.decode[1:]),
            ("centroids", parametric().centroids[1:]),
        ],
    )
    def test_others_do_not(self, name: str, wrong: Any) -> None:
        with pytest.raises(ValueError, match=r"\w+"):
            _native.ladder_decode_heads(*{**self.arguments(), name: wrong}.values())
