"""A worker's transfers between blocks and a store: what is loaded, saved, given up, and told to the scheduler."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest
import torch

from kvstore.client import PutChunk
from kvstore.connectors.vllm import access
from kvstore.connectors.vllm.access import StoreAccess
from kvstore.connectors.vllm.layouts import kv_views
from kvstore.connectors.vllm.messages import FailedLoad, LoadJob, SaveJob, StepPlan, StepReport
from kvstore.connectors.vllm.paged import HeadShare, PagedKV
from kvstore.connectors.vllm.settings import VllmSettings
from kvstore.connectors.vllm.transfers import Transfers
from kvstore.errors import ServiceUnavailableError
from kvstore.outcome import PutStatus, Reason
from kvstore.testing.chunks import FINGERPRINT, sample_spec
from kvstore.testing.memory_client import MemoryClient
from kvstore.testing.vllm import CHUNK, KEYS, cache_tensors

SPEC = sample_spec(layers=2, kv_heads=2, dim=4)
BLOCK = 4
BLOCKS = 16
WAIT_SECONDS = 20.0
CHAIN = KEYS.chain(range(4 * CHUNK))


class SlowClient(MemoryClient):
    """Puts wait at `gate` before anything is read, and at `behind` when a chunk has been written."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()

    def put(self, chunks: Any, *, durable: bool = False, deadline_ms: float | None = None) -> list[PutStatus]:
        self.entered.set()
        assert self.gate.wait(WAIT_SECONDS)
        return super().put(chunks, durable=durable, deadline_ms=deadline_ms)

    def _put(self, chunk: PutChunk) -> PutStatus:
        assert self.gate.wait(WAIT_SECONDS)
        return super()._put(chunk)


class Worker:
    """Transfers of a worker whose blocks hold random KV."""

    def __init__(self, client: Any, **more: Any) -> None:
        given = {"url": "unix:/nowhere", "chunk_tokens": CHUNK, "codec": "raw", **more}
        self.settings = msgspec.convert(given, VllmSettings)
        self.caches = cache_tensors("LBHNC", SPEC, BLOCKS, BLOCK, seed=5)
        layers = [kv_views("FLASH_ATTN", cache, heads=2, key_dim=4, value_dim=4) for cache in self.caches]
        pages = PagedKV(SPEC, layers, HeadShare(0, 2), BLOCK)
        self.transfers = Transfers(self.settings, StoreAccess(self.settings), pages)
        self.reports = StepReport()
        self.sent: set[str] = set()
        self.received: set[str] = set()

    def step(self, **plan: Any) -> None:
        """One step of the engine, in the order of vLLM's calls."""
        step = StepPlan(fingerprint=FINGERPRINT, **plan)
        self.transfers.abandon(step)
        self.transfers.load(step)
        self.transfers.save(step)
        sent, received = self.transfers.finished()
        self.sent |= sent
        self.received |= received
        report = self.transfers.report()
        if report is not None:
            self.reports = self.reports.merge(report)

    def until(self, condition: Callable[[], bool]) -> None:
        """Steps without work until something has happened."""
        until = time.monotonic() + WAIT_SECONDS
        while not condition():
            assert time.monotonic() < until
            self.step()
            time.sleep(0.001)

    def content(self, blocks: list[int]) -> torch.Tensor:
        return torch.stack([cache[blocks] for cache in self.caches])


def save(job_id: int, blocks: list[int], *, first: int = 0, stop: int = 2, request: str = "r", **more: Any) -> SaveJob:
    start = first * CHUNK
    return SaveJob(
        job_id=job_id, request_id=request, chain=CHAIN[:stop], first_chunk=first, start=start, block_ids=blocks, **more
    )


