"""The default policy: what it learns, that its worth is what a plain sum says, and that it is never far behind LRU."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.bench.replay import belady, chains, replay
from kvstore.bench.replay_trace import KINDS, synthetic
from kvstore.tiers.policies.adaptive import AdaptivePolicy
from kvstore.tiers.policies.chained import Node
from kvstore.tiers.policies.prompts import KINDS as PROMPT_KINDS
from kvstore.tiers.policies.prompts import LAST, Prompt, PromptTracker
from kvstore.tiers.policies.ranked_queues import RankedQueues
from kvstore.tiers.policies.registry import open_policy
from kvstore.tiers.policies.reuse_model import (
    BUCKETS,
    CLASSES,
    ReuseModel,
    bucket_edges,
    visit_class,
    worth_of,
)
from kvstore.tiers.policy import Chunk


@given(chances=st.lists(st.floats(0, 0.99), min_size=1, max_size=12), data=st.data())
def test_worth_is_the_best_ratio_of_hits_to_time(chances: list[float], data: st.DataObject) -> None:
    widths = data.draw(st.lists(st.floats(0.1, 10), min_size=len(chances), max_size=len(chances)))
    worth = worth_of(np.array(chances), np.array(widths))
    for start in range(len(chances)):
        alive, held, ratios = 1.0, 0.0, []
        for chance, width in list(zip(chances, widths, strict=True))[start:]:
            held += width * alive * (1 - chance / 2)
            alive *= 1 - chance
            ratios.append((1 - alive) / held)
        assert worth[start] == pytest.approx(max(ratios), rel=1e-6, abs=1e-12)


def test_buckets_lie_between_their_edges() -> None:
    model = ReuseModel(10_000)
    edges = bucket_edges() * 10_000
    assert len(edges) == BUCKETS + 1
    for age in range(0, 600_000, 371):
        bucket = model.bucket(age)
        assert edges[bucket] <= age < edges[bucket + 1]
    assert model.bucket(10**9) == BUCKETS - 1
    assert [visit_class(visits) for visits in (1, 2, 3, 4, 5, 8, 9, 10**6)] == [0, 1, 2, 2, 3, 3, 4, 4]


def test_what_is_not_known_is_ranked_by_recency() -> None:
    worth = ReuseModel(1000).worth[:BUCKETS]
    assert worth == sorted(worth, reverse=True)


def test_the_model_learns_that_chunks_come_back_after_a_pause() -> None:
    model = ReuseModel(1000)
    for number in range(20_000):
        model.saw(number, 1, Prompt(), number)
        if number >= 500:
            model.saw(number - 500, 2, Prompt(), number)
    model.learn(20_000)
    bucket = model.bucket(500)
    once = model.worth[:BUCKETS]
    assert max(once) == once[bucket], "just before the return a chunk is worth most"
    assert once[bucket] > 2 * once[0]
    assert once[bucket + 1] < once[bucket] / 10, "and after it little"
    assert once[0] > 5 * model.worth[PROMPT_KINDS * BUCKETS], "what has come back once does not come again"


def test_the_model_samples_within_its_bound_and_reaches_back_far_enough() -> None:
    model = ReuseModel(1000, spells_max=64)
    model.widen(1000)
    draw = random.Random(5)
    for number in range(5000):
        model.saw(draw.getrandbits(56), 1, LAST, number)
    model.learn(5000)
    assert len(model.worth) == CLASSES * BUCKETS


@given(st.lists(st.tuples(st.sampled_from("aadr"), st.integers(0, 9), st.integers(0, 7)), max_size=80))
def test_ranked_queues_agree_with_a_search(steps: list[tuple[str, int, int]]) -> None:
    queues, members, order = RankedQueues(), dict[int, list[Node]](), [float(group % 3) for group in range(8)]
    queues.rank(order)
    nodes = [Node(bytes([number])) for number in range(10)]
    for verb, number, group in steps:
        node = nodes[number]
        where = next((name for name, queue in members.items() if node in queue), None)
        if verb == "a" and where is None:
            queues.add(node, group)
            members.setdefault(group, []).append(node)
        elif verb == "d" and where is not None:
            queues.discard(node)
            members[where].remove(node)
        elif verb == "r":
            order = order[group:] + order[:group]
            queues.rank(order)
        occupied = [name for name, queue in members.items() if queue]
        expected = min(occupied, key=lambda name: (order[name], -name), default=None)
        assert queues.lowest() is (None if expected is None else members[expected][0])


def test_the_victim_is_worth_no_more_than_any_other_candidate() -> None:
    draw = random.Random(2)
    policy = AdaptivePolicy(200)
    for _ in range(4000):
        chunk = Chunk(draw.randrange(900).to_bytes(32, "little"), nbytes=1, cost=float(draw.choice([1, 1, 3])))
        if chunk.key in policy:
            policy.access(chunk.key)
            continue
        full = len(policy) >= 200
        if policy.admits(chunk, full=full):
            if full and (victim := policy.victim()) is not None:
                ranks = policy._ranks
                assert ranks[policy.nodes[victim].place] == min(ranks[node.place] for node in policy.nodes.values())
                policy.remove(victim)
            policy.insert(chunk)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_the_default_is_never_far_behind_lru(kind: str) -> None:
    prompts = chains(synthetic(kind, 1500))
    for capacity in (300, 1500):
        ideal = belady(prompts, capacity)
        lru = replay(prompts, open_policy("lru", capacity_bytes=capacity), capacity)
        default = replay(prompts, open_policy(capacity_bytes=capacity), capacity)
        assert default.found >= 0.93 * lru.found - 0.005 * lru.asked
        assert default.written <= lru.written * 1.05
        assert max(default.found, lru.found) <= ideal.found


def test_prompts_are_told_apart_by_their_chains() -> None:
    head, one, two, three, four = (bytes([number]) * 32 for number in range(1, 6))
    prompts = PromptTracker()
    nodes = {key: object() for key in (head, one)}
    first = prompts.used(one, nodes[one], nodes[head], None)
    assert prompts.used(head, nodes[head], None, None) is first
    assert prompts.expect([two, three], one, 2) is None
    assert (prompts.of(two), prompts.of(three)) == (first, LAST)
    assert (first.new, first.kind) == (2, 1)
    assert prompts.expect([four], three, 1) == three, "the prompt goes on, so that was not its end"
    assert (prompts.latest, first.new) == (first, 3)
    assert prompts.used(head, nodes[head], None, None) is not first
    assert prompts.expect([three], one, 1) is None
    assert prompts.latest.new == 1
    kinds = []
    for new in (0, 1, 2, 3, 4, 8, 15, 16, 999):
        prompt = Prompt()
        prompt.add(new)
        kinds.append(prompt.kind)
    assert kinds == [0, 0, 1, 1, 2, 3, 3, 4, 4]
    assert LAST.kind == PROMPT_KINDS - 1
