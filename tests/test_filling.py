"""Where a connector decodes: on the device if codec and memory can, else to host arrays that are then committed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from kvstore.chunk import group_segments
from kvstore.codec import LayerSegments
from kvstore.codecs.ladder import LadderCodec
from kvstore.connectors.filling import fill
from kvstore.container import parse
from kvstore.spec import KVArrays, KVSpec, Rope
from kvstore.testing.codec import meta_of
from kvstore.testing.lossy import gaussian, pack, unpack

SPEC = KVSpec(layers=2, kv_heads=1, key_dim=8, value_dim=8, dtype="float32", rope=Rope(kind="none"))
TOKENS = 24


class HostMemory:
    """Arrays of one chunk; counts what it is asked for."""

    def __init__(self) -> None:
        self.arrays = SPEC.arrays(bytearray(SPEC.chunk_bytes(TOKENS)), TOKENS)
        self.asked: list[tuple[int, int]] = []

    def writable(self, start: int, stop: int) -> KVArrays:
        self.asked.append((start, stop))
        return self.arrays

    def commit(self, start: int, stop: int) -> None:
        raise AssertionError("the caller commits")

    def readable(self, start: int, stop: int) -> KVArrays:
        raise AssertionError("nothing is read")


class OnDevice(HostMemory):
    """The same, on a device, or on one that says that the host is as good."""

    def __init__(self, *, device: bool) -> None:
        super().__init__()
        self._device = device

    def device_tensors(self, start: int, stop: int) -> list[tuple[Any, Any]] | None:
        return [("keys", "values")] * SPEC.layers if self._device else None


@pytest.fixture
def groups() -> list[LayerSegments]:
    container = memoryview(pack(LadderCodec(), SPEC, gaussian(SPEC, TOKENS)))
    return list(group_segments(parse(container), container))


def test_without_a_device_the_host_decodes(groups: list[LayerSegments]) -> None:
    for memory in (HostMemory(), OnDevice(device=False)):
        assert not fill(LadderCodec(), groups, memory, 48, meta_of(SPEC, TOKENS))
        assert memory.asked == [(48, 48 + TOKENS)]
        expected = unpack(LadderCodec(), pack(LadderCodec(), SPEC, gaussian(SPEC, TOKENS)))
        np.testing.assert_array_equal(memory.arrays[1][0], expected[1][0])


def test_on_a_device_the_codec_is_given_its_tensors(
    groups: list[LayerSegments], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = []

    def decode(_codec: LadderCodec, own: Sequence[LayerSegments], tensors: Sequence[Any], spec: KVSpec) -> None:
        given.append((own, tensors, spec))

    monkeypatch.setattr(LadderCodec, "decode_on_device", decode)
    memory = OnDevice(device=True)
    assert fill(LadderCodec(), groups, memory, 0, meta_of(SPEC, TOKENS))
    assert given == [(groups, [("keys", "values")] * SPEC.layers, SPEC)]
    assert not memory.asked


def test_where_the_device_lacks_something_the_host_decodes(
    groups: list[LayerSegments], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: object) -> None:
        raise ImportError("no triton")

    monkeypatch.setattr(LadderCodec, "decode_on_device", missing)
    memory = OnDevice(device=True)
    assert not fill(LadderCodec(), groups, memory, 0, meta_of(SPEC, TOKENS))
    assert memory.asked == [(0, TOKENS)]
