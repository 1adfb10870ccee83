"""CacheBlend as its authors published it in code, faults included: what blending is measured against.

After github.com/YaoJiayi/CacheBlend (vllm_blend), read in 2026: all tokens are computed in layers 0 and 1; at layer 1
tokens are scored by the squared change of V alone, the best `ratio` of them and the last token go on through all layers
behind; there is no further filtering. The query's tokens count as cached like all others (only the last is sure to be
computed). From layer 2 on a row attends by a causal mask aligned to the bottom right corner: row i of m sees keys up to
T - m + i, which may stand behind it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import Cache, PreTrainedModel

from kvstore.connectors.blend.choices import Choices
from kvstore.connectors.blend.compiling import compile_span
from kvstore.connectors.blend.engine import check_blendable
from kvstore.connectors.blend.memory import BlendMemory
from kvstore.connectors.blend.moving import mover_of
from kvstore.connectors.blend.passes import RowsPass
from kvstore.connectors.blend.policies.hkvd import largest
from kvstore.connectors.blend.policy import Change, Chooser
from kvstore.connectors.blend.prompt import Prompt, assemble
from kvstore.connectors.blend.sources import Source, of_layers
from kvstore.connectors.torch_kv import TorchKV

CHECK_LAYER = 1
PUBLISHED_RATIO = 0.16


def bottom_right(rows: torch.Tensor, tokens: int, window: int | None) -> torch.Tensor:
    """Bool (rows, tokens): the mask that attention kernels make of `causal` when there are fewer rows than keys."""
    behind = torch.arange(len(rows), device=rows.device) + tokens - len(rows)
    return torch.arange(tokens, device=rows.device)[None, :] <= behind[:, None]


@torch.no_grad()
def cacheblend_published(
    model: PreTrainedModel,
    ids: Sequence[int],
    sources: Sequence[Source],
    preamble: Sequence[int],
    ratio: float = PUBLISHED_RATIO,
    *,
    headroom: int = 0,
) -> tuple[torch.Tensor, Cache]:
    """Logits of the last token, (1, vocabulary), and the cache.

    Args:
        model: as of `blend_prefill`, without sliding windows.
        ids: the prompt, (T,).
        sources: of all tokens before the query.
        preamble: that the query's own KV is compiled behind.
        ratio: share of the tokens that go on.
        headroom: tokens expected to follow.
    """
    spec = check_blendable(model)
    stop = max(source.stop for source in sources)
    query = list(ids[stop:])
    cached = [*sources, Source(stop, query, of_layers(compile_span(model, preamble, query)), position=len(preamble))]
    prompt = assemble(ids, cached, spec.layers)
    room = TorchKV.allocate(spec, 1, prompt.tokens + headroom, model.device)
    places = torch.arange(prompt.tokens)
    memory = BlendMemory(prompt, room, mover_of(model, spec), places)
    last = places == prompt.tokens - 1
    choices = Choices(_ByValue(prompt, ratio), prompt, memory, last)
    run = RowsPass(model, memory, prompt.ids, places, computed=choices, seen=bottom_right)
    logits = run.run(places, logits_tokens=1)
    assert logits is not None  # the last token's are wanted
    return logits, room.cache(prompt.tokens)


class _ByValue(Chooser):
    compares = True

    def __init__(self, prompt: Prompt, ratio: float) -> None:
        self._prompt = prompt
        self._ratio = ratio

    def start(self) -> torch.Tensor:
        return torch.ones_like(self._prompt.moved)

    def computed(self, change: Change) -> torch.Tensor | None:
        if change.layer != CHECK_LAYER:
            return None
        return largest(change.deviation(1), self._prompt.budget(self._ratio))
