"""Prompts of documents for the blend gate: text cut into passages, and questions whose answers lie across passages."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import msgspec
import numpy as np

from kvstore.connectors.gate_trials import RecallPrompt
from kvstore.errors import ConfigError
from kvstore.keys import token_array


class BlendTrial(msgspec.Struct, frozen=True, eq=False):
    """One prompt, and what really follows it.

    Attributes:
        ids: the prompt; its last tokens, behind all documents, are the query.
        documents: (start, stop) of each in it, in order.
        following: tokens scored behind it; at least one.
        asks: whether they are the answer to a question.
    """

    ids: list[int]
    documents: tuple[tuple[int, int], ...]
    following: list[int]
    asks: bool = False


def passage_trials(
    ids: Sequence[int],
    *,
    preamble: Sequence[int],
    tokens_max: int,
    passages: int,
    passage_tokens: int,
    query_tokens: int,
    following: int,
    seed: int,
    positions_max: int,
    vocabulary: int,
) -> list[BlendTrial]:
    """Trials from non-overlapping pieces of a text, of at most `tokens_max` tokens together.

    Every trial is the preamble, `passages` consecutive passages of the text, `query_tokens` more, and what follows.

    Args:
        ids: the text.
        preamble: what documents are computed behind, and every prompt begins with.
        tokens_max: bound on the tokens of all trials.
        passages: documents of a prompt.
        passage_tokens: tokens of each.
        query_tokens: tokens of the text behind the last passage that belong to the prompt.
        following: tokens scored behind the prompt.
        seed: places the pieces in the text.
        positions_max: tokens that the model was made for.
        vocabulary: token ids of the model.

    Raises:
        ConfigError: the text, the bound, or what the model was made for, is too short; an id is no token's.
    """
    size = passages * passage_tokens + query_tokens + following
    if max(ids, default=0) >= vocabulary:
        raise ConfigError(
            f"--text has token id {max(ids)}, the model {vocabulary} tokens: the tokenizer is another model's"
        )
    if len(preamble) + size > positions_max:
        raise ConfigError(
            f"the model was made for {positions_max} tokens; a prompt and what follows are {len(preamble) + size}: "
            "lower --passages, --passage-tokens or --following"
        )
    count = min(tokens_max, len(ids)) // size
    if not count:
        raise ConfigError(
            f"--text gives {len(ids)} tokens and --tokens allows {tokens_max}; one prompt takes {size}: give more of "
            "both, or lower --passages or --passage-tokens"
        )
    gaps = np.sort(np.random.default_rng(seed).integers(0, len(ids) - count * size + 1, count))
    trials = []
    for index, gap in enumerate(gaps.tolist()):
        piece = list(ids[gap + index * size : gap + (index + 1) * size])
        prompt = [*preamble, *piece[: size - following]]
        starts = [len(preamble) + number * passage_tokens for number in range(passages)]
        trials.append(
            BlendTrial(prompt, tuple((start, start + passage_tokens) for start in starts), piece[size - following :])
        )
    return trials


def question_trials(prompts: Iterable[RecallPrompt], *, positions_max: int, vocabulary: int) -> list[BlendTrial]:
    """A trial for every question of recall prompts that say where their passages are.

    Raises:
        ConfigError: a prompt has no passages or questions, passages that are empty, overlap or do not fit, an empty
            question or answer, an id that is no token's, or more tokens than the model was made for.
    """
    trials = []
    for index, prompt in enumerate(prompts):
        problem = _problem(prompt, positions_max, vocabulary)
        if problem:
            raise ConfigError(f"recall prompt {index} {problem}")
        trials += [
            BlendTrial([*prompt.context, *own.question], prompt.passages, list(own.answer), asks=True)
            for own in prompt.questions
        ]
    return trials


def _problem(prompt: RecallPrompt, positions_max: int, vocabulary: int) -> str:
    """Why a recall prompt cannot be used, "" if it can."""
    end = 0
    for start, stop in prompt.passages:
        if not end <= start < stop <= len(prompt.context):
            return f"has passages that are empty, overlap or end behind the context ({start}..{stop})"
        end = stop
    if not prompt.passages or not prompt.questions:
        return 'has no passages or no questions; "passages" are [start, stop] pairs in the context'
    if not all(own.question and own.answer for own in prompt.questions):
        return "has an empty question or answer"
    ids = [*prompt.context, *(id for own in prompt.questions for id in (*own.question, *own.answer))]
    if not 0 <= min(ids) <= max(ids) < vocabulary:
        return f"has a token id outside 0..{vocabulary - 1}, the model's vocabulary"
    longest = len(prompt.context) + max(len(own.question) + len(own.answer) for own in prompt.questions)
    return f"has {longest} tokens, the model was made for {positions_max}" if longest > positions_max else ""


def digest(trials: Iterable[BlendTrial]) -> tuple[str, int]:
    """SHA-256 in hex over all tokens of the trials in order, as u32 LE, and how many there are."""
    sha = hashlib.sha256()
    count = 0
    for trial in trials:
        for part in (trial.ids, trial.following):
            sha.update(token_array(part).tobytes())
            count += len(part)
    return sha.hexdigest(), count
