"""High KV deviation with gradual filtering (CacheBlend, Yao et al., EuroSys 2025, arXiv 2405.16444).

Up to the check layer every moved token is computed. There the tokens whose K and V differ most from what was reused go
on; each later layer drops some more of them, by the deviation it finds, so that the mean over the layers behind the
check layer is the ratio. Unlike the authors' published code, K and V both count, each relative to its own size, the
error that a lossy codec is expected to have left is taken off first, and the later layers do filter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from kvstore.connectors.blend.policy import Change, Chooser, Policy
from kvstore.connectors.blend.prompt import Prompt
from kvstore.errors import ConfigError


@dataclass(frozen=True)
class HighDeviation(Policy):
    """Computes the tokens again whose KV has changed most.

    Attributes:
        ratio: share of the moved tokens, mean of the layers behind the check layer.
        check_layer: the first layer that is compared; all moved tokens are computed up to it. The first layer's KV does
            not depend on other tokens, so 0 would compare nothing.
        slope: how much more than the ratio goes on behind the check layer, and how much less at the end.

    Raises:
        ConfigError: a number is out of its range.
    """

    name: ClassVar[str] = "hkvd"
    ratio: float = 0.15
    check_layer: int = 1
    slope: float = 0.3

    def __post_init__(self) -> None:
        if not 0 <= self.ratio <= 1:
            raise ConfigError(f"hkvd: ratio is {self.ratio}; it must be in 0..1")
        if self.check_layer < 1 or not 0 <= self.slope < 1:
            raise ConfigError(
                f"hkvd: check_layer is {self.check_layer}, slope {self.slope}; give at least 1, and 0 or more below 1"
            )

    def begin(self, prompt: Prompt) -> Chooser:
        """Choices by deviation."""
        return _ByDeviation(self, prompt)


class _ByDeviation(Chooser):
    compares = True

    def __init__(self, policy: HighDeviation, prompt: Prompt) -> None:
        self._policy = policy
        self._prompt = prompt

    def start(self) -> torch.Tensor:
        return self._prompt.moved if self._policy.ratio > 0 else torch.zeros_like(self._prompt.moved)

    def computed(self, change: Change) -> torch.Tensor | None:
        behind = self._prompt.layers - 1 - self._policy.check_layer
        step = change.layer - self._policy.check_layer
        if step < 0 or behind <= 0 or step >= behind:
            return None
        ratio = filtered(self._policy.ratio, self._policy.slope, step, behind)
        return largest(relative_deviation(change), self._prompt.budget(ratio))


def filtered(ratio: float, slope: float, step: int, steps: int) -> float:
    """The share that goes on at one of `steps` layers: from ratio * (1 + slope) down to ratio * (1 - slope).

    The mean is the ratio: the slope is less where more than everything would go on.
    """
    if steps < 2 or ratio <= 0:
        return ratio
    slope = min(slope, (1 - ratio) / ratio)
    return ratio * (1 + slope * (1 - 2 * step / (steps - 1)))


def relative_deviation(change: Change) -> torch.Tensor:
    """Squared change of K over the mean square of K, plus that of V over V's, (n,) fp32."""
    out = torch.zeros(len(change.rows), device=change.new[0].device)
    for part in range(2):
        size = change.new[part].float().square().sum((0, 2)).mean()
        out += change.deviation(part) / size.clamp(min=torch.finfo(torch.float32).tiny)
    return out


def largest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Which entries are the `count` largest, bool like `scores` (n,); ties go to the earlier."""
    out = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
    out[torch.sort(scores, descending=True, stable=True).indices[:count]] = True
    return out
