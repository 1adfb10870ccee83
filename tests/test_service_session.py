"""Shared-memory sessions: who gets one, what it lends, and that everything comes back whatever the client does."""

from __future__ import annotations

import fcntl
import mmap
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest

from kvstore.client import Client, Order
from kvstore.config import ServiceConfig
from kvstore.connect import connect
from kvstore.connectors.remote import RemoteClient
from kvstore.errors import ServiceError
from kvstore.outcome import Reason
from kvstore.protocol import ACK, SESSION_SUFFIX, SessionHello, SessionReady, SessionStaging
from kvstore.service.staging import Staging
from kvstore.testing.chunks import sample_container, sample_key, sample_keys, sample_spec
from kvstore.testing.client_harness import collect, eventually, pinned_bytes, put_chunk, put_samples
from kvstore.testing.serving import ServerThread, small_store

SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ServerThread]:
    with ServerThread(small_store(tmp_path, nvme=""), ServiceConfig(session_staging_bytes_max="1MiB")) as running:
        yield running


@pytest.fixture(autouse=True)
def nothing_goes_wrong_unnoticed(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Nothing a client does may be an error of the daemon's."""
    yield
    errors = [
        record for when in ("setup", "call") for record in caplog.get_records(when) if record.levelname == "ERROR"
    ]
    assert not errors, [record.getMessage() for record in errors]


def staging_memory(nbytes: int, seals: int = SEALS) -> int:
    fd = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, nbytes)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def open_session(server: ServerThread) -> tuple[socket.socket, SessionHello, int]:
    """The raw socket, the hello, and the arena's descriptor."""
    raw = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    raw.settimeout(20)
    raw.connect(server.socket_path + SESSION_SUFFIX)
    data, fds, _, _ = socket.recv_fds(raw, 4096, 1)
    return raw, msgspec.json.decode(data, type=SessionHello), fds[0]


def ready(raw: socket.socket) -> SessionReady:
    return msgspec.json.decode(raw.recv(4096), type=SessionReady)


def sessions(server: ServerThread) -> int:
    served = server.server.daemon.sessions
    assert served is not None
    return len(served)


def test_the_arena_can_only_be_read(server: ServerThread) -> None:
    raw, hello, fd = open_session(server)
    with raw:
        assert mmap.mmap(fd, hello.arena_bytes, prot=mmap.PROT_READ)
        for attempt in (
            lambda: mmap.mmap(fd, hello.arena_bytes),
            lambda: os.pwrite(fd, b"x", 0),
            lambda: os.ftruncate(fd, 0),
            lambda: mmap.mmap(os.open(f"/proc/self/fd/{fd}", os.O_RDWR), hello.arena_bytes),
        ):
            with pytest.raises(OSError, match="not permitted|denied"):
                attempt()
    os.close(fd)


@pytest.mark.parametrize(
    ("nbytes", "announced", "seals", "message"),
    [
        (4096, 4096, 0, "not sealed"),
        (4096, 4096, fcntl.F_SEAL_GROW, "not sealed"),
        (4096, 8192, SEALS, "4096 bytes, 8192 were announced"),
        (2 << 20, 2 << 20, SEALS, "at most 1048576"),
    ],
)
def test_staging_memory_that_could_harm_the_daemon_is_refused(
    server: ServerThread, nbytes: int, announced: int, seals: int, message: str
) -> None:
    raw, _, arena = open_session(server)
    fd = staging_memory(nbytes, seals)
    with raw:
        socket.send_fds(raw, [msgspec.json.encode(SessionStaging(announced))], [fd])
        assert message in ready(raw).error
        assert raw.recv(10) == b""
    os.close(fd)
    os.close(arena)
    assert sessions(server) == 0


def test_a_plain_file_is_no_staging_memory(tmp_path: Path) -> None:
    with (tmp_path / "file").open("w+b") as file:
        file.truncate(4096)
        with pytest.raises(ServiceError, match="no seals"):
            Staging(file.fileno(), 4096, bytes_max=4096)


@pytest.mark.parametrize("answer", [b"", b"garbage", b'{"staging_bytes": 1}', b'{"surprise": 1}', b"[" * 5000])
def test_a_bad_handshake_opens_no_session(server: ServerThread, answer: bytes) -> None:
    raw, _, arena = open_session(server)
    os.close(arena)
    with raw:
        if answer:
            raw.send(answer)
            assert ready(raw).error
        else:
            raw.shutdown(socket.SHUT_RDWR)
    assert eventually(lambda: sessions(server) == 0)
    with connect(server.unix_url) as client:
        assert cast(RemoteClient, client).session() is not None


def test_what_is_no_acknowledgement_ends_the_session(server: ServerThread) -> None:
    raw, _, arena = open_session(server)
    os.close(arena)
    with raw:
        raw.send(msgspec.json.encode(SessionStaging(0)))
        assert not ready(raw).error
        assert eventually(lambda: sessions(server) == 1)
        for number in range(3):
            raw.send(ACK.pack(1 << 60, number))
        raw.send(b"nonsense")
        assert eventually(lambda: sessions(server) == 0)


