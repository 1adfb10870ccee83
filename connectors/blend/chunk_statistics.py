"""What a chunk's tokens attended to when it was computed: plain numbers that a side-car of the chunk can keep.

From Cache-Craft (Agarwal et al., SIGMOD 2025, arXiv 2502.15734): how much a chunk leaned on the chunks before it
(inter) and on itself (intra) tells how much its KV suffers elsewhere, and which of its tokens suffer most.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations

import msgspec

from kvstore.errors import SpecError


class ChunkStatistics(msgspec.Struct, frozen=True):
    """One variant of a chunk: its KV as computed behind certain others.

    Attributes:
        name: of the chunk's content.
        behind: names of the chunks before it, in their order.
        inter: attention to each of these, mean over layers of sum / (tokens * tokens).
        intra: attention within the chunk, mean over layers of sum / tokens^2.
        token_inter: attention of every token to all chunks before, mean over layers; (tokens,).
    """

    name: str
    behind: tuple[str, ...]
    inter: tuple[float, ...]
    intra: float
    token_inter: tuple[float, ...]

    @property
    def influence(self) -> float:
        """CCI: 1 / (1 + exp(-inter / intra)): 0.5 for a chunk that leans on nothing, towards 1 for one that does."""
        ratio = sum(self.inter) / self.intra if self.intra > 0 else math.inf if sum(self.inter) > 0 else 0.0
        return 1 / (1 + math.exp(-min(ratio, 700.0)))

    def overlap(self, behind: Sequence[str]) -> float:
        """beta': the share of what it leaned on that stands before it again, less the share of pairs out of order."""
        common = [name for name in self.behind if name in set(behind)]
        whole = sum(self.inter)
        if not common or whole <= 0:
            return 0.0
        kept = sum(amount for name, amount in zip(self.behind, self.inter, strict=True) if name in common)
        places = {name: place for place, name in enumerate(behind)}
        pairs = list(combinations(common, 2))
        swapped = sum(places[first] > places[second] for first, second in pairs)
        return kept / whole * (1 - (swapped / len(pairs) if pairs else 0.0))

    def overhead(self, behind: Sequence[str]) -> float:
        """CFO without its factor alpha: the share of the chunk worth computing again behind these chunks."""
        return self.influence * (1 - self.overlap(behind))


def best_variant(variants: Sequence[ChunkStatistics], behind: Sequence[str]) -> int:
    """Index of the variant that needs least computing again behind these chunks. Raises SpecError if there are none."""
    if not variants:
        raise SpecError("a chunk has no variants; keep at least one")
    return min(range(len(variants)), key=lambda index: variants[index].overhead(behind))
