"""fsck: clean volumes are clean, every kind of damage is found, named and repaired."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest

from kvstore.errors import TierError, VolumeBusyError
from kvstore.testing.chunks import sample_container, sample_key
from kvstore.tier import IO_ALIGN, PutItem
from kvstore.tiers import fsck
from kvstore.tiers.catalog import Catalog
from kvstore.tiers.fsck import check
from kvstore.tiers.index import ChunkEntry
from kvstore.tiers.nvme import NvmeTier
from kvstore.tiers.records import pack_record
from kvstore.tiers.volume import entries_max, journal_pages, read_superblock

CAPACITY_BYTES = 1 << 20
DATA_BYTES = CAPACITY_BYTES - (1 + journal_pages(CAPACITY_BYTES)) * IO_ALIGN
KEYS = [sample_key(number) for number in range(5)]
CONTAINERS = {key: sample_container(key, tokens=64) for key in KEYS}


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    """A closed volume with five containers."""
    tier = NvmeTier(tmp_path / "tier", CAPACITY_BYTES)
    tier.put([PutItem(key, memoryview(CONTAINERS[key])) for key in KEYS])
    tier.close()
    return tmp_path / "tier"


def held(volume: Path) -> set[bytes]:
    """Keys the tier finds in a volume."""
    tier = NvmeTier(volume, CAPACITY_BYTES)
    try:
        return {entry.key for entry in tier.scan()}
    finally:
        tier.close()


def flip(volume: Path, key: bytes, at: int) -> None:
    """Flip a bit of a stored chunk."""
    tier = NvmeTier(volume, CAPACITY_BYTES)
    entry = tier._volume.space.index.get(key)
    assert entry is not None
    position = tier._volume.position(entry) + at
    tier.close()
    with (volume / "volume-000").open("r+b") as file:
        file.seek(position)
        (byte,) = file.read(1)
        file.seek(position)
        file.write(bytes([byte ^ 1]))


def open_catalog(volume: Path) -> Catalog:
    """The catalog of a closed volume."""
    return Catalog(volume / "catalog", read_superblock(volume / "volume-000").uuid, entries_max(CAPACITY_BYTES))


def test_a_clean_volume(volume: Path) -> None:
    report = check(volume)
    assert report.clean
    assert report.problems == []
    assert report.entries == 5
    assert report.leaked_bytes == 0
    assert report.used_bytes + report.free_bytes == DATA_BYTES
    assert report.verified_bytes == sum(map(len, CONTAINERS.values()))
    assert msgspec.json.decode(msgspec.json.encode(report), type=fsck.Report) == report
    assert report.text().splitlines()[-1] == "clean"
    assert check(str(volume), deep=False).verified_bytes == 0


def test_an_unused_volume_is_clean(tmp_path: Path) -> None:
    NvmeTier(tmp_path, CAPACITY_BYTES).close()
    assert check(tmp_path).clean
    for file in (tmp_path / "catalog").iterdir():
        file.unlink()
    report = check(tmp_path)
    assert report.clean
    assert report.free_bytes == DATA_BYTES


@pytest.mark.parametrize("at", [0, 50, 5000])
def test_a_flipped_bit_is_found_only_when_deep_and_repaired_once(volume: Path, at: int) -> None:
    flip(volume, KEYS[2], at)
    assert check(volume, deep=False).clean
    report = check(volume)
    assert not report.clean
    (problem,) = report.problems
    assert (problem.part, problem.key, problem.repaired) == ("chunk", KEYS[2].hex(), False)
    assert report.text().splitlines()[-1] == "1 problems"
    assert held(volume) == set(KEYS), "a check without repair changes nothing"
    repaired = check(volume, repair=True)
    assert repaired.clean
    assert repaired.problem_count == repaired.repaired_count == 1
    assert repaired.entries == 4
    assert repaired.used_bytes + repaired.free_bytes == DATA_BYTES
    assert check(volume).problem_count == 0
    assert held(volume) == set(KEYS) - {KEYS[2]}


def test_a_chunk_under_another_key_is_found(volume: Path) -> None:
    catalog = open_catalog(volume)
    record = dict(catalog.rows())[KEYS[0]]
    entry = ChunkEntry(sample_key(99), int.from_bytes(record[8:16], "little"), len(CONTAINERS[KEYS[0]]), 1)
    catalog.apply([(KEYS[0], None), (entry.key, pack_record(entry))], catalog.position)
    catalog.close()
    (problem,) = check(volume).problems
    assert "wrong_key" in problem.detail


def test_bad_records_are_found_and_dropped(volume: Path) -> None:
    catalog = open_catalog(volume)
    beyond = ChunkEntry(sample_key(98), CAPACITY_BYTES, 100, 1)
    twin = ChunkEntry(sample_key(97), 0, 100, 1)
    rows = [(entry.key, pack_record(entry)) for entry in (beyond, twin)]
    catalog.apply([*rows, (b"x", b"y")], catalog.position)
    catalog.close()
    report = check(volume)
    assert {problem.part for problem in report.problems} == {"record"}
    assert report.problem_count == 4, "two records, the one that overlaps, and the chunk it overlaps"
    assert check(volume, repair=True).clean
    assert check(volume).problem_count == 0
    assert len(held(volume)) == 4


def test_every_problem_counts_though_not_every_one_is_listed(volume: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fsck, "PROBLEMS_MAX", 2)
    for key in KEYS:
        flip(volume, key, 0)
    report = check(volume)
    assert report.problem_count == 5
    assert len(report.problems) == 2
    assert "... and 3 more" in report.text()
    assert check(volume, repair=True).clean
    assert check(volume).entries == 0


def test_a_broken_catalog_is_replaced_by_an_empty_one(volume: Path) -> None:
    (volume / "catalog" / "data.mdb").write_bytes(b"not a catalog" * 1000)
    report = check(volume)
    assert [problem.part for problem in report.problems] == ["catalog"]
    assert check(volume, repair=True).clean
    assert check(volume).problem_count == 0
    assert held(volume) == set()


def test_what_an_interrupted_growth_left_is_cut(volume: Path) -> None:
    os.truncate(volume / "volume-000", 2 * CAPACITY_BYTES)
    report = check(volume)
    assert [problem.part for problem in report.problems] == ["space"]
    assert check(volume, repair=True).clean
    assert (volume / "volume-000").stat().st_size == CAPACITY_BYTES
    assert held(volume) == set(KEYS)


def test_a_damaged_superblock_is_reported_and_not_repaired(volume: Path) -> None:
    with (volume / "volume-000").open("r+b") as file:
        file.write(b"\0")
    for repair in (False, True):
        report = check(volume, repair=repair)
        assert not report.clean
        assert [problem.part for problem in report.problems] == ["superblock"]


def test_a_volume_in_use_is_refused(volume: Path) -> None:
    tier = NvmeTier(volume, CAPACITY_BYTES)
    with pytest.raises(VolumeBusyError, match=f"process {os.getpid()}"):
        check(volume)
    tier.close()
    assert check(volume).clean


def test_no_volume_at_all(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(TierError, match="no volume-000"):
            check(path)
    assert list(tmp_path.iterdir()) == []
