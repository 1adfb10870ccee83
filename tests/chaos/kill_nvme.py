"""kill -9 at random instants: what the nvme tier acknowledged is there and whole, and nothing leaks.

    python tests/chaos/kill_nvme.py --rounds 200 --seed 1 [--volumes 3]

A round: a child process opens the volume the round before has left and lets several threads put, delete, read and
touch real containers in a volume too small for them, so that extents are evicted and reused all the time. It says on
a pipe what it starts (S), what was acknowledged durable (P), and what is being evicted (E) or deleted (D). The
parent kills it at a random instant, checks the volume with fsck (every record, every hash), opens it and compares
every chunk with the bytes it must have. A chunk must be there if its put was acknowledged and no eviction or deletion
of it began after that put had begun.
"""

from __future__ import annotations

import argparse
import os
import random
import select
import signal
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from kvstore.buffers import aligned_buffer
from kvstore.testing.chunks import sample_container, sample_key
from kvstore.tier import IO_ALIGN, Entry, PutItem, ReadItem, Removal
from kvstore.tiers import fsck
from kvstore.tiers.directio import page_up
from kvstore.tiers.nvme import NvmeTier

CAPACITY_BYTES = 3 << 20
CHUNKS = 96
THREADS = 3
START_SECONDS_MAX = 30.0
LINE = struct.Struct("<cB32s")
"""What happened, which thread of the child says so, and the chunk's key."""


class Tally(msgspec.Struct):
    """What the rounds have seen."""

    rounds: int = 0
    acknowledged: int = 0
    evicted: int = 0
    deleted: int = 0
    checked: int = 0
    wrong: int = 0
    lost: int = 0
    leaked_bytes: int = 0
    fsck_problems: int = 0


def contents() -> dict[bytes, bytes]:
    """The chunks: containers of 8 to 128 KiB, together about twice the volume."""
    rng = random.Random(0)
    return {key: sample_container(key, tokens=rng.randrange(16, 257)) for key in map(sample_key, range(CHUNKS))}


class Witness:
    """A listener that says what leaves, before its deletion can become durable: it is called under the tier's lock."""

    def __init__(self, pipe: int) -> None:
        self._pipe = pipe

    def stored(self, entry: Entry, data: memoryview) -> None:
        """The put that stored it says so itself."""

    def removed(self, entries: Sequence[Entry], removal: Removal) -> None:
        """Write a line for each chunk."""
        for entry in entries:
            os.write(self._pipe, LINE.pack(b"E" if removal is Removal.EVICTED else b"D", 0, entry.key))


def work(volumes: list[Path], chunks: dict[bytes, bytes], seed: int, pipe: int) -> None:
    """The child: never returns on its own."""
    tier = NvmeTier(
        volumes,
        CAPACITY_BYTES,
        direct_io=seed % 4 != 0,
        piece_bytes=4 * IO_ALIGN,
        evict_ahead_bytes=seed % 3 * 100_000,
    )
    tier.listener = Witness(pipe)
    keys = list(chunks)
    os.write(pipe, LINE.pack(b"R", 0, bytes(32)))

    def run(thread: int) -> None:
        rng = random.Random(seed * THREADS + thread)
        target = aligned_buffer(page_up(max(map(len, chunks.values()))))
        while True:
            picked = rng.sample(keys, rng.randrange(1, 5))
            verb = rng.random()
            if verb < 0.7:
                for key in picked:
                    os.write(pipe, LINE.pack(b"S", thread, key))
                for key, status in zip(
                    picked, tier.put([PutItem(k, memoryview(chunks[k])) for k in picked]), strict=True
                ):
                    if status.durable:
                        os.write(pipe, LINE.pack(b"P", thread, key))
            elif verb < 0.8:
                tier.delete(picked)
            elif verb < 0.9:
                tier.touch(picked)
            else:
                (outcome,) = tier.read([ReadItem(picked[0], target)])
                if isinstance(outcome, int) and target[:outcome] != chunks[picked[0]]:
                    os.write(pipe, LINE.pack(b"W", thread, picked[0]))

    for thread in range(1, THREADS):
        threading.Thread(target=run, args=(thread,), daemon=True).start()
    run(0)


