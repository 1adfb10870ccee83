"""The quality gate of blending: what a recompute policy does to a model's answers, and whether that is good enough.

Blending changes what a model answers, so a connector blends only where a record says that it was measured on that very
model, with that policy and no higher a ratio, and stayed within limits. KV from lossy chunks needs a record of its own
for the codec and level, because two errors add up in ways that neither shows alone; it also carries the error that the
level leaves in each layer, which policies must not take for a change.

`kvstore gate --blend` measures and writes records; they are kept like those of codecs (`kvstore.record_files`), and are
the same kind of statement.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal

import msgspec

from kvstore.codec import Codec
from kvstore.gate import LEVELS_MAX, Coding, Verdict, describe, verdict_of
from kvstore.gate_limits import (
    Amount,
    AnswerLimits,
    AnswerMetrics,
    Count,
    Digest,
    Name,
    Share,
    judge_recall,
    judge_tokens,
)

LAYERS_MAX = 4096
RATIO_SLACK = 1e-9


class BlendLimits(AnswerLimits, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What blending may do to a model: exact is a full prefill, and recall is asked across documents."""


PURPOSES = {
    "strict": BlendLimits(
        kl_max_nats=0.01,
        top1_agreement_min=0.97,
        recall_drop_max_points=1.0,
        scored_tokens_min=2048,
    ),
    "standard": BlendLimits(
        kl_max_nats=0.05,
        top1_agreement_min=0.93,
        recall_drop_max_points=2.0,
        scored_tokens_min=512,
    ),
    "coarse": BlendLimits(
        kl_max_nats=0.2,
        top1_agreement_min=0.85,
        recall_drop_max_points=5.0,
        scored_tokens_min=512,
    ),
}
"""Limits by purpose: answers that can hardly be told apart, ordinary serving, drafts."""

STANDARD = PURPOSES["standard"]


class BlendMetrics(AnswerMetrics, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What was measured at one ratio: `AnswerMetrics`, and besides.

    Attributes:
        kl_concat_nats: KL of reuse without computing anything again.
        recall_concat: share answered right without computing anything again.
        token_share, layer_share: means of what `BlendReport` says.
    """

    kl_concat_nats: Amount
    recall_concat: Share = 0.0
    token_share: Amount = 0.0
    layer_share: Amount = 0.0


class BlendRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One measurement of one policy at one ratio on one model; digests in hex.

    Attributes:
        format: of the record.
        fingerprint: of the model.
        policy, settings: name, and the other settings as canonical JSON, of the recompute policy.
        ratio: share of the reused tokens that it computes again.
        codec, variant, profile, level: of the chunks; codec "" stands for all exact ones.
        noise: mean squared error of an element of K and of V that the level leaves, for each layer; none if exact.
        preamble_tokens: that documents were computed behind.
        passage_tokens: of a document of the text; 0 if there was no text.
        text_digest, text_tokens: SHA-256 over the token ids (u32 LE) of all prompts, and their count.
        seed: of the choice of text and prompts.
        writer: version of kvstore that measured.
        limits: what the metrics were judged by.
        metrics: the numbers.
        failures: what failed the limits, empty for a pass.
    """

    format: Literal[1] = 1
    fingerprint: Digest
    policy: Annotated[str, msgspec.Meta(min_length=1, max_length=64)]
    settings: Annotated[str, msgspec.Meta(max_length=4096)]
    ratio: Share
    codec: Annotated[str, msgspec.Meta(max_length=16)] = ""
    variant: Name = ""
    profile: Digest = "0" * 64
    level: Annotated[int, msgspec.Meta(ge=0, lt=LEVELS_MAX)] = 0
    noise: Annotated[tuple[tuple[Amount, Amount], ...], msgspec.Meta(max_length=LAYERS_MAX)] = ()
    preamble_tokens: Count
    passage_tokens: Count
    text_digest: Digest
    text_tokens: Count
    seed: Count
    writer: Name
    limits: BlendLimits
    metrics: BlendMetrics
    failures: tuple[str, ...] = ()

    def is_of(self, fingerprint: bytes, policy: str, settings: str, coding: Codec | Coding | None, level: int) -> bool:
        """Whether it is of that model, policy and kind of chunks (None: exact ones)."""
        if (self.fingerprint, self.policy, self.settings) != (fingerprint.hex(), policy, settings):
            return False
        return self.codec == "" if coding is None or coding.exact else self.is_from(coding, level)

    def is_from(self, coding: Codec | Coding, level: int) -> bool:
        """Whether it was measured on chunks of that lossy codec, decoded up to that level."""
        ours = (self.codec, self.variant, self.profile, self.level)
        return ours == (coding.id, coding.variant, coding.profile.hex(), level)


def judge(metrics: BlendMetrics, limits: BlendLimits) -> tuple[str, ...]:
    """What exceeds its limit, one phrase each; empty for a pass."""
    return (*judge_tokens(metrics, limits), *judge_recall(metrics, limits, slack_points=RATIO_SLACK))


def check(
    records: Iterable[BlendRecord],
    fingerprint: bytes,
    policy: str,
    settings: str,
    ratio: float,
    *,
    coding: Codec | Coding | None = None,
    level: int = 0,
    limits: BlendLimits = STANDARD,
) -> Verdict:
    """Whether the records let a policy blend at a ratio, by the caller's limits.

    The records of the highest ratio that is not above this one decide, of these the ones with the most scored tokens;
    where several have as many, all must pass. More recompute than was measured is taken to be no worse: at ratio 1 it
    is a full prefill.
    """
    name = f"blending with policy {policy!r} at ratio {ratio:g}"
    if coding is not None and not coding.exact:
        name += f" from {describe(coding)} level {level}"
    found = [
        record
        for record in records
        if record.is_of(fingerprint, policy, settings, coding, level) and record.ratio <= ratio + RATIO_SLACK
    ]
    if not found:
        return Verdict(False, f"{name} has not been measured on model {fingerprint.hex()[:12]}")
    return verdict_of(name, [((own.ratio, own.metrics.scored_tokens), judge(own.metrics, limits)) for own in found])


def lowest_ratio(
    records: Iterable[BlendRecord], fingerprint: bytes, policy: str, settings: str, ratio: float, limits: BlendLimits
) -> float:
    """The lowest ratio not above `ratio` from which on every measured one passes with exact chunks."""
    known = list(records)
    ratios = sorted({own.ratio for own in known if own.is_of(fingerprint, policy, settings, None, 0)}, reverse=True)
    lowest = ratio
    for own in (value for value in ratios if value <= ratio + RATIO_SLACK):
        if not check(known, fingerprint, policy, settings, own, limits=limits).passed:
            break
        lowest = min(lowest, own)
    return lowest


def noise_of(
    records: Iterable[BlendRecord], fingerprint: bytes, coding: Codec, level: int
) -> tuple[tuple[float, float], ...] | None:
    """The error that a codec's level leaves in each layer of a model, None for an exact codec or one not measured."""
    if coding.exact:
        return None
    for record in records:
        if record.noise and record.fingerprint == fingerprint.hex() and record.is_from(coding, level):
            return record.noise
    return None
