"""The quality gate: what a lossy codec did to a model's answers, and whether that is good enough to serve.

A lossy codec is used for a model only where a record says that it has been measured on that very model and stayed
within limits. `kvstore gate` (kvstore.connectors.gate) measures and writes records; a connector asks `check`.

A record belongs to one (model fingerprint, codec id, variant, profile id) and holds the numbers of every quality level,
the limits it was judged by, and what was measured on. `judge` is a pure function of numbers and limits, so a record
made by loose limits does not pass a connector that has strict ones. Records are bytes named by their content
(kvstore.gate_records) and lie beside the profiles. They are statements, not proofs: whoever may write into the
directory may also write a false one, as he may write false chunks.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Sequence
from typing import Annotated, Literal

import msgspec

from kvstore.codec import Codec
from kvstore.errors import ConfigError
from kvstore.keys import ROOT

NOT_A_NUMBER = 1e9
"""What is recorded for a measurement that is infinite or not a number; within no limit."""

LEVELS_MAX = 256

_Digest = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
_Name = Annotated[str, msgspec.Meta(max_length=128)]
_Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 48)]
_Amount = Annotated[float, msgspec.Meta(ge=0, le=NOT_A_NUMBER)]
_Share = Annotated[float, msgspec.Meta(ge=0, le=1)]


class Limits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a codec level may do to a model.

    Attributes:
        kl_max_nats: mean over tokens of KL(with full KV || with decoded KV) of the next token's distribution.
        top1_agreement_min: share of tokens whose likeliest next token stays the same.
        perplexity_change_max_percent: of the text that follows, up or down.
        recall_drop_max_points: of the recall accuracy in percent; applies where recall has been measured.
        scored_tokens_min: fewer tokens than this are no evidence.

    Raises:
        ConfigError: a limit is out of range.
    """

    kl_max_nats: float
    top1_agreement_min: float
    perplexity_change_max_percent: float
    recall_drop_max_points: float
    scored_tokens_min: int

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            high = 1.0 if name == "top1_agreement_min" else NOT_A_NUMBER / 10
            if not 0 <= getattr(self, name) <= high:
                raise ConfigError(f"limit {name} is {getattr(self, name)}; it must be in 0..{high:g}")


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


class Metrics(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What was measured of one codec level; all but recall from the text, or from recall prompts if there was none.

    Attributes:
        bits_per_element: container bytes up to this level, header and padding included, over elements of K and V.
        key_error, value_error: |x - x'| / |x| over all layers and tokens.
        attention_error: |o - o'| / |o| of the attention output under the model's own queries, mean over layers.
        scored_tokens: next-token distributions that were compared.
        kl_nats, top1_agreement: as in `Limits`.
        loss_full_nats, loss_nats: mean negative log-likelihood with full and with decoded KV.
        loss_change_error_nats: standard error of the difference of the two.
        recall_questions: questions asked; 0 if recall was not measured.
        recall_full, recall: share answered right with full and with decoded KV.
    """

    bits_per_element: _Amount
    key_error: _Amount
    value_error: _Amount
    attention_error: _Amount
    scored_tokens: _Count
    kl_nats: _Amount
    top1_agreement: _Share
    loss_full_nats: _Amount
    loss_nats: _Amount
    loss_change_error_nats: _Amount
    recall_questions: _Count = 0
    recall_full: _Share = 0.0
    recall: _Share = 0.0

    @property
    def perplexity_change_percent(self) -> float:
        """How much the perplexity rises (or falls, below 0) with decoded KV."""
        change = self.loss_nats - self.loss_full_nats
        return 100 * math.expm1(min(change, 20.0))

    @property
    def recall_drop_points(self) -> float:
        """Percentage points of recall accuracy lost."""
        return 100 * (self.recall_full - self.recall)


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
    fingerprint: _Digest
    codec: Annotated[str, msgspec.Meta(min_length=1, max_length=16)]
    variant: _Name = ""
    profile: _Digest
    chunk_tokens: Annotated[int, msgspec.Meta(ge=1, le=65536)]
    text_digest: _Digest
    text_tokens: _Count
    seed: _Count
    writer: _Name
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
    change, drop = metrics.perplexity_change_percent, metrics.recall_drop_points
    checks = (
        (metrics.scored_tokens >= limits.scored_tokens_min, "tokens scored", metrics.scored_tokens, "at least",
         limits.scored_tokens_min),
        (metrics.kl_nats <= limits.kl_max_nats, "KL nats", metrics.kl_nats, "at most", limits.kl_max_nats),
        (metrics.top1_agreement >= limits.top1_agreement_min, "top-1 agreement", metrics.top1_agreement, "at least",
         limits.top1_agreement_min),
        (abs(change) <= limits.perplexity_change_max_percent, "perplexity change %", change, "at most",
         limits.perplexity_change_max_percent),
        (metrics.recall_questions == 0 or drop <= limits.recall_drop_max_points, "recall drop points", drop, "at most",
         limits.recall_drop_max_points),
    )  # fmt: skip
    return tuple(f"{name} {value:.4g}, {side} {limit:g}" for passed, name, value, side, limit in checks if not passed)


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
    most = max(result.metrics.scored_tokens for result in results)
    for result in results:
        failures = judge(result.metrics, limits) if result.metrics.scored_tokens == most else ()
        if failures:
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


def number(value: float) -> float:
    """A measurement as a record holds it: finite, and not negative."""
    return min(max(value, 0.0), NOT_A_NUMBER) if math.isfinite(value) else NOT_A_NUMBER
