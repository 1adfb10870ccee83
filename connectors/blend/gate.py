"""The blend gate's measurement: what recompute policies do to a model's next tokens and to questions across documents.

    report = run_blend_gate(model, policy, ratios, text=passage_trials(...), recall=question_trials(...))
    for record in report.records: kvstore.blend_records.save(record, directory)

For every trial the documents are computed behind the preamble, put through the codec if one is measured, and blended
into the prompt; then the tokens that follow are run over full and over blended KV. The query that a policy sees is the
prompt's own, never what follows. Everything but recall is measured on the text; without text, on the questions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec
import torch
from transformers import PreTrainedModel

import kvstore
from kvstore.blend_gate import STANDARD, BlendLimits, BlendMetrics, BlendRecord, judge
from kvstore.codec import Codec
from kvstore.connectors.blend.compiling import compile_span
from kvstore.connectors.blend.engine import Blended, blend_prefill, check_blendable
from kvstore.connectors.blend.gate_coding import CodedKV
from kvstore.connectors.blend.gate_trials import BlendTrial, digest
from kvstore.connectors.blend.passing import has_ratio, settings_of, with_ratio
from kvstore.connectors.blend.policies.none import Nothing
from kvstore.connectors.blend.policy import Policy
from kvstore.connectors.blend.report import BlendReport
from kvstore.connectors.blend.sources import KV, Source, of_layers
from kvstore.connectors.gate_tally import Tally
from kvstore.connectors.gate_trials import Trial
from kvstore.connectors.model_identity import identify
from kvstore.errors import ConfigError
from kvstore.gate_limits import number

Progress = Callable[[int, int], None]


class BlendGateReport(msgspec.Struct, frozen=True, kw_only=True):
    """All that a run found; a record for each ratio."""

    fingerprint: str
    text_trials: int
    recall_trials: int
    records: list[BlendRecord]

    @property
    def passed(self) -> bool:
        """Whether any ratio passed."""
        return any(not record.failures for record in self.records)


class _Sums:
    """What one ratio came to, over trials of one kind."""

    def __init__(self, layers: int) -> None:
        self.tally = Tally(layers)
        self.reports: list[BlendReport] = []


def run_blend_gate(
    model: PreTrainedModel,
    policy: Policy,
    ratios: Sequence[float],
    *,
    text: Sequence[BlendTrial] = (),
    recall: Sequence[BlendTrial] = (),
    codec: Codec | None = None,
    level: int | None = None,
    limits: BlendLimits = STANDARD,
    preamble: Sequence[int],
    passage_tokens: int = 0,
    seed: int = 0,
    progress: Progress = lambda done, total: None,
) -> BlendGateReport:
    """Measure a policy at some ratios on a model and judge each.

    Args:
        model: as the connector serves it: same weights, dtype and device class.
        policy: its own ratio does not matter; one without a ratio is measured as it is.
        ratios: to measure; ignored for a policy without one.
        text: trials of held-out text.
        recall: trials of questions.
        codec: a lossy codec that documents are stored in; None for exact ones.
        level: the highest level that is decoded; None for all.
        limits: what ratios are judged by.
        preamble: what documents are computed behind.
        passage_tokens, seed: of the text's documents, and what trials were made with; they go into the record.
        progress: is told after every trial.

    Raises:
        UnsupportedModelError, CodecError: the model cannot be blended on, or not be served by the codec.
        ConfigError: there are no ratios or no trials; the policy's attention is not the model's own.
    """
    check_blendable(model)
    spec, fingerprint = identify(model)
    policies = [with_ratio(policy, ratio) for ratio in ratios] if has_ratio(policy) else [policy]
    _check(policy, policies, len(text) + len(recall))
    candidates: list[Policy] = [Nothing(), *policies]
    coding = None if codec is None or codec.exact else CodedKV(codec, spec, fingerprint, level)
    sums = {kind: [_Sums(spec.layers) for _ in candidates] for kind in ("text", "recall")}
    compiled = _Compiled(model, preamble, coding)
    trials = [*text, *recall]
    for done, trial in enumerate(trials, 1):
        _run(model, trial, compiled, candidates, sums["recall" if trial.asks else "text"])
        progress(done, len(trials))
    main, asked = sums["text" if text else "recall"], sums["recall"]
    text_digest, text_tokens = digest(trials)
    records = []
    for at, own in enumerate(policies, 1):
        settings, ratio = settings_of(own)
        metrics = _metrics((main[0], main[at]), (asked[0], asked[at]))
        record = BlendRecord(
            fingerprint=fingerprint.hex(),
            policy=own.name,
            settings=settings,
            ratio=ratio,
            preamble_tokens=len(preamble),
            passage_tokens=passage_tokens,
            text_digest=text_digest,
            text_tokens=text_tokens,
            seed=seed,
            writer=kvstore.__version__,
            limits=limits,
            metrics=metrics,
            failures=judge(metrics, limits),
        )
        records.append(record if coding is None else _coded(record, coding))
    counts = {"text_trials": len(text), "recall_trials": len(recall)}
    return BlendGateReport(fingerprint=fingerprint.hex(), records=records, **counts)


def _check(policy: Policy, policies: Sequence[Policy], trials: int) -> None:
    """Raise ConfigError if there is nothing to measure, or a policy that no gate can pass."""
    if not policies or not trials:
        raise ConfigError("the blend gate needs at least one ratio and one trial, of text or of recall")
    if policy.split is not None:
        raise ConfigError(f"policy {policy.name!r} needs an attention of its own while generating; no gate passes it")


def _coded(record: BlendRecord, coding: CodedKV) -> BlendRecord:
    """The record as one of lossy chunks."""
    return msgspec.structs.replace(
        record,
        codec=coding.codec.id,
        variant=coding.codec.variant,
        profile=coding.codec.profile.hex(),
        level=coding.level,
        noise=coding.noise(),
    )


class _Compiled:
    """Documents as they come out of a store; those of the prompt before are kept, for the next question about them."""

    def __init__(self, model: PreTrainedModel, preamble: Sequence[int], coding: CodedKV | None) -> None:
        self._model = model
        self._preamble = preamble
        self._coding = coding
        self._kept: dict[tuple[int, ...], list[KV]] = {}

    def sources(self, trial: BlendTrial) -> list[Source]:
        """A source for each document of a prompt."""
        documents = [tuple(trial.ids[start:stop]) for start, stop in trial.documents]
        self._kept = {ids: self._kept.get(ids) or self._compile(ids) for ids in documents}
        noise = None if self._coding is None else self._coding.noise()
        return [
            Source(
                start,
                ids,
                of_layers(self._kept[ids]),
                position=len(self._preamble),
                document=number,
                noise=noise,
            )
            for number, (ids, (start, _)) in enumerate(zip(documents, trial.documents, strict=True))
        ]

    def _compile(self, ids: tuple[int, ...]) -> list[KV]:
        layers = compile_span(self._model, self._preamble, ids)
        return layers if self._coding is None else self._coding.through(layers, ids, len(self._preamble))


@torch.no_grad()
def _run(
    model: PreTrainedModel,
    trial: BlendTrial,
    compiled: _Compiled,
    candidates: Sequence[Policy],
    sums: Sequence[_Sums],
) -> None:
    """Add one trial to the sums of every candidate."""
    sources = compiled.sources(trial)
    expected = _followed(model, trial, blend_prefill(model, trial.ids, [], Nothing()))
    compared = _as_trial(trial)
    for policy, own in zip(candidates, sums, strict=True):
        blended = blend_prefill(model, trial.ids, sources, policy)
        own.reports.append(blended.report)
        own.tally.add_logits(compared, expected, _followed(model, trial, blended))


def _followed(model: PreTrainedModel, trial: BlendTrial, prefilled: Blended) -> torch.Tensor:
    """Logits of the prompt's last token and of what follows but its last, (following, vocabulary)."""
    if len(trial.following) == 1:
        return prefilled.logits
    fed = torch.tensor([trial.following[:-1]], device=model.device)
    rest: torch.Tensor = model(fed, past_key_values=prefilled.cache, use_cache=True).logits[0]
    return torch.cat([prefilled.logits, rest])


