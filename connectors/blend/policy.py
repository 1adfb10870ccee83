"""The contract of recompute policies: which tokens of reused KV are worth computing again.

A `Policy` is settings and a name; for every prompt it begins a `Chooser`, which hears what happens layer by layer and
answers which tokens go on. The engine sees to what no policy may decide: fresh tokens and the last token are always
computed, exact ones never, and a token that stopped at a layer cannot go on at a later one.

To add one: a file in `policies/` with its paper cited, a line in `registry.py`, a line in docs/blend.md.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch

from kvstore.connectors.blend.prompt import Prompt
from kvstore.connectors.blend.split import Split


@dataclass(frozen=True, eq=False)
class Change:
    """K and V of a layer that were computed again, beside what was reused; of moved tokens only.

    Attributes:
        layer: counted from 0.
        rows: places of the tokens in the prompt, (n,).
        new: K and V computed, each (heads, n, dim).
        old: K and V reused, at the same positions, likewise.
        noise: expected squared error of an element of the reused K and V that its codec left, (n, 2) fp32.
    """

    layer: int
    rows: torch.Tensor
    new: tuple[torch.Tensor, torch.Tensor]
    old: tuple[torch.Tensor, torch.Tensor]
    noise: torch.Tensor

    def deviation(self, part: int) -> torch.Tensor:
        """Squared distance of every token's new K (part 0) or V (1) to the old, less its codec's noise, (n,) fp32."""
        squares = (self.new[part].float() - self.old[part].float()).square()
        floor = self.noise[:, part].to(squares.device) * squares.shape[0] * squares.shape[2]
        return (squares.sum((0, 2)) - floor).clamp(min=0)


@dataclass(frozen=True, eq=False)
class Attention:
    """What the query rows attended to in one layer of a first run over the reused KV.

    Attributes:
        layer: counted from 0.
        weights: probabilities, (query heads, query rows, T) fp32.
        values: V of the layer, (kv heads, T, dim).
    """

    layer: int
    weights: torch.Tensor
    values: torch.Tensor


class Chooser(ABC):
    """The choices of a policy for one prompt; the hooks are called in the order of their definition.

    Attributes:
        scouts: whether the fresh tokens run over the reused KV first, alone, and `attended` is called.
        compares: whether `computed` is called.
    """

    scouts: ClassVar[bool] = False
    compares: ClassVar[bool] = False

    def attended(self, attention: Attention) -> None:  # noqa: B027  # only choosers that scout have a use for it
        """Hear what the query attended to in one layer, first layer first."""

    @abstractmethod
    def start(self) -> torch.Tensor:
        """Which tokens to compute from the first layer on, bool (T,); others than moved ones do not matter."""

    def computed(self, change: Change) -> torch.Tensor | None:
        """Which of `change.rows` go on to the next layer, bool (n,); None for all."""
        return None


class Policy(ABC):
    """Settings of a recompute policy; `name` is what it is called in the registry and in reports."""

    name: ClassVar[str]

    @property
    def split(self) -> Split | None:
        """Attention to documents apart from the rest; None for the model's own."""
        return None

    def positions(self, prompt: Prompt) -> torch.Tensor:
        """Position of every token in the rotary embedding, (T,); a row attends by place, not by position."""
        return torch.arange(prompt.tokens)

    @abstractmethod
    def begin(self, prompt: Prompt) -> Chooser:
        """The choices for one prompt."""
