"""Real processes and what happens to them: stopped and continued, out of disk, files gone, the clock set."""

from __future__ import annotations

import ast
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstore.bench.daemon import Daemon, DaemonError
from kvstore.client import Client
from kvstore.connect import connect
from kvstore.outcome import PutStatus, Reason
from kvstore.testing.chunks import sample_container, sample_keys
from kvstore.testing.client_harness import put_chunk

ROOT = Path(__file__).parent.parent

HOLDER = """
import sys, time
from kvstore.connect import connect
from kvstore.testing.chunks import sample_container, sample_key
client = connect(sys.argv[1])
for part in client.fetch([sample_key(0)]):
    assert part.miss is None, part.miss
    print(part.expires_at, flush=True)
    sys.stdin.readline()
    late = time.monotonic() > part.expires_at
    expected = memoryview(sample_container(sample_key(0)))
    same = all(data == expected[s.offset : s.offset + s.length] for group in part.groups for s, data in group)
    print("late" if late else "in time", "same" if same else "other bytes", flush=True)
client.close()
"""


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    with Daemon(tmp_path, dram="4MiB", nvme="32MiB") as running:
        yield running


def put(client: Client, keys: list[bytes], deadline_ms: float | None = None) -> list[PutStatus]:
    """Put the sample chunks of these keys, durably."""
    return client.put([put_chunk(key, sample_container(key)) for key in keys], durable=True, deadline_ms=deadline_ms)


def outcomes(client: Client, keys: list[bytes], deadline_ms: float | None = None) -> list[Reason | None]:
    """For each chunk why it missed, None where it came; fails if a byte is wrong."""
    answers: list[Reason | None] = []
    for part in client.fetch(keys, deadline_ms=deadline_ms):
        answers.append(part.miss.reason if part.miss is not None else None)
        expected = memoryview(sample_container(keys[part.index]))
        for group in part.groups:
            for segment, data in group:
                assert data == expected[segment.offset : segment.offset + segment.length], "wrong bytes"
    return answers


@pytest.mark.parametrize("transport", ["", "?transport=bytes"])
def test_a_stopped_daemon_costs_deadlines_and_nothing_else(daemon: Daemon, transport: str) -> None:
    keys = sample_keys(6)
    daemon.start().close()
    with connect(daemon.url + transport) as client:
        assert all(status.durable for status in put(client, keys[:3]))
        os.kill(daemon.pid, signal.SIGSTOP)
        try:
            found = outcomes(client, keys[:3], deadline_ms=300)
            refused = put(client, keys[3:], deadline_ms=300)
            assert not client.flush(deadline_ms=300)
        finally:
            os.kill(daemon.pid, signal.SIGCONT)
        assert set(found) <= {Reason.DEADLINE, Reason.UNAVAILABLE}
        assert {status.reason for status in refused} <= {Reason.DEADLINE, Reason.UNAVAILABLE}
    with connect(daemon.url + transport) as client:
        assert outcomes(client, keys[:3]) == [None] * 3
        assert all(status.durable for status in put(client, keys[3:]))
        assert outcomes(client, keys) == [None] * 6


def test_a_stopped_client_loses_its_leases_and_nobody_waits_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVSTORE_SERVICE__LEASE_TTL_SECONDS", "0.5")
    keys = sample_keys(200, start=1)  # several times what memory takes
    with Daemon(tmp_path, dram="1MiB", nvme="32MiB") as daemon, daemon.start() as client:
        assert put(client, sample_keys(1))[0].durable
        command = [sys.executable, "-c", HOLDER, daemon.url]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
            assert holder.stdout is not None
            expires_at = float(holder.stdout.readline())
            holder.send_signal(signal.SIGSTOP)
            try:
                for start in range(0, len(keys), 10):
                    assert all(status.durable for status in put(client, keys[start : start + 10]))
                while time.monotonic() <= expires_at:
                    assert outcomes(client, keys[-20:]) == [None] * 20
            finally:
                holder.send_signal(signal.SIGCONT)
            said, _ = holder.communicate("go on\n", timeout=60)
            assert said.startswith("late")  # whatever it reads now, it knows that it must not use it
            assert holder.returncode == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 48 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", str(place)]
    if os.geteuid() or shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small file system")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def fill(path: Path) -> None:
    """Write a file until the disk is full."""
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(1 << 16)):
            pass
    assert not os.statvfs(path).f_bavail


