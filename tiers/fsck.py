"""Checks a volume that nobody has open: superblock, journal, catalog, every record, every container's bytes.

What is found is a list of problems; nothing here raises because of what the files hold. `repair` drops the entries
that are bad. It never changes a chunk, and never invents one: what the catalog does not name is free space.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import msgspec

from kvstore import container
from kvstore.errors import ContainerError, TierError, VolumeFormatError
from kvstore.tiers.bad_places import bad_place, is_media_error
from kvstore.tiers.catalog import CATALOG_FILE, Catalog, Position, new_epoch, recover
from kvstore.tiers.index import ChunkEntry
from kvstore.tiers.recovery import overlay, read_chunk, replay_journal
from kvstore.tiers.volume import CATALOG_NAME, VOLUME_NAME, Superblock, VolumeLock, entries_max, read_superblock

PROBLEMS_MAX = 1000
"""Problems that a report lists; all are counted and repaired."""


class Problem(msgspec.Struct, frozen=True):
    """One thing that is wrong, in one line for a person; `key` in hex if it is about one entry."""

    part: Literal["superblock", "journal", "catalog", "record", "chunk", "space"]
    detail: str
    key: str = ""
    repaired: bool = False


class Report(msgspec.Struct, kw_only=True):
    """What a check found.

    `used_bytes + free_bytes + leaked_bytes + quarantined_bytes` is `capacity_bytes` less superblock and journal.
    """

    path: str
    deep: bool
    capacity_bytes: int = 0
    used_bytes: int = 0
    free_bytes: int = 0
    leaked_bytes: int = 0
    quarantined_bytes: int = 0
    entries: int = 0
    verified_bytes: int = 0
    journal_pages: int = 0
    problem_count: int = 0
    repaired_count: int = 0
    problems: list[Problem] = []

    @property
    def clean(self) -> bool:
        """True if nothing was wrong, or everything that was has been repaired."""
        return self.problem_count == self.repaired_count

    def add(self, problem: Problem) -> None:
        """Count a problem, and list it while there is room."""
        self.problem_count += 1
        self.repaired_count += problem.repaired
        if len(self.problems) < PROBLEMS_MAX:
            self.problems.append(problem)

    def text(self) -> str:
        """The report for a person."""
        lines = [
            f"{self.path}: {self.entries} chunks, {self.used_bytes} bytes used, {self.free_bytes} free, "
            f"{self.leaked_bytes} leaked, {self.quarantined_bytes} on bad places, {self.verified_bytes} verified"
        ]
        lines += [
            f"{problem.part} {problem.key[:12]}: {problem.detail}{' (repaired)' if problem.repaired else ''}"
            for problem in self.problems
        ]
        if self.problem_count > len(self.problems):
            lines.append(f"... and {self.problem_count - len(self.problems)} more")
        lines.append("clean" if self.clean else f"{self.problem_count} problems")
        return "\n".join(lines)


def check(path: str | os.PathLike[str], *, deep: bool = True, repair: bool = False) -> Report:
    """What is wrong with the volume at `path`.

    Args:
        path: the tier's directory.
        deep: also read every chunk and verify its container: header, key and the hash of every segment.
        repair: drop bad entries, cut what an interrupted growth left behind, replace an unusable catalog by an empty
            one, and where the journal is damaged keep what verifies (so it implies `deep` there). A damaged superblock
            cannot be repaired.

    Raises:
        VolumeBusyError: the volume is in use.
        TierError: there is no volume at `path`, or it cannot be read at all.
    """
    directory = Path(path)
    volume_path = directory / VOLUME_NAME
    if not volume_path.is_file():
        raise TierError(f"there is no {VOLUME_NAME} in {directory}; give the directory of an nvme tier")
    report = Report(path=str(directory), deep=deep)
    lock = VolumeLock(directory)
    try:
        superblock = read_superblock(volume_path)
        report.capacity_bytes = superblock.size_bytes
        _check_length(report, volume_path, superblock, repair)
        _check_catalog(report, directory, superblock, deep, repair)
    except VolumeFormatError as error:
        report.add(Problem("superblock", str(error)))
    finally:
        lock.release()
    return report


def _check_length(report: Report, volume_path: Path, superblock: Superblock, repair: bool) -> None:
    excess = volume_path.stat().st_size - superblock.size_bytes
    if excess:
        if repair:
            os.truncate(volume_path, superblock.size_bytes)
        detail = f"{excess} bytes behind the volume's end, left by an interrupted growth"
        report.add(Problem("space", detail, repaired=repair))


def _check_catalog(report: Report, directory: Path, superblock: Superblock, deep: bool, repair: bool) -> None:
    """Check catalog and journal and all they name. A volume without a catalog was never used: all of it is free."""
    path = directory / CATALOG_NAME
    if not (path / CATALOG_FILE).exists():
        report.free_bytes = superblock.data_bytes
        return
    try:
        catalog = Catalog(path, superblock.uuid, entries_max(superblock.size_bytes))
    except VolumeFormatError as error:
        report.add(Problem("catalog", str(error), repaired=repair))
        if not repair:
            return
        (path / CATALOG_FILE).unlink()
        catalog = Catalog(path, superblock.uuid, entries_max(superblock.size_bytes))
    try:
        _check_records(report, directory, superblock, catalog, deep, repair)
    except VolumeFormatError as error:
        report.add(Problem("catalog", str(error)))
    finally:
        catalog.close()


def _check_records(
    report: Report, directory: Path, superblock: Superblock, catalog: Catalog, deep: bool, repair: bool
) -> None:
    """Check every record, and with `deep` every chunk; account for every byte."""
    replayed = replay_journal(directory / VOLUME_NAME, superblock, catalog.position)
    report.journal_pages = replayed.pages
    if replayed.damage:
        report.add(Problem("journal", replayed.damage, repaired=repair))
    found = recover(overlay(catalog.rows(), replayed.rows), superblock.data_bytes, base=superblock.base)
    changes: dict[bytes, bytes | None] = {record.key: None for record in found.bad}
    for record in found.bad:
        report.add(Problem("record", record.problem, record.key.hex(), repaired=repair))
    entries = {entry.key: entry for entry in found.index}
    if deep or (repair and replayed.damage):
        for entry, error in _bad_chunks(report, directory / VOLUME_NAME, superblock, entries.values()):
            report.add(Problem("chunk", str(error), entry.key.hex(), repaired=repair))
            changes[entry.key] = None
            if not repair:
                continue
            del entries[entry.key]
            if isinstance(error, OSError) and is_media_error(error):
                place = bad_place(entry.offset, entry.nbytes)
                changes[place.key] = place.record
                report.quarantined_bytes += found.extents.padded(entry.nbytes)
            else:
                found.extents.free(entry.offset - superblock.base, entry.nbytes)
    if repair and (changes or replayed.damage):
        catalog.apply({**replayed.rows, **changes}.items(), Position(new_epoch()))
    report.quarantined_bytes += sum(end - start for start, end in found.bad_places)
    report.entries = len(entries)
    report.used_bytes = sum(found.extents.padded(entry.nbytes) for entry in entries.values())
    report.free_bytes = sum(length for _, length in found.extents.free_runs())
    report.leaked_bytes = superblock.data_bytes - report.used_bytes - report.free_bytes - report.quarantined_bytes
    if report.leaked_bytes:
        report.add(Problem("space", f"{report.leaked_bytes} bytes are neither free nor in a chunk"))


def _bad_chunks(
    report: Report, volume_path: Path, superblock: Superblock, entries: Iterable[ChunkEntry]
) -> list[tuple[ChunkEntry, ContainerError | OSError]]:
    """The chunks whose containers do not verify, and why. Reads in the order in which they lie on the disk."""
    bad: list[tuple[ChunkEntry, ContainerError | OSError]] = []
    with volume_path.open("rb", buffering=0) as volume:
        for entry in sorted(entries, key=lambda entry: entry.offset):
            try:
                container.verify(read_chunk(volume, superblock, entry.offset, entry.nbytes), key=entry.key)
            except (ContainerError, OSError) as error:
                bad.append((entry, error))
            else:
                report.verified_bytes += entry.nbytes
    return bad
