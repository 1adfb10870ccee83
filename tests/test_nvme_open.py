"""Opening a volume: what is found is found again, and what cannot be opened says why in one line."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import lmdb
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.errors import TierError, VolumeBusyError, VolumeFormatError
from kvstore.keys import ROOT
from kvstore.outcome import Reason
from kvstore.testing.harness import aligned, bytes_of, get, item, key_of, present, put
from kvstore.tier import IO_ALIGN, ReadItem
from kvstore.tiers.catalog import Catalog, recover
from kvstore.tiers.directio import PosixIo
from kvstore.tiers.index import ChunkEntry
from kvstore.tiers.nvme import NvmeTier
from kvstore.tiers.records import RECORD, pack_record
from kvstore.tiers.volume import CAPACITY_BYTES_MIN, FORMAT_VERSION, Superblock, VolumeLock, entries_max

CAPACITY_BYTES = 1 << 20


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    """A closed volume with chunks 0..4 of 5000 bytes, used in the order 1 2 3 4 0."""
    tier = NvmeTier(tmp_path / "tier", CAPACITY_BYTES)
    tier.put([item(number, 5000) for number in range(5)])
    tier.touch([key_of(0)])
    tier.close()
    return tmp_path / "tier"


def test_a_full_disk_does_not_keep_the_owner_out(volume: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", full)
        lock = VolumeLock(volume)
        with pytest.raises(VolumeBusyError, match="in use by another process"):
            VolumeLock(volume)
        lock.release()
    NvmeTier(volume, CAPACITY_BYTES).close()


def open_error(path: Path, capacity_bytes: int = CAPACITY_BYTES, io: PosixIo | None = None) -> TierError:
    """The error of opening, which is one line."""
    with pytest.raises(TierError) as caught:
        NvmeTier(path, capacity_bytes, io=io)
    assert "\n" not in str(caught.value)
    return caught.value


def test_chunks_and_their_order_of_use_are_found_again(volume: Path) -> None:
    tier = NvmeTier(volume, CAPACITY_BYTES)
    assert [entry.key for entry in tier.scan()] == [key_of(number) for number in (1, 2, 3, 4, 0)]
    assert all(get(tier, number, 5000) == bytes_of(number, 5000) for number in range(5))
    tier.close()


def test_the_directory_is_private_and_the_file_has_its_size_at_once(tmp_path: Path) -> None:
    tier = NvmeTier(tmp_path / "deep" / "tier", CAPACITY_BYTES + 100)
    assert (tmp_path / "deep" / "tier").stat().st_mode & 0o777 == 0o700
    file = tmp_path / "deep" / "tier" / "volume-000"
    assert file.stat().st_mode & 0o777 == 0o600
    assert file.stat().st_size == CAPACITY_BYTES == tier.capacity_bytes
    assert file.stat().st_blocks * 512 >= CAPACITY_BYTES
    info = tier.info()
    assert info["catalog_bytes"] <= info["catalog_bytes_max"]
    assert info["entries_max"] == 4096
    tier.close()


def test_a_second_owner_is_refused_by_name(volume: Path) -> None:
    tier = NvmeTier(volume, CAPACITY_BYTES)
    error = open_error(volume)
    assert isinstance(error, VolumeBusyError)
    assert f"process {os.getpid()}" in str(error)
    code = "import sys; from kvstore.tiers.nvme import NvmeTier; NvmeTier(sys.argv[1], 1 << 20)"
    done = subprocess.run(
        [sys.executable, "-c", code, str(volume)], capture_output=True, text=True, check=False, timeout=60
    )
    assert "VolumeBusyError" in done.stderr
    tier.close()
    NvmeTier(volume, CAPACITY_BYTES).close()


def test_after_a_fork_the_childs_copy_is_closed_and_the_lock_is_the_parents(volume: Path) -> None:
    code = """
import os, sys
from kvstore.outcome import Reason
from kvstore.testing.harness import get, put
from kvstore.tiers.nvme import NvmeTier
tier = NvmeTier(sys.argv[1], 1 << 20)
child = os.fork()
if not child:
    closed = get(tier, 1, 5000) is Reason.UNAVAILABLE and put(tier, 9, 100).reason is Reason.UNAVAILABLE
    tier.close()
    os._exit(0 if closed else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert put(tier, 9, 100).durable
tier.close()
NvmeTier(sys.argv[1], 1 << 20).close()
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(volume)], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_a_volume_grows(volume: Path) -> None:
    tier = NvmeTier(volume, 2 * CAPACITY_BYTES)
    assert present(tier, range(5)) == [0, 1, 2, 3, 4]
    assert put(tier, 10, CAPACITY_BYTES + 5).stored
    assert present(tier, range(5)) == [0, 1, 2, 3, 4]
    assert (volume / "volume-000").stat().st_size == 2 * CAPACITY_BYTES
    tier.close()


