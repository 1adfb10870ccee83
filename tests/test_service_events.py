"""GET /v1/events: a stream that can be taken up again, is bounded, and ends when it should."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest

from kvstore import cli
from kvstore.aio import AsyncClient
from kvstore.bench.daemon import Daemon
from kvstore.config import ServiceConfig
from kvstore.connect import connect
from kvstore.connectors import remote_events
from kvstore.events import EventRing
from kvstore.keys import ROOT
from kvstore.service import events as service_events
from kvstore.testing.chunks import sample_key, sample_keys
from kvstore.testing.client_harness import eventually, put_samples
from kvstore.testing.serving import ServerThread, small_store

CONFIG = ServiceConfig(event_listeners_max=2, lease_ttl_seconds=0.5)


class Reader:
    """A plain HTTP client of the stream: fields of each block as they come."""

    def __init__(self, server: ServerThread, query: str = "", headers: dict[str, str] | None = None) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", server.server.port, timeout=20)
        self._connection.request("GET", f"/v1/events{query}", headers=headers or {})
        self.answer = self._connection.getresponse()

    def block(self) -> dict[str, str]:
        """The next block; {} at the end of the stream."""
        fields: dict[str, str] = {}
        while line := self.answer.readline().decode():
            if line == "\n":
                return fields
            name, _, value = line.rstrip("\n").partition(":")
            fields[name or "comment"] = value.strip()
        return fields

    def event(self) -> dict[str, Any]:
        """The next block with data, as JSON."""
        while "data" not in (block := self.block()):
            assert block, "the stream ended"
        data: dict[str, Any] = msgspec.json.decode(block["data"])
        assert block["id"] == str(data["seq"])
        assert block["event"] == data["kind"]
        return data

    def close(self) -> None:
        self.answer.close()
        self._connection.close()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ServerThread]:
    with ServerThread(small_store(tmp_path), CONFIG) as running:
        yield running


def store_chunks(server: ServerThread, count: int, start: int = 0) -> None:
    with connect(server.unix_url) as client:
        put_samples(client, sample_keys(count, start))
        assert client.flush()


def test_events_are_server_sent_events(server: ServerThread) -> None:
    with Reader(server, "?tier=dram") as reader:
        assert reader.answer.headers["Content-Type"] == "text/event-stream"
        assert set(reader.block()) == {"comment", "id"}
        store_chunks(server, 1)
        block = reader.block()
        assert set(block) == {"id", "event", "data"}
        data = msgspec.json.decode(block["data"])
        assert data.pop("unix_seconds") == pytest.approx(time.time(), abs=600)
        assert data == {
            "seq": int(block["id"]),
            "kind": "stored",
            "tier": "dram",
            "key": sample_key(0).hex(),
            "parent": ROOT.hex(),
            "nbytes": data["nbytes"],
            "tokens": 16,
        }


@pytest.mark.parametrize("how", ["header", "query"])
def test_a_reader_takes_up_where_it_left(server: ServerThread, how: str) -> None:
    with Reader(server) as reader:
        last = reader.block()["id"]
    for number in range(3):
        store_chunks(server, 1, number)
        headers = {"Last-Event-ID": last} if how == "header" else {}
        with Reader(server, f"?after={last}&tier=dram" if how == "query" else "?tier=dram", headers) as reader:
            event = reader.event()
            assert event["key"] == sample_key(number).hex()
            last = str(event["seq"])


def test_what_the_ring_no_longer_has_is_lost(server: ServerThread, monkeypatch: pytest.MonkeyPatch) -> None:
    ring = EventRing(4)
    monkeypatch.setattr(server.store.events, "ring", ring)
    first = ring.last
    for number in range(10):
        ring.emit("stored", "dram", sample_key(number), 1)
    with Reader(server, headers={"Last-Event-ID": str(first + 2)}) as reader:
        lost = reader.event()
        assert (lost["kind"], lost["lost"]) == ("lost", 4)
        assert [reader.event()["key"] for _ in range(4)] == [key.hex() for key in sample_keys(4, 6)]
    with Reader(server, "?after=1&tier=nvme") as reader:
        lost = reader.event()
        assert lost["kind"] == "lost"
        assert "lost" not in lost, "nobody can tell how many"


def test_kinds_and_tiers_choose(server: ServerThread) -> None:
    with Reader(server, "?kind=removed&tier=nvme") as reader:
        store_chunks(server, 2)
        with connect(server.unix_url) as client:
            client.delete([sample_key(1)])
        event = reader.event()
        assert (event["kind"], event["tier"], event["reason"]) == ("removed", "nvme", "deleted")
        assert event["key"] == sample_key(1).hex()


@pytest.mark.parametrize(
    ("query", "field", "message"),
    [
        ("?tier=drum", "tier", "did you mean 'dram'?"),
        ("?kind=lost", "kind", "use stored or removed"),
        ("?knd=stored", "knd", "did you mean 'kind'?"),
        ("?after=soon", "after", "after is 'soon'; give the id of an event"),
        ("?after=-1", "after", "give the id"),
        (f"?after={'9' * 20}", "after", "give the id"),
    ],
)
def test_bad_queries_are_refused_by_name(server: ServerThread, query: str, field: str, message: str) -> None:
    with Reader(server, query) as reader:
        assert reader.answer.status == 400
        error = msgspec.json.decode(reader.answer.read())["error"]
        assert error["field"] == field
        assert message in error["message"]


def test_readers_are_bounded_and_leaving_makes_room(server: ServerThread) -> None:
    listeners = server.server.daemon.listeners
    with Reader(server) as first, Reader(server):
        with Reader(server) as refused:
            assert (refused.answer.status, refused.answer.headers["Retry-After"]) == (503, "1")
            assert msgspec.json.decode(refused.answer.read())["error"]["code"] == "busy"
        with connect(server.unix_url) as client:
            assert list(client.events(deadline_ms=20_000)) == []
        first.close()
        assert eventually(lambda: len(listeners) == 1)
        with Reader(server) as third:
            assert third.answer.status == 200
    assert eventually(lambda: len(listeners) == 0)
    assert server.store.events.ring._waiting == []


def test_readers_take_no_room_from_requests(tmp_path: Path) -> None:
    config = ServiceConfig(inflight_max=1)
    with ServerThread(small_store(tmp_path, nvme=""), config) as server, Reader(server), Reader(server):
        store_chunks(server, 1)
        assert server.server.daemon.inflight.requests == 0


def test_the_asyncio_client_iterates_too_and_leaving_ends_the_stream(server: ServerThread) -> None:
    async def follow() -> list[str]:
        async with AsyncClient(connect(server.http_url)) as client:
            stream = client.events(tiers=["nvme"], deadline_ms=20_000)
            waiting = asyncio.ensure_future(anext(stream))
            while not server.server.daemon.listeners:
                await asyncio.sleep(0.01)
            await asyncio.to_thread(store_chunks, server, 1)
            kinds = [(await waiting).kind]
            waiting = asyncio.ensure_future(anext(stream))
            waiting.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await waiting
            await cast(Any, stream).aclose()
            return kinds + [str(chunk.why) for chunk in await client.explain(sample_keys(2))]

    assert asyncio.run(follow()) == ["stored", "present", "absent"]
    assert eventually(lambda: len(server.server.daemon.listeners) == 0)


def test_a_quiet_stream_says_that_it_lives(server: ServerThread, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_events, "KEEP_ALIVE_SECONDS", 0.02)
    with Reader(server, "?tier=nvme&kind=removed") as reader:
        positions = [int(reader.block()["id"]) for _ in range(3)]
        store_chunks(server, 1)  # not wanted, but the position moves
        assert eventually(lambda: int(reader.block()["id"]) >= positions[-1] + 2)


def test_a_silent_daemon_ends_the_clients_stream(server: ServerThread, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_events, "SILENCE_SECONDS", 0.2)
    with connect(server.http_url) as client, client.events(deadline_ms=60_000) as stream:
        started = time.monotonic()
        assert list(stream) == []
        assert time.monotonic() - started < 30
        assert stream.position == server.store.events.ring.last


def test_a_reader_that_takes_nothing_is_dropped_and_holds_nobody_up(server: ServerThread) -> None:
    ring = server.store.events.ring
    listeners = server.server.daemon.listeners
    request = b"GET /v1/events?tier=dram HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.server.port), 20) as raw, Reader(server, "?tier=nvme") as quick:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.sendall(request)
        assert eventually(lambda: len(listeners) == 2)
        started = time.monotonic()
        while len(listeners) == 2:
            assert time.monotonic() - started < 20, "it is still there"
            for _ in range(500):
                ring.emit("stored", "dram", ROOT, 1)
        ring.emit("stored", "nvme", sample_key(1), 1)
        while (event := quick.event())["kind"] == "lost":
            pass
        assert event["key"] == sample_key(1).hex()


@pytest.mark.parametrize("when", ["waiting", "writing"])
def test_a_graceful_stop_ends_every_stream_at_once(tmp_path: Path, when: str) -> None:
    ended: list[bool] = []
    emitting = threading.Event()
    with ServerThread(small_store(tmp_path), ServiceConfig(stop_seconds_max=20)) as server:
        ring = server.store.events.ring
        readers = [Reader(server) for _ in range(3)]

        def read_all(reader: Reader) -> None:
            while reader.block():
                pass
            ended.append(True)
            reader.close()

        def emit() -> None:
            while not emitting.wait(0.0005):
                ring.emit("stored", "dram", ROOT, 1)

        threads = [threading.Thread(target=read_all, args=(reader,)) for reader in readers]
        threads += [threading.Thread(target=emit)] if when == "writing" else []
        for thread in threads:
            thread.start()
        assert eventually(lambda: len(server.server.daemon.listeners) == 3)
        started = time.monotonic()
    assert time.monotonic() - started < 10, "it waited for the readers until stop_seconds_max"
    emitting.set()
    for thread in threads:
        thread.join(20)
    assert ended == [True] * 3


def test_the_command_prints_a_line_an_event(server: ServerThread, capsys: pytest.CaptureFixture[str]) -> None:
    after = server.store.events.ring.last
    store_chunks(server, 2)
    flags = ["events", "--url", server.unix_url, "--after", str(after), "--tier", "dram"]
    assert cli.main([*flags, "--count", "2"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert f"stored dram {sample_key(0).hex()[:16]} " in first
    assert second.endswith(f"16 tokens parent {ROOT.hex()[:16]}")
    assert cli.main([*flags, "--json", "--seconds", "0.2"]) == 0
    assert [msgspec.json.decode(line)["seq"] for line in capsys.readouterr().out.splitlines()] == [after + 1, after + 2]
    assert cli.main(["events", "--url", server.unix_url, "--after", "1", "--count", "1"]) == 0
    assert capsys.readouterr().out.endswith("lost an unknown number of events\n")
    assert cli.main(["events", "--url", server.unix_url, "--seconds", "0"]) == 2


def test_a_daemon_that_is_killed_ends_the_stream_and_the_command(tmp_path: Path) -> None:
    with Daemon(tmp_path, dram="64MiB") as daemon:
        daemon.start().close()
        command = [sys.executable, "-m", "kvstore.cli", "events", "--url", daemon.url, "--json"]
        with (
            connect(daemon.url) as client,
            client.events(deadline_ms=60_000) as stream,
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process,
        ):
            put_samples(client, [sample_key(1)])
            assert next(stream).key == sample_key(1)
            position = stream.position
            number = 2
            while not _readable(process):
                put_samples(client, [sample_key(number)])
                number += 1
            daemon.kill()
            assert {event.kind for event in stream} <= {"stored"}
            assert stream.position >= position
            assert list(client.events(deadline_ms=60_000)) == []
            _, error = process.communicate(timeout=30)
            assert process.returncode == 1
            assert "the daemon ended the stream" in error


def _readable(process: subprocess.Popen[str]) -> bool:
    assert process.stdout is not None
    return bool(select.select([process.stdout], [], [], 0.05)[0])


def test_a_stream_of_nonsense_ends(server: ServerThread, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_events, "encode", lambda event: b"data: nonsense\n\n")
    with connect(server.http_url) as client, client.events(deadline_ms=20_000) as stream:
        store_chunks(server, 1)
        assert list(stream) == []
