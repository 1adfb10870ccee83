"""kill -9 of the whole daemon under load: what it acknowledged as durable is served after restart, byte for byte.

    python tests/chaos/kill_daemon.py --rounds 200 --seed 1

A round: clients (shared memory and bytes over the socket) put and fetch at once against a daemon on the files that the
round before has left; the daemon is killed at a random instant; no client may raise or hang; the volume is checked with
fsck; the next daemon must serve every chunk ever acknowledged as durable. The volume is large enough that nothing is
evicted.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from kvstore.bench.daemon import Daemon
from kvstore.client import Client, PutChunk
from kvstore.connect import connect
from kvstore.outcome import Reason
from kvstore.testing.chunks import sample_container, sample_key
from kvstore.tiers import fsck

LOAD_SECONDS_MAX = 0.6
CLIENT_SECONDS_MAX = 60.0


class Tally(msgspec.Struct):
    """What the rounds have seen."""

    rounds: int = 0
    acknowledged: int = 0
    fetched: int = 0
    wrong: int = 0
    lost: int = 0
    raised: int = 0
    hung: int = 0
    leaked_bytes: int = 0
    fsck_problems: int = 0

    @property
    def clean(self) -> bool:
        """True if nothing went wrong."""
        return not (self.wrong or self.lost or self.raised or self.hung or self.leaked_bytes or self.fsck_problems)


class Load:
    """One client's endless puts and fetches of chunks of its own."""

    def __init__(self, url: str, first: int, tally: Tally) -> None:
        self.durable: list[bytes] = []
        self._url = url
        self._number = first
        self._tally = tally
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End after the call in hand; counts a client that does not come back."""
        self._stop.set()
        self._thread.join(timeout=CLIENT_SECONDS_MAX)
        self._tally.hung += self._thread.is_alive()

    def _run(self) -> None:
        try:
            with connect(self._url) as client:
                while not self._stop.is_set():
                    self._put(client)
                    if self.durable:
                        check(client, self.durable[-3:], self._tally, must_hit=False)
        except Exception as error:  # the verbs promise not to raise because of the store
            print(f"a client raised: {error!r}")
            self._tally.raised += 1

    def _put(self, client: Client) -> None:
        keys = [sample_key(number) for number in range(self._number, self._number + 3)]
        self._number += 3
        statuses = client.put([_put_chunk(key) for key in keys], durable=True)
        self.durable += [key for key, status in zip(keys, statuses, strict=True) if status.durable]


def _put_chunk(key: bytes) -> PutChunk:
    data = sample_container(key)

    def write(target: memoryview) -> int:
        target[: len(data)] = data
        return len(data)

    return PutChunk(key, len(data), write)


def check(client: Client, keys: list[bytes], tally: Tally, *, must_hit: bool) -> None:
    """Fetch chunks and compare every byte of every segment."""
    for part in client.fetch(keys):
        if part.miss is not None:
            tally.lost += must_hit or part.miss.reason in (Reason.ABSENT, Reason.CORRUPT)
            continue
        expected = memoryview(sample_container(keys[part.index]))
        good = all(
            data == expected[segment.offset : segment.offset + segment.length]
            for group in part.groups
            for segment, data in group
        )
        tally.fetched += 1
        tally.wrong += not good


def run(directory: Path, rounds: int, seed: int) -> Tally:
    """All rounds; see the module's text."""
    tally = Tally()
    with Daemon(directory, dram="4MiB", nvme="1GiB") as daemon:
        _kill_again_and_again(daemon, directory / "nvme", rounds, random.Random(seed), tally)
    return tally


def _kill_again_and_again(daemon: Daemon, volume: Path, rounds: int, rng: random.Random, tally: Tally) -> None:
    durable: list[bytes] = []
    number = 0
    for _ in range(rounds):
        with daemon.start() as client:
            check(client, rng.sample(durable, min(100, len(durable))), tally, must_hit=True)
        loads = [
            Load(daemon.url + suffix, number + 10**6 * i, tally) for i, suffix in enumerate(("", "?transport=bytes"))
        ]
        number += 10**4
        for load in loads:
            load.start()
        time.sleep(rng.uniform(0.05, LOAD_SECONDS_MAX))
        daemon.kill()
        for load in loads:
            load.stop()
            durable += load.durable
        report = fsck.check(volume, deep=tally.rounds % 20 == 0 or tally.rounds == rounds - 1)
        tally.leaked_bytes += report.leaked_bytes
        tally.fsck_problems += not report.clean
        tally.rounds += 1
        tally.acknowledged = len(durable)
    with daemon.start() as client:
        check(client, durable, tally, must_hit=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run and print the tally; exit code 1 if anything was wrong, lost or leaked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix=".kvstore-chaos-", dir=".") as directory:
        tally = run(Path(directory).resolve(), arguments.rounds, arguments.seed)
    print(msgspec.json.encode(tally).decode())
    return 0 if tally.clean else 1


if __name__ == "__main__":
    sys.exit(main())