def read_until(pipe: int, process: int, delay_seconds: float) -> list[tuple[bytes, int, bytes]]:
    """Kill the child that many seconds after it is ready; answers every line it wrote."""
    data = bytearray()
    kill_at = time.monotonic() + START_SECONDS_MAX
    killed = ready = False
    while True:
        timeout = max(0.0, kill_at - time.monotonic())
        if not killed and not select.select([pipe], [], [], timeout)[0]:
            os.kill(process, signal.SIGKILL)
            killed = True
        block = os.read(pipe, 65536)
        if not block:
            break
        data += block
        if not ready:
            ready = True
            kill_at = time.monotonic() + delay_seconds
        if not killed and time.monotonic() >= kill_at:
            os.kill(process, signal.SIGKILL)
            killed = True
    if not ready:
        raise RuntimeError("the child did not start")
    return list(LINE.iter_unpack(data[: len(data) - len(data) % LINE.size]))


def must_be_there(lines: Sequence[tuple[bytes, int, bytes]], before: set[bytes], tally: Tally) -> set[bytes]:
    """The chunks that no crash may have lost, given those that were there before."""
    started: dict[tuple[int, bytes], int] = {}
    gone: dict[bytes, int] = {}
    certain = set(before)
    for at, (letter, thread, key) in enumerate(lines):
        if letter == b"S":
            started[thread, key] = at
        elif letter in (b"E", b"D"):
            gone[key] = at
            certain.discard(key)
            tally.evicted += letter == b"E"
            tally.deleted += letter == b"D"
        elif letter == b"P":
            tally.acknowledged += 1
            if gone.get(key, -1) < started[thread, key]:
                certain.add(key)
        elif letter == b"W":
            tally.wrong += 1
    return certain


def check(volumes: list[Path], chunks: dict[bytes, bytes], certain: set[bytes], tally: Tally) -> set[bytes]:
    """Compare the volumes with what it must hold; answers what it holds."""
    for volume in volumes if all(volume.exists() for volume in volumes) else ():
        report = fsck.check(volume)
        tally.fsck_problems += report.problem_count
        tally.leaked_bytes += report.leaked_bytes
        if report.problem_count:
            print(report.text(), file=sys.stderr)
    tier = NvmeTier(volumes, CAPACITY_BYTES)
    try:
        usage = tier.usage()
        used = sum(page_up(entry.nbytes) for entry in tier.scan())
        tally.leaked_bytes += abs(usage.used_bytes - used)
        present = {entry.key for entry in tier.scan()}
        target = aligned_buffer(page_up(max(map(len, chunks.values()))))
        for key in present:
            tally.checked += 1
            (outcome,) = tier.read([ReadItem(key, target)])
            if not isinstance(outcome, int) or target[:outcome] != chunks[key]:
                tally.wrong += 1
        tally.lost += len(certain - present)
    finally:
        tier.close()
    return present


def run(rounds: int, seed: int, directory: Path, count: int = 1) -> Tally:
    """Kill that many children of a tier of `count` volumes; answers what was seen."""
    volumes = [directory / str(number) for number in range(count)]
    chunks = contents()
    tally = Tally()
    present: set[bytes] = set()
    rng = random.Random(seed)
    for number in range(rounds):
        reader, writer = os.pipe()
        process = os.fork()
        if not process:
            try:
                os.close(reader)
                work(volumes, chunks, seed * 100_000 + number, writer)
            finally:
                os._exit(1)
        os.close(writer)
        try:
            lines = read_until(reader, process, rng.uniform(0.0, 0.15))
        finally:
            os.close(reader)
            os.waitpid(process, 0)
        present = check(volumes, chunks, must_be_there(lines, present, tally), tally)
        tally.rounds += 1
    return tally


def main() -> int:
    """Run from the command line; exit code 1 if anything was wrong, lost or leaked."""
    parser = argparse.ArgumentParser(description="kill -9 an nvme tier under load, again and again")
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--volumes", type=int, default=1, help="of the tier")
    parser.add_argument("--dir", default=None, help="where the volume goes; default: the system's temporary directory")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kvstore-chaos-", dir=arguments.dir) as directory:
        tally = run(arguments.rounds, arguments.seed, Path(directory), arguments.volumes)
    print(msgspec.json.encode(tally).decode())
    return int(bool(tally.wrong or tally.lost or tally.leaked_bytes or tally.fsck_problems))


if __name__ == "__main__":
    sys.exit(main())
