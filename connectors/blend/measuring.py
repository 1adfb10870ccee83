"""Chunk statistics measured on a prompt that is computed whole: what fills the side-cars that `chunk_score` reads."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import Cache, PreTrainedModel

from kvstore.connectors.blend.chunk_statistics import ChunkStatistics
from kvstore.connectors.blend.engine import check_blendable
from kvstore.connectors.blend.memory import BlendMemory
from kvstore.connectors.blend.moving import mover_of
from kvstore.connectors.blend.passes import RowsPass
from kvstore.connectors.blend.policy import Attention
from kvstore.connectors.blend.prompt import assemble
from kvstore.connectors.torch_kv import TorchKV


@torch.no_grad()
def measure(
    model: PreTrainedModel, ids: Sequence[int], chunks: Sequence[tuple[str, int, int]]
) -> tuple[list[ChunkStatistics], Cache]:
    """Statistics of the chunks of a prompt, which is computed whole, and the cache with its KV.

    All attention weights of a layer are in memory at once: for prompts of a few thousand tokens.

    Args:
        model: as of `blend_prefill`.
        ids: the prompt, (T,).
        chunks: (name, start, stop) of each, in prompt order.
    """
    spec = check_blendable(model)
    prompt = assemble(ids, [], spec.layers)
    room = TorchKV.allocate(spec, 1, prompt.tokens, model.device)
    places = torch.arange(prompt.tokens)
    memory = BlendMemory(prompt, room, mover_of(model, spec), places)
    sums = torch.zeros(len(chunks), len(chunks))
    rows = [torch.zeros(stop - start) for _, start, stop in chunks]

    def attended(attention: Attention) -> None:
        weights = attention.weights.mean(0).cpu()
        for own, (_, start, stop) in enumerate(chunks):
            for other, (_, first, last) in enumerate(chunks[: own + 1]):
                block = weights[start:stop, first:last].sum(1)
                sums[own, other] += block.sum() / ((stop - start) * (last - first) * spec.layers)
                if other < own:
                    rows[own] += block / spec.layers

    everything = torch.ones(prompt.tokens, dtype=torch.bool)
    RowsPass(model, memory, prompt.ids, places, attended=attended, queries=everything).run(places)
    names = [name for name, _, _ in chunks]
    found = [
        ChunkStatistics(
            names[own], tuple(names[:own]), tuple(sums[own, :own].tolist()), float(sums[own, own]), tuple(row.tolist())
        )
        for own, row in enumerate(rows)
    ]
    return found, room.cache(prompt.tokens)
