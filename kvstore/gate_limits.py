"""What both quality gates measure of a model's answers, the limits on it, and what exceeds them.

The gate of codecs (kvstore.gate) and that of blending (kvstore.blend_gate) compare answers with those of an exact
prefill in the same way, and each measures more of its own. Numbers and limits are parts of records, which refuse what
is not finite or out of range.
"""

from __future__ import annotations

import math
from typing import Annotated

import msgspec

from kvstore.errors import ConfigError

NOT_A_NUMBER = 1e9
"""What is recorded for a measurement that is infinite or not a number; within no limit."""

Digest = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
Name = Annotated[str, msgspec.Meta(max_length=128)]
Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 48)]
Amount = Annotated[float, msgspec.Meta(ge=0, le=NOT_A_NUMBER)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]


class AnswerLimits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What may happen to a model's answers.

    Attributes:
        kl_max_nats: mean over tokens of KL(exact || what is judged) of the next token's distribution.
        top1_agreement_min: share of tokens whose likeliest next token stays the same.
        recall_drop_max_points: of the recall accuracy in percent; applies where recall has been measured.
        scored_tokens_min: fewer tokens than this are no evidence.

    Raises:
        ConfigError: a limit is out of range.
    """

    kl_max_nats: float
    top1_agreement_min: float
    recall_drop_max_points: float
    scored_tokens_min: int

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            high = 1.0 if name == "top1_agreement_min" else NOT_A_NUMBER / 10
            if not 0 <= getattr(self, name) <= high:
                raise ConfigError(f"limit {name} is {getattr(self, name)}; it must be in 0..{high:g}")


class AnswerMetrics(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a model's answers compare; all but recall from the text, or from recall prompts if there was none.

    Attributes:
        scored_tokens: next-token distributions that were compared.
        kl_nats, top1_agreement: as in `AnswerLimits`.
        recall_questions: questions asked; 0 if recall was not measured.
        recall_full, recall: share answered right with exact KV, and with what is judged.
    """

    scored_tokens: Count
    kl_nats: Amount
    top1_agreement: Share
    recall_questions: Count = 0
    recall_full: Share = 0.0
    recall: Share = 0.0

    @property
    def recall_drop_points(self) -> float:
        """Percentage points of recall accuracy lost."""
        return 100 * (self.recall_full - self.recall)


def judge_tokens(metrics: AnswerMetrics, limits: AnswerLimits) -> tuple[str, ...]:
    """What exceeds its limit token for token, one phrase each. What is not a number exceeds every limit."""
    tokens, kl, agreement = metrics.scored_tokens, metrics.kl_nats, metrics.top1_agreement
    return (
        *unless(tokens >= limits.scored_tokens_min, "tokens scored", tokens, "at least", limits.scored_tokens_min),
        *unless(kl <= limits.kl_max_nats, "KL nats", kl, "at most", limits.kl_max_nats),
        *unless(
            agreement >= limits.top1_agreement_min, "top-1 agreement", agreement, "at least", limits.top1_agreement_min
        ),
    )


def judge_recall(metrics: AnswerMetrics, limits: AnswerLimits, *, slack_points: float = 0.0) -> tuple[str, ...]:
    """The phrase for a loss of recall beyond its limit by more than `slack_points`; none where it was not measured."""
    drop, limit = metrics.recall_drop_points, limits.recall_drop_max_points
    within = metrics.recall_questions == 0 or drop <= limit + slack_points
    return unless(within, "recall drop points", drop, "at most", limit)


def unless(passed: bool, name: str, value: float, side: str, limit: float) -> tuple[str, ...]:
    """One phrase that says what a number is and should be, or none if it passed."""
    return () if passed else (f"{name} {value:.4g}, {side} {limit:g}",)


def number(value: float) -> float:
    """A measurement as a record holds it: finite, and not negative."""
    return min(max(value, 0.0), NOT_A_NUMBER) if math.isfinite(value) else NOT_A_NUMBER
