"""Several volumes as one tier: the tier's contract, where chunks go, what survives, and what cannot be opened."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore import config
from kvstore.buffers import aligned_buffer
from kvstore.compose import open_store
from kvstore.errors import ConfigError, TierError, VolumeBusyError
from kvstore.keys import ROOT
from kvstore.outcome import Miss, Reason
from kvstore.testing.chunks import sample_container, sample_key
from kvstore.testing.harness import key_of, present, put
from kvstore.testing.tier import DurableContract, TierContract
from kvstore.testing.tier_model import TierModel
from kvstore.tier import IO_ALIGN, PutItem, ReadItem, Tier
from kvstore.tiers import fsck, registry
from kvstore.tiers.directio import PosixIo, page_up
from kvstore.tiers.extents import ExtentAllocator
from kvstore.tiers.nvme import NvmeTier
from kvstore.tiers.stripes import StripedExtents
from kvstore.tiers.volume import BASE_BITS, VOLUME_NAME, journal_pages, read_superblock

CAPACITY_BYTES = 3 << 20
KEYS = [sample_key(number) for number in range(24)]
CHUNKS = {key: sample_container(key, tokens=64) for key in KEYS}
NBYTES = len(CHUNKS[KEYS[0]])
LOCAL = (1 << BASE_BITS) - 1


def stored_bytes(tier: Tier, key: bytes) -> bytes | None:
    """What the volume files say a chunk's bytes are."""
    assert isinstance(tier, NvmeTier)
    entry = tier._volume.space.index.get(key)
    if entry is None:
        return None
    position = tier._volume.position(entry)
    paths = {disk.superblock.volume: disk.path for disk in tier._volume.disks}
    with (paths[position >> BASE_BITS] / VOLUME_NAME).open("rb") as file:
        file.seek(position & LOCAL)
        return file.read(entry.nbytes)


def open_two(capacity_bytes: int, clock: Callable[[], float], directory: Path) -> Tier:
    """A tier of two volumes."""
    return NvmeTier([directory / "a", directory / "b"], capacity_bytes, clock=clock, piece_bytes=4 * IO_ALIGN)


class TestStripedTier(DurableContract, TierContract):
    """The contract of every tier; two of its four chunks fit each volume."""

    open_tier = staticmethod(open_two)
    stored_bytes = staticmethod(stored_bytes)

    @property
    def quarter(self) -> int:
        pages = self.capacity_bytes // 2 // IO_ALIGN - 1 - journal_pages(self.capacity_bytes // 2)
        return pages // 2 * IO_ALIGN

    def test_nothing_is_evicted_in_vain(self, tier: Tier) -> None:
        """The same with a pinned chunk on each volume."""
        self.fill(tier)
        tier.pin([key_of(2), key_of(3)], expires_at=2000.0)
        assert put(tier, 9, tier.chunk_bytes_max).reason is Reason.FULL
        assert present(tier, range(5)) == [0, 1, 2, 3]
        assert tier.counters()["evictions"] == 0


