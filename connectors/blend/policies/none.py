"""No token is computed again: plain concatenation, each span moved to its place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from kvstore.connectors.blend.policy import Chooser, Policy
from kvstore.connectors.blend.prompt import Prompt


@dataclass(frozen=True)
class Nothing(Policy):
    """Computes nothing again: the cheapest, and what the others are measured against."""

    name: ClassVar[str] = "none"

    def begin(self, prompt: Prompt) -> Chooser:
        """Choices that are always empty."""
        return Fixed(torch.zeros(prompt.tokens, dtype=torch.bool))


class Fixed(Chooser):
    """Tokens known before anything is computed, in all layers.

    Args:
        tokens: bool (T,).
    """

    def __init__(self, tokens: torch.Tensor) -> None:
        self._tokens = tokens

    def start(self) -> torch.Tensor:
        """These tokens."""
        return self._tokens