def load(blocks: list[int], *, start: int = 0, stop: int = 2 * CHUNK, wait: bool = False) -> LoadJob:
    first = start // CHUNK
    keys = CHAIN[first : -(-stop // CHUNK)]
    return LoadJob(
        request_id="r",
        keys=keys,
        tiers=["memory"] * len(keys),
        nbytes=[1000] * len(keys),
        first_chunk=first,
        start=start,
        stop=stop,
        block_ids=blocks,
        wait=wait,
    )


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> SlowClient:
    client = SlowClient()
    monkeypatch.setattr(access, "connect", lambda *args, **kwargs: client)
    return client


@pytest.fixture
def worker(client: SlowClient) -> Iterator[Worker]:
    worker = Worker(client)
    yield worker
    client.gate.set()
    worker.transfers.close(WAIT_SECONDS)


@pytest.mark.parametrize("wait", [False, True])
def test_what_was_saved_is_loaded_into_other_blocks(worker: Worker, wait: bool) -> None:
    worker.step(saves=[save(1, [3, 1, 4, 0])])
    worker.until(lambda: worker.reports.ended == {1: 1})
    before = worker.content([5, 8])
    worker.step(loads=[load([9, 2], start=BLOCK, stop=3 * BLOCK, wait=wait)])
    if not wait:
        worker.until(lambda: worker.received == {"r"})
    assert torch.equal(worker.content([9, 2]), worker.content([1, 4]))
    assert torch.equal(worker.content([5, 8]), before)
    assert not worker.transfers.bad_blocks()
    assert not worker.reports.failed
    counts = worker.transfers.counts()
    assert (counts["saved_chunks"], counts["loaded_chunks"], counts["loaded_tokens"]) == (2, 2, 2 * BLOCK)
    assert not worker.transfers.counts()


def test_a_damaged_chunk_is_reported_by_its_blocks_and_its_reason(worker: Worker, client: SlowClient) -> None:
    worker.step(saves=[save(1, [0, 1, 2, 3])])
    worker.until(lambda: worker.reports.ended == {1: 1})
    damaged = bytearray(client.chunks[CHAIN[1]])
    damaged[-1] ^= 1
    client.chunks[CHAIN[1]] = bytes(damaged)
    worker.step(loads=[load([8, 9, 10, 11])])
    worker.until(lambda: worker.received == {"r"})
    assert worker.transfers.bad_blocks() == {10, 11}
    assert not worker.transfers.bad_blocks()
    assert worker.reports.failed == {"r": FailedLoad(1, Reason.CORRUPT)}
    assert torch.equal(worker.content([8, 9]), worker.content([0, 1]))
    assert worker.transfers.counts()["failed_corrupt"] == 1


def test_a_store_that_is_away_costs_its_hits_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise ServiceUnavailableError("nobody there")

    monkeypatch.setattr(access, "connect", refuse)
    worker = Worker(None)
    worker.step(loads=[load([8, 9, 10, 11])], saves=[save(1, [0, 1, 2, 3])], held=["r"])
    worker.until(lambda: worker.received == worker.sent == {"r"})
    assert worker.transfers.bad_blocks() == {8, 9, 10, 11}
    assert worker.reports.failed == {"r": FailedLoad(0, Reason.UNAVAILABLE)}
    assert worker.transfers.counts()["unsaved_unavailable"] == 2
    worker.transfers.close(WAIT_SECONDS)


def test_a_load_that_waited_too_long_for_others_is_not_begun(client: SlowClient) -> None:
    worker = Worker(client, load_deadline_ms=1e-6)
    worker.step(loads=[load([8, 9, 10, 11])])
    worker.until(lambda: worker.received == {"r"})
    assert worker.reports.failed == {"r": FailedLoad(0, Reason.DEADLINE)}
    assert "fetch" not in client.calls
    worker.transfers.close(WAIT_SECONDS)


def test_blocks_of_a_finished_request_are_kept_until_they_have_been_read(worker: Worker, client: SlowClient) -> None:
    client.gate.clear()
    worker.step(saves=[save(1, [0, 1, 2, 3])])
    worker.step(held=["r"])
    assert client.entered.wait(WAIT_SECONDS)
    worker.step()
    assert not worker.sent
    client.gate.set()
    worker.until(lambda: worker.sent == {"r"})
    assert set(client.chunks) == set(CHAIN[:2])


def test_what_is_read_of_a_preempted_request_is_not_stored(worker: Worker, client: SlowClient) -> None:
    client.gate.clear()
    worker.step(saves=[save(1, [0, 1, 2, 3]), save(2, [4, 5, 6, 7], request="other", first=2, stop=4)])
    assert client.entered.wait(WAIT_SECONDS)
    worker.step(abandoned=["r"])
    client.gate.set()
    worker.until(lambda: worker.reports.ended == {1: 1, 2: 1})
    assert set(client.chunks) == set(CHAIN[2:4])
    assert worker.transfers.counts()["dropped_chunks"] == 2


def test_what_was_computed_behind_a_failed_load_is_not_stored(worker: Worker, client: SlowClient) -> None:
    worker.step(loads=[load([8, 9], stop=CHUNK, wait=True)], saves=[save(1, [8, 9, 2, 3])], epoch=4)
    worker.step(saves=[save(2, [8, 9, 2, 3])], epoch=4)
    worker.step(saves=[save(3, [4, 5, 6, 7])], epoch=5)
    worker.until(lambda: worker.reports.ended == {1: 1, 2: 1, 3: 1})
    assert worker.transfers.bad_blocks() == {8, 9}
    counts = worker.transfers.counts()
    assert (counts["dropped_chunks"], counts["saved_chunks"]) == (4, 2)
    worker.step(loads=[load([12, 13], stop=CHUNK, wait=True)])
    assert torch.equal(worker.content([12, 13]), worker.content([4, 5]))


def test_a_chunk_that_was_bad_is_replaced(worker: Worker, client: SlowClient) -> None:
    worker.step(saves=[save(1, [0, 1, 2, 3])])
    worker.until(lambda: worker.reports.ended == {1: 1})
    client.chunks[CHAIN[1]] = b"bad"
    worker.step(saves=[save(2, [2, 3], first=1, stop=2)])
    worker.step(saves=[save(3, [2, 3], first=1, stop=2, replace=True)])
    worker.until(lambda: worker.reports.ended == {1: 1, 2: 1, 3: 1})
    assert worker.transfers.counts()["existing_chunks"] == 1
    assert client.chunks[CHAIN[1]] != b"bad"


def test_closing_drops_what_does_not_end(client: SlowClient) -> None:
    worker = Worker(client)
    client.gate.clear()
    worker.step(saves=[save(1, [0, 1, 2, 3])])
    assert client.entered.wait(WAIT_SECONDS)
    threading.Timer(0.2, client.gate.set).start()
    worker.transfers.close(0.01)
    assert not client.chunks
