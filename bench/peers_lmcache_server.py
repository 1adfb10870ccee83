"""A warm retrieve end to end: a kvstore daemon over shared memory against `lmcache server`.

Both hold 512 tokens of 32 layers, 8 KV heads of 128, float16 (64 MiB) in memory and deliver them into an engine's paged
cache on the CPU: a tensor (2, blocks, 16, heads, dim) a layer. LMCache is driven by its own `lmcache bench server`,
which also compares checksums; the two take turns.
"""

from __future__ import annotations

import contextlib
import re
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kvstore.bench.cli import BenchError
from kvstore.bench.daemon import Daemon
from kvstore.bench.timing import median, seconds
from kvstore.chunk import encode_chunk, encoded_bytes_max
from kvstore.client import Client, PutChunk
from kvstore.codecs import registry
from kvstore.container import ChunkMeta
from kvstore.keys import ROOT
from kvstore.parallel import for_each
from kvstore.spec import KVArrays, KVSpec, Rope

TOKENS = 256
CHUNKS = 2
LAYERS, HEADS, DIM = 32, 8, 128
BLOCKS, BLOCK_TOKENS = 256, 16
SPEC = KVSpec(layers=LAYERS, kv_heads=HEADS, key_dim=DIM, value_dim=DIM, dtype="float16", rope=Rope(kind="unknown"))
SERVER_SECONDS_MAX = 90.0
RUN_SECONDS_MAX = 300

_RETRIEVE = re.compile(r"RETRIEVE: retrieved \((\d+) tokens, ([0-9.]+) ms")
_LOOKUP_HIT = re.compile(rf"LOOKUP: {CHUNKS}/{CHUNKS} chunks hit \(([0-9.]+) ms\)")


def measure_server(command: Path, directory: Path, environment: Mapping[str, str], *, quick: bool) -> dict[str, float]:
    """Metrics `engine.retrieve_*`."""
    turns, sequences, rounds = (1, 2, 5) if quick else (4, 10, 15)
    ours: list[float] = []
    retrieves: list[float] = []
    lookups: list[float] = []
    ratios: list[float] = []
    rpc, web = _free_port(), _free_port()
    daemon = Daemon(directory, dram="1GiB")
    with _lmcache_server(command, directory, environment, rpc, web), daemon, daemon.start() as client:
        reader = _Reader(client)
        for _ in range(turns):
            theirs, looked_up = _lmcache_retrieve(command, environment, rpc, web, sequences)
            mine = [seconds(reader.retrieve) for _ in range(rounds)]
            ratios.append(median(theirs) / median(mine))
            retrieves += theirs
            lookups += looked_up
            ours += mine
        reader.check()
    gigabytes = CHUNKS * SPEC.chunk_bytes(TOKENS) / 1e9
    return {
        "engine.retrieve_vs_lmcache": median(ratios),
        "engine.retrieve_with_lookup_vs_lmcache": (median(retrieves) + median(lookups)) / median(ours),
        "engine.retrieve_kvstore_ms": median(ours) * 1e3,
        "engine.retrieve_lmcache_ms": median(retrieves) * 1e3,
        "engine.lookup_lmcache_ms": median(lookups) * 1e3,
        "engine.retrieve_kvstore_gb_per_s": gigabytes / median(ours),
        "engine.retrieve_lmcache_gb_per_s": gigabytes / median(retrieves),
    }


