"""As much of each chunk as it leaned on what is missing now (Cache-Craft, Agarwal et al. 2025, arXiv 2502.15734).

    N = ceil(alpha * CCI * (1 - beta') * tokens)

tokens of a chunk are computed again: those that attended most to the chunks before them when they were computed.
CCI says how much the chunk leaned on others, beta' how much of that stands before it again, in the same order
(`chunk_statistics.py`). Nothing is computed to find out: the numbers were kept beside the chunk.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from kvstore.connectors.blend.policies.none import Fixed
from kvstore.connectors.blend.policy import Chooser, Policy
from kvstore.connectors.blend.prompt import Prompt, Span
from kvstore.errors import ConfigError


@dataclass(frozen=True)
class ChunkScore(Policy):
    """Computes again what leaned on other chunks, in all layers.

    A chunk without statistics counts as one that leaned on nothing and begins anew: its first tokens are computed.

    Attributes:
        alpha: factor of every chunk's share.
        ratio: share of all moved tokens instead, dealt out in proportion.

    Raises:
        ConfigError: a number is out of its range.
    """

    name: ClassVar[str] = "chunk_score"
    alpha: float = 1.0
    ratio: float | None = None

    def __post_init__(self) -> None:
        if self.alpha < 0 or not 0 <= (self.ratio or 0) <= 1:
            raise ConfigError(
                f"chunk_score: alpha is {self.alpha}, ratio {self.ratio}; alpha must not be negative, ratio in 0..1"
            )

    def begin(self, prompt: Prompt) -> Chooser:
        """Fixed choices."""
        spans = [span for span in prompt.spans if not span.source.exact]
        shares = [self.alpha * _overhead(span, prompt) for span in spans]
        if self.ratio is not None:
            whole = sum(share * (span.stop - span.start) for span, share in zip(spans, shares, strict=True))
            factor = self.ratio * int(prompt.moved.sum()) / whole if whole else 0.0
            shares = [share * factor for share in shares]
        chosen = torch.zeros(prompt.tokens, dtype=torch.bool)
        for span, share in zip(spans, shares, strict=True):
            tokens = span.stop - span.start
            count = min(tokens, math.ceil(share * tokens - 1e-9))
            chosen[span.start + _most_leaning(span)[:count]] = True
        return Fixed(chosen)


def _overhead(span: Span, prompt: Prompt) -> float:
    """CFO of a span behind the chunks that stand before it in the prompt."""
    statistics = span.source.statistics
    if statistics is None:
        return 0.5
    before = [other.source.statistics for other in prompt.spans if other.stop <= span.start]
    return statistics.overhead([known.name for known in before if known is not None])


def _most_leaning(span: Span) -> torch.Tensor:
    """Tokens of a span, counted from its start, by their attention to earlier chunks, most first; (n,)."""
    statistics = span.source.statistics
    tokens = span.stop - span.start
    if statistics is None:
        return torch.arange(tokens)
    return torch.sort(torch.tensor(statistics.token_inter[:tokens]), descending=True, stable=True).indices
