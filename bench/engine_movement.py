"""Moving whole contexts, one chunk by many threads, and what an overloaded write-behind queue keeps.

engine.resume.vs_one_by_one_SIZE  `Store.resume` of a parked context against borrowing its chunks one after the other
engine.resume.gb_per_s_SIZE       what it delivers, verified, in memory
engine.park.moved_again           share of a context's bytes that a second park moves, after it grew by an eighth
engine.striped.vs_one_thread      one chunk of 32 MiB read by the tier's threads together, against by one thread
engine.shed.hit_KIND              share of a trace's blocks that the disk has for their prompts, where twice as much is
                                  put as it can write and the queue sheds the least valuable
engine.shed.hit_newest_KIND, .hit_oldest_KIND
                                  the same for a queue that sheds whoever comes last, or who has waited longest

The first four are times of the disk under `directory`, in turn in one run; the others are exact and the same anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

from kvstore.bench.replay import Chain, chains
from kvstore.bench.replay_trace import synthetic
from kvstore.bench.tiers_nvme import fill_container
from kvstore.bench.timing import paired
from kvstore.buffers import aligned_buffer
from kvstore.keys import ROOT
from kvstore.loan import Loan, TransientPool
from kvstore.shedding import Demotion, WaitingList
from kvstore.store import Store
from kvstore.tier import IO_ALIGN, PutItem, ReadItem
from kvstore.tiers.directio import THREADS_DEFAULT
from kvstore.tiers.dram import DramTier
from kvstore.tiers.nvme import NvmeTier

MIB = 1 << 20
CONTEXT_BYTES = 256 * MIB
CONTEXT_BYTES_QUICK = 8 * MIB
CHUNK_BYTES = {"32MiB": 32 * MIB, "4MiB": 4 * MIB, "256KiB": 256 << 10}
CHUNK_BYTES_QUICK = {"1MiB": MIB}
ROUNDS = 7
KINDS = ("chat", "documents")
REQUESTS = 3000
REQUESTS_QUICK = 100
QUEUE_BLOCKS = 200
STRIPES = {"striped": THREADS_DEFAULT, "plain": 1}
"""Transfers of a read at once."""


def measure(directory: Path, quick: bool = False) -> dict[str, float]:
    """Metrics `engine.resume.*`, `engine.park.*`, `engine.striped.*`, `engine.shed.*`."""
    metrics: dict[str, float] = {}
    for name, chunk_bytes in (CHUNK_BYTES_QUICK if quick else CHUNK_BYTES).items():
        context_bytes = CONTEXT_BYTES_QUICK if quick else CONTEXT_BYTES
        metrics |= _measure_resume(
            directory / f"resume-{name}", name, chunk_bytes, context_bytes, 2 if quick else ROUNDS
        )
    metrics |= _measure_striped(directory / "striped", MIB if quick else 32 * MIB, 2 if quick else ROUNDS)
    for kind in KINDS:
        metrics |= _measure_shedding(kind, REQUESTS_QUICK if quick else REQUESTS)
    return metrics


def _measure_resume(directory: Path, name: str, chunk_bytes: int, context_bytes: int, rounds: int) -> dict[str, float]:
    """A context of so many bytes, in chunks of one size."""
    count = context_bytes // chunk_bytes
    grown = max(1, count // 8)
    keys = [number.to_bytes(32, "little") for number in range(1, count + grown + 1)]
    memory = DramTier(2 * context_bytes)
    with closing(Store([memory, NvmeTier(directory, 2 * context_bytes)])) as store:
        _put(store, keys[:count], chunk_bytes)
        _park(store, keys[:count])
        moved_bytes = store.counters.get("demoted_bytes", "nvme")

        def one_by_one() -> None:
            for key in keys[:count]:
                loan = store.borrow(key)
                if not isinstance(loan, Loan):
                    raise OSError(f"the benchmark's chunk was not read: {loan}")
                loan.release()
            memory.evict(keys)

        def resume() -> None:
            if not all(status.stored for status in store.resume(keys[:count])):
                raise OSError("the benchmark's context was not resumed")
            memory.evict(keys)

        resume_seconds, _, ratio = paired(resume, one_by_one, rounds=rounds)
        store.resume(keys[:count])
        _put(store, keys[count:], chunk_bytes, parent=keys[count - 1])
        _park(store, keys)
        again_bytes = store.counters.get("demoted_bytes", "nvme") - moved_bytes
        return {
            f"engine.resume.vs_one_by_one_{name}": ratio,
            f"engine.resume.gb_per_s_{name}": count * chunk_bytes / resume_seconds / 1e9,
            f"engine.park.moved_again_{name}": again_bytes / (len(keys) * chunk_bytes),
        }


def _put(store: Store, keys: Sequence[bytes], chunk_bytes: int, parent: bytes = ROOT) -> None:
    buffer = aligned_buffer(chunk_bytes)
    for key in keys:
        fill_container(buffer, int.from_bytes(key, "little"))
        (status,) = store.put([PutItem(key, buffer, parent)])
        if not status.stored:
            raise OSError(f"the store did not take the benchmark's chunk: {status.reason}")
        parent = key


def _park(store: Store, keys: Sequence[bytes]) -> None:
    if not all(status.durable for status in store.park(keys)):
        raise OSError("the benchmark's context was not parked")


def _measure_striped(directory: Path, chunk_bytes: int, rounds: int) -> dict[str, float]:
    """One chunk, read by the tier as it is by default, and by a tier of one thread."""
    buffer = aligned_buffer(chunk_bytes)
    fill_container(buffer, 1)
    key = (1).to_bytes(32, "little")
    tiers = [
        NvmeTier(directory / name, 2 * chunk_bytes + (64 * MIB), io_threads=threads)
        for name, threads in STRIPES.items()
    ]
    try:
        for tier in tiers:
            if not tier.put([PutItem(key, buffer)])[0].durable:
                raise OSError("the nvme tier did not store the benchmark's chunk")

        def read(tier: NvmeTier) -> None:
            if tier.read([ReadItem(key, buffer)]) != [chunk_bytes]:
                raise OSError("the nvme tier did not read the benchmark's chunk")

        _, _, ratio = paired(partial(read, tiers[0]), partial(read, tiers[1]), rounds=3 * rounds)
        return {"engine.striped.vs_one_thread": ratio}
    finally:
        for tier in tiers:
            tier.close()


def _measure_shedding(kind: str, requests: int) -> dict[str, float]:
    prompts = chains(synthetic(kind, requests))
    sheds = {"": WaitingList.pop_least, "newest_": _pop_newest, "oldest_": WaitingList.pop_first}
    return {f"engine.shed.hit_{name}{kind}": below_share(prompts, shed) for name, shed in sheds.items()}


def below_share(prompts: Sequence[Chain], shed: Callable[[WaitingList], Demotion | None]) -> float:
    """Share of all blocks that are below, behind nothing that is not, when their prompt comes.

    Every prompt puts its other blocks into a queue of QUEUE_BLOCKS, and `shed` takes out whoever is given up where it
    is full. The disk, which holds everything that it gets, writes half as many blocks as are put.
    """
    waiting, below = WaitingList(), set[bytes]()
    page = TransientPool(IO_ALIGN).take(IO_ALIGN, deadline=0.0)
    assert page is not None, "the pool is empty"
    found, credit = 0, 0.0
    for keys in prompts:
        hits = next((index for index, key in enumerate(keys) if key not in below), len(keys))
        found += hits
        for index, key in enumerate(keys):
            if key in below or waiting.get(key) is not None:
                continue
            parent = keys[index - 1] if index else ROOT
            block = Demotion(key, parent, Loan(page.view, "", page), position=index)
            block.orphan = bool(index) and parent not in below and waiting.get(parent) is None
            waiting.add(block)
            if len(waiting) > QUEUE_BLOCKS:
                shed(waiting)
            credit += 0.5
        while credit >= 1 and len(waiting):
            below.add(waiting.pop_first().key)
            credit -= 1
    return found / sum(map(len, prompts))


def _pop_newest(waiting: WaitingList) -> Demotion | None:
    return waiting.pop(waiting.all()[-1].key)