class _Reader:
    """The engine's side of kvstore: a paged cache, and chunks of random bits that have been put."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._codec = registry.get("raw")
        self._source = self._pages()
        for layer in self._source:
            layer[:] = np.random.default_rng(0).integers(0, 1 << 16, layer.shape, dtype=np.uint16)
        self._target = self._pages()
        self._keys = [index.to_bytes(32, "big") for index in range(CHUNKS)]
        statuses = client.put([self._chunk(index) for index in range(CHUNKS)])
        assert all(status.stored for status in statuses), statuses
        self.retrieve()

    def retrieve(self) -> None:
        """Look up and fetch every chunk into the paged cache, every byte verified."""
        assert self._client.lookup(self._keys).chunks == CHUNKS
        for part in self._client.fetch(self._keys):
            assert part.miss is None, part.miss
            arrays = self._arrays(self._target, part.index)
            for_each(lambda group, arrays=arrays: self._codec.decode(group, arrays, SPEC), part.groups)  # type: ignore[misc]

    def check(self) -> None:
        """The pages hold what was put."""
        for index in range(CHUNKS):
            pairs = zip(self._arrays(self._source, index), self._arrays(self._target, index), strict=True)
            assert all(np.array_equal(a, b) for wrote, read in pairs for a, b in zip(wrote, read, strict=True))

    def _pages(self) -> list[npt.NDArray[np.uint16]]:
        return [np.ones((2, BLOCKS, BLOCK_TOKENS, HEADS, DIM), dtype=np.uint16) for _ in range(LAYERS)]

    def _arrays(self, pages: list[npt.NDArray[np.uint16]], index: int) -> KVArrays:
        """K and V (heads, tokens, dim) of a chunk in the pages of consecutive blocks."""
        tokens = slice(index * TOKENS, (index + 1) * TOKENS)
        flat = [layer.reshape(2, BLOCKS * BLOCK_TOKENS, HEADS, DIM)[:, tokens].swapaxes(1, 2) for layer in pages]
        return [(layer[0], layer[1]) for layer in flat]

    def _chunk(self, index: int) -> PutChunk:
        meta = ChunkMeta(fingerprint=ROOT, key=self._keys[index], spec=SPEC, tokens=TOKENS)
        arrays = self._arrays(self._source, index)
        nbytes_max = encoded_bytes_max(self._codec, SPEC, TOKENS)
        return PutChunk(meta.key, nbytes_max, lambda buffer: encode_chunk(self._codec, meta, arrays, buffer))


@contextlib.contextmanager
def _lmcache_server(
    command: Path, directory: Path, environment: Mapping[str, str], rpc: int, web: int
) -> Iterator[None]:
    """`lmcache server` while the context lasts."""
    log = directory / "lmcache.log"
    flags = ["--host", "localhost", "--port", str(rpc), "--http-port", str(web)]
    flags += ["--l1-size-gb", "2", "--eviction-policy", "LRU"]
    with log.open("wb") as output:
        server = subprocess.Popen([command, "server", *flags], stdout=output, stderr=output, env=environment)
    try:
        deadline = time.monotonic() + SERVER_SECONDS_MAX
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("localhost", web), timeout=1):
                break
            if server.poll() is not None or time.monotonic() > deadline:
                raise BenchError(f"lmcache server did not start:\n{log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.2)
        yield
    finally:
        server.terminate()
        try:
            server.wait(timeout=20)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def _lmcache_retrieve(
    command: Path, environment: Mapping[str, str], rpc: int, web: int, sequences: int
) -> tuple[list[float], list[float]]:
    """Seconds of every warm RETRIEVE, and of every LOOKUP that found all of it."""
    flags = ["--rpc-url", f"tcp://localhost:{rpc}", "--url", f"http://localhost:{web}", "--mode", "cpu"]
    flags += ["--transfer-mode", "lmcache_driven", "--start", "0", "--end", str(sequences), "--interval", "0"]
    flags += ["--kvcache-shape-spec", f"(2,{BLOCKS},{BLOCK_TOKENS},{HEADS},{DIM}):float16:{LAYERS}"]
    flags += ["--num-tokens", str(CHUNKS * TOKENS)]
    done = subprocess.run(
        [command, "bench", "server", *flags],
        env=environment,
        capture_output=True,
        text=True,
        timeout=RUN_SECONDS_MAX,
        check=False,
    )
    retrieves = [float(ms) / 1e3 for tokens, ms in _RETRIEVE.findall(done.stdout) if int(tokens) == CHUNKS * TOKENS]
    lookups = [float(ms) / 1e3 for ms in _LOOKUP_HIT.findall(done.stdout)]
    if not retrieves or not lookups or "MISMATCH" in done.stdout:
        raise BenchError(f"lmcache bench server failed:\n{(done.stdout + done.stderr)[-2000:]}")
    return retrieves, lookups


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])
