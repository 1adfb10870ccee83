"""The scheduler's side of the vLLM connector against a model of what vLLM does: any order of events, any answers."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvstore.connectors.vllm.messages import FailedLoad, StepReport
from kvstore.outcome import Reason
from kvstore.testing.vllm import BLOCK, CHUNK, KEYS, FakeLookups, FakeRequest, planner


class Lifecycle(RuleBasedStateMachine):
    """vLLM in small: requests come, load, compute, are preempted and end; workers report when they like.

    Each block knows of which tokens it holds good KV. A chunk that a worker reads at the end of a save has to be good.
    """

    def __init__(self) -> None:
        super().__init__()
        self.lookups = FakeLookups()
        self.planner = planner(self.lookups, save_queue_chunks=3)
        self.requests: dict[str, FakeRequest] = {}
        self.tables: dict[str, list[int]] = {}
        self.content: dict[int, tuple[int, ...]] = {}
        self.jobs: dict[int, tuple[list[bytes], int, int, list[int], str]] = {}
        self.abandoned: set[int] = set()
        self.stored: set[bytes] = set()
        self.loading: dict[str, int] = {}
        self.next_block = 0

    def blocks_for(self, request: FakeRequest) -> list[int]:
        table = self.tables.setdefault(request.request_id, [])
        while len(table) * BLOCK < request.num_tokens:
            table.append(self.next_block)
            self.next_block += 1
        return table

    def fill(self, request: FakeRequest, start: int, stop: int) -> None:
        table = self.blocks_for(request)
        for index in range(start // BLOCK, -(-stop // BLOCK)):
            self.content[table[index]] = tuple(request.all_token_ids[index * BLOCK : min(stop, (index + 1) * BLOCK)])

    @rule(beginning=st.integers(0, 2), tokens=st.integers(1, 40))
    def arrive(self, beginning: int, tokens: int) -> None:
        request = FakeRequest(f"r{len(self.requests)}-{self.next_block}", [beginning] * tokens)
        if request.request_id not in self.requests:
            self.requests[request.request_id] = request
            self.planner.add(request)

    @rule(data=st.data(), tokens=st.integers(1, 30))
    def schedule(self, data: st.DataObject, tokens: int) -> None:
        ready = sorted(set(self.requests) - set(self.loading))
        if not ready:
            return
        request = self.requests[data.draw(st.sampled_from(ready))]
        if request.num_computed_tokens == 0:
            external, _ = self.planner.matched(request, 0)
            assert external is not None
            assert external % BLOCK == 0
            assert external <= request.num_tokens
            if external:
                self.planner.allocated(request, self.blocks_for(request), external)
                (load,) = self.planner.plan({}, lambda _: []).loads
                assert set(load.keys) <= self.stored, "an answer may be old, but not made up"
                assert len(load.block_ids) * BLOCK == external
                self.loading[request.request_id] = external
                return
        count = min(tokens, request.num_tokens - request.num_computed_tokens)
        plan = self.planner.plan({request.request_id: count}, lambda _: list(self.blocks_for(request)))
        self.fill(request, 0, request.num_computed_tokens + count)
        request.num_computed_tokens += count
        if request.num_computed_tokens == request.num_tokens:
            request.all_token_ids.append(7)
        for job in plan.saves:
            self.jobs[job.job_id] = (job.chain, job.first_chunk, job.start, job.block_ids, job.request_id)
        assert sum(len(job[0]) - job[1] for job in self.jobs.values()) <= 3

    @rule(data=st.data(), fail=st.booleans())
    def load_ends(self, data: st.DataObject, fail: bool) -> None:
        if not self.loading:
            return
        request = self.requests[data.draw(st.sampled_from(sorted(self.loading)))]
        external = self.loading.pop(request.request_id)
        if fail:
            self.planner.report(StepReport(failed={request.request_id: FailedLoad(0, Reason.CORRUPT)}))
        else:
            self.fill(request, 0, external)
            request.num_computed_tokens = min(external, request.num_tokens - 1)

    @rule(data=st.data())
    def save_ends(self, data: st.DataObject) -> None:
        if not self.jobs:
            return
        job_id = data.draw(st.sampled_from(sorted(self.jobs)))
        chain, first, start, block_ids, _ = self.jobs.pop(job_id)
        if job_id not in self.abandoned:
            tokens = [token for block in block_ids for token in self.content[block]]
            for index in range(first, len(chain)):
                at = index * CHUNK - start
                ids = tokens[at : at + CHUNK]
                parent = chain[index - 1] if index else None
                assert [chain[index]] == (KEYS.chain(ids, parent) if parent else KEYS.chain(ids))
                self.lookups.there.add(chain[index])
                self.stored.add(chain[index])
        self.planner.report(StepReport(ended={job_id: 1}))

    @rule(data=st.data())
    def preempt(self, data: st.DataObject) -> None:
        running = sorted(set(self.requests) - set(self.loading))
        if not running:
            return
        request = self.requests[data.draw(st.sampled_from(running))]
        plan = self.planner.plan({}, lambda _: [], [request.request_id])
        reading = {job_id for job_id, job in self.jobs.items() if job[4] == request.request_id}
        assert bool(plan.abandoned) == bool(reading)
        self.abandoned |= reading
        for block in self.tables.pop(request.request_id, []):
            self.content[block] = (-1,) * BLOCK
        request.num_computed_tokens = 0

    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        if not self.requests:
            return
        request = self.requests.pop(data.draw(st.sampled_from(sorted(self.requests))))
        reading = {job_id for job_id, job in self.jobs.items() if job[4] == request.request_id} - self.abandoned
        held = self.planner.finished(request)
        assert held == bool(reading)
        if self.loading.pop(request.request_id, 0):
            assert not held, "vLLM would free the blocks twice"
        elif not held:
            for block in self.tables.pop(request.request_id, []):
                self.content[block] = (-1,) * BLOCK

    @rule(data=st.data())
    def evict(self, data: st.DataObject) -> None:
        if self.lookups.there:
            self.lookups.there.discard(data.draw(st.sampled_from(sorted(self.lookups.there))))

    @invariant()
    def nothing_is_left_behind(self) -> None:
        assert set(self.planner._entries) <= set(self.requests)
        assert set(self.planner._jobs) == set(self.jobs)


TestLifecycle = Lifecycle.TestCase
TestLifecycle.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
