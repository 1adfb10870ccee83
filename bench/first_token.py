"""Generation with the time to first token taken on the way."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import msgspec
import torch
from transformers import LogitsProcessor, LogitsProcessorList


class Generated(msgspec.Struct, frozen=True):
    """New tokens of one prompt, seconds until the first one's logits, and what else the run answered."""

    tokens: list[int]
    ttft_seconds: float
    extra: Any = None


class _FirstTokenClock(LogitsProcessor):
    def __init__(self) -> None:
        self.at: float | None = None

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if self.at is None:
            self.at = time.perf_counter()
        return scores


def generate(run: Callable[..., Any], input_ids: torch.Tensor, new_tokens: int) -> Generated:
    """Greedy tokens of one prompt through `run`, which is `model.generate` or a connector's `generate`."""
    clock = _FirstTokenClock()
    started = time.perf_counter()
    answer = run(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        logits_processor=LogitsProcessorList([clock]),
    )
    sequences, extra = answer if isinstance(answer, tuple) else (answer, None)
    assert clock.at is not None
    return Generated(sequences[0, input_ids.shape[1] :].tolist(), clock.at - started, extra)
