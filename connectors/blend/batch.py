"""Blended prefill of several prompts into one cache, padded on the left, on which `generate` goes on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import Cache, PreTrainedModel

from kvstore.connectors.blend.engine import blend_into, check_blendable
from kvstore.connectors.blend.policy import Policy
from kvstore.connectors.blend.prompt import assemble
from kvstore.connectors.blend.report import BlendReport
from kvstore.connectors.blend.sources import Source
from kvstore.connectors.hf_generate import HEADROOM_TOKENS, prompt_rows
from kvstore.connectors.torch_kv import TorchKV
from kvstore.errors import SpecError


@dataclass(frozen=True, eq=False)
class BlendedBatch:
    """The KV of several prompts.

    Attributes:
        logits: of the last token of every row, (rows, vocabulary).
        cache: an ordinary transformers cache of width tokens, each row padded on the left.
        reports: one a row.
    """

    logits: torch.Tensor
    cache: Cache
    reports: tuple[BlendReport, ...]


@torch.no_grad()
def blend_batch(
    model: PreTrainedModel,
    ids: torch.Tensor,
    mask: torch.Tensor,
    sources: Sequence[Sequence[Source]],
    policy: Policy,
    *,
    headroom: int = HEADROOM_TOKENS,
) -> BlendedBatch:
    """What `blend_prefill` answers for every row.

    Rows are blended one after another: each chooses its own tokens, and rows of a joint run would compute the union of
    all. Positions count from each row's first token, as transformers counts them from the mask.

    Args:
        model: as of `blend_prefill`.
        ids: prompts, (rows, width), shorter ones padded on the left.
        mask: 1 for tokens, 0 for padding, likewise.
        sources: of every row; `Source.start` counts from the row's first token.
        policy: of all rows.
        headroom: tokens expected to follow.

    Raises:
        UnsupportedModelError, SpecError: as `blend_prefill`; the mask is not left padding, or there are not as many
            lists of sources as rows.
    """
    spec = check_blendable(model)
    rows = prompt_rows(ids, mask)
    if len(sources) != len(rows):
        raise SpecError(f"{len(rows)} prompts and {len(sources)} lists of sources; give one list for each prompt")
    prompts = [
        assemble(row.tolist(), own, spec.layers) for row, own in zip(rows, sources, strict=True)
    ]  # all are checked before any is computed
    width = ids.shape[1]
    memory = TorchKV.allocate(spec, len(rows), width + headroom, model.device)
    logits, reports = [], []
    for row, prompt in enumerate(prompts):
        padding = width - prompt.tokens
        memory.clear(row, padding)
        last, report = blend_into(model, spec, prompt, policy, memory.row(row, padding), logits_tokens=1)
        logits.append(last)
        reports.append(report)
    return BlendedBatch(torch.cat(logits), memory.cache(width), tuple(reports))
