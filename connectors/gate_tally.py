"""Sums over trials of what a codec level changed, and the metrics they make."""

from __future__ import annotations

import math

import msgspec
import torch

from kvstore.connectors.gate_trials import Trial
from kvstore.gate import Metrics
from kvstore.gate_limits import number

_BLOCK_ELEMENTS = 1 << 22
"""Distributions are compared in double precision, so many probabilities at a time."""


class Tally:
    """Running sums for one codec level (or, with errors left at zero, for the full KV itself)."""

    def __init__(self, layers: int) -> None:
        self.coded_bytes = 0
        self.elements = 0
        self.key_errors = [_Ratio() for _ in range(layers)]
        self.value_errors = [_Ratio() for _ in range(layers)]
        self.attention_errors = [_Ratio() for _ in range(layers)]
        self.scored = 0
        self.kl = 0.0
        self.agreed = 0
        self.loss_full = 0.0
        self.loss = 0.0
        self.change_squares = 0.0
        self.questions = 0
        self.right_full = 0
        self.right = 0

    def add_logits(self, trial: Trial, full: torch.Tensor, other: torch.Tensor) -> None:
        """Compare next-token distributions: logits (n, vocabulary) at the trial's scored tokens."""
        rows = max(1, _BLOCK_ELEMENTS // full.shape[1])
        hits_full, hits = [], []
        for start in range(0, len(full), rows):
            block = slice(start, start + rows)
            targets = trial.targets[block, None].to(full.device)
            p, q = full[block].double().log_softmax(-1), other[block].double().log_softmax(-1)
            likeliest_full, likeliest = p.argmax(-1), q.argmax(-1)
            change = (p - q).gather(1, targets)[:, 0]
            self.kl += float((p.exp() * (p - q)).sum())
            self.agreed += int((likeliest_full == likeliest).sum())
            self.loss_full -= float(p.gather(1, targets).sum())
            self.loss -= float(q.gather(1, targets).sum())
            self.change_squares += float(change.square().sum())
            hits_full.append(likeliest_full == targets[:, 0])
            hits.append(likeliest == targets[:, 0])
        self.scored += len(full)
        self.questions += len(trial.answers)
        for start, stop in trial.answers:
            self.right_full += bool(torch.cat(hits_full)[start:stop].all())
            self.right += bool(torch.cat(hits)[start:stop].all())

    def metrics(self, recall: Tally | None) -> Metrics:
        """What was measured so far, with the recall accuracy of another tally (or of this one)."""
        scored = max(1, self.scored)
        mean_change = (self.loss - self.loss_full) / scored
        variance = self.change_squares / scored - mean_change * mean_change
        asked = recall or self
        layers = len(self.attention_errors)
        return Metrics(
            bits_per_element=number(8 * self.coded_bytes / max(1, self.elements)),
            key_error=number(_Ratio.joined(self.key_errors).value),
            value_error=number(_Ratio.joined(self.value_errors).value),
            attention_error=number(sum(ratio.value for ratio in self.attention_errors) / layers),
            scored_tokens=self.scored,
            kl_nats=number(self.kl / scored),
            top1_agreement=self.agreed / scored,
            loss_full_nats=number(self.loss_full / scored),
            loss_nats=number(self.loss / scored),
            loss_change_error_nats=number(math.sqrt(max(variance, 0.0) / scored)),
            recall_questions=asked.questions,
            recall_full=asked.right_full / max(1, asked.questions),
            recall=asked.right / max(1, asked.questions),
        )

    def layer_errors(self) -> list[dict[str, float]]:
        """Relative errors of every layer."""
        triples = zip(self.key_errors, self.value_errors, self.attention_errors, strict=True)
        return [
            {"key_error": number(k.value), "value_error": number(v.value), "attention_error": number(o.value)}
            for k, v, o in triples
        ]


class _Ratio(msgspec.Struct):
    """A relative error: the root of summed squares of differences over summed squares."""

    difference: float = 0.0
    whole: float = 0.0

    def add(self, sums: tuple[float, float]) -> None:
        self.difference += sums[0]
        self.whole += sums[1]

    @property
    def value(self) -> float:
        if self.difference == 0:
            return 0.0
        return math.sqrt(self.difference / self.whole) if self.whole > 0 else math.inf

    @classmethod
    def joined(cls, ratios: list[_Ratio]) -> _Ratio:
        return cls(sum(ratio.difference for ratio in ratios), sum(ratio.whole for ratio in ratios))
