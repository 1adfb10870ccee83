"""A daemon under full load for a long time: memory, threads and descriptors stay flat, and no byte is ever wrong.

    python tests/chaos/soak.py --minutes 30

Clients over shared memory and over the socket put, fetch in both orders, prefetch, pin, delete and flush chunks of a
working set several times as large as either tier, so that chunks are evicted and promoted all the time. Every few
seconds the daemon's anonymous memory (what is not the arena), its threads and its descriptors are noted; the first part
of the time is warming up. At the end the slope of a straight line through the rest is printed, and fsck checks every
chunk.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np

from kvstore.bench.daemon import Daemon
from kvstore.client import Client, PutChunk
from kvstore.connect import connect
from kvstore.keys import ROOT
from kvstore.testing.chunks import sample_container, sample_key, sample_spec
from kvstore.tiers import fsck

CHAINS = 40
CHAIN_CHUNKS = 8
WARM_FRACTION = 0.25
GROWTH_BYTES_MAX = 16 << 20
"""Growth over the measured part, by the slope, that is still flat: what malloc keeps moves about by less."""
CLIENT_SECONDS_MAX = 60.0


class Sample(msgspec.Struct, frozen=True):
    """What the daemon had at one moment."""

    seconds: float
    anonymous_bytes: int
    threads: int
    descriptors: int


class Result(msgspec.Struct, kw_only=True):
    """What was seen. `anonymous_bytes` at some moments of the whole time; the slope is that of its measured part."""

    minutes: float
    calls: int
    fetched: int
    fetched_bytes: int
    missed: int
    wrong: int
    raised: int
    hung: int
    fsck_problems: int
    anonymous_bytes: list[int]
    slope_bytes_per_minute: float
    threads_max: int
    descriptors_max: int
    flat: bool

    @property
    def clean(self) -> bool:
        """True if nothing went wrong."""
        return self.flat and not (self.wrong or self.raised or self.hung or self.fsck_problems)


class Load:
    """One client and its endless calls."""

    def __init__(self, url: str, seed: int, chunks: dict[bytes, tuple[bytes, bytes]]) -> None:
        self.calls = self.fetched = self.fetched_bytes = self.missed = self.wrong = self.raised = 0
        self._url = url
        self._rng = random.Random(seed)
        self._chunks = chunks
        self._keys = list(chunks)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> bool:
        """End after the call in hand; True if that hangs."""
        self._stop.set()
        self._thread.join(CLIENT_SECONDS_MAX)
        return self._thread.is_alive()

    def _run(self) -> None:
        try:
            with connect(self._url) as client:
                while not self._stop.is_set():
                    self._call(client)
                    self.calls += 1
        except Exception as error:  # the verbs promise not to raise because of the store
            print(f"a client raised: {error!r}")
            self.raised += 1

    def _call(self, client: Client) -> None:
        start = self._rng.randrange(CHAINS) * CHAIN_CHUNKS
        keys = self._keys[start : start + self._rng.randint(1, CHAIN_CHUNKS)]
        verb = self._rng.random()
        if verb < 0.35:
            client.put([self._put_chunk(key) for key in keys], durable=self._rng.random() < 0.3)
        elif verb < 0.85:
            self._fetch(client, keys)
        elif verb < 0.9:
            client.prefetch(keys)
        elif verb < 0.94:
            client.pin(keys, ttl_seconds=0.5)
        elif verb < 0.97:
            client.delete(keys)
        elif verb < 0.99:
            client.explain(keys)
        else:
            client.flush()

    def _put_chunk(self, key: bytes) -> PutChunk:
        parent, data = self._chunks[key]

        def write(target: memoryview) -> int:
            target[: len(data)] = data
            return len(data)

        return PutChunk(key, len(data), write, parent)

    def _fetch(self, client: Client, keys: list[bytes]) -> None:
        order = self._rng.choice(("chunk", "layer"))
        for part in client.fetch(keys, order="layer" if order == "layer" else "chunk"):
            if part.miss is not None:
                self.missed += 1
                continue
            expected = self._chunks[keys[part.index]][1]
            for group in part.groups:
                for segment, data in group:
                    self.wrong += data != expected[segment.offset : segment.offset + segment.length]
                    self.fetched_bytes += len(data)
            self.fetched += 1


def contents() -> dict[bytes, tuple[bytes, bytes]]:
    """Chains of chunks of 64 KiB to 1 MiB: key -> (parent, container)."""
    rng = random.Random(0)
    spec = sample_spec(layers=8, kv_heads=2, dim=64)
    chunks: dict[bytes, tuple[bytes, bytes]] = {}
    for number in range(CHAINS * CHAIN_CHUNKS):
        parent = ROOT if number % CHAIN_CHUNKS == 0 else sample_key(number - 1)
        key = sample_key(number)
        chunks[key] = parent, sample_container(key, spec=spec, tokens=rng.randint(16, 256), parent=parent)
    return chunks


def look_at(pid: int, begun: float) -> Sample:
    """What a process has now."""
    status = Path(f"/proc/{pid}/status").read_text()
    fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    return Sample(
        time.monotonic() - begun,
        int(fields["RssAnon"].split()[0]) * 1024,
        int(fields["Threads"]),
        len(os.listdir(f"/proc/{pid}/fd")),
    )


def run(directory: Path, minutes: float, every_seconds: float) -> Result:
    """Load a daemon for that long; see the module's text."""
    chunks = contents()
    samples: list[Sample] = []
    with Daemon(directory, dram="48MiB", nvme="96MiB") as daemon:
        daemon.start().close()
        urls = [daemon.url, daemon.url, daemon.url + "?transport=bytes"]
        loads = [Load(url, seed, chunks) for seed, url in enumerate(urls)]
        begun = time.monotonic()
        waiting = threading.Event()
        while time.monotonic() - begun < 60 * minutes:
            waiting.wait(every_seconds)
            samples.append(look_at(daemon.pid, begun))
        hung = sum([load.stop() for load in loads])
        daemon.stop()
    report = fsck.check(directory / "nvme")
    measured = [sample for sample in samples if sample.seconds > WARM_FRACTION * 60 * minutes] or samples
    times = np.array([sample.seconds for sample in measured]) / 60
    memory = np.array([sample.anonymous_bytes for sample in measured], dtype=np.float64)
    slope = float(np.polyfit(times, memory, 1)[0]) if len(measured) > 1 else 0.0
    return Result(
        minutes=minutes,
        calls=sum(load.calls for load in loads),
        fetched=sum(load.fetched for load in loads),
        fetched_bytes=sum(load.fetched_bytes for load in loads),
        missed=sum(load.missed for load in loads),
        wrong=sum(load.wrong for load in loads),
        raised=sum(load.raised for load in loads),
        hung=hung,
        fsck_problems=report.problem_count - report.repaired_count,
        anonymous_bytes=[sample.anonymous_bytes for sample in samples[:: max(1, len(samples) // 24)]],
        slope_bytes_per_minute=slope,
        threads_max=max(sample.threads for sample in measured),
        descriptors_max=max(sample.descriptors for sample in measured),
        flat=slope * (1 - WARM_FRACTION) * minutes < GROWTH_BYTES_MAX,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run and print the result; exit code 1 if memory grew or anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--every-seconds", type=float, default=5.0)
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix=".kvstore-soak-", dir=".") as directory:
        result = run(Path(directory).resolve(), arguments.minutes, arguments.every_seconds)
    print(msgspec.json.format(msgspec.json.encode(result)).decode())
    return 0 if result.clean else 1


if __name__ == "__main__":
    sys.exit(main())