def test_what_an_interrupted_growth_left_is_cut(volume: Path) -> None:
    os.truncate(volume / "volume-000", 3 * CAPACITY_BYTES)
    tier = NvmeTier(volume, CAPACITY_BYTES)
    assert (volume / "volume-000").stat().st_size == CAPACITY_BYTES
    tier.close()


class FullDisk(PosixIo):
    """A file system with no room."""

    def allocate(self, descriptor: int, nbytes: int) -> None:
        os.truncate(descriptor, nbytes // 2)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_is_one_clear_line_and_leaves_nothing(volume: Path, tmp_path: Path) -> None:
    assert "lower capacity_bytes or free some space" in str(open_error(tmp_path / "new", io=FullDisk()))
    assert not (tmp_path / "new" / "volume-000").exists()
    NvmeTier(tmp_path / "new", CAPACITY_BYTES).close()
    open_error(volume, 4 * CAPACITY_BYTES, FullDisk())
    assert (volume / "volume-000").stat().st_size == CAPACITY_BYTES
    tier = NvmeTier(volume, CAPACITY_BYTES)
    assert present(tier, range(5)) == [0, 1, 2, 3, 4]
    tier.close()


def test_places_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "cannot make the volume directory" in str(open_error(tmp_path / "file" / "tier"))
    assert "volume directory" in str(open_error(tmp_path / "file"))
    open_error(Path("/proc"))
    assert "at least" in str(open_error(tmp_path / "small", CAPACITY_BYTES_MIN - 1))


def test_a_read_only_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert "not writable" in str(open_error(tmp_path))


def damage_superblock(path: Path, change: Callable[[bytearray], None]) -> None:
    """Change the first page of a volume file."""
    with path.open("r+b") as file:
        page = bytearray(file.read(IO_ALIGN))
        change(page)
        file.seek(0)
        file.write(page)


def test_foreign_damaged_and_newer_volumes_are_refused(volume: Path, tmp_path: Path) -> None:
    def set_byte(at: int, value: int) -> Callable[[bytearray], None]:
        return lambda page: page.__setitem__(at, value)

    for change, words in (
        (set_byte(0, 0), "not a kvstore volume"),
        (set_byte(8, FORMAT_VERSION + 1), f"format {FORMAT_VERSION + 1}"),
        (set_byte(20, 255), "checksum"),
    ):
        copy = tmp_path / words.replace(" ", "-")
        shutil.copytree(volume, copy)
        damage_superblock(copy / "volume-000", change)
        error = open_error(copy)
        assert isinstance(error, VolumeFormatError)
        assert words in str(error)
    os.truncate(volume / "volume-000", CAPACITY_BYTES // 2)
    assert "cut short" in str(open_error(volume))
    (volume / "volume-000").unlink()
    assert "has a catalog but no volume-000" in str(open_error(volume))


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=80), st.integers(0, 63), st.binary(min_size=1, max_size=8))
def test_any_superblock_is_refused_or_sound(start: bytes, at: int, change: bytes) -> None:
    page = bytearray(Superblock(bytes(16), CAPACITY_BYTES, 4).pack())
    for bad in (start.ljust(IO_ALIGN, b"\0"), bytes(page[:at] + change + page[at + len(change) :])[:IO_ALIGN]):
        try:
            superblock = Superblock.parse(bad, Path("volume"))
        except VolumeFormatError:
            continue
        assert superblock == Superblock.parse(bytes(page), Path("volume"))


def test_unusable_catalogs_are_refused(volume: Path, tmp_path: Path) -> None:
    data = (volume / "catalog" / "data.mdb").read_bytes()
    uuid = Superblock.parse((volume / "volume-000").read_bytes()[:IO_ALIGN], volume).uuid
    for name, content in (("noise", bytes(8192) + data[8192:]), ("cut", data[: 3 * 4096]), ("text", b"hello" * 5000)):
        copy = tmp_path / name
        shutil.copytree(volume, copy)
        (copy / "catalog" / "data.mdb").write_bytes(content)
        error = open_error(copy)
        assert isinstance(error, VolumeFormatError), name
        assert "fsck --repair" in str(error)
    other = NvmeTier(tmp_path / "other", CAPACITY_BYTES)
    other.close()
    shutil.copytree(tmp_path / "other" / "catalog", volume / "catalog", dirs_exist_ok=True)
    assert "another volume" in str(open_error(volume))
    shutil.rmtree(volume / "catalog")
    Catalog(volume / "catalog", uuid, 4096).close()
    with lmdb.open(str(volume / "catalog"), max_dbs=2, lock=False) as environment:
        meta = environment.open_db(b"meta")
        with environment.begin(db=meta, write=True) as transaction:
            transaction.put(b"volume", b'{"version": 9, "uuid": ""}')
    assert "catalog format 9" in str(open_error(volume))


