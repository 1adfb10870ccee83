"""Blending: computing everything again against a full prefill, and nothing against plain concatenation, in fp32."""

from __future__ import annotations

from pathlib import Path

import torch

from kvstore.connectors.blend import registry
from kvstore.connectors.blend.engine import blend_prefill
from kvstore.testing.blending import blendable, concatenated, full_prefill
from kvstore.testing.models import FAMILIES, ROPES, random_model

WINDOW = 20
WINDOWED = ("mistral", "qwen2", "qwen3")


def measure(directory: Path, quick: bool) -> dict[str, float]:
    """The largest errors of a logit over all families, ropes and windows; writes nothing into the directory."""
    cases = [(family, None) for family in FAMILIES] + [(family, WINDOW) for family in WINDOWED]
    ropes = list(ROPES)[:1] if quick else list(ROPES)
    errors: dict[str, list[float]] = {"blend.full_ratio_logit_error": [], "blend.ratio0_error": []}
    for family, window in cases:
        for rope in ropes:
            model = random_model(family, rope=rope, window=window)
            prompt = blendable(model)
            expected = {
                "blend.full_ratio_logit_error": (1.0, full_prefill(model, prompt.ids)[0]),
                "blend.ratio0_error": (0.0, concatenated(model, prompt)),
            }
            for name, (ratio, logits) in expected.items():
                for policy in ("hkvd", "recommended"):
                    found = blend_prefill(model, prompt.ids, prompt.sources, registry.get(policy, ratio=ratio)).logits
                    errors[name].append(float(torch.max(torch.abs(found - logits))))
    return {name: max(own) for name, own in errors.items()}
