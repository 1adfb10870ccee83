"""The journal: which pages are believed, and what they say together."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.errors import VolumeFormatError
from kvstore.testing.chunks import sample_container, sample_key
from kvstore.testing.harness import bytes_of, key_of
from kvstore.tier import IO_ALIGN, PutItem
from kvstore.tiers import fsck
from kvstore.tiers.catalog import Position
from kvstore.tiers.evidence import Evidence, Kind, agrees, evidence_of
from kvstore.tiers.index import ChunkEntry
from kvstore.tiers.journal import OPERATIONS_PER_PAGE, Page, Replay, replay
from kvstore.tiers.nvme import NvmeTier
from kvstore.tiers.records import Operation, pack_record
from kvstore.tiers.volume import VOLUME_NAME, read_superblock

UUID = bytes(range(16))
EPOCH = 77
RING_PAGES = 4


def stored(number: int, digest: int = 0) -> Operation:
    """Chunk `number` was stored, one page at place `number`."""
    entry = ChunkEntry(key_of(number), number * IO_ALIGN, 100, number)
    return Operation(entry.key, pack_record(entry), Evidence(Kind.BYTES, digest))


def deleted(number: int) -> Operation:
    """Chunk `number` was deleted."""
    return Operation(key_of(number), None)


def ring(*pages: Page | None) -> bytes:
    """A ring with these pages, each at its place."""
    out = bytearray(RING_PAGES * IO_ALIGN)
    for page in pages:
        if page is not None:
            start = page.sequence % RING_PAGES * IO_ALIGN
            out[start : start + IO_ALIGN] = page.pack(UUID)
    return bytes(out)


def read(data: bytes, sequence: int = 0, there: Callable[[bytes], bool] = lambda key: True) -> Replay:
    """What a ring says beyond a checkpoint at `sequence`."""
    return replay(data, UUID, Position(EPOCH, sequence), lambda key, record, evidence: there(key))


def page(sequence: int, *operations: Operation, confirmed: int | None = None, epoch: int = EPOCH) -> Page:
    """A page that confirms all before it."""
    return Page(epoch, sequence, sequence if confirmed is None else confirmed, list(operations))


def test_what_was_written_is_read_in_order() -> None:
    found = read(ring(page(0, stored(1), stored(2)), page(1, deleted(1)), page(2, stored(1, 5))))
    assert found.rows == {key_of(1): stored(1).record, key_of(2): stored(2).record}
    assert (found.pages, found.dropped, found.damage) == (3, [], "")
    assert read(bytes(RING_PAGES * IO_ALIGN)) == Replay({}, [], 0)


def test_pages_of_another_epoch_or_lap_or_volume_are_stale() -> None:
    assert read(ring(page(0, stored(1)), page(1, stored(2), epoch=EPOCH + 1))).pages == 1
    assert read(ring(page(4, stored(1)), page(1, stored(2))), sequence=4).rows == {key_of(1): stored(1).record}
    foreign = page(0, stored(1)).pack(bytes(16)) + bytes((RING_PAGES - 1) * IO_ALIGN)
    assert read(foreign).pages == 0
    moved = ring(page(0, stored(1)))
    assert read(moved[IO_ALIGN:] + moved[:IO_ALIGN]).pages == 0


def test_nothing_is_believed_behind_a_page_that_is_missing() -> None:
    found = read(ring(page(0, stored(1)), page(2, stored(2), confirmed=1)))
    assert found.rows == {key_of(1): stored(1).record}
    assert found.damage == ""


def test_only_what_was_not_confirmed_is_compared_with_the_device() -> None:
    asked = []

    def there(key: bytes) -> bool:
        asked.append(key)
        return key == key_of(4)

    pages = (page(0, stored(1)), page(1, stored(2), stored(3)), page(2, stored(4), deleted(3), confirmed=1))
    found = read(ring(*pages), there=there)
    assert asked == [key_of(2), key_of(4)]
    assert found.dropped == [key_of(2)]
    assert found.rows == {
        key_of(1): stored(1).record,
        key_of(2): None,
        key_of(3): None,
        key_of(4): stored(4).record,
    }


def test_a_lost_page_that_had_been_flushed_is_damage() -> None:
    found = read(ring(page(0, stored(1)), page(2, stored(2), confirmed=2)))
    assert "page 1 is lost" in found.damage
    assert set(found.rows) == {key_of(1), key_of(2)}


@settings(deadline=None)
@given(st.binary(max_size=200), st.integers(0, IO_ALIGN - 1), st.binary(min_size=1, max_size=64))
def test_any_bytes_are_the_page_or_none(start: bytes, at: int, change: bytes) -> None:
    whole = page(3, *(stored(number) for number in range(OPERATIONS_PER_PAGE - 1)), deleted(99))
    packed = whole.pack(UUID)
    assert Page.parse(packed, UUID) == whole
    changed = (packed[:at] + change + packed[at + len(change) :])[:IO_ALIGN]
    assert Page.parse(changed, UUID) == (whole if changed == packed else None)
    assert Page.parse(start.ljust(IO_ALIGN, b"\0"), UUID) is None
    assert Page.parse(packed[:at], UUID) is None


@pytest.mark.parametrize("container", [True, False])
def test_evidence_agrees_with_its_own_bytes_only(container: bool) -> None:
    key = sample_key(1)
    data = sample_container(key, tokens=64) if container else bytes_of(1, 20_000)
    evidence = evidence_of(memoryview(data))
    assert evidence.kind == (Kind.CONTAINER if container else Kind.BYTES)
    assert agrees(evidence, key, memoryview(data))
    for at in (0, 5, 300, 4096, len(data) - 1):
        changed = bytearray(data)
        changed[at] ^= 1
        assert not agrees(evidence, key, memoryview(changed)), at
    assert not agrees(evidence, key, memoryview(data)[:-1])
    assert not agrees(Evidence(), key, memoryview(data))
    if container:
        assert not agrees(evidence, sample_key(2), memoryview(data))
        other = sample_container(key, seed=9, tokens=64)
        assert not agrees(evidence, key, memoryview(other))
        assert evidence_of(memoryview(data + b"x")).kind == Kind.BYTES


def test_a_damaged_journal_is_refused_and_repaired_by_believing_what_verifies(tmp_path: Path) -> None:
    tier = NvmeTier(tmp_path, 8 << 20)
    keys = [sample_key(number) for number in range(4)]
    for key in keys:
        tier.put([PutItem(key, memoryview(sample_container(key)))])
    files = {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    tier.close()
    crashed = tmp_path / "crashed"
    for name, content in files.items():
        (crashed / name).parent.mkdir(parents=True, exist_ok=True)
        (crashed / name).write_bytes(content)
    superblock = read_superblock(crashed / VOLUME_NAME)
    with (crashed / VOLUME_NAME).open("r+b") as file:
        file.seek(2 * IO_ALIGN + 100)  # in the second page of the journal
        file.write(b"damage")
    with pytest.raises(VolumeFormatError, match="page 1 is lost.*fsck --repair"):
        NvmeTier(crashed, 8 << 20)
    report = fsck.check(crashed)
    assert [problem.part for problem in report.problems] == ["journal"]
    assert fsck.check(crashed, repair=True).clean
    assert fsck.check(crashed).problem_count == 0
    again = NvmeTier(crashed, 8 << 20)
    assert [size is not None for size in again.sizes(keys)] == [True, False, True, True]
    assert again.usage().capacity_bytes - superblock.data_start > again.usage().used_bytes
    again.close()


def test_more_deletions_at_once_than_the_ring_holds(tmp_path: Path) -> None:
    tier = NvmeTier(tmp_path, 8 << 20)
    pages = tier.info()["journal_bytes"] // IO_ALIGN
    keys = [key_of(number) for number in range((pages + 2) * OPERATIONS_PER_PAGE // 2)]
    for _ in range(2):
        tier.put([PutItem(key, memoryview(bytes_of(1, 10))) for key in keys])
    assert all(tier.delete(keys))
    tier.put([PutItem(key, memoryview(bytes_of(1, 10))) for key in keys])
    assert tier.counters()["checkpoints"] >= 1
    tier.close()
    again = NvmeTier(tmp_path, 8 << 20)
    assert again.sizes(keys) == [10] * len(keys)
    again.close()
