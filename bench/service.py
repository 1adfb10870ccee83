"""The daemon in a process of its own, against memcpy and a bare socket.

service.shm_fetch_vs_memcpy   32 MiB chunks fetched over shared memory, every byte verified and delivered into the
                              caller's buffers, against a plain memcpy of the same bytes
service.lookup_p50_ms         a prefix of 128 chunks looked up over the UNIX socket
service.http_get_vs_socket    GET of a 32 MiB chunk over TCP loopback into the caller's buffer, against a process
                              that does nothing but sendfile the same bytes; `http_get_vs_send` has send instead
service.start_seconds         from starting the process to its first answer
"""

from __future__ import annotations

import http.client
import re
import tempfile
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from kvstore.bench.bare_socket import BareSocket
from kvstore.bench.daemon import Daemon
from kvstore.bench.timing import median, paired, seconds
from kvstore.chunk import encode_chunk, encoded_bytes_max
from kvstore.client import Client, PutChunk
from kvstore.codecs import registry
from kvstore.connect import connect
from kvstore.container import ChunkMeta
from kvstore.keys import ROOT
from kvstore.spec import KVSpec, Rope

CHUNKS = 4
TOKENS = 256
LOOKUP_KEYS = 128
SOCKET_SECONDS_MAX = 30.0

Bytes = npt.NDArray[np.uint8]


def measure(_directory: Path, quick: bool) -> dict[str, float]:
    """Metrics `service.*`; 4 MiB chunks and few rounds when quick."""
    layers, rounds = (4, 5) if quick else (32, 30)
    rope = Rope(kind="default", theta=500000.0, dims=128)
    spec = KVSpec(layers=layers, kv_heads=8, key_dim=128, value_dim=128, dtype="bfloat16", rope=rope)
    kv = [
        np.random.default_rng(seed).integers(0, 256, spec.chunk_bytes(TOKENS), dtype=np.uint8) for seed in range(CHUNKS)
    ]
    # A path of a UNIX socket is short; the benchmark's own directory may not be.
    with tempfile.TemporaryDirectory(prefix="kvstore-") as short:
        daemon = Daemon(Path(short), dram="1GiB", flags=["--port", "0"])
        with daemon, daemon.start() as client:
            metrics = {"service.start_seconds": daemon.start_seconds}
            metrics |= _measure_bytes(client, spec, kv, rounds)
            metrics |= _measure_lookup(client, rounds=20 * rounds)
            metrics |= _measure_get(_port(daemon), _chunk(spec, kv[0], 0), rounds)
    return metrics


def _measure_bytes(client: Client, spec: KVSpec, kv: list[Bytes], rounds: int) -> dict[str, float]:
    """Put and fetch of several chunks at a time."""
    total = sum(flat.nbytes for flat in kv)
    keys = [_key(index) for index in range(len(kv))]
    codec = registry.get("raw")

    def put() -> None:
        statuses = client.put([_chunk(spec, flat, index) for index, flat in enumerate(kv)])
        assert all(status.stored and not status.existed for status in statuses), statuses

    put()
    put_seconds = []
    for _ in range(max(3, rounds // 6)):
        client.delete(keys)
        put_seconds.append(seconds(put))
    targets = [np.ones_like(flat) for flat in kv]
    arrays = [spec.arrays(target, TOKENS) for target in targets]

    def fetch() -> None:
        for part in client.fetch(keys):
            assert part.miss is None, part.miss
            for group in part.groups:
                codec.decode(group, arrays[part.index], spec)

    def copy() -> None:
        for target, source in zip(targets, kv, strict=True):
            np.copyto(target, source)

    fetch()
    assert all(np.array_equal(target, flat) for target, flat in zip(targets, kv, strict=True))
    fetch_seconds, copy_seconds, ratio = paired(fetch, copy, rounds=rounds)
    return {
        "service.put_gb_per_s": total / median(put_seconds) / 1e9,
        "service.shm_fetch_gb_per_s": total / fetch_seconds / 1e9,
        "service.memcpy_gb_per_s": total / copy_seconds / 1e9,
        "service.shm_fetch_vs_memcpy": ratio,
    }


def _measure_lookup(client: Client, rounds: int) -> dict[str, float]:
    """A lookup whose every chunk is there."""
    spec = KVSpec(layers=1, kv_heads=1, key_dim=8, value_dim=8, dtype="bfloat16", rope=Rope(kind="none"))
    flat = np.zeros(spec.chunk_bytes(1), dtype=np.uint8)
    chunks = [_chunk(spec, flat, 1000 + index, tokens=1) for index in range(LOOKUP_KEYS)]
    client.put(chunks)
    keys = [chunk.key for chunk in chunks]
    assert client.lookup(keys).chunks == LOOKUP_KEYS
    times = [seconds(lambda: client.lookup(keys)) for _ in range(rounds)]
    return {"service.lookup_p50_ms": median(times) * 1e3}


def _measure_get(port: int, chunk: PutChunk, rounds: int) -> dict[str, float]:
    """GET over TCP against a process that writes the same bytes to a bare socket, with sendfile and with send."""
    with connect(f"http://127.0.0.1:{port}") as client:
        client.put([chunk])
        (info,) = client.head([chunk.key])
    assert info is not None
    target = memoryview(bytearray(info.nbytes))
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=SOCKET_SECONDS_MAX)

    def get() -> None:
        connection.request("GET", f"/v1/chunks/{chunk.key.hex()}")
        answer = connection.getresponse()
        done = 0
        while done < len(target):
            count = answer.readinto(target[done:])
            assert count, "the answer was cut short"
            done += count
        answer.read()

    metrics: dict[str, float] = {}
    anchors: tuple[tuple[str, Literal["sendfile", "send"]], ...] = (("socket", "sendfile"), ("send", "send"))
    for name, how in anchors:
        with BareSocket(info.nbytes, how) as bare:
            get_seconds, bare_seconds, ratio = paired(get, lambda bare=bare: bare.receive(target), rounds=rounds)  # type: ignore[misc]
        metrics[f"service.http_get_vs_{name}"] = ratio
        metrics[f"service.bare_{name}_gb_per_s"] = info.nbytes / bare_seconds / 1e9
        metrics["service.http_get_gb_per_s"] = info.nbytes / get_seconds / 1e9
    connection.close()
    return metrics


def _port(daemon: Daemon) -> int:
    match = re.search(r"listening on http://127\.0\.0\.1:(\d+)", daemon.log.read_text())
    assert match is not None, daemon.tail()
    return int(match[1])


def _key(index: int) -> bytes:
    return (index + 1).to_bytes(32, "big")


def _chunk(spec: KVSpec, flat: Bytes, index: int, tokens: int = TOKENS) -> PutChunk:
    meta = ChunkMeta(fingerprint=ROOT, key=_key(index), spec=spec, tokens=tokens)
    codec = registry.get("raw")
    arrays = spec.arrays(flat, tokens)
    return PutChunk(
        meta.key, encoded_bytes_max(codec, spec, tokens), lambda buffer: encode_chunk(codec, meta, arrays, buffer)
    )
