"""KV of a document computed to be reused anywhere: behind the preamble that the model's prompts begin with.

Behind nothing, a document's first tokens would take up the attention that in a prompt goes to the prompt's own first
tokens (phantom sinks), and its KV would be right nowhere. The preamble's own KV is not part of the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from kvstore.connectors.blend.sources import KV


@torch.no_grad()
def compile_span(model: PreTrainedModel, preamble: Sequence[int], ids: Sequence[int]) -> list[KV]:
    """K and V of every layer of `ids` behind `preamble`, each (heads, tokens, dim).

    A `Source` of it has `position=len(preamble)`.
    """
    tokens = torch.tensor([[*preamble, *ids]], device=model.device)
    cache: Any = DynamicCache()  # its layers are of one kind here
    model.base_model(tokens, past_key_values=cache, use_cache=True)
    return [(layer.keys[0, :, len(preamble) :], layer.values[0, :, len(preamble) :]) for layer in cache.layers]
