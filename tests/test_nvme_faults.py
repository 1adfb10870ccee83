"""The nvme tier on a device that fails, call by call, in every way; and the order of its system calls."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import lmdb
import pytest

from kvstore.buffers import aligned_buffer
from kvstore.codecs.raw import RawCodec
from kvstore.counters import tier_stats
from kvstore.errors import TierError
from kvstore.outcome import Miss, Reason
from kvstore.testing.chunks import sample_container, sample_key
from kvstore.testing.hammer import hammer
from kvstore.tier import IO_ALIGN, PutItem, ReadItem
from kvstore.tiers import fsck
from kvstore.tiers.directio import PosixIo, page_up
from kvstore.tiers.journal import Page
from kvstore.tiers.nvme import NvmeTier
from kvstore.tiers.records import RECORD
from kvstore.tiers.volume import VOLUME_NAME, Superblock, read_superblock

CAPACITY_BYTES = 48 * IO_ALIGN
TOKENS = (16, 40, 100, 60, 9, 33, 70, 90)
CHUNKS = {
    sample_key(n): sample_container(sample_key(n), tokens=tokens, codec=RawCodec()) for n, tokens in enumerate(TOKENS)
}
"""Eight containers of 2 to 14 pages, together more than the volume takes; of one segment, so that every bit counts."""


class FaultyIo(PosixIo):
    """The real system calls, but call number `nth` (from 1; 0: none) does what `kind` says instead."""

    def __init__(self, kind: str = "", nth: int = 0) -> None:
        self.kind = kind
        self.nth = nth
        self.calls = 0
        self.flipped = False

    def _due(self) -> bool:
        self.calls += 1
        return self.calls == self.nth

    def _raise(self) -> None:
        if self.kind in ("EIO", "ENOSPC"):
            number = getattr(errno, self.kind)
            raise OSError(number, os.strerror(number))

    def read(self, descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        due = self._due()
        if due:
            self._raise()
            if self.kind == "short":
                return super().read(descriptor, [buffers[0][: IO_ALIGN // 2]], offset)
        return super().read(descriptor, buffers, offset)

    def write(self, descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        if not self._due():
            return super().write(descriptor, buffers, offset)
        self._raise()
        if self.kind == "short":
            return super().write(
                descriptor, [buffers[0][: max(IO_ALIGN, len(buffers[0]) // 2 // IO_ALIGN * IO_ALIGN)]], offset
            )
        if self.kind == "torn":
            super().write(descriptor, [buffers[0][:IO_ALIGN]], offset)
            raise OSError(errno.EIO, "torn")
        self.flipped = True
        damaged = aligned_buffer(sum(map(len, buffers)))
        damaged[:] = b"".join(buffers)
        damaged[len(damaged) // 2] ^= 1
        return super().write(descriptor, [damaged], offset)

    def sync(self, descriptor: int) -> None:
        if self._due():
            self._raise()
        super().sync(descriptor)

    def allocate(self, descriptor: int, nbytes: int) -> None:
        if self._due():
            self._raise()
        super().allocate(descriptor, nbytes)


def read_back(tier: NvmeTier, key: bytes) -> bytes | Reason:
    """The chunk's bytes, or why it missed."""
    target = aligned_buffer(page_up(len(CHUNKS[key])))
    (outcome,) = tier.read([ReadItem(key, target)])
    return outcome.reason if isinstance(outcome, Miss) else bytes(target[:outcome])


def live(directory: Path, io: FaultyIo) -> set[bytes]:
    """Open a tier and use it a little; answers the chunks it says it holds at the end."""
    tier = NvmeTier(directory, CAPACITY_BYTES, io=io, io_threads=1, piece_bytes=4 * IO_ALIGN)
    keys = list(CHUNKS)
    try:
        for batch in (keys[:3], keys[3:5], keys[5:]):
            for status in tier.put([PutItem(key, memoryview(CHUNKS[key])) for key in batch]):
                assert status.stored == status.durable
                assert status.stored or status.reason in (Reason.IO_ERROR, Reason.FULL)
        for key in keys:
            assert io.flipped or read_back(tier, key) in (CHUNKS[key], Reason.ABSENT, Reason.IO_ERROR)
        tier.delete(keys[4:5])
        tier.put([PutItem(key, memoryview(CHUNKS[key])) for key in keys[:1]])
        assert tier.usage().used_bytes <= tier.capacity_bytes
        return {entry.key for entry in tier.scan()}
    finally:
        try:
            tier.close()
        except TierError:
            assert tier.info()["read_only"]


def calls_of_a_life(directory: Path) -> int:
    """System calls of a life without faults."""
    io = FaultyIo()
    live(directory, io)
    return io.calls


