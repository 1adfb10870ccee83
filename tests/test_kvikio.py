"""The kvikio back end of the nvme tier, on a stand-in with its interface: the tier's contract, device reads, errors."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from kvstore.errors import ConfigError, TierError
from kvstore.outcome import Miss, Reason
from kvstore.testing.harness import bytes_of, get, item, key_of, put
from kvstore.testing.kvikio import DeviceArray, StandIn
from kvstore.testing.nvme import NvmeContract
from kvstore.tier import IO_ALIGN, Tier
from kvstore.tiers import fsck, registry
from kvstore.tiers.kvikio_io import KvikioIo
from kvstore.tiers.nvme import NvmeTier
from kvstore.tiers.nvme_read import DeviceReadItem

CAPACITY_BYTES = 1 << 20
NBYTES = 50_001


@pytest.fixture(autouse=True)
def kvikio(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    """The stand-in, as the module kvikio."""
    module = StandIn()
    monkeypatch.setitem(sys.modules, "kvikio", module)
    yield module
    module.shut_down()
    assert not module.open_files, "a file was left open"


class TestNvmeTierKvikio(NvmeContract):
    """The contract of every tier."""

    @staticmethod
    def open_tier(capacity_bytes: int, clock: Callable[[], float], directory: Path) -> Tier:
        """An nvme tier on the back end."""
        return NvmeTier(directory, capacity_bytes, clock=clock, io_backend="kvikio")


@pytest.fixture
def tier(tmp_path: Path) -> Iterator[NvmeTier]:
    """A tier on the back end, with one chunk."""
    tier = NvmeTier(tmp_path / "tier", CAPACITY_BYTES, io_backend="kvikio", io_threads=3, piece_bytes=4 * IO_ALIGN)
    tier.put([item(1, NBYTES)])
    yield tier
    tier.close()


def test_the_pool_has_the_tiers_settings_and_the_mode_is_told(tier: NvmeTier, kvikio: StandIn) -> None:
    assert kvikio.settings == {"compat_mode": "ON", "num_threads": 3, "task_size": 4 * IO_ALIGN}
    info = tier.info()
    assert (info["io_backend"], info["compat_mode"]) == ("kvikio", "ON")


def test_memory_on_a_device_is_filled_without_the_hosts(tier: NvmeTier, kvikio: StandIn) -> None:
    whole, part = DeviceArray(NBYTES + 10), DeviceArray(100)
    items = [
        DeviceReadItem(key_of(1), whole, NBYTES + 10),
        DeviceReadItem(key_of(2), part, 100),
        DeviceReadItem(key_of(1), part, 100, offset=40_000),
        DeviceReadItem(key_of(1), part, 100, offset=NBYTES),
    ]
    got = tier.read_device(items)
    assert got[0] == NBYTES
    assert [outcome.reason for outcome in (got[1], got[3]) if isinstance(outcome, Miss)] == [
        Reason.ABSENT,
        Reason.TRUNCATED,
    ]
    assert got[2] == 100
    content = bytes_of(1, NBYTES)
    assert whole.memory[:NBYTES].tobytes() == content
    assert not whole.memory[NBYTES:].any()
    assert part.memory.tobytes() == content[40_000:40_100]
    assert kvikio.device_reads == 2
    assert tier.usage().pinned_bytes == 0


def test_a_device_read_that_fails_is_a_miss_and_a_bad_place(tier: NvmeTier, kvikio: StandIn, tmp_path: Path) -> None:
    kvikio.fail = os.strerror(errno.EIO)
    (outcome,) = tier.read_device([DeviceReadItem(key_of(1), DeviceArray(NBYTES), NBYTES)])
    kvikio.fail = ""
    assert isinstance(outcome, Miss)
    assert outcome.reason is Reason.IO_ERROR
    assert get(tier, 1, NBYTES) is Reason.ABSENT
    tier.close()
    assert fsck.check(tmp_path / "tier").quarantined_bytes > 0


def test_an_error_of_no_known_number_condemns_no_place(tier: NvmeTier, kvikio: StandIn, tmp_path: Path) -> None:
    kvikio.fail = "cuFile: internal error"
    assert get(tier, 1, NBYTES) is Reason.IO_ERROR
    kvikio.fail = ""
    tier.close()
    assert fsck.check(tmp_path / "tier").quarantined_bytes == 0


def test_without_the_back_end_a_device_read_misses(tmp_path: Path) -> None:
    tier = NvmeTier(tmp_path, CAPACITY_BYTES)
    (outcome,) = tier.read_device([DeviceReadItem(key_of(1), DeviceArray(10), 10)])
    assert isinstance(outcome, Miss)
    assert outcome.reason is Reason.UNAVAILABLE
    assert "set io_backend to kvikio" in outcome.detail
    assert tier.info()["io_backend"] == "posix"
    tier.close()


def test_both_back_ends_read_the_same_volume(tier: NvmeTier, tmp_path: Path) -> None:
    assert put(tier, 2, 70_001).durable
    tier.close()
    posix = NvmeTier(tmp_path / "tier", CAPACITY_BYTES)
    assert get(posix, 2, 70_001) == bytes_of(2, 70_001)
    posix.close()


def test_a_missing_package_and_a_wrong_name_are_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kvikio", None)
    with pytest.raises(TierError, match="install the extra gds") as caught:
        NvmeTier(tmp_path, CAPACITY_BYTES, io_backend="kvikio")
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="did you mean 'kvikio'"):
        registry.open_tier("nvme", name="disk", capacity_bytes=CAPACITY_BYTES, path=str(tmp_path), io_backend="kvikkio")
    with pytest.raises(ConfigError, match="use one of posix, kvikio"):
        NvmeTier(tmp_path, CAPACITY_BYTES, io_backend="rdma")


def test_a_file_that_cannot_be_opened_is_an_os_error_and_leaves_nothing(tmp_path: Path, kvikio: StandIn) -> None:
    io = KvikioIo(2, 1 << 20)
    with pytest.raises(OSError, match="No such file"):
        io.open(str(tmp_path / "nothing"), os.O_RDWR)
    (tmp_path / "sealed").touch()
    before = len(os.listdir("/proc/self/fd"))
    monkey = pytest.MonkeyPatch()
    with monkey.context() as patch:
        patch.setattr(kvikio, "CuFile", _refuse)
        with pytest.raises(OSError, match="no cuFile"):
            io.open(str(tmp_path / "sealed"), os.O_RDWR)
    assert len(os.listdir("/proc/self/fd")) == before


def _refuse(*_: object) -> None:
    raise RuntimeError("no cuFile here")


def test_a_short_transfer_counts_up_to_where_it_ended(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 150)
    io = KvikioIo(2, 1 << 20)
    descriptor = io.open(str(tmp_path / "file"), os.O_RDWR)
    buffers = [memoryview(bytearray(100)) for _ in range(3)]
    assert io.read(descriptor, buffers, 0) == 150
    assert np.frombuffer(buffers[1], dtype=np.uint8).sum() == 50 * ord("x")
    io.close(descriptor)


def test_the_package_is_imported_only_when_it_is_chosen() -> None:
    code = "import sys; import kvstore.tiers.nvme, kvstore.tiers.backends; sys.exit('kvikio' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
