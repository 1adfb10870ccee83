"""The order of a batch: no other order computes fewer tokens, whatever an engine's cache keeps."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.batching import plan_batch
from kvstore.client import ChunkInfo
from kvstore.errors import ConfigError
from kvstore.keys import KeyScheme

KEYS = KeyScheme(bytes(32), chunk_tokens=2)
PROMPTS = st.lists(st.lists(st.integers(0, 1), max_size=9), max_size=5)


def computed(prompts: Sequence[list[int]], order: Sequence[int], chunks_max: int) -> int:
    """Tokens that an engine computes which keeps so many chunks, the least recently used without children leaving."""
    cache: OrderedDict[bytes, bytes] = OrderedDict()  # key -> parent
    tokens = 0
    for number in order:
        chain = KEYS.chain(prompts[number])
        parents = dict(zip(chain, [b"", *chain], strict=False))
        hits = 0
        while hits < len(chain) and chain[hits] in cache:
            hits += 1
        tokens += len(prompts[number]) - 2 * hits
        cache |= {key: parents[key] for key in chain}
        for key in reversed(chain):
            cache.move_to_end(key)
        while len(cache) > chunks_max:
            kept = set(cache.values())
            del cache[next(key for key in cache if key not in kept)]
    return tokens


@settings(max_examples=150, deadline=None)
@given(PROMPTS, st.integers(0, 6))
def test_no_order_computes_fewer_tokens(prompts: list[list[int]], chunks_max: int) -> None:
    plan = plan_batch(prompts, KEYS, cache_tokens=2 * chunks_max)
    assert sorted(plan.order) == list(range(len(prompts)))
    ours = computed(prompts, plan.order, chunks_max)
    assert ours == plan.computed_tokens
    assert ours == min(computed(prompts, order, chunks_max) for order in permutations(range(len(prompts))))


@settings(max_examples=150)
@given(PROMPTS)
def test_the_tree_is_the_prompts(prompts: list[list[int]]) -> None:
    plan = plan_batch(prompts, KEYS)
    paths: list[tuple[bytes, ...]] = []
    seen: list[int] = []
    for place, node in enumerate(plan.nodes):
        before = () if node.parent is None else paths[node.parent]
        assert node.parent is None or node.parent < place
        assert (node.start, node.stop) == (2 * len(before), 2 * len(before) + 2 * len(node.keys))
        paths.append((*before, *node.keys))
        assert all(tuple(KEYS.chain(prompts[number])) == paths[-1] for number in node.prompts)
        sharing = [prompt for prompt in prompts if tuple(KEYS.chain(prompt)[: len(paths[-1])]) == paths[-1]]
        assert node.shared_by == len(sharing)
        seen += node.prompts
    without = [number for number, prompt in enumerate(prompts) if len(prompt) < 2]
    assert [*without, *seen] == list(plan.order)
    assert plan.tokens == sum(map(len, prompts))
    distinct = {key for prompt in prompts for key in KEYS.chain(prompt)}
    assert plan.computed_tokens == 2 * len(distinct) + sum(len(prompt) % 2 for prompt in prompts)


class Stored:
    """A store that has some chunks."""

    def __init__(self, keys: Sequence[bytes]) -> None:
        self._keys = set(keys)

    def head(self, keys: Sequence[bytes]) -> list[ChunkInfo | None]:
        return [ChunkInfo(1, ("dram",)) if key in self._keys else None for key in keys]


def test_what_is_stored_behind_a_hole_is_no_use() -> None:
    prompts = [[0, 0, 1, 1, 0, 1], [0, 0, 1, 1, 1, 0], [0, 0, 0, 0]]
    chain = KEYS.chain(prompts[0])
    assert [node.stored for node in plan_batch(prompts, KEYS, store=Stored(chain)).nodes] == [1, 1, 1, 0, 0]
    plan = plan_batch(prompts, KEYS, store=Stored([chain[0], chain[2]]))
    assert [node.stored for node in plan.nodes] == [1, 0, 0, 0, 0]
    assert (plan.tokens, plan.computed_tokens) == (16, 8)
    assert plan.order == (0, 1, 2)


def test_a_cache_of_less_than_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="cache_tokens is -1"):
        plan_batch([], KEYS, cache_tokens=-1)
