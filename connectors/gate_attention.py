"""The attention of a model under its own queries, computed again with other keys and values.

The model's attention function is called by transformers with queries after rotary embedding, with all keys and values,
and with the mask; recording such a call and making it again with decoded KV is right for every family, grouping and
mask without knowing any of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import torch
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvstore.errors import UnsupportedModelError


class AttentionCall(msgspec.Struct, frozen=True, eq=False):
    """One layer's call: `queries` (1, heads, tokens, dim), `output` (1, tokens, heads, dim), in the model's dtype."""

    function: Any
    module: Any
    queries: torch.Tensor
    mask: torch.Tensor | None
    options: dict[str, Any]
    output: torch.Tensor

    def squared_error(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[float, float]:
        """Sums over the call's output of |o - o'|^2 and |o|^2, where o' has these K and V (1, heads, tokens, dim)."""
        other = self.function(self.module, self.queries, keys, values, self.mask, **self.options)[0]
        return squared_error(self.output, other)


@contextmanager
def recorded_attention(model: PreTrainedModel) -> Iterator[list[AttentionCall]]:
    """A list that the calls of every forward pass within are added to, layer by layer.

    transformers' registry of attention functions is changed meanwhile: run no other model in the process.

    Raises:
        UnsupportedModelError: the model's attention function is not in the registry.
    """
    name = model.config._attn_implementation
    if name not in ALL_ATTENTION_FUNCTIONS:
        raise UnsupportedModelError(
            f"attention implementation {name!r} cannot be observed; load the model with attn_implementation='sdpa'"
        )
    function = ALL_ATTENTION_FUNCTIONS[name]
    calls: list[AttentionCall] = []

    def record(
        module: Any,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        mask: torch.Tensor | None,
        **options: Any,
    ) -> Any:
        answer = function(module, queries, keys, values, mask, **options)
        calls.append(AttentionCall(function, module, queries, mask, options, answer[0]))
        return answer

    ALL_ATTENTION_FUNCTIONS[name] = record
    try:
        yield calls
    finally:
        ALL_ATTENTION_FUNCTIONS[name] = function


def squared_error(original: torch.Tensor, other: torch.Tensor) -> tuple[float, float]:
    """Sums of |a - b|^2 and |a|^2 over two tensors of one shape, in double precision."""
    a, b = original.double(), other.double()
    return float((a - b).square().sum()), float(a.square().sum())
