"""A volume that shrinks: who leaves, what stays, and a crash between any two of its steps."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.buffers import aligned_buffer
from kvstore.errors import TierError
from kvstore.keys import ROOT
from kvstore.testing.chunks import sample_container, sample_key
from kvstore.testing.harness import key_of
from kvstore.tier import IO_ALIGN, PutItem, ReadItem
from kvstore.tiers import fsck, resize
from kvstore.tiers.directio import PosixIo, page_up
from kvstore.tiers.index import ChunkEntry
from kvstore.tiers.nvme import NvmeTier
from kvstore.tiers.volume import journal_pages

CAPACITY_BYTES = 1 << 20
KEYS = [sample_key(number) for number in range(12)]
CHUNKS = {key: sample_container(key, tokens=120) for key in KEYS}


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    """A closed volume with two chains of six containers each, one behind the other."""
    tier = NvmeTier(tmp_path / "tier", CAPACITY_BYTES)
    for start in (0, 6):
        chain = KEYS[start : start + 6]
        tier.put([PutItem(k, memoryview(CHUNKS[k]), p) for k, p in zip(chain, [ROOT, *chain], strict=False)])
    tier.close()
    return tmp_path / "tier"


def check(volume: Path, capacity_bytes: int) -> set[bytes]:
    """What an opened volume holds, after every chunk has been compared and fsck has found nothing."""
    tier = NvmeTier(volume, capacity_bytes)
    try:
        found = {entry.key: entry for entry in tier.scan()}
        for key, entry in found.items():
            target = aligned_buffer(page_up(entry.nbytes))
            assert tier.read([ReadItem(key, target)]) == [entry.nbytes]
            assert target[: entry.nbytes] == CHUNKS[key]
            assert entry.parent == ROOT or entry.parent in found, "a chunk stayed without the one before it"
        assert tier.usage().used_bytes == sum(page_up(entry.nbytes) for entry in found.values())
    finally:
        tier.close()
    assert (volume / "volume-000").stat().st_size == capacity_bytes
    assert fsck.check(volume).problem_count == 0
    return set(found)


def bytes_for(chunks: int) -> int:
    """A capacity that the first chunks fit in."""
    pages = 1 + journal_pages(CAPACITY_BYTES) + chunks * page_up(len(CHUNKS[KEYS[0]])) // IO_ALIGN
    return pages * IO_ALIGN


@pytest.mark.parametrize("chunks", [11, 8, 6, 3, 1])
def test_what_lies_behind_the_new_end_leaves_and_the_rest_stays(volume: Path, chunks: int) -> None:
    assert check(volume, bytes_for(chunks)) == set(KEYS[:chunks])
    assert check(volume, CAPACITY_BYTES) == set(KEYS[:chunks])


def test_a_shrunk_volume_is_used_to_its_end_and_not_beyond(volume: Path) -> None:
    tier = NvmeTier(volume, bytes_for(3))
    assert all(status.durable for status in tier.put([PutItem(k, memoryview(CHUNKS[k])) for k in KEYS[3:]]))
    assert tier.usage().entries == 3
    tier.close()
    assert len(check(volume, bytes_for(3))) == 3


def test_a_volume_cannot_be_smaller_than_its_journal(tmp_path: Path) -> None:
    NvmeTier(tmp_path, 16 << 20).close()
    with pytest.raises(TierError, match="cannot shrink to 65536 bytes") as caught:
        NvmeTier(tmp_path, 16 * IO_ALIGN)
    assert "\n" not in str(caught.value)
    NvmeTier(tmp_path, 16 << 20).close()


class BadSuperblockIo(PosixIo):
    """A device that refuses the first page."""

    def write(self, descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        if offset == 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return super().write(descriptor, buffers, offset)


def test_a_crash_between_the_steps_leaves_a_sound_volume(volume: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TierError, match="cannot allocate"):
        NvmeTier(volume, bytes_for(8), io=BadSuperblockIo())
    assert fsck.check(volume).problem_count == 0
    assert check(volume, CAPACITY_BYTES) == set(KEYS[:8])

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "truncate", crash)
        with pytest.raises(KeyboardInterrupt):
            NvmeTier(volume, bytes_for(4))
    assert (volume / "volume-000").stat().st_size == CAPACITY_BYTES
    assert check(volume, bytes_for(4)) == set(KEYS[:4])


@given(st.lists(st.tuples(st.integers(0, 11), st.integers(0, 11)), max_size=12, unique_by=lambda c: c[0]))
def test_whoever_leaves_takes_what_comes_after_it(links: list[tuple[int, int]]) -> None:
    entries = [ChunkEntry(key_of(n), n * IO_ALIGN, IO_ALIGN, 0, key_of(parent)) for n, parent in links]
    parents = dict(links)
    expected = set()
    for number in parents:
        seen: set[int] = set()
        at = number
        while at in parents and at not in seen:
            if at >= 6:
                expected.add(key_of(number))
            seen.add(at)
            at = parents[at]
    assert set(resize.leaving(entries, lambda entry: entry.offset < 6 * IO_ALIGN)) == expected
