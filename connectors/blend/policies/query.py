"""The tokens that the query attends to (ProphetKV, 2026, arXiv 2602.02579).

The query runs over the reused KV first, alone: a few rows in every layer. What its heads attended to in each layer is
fused into one score a token, and the highest are computed again. Tokens that merely stand out, but not for this query,
cost nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from kvstore.connectors.blend.policies.hkvd import largest
from kvstore.connectors.blend.policy import Attention, Chooser, Policy
from kvstore.connectors.blend.prompt import Prompt
from kvstore.errors import ConfigError


@dataclass(frozen=True)
class QueryAttention(Policy):
    """Computes the tokens again that the query attends to most, in all layers.

    Attributes:
        ratio: share of the moved tokens.

    Raises:
        ConfigError: it is not in 0..1.
    """

    name: ClassVar[str] = "query"
    ratio: float = 0.15

    def __post_init__(self) -> None:
        if not 0 <= self.ratio <= 1:
            raise ConfigError(f"query: ratio is {self.ratio}; it must be in 0..1")

    def begin(self, prompt: Prompt) -> Chooser:
        """Choices by attention."""
        return ByAttention(prompt, self.ratio)


class ByAttention(Chooser):
    """Listens to a first run of the query; `scores` (T,) is the mean probability that its rows gave each token.

    Args:
        prompt: of T tokens.
        ratio: share of the moved tokens to choose.
    """

    scouts = True

    def __init__(self, prompt: Prompt, ratio: float) -> None:
        self._prompt = prompt
        self._ratio = ratio
        self.scores = torch.zeros(prompt.tokens)

    def attended(self, attention: Attention) -> None:
        """Add one layer's attention."""
        self.scores += attention.weights.mean((0, 1)).cpu()

    def start(self) -> torch.Tensor:
        """The moved tokens with the highest scores."""
        return top_moved(self._prompt, self.scores, self._prompt.budget(self._ratio))


def top_moved(prompt: Prompt, scores: torch.Tensor, count: int) -> torch.Tensor:
    """The `count` moved tokens with the highest scores, bool (T,)."""
    return largest(scores.masked_fill(~prompt.moved, float("-inf")), count) & prompt.moved
