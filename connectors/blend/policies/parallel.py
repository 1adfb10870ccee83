"""Documents side by side, nothing computed again (APE, Yang et al., ICLR 2025, arXiv 2502.05431).

Every document is placed right behind the beginning that all share, as if it were the only one, and the query behind the
longest. What the query attends to in documents is corrected by a temperature and a scale (`split.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from kvstore.connectors.blend.policies.none import Fixed
from kvstore.connectors.blend.policy import Chooser, Policy
from kvstore.connectors.blend.prompt import Prompt
from kvstore.connectors.blend.split import Split


@dataclass(frozen=True)
class Parallel(Policy):
    """Computes nothing again, and attends to the documents in parallel.

    The model needs this attention for what it generates too: `split_attention` over `Blended.cache`, with positions
    from `Blended.next_position` on.

    Attributes:
        temperature: T, of the scores within documents.
        scale: S, of their log-sum-exp. The authors' example has 0.9 for both.
    """

    name: ClassVar[str] = "parallel"
    temperature: float = 0.9
    scale: float = 0.9

    @property
    def split(self) -> Split:
        """Temperature and scale. Raises ConfigError unless both are above 0."""
        return Split(self.temperature, self.scale)

    def positions(self, prompt: Prompt) -> torch.Tensor:
        """Documents from the first one's place on, all the same; what follows behind the longest."""
        out = torch.arange(prompt.tokens)
        if not bool(prompt.moved.any()):
            return out
        first = int(torch.nonzero(prompt.moved)[0, 0])
        furthest = first
        for document in sorted(set(prompt.document[prompt.moved].tolist())):
            own = torch.nonzero((prompt.document == document) & prompt.moved)[:, 0]
            out[own] = first + torch.arange(len(own))
            furthest = max(furthest, first + len(own))
        behind = torch.nonzero(~prompt.moved & (torch.arange(prompt.tokens) > first))[:, 0]
        out[behind] = furthest + torch.arange(len(behind))
        return out

    def begin(self, prompt: Prompt) -> Chooser:
        """Choices that are always empty."""
        return Fixed(torch.zeros(prompt.tokens, dtype=torch.bool))