@pytest.mark.parametrize("kind", ["EIO", "ENOSPC", "short", "torn", "flip"])
def test_every_call_may_fail(kind: str, tmp_path: Path) -> None:
    total = calls_of_a_life(tmp_path / "whole")
    assert total > 30
    for nth in range(1, total + 1):
        directory = tmp_path / str(nth)
        io = FaultyIo(kind, nth)
        held: set[bytes] = set()
        try:
            held = live(directory, io)
        except TierError as error:
            one_line(error)
        if io.flipped and (not (directory / "volume-000").exists() or _superblock_is_damaged(directory)):
            continue
        report = fsck.check(directory) if (directory / "volume-000").exists() else None
        assert report is None or io.flipped or not report.problem_count, f"call {nth}: {report}"
        tier = NvmeTier(directory, CAPACITY_BYTES)
        try:
            present = {entry.key for entry in tier.scan()}
            assert held <= present, f"call {nth}: acknowledged chunks are lost"
            wrong = [key for key in present if read_back(tier, key) != CHUNKS[key]]
        finally:
            tier.close()
        assert not wrong or io.flipped, f"call {nth}: wrong bytes"
        if wrong:  # the device lied: the tier cannot know, but the container says so and fsck finds it
            assert [problem.key for problem in fsck.check(directory, repair=True).problems] == [wrong[0].hex()]
            assert not fsck.check(directory).problem_count


def one_line(error: TierError) -> None:
    """Errors are one clear line."""
    assert "\n" not in str(error)


def _superblock_is_damaged(directory: Path) -> bool:
    return any(problem.part == "superblock" for problem in fsck.check(directory, deep=False).problems)


