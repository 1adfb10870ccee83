"""Blended prefill on a transformers model: the cache and the logits of a prompt whose parts are reused anywhere in it.

    sources = [Source(start=12, ids=document, position=4, layer=of_layers(stored))]
    blended = blend_prefill(model, ids, sources, Recommended(ratio=0.15))
    model(next_token, past_key_values=blended.cache)

Tokens of no source are always computed, and so is the last one, whose logits are wanted. The policy says which of the
tokens whose KV was computed behind other tokens are computed again. Every row attends to the tokens at places up to its
own and no others, within the sliding window of its layer.

Hooks are on the model while a prompt is blended: one thread at a time may use it.

Blended KV belongs to this one request: it is neither what a prefill would compute nor what was stored. Nothing here can
write it to a store, and the connectors that can take no cache from outside.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import Cache, PreTrainedModel

from kvstore.connectors.blend.choices import Choices
from kvstore.connectors.blend.masks import windows
from kvstore.connectors.blend.memory import BlendMemory
from kvstore.connectors.blend.moving import mover_of
from kvstore.connectors.blend.passes import RowsPass
from kvstore.connectors.blend.policy import Policy
from kvstore.connectors.blend.prompt import Prompt, assemble
from kvstore.connectors.blend.report import BlendReport, report_of
from kvstore.connectors.blend.sources import Source
from kvstore.connectors.hf_generate import HEADROOM_TOKENS
from kvstore.connectors.hf_spec import check_model, kv_spec
from kvstore.connectors.torch_kv import TorchKV
from kvstore.errors import SpecError, UnsupportedModelError
from kvstore.spec import KVSpec

ATTENTION = ("sdpa", "eager")
"""Attention implementations that take a mask for every row."""


@dataclass(frozen=True, eq=False)
class Blended:
    """A prompt's KV and what follows it.

    Attributes:
        logits: of the last tokens, (logits_tokens, vocabulary).
        cache: an ordinary transformers cache of all tokens, one row, with room for more.
        report: what was computed.
        next_position: in the rotary embedding, of the token that follows. T, unless the policy placed documents side by
            side; then it has to be given as `position_ids` to whatever goes on.
    """

    logits: torch.Tensor
    cache: Cache
    report: BlendReport
    next_position: int


def check_blendable(model: PreTrainedModel) -> KVSpec:
    """The geometry of a model that can be blended on.

    Raises:
        UnsupportedModelError: names what cannot be served and why.
    """
    check_model(model)
    attention = model.config._attn_implementation
    if attention not in ATTENTION:
        raise UnsupportedModelError(
            f"attention implementation {attention!r} takes no mask for every row; load the model with "
            f"attn_implementation={' or '.join(map(repr, ATTENTION))}"
        )
    return kv_spec(model)


@torch.no_grad()
def blend_prefill(
    model: PreTrainedModel,
    ids: Sequence[int] | torch.Tensor,
    sources: Sequence[Source],
    policy: Policy,
    *,
    logits_tokens: int = 1,
    headroom: int = HEADROOM_TOKENS,
) -> Blended:
    """The cache of a prompt, the logits of its last tokens, and a report.

    Args:
        model: a causal language model of a tested family, in eval mode, on one device.
        ids: one prompt, (T,) or (1, T).
        sources: KV of parts of it; they do not overlap.
        policy: chooses what is computed again.
        logits_tokens: last tokens whose logits are wanted; they are computed again if they are reused.
        headroom: tokens expected to follow.

    Raises:
        UnsupportedModelError: the model, its rope or its attention cannot be served; names what and why.
        SpecError: no tokens, more than one prompt, sources that overlap or do not fit.
    """
    spec = check_blendable(model)
    prompt = assemble(prompt_ids(ids), sources, spec.layers)
    room = TorchKV.allocate(spec, 1, prompt.tokens + headroom, model.device)
    logits, report = blend_into(model, spec, prompt, policy, room, logits_tokens=logits_tokens)
    return Blended(logits, room.cache(prompt.tokens), report, int(policy.positions(prompt).max()) + 1)


def prompt_ids(ids: Sequence[int] | torch.Tensor) -> list[int]:
    """Token ids of one prompt. Raises SpecError for a batch."""
    if isinstance(ids, torch.Tensor):
        if ids.dim() > 2 or (ids.dim() == 2 and ids.shape[0] != 1):
            raise SpecError(f"ids have shape {tuple(ids.shape)}; give one prompt here, or a batch to blend_batch")
        return [int(token) for token in ids.flatten().tolist()]
    return list(ids)


def blend_into(
    model: PreTrainedModel, spec: KVSpec, prompt: Prompt, policy: Policy, room: TorchKV, *, logits_tokens: int
) -> tuple[torch.Tensor, BlendReport]:
    """Blend a prompt into one row of room for it; the logits of its last tokens, and a report.

    Raises:
        SpecError: `logits_tokens` is not between 1 and the prompt's tokens.
        UnsupportedModelError: the policy cannot serve a model with sliding windows.
    """
    if policy.split is not None and any(windows(model)):
        raise UnsupportedModelError(
            f"{type(model).__name__} has sliding windows: policy {policy.name!r} places documents side by side, where "
            "a window of positions means nothing; use another policy"
        )
    if not 1 <= logits_tokens <= prompt.tokens:
        raise SpecError(f"logits_tokens is {logits_tokens}; it must be in 1..{prompt.tokens}, the tokens of the prompt")
    positions = policy.positions(prompt)
    memory = BlendMemory(prompt, room, mover_of(model, spec), positions)
    chooser = policy.begin(prompt)
    places = torch.arange(prompt.tokens)
    wanted = places >= prompt.tokens - logits_tokens
    needed = prompt.fresh | wanted
    extra = 0
    if chooser.scouts and bool(prompt.moved.any()):
        scout = RowsPass(model, memory, prompt.ids, positions, attended=chooser.attended, queries=prompt.query)
        scout.run(torch.nonzero(needed | prompt.query)[:, 0])
        stale_before = places >= torch.nonzero(prompt.moved)[0, 0]
        needed &= wanted | stale_before  # the others attended to nothing that will change: they are done
        extra = int((needed | prompt.query).sum())
    rows = needed | (chooser.start() & prompt.moved)
    choices = Choices(chooser, prompt, memory, needed) if chooser.compares else None
    run = RowsPass(model, memory, prompt.ids, positions, computed=choices, context=prompt.moved, split=policy.split)
    logits = run.run(torch.nonzero(rows)[:, 0], logits_tokens=logits_tokens)
    assert logits is not None  # at least one row's are wanted
    return logits, report_of(policy.name, prompt, run.rows_of_layers, extra)
