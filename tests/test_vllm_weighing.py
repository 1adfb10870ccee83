"""The vLLM connector loads what comes sooner than the engine computes it, by what both have been seen to take."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from kvstore.client import Part
from kvstore.codecs import registry
from kvstore.connectors.prefix import PrefixStore
from kvstore.connectors.vllm.messages import Observation, StepReport
from kvstore.connectors.vllm.planning import Planner
from kvstore.connectors.vllm.prefill_clock import PrefillClock
from kvstore.connectors.vllm.requests import Entry
from kvstore.connectors.vllm.weighing import WorkerCosts
from kvstore.cost import CostModel
from kvstore.keys import ROOT
from kvstore.outcome import Lookup, Miss, Reason
from kvstore.testing.chunks import sample_spec
from kvstore.testing.memory_client import MemoryClient
from kvstore.testing.vllm import BLOCK, CHUNK, KEYS, FakeLookups, FakeRequest, planner

CHUNKS = 16
CHUNK_BYTES = 1000


def known_prompt(name: str = "r") -> tuple[FakeRequest, FakeLookups]:
    request = FakeRequest(name, list(range(CHUNKS * CHUNK + 3)))
    return request, FakeLookups(set(KEYS.chain(request.all_token_ids)))


def teach(plans: Planner, *, token_ms: float, chunk_ms: float) -> None:
    """Let the planner see what prefills and loads take."""
    for tokens in (64, 128, 256):
        plans._weighing.costs.observe_prefill(tokens=tokens, context=0, ms=tokens * token_ms)
    loads = [Observation("dram", count * CHUNK_BYTES, count * chunk_ms) for count in (1, 4, 16)]
    plans.report(StepReport(observations=loads))


def load_of(plans: Planner, request: FakeRequest, external: int) -> Any:
    plans.allocated(request, list(range(-(-request.num_tokens // BLOCK))), external)
    (job,) = plans.plan({}, lambda _: []).loads
    return job


def test_until_both_are_known_everything_is_loaded() -> None:
    request, lookups = known_prompt()
    plans = planner(lookups)
    assert plans.matched(request, 0) == (CHUNKS * CHUNK, True)
    job = load_of(plans, request, CHUNKS * CHUNK)
    assert (job.savings_ms, job.deadline_ms) == (None, math.inf)
    assert (job.tiers, job.nbytes) == (["dram"] * CHUNKS, [CHUNK_BYTES] * CHUNKS)


def test_what_would_come_later_than_it_is_computed_is_not_begun() -> None:
    request, lookups = known_prompt()
    plans = planner(lookups)
    teach(plans, token_ms=1.0, chunk_ms=100.0)
    assert plans.matched(request, 0) == (0, False)
    assert plans.matched(request, 0) == (0, False)
    assert plans.take_counts() == {"miss_not_worth_it": 1}, "one decision, however often vLLM asks"
    assert plans.plan({"r": request.num_tokens}, lambda _: list(range(99))).saves == [], "the store has it all"


def test_the_policy_always_does_not_weigh() -> None:
    request, lookups = known_prompt()
    plans = planner(lookups, load_policy="always")
    teach(plans, token_ms=1.0, chunk_ms=100.0)
    assert plans.matched(request, 0) == (CHUNKS * CHUNK, True)


def test_what_comes_sooner_is_loaded_and_the_worker_told_what_it_saves() -> None:
    request, lookups = known_prompt()
    plans = planner(lookups)
    teach(plans, token_ms=10.0, chunk_ms=8.0)
    assert plans.matched(request, 0) == (CHUNKS * CHUNK, True)
    job = load_of(plans, request, CHUNKS * CHUNK)
    assert job.savings_ms == pytest.approx([CHUNK * 10.0] * CHUNKS, rel=0.05)


def test_a_chunk_that_the_engine_has_in_part_saves_the_rest_only() -> None:
    request, lookups = known_prompt()
    plans = planner(lookups)
    teach(plans, token_ms=10.0, chunk_ms=8.0)
    local = 2 * CHUNK + BLOCK
    assert plans.matched(request, local) == (CHUNKS * CHUNK - local, True)
    job = load_of(plans, request, CHUNKS * CHUNK - local)
    assert len(job.savings_ms) == len(job.keys) == len(job.tiers) == CHUNKS - 2
    assert job.savings_ms[0] == pytest.approx(job.savings_ms[1] * (CHUNK - BLOCK) / CHUNK, rel=0.05)


def test_only_the_beginning_is_loaded_where_a_slow_tier_has_the_rest() -> None:
    request, lookups = known_prompt()
    plans = planner(lookups)
    teach(plans, token_ms=2.0, chunk_ms=1.0)
    plans.report(StepReport(observations=[Observation("nvme", CHUNK_BYTES, 500.0)]))
    lookups.tiers = ["dram"] * 4 + ["nvme"] * (CHUNKS - 4)
    assert plans.matched(request, 0) == (4 * CHUNK, True)
    assert plans.plan({"r": request.num_tokens}, lambda _: list(range(99))).saves == []


def test_refused_loads_are_tried_again_now_and_then_one_chunk_at_a_time() -> None:
    plans = None
    tried = []
    for number in range(200):
        request, lookups = known_prompt(f"r{number}")
        if plans is None:
            plans = planner(lookups)
            teach(plans, token_ms=1.0, chunk_ms=100.0)
        external, _ = plans.matched(request, 0)
        assert external is not None
        if external:
            job = load_of(plans, request, external)
            assert (external, job.savings_ms) == (CHUNK, None)
            assert job.deadline_ms <= 30.0, "a trial costs little"
            tried.append(number)
        plans.finished(request)
    assert 2 <= len(tried) <= 40


def test_the_planner_times_the_engine_by_its_own_steps() -> None:
    request = FakeRequest("r", list(range(4 * CHUNK)))
    plans = planner(FakeLookups())
    assert plans.matched(request, 0) == (0, False)
    plans.plan({"r": 4 * CHUNK}, lambda _: list(range(99)))
    request.num_computed_tokens = 4 * CHUNK
    assert plans._weighing.costs.prefill_ms(CHUNK, 0) is None
    request.all_token_ids.append(1)
    plans.plan({"r": 1}, lambda _: list(range(99)))
    assert plans._weighing.costs.prefill_ms(CHUNK, 0) is not None


def test_a_worker_ends_a_load_that_turns_out_slower() -> None:
    client = LateClient()
    keys = KEYS.chain(range(CHUNKS * CHUNK))
    spec = sample_spec(layers=1, kv_heads=1, dim=4)
    prefixes = PrefixStore(client, spec, KEYS, registry.get("raw", ROOT), costs=WorkerCosts())
    found = Lookup(("dram",) * CHUNKS, None, (CHUNK_BYTES,) * CHUNKS)
    loaded = prefixes.fetch(keys, 0, NoMemory(), found=found, savings_ms=[5.0] * CHUNKS)
    assert loaded.chunks == 0
    assert loaded.stop is not None
    assert loaded.stop.reason == Reason.NOT_WORTH_IT
    assert client.deadlines_ms
    assert max(client.deadlines_ms) < 100.0, "the bound is what computing takes and some patience"


class LateClient(MemoryClient):
    """Answers nothing in time."""

    def __init__(self) -> None:
        super().__init__()
        self.deadlines_ms: list[float] = []

    def fetch(self, keys: Sequence[bytes], **options: Any) -> Iterator[Part]:
        self.deadlines_ms.append(options["deadline_ms"])
        time.sleep(options["deadline_ms"] / 1e3)
        for index in range(len(keys)):
            yield Part(index, Miss(Reason.DEADLINE, "late"))


class NoMemory:
    """Nobody fills it."""

    def writable(self, start: int, stop: int) -> Any:
        raise AssertionError

    commit = readable = writable


def test_a_worker_tells_what_it_has_seen_once() -> None:
    costs = WorkerCosts()
    costs.observe_load("dram", nbytes=10, ms=1.0)
    costs.observe_decode("raw", nbytes=10, ms=2.0, tier="dram")
    assert costs.take() == [Observation("dram", 10, 1.0), Observation("dram", 10, 2.0, "raw")]
    assert costs.take() == []


class Steps:
    """An engine in virtual time: every step takes what its tokens take."""

    TOKEN_MS = 0.5

    def __init__(self) -> None:
        self.costs = CostModel()
        self.now = 0.0
        self.clock = PrefillClock(self.costs, tokens_min=CHUNK, clock=lambda: self.now)
        self.entries: dict[str, Entry] = {}

    def arrive(self, name: str, tokens: int) -> FakeRequest:
        request = FakeRequest(name, list(range(tokens)))
        self.entries[name] = Entry(request)
        return request

    def step(self, *, waits: bool = False, wait_ms: float = 0.0, **scheduled: int) -> None:
        self.clock.step(scheduled, self.entries, waits=waits)
        self.now += (sum(scheduled.values()) * self.TOKEN_MS + wait_ms) / 1e3
        for name, tokens in scheduled.items():
            request = self.entries[name].request
            request.num_computed_tokens += tokens
            if request.num_computed_tokens == request.num_tokens:
                request.all_token_ids.append(0)  # type: ignore[attr-defined]

    def token_ms(self) -> float | None:
        ms = self.costs.prefill_ms(100, 0)
        return None if ms is None else ms / 100


def test_a_prompt_in_one_step_or_several_is_timed_from_its_first_step_to_its_first_token() -> None:
    for pieces in ([64], [16, 16, 32]):
        steps = Steps()
        steps.arrive("a", 64)
        for tokens in pieces:
            steps.step(a=tokens)
        assert steps.token_ms() is None
        steps.step(a=1)
        assert steps.token_ms() == pytest.approx(Steps.TOKEN_MS, rel=0.05)


def test_what_is_computed_beside_a_prompt_counts() -> None:
    steps = Steps()
    steps.arrive("a", 32)
    steps.arrive("b", 96)
    steps.step(a=32, b=96)
    steps.step(a=1, b=1)
    assert steps.token_ms() == pytest.approx(Steps.TOKEN_MS, rel=0.05)


def test_a_request_of_one_token_is_timed_by_its_end_and_idle_time_never() -> None:
    steps = Steps()
    request = steps.arrive("a", 64)
    steps.step(a=64)
    steps.clock.finished(request)
    del steps.entries["a"]
    assert steps.token_ms() == pytest.approx(Steps.TOKEN_MS, rel=0.05)
    gone = steps.arrive("b", 64)
    steps.clock.step({"b": 64}, steps.entries, waits=False)
    steps.clock.finished(gone)  # aborted before its first token
    del steps.entries["b"]
    steps.now += 1000.0
    steps.arrive("c", 64)
    steps.step(c=64)
    steps.step(c=1)
    assert steps.token_ms() == pytest.approx(Steps.TOKEN_MS, rel=0.05)


def test_steps_that_load_first_preempted_requests_and_decoding_are_not_timed() -> None:
    steps = Steps()
    steps.arrive("a", 64)
    steps.step(a=64, waits=True, wait_ms=500.0)
    steps.step(a=1)
    steps.step(a=1)
    steps.arrive("b", 64)
    steps.step(b=32)
    steps.step(a=1)  # b was preempted
    steps.now += 10.0
    steps.step(a=1)
    assert steps.token_ms() is None
