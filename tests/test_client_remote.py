"""The remote client when the daemon dies, hangs, comes back, or is not one."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from kvstore.aio import AsyncClient
from kvstore.bench.daemon import Daemon
from kvstore.client import Order
from kvstore.config import ServiceConfig
from kvstore.connect import connect
from kvstore.connectors.remote import RemoteClient
from kvstore.connectors.remote_http import parse_url
from kvstore.connectors.remote_link import CONTROL_SECONDS
from kvstore.errors import ConfigError, ServiceError, ServiceUnavailableError
from kvstore.outcome import Reason
from kvstore.protocol import Frame, encode_frame
from kvstore.testing.chunks import sample_container, sample_key, sample_keys, sample_spec
from kvstore.testing.client_harness import collect, eventually, pinned_bytes, put_chunk, put_samples
from kvstore.testing.serving import ServerThread, small_store

TOKEN = "a-token-of-many-characters"


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    with Daemon(tmp_path, dram="64MiB") as running:
        yield running


@pytest.mark.parametrize("transport", ["shm", "bytes"])
@pytest.mark.parametrize("order", ["chunk", "layer"])
def test_a_daemon_killed_during_a_fetch_is_a_miss(daemon: Daemon, transport: str, order: Order) -> None:
    spec = sample_spec(layers=4, kv_heads=4, dim=128)
    keys = sample_keys(12)
    daemon.start().close()
    with connect(f"{daemon.url}?transport={transport}") as client:
        containers = [sample_container(key, spec=spec, tokens=256) for key in keys]
        chunks = [put_chunk(key, data) for key, data in zip(keys, containers, strict=True)]
        assert all(status.stored for status in client.put(chunks))
        parts = client.fetch(keys, order=order, deadline_ms=20_000)
        first = next(parts)
        assert first.miss is None
        daemon.kill()
        rest = list(parts)
        missed = [part.index for part in rest if part.miss is not None]
        assert len(missed) == len(set(missed))
        assert {part.miss.reason for part in rest if part.miss is not None} == {Reason.UNAVAILABLE}
        if order == "chunk":
            assert {first.index, *(part.index for part in rest)} == set(range(12))
        assert client.lookup(keys).stop is not None


def test_verbs_against_a_dead_daemon_answer_and_the_next_daemon_is_found(daemon: Daemon) -> None:
    keys = sample_keys(3)
    with daemon.start() as client:
        put_samples(client, keys)
        daemon.kill()
        for _ in range(2):
            assert client.lookup(keys).chunks == 0
            assert client.head(keys) == [None] * 3
            assert client.pin(keys, ttl_seconds=1) == client.unpin(keys) == client.delete(keys) == [False] * 3
            assert client.stats() == {}
            assert not client.flush()
            assert {part.miss.reason for part in client.fetch(keys) if part.miss is not None} == {Reason.UNAVAILABLE}
            assert {status.reason for status in client.prefetch(keys)} == {Reason.UNAVAILABLE}
            (status,) = client.put([put_chunk(sample_key(9), sample_container(sample_key(9)))])
            assert (status.stored, status.reason) == (False, Reason.UNAVAILABLE)
        daemon.start().close()
        assert eventually(lambda: bool(client.stats()))
        containers = put_samples(client, keys)
        assert collect(client.fetch(keys), containers) == dict.fromkeys(range(3))
        assert eventually(lambda: cast(RemoteClient, client).session() is not None)


def test_a_dead_daemon_is_not_asked_again_at_once(daemon: Daemon) -> None:
    with daemon.start() as client:
        daemon.kill()
        for _ in range(12):
            client.lookup([])
        stop = client.lookup([]).stop
        assert stop is not None
        assert "moment ago" in stop.detail or "failed" in stop.detail


@pytest.mark.parametrize("transport", ["shm", "bytes"])
def test_a_daemon_that_hangs_costs_no_more_than_the_deadline(daemon: Daemon, transport: str) -> None:
    daemon.start().close()
    with connect(f"{daemon.url}?transport={transport}") as client:
        put_samples(client, sample_keys(2))
        os.kill(daemon.pid, signal.SIGSTOP)
        try:
            started = time.monotonic()
            parts = list(client.fetch(sample_keys(2), deadline_ms=100))
            assert [part.miss.reason for part in parts if part.miss is not None] == [Reason.DEADLINE] * 2
            assert time.monotonic() - started < CONTROL_SECONDS
            (status,) = client.put([put_chunk(sample_key(9), sample_container(sample_key(9)))], deadline_ms=100)
            assert not status.stored
        finally:
            os.kill(daemon.pid, signal.SIGCONT)
        assert eventually(lambda: client.lookup(sample_keys(2)).chunks == 2)


def test_kept_connections_that_the_daemon_closed_are_replaced(tmp_path: Path) -> None:
    with ServerThread(small_store(tmp_path, nvme="")) as server, connect(server.http_url) as client:
        put_samples(client, [sample_key(1)])
        runner = server.server._runner
        assert runner is not None
        http_server = runner.server
        assert http_server is not None
        for connection in list(http_server.connections):
            server._loop.call_soon_threadsafe(connection.force_close)
        assert eventually(lambda: not http_server.connections)
        assert client.lookup([sample_key(1)]).chunks == 1


def test_nobody_there_is_one_clear_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    stale = tmp_path / "stale.sock"
    with socket.socket(socket.AF_UNIX) as left_behind:
        left_behind.bind(str(stale))
    for url, cause in (
        (f"unix:{tmp_path}/none.sock", "No such file"),
        (f"unix:{stale}", "refused"),
        (f"http://127.0.0.1:{port}", "refused"),
    ):
        with pytest.raises(ServiceUnavailableError, match=cause) as raised:
            connect(url)
        assert "\n" not in str(raised.value)
        assert "kvstore serve" in str(raised.value)


def test_somebody_who_accepts_and_says_nothing_is_unavailable(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(ServiceUnavailableError):
        connect(f"http://127.0.0.1:{silent.getsockname()[1]}", timeout_ms=100)


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}",
        b"SSH-2.0-OpenSSH\r\n",
        b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n",
    ],
)
def test_somebody_else_is_not_taken_for_a_daemon(answer: bytes) -> None:
    with fake_daemon(lambda _: answer) as url, pytest.raises(ServiceError, match="not a kvstore daemon"):
        connect(url)


def test_a_wrong_token_is_refused_when_connecting(tmp_path: Path) -> None:
    token_file = tmp_path / "token"
    token_file.write_text(TOKEN)
    token_file.chmod(0o600)
    with ServerThread(small_store(tmp_path, nvme=""), ServiceConfig(token_file=str(token_file))) as server:
        for token in (None, "wrong"):
            with pytest.raises(ServiceError, match="refuses the token"):
                connect(server.http_url, token=token)
        with connect(server.http_url, token=TOKEN) as client:
            put_samples(client, [sample_key(1)])
        with connect(server.unix_url) as client:
            assert client.lookup([sample_key(1)]).chunks == 1


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("unix:", "names no socket"),
        ("unix://host/path", "names no socket"),
        ("unix:/x?transprot=shm", "did you mean 'transport'"),
        ("unix:/x?transport=pigeon", "use shm or bytes"),
        ("http://", "no daemon's address"),
        ("http://h:99999", "Port out of range"),
        ("http://user:word@h", "no daemon's address"),
        ("http://h/path", "does not belong"),
        ("http://h?transport=shm", "does not belong"),
    ],
)
def test_wrong_urls_name_the_part(url: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_url(url)


def test_a_stream_that_stops_in_the_middle_misses_the_rest() -> None:
    container = sample_container(sample_key(0))
    good = (
        encode_frame(Frame(kind="open")) + encode_frame(Frame(kind="chunk", payload_bytes=len(container))) + container
    )
    for stream in (good, good[:-10], good + b"\xff\xff\xff\xff", good + encode_frame(Frame(kind="chunk", index=7))):
        with fake_daemon(answering(stream)) as url, connect(url) as client:
            first, *rest = client.fetch(sample_keys(3))
            assert (first.miss is None) == (stream[: len(good)] == good)
            assert [part.index for part in rest] == [1, 2]
            assert {part.miss.reason for part in rest if part.miss is not None} == {Reason.UNAVAILABLE}


def test_containers_that_are_not_what_was_asked_for_are_misses() -> None:
    other = sample_container(sample_key(5))
    damaged = bytearray(sample_container(sample_key(1)))
    damaged[40] ^= 1
    frames = encode_frame(Frame(kind="open"))
    for index, data in enumerate((other, bytes(damaged), b"x" * 400)):
        frames += encode_frame(Frame(kind="chunk", index=index, payload_bytes=len(data))) + data
    frames += encode_frame(Frame(kind="end"))
    with fake_daemon(answering(frames)) as url, connect(url) as client:
        reasons = [part.miss.reason for part in client.fetch(sample_keys(3)) if part.miss is not None]
    assert reasons == [Reason.WRONG_KEY, Reason.CORRUPT, Reason.MALFORMED]


def test_the_async_client_is_the_same_client(tmp_path: Path) -> None:
    async def use(url: str) -> None:
        async with AsyncClient(connect(url)) as client:
            keys = sample_keys(4)
            containers = [sample_container(key) for key in keys]
            chunks = [put_chunk(key, data) for key, data in zip(keys, containers, strict=True)]
            assert all(status.stored for status in await client.put(chunks))
            found = await asyncio.gather(*(client.lookup(keys) for _ in range(8)))
            assert [lookup.chunks for lookup in found] == [4] * 8
            parts = [part async for part in client.fetch(keys)]
            assert [part.index for part in parts] == [0, 1, 2, 3]
            async with contextlib.aclosing(cast(Any, client.fetch(keys))) as early:
                async for part in early:
                    assert part.index == 0
                    break
            assert (await client.head(keys))[0] is not None
            assert await client.pin(keys, ttl_seconds=5) == [True] * 4
            assert await client.unpin(keys) == [True] * 4
            assert all(status.stored for status in await client.prefetch(keys))
            assert await client.flush()
            assert await client.delete(keys) == [True] * 4
            assert (await client.stats())["counters"]["deletes"] == {"": 4}

    with ServerThread(small_store(tmp_path, nvme="")) as server:
        asyncio.run(use(server.unix_url))
        with connect(server.http_url) as client:
            assert eventually(lambda: pinned_bytes(client) == 0)


def answering(stream: bytes) -> Callable[[str], bytes]:
    """Answers of a daemon whose fetches all give `stream`."""
    info = b'{"version":"0","request_bytes_max":1000000,"request_keys_max":1000}'

    def answer(path: str) -> bytes:
        body = info if path == "/v1/info" else stream
        return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s" % (len(body), body)

    return answer


@contextlib.contextmanager
def fake_daemon(answer: Callable[[str], bytes]) -> Iterator[str]:
    """Somebody at an http URL who answers each request with whatever `answer(path)` says, and hangs up."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                peer, _ = listener.accept()
                with peer:
                    request = peer.recv(65536)
                    peer.sendall(answer(request.split(b" ")[1].decode()))
                    peer.shutdown(socket.SHUT_WR)
                    while peer.recv(65536):
                        pass

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(10)
