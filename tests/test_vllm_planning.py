"""The scheduler's side of the vLLM connector: what it answers vLLM, and what it has the workers do."""

from __future__ import annotations

import time

import pytest

from kvstore.connectors.vllm.messages import FailedLoad, StepPlan, StepReport
from kvstore.connectors.vllm.planning import Planner
from kvstore.outcome import Reason
from kvstore.testing.vllm import BLOCK, CHUNK, KEYS, FakeLookups, FakeRequest, planner


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


def test_saves_of_before_a_preemption_do_not_hold_the_blocks_of_a_load(monkeypatch: pytest.MonkeyPatch) -> None:
    request = prompt(16)
    lookups = FakeLookups()
    plans = planner(lookups)
    plans.matched(request, 0)
    step(plans, request, 16)
    assert plans.plan({}, lambda _: [], [request.request_id]).abandoned
    monkeypatch.setattr("kvstore.connectors.vllm.planning.ANSWER_SECONDS", -1.0)
    lookups.there = set(KEYS.chain(request.all_token_ids))
    assert plans.matched(request, 0) == (16, True)
    plans.allocated(request, blocks(request), 16)
    assert not plans.finished(request), "vLLM would free the blocks at the end of the load, and then again"


def test_a_request_that_ends_before_its_preemption_is_told_is_passed_on_too() -> None:
    request = prompt(16)
    plans = planner(FakeLookups())
    plans.matched(request, 0)
    step(plans, request, 16)
    assert plans.finished(request)
    plan = plans.plan({}, lambda _: [], [request.request_id])
    assert (plan.held, plan.abandoned) == ([request.request_id], [request.request_id])


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


def test_a_request_that_cannot_be_saved_does_not_hold_up_others() -> None:
    broken, other = prompt(24), prompt(24, first=50)
    plans = planner(FakeLookups({KEYS.chain(other.all_token_ids)[0]}))
    plans.matched(broken, 0)
    plans.matched(other, 0)
    plans.allocated(other, blocks(other), 8)
    broken.all_token_ids += [-1] * CHUNK
    plan = step(plans, broken, 4 * CHUNK)
    assert (len(plan.loads), plan.saves) == (1, [])
    broken.all_token_ids += range(CHUNK)
    assert not step(plans, broken, CHUNK).saves
    assert not plans.finished(broken)


def test_a_request_that_wants_everything_computed_is_only_saved() -> None:
    request = prompt(16)
    request.skip_reading_prefix_cache = True
    lookups = FakeLookups(set(KEYS.chain(request.all_token_ids)))
    plans = planner(lookups)
    plans.add(request)
    assert plans.matched(request, 0) == (0, False)
    assert len(step(plans, request, 16).saves) == 1
    assert lookups.asked == 0
