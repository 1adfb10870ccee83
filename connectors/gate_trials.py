"""What a model is asked while its KV is replaced: a context, whose KV is coded, and tokens that follow it.

A text becomes trials of one, two and four chunks of context, so that chunks are measured at several positions; the
tokens behind are scored one by one. A recall prompt becomes a context and its questions, each asked as if it were the
only one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import msgspec
import numpy as np
import torch

from kvstore.errors import ConfigError
from kvstore.keys import token_array

CONTEXT_CHUNKS = (1, 2, 4)


class Trial(msgspec.Struct, frozen=True, eq=False):
    """One prompt.

    Attributes:
        context: tokens whose KV is coded, (1, C).
        tokens: what is fed behind it, (1, T).
        scored: indices into T whose next-token distribution is compared, (n,).
        targets: the token that really came next, (n,).
        answers: (start, stop) in `scored` of every answer, which is right if all its tokens are; none for text.
        positions: of the tokens fed, (1, T); None for C, C+1, ...
        visible: which of C + T tokens each fed token sees, bool (1, 1, T, C + T); None for all before it.
    """

    context: torch.Tensor
    tokens: torch.Tensor
    scored: torch.Tensor
    targets: torch.Tensor
    answers: tuple[tuple[int, int], ...] = ()
    positions: torch.Tensor | None = None
    visible: torch.Tensor | None = None

    @property
    def context_tokens(self) -> int:
        """C."""
        return self.context.shape[1]


class Question(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Tokens asked behind a context, and the tokens of the one right answer."""

    question: tuple[int, ...]
    answer: tuple[int, ...]


class RecallPrompt(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A context and its questions, as token ids; where the context has passages, (start, stop) of each, if it says."""

    context: tuple[int, ...]
    questions: tuple[Question, ...]
    passages: tuple[tuple[int, int], ...] = ()


def text_trials(
    ids: Sequence[int],
    *,
    start: Sequence[int],
    tokens_max: int,
    chunk_tokens: int,
    following: int,
    seed: int,
    positions_max: int,
    vocabulary: int,
) -> list[Trial]:
    """Trials from non-overlapping pieces of a text, of at most `tokens_max` tokens together.

    Args:
        ids: the text.
        start: what every prompt of the model begins with (its BOS token), counted as context.
        tokens_max: bound on the tokens of all trials.
        chunk_tokens: tokens of a chunk; contexts are 1, 2 and 4 chunks, in turn, as far as the model reaches.
        following: tokens scored behind each context.
        seed: places the pieces in the text.
        positions_max: tokens that the model was made for.
        vocabulary: token ids of the model.

    Raises:
        ConfigError: the text, the bound, or what the model was made for, is too short for one trial; or an id is no
            token's.
    """
    if max(ids, default=0) >= vocabulary:
        raise ConfigError(
            f"--text has token id {max(ids)}, the model {vocabulary} tokens: the tokenizer is another model's"
        )
    contexts = [chunks for chunks in CONTEXT_CHUNKS if chunks * chunk_tokens + following <= positions_max]
    if not contexts:
        raise ConfigError(
            f"the model was made for {positions_max} tokens; one chunk and what follows are "
            f"{chunk_tokens + following}: lower --chunk-tokens or --following"
        )
    tail = following + 1 - len(start)
    sizes: list[int] = []
    total = 0
    while True:
        chunks = contexts[len(sizes) % len(contexts)]
        size = chunks * chunk_tokens + tail
        if total + size > min(tokens_max, len(ids)):
            break
        sizes.append(size)
        total += size
    if not sizes:
        raise ConfigError(
            f"--text gives {len(ids)} tokens and --tokens allows {tokens_max}; "
            f"one chunk and what follows take {chunk_tokens + tail}: give more of both, or lower --chunk-tokens"
        )
    generator = np.random.default_rng(seed)
    gaps = np.sort(generator.integers(0, len(ids) - total + 1, len(sizes)))
    trials = []
    done = 0
    for size, gap in zip(sizes, gaps.tolist(), strict=True):
        piece = torch.tensor([*start, *ids[gap + done : gap + done + size]], dtype=torch.long)
        done += size
        context = len(piece) - following - 1
        trials.append(
            Trial(
                context=piece[None, :context],
                tokens=piece[None, context:-1],
                scored=torch.arange(following),
                targets=piece[context + 1 :],
            )
        )
    return trials


def recall_trials(prompts: Iterable[RecallPrompt], *, together: bool, vocabulary: int) -> list[Trial]:
    """Trials from recall prompts.

    Args:
        prompts: contexts with questions.
        together: ask all questions of a context in one pass that hides them from each other; else one trial each, for
            models whose layers do not all take one mask.
        vocabulary: token ids of the model.

    Raises:
        ConfigError: a prompt has no context or question, an empty question or answer, or an id that is no token's.
    """
    trials = []
    for index, prompt in enumerate(prompts):
        if not prompt.context or not prompt.questions:
            raise ConfigError(f"recall prompt {index} has no context or no question")
        if not all(question.question and question.answer for question in prompt.questions):
            raise ConfigError(f"recall prompt {index} has an empty question or answer")
        ids = [*prompt.context, *(id for own in prompt.questions for id in (*own.question, *own.answer))]
        if not 0 <= min(ids) <= max(ids) < vocabulary:
            raise ConfigError(
                f"recall prompt {index} has a token id outside 0..{vocabulary - 1}, the model's vocabulary"
            )
        sets = [prompt.questions] if together else [(question,) for question in prompt.questions]
        trials += [_recall_trial(prompt.context, questions) for questions in sets]
    return trials


def _recall_trial(context: Sequence[int], questions: Sequence[Question]) -> Trial:
    tokens: list[int] = []
    positions: list[int] = []
    owner: list[int] = []
    scored: list[int] = []
    targets: list[int] = []
    answers: list[tuple[int, int]] = []
    for index, own in enumerate(questions):
        fed = [*own.question, *own.answer[:-1]]
        first = len(tokens) + len(own.question) - 1
        answers.append((len(scored), len(scored) + len(own.answer)))
        scored += range(first, first + len(own.answer))
        targets += own.answer
        positions += range(len(context), len(context) + len(fed))
        owner += [index] * len(fed)
        tokens += fed
    owners = torch.tensor(owner)
    visible = None
    if len(questions) > 1:
        own_question = (owners[:, None] == owners[None, :]).tril()
        visible = torch.cat([torch.ones(len(tokens), len(context), dtype=torch.bool), own_question], dim=1)[None, None]
    return Trial(
        context=torch.tensor([context], dtype=torch.long),
        tokens=torch.tensor([tokens], dtype=torch.long),
        scored=torch.tensor(scored),
        targets=torch.tensor(targets),
        answers=tuple(answers),
        positions=torch.tensor([positions]),
        visible=visible,
    )


def digest(trials: Iterable[Trial]) -> tuple[str, int]:
    """SHA-256 in hex over all tokens of the trials in order, as u32 LE, and how many there are."""
    sha = hashlib.sha256()
    count = 0
    for trial in trials:
        for part in (trial.context[0], trial.tokens[0], trial.targets):
            sha.update(token_array(part.numpy()).tobytes())
            count += len(part)
    return sha.hexdigest(), count
