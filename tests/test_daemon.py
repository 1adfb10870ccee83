"""The daemon as a process: what it survives, what it says when it cannot start, and that it needs no torch."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstore.bench.daemon import Daemon, DaemonError
from kvstore.client import Client
from kvstore.outcome import PutStatus
from kvstore.testing.chunks import sample_container, sample_key, sample_keys
from kvstore.testing.client_harness import put_chunk


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    with Daemon(tmp_path, dram="16MiB", nvme="32MiB") as running:
        yield running


def put(client: Client, keys: list[bytes], *, durable: bool = True) -> list[PutStatus]:
    """Put the sample chunks of these keys."""
    return client.put([put_chunk(key, sample_container(key)) for key in keys], durable=durable)


def served(client: Client, keys: list[bytes]) -> list[bool]:
    """Whether each chunk came back, byte for byte as it was put."""
    answers = []
    for part in client.fetch(keys):
        expected = memoryview(sample_container(keys[part.index]))
        good = part.miss is None
        for group in part.groups:
            for segment, data in group:
                good &= data == expected[segment.offset : segment.offset + segment.length]
        answers.append(good)
    return answers


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "kvstore.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=os.environ | environment,
    )


def test_durable_chunks_survive_kill_9(daemon: Daemon, tmp_path: Path) -> None:
    keys = sample_keys(40)
    with daemon.start() as client:
        assert all(status.durable for status in put(client, keys))
        daemon.kill()
        assert not any(served(client, keys))
        assert client.lookup(keys).chunks == 0
        assert not any(status.stored for status in put(client, sample_keys(1, 90)))
    report = run("fsck", str(tmp_path / "nvme"), "--json")
    assert report.returncode == 0, report.stdout + report.stderr
    with daemon.start() as client:
        assert client.lookup(keys).tiers == ("nvme",) * 40
        assert all(served(client, keys))
    assert daemon.stop() == 0


def test_a_graceful_stop_writes_what_was_put(daemon: Daemon) -> None:
    keys = sample_keys(20)
    with daemon.start() as client:
        put(client, keys, durable=False)
    assert daemon.stop() == 0
    assert not daemon.socket.exists()
    with daemon.start() as client:
        assert all(served(client, keys))


def test_a_second_daemon_on_the_same_volume_is_refused(daemon: Daemon, tmp_path: Path) -> None:
    with daemon.start() as client:
        other = run("serve", "--dram", "1MiB", "--nvme", "32MiB", "--path", str(tmp_path / "nvme"), "--port", "0")
        assert other.returncode == 2
        assert "in use" in other.stderr
        assert str(daemon.pid) in other.stderr
        assert other.stderr.count("\n") == 1
        (status,) = put(client, [sample_key(1)])
        assert status.durable


def test_a_second_daemon_on_the_same_socket_is_refused(daemon: Daemon) -> None:
    with daemon.start():
        other = run("serve", "--dram", "1MiB", "--socket", str(daemon.socket), "--port", "-1")
        assert other.returncode == 2
        assert str(daemon.socket) in other.stderr
        assert other.stderr.strip().count("\n") == 0


def test_a_port_in_use_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        other = run("serve", "--dram", "1MiB", "--port", str(port))
    assert other.returncode == 2
    assert str(port) in other.stderr


def test_a_daemon_that_cannot_start_says_why_in_one_line(tmp_path: Path) -> None:
    plain_file = tmp_path / "file"
    plain_file.write_text("")
    for arguments, message in (
        (["--nvme", "32MiB", "--path", str(plain_file)], f"{plain_file}: File exists; choose another path"),
        (["--nvme", "1000TiB", "--path", str(tmp_path / "nvme")], "lower capacity_bytes or free some space"),
        (["--nvme", "32MiB"], "tiers.nvme.path is missing"),
        (["--dram", "1TiB"], "dram capacity is 1099511627776 bytes; this machine has"),
        (["--dram", "12"], "give at least 4096 bytes"),
    ):
        result = run("serve", "--port", "0", *arguments)
        assert result.returncode == 2, arguments
        assert message in result.stderr
        assert result.stderr.count("\n") == 1, result.stderr


def test_a_daemon_that_dies_at_start_is_reported_with_its_log(tmp_path: Path) -> None:
    with Daemon(tmp_path, dram="lots") as broken, pytest.raises(DaemonError, match="'lots'"):
        broken.start()


def test_serving_needs_no_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None; sys.modules['transformers'] = None\n"
        "import kvstore.service.server, kvstore.compose, kvstore.connectors.remote, kvstore.tiers.registry\n"
        "import kvstore.codecs.registry as codecs; codecs.get('lossless', bytes(32))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
