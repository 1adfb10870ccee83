"""What a prompt leaves behind when another goes a different way: found as a plain search finds it, and worth less."""

from __future__ import annotations

import itertools
import random

from hypothesis import given
from hypothesis import strategies as st

from kvstore.bench.replay import Chain, replay
from kvstore.tiers.policies.adaptive import AdaptivePolicy
from kvstore.tiers.policies.prompts import KINDS, SUPERSEDED
from kvstore.tiers.policies.reuse_model import BUCKETS
from kvstore.tiers.policy import CachePolicy


def key(*path: int) -> bytes:
    """One key for each path from the root, as in a store."""
    return bytes(path).ljust(32, b"\xff")


def chain(path: tuple[int, ...]) -> Chain:
    return tuple(key(*path[:depth]) for depth in range(1, len(path) + 1))


def superseded(policy: AdaptivePolicy) -> set[bytes]:
    return {name for name, node in policy.nodes.items() if node.prompt.kind == SUPERSEDED}


def after(*paths: tuple[int, ...]) -> set[bytes]:
    """What is superseded in a tier with room for all, after these prompts."""
    policy = AdaptivePolicy(10_000)
    replay([chain(path) for path in paths], CachePolicy(policy, policy), 10_000)
    return superseded(policy)


def searched(paths: list[tuple[int, ...]]) -> set[bytes]:
    """The same by a plain search: who used each chunk last, and who went on alone behind it."""
    owner: dict[bytes, int | None] = {}
    behind: dict[bytes, set[bytes]] = {}
    left: set[int] = set()
    for number, path in enumerate(paths):
        keys = chain(path)
        known = [name for name in keys if name in owner]
        if known and len(known) < len(keys) and len(behind.get(known[-1], ())) == 1:
            last_user = owner[known[-1]]
            left |= set() if last_user is None else {last_user}
        owner.update(dict.fromkeys(keys, number))
        if len(known) < len(keys):
            owner[keys[-1]] = None  # the last chunk of a prompt belongs to none
        for above, below in itertools.pairwise(keys):
            behind.setdefault(above, set()).add(below)
    return {name for name, number in owner.items() if number in left}


def test_the_rest_of_an_answer_that_was_regenerated_is_superseded() -> None:
    assert after((1, 2, 3, 4, 5), (1, 2, 7)) == {key(1, 2, 3), key(1, 2, 3, 4)}


def test_a_prompt_that_goes_on_or_stops_short_supersedes_nothing() -> None:
    assert after((1, 2, 3), (1, 2, 3, 4, 5), (1, 2)) == set()


def test_a_head_that_many_share_supersedes_none_of_them() -> None:
    assert after((1, 2, 3), (1, 4, 5), (1, 6, 7), (1, 8, 9)) <= {key(1, 2)}


def test_what_is_used_after_all_is_not_superseded_any_more() -> None:
    assert after((1, 2, 3, 4, 5), (1, 2, 7), (1, 2, 3, 4, 5)) == set()


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=5).map(tuple), max_size=30))
def test_a_plain_search_finds_the_same(paths: list[tuple[int, ...]]) -> None:
    assert after(*paths) == searched(paths)


def test_the_policy_learns_what_they_are_worth() -> None:
    draw = random.Random(3)
    names = iter(range(1, 10**6))
    prompts: list[Chain] = []
    open_prompts: list[list[int]] = []
    for _ in range(3000):
        if len(open_prompts) < 20:
            open_prompts.append([next(names) for _ in range(6)])
        path = open_prompts.pop(0)
        prompts.append(tuple(number.to_bytes(32, "little") for number in path))
        if draw.random() < 0.9:  # the next turn keeps all but the last two chunks
            open_prompts.append([*path[:-2], *(next(names) for _ in range(4))])
    policy = AdaptivePolicy(400)
    replay(prompts, CachePolicy(policy, policy), 400)
    worth = policy._model.worth
    of_kinds = [worth[kind * BUCKETS] for kind in range(KINDS)]
    assert of_kinds[SUPERSEDED] < 0.5 * max(of_kinds)
