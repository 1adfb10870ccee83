"""The quality gate: what a lossy codec did to a model's answers, and whether that is good enough to serve.

A lossy codec is used for a model only where a record says that it has been measured on that very model and stayed
within limits. `kvstore gate` (kvstore.connectors.gate) measures and writes records; a connector asks `check`.

A record belongs to one (model fingerprint, codec id, variant, profile id) and holds the numbers of every quality level,
the limits it was judged by, and what was measured on. `judge` is a pure function of numbers and limits, so a record
made by loose limits does not pass a connector that has strict ones. Records are bytes named by their content
(kvstore.record_files) and lie beside the profiles. They are statements, not proofs: whoever may write into the
directory may also write a false one, as he may write false chunks.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Sequence
from typing import Annotated, Literal

import msgspec

from kvstore.codec import Codec
from kvstore.gate_limits import (
    Amount,
    AnswerLimits,
    AnswerMetrics,
    Count,
    Digest,
    Name,
    judge_recall,
    judge_tokens,
    unless,
)
from kvstore.keys import ROOT

LEVELS_MAX = 256


class Limits(AnswerLimits, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a codec level may do to a model: `AnswerLimits`, and of the text that follows the KV of the level.

    Attributes:
        perplexity_change_max_percent: of that text, up or down.
    """

    perplexity_change_max_percent: float


PURPOSES = {
    "strict": Limits(
        kl_max_nats=0.002,
        top1_agreement_min=0.98,
        perplexity_change_max_percent=0.1,
        recall_drop_max_points=0.5,
        scored_tokens_min=4096,
    ),
    "standard": Limits(
        kl_max_nats=0.02,
        top1_agreement_min=0.94,
        perplexity_change_max_percent=1.0,
        recall_drop_max_points=1.0,
        scored_tokens_min=1024,
    ),
    "coarse": Limits(
        kl_max_nats=0.1,
        top1_agreement_min=0.85,
        perplexity_change_max_percent=5.0,
        recall_drop_max_points=3.0,
        scored_tokens_min=1024,
    ),
}
"""Limits by purpose: answers that can hardly be told apart, ordinary serving, drafts and previews."""

STANDARD = PURPOSES["standard"]


