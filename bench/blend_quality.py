"""Blending: accuracy on questions across documents, and next-token KL on text, for every policy over the ratio."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from kvstore.bench import blend_prompts
from kvstore.bench.blend_baselines import cacheblend_published
from kvstore.bench.blend_prompts import Asked
from kvstore.connectors.blend import registry
from kvstore.connectors.blend.engine import blend_prefill
from kvstore.connectors.blend.registry import DEFAULT
from kvstore.connectors.blend.split import split_attention

RATIOS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.5)
HEADLINE = 0.15
"""The ratio of the metrics that have no ratio in their names."""
POLICIES = ("first_k", "hkvd", "query", "chunk_score", DEFAULT)
BASELINE = "cacheblend"
FIELDS = ("right", "kl", "token_share", "layer_share")

Metrics = dict[str, float]
Run = Callable[[Any, Asked, float], tuple[torch.Tensor, float, float]]
"""(model, prompt, ratio) -> logits from its last token on (following, vocabulary), token share, layer share."""


class Score:
    """Means over prompts of what one policy did at one ratio."""

    def __init__(self) -> None:
        self.count = 0
        self.right = self.kl = self.token_share = self.layer_share = 0.0

    def add(self, other: Score) -> None:
        """Count another's prompts too."""
        self.count += other.count
        for field in FIELDS:
            setattr(self, field, getattr(self, field) + getattr(other, field))

    def metrics(self, name: str) -> Metrics:
        """As `name.*`."""
        return {f"{name}.{field}": getattr(self, field) / max(1, self.count) for field in FIELDS}


Scores = dict[tuple[str, str, float], Score]
"""(setting, policy, ratio) -> score."""