def test_bad_records_are_dropped_and_counted(volume: Path, caplog: pytest.LogCaptureFixture) -> None:
    superblock = Superblock.parse((volume / "volume-000").read_bytes()[:IO_ALIGN], volume)
    catalog = Catalog(volume / "catalog", superblock.uuid, entries_max(CAPACITY_BYTES))
    rows = dict(catalog.rows())
    damaged = bytearray(rows[key_of(1)])
    damaged[9] ^= 1
    beyond = pack_record(ChunkEntry(key_of(50), CAPACITY_BYTES, 100, 1))
    twin = pack_record(ChunkEntry(key_of(51), RECORD.unpack(rows[key_of(2)])[3], 100, 1))
    bad = [(key_of(1), bytes(damaged)), (key_of(50), beyond), (key_of(51), twin), (b"short", b"value")]
    catalog.apply(bad, catalog.position)
    catalog.close()
    with caplog.at_level(logging.WARNING):
        tier = NvmeTier(volume, CAPACITY_BYTES)
    assert "dropping 5 bad records" in caplog.text
    assert tier.counters()["records_dropped"] == 5
    assert present(tier, [0, 1, 2, 3, 4, 50, 51]) == [0, 3, 4]
    assert tier.usage().used_bytes == 3 * 2 * IO_ALIGN
    tier.close()
    again = NvmeTier(volume, CAPACITY_BYTES)
    assert again.counters()["records_dropped"] == 0
    again.close()


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.tuples(st.binary(max_size=40), st.binary(max_size=80)), max_size=5), st.binary(min_size=56, max_size=56)
)
def test_any_rows_are_recovered_or_reported(rows: list[tuple[bytes, bytes]], body: bytes) -> None:
    good = ChunkEntry(key_of(1), 8 * IO_ALIGN, 5000, 7, ROOT)
    forged = pack_record(ChunkEntry(key_of(2), 0, 1, 1))[:8] + body
    found = recover([*rows, (key_of(1), pack_record(good)), (key_of(2), forged)], CAPACITY_BYTES)
    assert list(found.index) == [good]
    assert len(found.bad) == len(rows) + 1
    assert found.extents.used_bytes == 2 * IO_ALIGN


class RefusesDirect(PosixIo):
    """A file system that takes the flag and refuses the transfer, or refuses the flag."""

    def __init__(self, flag: bool) -> None:
        self.flag = flag
        self.direct: set[int] = set()

    def open(self, path: str, flags: int) -> int:
        if flags & os.O_DIRECT and self.flag:
            raise OSError(errno.EINVAL, "no O_DIRECT")
        descriptor = super().open(path, flags & ~os.O_DIRECT)
        if flags & os.O_DIRECT:
            self.direct.add(descriptor)
        return descriptor

    def close(self, descriptor: int) -> None:
        self.direct.discard(descriptor)
        super().close(descriptor)

    def write(self, descriptor: int, buffers: object, offset: int) -> int:
        if descriptor in self.direct:
            raise OSError(errno.EINVAL, "no direct write")
        return super().write(descriptor, buffers, offset)  # type: ignore[arg-type]


@pytest.mark.parametrize("flag", [True, False])
def test_where_direct_io_is_refused_it_is_buffered_and_said_once(
    flag: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        tier = NvmeTier(tmp_path, CAPACITY_BYTES, io=RefusesDirect(flag))
    assert caplog.text.count("refuses O_DIRECT") == 1
    assert tier.info()["direct_io"] is False
    assert put(tier, 1, 70_001).durable
    assert get(tier, 1, 70_001) == bytes_of(1, 70_001)
    tier.close()


def test_unaligned_memory_and_offsets_go_through_bounce_buffers(tmp_path: Path) -> None:
    tier = NvmeTier(tmp_path, CAPACITY_BYTES, io_threads=2, piece_bytes=4 * IO_ALIGN)
    put(tier, 1, 200_003)
    for shift, offset, nbytes in ((1, 0, 200_003), (0, 1, 150_000), (7, 4095, 1), (3, 199_999, 4), (0, 8192, 150_001)):
        target = aligned(nbytes, shift)
        assert tier.read([ReadItem(key_of(1), target, offset)]) == [nbytes]
        assert target == bytes_of(1, 200_003)[offset : offset + nbytes]
    tier.close()


def test_a_closed_tier_frees_everything(volume: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        tier = NvmeTier(volume, CAPACITY_BYTES)
        get(tier, 1, 5000)
        tier.close()
        assert get(tier, 1, 5000) is Reason.UNAVAILABLE
    assert len(os.listdir("/proc/self/fd")) == before
