"""Prompts of documents that were computed elsewhere, for tests of blending; needs torch and transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from kvstore.connectors.blend.compiling import compile_span
from kvstore.connectors.blend.sources import Source, of_layers
from kvstore.testing.models import random_prompt

PREAMBLE_TOKENS = 4


@dataclass(frozen=True, eq=False)
class Blendable:
    """A prompt: a beginning without KV, documents compiled behind another beginning, a query.

    `ids` (T,); `sources` of the documents, in order; `preamble` that they were compiled behind.
    """

    ids: list[int]
    sources: list[Source]
    preamble: list[int]


def blendable(
    model: Any, *, prefix: int = 9, documents: Sequence[int] = (30, 17, 25), query: int = 7, seed: int = 0
) -> Blendable:
    """A prompt of random tokens for a random model."""

    def draw(tokens: int, own: int) -> list[int]:
        return [int(token) for token in random_prompt(tokens, 1000 * seed + own)[0].tolist()] if tokens else []

    preamble = draw(PREAMBLE_TOKENS, 1)
    ids = draw(prefix, 2)
    sources = []
    for index, tokens in enumerate(documents):
        own = draw(tokens, 10 + index)
        layers = compile_span(model, preamble, own)
        sources.append(Source(len(ids), own, of_layers(layers), position=len(preamble)))
        ids += own
    return Blendable(ids + draw(query, 3), sources, preamble)


@torch.no_grad()
def full_prefill(model: Any, ids: Sequence[int], logits_tokens: int = 1) -> tuple[torch.Tensor, Any]:
    """Logits of the last tokens (logits_tokens, vocabulary) and the cache of a prompt that is computed whole."""
    cache: Any = DynamicCache()
    output = model(torch.tensor([list(ids)]), past_key_values=cache, use_cache=True, logits_to_keep=logits_tokens)
    logits: torch.Tensor = output.logits[0]
    return logits, cache


@torch.no_grad()
def concatenated(model: Any, prompt: Blendable) -> torch.Tensor:
    """Logits of the last token, (1, vocabulary), behind documents that were each computed at their place, alone.

    The reference for reuse without recompute, made without moving a key: every document is run behind the preamble,
    with position numbers that put it where it stands in the prompt.
    """
    first, last = prompt.sources[0], prompt.sources[-1]
    layers: list[list[tuple[torch.Tensor, torch.Tensor]]] = []
    cache: Any = DynamicCache()
    model.base_model(torch.tensor([prompt.ids[: first.start]]), past_key_values=cache, use_cache=True)
    layers.append([(layer.keys, layer.values) for layer in cache.layers])
    for source in prompt.sources:
        behind = len(prompt.preamble)
        positions = torch.arange(source.start - behind, source.stop)[None]
        alone: Any = DynamicCache()
        tokens = torch.tensor([[*prompt.preamble, *source.ids]])
        model.base_model(tokens, position_ids=positions, past_key_values=alone, use_cache=True)
        layers.append([(layer.keys[:, :, behind:], layer.values[:, :, behind:]) for layer in alone.layers])
    joined = DynamicCache()
    for index, parts in enumerate(zip(*layers, strict=True)):
        joined.update(torch.cat([k for k, _ in parts], 2), torch.cat([v for _, v in parts], 2), index)
    output = model(torch.tensor([prompt.ids[last.stop :]]), past_key_values=joined, use_cache=True, logits_to_keep=1)
    logits: torch.Tensor = output.logits[0]
    return logits