class WatchedIo(PosixIo):
    """The real system calls, which check the protocol: what is written, flushed and named, in which order."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.named: dict[bytes, tuple[int, int]] = {}
        self.written: list[tuple[int, int]] = []
        self.pages: list[Page] = []
        self.broken_rules: list[str] = []
        self.superblock: Superblock | None = None

    def write(self, descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        if self.superblock is not None:
            with self.lock:
                if offset < self.superblock.data_start:
                    self._check_pages(self.superblock, b"".join(buffers))
                else:
                    start = offset - self.superblock.data_start
                    self._check_data((start, start + sum(map(len, buffers))))
        return super().write(descriptor, buffers, offset)

    def _check_pages(self, superblock: Superblock, data: bytes) -> None:
        for at in range(0, len(data), IO_ALIGN):
            page = Page.parse(data[at : at + IO_ALIGN], superblock.uuid)
            assert page is not None
            self.pages.append(page)
            for key, record, _ in page.operations:
                extent = _extent(record) if record is not None else None
                if extent is not None and self.named.get(key) != extent:
                    covered = sum(
                        min(extent[1], stop) - max(extent[0], start)
                        for start, stop in self.written
                        if _overlap(extent, (start, stop))
                    )
                    if covered < extent[1] - extent[0]:
                        self.broken_rules.append("a record was written before its bytes")

    def _check_data(self, extent: tuple[int, int]) -> None:
        pending = [_extent(record) for page in self.pages for _, record, _ in page.operations if record is not None]
        if any(_overlap(extent, named) for named in [*self.named.values(), *pending]):
            self.broken_rules.append("wrote over bytes that a record names")
        self.written.append(extent)

    def sync(self, descriptor: int) -> None:
        with self.lock:
            flushed, self.pages = self.pages, []
        super().sync(descriptor)
        with self.lock:
            for page in flushed:
                for key, record, _ in page.operations:
                    old = self.named.pop(key, None)
                    self.written = [extent for extent in self.written if old is None or not _overlap(extent, old)]
                    if record is not None:
                        self.named[key] = _extent(record)

    def watch(self, tier: NvmeTier) -> None:
        """Look at every write to the tier from now on."""
        self.superblock = read_superblock(tier._volume.path / VOLUME_NAME)


def _extent(record: bytes) -> tuple[int, int]:
    _, _, _, offset, nbytes, _, _ = RECORD.unpack(record)
    return offset, offset + page_up(nbytes)


def _overlap(one: tuple[int, int], other: tuple[int, int]) -> bool:
    return one[0] < other[1] and other[0] < one[1]


@pytest.mark.parametrize("ahead_bytes", [0, 1 << 18])
def test_records_and_bytes_keep_their_order(ahead_bytes: int, tmp_path: Path) -> None:
    io = WatchedIo()
    tier = NvmeTier(tmp_path, 1 << 20, io=io, piece_bytes=4 * IO_ALIGN, evict_ahead_bytes=ahead_bytes)
    try:
        io.watch(tier)
        hammer(tier, nbytes_max=1 << 17, rounds=60)
        assert tier.counters()["evictions"] > 20
    finally:
        tier.close()
    assert io.broken_rules == []


@pytest.fixture
def tier(tmp_path: Path) -> Iterator[NvmeTier]:
    tier = NvmeTier(tmp_path / "tier", CAPACITY_BYTES)
    yield tier
    try:
        tier.close()
    except TierError:
        assert tier.info()["read_only"]


def put_all(tier: NvmeTier, keys: Sequence[bytes]) -> list[bool]:
    """Put containers one by one; says which were stored."""
    return [tier.put([PutItem(key, memoryview(CHUNKS[key]))])[0].stored for key in keys]


def fail_with(error: Exception) -> Callable[..., None]:
    """A function that raises."""

    def fail(*_: object) -> None:
        raise error

    return fail


@pytest.mark.parametrize("part", ["_sync", "_apply"])
def test_a_failed_commit_makes_the_tier_read_only(tier: NvmeTier, part: str, tmp_path: Path) -> None:
    keys = list(CHUNKS)
    assert put_all(tier, keys[:2]) == [True, True]
    assert tier_stats(tier)["read_only"] == ""
    error = OSError(errno.EIO, "no sync") if part == "_sync" else lmdb.DiskError("no commit")
    setattr(tier._volume.committer, part, fail_with(error))
    if part == "_apply":  # a checkpoint; chunks are durable without one until the next is due
        with pytest.raises(TierError, match="cannot be written"):
            tier.flush()
    (status,) = tier.put([PutItem(keys[2], memoryview(CHUNKS[keys[2]]))])
    assert not status.stored
    assert status.reason is Reason.IO_ERROR
    (status,) = tier.put([PutItem(keys[3], memoryview(CHUNKS[keys[3]]))])
    assert status.reason is Reason.IO_ERROR
    assert "reopen" in status.detail
    assert "reopen" in tier_stats(tier)["read_only"]
    assert read_back(tier, keys[0]) == CHUNKS[keys[0]]
    assert read_back(tier, keys[2]) is Reason.ABSENT
    with pytest.raises(TierError, match="cannot be written"):
        tier.flush()
    tier.close()
    again = NvmeTier(tmp_path / "tier", CAPACITY_BYTES)
    assert again.sizes(keys[:2]) == [len(CHUNKS[keys[0]]), len(CHUNKS[keys[1]])]
    # What was written and never flushed may be there, whole; what was refused before that is not.
    assert again.sizes(keys[2:4]) == [len(CHUNKS[keys[2]]) if part == "_sync" else None, None]
    assert put_all(again, keys[2:3]) == [True]
    assert read_back(again, keys[2]) == CHUNKS[keys[2]]
    again.close()


def test_a_chunk_on_a_bad_place_is_dropped_and_the_place_not_used_again(tmp_path: Path) -> None:
    io = FaultyIo("EIO")
    tier = NvmeTier(tmp_path, CAPACITY_BYTES, io=io)
    key, other = list(CHUNKS)[:2]
    put_all(tier, [key])
    place = tier._volume.space.index.get(key)
    assert place is not None
    io.nth = io.calls + 1
    assert read_back(tier, key) is Reason.IO_ERROR
    assert read_back(tier, key) is Reason.ABSENT
    assert put_all(tier, [key, other]) == [True, True]
    assert place.offset not in {entry.offset for entry in tier._volume.space.index}
    counters = tier.counters()
    assert counters["io_errors"] == 1
    assert counters["quarantined_bytes"] == page_up(len(CHUNKS[key]))
    tier.close()
    report = fsck.check(tmp_path)
    assert report.clean
    assert report.quarantined_bytes == page_up(len(CHUNKS[key]))
    again = NvmeTier(tmp_path, CAPACITY_BYTES)
    stored = sum(page_up(len(CHUNKS[k])) for k in (key, other))
    assert again.usage().used_bytes == stored + page_up(len(CHUNKS[key]))
    assert again.counters()["quarantined_bytes"] == page_up(len(CHUNKS[key]))
    put_all(again, list(CHUNKS)[2:])
    assert place.offset not in {entry.offset for entry in again._volume.space.index}
    again.close()


def test_a_volume_cut_under_a_running_tier_is_an_io_error(tier: NvmeTier, tmp_path: Path) -> None:
    key = next(iter(CHUNKS))
    put_all(tier, [key])
    os.truncate(tmp_path / "tier" / "volume-000", IO_ALIGN + 1)
    assert read_back(tier, key) is Reason.IO_ERROR
    assert read_back(tier, key) is Reason.ABSENT
