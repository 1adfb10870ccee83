"""Bad places: as rows of the catalog, in recovery, and after a crash before the catalog knows of them."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.buffers import aligned_buffer
from kvstore.keys import ROOT
from kvstore.outcome import Miss, Reason
from kvstore.testing.chunks import sample_container, sample_key
from kvstore.testing.harness import key_of
from kvstore.tier import IO_ALIGN, PutItem, ReadItem
from kvstore.tiers import fsck
from kvstore.tiers.bad_places import Place, bad_place, is_media_error, is_passing, merged, parse_row, touching
from kvstore.tiers.catalog import recover
from kvstore.tiers.directio import PosixIo, page_up
from kvstore.tiers.index import ChunkEntry
from kvstore.tiers.nvme import NvmeTier
from kvstore.tiers.records import pack_record

CAPACITY_BYTES = 96 * IO_ALIGN
PLACES = st.lists(
    st.tuples(st.integers(0, 30), st.integers(1, 6)).map(lambda p: (p[0] * IO_ALIGN, sum(p) * IO_ALIGN)), max_size=6
)


@given(PLACES, st.integers(1, 30))
def test_merged_places_are_the_same_pages(places: list[Place], pages: int) -> None:
    out = merged(places, pages * IO_ALIGN)
    named = {page for start, end in places for page in range(start // IO_ALIGN, end // IO_ALIGN) if page < pages}
    assert {page for start, end in out for page in range(start // IO_ALIGN, end // IO_ALIGN)} == named
    assert all(one[1] < other[0] for one, other in itertools.pairwise(out))


@given(PLACES, st.integers(0, 40), st.integers(1, 6 * IO_ALIGN))
def test_touching_finds_every_shared_byte(places: list[Place], page: int, nbytes: int) -> None:
    places = merged(places, 1 << 40)
    offset = page * IO_ALIGN
    expected = any(offset < end and start < offset + nbytes for start, end in places)
    assert touching(places, np.array([offset]), np.array([nbytes])).tolist() == [expected]


@given(st.binary(max_size=40), st.binary(max_size=70))
def test_only_what_was_written_is_a_bad_place(key: bytes, record: bytes) -> None:
    assert parse_row(key, record) is None
    good = bad_place(3 * IO_ALIGN, IO_ALIGN + 1)
    assert parse_row(good.key, good.record or b"") == (3 * IO_ALIGN, 5 * IO_ALIGN)
    assert parse_row(bad_place(0, 1).key, good.record or b"") is None


def test_recovery_drops_the_chunk_on_a_bad_place_and_takes_the_place() -> None:
    place = bad_place(2 * IO_ALIGN, 2 * IO_ALIGN)
    far = bad_place(100 * IO_ALIGN, IO_ALIGN)
    chunks = [ChunkEntry(key_of(n), n * IO_ALIGN, IO_ALIGN, n, ROOT) for n in range(1, 6)]
    rows = [(chunk.key, pack_record(chunk)) for chunk in chunks]
    found = recover([*rows, (place.key, place.record or b""), (far.key, far.record or b"")], 8 * IO_ALIGN)
    assert [entry.key for entry in found.index] == [key_of(n) for n in (1, 4, 5)]
    assert {record.key for record in found.bad} == {key_of(2), key_of(3)}
    assert all("bad place" in record.problem for record in found.bad)
    assert found.extents.free_runs() == [(0, IO_ALIGN), (6 * IO_ALIGN, 2 * IO_ALIGN)]


@pytest.mark.parametrize(
    ("number", "media", "passing"),
    [(errno.EIO, True, False), (errno.ENOSPC, False, True), (errno.EBUSY, False, True), (errno.EINVAL, False, False)],
)
def test_errors_are_told_apart(number: int, media: bool, passing: bool) -> None:
    error = OSError(number, os.strerror(number))
    assert (is_media_error(error), is_passing(error)) == (media, passing)


class ScratchedIo(PosixIo):
    """A device with some pages that it cannot read, or cannot write, besides a busy one."""

    def __init__(self) -> None:
        self.unreadable: range = range(0)
        self.unwritable: range = range(0)
        self.busy = False

    def read(self, descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        if self.busy:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        self._check(self.unreadable, buffers, offset)
        return super().read(descriptor, buffers, offset)

    def write(self, descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        self._check(self.unwritable, buffers, offset)
        return super().write(descriptor, buffers, offset)

    @staticmethod
    def _check(bad: range, buffers: Sequence[memoryview], offset: int) -> None:
        if offset < bad.stop and bad.start < offset + sum(map(len, buffers)):
            raise OSError(errno.EIO, os.strerror(errno.EIO))


CHUNKS = {sample_key(n): sample_container(sample_key(n), tokens=64) for n in range(6)}


def put(tier: NvmeTier, *keys: bytes) -> list[Reason | None]:
    """Put containers; why each was refused."""
    return [status.reason for status in tier.put([PutItem(key, memoryview(CHUNKS[key])) for key in keys])]


def read(tier: NvmeTier, key: bytes) -> bytes | Reason:
    """The chunk's bytes, or why it missed."""
    target = aligned_buffer(page_up(len(CHUNKS[key])))
    (outcome,) = tier.read([ReadItem(key, target)])
    return outcome.reason if isinstance(outcome, Miss) else bytes(target[:outcome])


def offset_of(tier: NvmeTier, key: bytes) -> int:
    """Where in the volume file a chunk begins."""
    entry = tier._volume.space.index.get(key)
    assert entry is not None
    return tier._volume.position(entry)


def test_bad_places_survive_a_crash_before_the_next_checkpoint(tmp_path: Path) -> None:
    first, second, third = list(CHUNKS)[:3]
    nbytes = page_up(len(CHUNKS[first]))
    io = ScratchedIo()
    tier = NvmeTier(tmp_path / "tier", CAPACITY_BYTES, io=io)
    assert put(tier, first, second) == [None, None]
    scratched = offset_of(tier, first)
    io.unreadable = range(scratched, scratched + IO_ALIGN)
    assert read(tier, first) is Reason.IO_ERROR
    io.unwritable = range(scratched + nbytes * 2, scratched + nbytes * 3)
    assert put(tier, third) == [Reason.IO_ERROR]
    tier.delete([second])  # durable, and so is what was queued before it
    shutil.copytree(tmp_path / "tier", tmp_path / "crashed")
    tier.close()
    for directory in (tmp_path / "tier", tmp_path / "crashed"):
        report = fsck.check(directory)
        assert report.clean, report.text()
        assert report.quarantined_bytes == 2 * nbytes
        again = NvmeTier(directory, CAPACITY_BYTES)
        assert again.counters()["quarantined_bytes"] == 2 * nbytes
        put(again, *CHUNKS)
        taken = {offset_of(again, entry.key) for entry in again.scan()}
        assert taken
        assert not taken & {scratched, scratched + 2 * nbytes}
        again.close()


def test_an_error_that_passes_keeps_the_chunk(tmp_path: Path) -> None:
    io = ScratchedIo()
    tier = NvmeTier(tmp_path, CAPACITY_BYTES, io=io)
    key = next(iter(CHUNKS))
    put(tier, key)
    io.busy = True
    assert read(tier, key) is Reason.IO_ERROR
    io.busy = False
    assert read(tier, key) == CHUNKS[key]
    assert tier.counters()["quarantined_bytes"] == 0
    tier.close()
