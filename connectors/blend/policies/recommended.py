"""What this project recommends: query attention, made sharper where heads are and wider where tokens belong together.

Three changes to `query`, each measured on the trained test models (docs/blend.md has the numbers):

- The score of a token is its highest probability over the query's rows, not the mean, so that one row that needs it is
  enough; times the length of its V, because attention to a token with little V (a sink) moves nothing (Guo et al. 2024,
  VATP, arXiv 2406.12335).
- Scores spread to the neighbours, falling off (pooling, as in SnapKV, Li et al. 2024, arXiv 2404.14469). A query often
  finds a statement by its last token, while what has to be computed again is the token before it.
- Every document's first tokens are always among the chosen, so that a document compiled behind no preamble does not
  keep its phantom sink.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from kvstore.connectors.blend.policies.query import top_moved
from kvstore.connectors.blend.policy import Attention, Chooser, Policy
from kvstore.connectors.blend.prompt import Prompt
from kvstore.errors import ConfigError

SPREAD = 0.3
REACH = 2


@dataclass(frozen=True)
class Recommended(Policy):
    """Computes again what the query attends to and its neighbourhood, in all layers.

    Attributes:
        ratio: share of the moved tokens.
        first: tokens at the start of every document that are always among them.
        spread: share of its score that a token lends its neighbours, this to the power of their distance.
        reach: distance in tokens that scores spread to.

    Raises:
        ConfigError: a number is out of its range.
    """

    name: ClassVar[str] = "recommended"
    ratio: float = 0.15
    first: int = 1
    spread: float = SPREAD
    reach: int = REACH

    def __post_init__(self) -> None:
        for field in ("ratio", "spread"):
            if not 0 <= getattr(self, field) <= 1:
                raise ConfigError(f"recommended: {field} is {getattr(self, field)}; it must be in 0..1")
        if self.first < 0 or self.reach < 0:
            raise ConfigError(f"recommended: first is {self.first}, reach {self.reach}; neither may be negative")

    def begin(self, prompt: Prompt) -> Chooser:
        """Choices by attention."""
        return _Wide(self, prompt)


class _Wide(Chooser):
    scouts = True

    def __init__(self, policy: Recommended, prompt: Prompt) -> None:
        self._policy = policy
        self._prompt = prompt
        self._scores = torch.zeros(prompt.tokens)

    def attended(self, attention: Attention) -> None:
        lengths = attention.values.float().norm(dim=-1)
        peaks = attention.weights.amax(1)  # (query heads, T); a KV head serves several
        worth = peaks.view(len(lengths), -1, lengths.shape[1]) * lengths[:, None]
        self._scores += worth.mean((0, 1)).cpu()

    def start(self) -> torch.Tensor:
        count = self._prompt.budget(self._policy.ratio)
        scores = spread(self._scores.masked_fill(~self._prompt.moved, 0), self._policy.spread, self._policy.reach)
        first = self._prompt.first_of_documents(self._policy.first, skip_first=True)
        return top_moved(self._prompt, scores.masked_fill(first, float("inf")), count)


def spread(scores: torch.Tensor, share: float, reach: int) -> torch.Tensor:
    """Every score raised to what its neighbours lend it: the largest of score * share ** distance, (T,)."""
    out = scores.clone()
    for distance in range(1, min(reach, len(scores) - 1) + 1):
        lent = scores * share**distance
        out[distance:] = torch.maximum(out[distance:], lent[:-distance])
        out[:-distance] = torch.maximum(out[:-distance], lent[distance:])
    return out