def test_a_disk_that_fills_up_costs_no_byte(small_disk: Path) -> None:
    keys = sample_keys(300)
    with Daemon(small_disk, dram="2MiB", nvme="8MiB") as daemon:
        with daemon.start() as client:
            assert all(status.durable for status in put(client, keys[:20]))
            filler = small_disk / "somebody-elses-file"
            fill(filler)
            # The volume and the room for its catalog were allocated before: there is nothing to run out of.
            for start in range(20, 300, 20):
                for status in put(client, keys[start : start + 20]):
                    assert status.durable or status.reason in (Reason.IO_ERROR, Reason.FULL, Reason.BUSY)
            assert set(outcomes(client, keys)) <= {None, Reason.ABSENT}
            certain = [key for key, info in zip(keys, client.head(keys), strict=True) if info and "nvme" in info.tiers]
            assert certain
        daemon.kill()
        filler.unlink()
        with daemon.start() as client:
            assert outcomes(client, certain) == [None] * len(certain)


def test_a_full_disk_at_the_start_is_one_clear_line(small_disk: Path) -> None:
    with Daemon(small_disk, dram="2MiB", nvme="1GiB") as daemon, pytest.raises(DaemonError, match="lower capacity"):
        daemon.start()


def test_a_deleted_volume_file_is_read_to_the_end_and_missed_at_the_start(daemon: Daemon, tmp_path: Path) -> None:
    keys = sample_keys(20)
    with daemon.start() as client:
        assert all(status.durable for status in put(client, keys[:10]))
        (tmp_path / "nvme" / "volume-000").unlink()
        assert all(status.durable for status in put(client, keys[10:]))
        assert outcomes(client, keys) == [None] * 20
    daemon.kill()
    with pytest.raises(DaemonError, match=r"has a catalog but no volume-000; restore it or delete both"):
        daemon.start()
    shutil.rmtree(tmp_path / "nvme")
    with daemon.start() as client:
        assert outcomes(client, keys) == [Reason.ABSENT] * 20


def test_a_directory_that_becomes_inaccessible_matters_at_the_next_start(daemon: Daemon, tmp_path: Path) -> None:
    keys = sample_keys(20)
    with daemon.start() as client:
        assert all(status.durable for status in put(client, keys[:10]))
        (tmp_path / "nvme").chmod(0)
        try:
            assert all(status.durable for status in put(client, keys[10:]))
            assert outcomes(client, keys) == [None] * 20
            daemon.kill()
            if os.geteuid():  # nothing is inaccessible to root
                with pytest.raises(DaemonError, match="is not writable"):
                    daemon.start()
        finally:
            (tmp_path / "nvme").chmod(0o700)
    with daemon.start() as client:
        assert outcomes(client, keys) == [None] * 20


def test_no_wait_and_no_expiry_looks_at_the_clock_on_the_wall() -> None:
    wrong = []
    for folder in ("kvstore", "tiers", "service", "connectors"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Attribute) and ast.unparse(node) in ("time.time", "time.time_ns"):
                    wrong.append(path.relative_to(ROOT).as_posix())
    # What says when something happened, for people; and how long a volume was closed, which no other clock knows.
    allowed = {"kvstore/events.py", "connectors/kv_events_zmq.py", "kvstore/testing/simulation_threads.py"}
    assert set(wrong) <= {*allowed, "tiers/saved_marks.py"}
