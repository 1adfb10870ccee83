"""Recall prompts for `kvstore gate --recall`: samples of the recall task, one question for every name."""

from __future__ import annotations

import random
from collections.abc import Iterator

from recall_task import EVAL_SPECS, make_sample

SETTINGS = ("bindings_first_2p", "shuffled_4p", "bindings_first_4p_long")

Prompt = tuple[list[int], list[tuple[list[int], list[int]]], list[tuple[int, int]]]


def recall_prompts(seed: int, count: int) -> Iterator[Prompt]:
    """`count` contexts with (question, answer) token ids and the places of their passages, the settings in turn."""
    rng = random.Random(seed)
    for index in range(count):
        sample = make_sample(rng, **EVAL_SPECS[SETTINGS[index % len(SETTINGS)]])
        tokens, context = sample.tokens, sample.context_length
        questions = [(tokens[at - 2 : at], tokens[at : at + 1]) for at in sample.answer_positions]
        yield tokens[:context], questions, sample.boundaries
