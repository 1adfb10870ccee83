"""The nvme tier after a loss of power at any instant, with any subset of what had not been flushed."""

from __future__ import annotations

import random
import shutil
import tempfile
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.buffers import aligned_buffer
from kvstore.testing.chunks import sample_container, sample_key
from kvstore.testing.harness import bytes_of
from kvstore.testing.power import RecordingIo, crash
from kvstore.tier import IO_ALIGN, PutItem, ReadItem, Removal
from kvstore.tiers import fsck
from kvstore.tiers.catalog import Position
from kvstore.tiers.directio import page_up
from kvstore.tiers.disk import Disk
from kvstore.tiers.nvme import NvmeTier
from kvstore.tiers.records import Row
from kvstore.tiers.volume import VOLUME_NAME

VOLUME_BYTES = 48 * IO_ALIGN
KEYS = [sample_key(number) for number in range(10)]
CHUNKS = {
    # Containers, which carry their own hashes, and one that is no container.
    **{
        key: sample_container(key, tokens=tokens)
        for key, tokens in zip(KEYS, (16, 40, 100, 60, 9, 33, 70, 90, 20), strict=False)
    },
    KEYS[9]: bytes_of(9, 30_000),
}
CRASHES = 8

Step = tuple[str, list[int]]
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["put", "put", "put", "delete", "touch", "flush", "reopen"]),
        st.lists(st.integers(0, len(KEYS) - 1), min_size=1, max_size=4, unique=True),
    ),
    min_size=3,
    max_size=25,
)


class Life:
    """A tier whose system calls, checkpoints and answers are recorded in one order."""

    def __init__(self, directory: Path, *, volumes: int, direct_io: bool, ahead_bytes: int) -> None:
        self.directory = directory
        self.volumes = [directory / f"volume-{number}" for number in range(volumes)]
        self.capacity_bytes = volumes * VOLUME_BYTES
        self.options = {"direct_io": direct_io, "evict_ahead_bytes": ahead_bytes, "piece_bytes": 2 * IO_ALIGN}
        self.io = RecordingIo()
        self.catalogs = 0
        self._catalog_lock = threading.Lock()
        self.tier = self._open()
        for volume in self.volumes:
            shutil.copyfile(volume / VOLUME_NAME, self.base(volume))
        self.io.log.clear()
        for volume in self.volumes:
            self._keep_catalog(volume)

    def base(self, volume: Path) -> Path:
        """A volume's file as it was when the recording began."""
        return self.directory / f"{volume.name}-base"

    def kept_catalog(self, volume: Path, log: list[tuple[Any, ...]]) -> Path:
        """A volume's catalog at the end of a log."""
        number = max(event[2] for event in log if event[:2] == ("catalog", volume))
        return self.directory / f"catalog-{number}"

    def _open(self) -> NvmeTier:
        tier = NvmeTier(self.volumes, self.capacity_bytes, io=self.io, io_threads=2, **self.options)  # type: ignore[arg-type]
        tier.listener = self
        for disk in tier._volume.disks:
            self._watch(disk)
        return tier

    def _watch(self, disk: Disk) -> None:
        apply = disk.committer._apply

        def watched(rows: Iterable[Row], position: Position) -> None:
            apply(rows, position)
            self._keep_catalog(disk.path)

        disk.committer._apply = watched

    def _keep_catalog(self, volume: Path) -> None:
        with self._catalog_lock:
            number, self.catalogs = self.catalogs, self.catalogs + 1
        shutil.copytree(volume / "catalog", self.directory / f"catalog-{number}")
        self.io.note("catalog", volume, number)

    def stored(self, *_: object) -> None:
        """Stored chunks are noted by their acknowledgement."""

    def removed(self, entries: Iterable[Any], removal: Removal) -> None:
        """Whatever leaves may be missing from now on."""
        for entry in entries:
            self.io.note("gone", entry.key)

    def run(self, steps: list[Step]) -> None:
        """Do the steps and stop without closing: the power is gone."""
        for verb, numbers in steps:
            keys = [KEYS[number] for number in numbers]
            if verb == "put":
                for key in keys:
                    self.io.note("start", key)
                statuses = self.tier.put([PutItem(key, memoryview(CHUNKS[key])) for key in keys])
                for key, status in zip(keys, statuses, strict=True):
                    if status.durable:
                        self.io.note("acknowledged", key)
            elif verb == "delete":
                for key in keys:
                    self.io.note("gone", key)
                self.tier.delete(keys)
            elif verb == "touch":
                self.tier.touch(keys)
            elif verb == "flush":
                self.tier.flush()
            else:
                self.tier.close()
                self.tier = self._open()
                for volume in self.volumes:
                    self._keep_catalog(volume)


