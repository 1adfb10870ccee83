"""Many prompts at once: the tree of the prefixes they share, and the order that computes least.

The order is depth-first, as in BatchLLM (Zheng et al., 2024): prompts that share a prefix come one after another. It is
the best there is. A cache of c chunks that keeps no chunk without those before it never holds a chunk with c or more
before it, so such a chunk is computed once for every prompt that has it, and every other chunk at least once. Depth
first, with the least recently used chunk without children evicted first, each of the latter is computed exactly once:
between two prompts that share it only chunks of prompts that share it too are used, so that it is among the first c
of the path that was used last.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import msgspec

from kvstore.errors import ConfigError
from kvstore.keys import ROOT, KeyScheme, Tokens

if TYPE_CHECKING:
    from kvstore.client import ChunkInfo

HEAD_KEYS = 4096
"""Chunks asked for at a time."""


class Headed(Protocol):
    """What a batch's plan asks of a store or a client."""

    def head(self, keys: Sequence[bytes]) -> list[ChunkInfo | None]:
        """Size and tiers of each chunk."""


class PrefixNode(msgspec.Struct, frozen=True, kw_only=True):
    """A run of chunks that the same prompts share: tokens start..stop of each of them.

    `parent` is the position of the node before it, None at a prompt's start. `prompts` are those whose last full chunk
    is this node's last, `shared_by` is how many have it in all. `stored` of its chunks, from the first on, are in the
    store now.
    """

    parent: int | None
    start: int
    stop: int
    keys: tuple[bytes, ...]
    prompts: tuple[int, ...]
    shared_by: int
    stored: int = 0


class BatchPlan(msgspec.Struct, frozen=True, kw_only=True):
    """The prefix tree in depth-first order, and the `order` in which to compute the prompts.

    `tokens` are all prompts', `computed_tokens` those that must be computed in this order by an engine that keeps
    `cache_tokens` tokens (None: all) of the prefixes in whole chunks, and has what is stored loaded.
    """

    nodes: tuple[PrefixNode, ...]
    order: tuple[int, ...]
    tokens: int
    computed_tokens: int


def plan_batch(
    prompts: Sequence[Tokens], keys: KeyScheme, *, cache_tokens: int | None = None, store: Headed | None = None
) -> BatchPlan:
    """The prefix tree of prompts, and the order that reuses most. Prompts that share nothing keep their order.

    Args:
        prompts: token ids of each.
        keys: the key scheme; prefixes are shared in whole chunks.
        cache_tokens: how many tokens of prefixes the engine keeps; None for as many as there are.
        store: whom to ask what is stored; None for nothing.

    Raises:
        ConfigError: `cache_tokens` is negative.
        SpecError: a token id is not in 0..2**32-1.
    """
    if cache_tokens is not None and cache_tokens < 0:
        raise ConfigError(f"cache_tokens is {cache_tokens}; it must not be negative")
    tree = _Tree([keys.chain(prompt) for prompt in prompts])
    stored = _stored(tree.chunks, store)
    nodes, order = tree.flatten(keys.chunk_tokens, stored)
    tokens = sum(len(prompt) for prompt in prompts)
    kept = max((node.stop for node in nodes), default=0) if cache_tokens is None else cache_tokens
    computed = tokens
    for node in nodes:
        for place in range(node.stored, len(node.keys)):
            stop = node.start + (place + 1) * keys.chunk_tokens
            if stop <= kept:
                computed -= (node.shared_by - 1) * keys.chunk_tokens
        computed -= node.shared_by * node.stored * keys.chunk_tokens
    return BatchPlan(nodes=nodes, order=order, tokens=tokens, computed_tokens=computed)


class _Tree:
    """Chunks by the chunk before them."""

    def __init__(self, chains: Sequence[Sequence[bytes]]) -> None:
        self.chunks: dict[bytes, int] = {}
        self._children: defaultdict[bytes, list[bytes]] = defaultdict(list)
        self._ends: defaultdict[bytes, list[int]] = defaultdict(list)
        for number, chain in enumerate(chains):
            parent = ROOT
            for key in chain:
                if key not in self.chunks:
                    self.chunks[key] = 0
                    self._children[parent].append(key)
                self.chunks[key] += 1
                parent = key
            self._ends[parent].append(number)

    def flatten(self, chunk_tokens: int, stored: set[bytes]) -> tuple[tuple[PrefixNode, ...], tuple[int, ...]]:
        """Nodes and prompts, depth first."""
        nodes: list[PrefixNode] = []
        order = self._ends.get(ROOT, [])[:]
        waiting: list[tuple[bytes, int | None, int]] = [(key, None, 0) for key in reversed(self._children[ROOT])]
        while waiting:
            key, parent, start = waiting.pop()
            run = [key]
            while len(self._children[key]) == 1 and key not in self._ends:
                (key,) = self._children[key]
                run.append(key)
            known = next((place for place, chunk in enumerate(run) if chunk not in stored), len(run))
            if parent is not None and nodes[parent].stored < len(nodes[parent].keys):
                known = 0  # of no use behind a hole
            stop = start + len(run) * chunk_tokens
            prompts = tuple(self._ends.get(key, ()))
            waiting += [(child, len(nodes), stop) for child in reversed(self._children[key])]
            nodes.append(
                PrefixNode(
                    parent=parent,
                    start=start,
                    stop=stop,
                    keys=tuple(run),
                    prompts=prompts,
                    shared_by=self.chunks[run[0]],
                    stored=known,
                )
            )
            order += prompts
        return tuple(nodes), tuple(order)


def _stored(keys: Sequence[bytes] | dict[bytes, int], store: Headed | None) -> set[bytes]:
    names = list(keys)
    if store is None:
        return set()
    found: set[bytes] = set()
    for first in range(0, len(names), HEAD_KEYS):
        asked = names[first : first + HEAD_KEYS]
        found |= {key for key, info in zip(asked, store.head(asked), strict=True) if info is not None}
    return found