class Metrics(AnswerMetrics, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What was measured of one codec level: `AnswerMetrics`, and besides.

    Attributes:
        bits_per_element: container bytes up to this level, header and padding included, over elements of K and V.
        key_error, value_error: |x - x'| / |x| over all layers and tokens.
        attention_error: |o - o'| / |o| of the attention output under the model's own queries, mean over layers.
        loss_full_nats, loss_nats: mean negative log-likelihood with full and with decoded KV.
        loss_change_error_nats: standard error of the difference of the two.
    """

    bits_per_element: Amount
    key_error: Amount
    value_error: Amount
    attention_error: Amount
    loss_full_nats: Amount
    loss_nats: Amount
    loss_change_error_nats: Amount

    @property
    def perplexity_change_percent(self) -> float:
        """How much the perplexity rises (or falls, below 0) with decoded KV."""
        change = self.loss_nats - self.loss_full_nats
        return 100 * math.expm1(min(change, 20.0))


class LevelResult(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The numbers of one quality level, with what failed the record's limits, empty for a pass."""

    level: Annotated[int, msgspec.Meta(ge=0, lt=LEVELS_MAX)]
    metrics: Metrics
    failures: tuple[str, ...] = ()


class GateRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One measurement of one codec on one model; digests in hex.

    Attributes:
        format: of the record.
        fingerprint: of the model, `kvstore.spec.fingerprint`.
        codec, variant, profile: what wrote the chunks; profile zeros for none.
        chunk_tokens: tokens of a chunk.
        text_digest, text_tokens: SHA-256 over the token ids (u32 LE) of all prompts and what followed, and their count.
        seed: of the choice of text and of the recall prompts.
        writer: version of kvstore that measured.
        limits: what the levels were judged by.
        levels: results, lowest level first.
    """

    format: Literal[1] = 1
    fingerprint: Digest
    codec: Annotated[str, msgspec.Meta(min_length=1, max_length=16)]
    variant: Name = ""
    profile: Digest
    chunk_tokens: Annotated[int, msgspec.Meta(ge=1, le=65536)]
    text_digest: Digest
    text_tokens: Count
    seed: Count
    writer: Name
    limits: Limits
    levels: Annotated[tuple[LevelResult, ...], msgspec.Meta(min_length=1, max_length=LEVELS_MAX)]

    def is_of(self, fingerprint: bytes, codec: Codec | Coding) -> bool:
        """Whether the record is of that model and that way of writing."""
        ours = (self.fingerprint, self.codec, self.variant, self.profile)
        return ours == (fingerprint.hex(), codec.id, codec.variant, codec.profile.hex())


class Coding(msgspec.Struct, frozen=True, kw_only=True):
    """A lossy codec by its names, where there is none to call: of a chunk that somebody else has decoded."""

    id: str
    profile: bytes = ROOT
    variant: str = ""
    exact: bool = False


class Verdict(msgspec.Struct, frozen=True):
    """Whether a codec level may be served, and one line that says why not."""

    passed: bool
    reason: str = ""


def judge(metrics: Metrics, limits: Limits) -> tuple[str, ...]:
    """What exceeds its limit, one phrase each; empty for a pass. What is not a number exceeds every limit."""
    change = metrics.perplexity_change_percent
    limit = limits.perplexity_change_max_percent
    return (
        *judge_tokens(metrics, limits),
        *unless(abs(change) <= limit, "perplexity change %", change, "at most", limit),
        *judge_recall(metrics, limits),
    )


def check(
    records: Iterable[GateRecord],
    fingerprint: bytes,
    codec: Codec | Coding,
    level: int,
    limits: Limits = STANDARD,
) -> Verdict:
    """Whether the records let `codec` be served up to `level` for a model, by the caller's limits.

    The record with the most scored tokens decides; where several have as many, all must pass.

    Args:
        records: any, also of other models and codecs.
        fingerprint: of the model.
        codec: an exact one always passes.
        level: the highest level that is decoded.
        limits: what the numbers must keep to, whatever the record was judged by.
    """
    if codec.exact:
        return Verdict(True)
    results = [
        result
        for record in records
        if record.is_of(fingerprint, codec)
        for result in record.levels
        if result.level == level
    ]
    name = f"{describe(codec)} level {level}"
    if not results:
        return Verdict(False, f"{name} is lossy and has not been measured on model {fingerprint.hex()[:12]}")
    return verdict_of(name, [((result.metrics.scored_tokens,), judge(result.metrics, limits)) for result in results])


def verdict_of(name: str, judged: Sequence[tuple[tuple[float, ...], tuple[str, ...]]]) -> Verdict:
    """Whether what has the most evidence passes; where several have as much, all must.

    Args:
        name: what is judged, for the reason.
        judged: how much evidence each measurement is, and what failed of it; at least one.
    """
    most = max(evidence for evidence, _ in judged)
    for evidence, failures in judged:
        if evidence == most and failures:
            return Verdict(False, f"{name} fails the quality gate of this model: {'; '.join(failures)}")
    return Verdict(True)


def describe(codec: Codec | Coding) -> str:
    """A codec's name for messages, with its variant and profile."""
    parts = [codec.variant] if codec.variant else []
    parts += [f"profile {codec.profile.hex()[:12]}"] if codec.profile != ROOT else []
    return f"codec {codec.id!r}" + (f" ({', '.join(parts)})" if parts else "")


def command(codec: Codec, model: str = "MODEL", options: Sequence[str] = ()) -> str:
    """How to measure a codec on a model: a command line, or for a variant, which no flag names, a call.

    Args:
        codec: to be measured.
        model: path of the model, "MODEL" if unknown.
        options: further flags that the record depends on.
    """
    if codec.variant:
        return f"kvstore.connectors.gate.run_gate(model, [codec], text=...), for {describe(codec)} has no flag"
    words = ["kvstore", "gate", "--model", model, *options, "--codecs", codec.id]
    if codec.profile != ROOT:
        words += ["--profile", f"{codec.profile.hex()}.kvprofile"]
    return f"{shlex.join(words)} --text FILE..."
