"""A blended prefill of the beginning of a prompt on a model that vLLM has loaded: K and V of its tokens.

As `kvstore.connectors.blend.engine`, with its policies, masks and memory. The difference is the end: what follows the
last reused token is left to vLLM, which has yet to compute it anyway. A policy that looks at what the query attends to
gets the query run beforehand, over the reused KV; that run's KV is forgotten.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvstore.connectors.blend.choices import Choices
from kvstore.connectors.blend.memory import BlendMemory
from kvstore.connectors.blend.moving import KeyMover
from kvstore.connectors.blend.policy import Policy
from kvstore.connectors.blend.prompt import assemble
from kvstore.connectors.blend.report import BlendReport, report_of
from kvstore.connectors.blend.sources import Source
from kvstore.connectors.torch_kv import TorchKV
from kvstore.connectors.vllm.blend_model import RowsModel
from kvstore.connectors.vllm.blend_rows import RowsRun


@torch.inference_mode()
def blend_beginning(
    model: RowsModel,
    room: TorchKV,
    ids: Sequence[int],
    stop: int,
    sources: Sequence[Source],
    policy: Policy,
    deadline: float,
) -> BlendReport:
    """Fill the first `stop` tokens of `room` with the KV of a prompt, reused or computed, and say what was done.

    Args:
        model: loaded by vLLM.
        room: one row with room for all of the prompt; what is behind `stop` afterwards is of no meaning.
        ids: the prompt, (T,).
        stop: tokens wanted, of 1..T; no source reaches beyond it.
        sources: KV of parts of them, which do not overlap.
        policy: chooses what is computed again; leaves every token at the position of its place.
        deadline: time.monotonic() seconds.

    Raises:
        SpecError: sources that do not fit.
        TooLateError: the deadline has passed.
    """
    prompt = assemble(ids, sources, room.spec.layers)
    places = torch.arange(prompt.tokens)
    memory = BlendMemory(prompt, room, KeyMover(room.spec), places)
    chooser = policy.begin(prompt)
    needed = prompt.fresh & (places < stop)
    extra = 0
    if chooser.scouts and bool(prompt.moved.any()):
        scouting = prompt.fresh | prompt.query
        RowsRun(model, memory, prompt.ids, deadline, attended=chooser.attended, queries=prompt.query).run(
            torch.nonzero(scouting)[:, 0]
        )
        needed &= places >= int(torch.nonzero(prompt.moved)[0, 0])  # nothing stale stands before the others: done
        extra = int(scouting.sum())
    chosen = chooser.start() & prompt.moved
    choices = Choices(chooser, prompt, memory, needed) if chooser.compares else None
    run = RowsRun(model, memory, prompt.ids, deadline, computed=choices)
    run.run(torch.nonzero(needed | chosen)[:, 0])
    return report_of(policy.name, prompt, run.rows_of_layers, extra)
