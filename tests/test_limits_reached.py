"""Every limit at once: memory full of leases and slots, the volume full of pins, both queues full. Clear refusals, and
everything goes on when the limits are left again.
"""

from __future__ import annotations

import http.client
import json
import tempfile
import threading
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvstore.config import ServiceConfig
from kvstore.loan import Loan
from kvstore.outcome import Miss, PutStatus, Reason
from kvstore.places import Place
from kvstore.store import Store
from kvstore.store_settings import StoreSettings
from kvstore.testing.chunks import sample_container, sample_key
from kvstore.testing.serving import ServerThread
from kvstore.testing.wrappers import GatedTier
from kvstore.tier import IO_ALIGN, PutItem
from kvstore.tiers.dram import DramTier
from kvstore.tiers.nvme import NvmeTier

CHUNKS = 14
NUMBERS = st.integers(0, CHUNKS - 1)
CLEAR = {Reason.FULL, Reason.BUSY, Reason.DEADLINE}
DEADLINE_MS = 30.0
CHUNK_PAGES = 3  # of a sample container


class Limits(RuleBasedStateMachine):
    """Calls that take and calls that give back, on a store all of whose bounds are a few chunks."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.TemporaryDirectory(prefix="kvstore-limits-")
        self.loans: list[Loan] = []
        self.places: list[Place] = []
        self.stored: set[int] = set()

    @initialize()
    def open(self) -> None:
        dram = DramTier(5 * CHUNK_PAGES * IO_ALIGN)
        self.nvme = GatedTier(NvmeTier(Path(self.directory.name) / "nvme", 40 * IO_ALIGN))
        two_chunks = 2 * CHUNK_PAGES * IO_ALIGN
        self.store = Store(
            [dram, self.nvme],
            StoreSettings(
                write_behind_bytes_max=two_chunks,
                fetch_window_bytes=two_chunks,
                transient_bytes_max=two_chunks,
                prefetch_chunks_max=2,
                mover_threads=2,
            ),
        )

    @rule(number=NUMBERS, durable=st.booleans())
    def put(self, number: int, durable: bool) -> None:
        key = sample_key(number)
        item = PutItem(key, memoryview(sample_container(key)))
        (status,) = self.store.put([item], durable=durable, deadline_ms=DEADLINE_MS)
        self.expect_clear(status, durable=durable)
        if status.stored:
            self.stored.add(number)

    @rule(number=NUMBERS)
    def take_a_lease(self, number: int) -> None:
        loan = self.store.borrow(sample_key(number), deadline_ms=DEADLINE_MS)
        if isinstance(loan, Miss):
            assert loan.reason in {*CLEAR, Reason.ABSENT}, loan
        else:
            self.loans.append(loan)

    @rule(number=NUMBERS)
    def take_a_place(self, number: int) -> None:
        place = self.store.reserve(sample_key(number), CHUNK_PAGES * IO_ALIGN)
        if isinstance(place, Place):
            self.places.append(place)
        elif isinstance(place, PutStatus):
            self.expect_clear(place, durable=False)

    @rule(numbers=st.lists(NUMBERS, min_size=1, max_size=4, unique=True))
    def pin(self, numbers: list[int]) -> None:
        self.store.pin([sample_key(number) for number in numbers], ttl_seconds=3600)

    @rule(numbers=st.lists(NUMBERS, min_size=1, max_size=6, unique=True))
    def prefetch(self, numbers: list[int]) -> None:
        for status in self.store.prefetch([sample_key(number) for number in numbers], deadline_ms=DEADLINE_MS):
            assert status.stored or status.reason in {Reason.BUSY, Reason.ABSENT}, status

    @rule()
    def stall_the_disk(self) -> None:
        self.nvme.put_gate.clear()

    @rule(number=NUMBERS)
    def fetch(self, number: int) -> None:
        (step,) = [step for step in self.store.fetch([sample_key(number)], deadline_ms=DEADLINE_MS) if step.last]
        assert step.miss is None or step.miss.reason in {*CLEAR, Reason.ABSENT}, step.miss

    @rule()
    def give_everything_back(self) -> None:
        """What was refused before works now."""
        self.nvme.put_gate.set()
        self.release()
        self.store.unpin([sample_key(number) for number in range(CHUNKS)])
        assert self.store.flush()
        key = sample_key(CHUNKS)
        (status,) = self.store.put([PutItem(key, memoryview(sample_container(key)))], durable=True)
        assert status.durable, status
        assert self.store.delete([key]) == [True]

    @invariant()
    def bounds_hold(self) -> None:
        if hasattr(self, "store"):
            for tier in self.store.tiers:
                usage = tier.usage()
                assert usage.pinned_bytes <= usage.used_bytes <= usage.capacity_bytes

    def expect_clear(self, status: PutStatus, *, durable: bool) -> None:
        if not status.stored or (durable and not status.durable):
            assert status.reason in CLEAR, status
            assert status.detail

    def release(self) -> None:
        while self.loans:
            self.loans.pop().release()
        while self.places:
            self.places.pop().abort()

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.nvme.put_gate.set()
            self.release()
            closing = threading.Thread(target=self.store.close)
            closing.start()
            closing.join(60)
            assert not closing.is_alive(), "a deadlock"
        self.directory.cleanup()


TestLimits = Limits.TestCase
TestLimits.settings = settings(max_examples=15, stateful_step_count=25, deadline=None)


def test_a_refusal_over_http_says_when_to_try_again(tmp_path: Path) -> None:
    store = Store([DramTier(2 * CHUNK_PAGES * IO_ALIGN)], StoreSettings(transient_bytes_max=IO_ALIGN))
    with ServerThread(store, ServiceConfig(port=0)) as running:
        held = [store.reserve(sample_key(number), CHUNK_PAGES * IO_ALIGN) for number in range(2)]
        assert all(isinstance(place, Place) for place in held)
        key = sample_key(5)
        connection = http.client.HTTPConnection("127.0.0.1", running.server.port, timeout=20)
        try:
            connection.request("PUT", f"/v1/chunks/{key.hex()}", sample_container(key))
            answer = connection.getresponse()
            assert json.loads(answer.read())["statuses"][0]["reason"] == "full"
            assert answer.headers["Retry-After"] == "1"
            for place in held:
                assert isinstance(place, Place)
                place.abort()
            connection.request("PUT", f"/v1/chunks/{key.hex()}", sample_container(key))
            answer = connection.getresponse()
            assert json.loads(answer.read())["statuses"][0]["stored"]
            assert "Retry-After" not in answer.headers
        finally:
            connection.close()
