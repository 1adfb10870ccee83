"""The scheduler's side of the vLLM connector against a model of what vLLM does: any order of events, any answers."""

from __future__ import annotations

import time

import msgspec
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvstore.connectors.vllm.messages import FailedLoad, StepPlan, StepReport
from kvstore.connectors.vllm.planning import Planner
from kvstore.connectors.vllm.settings import VllmSettings
from kvstore.outcome import Reason
from kvstore.testing.vllm import CHUNK, KEYS, FakeLookups, FakeRequest

BLOCK = 4


def planner(lookups: FakeLookups, *, workers: int = 1, **more: object) -> Planner:
    given = msgspec.convert({"url": "unix:/nowhere", "chunk_tokens": CHUNK, **more}, VllmSettings)
    return Planner(given, block_tokens=BLOCK, workers=workers, lookups=lookups, scheme=lambda _: KEYS)


def prompt(tokens: int, first: int = 0) -> FakeRequest:
    return FakeRequest(f"request {first}", list(range(first, first + tokens)))


def blocks(request: FakeRequest) -> list[int]:
    return list(range(100, 100 + -(-len(request.all_token_ids) // BLOCK)))


def step(planner: Planner, request: FakeRequest, tokens: int) -> StepPlan:
    plan = planner.plan({request.request_id: tokens}, lambda _: blocks(request))
    request.num_computed_tokens += tokens
    return plan


def test_a_known_prefix_is_loaded_into_its_blocks() -> None:
    request = prompt(20)
    keys = KEYS.chain(request.all_token_ids)
    plans = planner(FakeLookups({keys[0], keys[1]}))
    plans.add(request)
    assert plans.matched(request, 0) == (16, True)
    plans.allocated(request, blocks(request), 16)
    (job,) = plans.plan({}, lambda _: []).loads
    assert (job.keys, job.first_chunk, job.start, job.stop, job.block_ids) == (keys, 0, 0, 16, [100, 101, 102, 103])
    assert not plans.plan({}, lambda _: []).loads


def test_what_the_engine_has_itself_is_not_loaded() -> None:
    request = prompt(20)
    keys = KEYS.chain(request.all_token_ids)
    plans = planner(FakeLookups(set(keys)))
    assert plans.matched(request, 12) == (4, True)
    plans.allocated(request, blocks(request), 4)
    (job,) = plans.plan({}, lambda _: []).loads
    assert (job.keys, job.first_chunk, job.start, job.stop, job.block_ids) == ([keys[1]], 1, 12, 16, [103])
    assert plans.matched(request, 16) == (0, False)


def test_a_load_before_the_step_leaves_a_block_to_compute() -> None:
    request = prompt(16)
    lookups = FakeLookups(set(KEYS.chain(request.all_token_ids)))
    assert planner(lookups, load="sync").matched(request, 0) == (12, False)
    assert planner(lookups).matched(request, 0) == (16, True)


def test_the_engine_is_told_to_come_again_until_the_answer_is_there() -> None:
    request = prompt(20)
    lookups = FakeLookups(set(KEYS.chain(request.all_token_ids)))
    lookups.slow = True
    plans = planner(lookups)
    plans.add(request)
    assert plans.matched(request, 0) == (None, False)
    assert plans.matched(request, 0) == (None, False)
    lookups.answer()
    assert plans.matched(request, 0) == (16, True)
    assert lookups.asked == 1


def test_an_answer_that_does_not_come_is_not_waited_for() -> None:
    request = prompt(20)
    lookups = FakeLookups()
    lookups.slow = True
    plans = planner(lookups, lookup_deadline_ms=1)
    plans.add(request)
    time.sleep(0.01)
    assert plans.matched(request, 0) == (0, False)
    assert plans.take_counts() == {"miss_deadline": 1}


def test_an_old_answer_is_asked_for_again_and_then_used_however_old(monkeypatch: pytest.MonkeyPatch) -> None:
    request = prompt(20)
    lookups = FakeLookups()
    plans = planner(lookups)
    plans.add(request)
    monkeypatch.setattr("kvstore.connectors.vllm.planning.ANSWER_SECONDS", -1.0)
    lookups.there = set(KEYS.chain(request.all_token_ids))
    lookups.slow = True
    assert plans.matched(request, 0) == (None, False)
    lookups.answer()
    assert plans.matched(request, 0) == (16, True)
    assert lookups.asked == 2


def test_complete_chunks_are_saved_once_as_they_are_computed() -> None:
    request = prompt(20)
    keys = KEYS.chain(request.all_token_ids)
    plans = planner(FakeLookups())
    assert plans.matched(request, 0) == (0, False)
    assert not step(plans, request, 7).saves
    (job,) = step(plans, request, 10).saves
    assert (job.chain, job.first_chunk, job.start, job.block_ids) == (keys, 0, 0, [100, 101, 102, 103])
    assert not step(plans, request, 3).saves
    request.all_token_ids += range(20, 24)
    (job,) = step(plans, request, 4).saves
    assert (job.first_chunk, job.start, job.block_ids) == (2, 16, [104, 105])
    assert job.chain == KEYS.chain(request.all_token_ids)


def test_tokens_that_are_not_certain_yet_are_not_saved() -> None:
    request = prompt(16)
    plans = planner(FakeLookups())
    plans.matched(request, 0)
    request.all_token_ids = request.all_token_ids[:15]
    (job,) = step(plans, request, 16).saves
    assert len(job.chain) == 1


def test_blocks_are_held_until_every_worker_has_saved() -> None:
    request = prompt(16)
    plans = planner(FakeLookups(), workers=2)
    plans.matched(request, 0)
    (job,) = step(plans, request, 16).saves
    plans.report(StepReport(ended={job.job_id: 1}))
    assert plans.finished(request)
    assert plans.plan({}, lambda _: []).held == [request.request_id]
    plans.report(StepReport(ended={job.job_id: 1}))
    assert not plans.plan({}, lambda _: []).held


def test_a_request_without_saves_under_way_is_not_held() -> None:
    request = prompt(16)
    plans = planner(FakeLookups())
    plans.matched(request, 0)
    (job,) = step(plans, request, 16).saves
    plans.report(StepReport(ended={job.job_id: 1}))
    assert not plans.finished(request)


def test_a_full_queue_makes_saves_wait() -> None:
    request = prompt(32)
    plans = planner(FakeLookups(), save_queue_chunks=2)
    plans.matched(request, 0)
    (job,) = step(plans, request, 31).saves
    assert len(job.chain) == 2
    assert not step(plans, request, 0).saves
    plans.report(StepReport(ended={job.job_id: 1}))
    (rest,) = step(plans, request, 1).saves
    assert (rest.first_chunk, len(rest.chain)) == (2, 4)


def test_a_failed_load_is_not_tried_again_and_replaced_if_its_bytes_are_bad() -> None:
    request = prompt(24)
    keys = KEYS.chain(request.all_token_ids)
    plans = planner(FakeLookups(set(keys)))
    assert plans.matched(request, 0) == (24, True)
    plans.report(StepReport(failed={request.request_id: FailedLoad(1, Reason.CORRUPT)}))
    assert plans.matched(request, 0) == (8, True)
    (job,) = step(plans, request, 24).saves
    assert (job.first_chunk, job.replace) == (1, True)
    other = FakeRequest("other", list(request.all_token_ids))
    assert plans.matched(other, 0) == (8, True)


def test_a_store_that_was_away_is_tried_again_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    request, other = prompt(24), FakeRequest("other", list(range(24)))
    monkeypatch.setattr("kvstore.connectors.vllm.planning.FAILURE_SECONDS", -1.0)
    plans = planner(FakeLookups(set(KEYS.chain(request.all_token_ids))))
    plans.matched(request, 0)
    plans.report(StepReport(failed={request.request_id: FailedLoad(1, Reason.UNAVAILABLE)}))
    (job,) = step(plans, request, 24).saves
    assert not job.replace
    assert plans.matched(other, 0) == (24, True)


def test_steps_behind_a_failed_load_are_saved_again() -> None:
    request, other = prompt(16), prompt(16, first=50)
    plans = planner(FakeLookups(), load="sync")
    plans.matched(request, 0)
    plans.matched(other, 0)
    first = step(plans, other, 16)
    assert len(first.saves) == 1
    plans.report(StepReport(failed={request.request_id: FailedLoad(0, Reason.IO_ERROR)}))
    other.num_computed_tokens = 0
    again = step(plans, other, 16)
    assert again.epoch > first.epoch
    assert again.saves[0].first_chunk == 0


def test_preemption_is_passed_on_while_blocks_are_being_read() -> None:
    request = prompt(16)
    plans = planner(FakeLookups())
    plans.matched(request, 0)
    (job,) = step(plans, request, 16).saves
    assert plans.plan({}, lambda _: [], [request.request_id, "unknown"]).abandoned == [request.request_id]
    plans.report(StepReport(ended={job.job_id: 1}))
    assert not plans.plan({}, lambda _: [], [request.request_id]).abandoned


def test_a_request_that_its_tokens_do_not_describe_is_left_alone() -> None:
    request = prompt(24)
    request.lora_request = object()
    lookups = FakeLookups(set(KEYS.chain(request.all_token_ids)))
    plans = planner(lookups)
    plans.add(request)
    assert plans.matched(request, 0) == (0, False)
    assert not step(plans, request, 24).saves
    assert lookups.asked == 0
    assert plans.take_counts()["bypassed_lora"] >= 1


def test_a_request_that_wants_everything_computed_is_only_saved() -> None:
    request = prompt(16)
    request.skip_reading_prefix_cache = True
    lookups = FakeLookups(set(KEYS.chain(request.all_token_ids)))
    plans = planner(lookups)
    plans.add(request)
    assert plans.matched(request, 0) == (0, False)
    assert len(step(plans, request, 16).saves) == 1
    assert lookups.asked == 0


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
        self.held: dict[str, list[int]] = {}
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

    @rule(data=st.data(), tokens=st.integers(1, 30), fail=st.booleans())
    def schedule(self, data: st.DataObject, tokens: int, fail: bool) -> None:
        if not self.requests:
            return
        request = self.requests[data.draw(st.sampled_from(sorted(self.requests)))]
        if request.num_computed_tokens == 0:
            external, _ = self.planner.matched(request, 0)
            assert external is not None
            assert external % BLOCK == 0
            assert external <= request.num_tokens
            if external:
                self.planner.allocated(request, self.blocks_for(request), external)
                (load,) = self.planner.plan({}, lambda _: []).loads
                assert set(load.keys) <= self.lookups.there
                assert len(load.block_ids) * BLOCK == external
                if fail:
                    self.planner.report(StepReport(failed={request.request_id: FailedLoad(0, Reason.CORRUPT)}))
                    return
                self.fill(request, 0, external)
                request.num_computed_tokens = min(external, request.num_tokens - 1)
        count = min(tokens, request.num_tokens - request.num_computed_tokens)
        plan = self.planner.plan({request.request_id: count}, lambda _: list(self.blocks_for(request)))
        self.fill(request, 0, request.num_computed_tokens + count)
        request.num_computed_tokens += count
        if request.num_computed_tokens == request.num_tokens:
            request.all_token_ids.append(7)
        for job in plan.saves:
            self.jobs[job.job_id] = (job.chain, job.first_chunk, job.start, job.block_ids, job.request_id)
        assert sum(len(job[0]) - job[1] for job in self.jobs.values()) <= 3

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
        self.planner.report(StepReport(ended={job_id: 1}))

    @rule(data=st.data())
    def preempt(self, data: st.DataObject) -> None:
        if not self.requests:
            return
        request = self.requests[data.draw(st.sampled_from(sorted(self.requests)))]
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
        reading = any(job[4] == request.request_id for job in self.jobs.values())
        held = self.planner.finished(request)
        assert held == reading
        if not held:
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