def test_a_put_outside_the_staging_memory_is_refused(server: ServerThread) -> None:
    with connect(server.unix_url) as client:
        remote = cast(RemoteClient, client)
        session = remote.session()
        assert session is not None
        for offset, nbytes in (
            (len(session.staging), 1),
            (-1, 1),
            (0, len(session.staging) + 1),
            (0, -1),
            (2**62, 2**62),
        ):
            body = {"chunks": [{"key": sample_key(1).hex(), "offset": offset, "nbytes": nbytes}]}
            refused = post(server, "/v1/put", body, session.name)
            assert refused["error"]["code"] == "invalid"
        put_samples(client, sample_keys(3))


def test_a_container_damaged_in_staging_is_refused(server: ServerThread) -> None:
    with connect(server.unix_url) as client:
        data = bytearray(sample_container(sample_key(1)))
        data[-1] ^= 1
        (status,) = client.put([put_chunk(sample_key(1), bytes(data))])
        assert status.reason == Reason.CORRUPT
        assert client.head([sample_key(1)]) == [None]


def test_batches_larger_than_the_staging_memory_go_in_turns(server: ServerThread) -> None:
    keys = sample_keys(30)
    spec = sample_spec(layers=4, kv_heads=2, dim=64)
    with connect(server.unix_url) as client:
        containers = [sample_container(key, spec=spec, tokens=64) for key in keys]
        assert sum(map(len, containers)) > 3 << 20
        statuses = client.put([put_chunk(key, data) for key, data in zip(keys, containers, strict=True)])
        assert all(status.stored for status in statuses)
        assert collect(client.fetch(keys), containers) == dict.fromkeys(range(30))


def test_a_chunk_larger_than_the_staging_memory_goes_over_the_socket(server: ServerThread) -> None:
    spec = sample_spec(layers=4, kv_heads=4, dim=128)
    data = sample_container(sample_key(1), spec=spec, tokens=256)
    assert len(data) > 1 << 20
    with connect(server.unix_url) as client:
        (status,) = client.put([put_chunk(sample_key(1), data)])
        assert status.stored
        assert collect(client.fetch([sample_key(1)]), [data]) == {0: None}


def test_no_chunk_bytes_cross_the_socket_when_memory_is_shared(server: ServerThread) -> None:
    """Every container is looked at where the daemon keeps it."""
    with connect(server.unix_url) as client:
        put_samples(client, sample_keys(3))
        session = cast(RemoteClient, client).session()
        assert session is not None
        session_map = memoryview(session.arena.view(0, server.store.tiers[0].capacity_bytes))
        for part in client.fetch(sample_keys(3)):
            for group in part.groups:
                for _, view in group:
                    assert view.readonly
                    assert view.obj is session_map.obj
            assert part.expires_at < time.monotonic() + 60


@pytest.mark.parametrize("order", ["chunk", "layer"])
def test_what_lies_on_disk_comes_back_too(tmp_path: Path, order: Order) -> None:
    with ServerThread(small_store(tmp_path)) as server, connect(server.unix_url) as client:
        keys = sample_keys(100)
        containers = put_samples(client, keys)
        assert client.flush()
        server.store.tiers[0].delete(keys[::2])
        assert collect(client.fetch(keys, order=order), containers) == dict.fromkeys(range(100))
        assert eventually(lambda: pinned_bytes(client) == 0)


def test_readers_get_right_bytes_or_misses_while_chunks_come_and_go(tmp_path: Path) -> None:
    """A memory so small that every put evicts, clients that read in place, and a store that never stops changing."""
    keys = sample_keys(60)
    containers = [sample_container(key) for key in keys]
    with ServerThread(small_store(tmp_path, dram="256KiB", nvme="")) as server:

        def work(seed: int) -> set[Reason | None]:
            reasons: set[Reason | None] = set()
            with connect(server.unix_url) as client:
                for step in range(25):
                    first = (seed * 17 + step * 7) % 50
                    some = slice(first, first + 10)
                    client.put([put_chunk(k, c) for k, c in zip(keys[some], containers[some], strict=True)])
                    if step % 5 == 0:
                        client.delete(keys[first : first + 2])
                    ended = collect(client.fetch(keys[some], order="layer" if step % 2 else "chunk"), containers[some])
                    assert sorted(ended) == list(range(10))
                    reasons |= set(ended.values())
            return reasons

        with ThreadPoolExecutor(4) as pool:
            reasons = set().union(*pool.map(work, range(4), timeout=120))
        assert None in reasons
        assert reasons <= {None, Reason.ABSENT, Reason.BUSY, Reason.FULL}
        assert eventually(lambda: server.store.tiers[0].usage().pinned_bytes == 0)


