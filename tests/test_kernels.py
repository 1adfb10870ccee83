"""The C++ kernels against the NumPy ones and the xxhash package, on every instruction set of this machine."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore import kernels_numpy

native = pytest.importorskip("kvstore._native", reason="the C++ kernels were not built")

ISAS = ("avx512", "avx2", "scalar")
STREAM_BYTES = 1 << 20
"""From here on the native kernels store past the cache."""

Array = npt.NDArray[Any]


def supported(isa: str) -> bool:
    before = native.isa()
    try:
        native.use_isa(isa)
    except ValueError:
        return False
    finally:
        native.use_isa(before)
    return True


@pytest.fixture(params=[*ISAS, "numpy"])
def kernels(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    if request.param == "numpy":
        yield kernels_numpy
        return
    if not supported(request.param):
        pytest.skip(f"this processor has no {request.param}")
    before = native.isa()
    native.use_isa(request.param)
    yield native
    native.use_isa(before)


def noise(nbytes: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, nbytes, dtype=np.uint8)


def aligned(nbytes: int, shift: int = 0) -> npt.NDArray[np.uint8]:
    memory = np.zeros(nbytes + 4096 + shift, dtype=np.uint8)
    start = -memory.ctypes.data % 4096 + shift
    return memory[start : start + nbytes]


def test_xxh3_of_every_length_up_to_2048(kernels: ModuleType) -> None:
    data = noise(2048 + 7)
    for length in range(2049):
        for shift in (0, 7):
            piece = data[shift : shift + length]
            assert kernels.xxh3(piece) == xxhash.xxh3_64_intdigest(piece.data), length


def test_copy_of_every_length_up_to_2048(kernels: ModuleType) -> None:
    data = noise(2048)
    for length in range(2049):
        target = np.full(length + 2, 0x5A, dtype=np.uint8)
        assert kernels.copy_xxh3(target[1:-1], data[:length]) == xxhash.xxh3_64_intdigest(data[:length].data)
        assert target[0] == target[-1] == 0x5A
        assert np.array_equal(target[1:-1], data[:length])


@pytest.mark.parametrize("shift", [0, 1, 32])
@pytest.mark.parametrize("extra", [-64, -1, 0, 1, 63, 12345])
def test_copies_that_bypass_the_cache(kernels: ModuleType, extra: int, shift: int) -> None:
    data, target = noise(STREAM_BYTES + extra), aligned(STREAM_BYTES + extra, shift)
    expected = xxhash.xxh3_64_intdigest(data.data)
    assert kernels.copy_xxh3(target, data) == expected
    assert np.array_equal(target, data)
    assert kernels.xxh3(target) == expected


def layouts(heads: int, tokens: int, dim: int, dtype: Any) -> list[Array]:
    """Arrays of one shape with different strides, each over memory of its own."""
    elements = heads * tokens * dim

    def memory(count: int) -> Array:
        return noise(count * np.dtype(dtype).itemsize, count).view(dtype)

    return [
        memory(elements).reshape(heads, tokens, dim),
        memory(elements).reshape(tokens, heads, dim).transpose(1, 0, 2),
        memory(elements).reshape(heads, dim, tokens).transpose(0, 2, 1),
        memory(elements).reshape(dim, tokens, heads).transpose(2, 1, 0),
        memory(elements * 2).reshape(heads, tokens, dim * 2)[:, :, ::2],
        memory(elements * 2).reshape(heads, tokens * 2, dim)[:, ::2],
        memory(elements).reshape(heads, tokens, dim)[::-1, ::-1, ::-1],
        np.lib.stride_tricks.as_strided(
            memory(elements + 3)[1:], (heads, tokens, dim), memory(elements).reshape(heads, tokens, dim).strides
        ),
    ]


SHAPES = [(1, 1, 1), (2, 3, 5), (3, 1, 64), (1, 7, 33), (2, 0, 4), (0, 2, 2), (2, 2, 0), (4, 65, 128), (2, 300, 80)]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.uint64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gather_and_scatter_any_strides(kernels: ModuleType, shape: tuple[int, int, int], dtype: Any) -> None:
    arrays = layouts(*shape, dtype)
    plain = b"".join(array.tobytes() for array in arrays)
    target = np.zeros(len(plain), dtype=np.uint8)
    assert kernels.gather_xxh3(target, arrays) == xxhash.xxh3_64_intdigest(plain)
    assert target.tobytes() == plain
    fresh = noise(len(plain), 99)
    assert kernels.scatter_xxh3(arrays, fresh) == xxhash.xxh3_64_intdigest(fresh.data)
    assert b"".join(array.tobytes() for array in arrays) == fresh.tobytes()


@pytest.mark.parametrize("shift", [0, 2])
def test_gather_and_scatter_past_the_cache(kernels: ModuleType, shift: int) -> None:
    heads, tokens, dim = 8, 256, 128
    memory = aligned(4 * heads * tokens * dim * 2, shift)
    memory[:] = noise(memory.size)
    arrays = [layer.transpose(1, 0, 2) for layer in memory.view(np.uint16).reshape(4, tokens, heads, dim)]
    plain = b"".join(array.tobytes() for array in arrays)
    target = aligned(len(plain), shift)
    assert kernels.gather_xxh3(target, arrays) == xxhash.xxh3_64_intdigest(plain)
    assert target.tobytes() == plain
    memory[:] = 0
    assert kernels.scatter_xxh3(arrays, target) == xxhash.xxh3_64_intdigest(plain)
    assert b"".join(array.tobytes() for array in arrays) == plain


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 4), st.integers(0, 9), st.integers(0, 70), st.permutations(range(3))), max_size=4
    ),
    st.sampled_from([np.uint8, np.uint16, np.uint32]),
    st.sampled_from(ISAS),
)
def test_gather_agrees_with_the_reference(
    shapes: Sequence[tuple[int, int, int, list[int]]], dtype: Any, isa: str
) -> None:
    if not supported(isa):
        return
    arrays = []
    for seed, (*shape, order) in enumerate(shapes):
        stored = [0, 0, 0]
        for axis, place in enumerate(order):
            stored[place] = shape[axis]
        memory = noise(int(np.prod(stored)) * np.dtype(dtype).itemsize, seed).view(dtype).reshape(stored)
        arrays.append(memory.transpose(order))
    total = sum(array.nbytes for array in arrays)
    fast, slow = np.zeros(total, dtype=np.uint8), np.zeros(total, dtype=np.uint8)
    before = native.isa()
    native.use_isa(isa)
    assert native.gather_xxh3(fast, arrays) == kernels_numpy.gather_xxh3(slow, arrays)
    native.use_isa(before)
    assert np.array_equal(fast, slow)


@pytest.mark.parametrize("itemsize", [1, 2, 3, 4, 8])
def test_planes_are_regrouped_and_put_back(kernels: ModuleType, itemsize: int) -> None:
    for count in (*range(200), 4099):
        data = noise(count * itemsize)
        planes, back = np.zeros_like(data), np.zeros_like(data)
        kernels.split_planes(planes, data, itemsize)
        assert np.array_equal(planes, data.reshape(count, itemsize).T.ravel())
        kernels.merge_planes(back, planes, itemsize)
        assert np.array_equal(back, data)


class TestArguments:
    """A mistake is a clear error and never a write past the end."""

    @pytest.mark.parametrize("function", ["copy_xxh3", "split_planes", "merge_planes"])
    def test_sizes_must_agree(self, kernels: ModuleType, function: str) -> None:
        extra = () if function == "copy_xxh3" else (2,)
        with pytest.raises(ValueError, match="source has 6 bytes, target 4"):
            getattr(kernels, function)(bytearray(4), bytes(6), *extra)

    @pytest.mark.parametrize("itemsize", [0, -1, 3])
    def test_planes_need_whole_elements(self, kernels: ModuleType, itemsize: int) -> None:
        with pytest.raises(ValueError, match="no whole number of elements"):
            kernels.split_planes(bytearray(4), bytes(4), itemsize)

    def test_arrays_must_fill_the_buffer(self, kernels: ModuleType) -> None:
        array = np.zeros((1, 2, 3), dtype=np.uint16)
        with pytest.raises(ValueError, match="arrays have 12 bytes, the buffer 11"):
            kernels.gather_xxh3(bytearray(11), [array])
        with pytest.raises(ValueError, match="arrays have 24 bytes, the buffer 12"):
            kernels.scatter_xxh3([array, array], bytes(12))

    def test_arrays_have_three_axes(self, kernels: ModuleType) -> None:
        with pytest.raises(ValueError, match="2 axes; expected 3"):
            kernels.gather_xxh3(bytearray(4), [np.zeros((2, 2), dtype=np.uint8)])

    def test_targets_must_be_writable(self, kernels: ModuleType) -> None:
        array = np.zeros((1, 1, 4), dtype=np.uint8)
        array.flags.writeable = False
        for name, arguments in (
            ("copy_xxh3", (bytes(4), bytes(4))),
            ("gather_xxh3", (bytes(4), [array])),
            ("scatter_xxh3", ([array], bytes(4))),
            ("split_planes", (bytes(4), bytes(4), 2)),
        ):
            with pytest.raises(ValueError, match="must be writable"):
                getattr(kernels, name)(*arguments)

    def test_flat_memory_must_be_contiguous(self, kernels: ModuleType) -> None:
        gaps = memoryview(bytearray(8))[::2]
        with pytest.raises(ValueError, match="contiguous"):
            kernels.xxh3(gaps)
        for arguments in ((gaps, bytes(4)), (bytearray(4), gaps)):
            with pytest.raises(ValueError, match="contiguous"):
                kernels.copy_xxh3(*arguments)

    def test_things_without_memory_are_type_errors(self, kernels: ModuleType) -> None:
        for wrong in ("text", 3, None):
            with pytest.raises(TypeError):
                kernels.xxh3(wrong)
        with pytest.raises(TypeError):
            kernels.copy_xxh3(bytearray(1))

    def test_no_buffer_stays_exported(self, kernels: ModuleType) -> None:
        target, source = bytearray(4), bytearray(6)
        with pytest.raises(ValueError, match="bytes"):
            kernels.copy_xxh3(target, source)
        kernels.copy_xxh3(target, bytes(4))
        target.append(1)  # refused while anything holds a view of it
        source.append(1)


def test_an_unknown_instruction_set_is_refused() -> None:
    with pytest.raises(ValueError, match="mmx"):
        native.use_isa("mmx")


def test_threads_copy_at_once() -> None:
    sources = [noise(3 << 20, seed) for seed in range(4)]
    hashes: dict[int, int] = {}

    def work(seed: int) -> None:
        hashes[seed] = native.copy_xxh3(np.empty_like(sources[seed]), sources[seed])

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert hashes == {seed: xxhash.xxh3_64_intdigest(source.data) for seed, source in enumerate(sources)}


class TestChoice:
    """Which kernels run is decided at import, so each case is an interpreter of its own."""

    def run(self, code: str, wanted: str | None) -> subprocess.CompletedProcess[str]:
        environment = {"KVSTORE_KERNELS": wanted} if wanted else {}
        return subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=False
        )

    def test_native_is_the_default(self) -> None:
        done = self.run("from kvstore import kernels; print(kernels.NAME)", None)
        assert done.stdout.startswith("native (")
        assert not done.stderr

    def test_the_reference_can_be_asked_for(self) -> None:
        assert self.run("from kvstore import kernels; print(kernels.NAME)", "numpy").stdout == "numpy\n"

    def test_without_the_extension_the_reference_runs_and_says_so(self) -> None:
        hide = "import sys; sys.modules['kvstore._native'] = None\n"
        done = self.run(hide + "from kvstore import kernels; print(kernels.NAME)", None)
        assert done.stdout == "numpy\n"
        assert "NumPy kernels" in done.stderr
        assert "install a C++ compiler" in done.stderr
        assert self.run(hide + "import kvstore.kernels", "native").returncode != 0

    def test_another_name_is_refused(self) -> None:
        assert "use auto, native or numpy" in self.run("import kvstore.kernels", "gpu").stderr
