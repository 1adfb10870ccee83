"""Many threads on one tier: they put, read, delete and pin; every answer is checked, and the bound watched."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from kvstore.outcome import Miss, Reason
from kvstore.testing.harness import aligned, bytes_of, item, key_of
from kvstore.tier import IO_ALIGN, ReadItem, Tier, Usage

THREADS = 6
CHUNKS = 24
DEADLINE_SECONDS = 120.0
"""A tier that deadlocks fails the test after this long instead of hanging it."""


@contextmanager
def watch_bound(tier: Tier) -> Iterator[list[Usage]]:
    """Sample `tier.usage()` from a thread of its own as long as the block runs; the list has the samples."""
    samples: list[Usage] = []
    done = threading.Event()

    def watch() -> None:
        samples.append(tier.usage())
        while not done.wait(0.0005):
            samples.append(tier.usage())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield samples
    finally:
        done.set()
        thread.join(DEADLINE_SECONDS)


def hammer(tier: Tier, *, nbytes_max: int, rounds: int, seed: int = 0) -> list[Usage]:
    """Run THREADS threads of `rounds` random calls each; returns the usages seen meanwhile.

    Raises:
        AssertionError: a read filled in other bytes than were put, an outcome no tier may give, or a thread that hangs.
    """
    sizes = [1 + (number * 7919) % nbytes_max for number in range(CHUNKS)]
    contents = [bytes_of(number, nbytes) for number, nbytes in enumerate(sizes)]
    failures: list[BaseException] = []

    def run(thread_seed: int) -> None:
        rng = random.Random(thread_seed)
        target = aligned(nbytes_max + IO_ALIGN)
        try:
            for _ in range(rounds):
                _step(tier, rng, sizes, contents, target)
        except BaseException as error:  # handed to the caller's thread
            failures.append(error)

    threads = [threading.Thread(target=run, args=(seed * 1000 + n,), daemon=True) for n in range(THREADS)]
    with watch_bound(tier) as usages:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(DEADLINE_SECONDS)
    assert not any(thread.is_alive() for thread in threads), "a thread hangs in the tier"
    if failures:
        raise failures[0]
    return usages


def _step(tier: Tier, rng: random.Random, sizes: list[int], contents: list[bytes], target: memoryview) -> None:
    number = rng.randrange(CHUNKS)
    key, nbytes = key_of(number), sizes[number]
    verb = rng.choice(("put", "put", "put", "read", "read", "read", "range", "delete", "touch", "pin", "scan"))
    if verb == "put":
        other = rng.randrange(CHUNKS)
        for status in tier.put([item(number, nbytes), item(other, sizes[other])]):
            assert status.stored or status.reason in (Reason.BUSY, Reason.FULL), status
    elif verb in ("read", "range"):
        offset = 0 if verb == "read" else rng.randrange(nbytes)
        wanted = contents[number][offset:]
        (outcome,) = tier.read([ReadItem(key, target[: len(wanted)], offset)])
        if isinstance(outcome, Miss):
            assert outcome.reason in (Reason.ABSENT, Reason.BUSY), outcome
        else:
            assert (outcome, bytes(target[:outcome])) == (len(wanted), wanted), f"chunk {number} read back wrong"
    elif verb == "delete":
        tier.delete([key])
    elif verb == "touch":
        tier.touch([key_of(rng.randrange(CHUNKS)) for _ in range(4)])
    elif verb == "pin":
        tier.pin([key], expires_at=2000.0)
        tier.unpin([key])
    else:
        for entry in tier.scan():
            assert entry.nbytes in sizes