class StripedModel(TierModel):
    """Two volumes against a dict, with reopening; chunks are half as large, so that the largest fits a volume."""

    open_tier = staticmethod(open_two)

    def size_of(self, number: int) -> int:
        return -(-super().size_of(number) // 2)


TestStripedModel = StripedModel.TestCase
TestStripedModel.settings = settings(max_examples=15, stateful_step_count=25, deadline=None)


def disks(tmp_path: Path, count: int = 3) -> list[Path]:
    """Directories of volumes."""
    return [tmp_path / f"disk-{number}" for number in range(count)]


def put_chain(tier: NvmeTier, keys: Sequence[bytes], parent: bytes = ROOT) -> list[Reason | None]:
    """Put containers as one chain; why each was refused."""
    items = [PutItem(k, memoryview(CHUNKS[k]), p) for k, p in zip(keys, [parent, *keys], strict=False)]
    return [status.reason for status in tier.put(items)]


def volumes_of(tier: NvmeTier, keys: Sequence[bytes]) -> list[int]:
    """Which volume each chunk lies on."""
    entries = [tier._volume.space.index.get(key) for key in keys]
    return [entry.offset >> BASE_BITS for entry in entries if entry is not None]


def check(tier: NvmeTier, keys: Sequence[bytes]) -> None:
    """The tier holds exactly these chunks, whole."""
    assert {entry.key for entry in tier.scan()} == set(keys)
    targets = [aligned_buffer(page_up(NBYTES)) for _ in keys]
    assert tier.read([ReadItem(key, target) for key, target in zip(keys, targets, strict=True)]) == [NBYTES] * len(keys)
    assert all(target[:NBYTES] == CHUNKS[key] for key, target in zip(keys, targets, strict=True))


def test_a_chain_goes_to_the_volumes_in_turn_and_lies_together_on_each(tmp_path: Path) -> None:
    tier = NvmeTier(disks(tmp_path), CAPACITY_BYTES)
    assert put_chain(tier, KEYS[:12]) == [None] * 12
    turns = volumes_of(tier, KEYS[:12])
    assert sorted(turns[:3]) == [0, 1, 2]
    assert turns == turns[:3] * 4
    for number in range(3):
        own = [tier._volume.space.index.get(key) for key in KEYS[number:12:3]]
        offsets = [entry.offset for entry in own if entry is not None]
        assert [b - a for a, b in itertools.pairwise(offsets)] == [page_up(NBYTES)] * 3
    put_chain(tier, KEYS[12:15], KEYS[11])
    assert volumes_of(tier, KEYS[12:15]) == turns[:3]
    check(tier, KEYS[:15])
    tier.close()


def test_what_was_stored_is_there_again_in_any_order_of_the_paths(tmp_path: Path) -> None:
    paths = disks(tmp_path)
    tier = NvmeTier(paths, CAPACITY_BYTES)
    put_chain(tier, KEYS)
    tier.delete(KEYS[20:])
    tier.touch(KEYS[:5])
    order = [entry.key for entry in tier.scan()]
    tier.close()
    tier = NvmeTier(paths[::-1], CAPACITY_BYTES)
    assert [entry.key for entry in tier.scan()] == order
    check(tier, KEYS[:20])
    assert tier.info()["paths"] == [str(path) for path in paths[::-1]]
    tier.close()
    assert all(fsck.check(path).problem_count == 0 for path in paths)
    assert sum(fsck.check(path).entries for path in paths) == 20


def test_a_volume_can_be_added_left_out_and_brought_back(tmp_path: Path) -> None:
    paths = disks(tmp_path)
    tier = NvmeTier(paths[0], CAPACITY_BYTES // 3)
    put_chain(tier, KEYS[:6])
    tier.close()
    tier = NvmeTier([paths[1], paths[0]], CAPACITY_BYTES // 3 * 2)
    check(tier, KEYS[:6])
    assert put_chain(tier, KEYS[6:12], KEYS[5]) == [None] * 6
    here = volumes_of(tier, KEYS[:12])
    assert set(here) == {0, 1}
    tier.close()
    tier = NvmeTier(paths[1], CAPACITY_BYTES // 3)
    left = [key for key, number in zip(KEYS, here, strict=False) if number == 1]
    check(tier, left)
    assert put_chain(tier, [KEYS[0]]) == [None]  # now on both volumes
    tier.close()
    tier = NvmeTier(paths[:2], CAPACITY_BYTES // 3 * 2)
    check(tier, KEYS[:12])
    assert tier.counters()["records_dropped"] == 1
    tier.close()
    assert sum(fsck.check(path).entries for path in paths[:2]) == 12


def test_all_volumes_shrink_and_no_chunk_stays_without_those_before_it(tmp_path: Path) -> None:
    paths = disks(tmp_path, 2)
    tier = NvmeTier(paths, CAPACITY_BYTES)
    put_chain(tier, KEYS)
    tier.close()
    start = read_superblock(paths[0] / VOLUME_NAME).data_start
    tier = NvmeTier(paths, 2 * (start + 5 * page_up(NBYTES)))
    check(tier, KEYS[:10])
    assert put_chain(tier, KEYS[20:22]) == [None, None]
    tier.close()
    assert all(fsck.check(path).problem_count == 0 for path in paths)


class BadVolume(PosixIo):
    """Real system calls, but one volume's file cannot be flushed, or some of its pages cannot be read."""

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self.descriptors: set[int] = set()
        self.no_sync = self.no_read = False

    def open(self, path: str, flags: int) -> int:
        descriptor = super().open(path, flags)
        if self.directory in path:
            self.descriptors.add(descriptor)
        return descriptor

    def close(self, descriptor: int) -> None:
        self.descriptors.discard(descriptor)
        super().close(descriptor)

    def read(self, descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        if self.no_read and descriptor in self.descriptors:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return super().read(descriptor, buffers, offset)

    def sync(self, descriptor: int) -> None:
        if self.no_sync and descriptor in self.descriptors:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        super().sync(descriptor)


def test_a_volume_that_cannot_be_read_costs_its_own_chunks(tmp_path: Path) -> None:
    paths = disks(tmp_path)
    io = BadVolume("disk-1")
    tier = NvmeTier(paths, CAPACITY_BYTES, io=io)
    put_chain(tier, KEYS[:9])
    here = volumes_of(tier, KEYS[:9])
    io.no_read = True
    targets = [aligned_buffer(page_up(NBYTES)) for _ in range(9)]
    got = tier.read([ReadItem(key, target) for key, target in zip(KEYS, targets, strict=False)])
    assert [isinstance(outcome, Miss) for outcome in got] == [number == 1 for number in here]
    io.no_read = False
    check(tier, [key for key, number in zip(KEYS, here, strict=False) if number != 1])
    tier.close()
    assert [fsck.check(path).quarantined_bytes for path in paths] == [0, 3 * page_up(NBYTES), 0]


def test_a_volume_that_cannot_commit_makes_the_tier_read_only(tmp_path: Path) -> None:
    paths = disks(tmp_path)
    io = BadVolume("disk-2")
    tier = NvmeTier(paths, CAPACITY_BYTES, io=io)
    put_chain(tier, KEYS[:6])
    io.no_sync = True
    assert Reason.IO_ERROR in put_chain(tier, KEYS[6:9], KEYS[5])
    assert put_chain(tier, [KEYS[12]]) == [Reason.IO_ERROR]
    targets = [aligned_buffer(page_up(NBYTES)) for _ in range(6)]
    got = tier.read([ReadItem(key, target) for key, target in zip(KEYS, targets, strict=False)])
    assert got == [NBYTES] * 6
    tier.close()
    tier = NvmeTier(paths, CAPACITY_BYTES)
    assert {entry.key for entry in tier.scan()} >= set(KEYS[:6])
    tier.close()


def test_volumes_that_do_not_go_together_are_refused_in_one_line(tmp_path: Path) -> None:
    for name in ("a", "b"):
        NvmeTier(tmp_path / name, CAPACITY_BYTES).close()
    for paths, error, words in (
        ([tmp_path / "a", tmp_path / "b"], TierError, "were not made for one tier"),
        ([tmp_path / "a", tmp_path / "a"], ConfigError, "one of them twice"),
        ([], ConfigError, "no directory"),
        (disks(tmp_path, 17), TierError, "at most 16"),
    ):
        with pytest.raises(error, match=words) as caught:
            registry.open_tier("nvme", name="nvme", capacity_bytes=8 * CAPACITY_BYTES, path=paths)
        assert "\n" not in str(caught.value)
    tier = NvmeTier(tmp_path / "a", CAPACITY_BYTES)
    shutil.rmtree(tmp_path / "b")
    with pytest.raises(VolumeBusyError):
        NvmeTier([tmp_path / "b", tmp_path / "a"], 2 * CAPACITY_BYTES)
    tier.close()
    tier = NvmeTier([tmp_path / "b", tmp_path / "a"], 2 * CAPACITY_BYTES)
    tier.close()


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 6 * IO_ALIGN)), max_size=60))
def test_the_allocator_of_several_volumes_overlaps_nothing_and_loses_nothing(steps: list[tuple[int, int]]) -> None:
    extents = StripedExtents({number: ExtentAllocator(12 * IO_ALIGN) for number in (0, 3, 7)})
    taken: dict[int, int] = {}
    last = None
    for verb, nbytes in steps:
        if verb == 0 and taken:
            offset = sorted(taken)[nbytes % len(taken)]
            extents.free(offset, taken.pop(offset))
            continue
        offset_or_none = extents.allocate(nbytes, behind=last if verb == 1 else None, run_bytes=2 * nbytes)
        if offset_or_none is not None:
            offset, last = offset_or_none, offset_or_none + page_up(nbytes)
            assert any(start <= offset and last <= end for start, end in extents.regions)
            assert all(offset >= at + page_up(size) or last <= at for at, size in taken.items())
            taken[offset] = nbytes
    assert extents.used_bytes == sum(page_up(nbytes) for nbytes in taken.values())
    assert extents.free_bytes == extents.capacity_bytes - extents.used_bytes


def test_a_list_of_paths_comes_from_the_configuration(tmp_path: Path) -> None:
    toml = tmp_path / "kvstore.toml"
    toml.write_text(
        '[tiers.dram]\ncapacity = "1MiB"\n[tiers.nvme]\ncapacity = "2MiB"\n'
        f'path = ["{tmp_path / "a"}", "{tmp_path / "b"}"]\n'
    )
    resolved, _ = config.load(str(toml), environment={})
    store = open_store(resolved)
    try:
        assert (tmp_path / "a" / VOLUME_NAME).stat().st_size == (tmp_path / "b" / VOLUME_NAME).stat().st_size == 1 << 20
    finally:
        store.close()
