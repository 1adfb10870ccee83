"""The quality gate of blending: what a recompute policy does to a model's answers, and whether that is good enough.

Blending changes what a model answers, so a connector blends only where a record says that it was measured on that very
model, with that policy and no higher a ratio, and stayed within limits. KV from lossy chunks needs a record of its own
for the codec and level, because two errors add up in ways that neither shows alone; it also carries the error that the
level leaves in each layer, which policies must not take for a change.

`kvstore gate --blend` measures and writes records; they are kept like those of codecs (`kvstore.gate_records`), and are
the same kind of statement.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal

import msgspec

from kvstore.codec import Codec
from kvstore.errors import ConfigError
from kvstore.gate import LEVELS_MAX, NOT_A_NUMBER, Coding, Verdict, describe

_Digest = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
_Name = Annotated[str, msgspec.Meta(max_length=128)]
_Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 48)]
_Amount = Annotated[float, msgspec.Meta(ge=0, le=NOT_A_NUMBER)]
_Share = Annotated[float, msgspec.Meta(ge=0, le=1)]

LAYERS_MAX = 4096
RATIO_SLACK = 1e-9


class BlendLimits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What blending may do to a model.

    Attributes:
        kl_max_nats: mean over tokens of KL(full prefill || blended) of the next token's distribution.
        top1_agreement_min: share of tokens whose likeliest next token stays the same.
        recall_drop_max_points: of the accuracy in percent of questions across documents; applies where it was measured.
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


class BlendMetrics(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What was measured at one ratio; all but recall from the text, or from recall prompts if there was none.

    Attributes:
        scored_tokens: next-token distributions that were compared.
        kl_nats, top1_agreement: as in `BlendLimits`.
        kl_concat_nats: KL of reuse without computing anything again.
        recall_questions: asked; 0 if recall was not measured.
        recall_full, recall, recall_concat: share answered right after a full prefill, blended, and without recompute.
        token_share, layer_share: means of what `BlendReport` says.
    """

    scored_tokens: _Count
    kl_nats: _Amount
    kl_concat_nats: _Amount
    top1_agreement: _Share
    recall_questions: _Count = 0
    recall_full: _Share = 0.0
    recall: _Share = 0.0
    recall_concat: _Share = 0.0
    token_share: _Amount = 0.0
    layer_share: _Amount = 0.0

    @property
    def recall_drop_points(self) -> float:
        """Percentage points of accuracy lost."""
        return 100 * (self.recall_full - self.recall)


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
    fingerprint: _Digest
    policy: Annotated[str, msgspec.Meta(min_length=1, max_length=64)]
    settings: Annotated[str, msgspec.Meta(max_length=4096)]
    ratio: _Share
    codec: Annotated[str, msgspec.Meta(max_length=16)] = ""
    variant: _Name = ""
    profile: _Digest = "0" * 64
    level: Annotated[int, msgspec.Meta(ge=0, lt=LEVELS_MAX)] = 0
    noise: Annotated[tuple[tuple[_Amount, _Amount], ...], msgspec.Meta(max_length=LAYERS_MAX)] = ()
    preamble_tokens: _Count
    passage_tokens: _Count
    text_digest: _Digest
    text_tokens: _Count
    seed: _Count
    writer: _Name
    limits: BlendLimits
    metrics: BlendMetrics
    failures: tuple[str, ...] = ()

    def is_of(self, fingerprint: bytes, policy: str, settings: str, coding: Codec | Coding | None, level: int) -> bool:
        """Whether it is of that model, policy and kind of chunks (None: exact ones)."""
        if (self.fingerprint, self.policy, self.settings) != (fingerprint.hex(), policy, settings):
            return False
        if coding is None or coding.exact:
            return self.codec == ""
        ours = (self.codec, self.variant, self.profile, self.level)
        return ours == (coding.id, coding.variant, coding.profile.hex(), level)


def judge(metrics: BlendMetrics, limits: BlendLimits) -> tuple[str, ...]:
    """What exceeds its limit, one phrase each; empty for a pass."""
    drop = metrics.recall_drop_points
    checks = (
        (metrics.scored_tokens >= limits.scored_tokens_min, "tokens scored", metrics.scored_tokens, "at least",
         limits.scored_tokens_min),
        (metrics.kl_nats <= limits.kl_max_nats, "KL nats", metrics.kl_nats, "at most", limits.kl_max_nats),
        (metrics.top1_agreement >= limits.top1_agreement_min, "top-1 agreement", metrics.top1_agreement, "at least",
         limits.top1_agreement_min),
        (metrics.recall_questions == 0 or drop <= limits.recall_drop_max_points + RATIO_SLACK, "recall drop points",
         drop, "at most", limits.recall_drop_max_points),
    )  # fmt: skip
    return tuple(f"{name} {value:.4g}, {side} {limit:g}" for passed, name, value, side, limit in checks if not passed)


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
    best = max((record.ratio, record.metrics.scored_tokens) for record in found)
    for record in found:
        failures = judge(record.metrics, limits) if (record.ratio, record.metrics.scored_tokens) == best else ()
        if failures:
            return Verdict(False, f"{name} fails the quality gate of this model: {'; '.join(failures)}")
    return Verdict(True)


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
        ours = (record.fingerprint, record.codec, record.variant, record.profile, record.level)
        if record.noise and ours == (fingerprint.hex(), coding.id, coding.variant, coding.profile.hex(), level):
            return record.noise
    return None