def _as_trial(trial: BlendTrial) -> Trial:
    """What a tally needs to know: targets, and the answer if it is a question."""
    count = len(trial.following)
    empty = torch.zeros((1, 0), dtype=torch.long)
    return Trial(
        context=empty,
        tokens=empty,
        scored=torch.arange(count),
        targets=torch.tensor(trial.following),
        answers=((0, count),) if trial.asks else (),
    )


def _metrics(main: tuple[_Sums, _Sums], recall: tuple[_Sums, _Sums]) -> BlendMetrics:
    """Of (plain concatenation, the policy), on what all but recall is measured on, and on questions."""
    (concat, own), (asked_concat, asked) = main, recall
    scored = max(1, own.tally.scored)
    questions = asked.tally.questions
    return BlendMetrics(
        scored_tokens=own.tally.scored,
        kl_nats=number(own.tally.kl / scored),
        kl_concat_nats=number(concat.tally.kl / scored),
        top1_agreement=own.tally.agreed / scored,
        recall_questions=questions,
        recall_full=asked.tally.right_full / max(1, questions),
        recall=asked.tally.right / max(1, questions),
        recall_concat=asked_concat.tally.right / max(1, questions),
        token_share=number(sum(report.token_share for report in own.reports) / max(1, len(own.reports))),
        layer_share=number(sum(report.layer_share for report in own.reports) / max(1, len(own.reports))),
    )