def test_leases_last_until_acknowledged_and_no_longer(server: ServerThread) -> None:
    with connect(server.unix_url) as client:
        containers = put_samples(client, sample_keys(3))
        parts = client.fetch(sample_keys(3))
        part = next(parts)
        server.store.delete(sample_keys(3))
        assert pinned_bytes(client) > 0
        put_samples(client, sample_keys(500, 100))
        for group in part.groups:
            for segment, view in group:
                assert bytes(view) == containers[0][segment.offset : segment.offset + segment.length]
        assert [part.index for part in parts] == [1, 2]
        assert eventually(lambda: pinned_bytes(client) == 0)


def test_a_client_that_stalls_loses_its_leases_and_can_tell(tmp_path: Path) -> None:
    with (
        ServerThread(small_store(tmp_path, nvme=""), ServiceConfig(lease_ttl_seconds=0.2)) as server,
        connect(server.unix_url) as client,
    ):
        put_samples(client, sample_keys(3))
        parts = client.fetch(sample_keys(3))
        part = next(parts)
        assert part.expires_at > time.monotonic()
        assert eventually(lambda: pinned_bytes(client) == 0)
        assert part.expires_at < time.monotonic()
        late = list(parts)
        assert [part.index for part in late] == [1, 2]
        assert {part.miss.reason for part in late if part.miss is not None} == {Reason.DEADLINE}
        assert all(part.miss is not None for part in late)
        put_samples(client, sample_keys(3, 50))


def test_a_fetch_nobody_acknowledges_stops_sending(tmp_path: Path) -> None:
    """More chunks than a fetch may lend: the daemon waits for the client, then gives up on it."""
    with (
        ServerThread(small_store(tmp_path, nvme=""), ServiceConfig(lease_ttl_seconds=0.5)) as server,
        connect(server.unix_url) as client,
    ):
        keys = sample_keys(200)
        put_samples(client, keys)
        parts = client.fetch(keys)
        next(parts)
        assert pinned_bytes(client) > 0
        assert eventually(lambda: pinned_bytes(client) == 0)
        misses = [part.miss.reason for part in parts if part.miss is not None]
        assert len(misses) == 199


def test_several_fetches_at_once_share_a_session(server: ServerThread) -> None:
    with connect(server.unix_url) as client:
        put_samples(client, sample_keys(2))
        open_fetches = [client.fetch(sample_keys(2)) for _ in range(16)]
        for parts in open_fetches:
            assert next(parts).miss is None
        for parts in open_fetches:
            cast(Any, parts).close()
        assert eventually(lambda: pinned_bytes(client) == 0)


CLIENT_THAT_HANGS = """
import sys, time
from kvstore.connect import connect
from kvstore.testing.chunks import sample_keys
client = connect(sys.argv[1])
parts = client.fetch(sample_keys(20))
assert next(parts).miss is None
print("holding", flush=True)
time.sleep(600)
"""


def test_a_client_killed_while_it_holds_leases_releases_them_all(server: ServerThread) -> None:
    with connect(server.unix_url) as client:
        put_samples(client, sample_keys(20))
        process = subprocess.Popen(
            [sys.executable, "-c", CLIENT_THAT_HANGS, server.unix_url], stdout=subprocess.PIPE, text=True
        )
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "holding\n"
            assert pinned_bytes(client) > 0
            assert sessions(server) == 2
        finally:
            process.send_signal(signal.SIGKILL)
            process.communicate()
        assert eventually(lambda: pinned_bytes(client) == 0)
        assert sessions(server) == 1
        assert collect_good(client)


def test_a_session_that_the_daemon_has_forgotten_is_opened_again(server: ServerThread) -> None:
    with connect(server.unix_url) as client:
        containers = put_samples(client, sample_keys(2))
        remote = cast(RemoteClient, client)
        first = remote.session()
        assert first is not None
        first.name = "forgotten"
        assert collect(client.fetch(sample_keys(2)), containers) == {0: None, 1: None}
        second = remote.session()
        assert second is not None
        assert second is not first
        second.name = "forgotten"
        (status,) = client.put([put_chunk(sample_key(9), sample_container(sample_key(9)))])
        assert status.stored
        put_samples(client, [sample_key(10)])
        third = remote.session()
        assert third not in (None, second)


def collect_good(client: Client) -> bool:
    ended = collect(client.fetch(sample_keys(20)), [sample_container(key) for key in sample_keys(20)])
    return set(ended.values()) == {None}


def post(server: ServerThread, path: str, body: object, session: str) -> Any:
    data = msgspec.json.encode(body)
    with socket.socket(socket.AF_UNIX) as raw:
        raw.settimeout(20)
        raw.connect(server.socket_path)
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nX-KVStore-Session: {session}\r\n"
        raw.sendall(head.encode() + b"Content-Length: %d\r\n\r\n" % len(data) + data)
        answer = b""
        while more := raw.recv(65536):
            answer += more
    return msgspec.json.decode(answer.partition(b"\r\n\r\n")[2])