def measure(directory: Path, quick: bool) -> Metrics:
    """Metrics `blend.*` of the quality of blending; writes nothing into the directory."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more cost more than they bring on models this small
    try:
        return _recall(8 if quick else 48, quick) | _text(1 if quick else 12, quick)
    finally:
        torch.set_num_threads(threads)


def _recall(count: int, quick: bool) -> Metrics:
    model = blend_prompts.trained("recall")
    settings = ("shuffled_2p",) if quick else tuple(blend_prompts.RECALL)
    sets = {setting: blend_prompts.recall(model, setting, count) for setting in settings}
    full = {setting: _share_right(asked) for setting, asked in sets.items()}
    scores, out = _curves(model, sets, quick, "blend.recall")
    for setting in settings:
        out[f"blend.recall_full.{setting}"] = full[setting]
        out[f"blend.recall_concat.{setting}"] = scores[setting, "none", 0.0].right / count
        out[f"blend.recall_blended.{setting}"] = scores[setting, DEFAULT, HEADLINE].right / count
    ours, concat, rival = (
        _joined(scores, name, ratio) for name, ratio in ((DEFAULT, HEADLINE), ("none", 0.0), (BASELINE, HEADLINE))
    )
    full_mean = sum(full.values()) / len(full)
    return out | {
        "blend.recall_full": full_mean,
        "blend.recall_concat": concat.right / concat.count,
        "blend.recall_blended": ours.right / ours.count,
        "blend.recall_gap_points": 100 * (full_mean - ours.right / ours.count),
        "blend.recall_token_share": ours.token_share / ours.count,
        "blend.recall_layer_share": ours.layer_share / ours.count,
        "blend.recall_cacheblend": rival.right / rival.count,
        "blend.recall_vs_cacheblend": ours.right / max(1.0, rival.right),
    }


def _text(count: int, quick: bool) -> Metrics:
    model = blend_prompts.trained("text")
    settings = blend_prompts.TEXTS[:1] if quick else blend_prompts.TEXTS
    sets = {setting: blend_prompts.text(model, setting, count) for setting in settings}
    scores, out = _curves(model, sets, quick, "blend.text")
    for setting in settings:
        out[f"blend.kl_vs_concat.{setting}"] = scores[setting, DEFAULT, HEADLINE].kl / scores[setting, "none", 0.0].kl
    ours, concat = _joined(scores, DEFAULT, HEADLINE), _joined(scores, "none", 0.0)
    return out | {
        "blend.kl_concat_nats": concat.kl / concat.count,
        "blend.kl_vs_concat": ours.kl / concat.kl,
        "blend.text_token_share": ours.token_share / ours.count,
        "blend.text_layer_share": ours.layer_share / ours.count,
    }


def _share_right(asked: Sequence[Asked]) -> float:
    return sum(int(one.full[0].argmax()) == one.following[0] for one in asked) / len(asked)


def _curves(model: Any, sets: dict[str, list[Asked]], quick: bool, name: str) -> tuple[Scores, Metrics]:
    """Scores of every policy, and the metrics `name.policy.permille.*` over all settings together."""
    runs = [("none", 0.0), ("parallel", 0.0)]
    runs += [(policy, ratio) for policy in (*POLICIES, BASELINE) for ratio in ((HEADLINE,) if quick else RATIOS)]
    scores: Scores = {}
    metrics: Metrics = {}
    for policy, ratio in runs:
        for setting, asked in sets.items():
            scores[setting, policy, ratio] = _score(model, asked, _run_of(policy), ratio)
        metrics |= _joined(scores, policy, ratio).metrics(f"{name}.{policy}.{round(1000 * ratio):03d}")
    return scores, metrics


def _joined(scores: Scores, policy: str, ratio: float) -> Score:
    """The score of a policy at a ratio over all settings."""
    out = Score()
    for (_, name, at), score in scores.items():
        if (name, at) == (policy, ratio):
            out.add(score)
    return out


@torch.no_grad()
def _score(model: Any, asked: Sequence[Asked], run: Run, ratio: float) -> Score:
    score = Score()
    for one in asked:
        logits, token_share, layer_share = run(model, one, ratio)
        found = logits.log_softmax(-1)
        score.count += 1
        score.right += int(found[0].argmax()) == one.following[0]
        score.kl += float((one.full.exp() * (one.full - found)).sum(-1).mean())
        score.token_share += token_share
        score.layer_share += layer_share
    return score


def _run_of(name: str) -> Run:
    """How a policy, or the baseline, is run."""

    def baseline(model: Any, one: Asked, ratio: float) -> tuple[torch.Tensor, float, float]:
        logits, cache = cacheblend_published(
            model, one.ids, one.sources, one.preamble, ratio, headroom=len(one.following)
        )
        layers = model.config.num_hidden_layers
        share = (2 + (layers - 2) * ratio) / layers
        return _followed(model, one, logits, cache, len(one.ids)), ratio, share

    def policy(model: Any, one: Asked, ratio: float) -> tuple[torch.Tensor, float, float]:
        chosen = registry.get(name, **({} if name in ("none", "parallel") else {"ratio": ratio}))
        sources = one.variants if name == "chunk_score" else one.sources
        blended = blend_prefill(model, one.ids, sources, chosen, headroom=len(one.following))
        context = torch.zeros(len(one.ids), dtype=torch.bool)
        for source in sources[1:]:
            context[source.start : source.stop] = True
        with split_attention(model, blended.cache, context, chosen.split) if chosen.split else nullcontext():
            logits = _followed(model, one, blended.logits, blended.cache, blended.next_position)
        return logits, blended.report.token_share, blended.report.layer_share

    return baseline if name == BASELINE else policy


def _followed(model: Any, one: Asked, last: torch.Tensor, cache: Any, position: int) -> torch.Tensor:
    """Logits of the prompt's last token and of all that follow but the last, (following, vocabulary)."""
    if len(one.following) == 1:
        return last
    fed = torch.tensor([one.following[:-1]])
    positions = position + torch.arange(fed.shape[1])[None]
    rest = model(fed, position_ids=positions, past_key_values=cache, use_cache=True).logits[0]
    return torch.cat([last, rest])
