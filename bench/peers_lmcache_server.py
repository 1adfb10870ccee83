"""A warm retrieve end to end: a kvstore daemon over shared memory against `lmcache server`.

Both hold 512 tokens of 32 layers, 8 KV heads of 128, float16 (64 MiB) in memory and deliver them into an engine's paged
cache on the CPU: a tensor (2, blocks, 16, heads, dim) a layer. LMCache is driven by its own `lmcache bench server`,
which also compares checksums; the two take turns.
"""

from __future__ import annotations

import contextlib
import math
import mmap
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
from kvstore.chunk_put import chunk_put
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
    """Metrics `engine.retrieve_*` and `engine.lookup_*`."""
    turns, sequences, rounds = (1, 2, 5) if quick else (4, 10, 15)
    ours: list[float] = []
    our_lookups: list[float] = []
    retrieves: list[float] = []
    lookups: list[float] = []
    ratios: list[float] = []
    rpc, web = free_port(), free_port()
    daemon = Daemon(directory, dram="1GiB")
    with lmcache_server(command, directory, environment, rpc, web), daemon, daemon.start() as client:
        reader = _Reader(client)
        for _ in range(turns):
            theirs, looked_up = _lmcache_retrieve(command, environment, rpc, web, sequences)
            mine: list[float] = []
            for _ in range(rounds):
                our_lookups.append(seconds(reader.look_up))
                mine.append(seconds(reader.retrieve))
            ratios.append(median(theirs) / median(mine))
            retrieves += theirs
            lookups += looked_up
            ours += mine
        reader.check()
    gigabytes = CHUNKS * SPEC.chunk_bytes(TOKENS) / 1e9
    return {
        "engine.retrieve_vs_lmcache": median(ratios),
        "engine.lookup_vs_lmcache": median(lookups) / median(our_lookups),
        "engine.lookup_kvstore_ms": median(our_lookups) * 1e3,
        "engine.lookup_lmcache_ms": median(lookups) * 1e3,
        "engine.retrieve_kvstore_ms": median(ours) * 1e3,
        "engine.retrieve_lmcache_ms": median(retrieves) * 1e3,
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
        self._keys = [index.to_bytes(32, "big") for index in range(1, CHUNKS + 1)]
        statuses = client.put([self._chunk(index) for index in range(CHUNKS)])
        assert all(status.stored for status in statuses), statuses
        self.retrieve()

    def look_up(self) -> None:
        """Ask how much of the prompt is there."""
        assert self._client.lookup(self._keys).chunks == CHUNKS

    def retrieve(self) -> None:
        """Fetch every chunk into the paged cache, every byte verified."""
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
        """Touched, and at the start of a memory page: an engine's tensors begin at a cache line, NumPy's need not."""
        shape = (2, BLOCKS, BLOCK_TOKENS, HEADS, DIM)
        pages = [
            np.frombuffer(mmap.mmap(-1, math.prod(shape) * 2), dtype=np.uint16).reshape(shape) for _ in range(LAYERS)
        ]
        for layer in pages:
            layer[:] = 1
        return pages

    def _arrays(self, pages: list[npt.NDArray[np.uint16]], index: int) -> KVArrays:
        """K and V (heads, tokens, dim) of a chunk in the pages of consecutive blocks."""
        tokens = slice(index * TOKENS, (index + 1) * TOKENS)
        flat = [layer.reshape(2, BLOCKS * BLOCK_TOKENS, HEADS, DIM)[:, tokens].swapaxes(1, 2) for layer in pages]
        return [(layer[0], layer[1]) for layer in flat]

    def _chunk(self, index: int) -> PutChunk:
        meta = ChunkMeta(fingerprint=ROOT, key=self._keys[index], spec=SPEC, tokens=TOKENS)
        arrays = self._arrays(self._source, index)
        return chunk_put(self._codec, meta, lambda: arrays)


@contextlib.contextmanager
def lmcache_server(
    command: Path, directory: Path, environment: Mapping[str, str], rpc: int, web: int, l2_adapter: str = ""
) -> Iterator[None]:
    """`lmcache server` while the context lasts, over an L2 adapter (its JSON) if one is given.

    Raises:
        BenchError: it does not come up; carries the end of its log.
    """
    log = directory / "lmcache.log"
    flags = ["--host", "localhost", "--port", str(rpc), "--http-port", str(web)]
    flags += ["--l1-size-gb", "2", "--eviction-policy", "LRU"]
    flags += ["--l2-adapter", l2_adapter] if l2_adapter else []
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
    output = lmcache_bench(command, environment, rpc, web, sequences)
    retrieves = [float(ms) / 1e3 for tokens, ms in _RETRIEVE.findall(output) if int(tokens) == CHUNKS * TOKENS]
    lookups = [float(ms) / 1e3 for ms in _LOOKUP_HIT.findall(output)]
    if not retrieves or not lookups:
        raise BenchError(f"lmcache bench server retrieved nothing:\n{output[-2000:]}")
    return retrieves, lookups


def lmcache_bench(command: Path, environment: Mapping[str, str], rpc: int, web: int, sequences: int) -> str:
    """What `lmcache bench server` prints: every sequence of tokens stored and retrieved, its checksums compared.

    Raises:
        BenchError: it failed, or found other bytes than it stored.
    """
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
    if done.returncode or "MISMATCH" in done.stdout:
        raise BenchError(f"lmcache bench server failed:\n{(done.stdout + done.stderr)[-2000:]}")
    return done.stdout


def free_port() -> int:
    """A TCP port of this host that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])