def certain(log: list[tuple[Any, ...]]) -> set[bytes]:
    """The chunks that no crash at the end of the log may have lost."""
    started: dict[bytes, int] = {}
    gone: dict[bytes, int] = {}
    there: set[bytes] = set()
    for at, (kind, *rest) in enumerate(log):
        if kind == "start":
            started[rest[0]] = at
        elif kind == "gone":
            gone[rest[0]] = at
            there.discard(rest[0])
        elif kind == "acknowledged" and gone.get(rest[0], -1) < started[rest[0]]:
            there.add(rest[0])
    return there


def examine(life: Life, at: int, rng: random.Random) -> None:
    """Make what a crash after `at` events leaves, open it, and compare."""
    log = life.io.log[:at]
    after = life.directory / "after"
    shutil.rmtree(after, ignore_errors=True)
    volumes = [after / volume.name for volume in life.volumes]
    for volume, target in zip(life.volumes, volumes, strict=True):
        shutil.copytree(life.kept_catalog(volume, log), target / "catalog")
        crash(log, str(volume / VOLUME_NAME), life.base(volume), target / VOLUME_NAME, rng)
        report = fsck.check(target, deep=False)
        assert report.clean, report.text()
    must = certain(log)
    tier = NvmeTier(volumes, life.capacity_bytes)
    try:
        present = [entry.key for entry in tier.scan()]
        for key in present:
            buffer = aligned_buffer(page_up(len(CHUNKS[key])))
            assert tier.read([ReadItem(key, buffer)]) == [len(CHUNKS[key])]
            assert buffer[: len(CHUNKS[key])] == CHUNKS[key], "wrong bytes"
        assert must <= set(present), "an acknowledged chunk is lost"
        assert tier.usage().used_bytes == sum(page_up(len(CHUNKS[key])) for key in present), "bytes leak"
    finally:
        tier.close()


@settings(max_examples=25, deadline=None)
@given(
    steps=STEPS,
    seed=st.integers(0, 2**32),
    volumes=st.sampled_from([1, 1, 2, 3]),
    direct_io=st.booleans(),
    ahead_bytes=st.sampled_from([0, 1 << 16]),
)
def test_any_crash_keeps_what_was_acknowledged_and_nothing_wrong(
    steps: list[Step], seed: int, volumes: int, direct_io: bool, ahead_bytes: int
) -> None:
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="kvstore-power-") as directory:
        life = Life(Path(directory), volumes=volumes, direct_io=direct_io, ahead_bytes=ahead_bytes)
        try:
            life.run(steps)
        finally:
            events = len(life.io.log)
            life.tier.close()
        for _ in range(CRASHES):
            examine(life, rng.randint(volumes, events), rng)
        examine(life, events, rng)


def test_the_simulation_loses_what_was_not_flushed(tmp_path: Path) -> None:
    base, target = tmp_path / "base", tmp_path / "target"
    base.write_bytes(bytes(8 * IO_ALIGN))
    page = bytes([1]) * IO_ALIGN
    log = [
        ("begin", "a", 0, page),
        ("write", "a", 0, page),
        ("sync", "a", 2),
        ("begin", "a", IO_ALIGN, page * 2),
        ("write", "a", IO_ALIGN, page * 2),
        ("sync", "b", 5),
        ("begin", "b", 6 * IO_ALIGN, page),
        ("begin", "a", 4 * IO_ALIGN, page),
    ]
    seen = set()
    for seed in range(64):
        crash(log, "a", base, target, random.Random(seed))
        data = target.read_bytes()
        seen.add(tuple(data[at * IO_ALIGN] for at in range(8)))
    assert {found[0] for found in seen} == {1}
    assert {found[1:3] for found in seen} == {(0, 0), (0, 1), (1, 0), (1, 1)}
    assert {found[4] for found in seen} == {0, 1}
    assert {found[5:] for found in seen} == {(0, 0, 0)}
