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
from kvstore.connectors.blend.split import split_attention

RATIOS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.5)
HEADLINE = 0.15
"""The ratio of the metrics that have no ratio in their names."""
POLICIES = ("first_k", "hkvd", "query", "chunk_score", "recommended")
BASELINE = "cacheblend"

Metrics = dict[str, float]
Run = Callable[[Any, Asked, float], tuple[torch.Tensor, float, float]]
"""(model, prompt, ratio) -> logits from its last token on (following, vocabulary), token share, layer share."""


class Score:
    """Means over prompts of what one policy did at one ratio."""

    def __init__(self) -> None:
        self.count = 0
        self.right = self.kl = self.token_share = self.layer_share = 0.0

    def metrics(self, name: str) -> Metrics:
        """As `name.*`."""
        fields = ("right", "kl", "token_share", "layer_share")
        return {f"{name}.{field}": getattr(self, field) / max(1, self.count) for field in fields}


def measure(directory: Path, quick: bool) -> Metrics:
    """Metrics `blend.*` of the quality of blending; writes nothing into the directory."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more cost more than they bring on models this small
    try:
        return {**_recall(8 if quick else 60, quick), **_text(1 if quick else 12, quick)}
    finally:
        torch.set_num_threads(threads)


def _recall(count: int, quick: bool) -> Metrics:
    model = blend_prompts.trained("recall")
    settings = ("shuffled_2p",) if quick else tuple(blend_prompts.RECALL)
    sets = {setting: blend_prompts.recall(model, setting, count) for setting in settings}
    asked = [one for own in sets.values() for one in own]
    full = sum(int(one.full[0].argmax()) == one.following[0] for one in asked) / len(asked)
    scores = _curves(model, asked, quick)
    out = {name: value for key, score in scores.items() for name, value in score.metrics(f"blend.recall.{key}").items()}
    ours = scores[f"recommended.{_permille(HEADLINE)}"]
    concat = scores["none.000"]
    rival = scores[f"{BASELINE}.{_permille(HEADLINE)}"]
    for setting, own in sets.items():
        out[f"blend.recall_full.{setting}"] = sum(int(a.full[0].argmax()) == a.following[0] for a in own) / len(own)
        score = _score(model, own, _run_of("recommended"), HEADLINE)
        out[f"blend.recall_blended.{setting}"] = score.right / score.count
    return out | {
        "blend.recall_full": full,
        "blend.recall_concat": concat.right / concat.count,
        "blend.recall_blended": ours.right / ours.count,
        "blend.recall_gap_points": 100 * (full - ours.right / ours.count),
        "blend.recall_token_share": ours.token_share / ours.count,
        "blend.recall_layer_share": ours.layer_share / ours.count,
        "blend.recall_cacheblend": rival.right / rival.count,
        "blend.recall_vs_cacheblend": ours.right / max(1.0, rival.right),
    }


def _text(count: int, quick: bool) -> Metrics:
    model = blend_prompts.trained("text")
    settings = blend_prompts.TEXTS[:1] if quick else blend_prompts.TEXTS
    sets = {setting: blend_prompts.text(model, setting, count) for setting in settings}
    scores = _curves(model, [one for own in sets.values() for one in own], quick)
    out = {name: value for key, score in scores.items() for name, value in score.metrics(f"blend.text.{key}").items()}
    concat, ours = scores["none.000"], scores[f"recommended.{_permille(HEADLINE)}"]
    for setting, own in sets.items():
        plain = _score(model, own, _run_of("none"), 0.0)
        out[f"blend.kl_vs_concat.{setting}"] = _score(model, own, _run_of("recommended"), HEADLINE).kl / plain.kl
    return out | {
        "blend.kl_concat_nats": concat.kl / concat.count,
        "blend.kl_vs_concat": ours.kl / concat.kl,
        "blend.text_token_share": ours.token_share / ours.count,
        "blend.text_layer_share": ours.layer_share / ours.count,
    }


def _curves(model: Any, asked: Sequence[Asked], quick: bool) -> dict[str, Score]:
    """`policy.permille` -> its score; those without a ratio under 000."""
    scores = {f"{name}.000": _score(model, asked, _run_of(name), 0.0) for name in ("none", "parallel")}
    for name in (*POLICIES, BASELINE):
        for ratio in (HEADLINE,) if quick else RATIOS:
            scores[f"{name}.{_permille(ratio)}"] = _score(model, asked, _run_of(name), ratio)
    return scores


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


def _permille(ratio: float) -> str:
    return f"{round(1000 * ratio):03d}"
