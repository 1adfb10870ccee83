"""Which keys a row may attend to: those at places up to its own, and within the sliding window of its layer.

The rows of a blended prefill are not the last ones of the prompt, so a causal mask aligned to the bottom right corner,
which attention kernels apply on request, would let a row see tokens behind it. These masks go by the row's own place.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel


def visible(rows: torch.Tensor, tokens: int, window: int | None) -> torch.Tensor:
    """Bool (rows, tokens): whether the row at place p sees the key at place k, p - window < k <= p."""
    places = torch.arange(tokens, device=rows.device)
    seen = places[None, :] <= rows[:, None]
    if window is not None:
        seen &= places[None, :] > rows[:, None] - window
    return seen


def additive(seen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What to add to attention scores, (1, 1, rows, tokens): 0 where seen, else the dtype's lowest number."""
    mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    return mask.masked_fill_(~seen, torch.finfo(dtype).min)[None, None]


def windows(model: PreTrainedModel) -> list[int | None]:
    """The sliding window of every layer in tokens, None where a layer sees everything before a token."""
    config: Any = model.config
    window: int | None = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        windowed = config.model_type == "mistral"  # the one family whose window is for all layers
        return [window if windowed else None] * config.num_hidden_layers
    return [window if kind == "sliding_attention" else None for kind in kinds]
