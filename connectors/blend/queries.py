"""The queries of a running attention layer, heard with public hooks: what policies need that look at attention.

A hook behind the last module that the queries pass before their rotation (the projection, or Qwen3's norm) hears them;
the rotation is done here, with the cosines and sines that the layer was given.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.hooks import RemovableHandle


class QueryTap:
    """Hears the queries of one decoder layer.

    Args:
        layer: the decoder layer; its attention is `layer.self_attn`.
    """

    def __init__(self, layer: Any) -> None:
        attention = layer.self_attn
        self.scaling: float = attention.scaling
        self._dim: int = attention.head_dim
        self._heard: torch.Tensor | None = None
        source = attention.q_norm if hasattr(attention, "q_norm") else attention.q_proj
        self.handle: RemovableHandle = source.register_forward_hook(self._hear)

    def _hear(self, module: Any, args: Any, output: torch.Tensor) -> None:
        self._heard = output

    def take(self, rotary: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """The queries of the rows now computed, rotated, (heads, rows, dim) fp32.

        Args:
            rotary: cosines and sines of the rows, each (1, rows, dim).
        """
        assert self._heard is not None  # attention computes queries before it updates the cache
        rows = self._heard.shape[1]
        queries = self._heard.reshape(rows, -1, self._dim).transpose(0, 1).float()
        self._heard = None
        cosine, sine = rotary[0][0].float(), rotary[1][0].float()
        first, second = queries.chunk(2, dim=-1)
        return queries * cosine + torch.cat((-second, first), dim=-1) * sine


def weights(queries: torch.Tensor, keys: torch.Tensor, seen: torch.Tensor, scaling: float) -> torch.Tensor:
    """Attention probabilities, (heads, rows, T) fp32.

    Args:
        queries: (heads, rows, dim).
        keys: (kv heads, T, dim); every KV head serves as many query heads as there are for each.
        seen: which keys each row attends to, bool (rows, T).
        scaling: of the scores.
    """
    grouped = queries.reshape(keys.shape[0], -1, *queries.shape[1:])
    scores = torch.matmul(grouped, keys.float().transpose(1, 2)[:, None]) * scaling
    return scores.masked_fill(~seen, float("-inf")).softmax(-1).flatten(0, 1)
