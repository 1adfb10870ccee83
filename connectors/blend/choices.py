"""What a chooser is told of each layer, and its answers made safe: rows that must go on do."""

from __future__ import annotations

import torch

from kvstore.connectors.blend.memory import BlendMemory
from kvstore.connectors.blend.policy import Change, Chooser
from kvstore.connectors.blend.prompt import Prompt


class Choices:
    """Called with what a layer computed; asks the chooser about the moved tokens among it.

    Args:
        chooser: compares.
        prompt: what is known of the tokens.
        memory: still holds what was reused when this is called.
        needed: tokens that go on whatever the chooser says, bool (T,).
    """

    def __init__(self, chooser: Chooser, prompt: Prompt, memory: BlendMemory, needed: torch.Tensor) -> None:
        self._chooser = chooser
        self._memory = memory
        self._needed = needed
        self._asked = prompt.moved & ~needed
        self._noise = torch.zeros(prompt.layers, prompt.tokens, 2)
        for span in prompt.spans:
            if span.source.noise is not None:
                self._noise[:, span.start : span.stop] = torch.tensor(span.source.noise)[:, None]

    def __call__(self, layer: int, rows: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor | None:
        """Which rows go on, bool (n,), or None for all; `rows` (n,), K and V (heads, n, dim)."""
        places = rows.cpu()
        asked = self._asked[places]
        at = torch.nonzero(asked)[:, 0]
        if not len(at):
            return None
        old_keys, old_values = self._memory.layer(layer)
        chosen = rows[at.to(rows.device)]
        change = Change(
            layer=layer,
            rows=places[at],
            new=(keys[:, at], values[:, at]),
            old=(old_keys[0][:, chosen], old_values[0][:, chosen]),
            noise=self._noise[layer, places[at]],
        )
        answer = self._chooser.computed(change)
        if answer is None:
            return None
        going_on = self._needed[places].clone()
        going_on[at] = answer.cpu()
        return going_on.to(rows.device)
