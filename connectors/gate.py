"""The quality gate's measurement: what codecs do to a model's next tokens, attention and recall.

    report = run_gate(model, [registry.get("ladder", profile_id)], text=text_trials(...), recall=recall_trials(...))
    for record in report.records: kvstore.gate_records.save(record, directory)

For every trial the context's KV is computed once, coded and decoded chunk by chunk as a connector would, and what
follows is run on the full and on the decoded KV. Everything but recall is measured on the text; without text, on the
recall prompts. The result is a function of model, codecs, trials and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec
import numpy as np
from transformers import PreTrainedModel

import kvstore
from kvstore.codec import Codec
from kvstore.connectors.gate_measure import Measurement, levels_of
from kvstore.connectors.gate_tally import Tally
from kvstore.connectors.gate_trials import Trial, digest
from kvstore.connectors.model_identity import identify
from kvstore.errors import CodecError, ConfigError
from kvstore.gate import STANDARD, GateRecord, LevelResult, Limits, judge
from kvstore.keys import DEFAULT_CHUNK_TOKENS
from kvstore.spec import KVSpec

Progress = Callable[[int, int], None]
"""Called with trials done and trials in all."""


class LevelReport(msgspec.Struct, frozen=True, kw_only=True):
    """One codec level, for people and JSON: the record's numbers, what follows from them, and each layer's errors."""

    codec: str
    variant: str
    profile: str
    exact: bool
    level: int
    result: LevelResult
    perplexity_full: float
    perplexity_change_percent: float
    recall_drop_points: float
    layers: list[dict[str, float]]


class GateReport(msgspec.Struct, frozen=True, kw_only=True):
    """All that a run found. `records` are those of the lossy codecs."""

    fingerprint: str
    chunk_tokens: int
    text_trials: int
    recall_trials: int
    levels: list[LevelReport]
    records: list[GateRecord]

    @property
    def refused(self) -> list[str]:
        """Codecs of which no level passed."""
        passed = {(own.codec, own.variant, own.profile) for own in self.levels if not own.result.failures}
        return sorted({own.codec for own in self.levels if (own.codec, own.variant, own.profile) not in passed})


def run_gate(
    model: PreTrainedModel,
    codecs: Sequence[Codec],
    *,
    text: Sequence[Trial] = (),
    recall: Sequence[Trial] = (),
    limits: Limits = STANDARD,
    chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
    seed: int = 0,
    progress: Progress = lambda done, total: None,
) -> GateReport:
    """Measure codecs on a model and judge every level.

    Args:
        model: as the connector serves it: same weights, dtype and device class.
        codecs: exact ones are measured too and get no record.
        text: trials of held-out text, `gate_trials.text_trials`.
        recall: trials of recall prompts, `gate_trials.recall_trials`.
        limits: what levels are judged by.
        chunk_tokens: tokens of a chunk.
        seed: what the trials were made with; goes into the record.
        progress: is told after every trial.

    Raises:
        UnsupportedModelError: the model is none that the connector serves, or its attention cannot be observed.
        ConfigError: there are no codecs or no trials.
        CodecError: a codec cannot serve the model.
        KVStoreError: a codec failed on what it wrote itself.
    """
    if not codecs or not (text or recall):
        raise ConfigError("the gate needs at least one codec and one trial, of text or of recall")
    spec, fingerprint = identify(model)
    slots = _slots(codecs, spec, chunk_tokens)
    on_text, on_recall = ({slot: Tally(spec.layers) for slot in slots} for _ in range(2))
    measurement = Measurement(model, spec, fingerprint, chunk_tokens)
    total = len(text) + len(recall)
    for index, trial in enumerate((*text, *recall)):
        measurement.run(trial, codecs, on_text if index < len(text) else on_recall)
        progress(index + 1, total)
    used = digest((*text, *recall))
    reports: list[LevelReport] = []
    records: list[GateRecord] = []
    for at, codec in enumerate(codecs):
        own = []
        for slot in (slot for slot in slots if slot[0] == at):
            main = on_text[slot] if text else on_recall[slot]
            metrics = main.metrics(on_recall[slot])
            own.append(LevelResult(slot[1], metrics, judge(metrics, limits)))
            reports.append(_level_report(codec, own[-1], main))
        if not codec.exact:
            records.append(_record(codec, fingerprint, own, limits, chunk_tokens, used, seed))
    return GateReport(
        fingerprint=fingerprint.hex(),
        chunk_tokens=chunk_tokens,
        text_trials=len(text),
        recall_trials=len(recall),
        levels=reports,
        records=records,
    )


def _record(
    codec: Codec,
    fingerprint: bytes,
    levels: Sequence[LevelResult],
    limits: Limits,
    chunk_tokens: int,
    used: tuple[str, int],
    seed: int,
) -> GateRecord:
    """The record of one codec; `used` is the digest and the count of the tokens of all trials."""
    return GateRecord(
        fingerprint=fingerprint.hex(),
        codec=codec.id,
        variant=codec.variant,
        profile=codec.profile.hex(),
        chunk_tokens=chunk_tokens,
        text_digest=used[0],
        text_tokens=used[1],
        seed=seed,
        writer=kvstore.__version__,
        limits=limits,
        levels=tuple(levels),
    )


def _slots(codecs: Sequence[Codec], spec: KVSpec, chunk_tokens: int) -> list[tuple[int, int]]:
    """(index of the codec, level) of everything to be measured. Raises CodecError naming the codec that cannot."""
    slots = []
    for index, codec in enumerate(codecs):
        try:
            slots += [(index, level) for level in range(levels_of(codec, spec, chunk_tokens))]
        except CodecError as error:
            raise CodecError(f"codec {codec.id!r} cannot serve this model: {error}") from error
    return slots


def _level_report(codec: Codec, result: LevelResult, tally: Tally) -> LevelReport:
    metrics = result.metrics
    return LevelReport(
        codec=codec.id,
        variant=codec.variant,
        profile=codec.profile.hex(),
        exact=codec.exact,
        level=result.level,
        result=result,
        perplexity_full=float(np.exp(min(metrics.loss_full_nats, 50.0))),
        perplexity_change_percent=metrics.perplexity_change_percent,
        recall_drop_points=metrics.recall_drop_points,
        layers=tally.layer_errors(),
    )
