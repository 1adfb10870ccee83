"""The nvme tier on a device that takes longer than anybody waits, and has failed nothing."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from kvstore.codecs.raw import RawCodec
from kvstore.outcome import Reason
from kvstore.testing.chunks import sample_container, sample_key
from kvstore.tier import IO_ALIGN, PutItem
from kvstore.tiers import fsck, nvme_put
from kvstore.tiers.directio import PosixIo, page_up
from kvstore.tiers.nvme import NvmeTier

KEYS = [sample_key(n) for n in range(4)]
CHUNKS = {key: sample_container(key, tokens=16, codec=RawCodec()) for key in KEYS}
CHUNK_BYTES = page_up(len(CHUNKS[KEYS[0]]))


class HaltingIo(PosixIo):
    """The real system calls; a flush waits while `halted`."""

    def __init__(self) -> None:
        self._free = threading.Event()
        self._free.set()

    def halt(self) -> None:
        self._free.clear()

    def go_on(self) -> None:
        self._free.set()

    def sync(self, descriptor: int) -> None:
        assert self._free.wait(60)
        super().sync(descriptor)


def test_a_put_whose_eviction_takes_too_long_misses_its_deadline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    io = HaltingIo()
    capacity_bytes = 16 * IO_ALIGN
    tier = NvmeTier(tmp_path, capacity_bytes, io=io)
    monkeypatch.setattr(nvme_put, "COMMIT_WAIT_SECONDS", 0.2)
    fits = capacity_bytes // CHUNK_BYTES
    old = [sample_key(100 + n) for n in range(fits)]
    for key in old:
        data = sample_container(key, tokens=16, codec=RawCodec())
        assert tier.put([PutItem(key, memoryview(data))])[0].durable
    io.halt()
    (status,) = tier.put([PutItem(KEYS[0], memoryview(CHUNKS[KEYS[0]]))])
    assert (status.stored, status.reason) == (False, Reason.DEADLINE)
    assert "eviction" in status.detail
    counters = tier.counters()
    assert (counters["io_errors"], counters["quarantined_bytes"]) == (0, 0)
    io.go_on()
    (status,) = tier.put([PutItem(KEYS[0], memoryview(CHUNKS[KEYS[0]]))])
    assert status.durable
    tier.close()
    assert fsck.check(tmp_path).clean
