"""Checking a tier that is in use: in the process, through a daemon, from the command line, at a bounded rate."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import pytest

from kvstore import cli
from kvstore.buffers import aligned_buffer
from kvstore.connectors.remote import RemoteClient
from kvstore.errors import ServiceError
from kvstore.outcome import Miss, Reason
from kvstore.store import Store
from kvstore.testing.chunks import sample_container, sample_key
from kvstore.testing.serving import ServerThread
from kvstore.tier import IO_ALIGN, PutItem, ReadItem
from kvstore.tiers import fsck
from kvstore.tiers.directio import PosixIo, page_up
from kvstore.tiers.dram import DramTier
from kvstore.tiers.nvme import NvmeTier
from kvstore.verifying import Verified, at_rate

CAPACITY_BYTES = 2 << 20
KEYS = [sample_key(number) for number in range(10)]
CHUNKS = {key: sample_container(key, tokens=64) for key in KEYS}
NBYTES = len(CHUNKS[KEYS[0]])


@pytest.fixture
def tier(tmp_path: Path) -> Iterator[NvmeTier]:
    """A tier with ten containers."""
    tier = NvmeTier(tmp_path / "tier", CAPACITY_BYTES, evict_ahead_bytes=0)
    assert all(status.durable for status in tier.put([PutItem(key, memoryview(CHUNKS[key])) for key in KEYS]))
    yield tier
    tier.close()


def flip(tier: NvmeTier, path: Path, key: bytes) -> None:
    """Flip a bit in the middle of a chunk, behind the tier's back."""
    entry = tier._volume.space.index.get(key)
    assert entry is not None
    with (path / "volume-000").open("r+b") as file:
        file.seek(tier._volume.position(entry) + NBYTES // 2)
        (byte,) = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
        file.flush()
        os.fsync(file.fileno())


def whole_pass(tier: NvmeTier, bytes_max: int, *, repair: bool = False) -> list[Verified]:
    """Every step."""
    return list(at_rate(lambda start: tier.verify(start, bytes_max=bytes_max, repair=repair), 1e15))


@pytest.mark.parametrize("bytes_max", [1, NBYTES, 3 * NBYTES, 1 << 30])
def test_every_chunk_is_read_once_in_steps_of_the_given_size(tier: NvmeTier, bytes_max: int) -> None:
    steps = whole_pass(tier, bytes_max)
    assert sum(step.chunks for step in steps) == len(KEYS)
    assert sum(step.nbytes for step in steps) == len(KEYS) * NBYTES
    assert not [bad for step in steps for bad in step.bad]
    assert all(step.nbytes <= max(bytes_max, NBYTES) for step in steps)
    assert len(steps) == -(-len(KEYS) // max(1, min(len(KEYS), bytes_max // NBYTES)))


def test_a_check_is_no_use_and_protects_nothing_afterwards(tier: NvmeTier) -> None:
    before = [entry.key for entry in tier.scan()]
    whole_pass(tier, 1)
    assert [entry.key for entry in tier.scan()] == before
    assert tier.usage().pinned_bytes == 0


def test_bad_bytes_are_found_and_leave_only_with_repair(tier: NvmeTier, tmp_path: Path) -> None:
    flip(tier, tmp_path / "tier", KEYS[3])
    (found,) = [bad for step in whole_pass(tier, 2 * NBYTES) for bad in step.bad]
    assert found.key == KEYS[3]
    assert "corrupt" in found.detail
    assert tier.sizes(KEYS[3:4]) == [NBYTES]
    assert [bad.key for step in whole_pass(tier, 1 << 30, repair=True) for bad in step.bad] == [KEYS[3]]
    assert tier.sizes(KEYS[3:4]) == [None]
    assert not [bad for step in whole_pass(tier, 1 << 30) for bad in step.bad]
    assert tier.counters()["quarantined_bytes"] == 0, "the place is sound, only its bytes were not"
    tier.close()
    assert fsck.check(tmp_path / "tier").problem_count == 0


class Unreadable(PosixIo):
    """A device that cannot read one page."""

    position = -1

    def read(self, descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        if offset <= self.position < offset + sum(map(len, buffers)):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return super().read(descriptor, buffers, offset)


def test_a_place_that_cannot_be_read_is_found_before_anybody_needs_it(tmp_path: Path) -> None:
    io = Unreadable()
    tier = NvmeTier(tmp_path, CAPACITY_BYTES, io=io)
    tier.put([PutItem(key, memoryview(CHUNKS[key])) for key in KEYS])
    entry = tier._volume.space.index.get(KEYS[5])
    assert entry is not None
    io.position = tier._volume.position(entry) + IO_ALIGN
    assert [bad.key for step in whole_pass(tier, 1 << 30, repair=True) for bad in step.bad] == [KEYS[5]]
    assert tier.counters()["quarantined_bytes"] == page_up(NBYTES)
    tier.close()
    report = fsck.check(tmp_path)
    assert (report.problem_count, report.quarantined_bytes) == (0, page_up(NBYTES))


def test_a_check_while_the_tier_is_in_use_finds_nothing_wrong(tier: NvmeTier) -> None:
    stop = threading.Event()
    wrong: list[bytes] = []

    def use() -> None:
        target = aligned_buffer(page_up(NBYTES))
        number = 0
        while not stop.is_set():
            key = KEYS[number % len(KEYS)]
            number += 1
            (outcome,) = tier.read([ReadItem(key, target)])
            if isinstance(outcome, Miss):
                tier.put([PutItem(key, memoryview(CHUNKS[key]))])
            elif target[:outcome] != CHUNKS[key]:
                wrong.append(key)
            if number % 3 == 0:
                tier.delete([key])

    thread = threading.Thread(target=use)
    thread.start()
    try:
        bad = [bad for _ in range(15) for step in whole_pass(tier, 2 * NBYTES, repair=True) for bad in step.bad]
    finally:
        stop.set()
        thread.join()
    assert bad == []
    assert wrong == []


def test_a_closed_tier_has_nothing_to_check(tier: NvmeTier) -> None:
    tier.close()
    assert tier.verify() == Verified(0, 0, [], None)


def test_the_rate_is_kept() -> None:
    now = 0.0
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        nonlocal now
        waits.append(seconds)
        now += seconds

    def step(start: int) -> Verified:
        nonlocal now
        now += 5.0 if start == 1 else 0.5  # the second step is slow
        return Verified(1, 100, [], start + 1 if start < 4 else None)

    assert len(list(at_rate(step, 50.0, clock=lambda: now, sleep=sleep))) == 5
    assert waits == [1.5, 1.5, 1.5], "after the slow step there was nothing to wait for"
    with pytest.raises(ValueError, match="positive"):
        list(at_rate(step, 0.0))


@pytest.fixture
def server(tier: NvmeTier) -> Iterator[ServerThread]:
    """A daemon of memory and the tier."""
    with ServerThread(Store([DramTier(1 << 20), tier])) as server:
        yield server


def test_a_daemon_is_checked_from_the_command_line(
    server: ServerThread, tier: NvmeTier, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["fsck", server.unix_url]) == 0
    assert f"tier nvme: 10 chunks, {10 * NBYTES} bytes verified" in capsys.readouterr().out
    flip(tier, tmp_path / "tier", KEYS[7])
    assert cli.main(["fsck", server.http_url, "--json", "--rate", "1GiB"]) == 1
    report = msgspec.json.decode(capsys.readouterr().out)
    assert report["problem_count"] == 1
    assert KEYS[7].hex()[:12] in report["problems"][0]
    assert cli.main(["fsck", server.unix_url, "--repair"]) == 0
    assert "1 problems (removed)" in capsys.readouterr().out
    assert cli.main(["fsck", server.unix_url]) == 0
    for wrong, words in (
        (["fsck", server.unix_url, "--tier", "disk"], "there is nvme"),
        (["fsck", server.unix_url, "--shallow"], "--shallow is for the files"),
        (["fsck", server.unix_url, "--rate", "0"], "must be positive"),
        (["fsck", str(tmp_path / "tier"), "--rate", "1GiB"], "--rate is for a running daemon"),
    ):
        capsys.readouterr()
        assert cli.main(wrong) == 2
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") == 1


def test_a_remote_check_says_what_is_wrong_with_the_request(server: ServerThread) -> None:
    with RemoteClient(server.unix_url) as client:
        assert client.verify(bytes_max=1).next_start == 1
        with pytest.raises(ServiceError, match="bytes_max is 0"):
            client.verify(bytes_max=0)


def test_reads_of_a_chunk_that_is_checked_go_on(tier: NvmeTier) -> None:
    tier.verify()
    target = aligned_buffer(page_up(NBYTES))
    assert tier.read([ReadItem(KEYS[0], target)]) == [NBYTES]
    assert tier.read([ReadItem(sample_key(99), target)]) == [Miss(Reason.ABSENT)]
