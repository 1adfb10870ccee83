"""Codecs: bits for error against rivals, whether deltas pay, speed, and LMCache's own CacheGen where it can be run.

Samples are the seeded generator's and, where torch is installed and the trained test models are there, those of the
text and of the recall model. Metrics are `codec.*` with the sample's name behind a dot where there are several; a plain
`codec.ladder.bits_vs_<rival>` is the worst over the samples.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

from kvstore.bench import codec_deltas, codec_lmcache, codec_speed
from kvstore.bench.codec_rate import Curves, RateOptions, curves, lossless_bits, ratios
from kvstore.bench.kv_samples import Samples, synthetic

MODELS = Path(__file__).resolve().parent.parent / "tests" / "models"
QUICK = RateOptions(groupings=("head",), shifts=(0,))
WINDOWS, CALIBRATION_WINDOWS = 2, 24


def measure(_directory: Path, quick: bool) -> dict[str, float]:
    """Metrics `codec.*`; of the synthetic samples alone and with few settings when quick."""
    metrics: dict[str, float] = {}
    worst: dict[str, float] = {}
    for samples in _samples(quick):
        found = curves(samples, QUICK if quick else RateOptions())
        for name, value in ratios(found).items():
            metrics[f"codec.{name}.{samples.name}"] = value
            worst[name] = max(value, worst.get(name, 0.0))
        metrics |= _points(found, samples.name)
        for name, value in codec_deltas.measure(samples).items():
            metrics[f"codec.cachegen.{name}.{samples.name}"] = value
        for codec_id in ("lossless", "lossless_dense"):
            metrics[f"codec.{codec_id}.bits.{samples.name}"] = lossless_bits(samples, codec_id)
        worst["lossless_dense.bits"] = max(
            metrics[f"codec.lossless_dense.bits.{samples.name}"], worst.get("lossless_dense.bits", 0.0)
        )
        if not quick:
            metrics |= codec_lmcache.measure(samples)
    metrics |= {f"codec.{name}": value for name, value in worst.items()}
    return metrics | codec_speed.measure(quick)


def _samples(quick: bool) -> Iterator[Samples]:
    yield synthetic(quick=quick)
    if quick or importlib.util.find_spec("torch") is None or importlib.util.find_spec("transformers") is None:
        return
    from kvstore.bench.kv_models import of_model

    for name in ("text", "recall"):
        if (MODELS / name / "config.json").is_file():
            yield of_model(name, MODELS / name, windows=WINDOWS, calibration_windows=CALIBRATION_WINDOWS)


def _points(found: Curves, name: str) -> dict[str, float]:
    """Every point of every curve, numbered from the smallest object up: what a plot is drawn from."""
    out: dict[str, float] = {}
    for codec, points in found.items():
        for at, point in enumerate(sorted(points, key=lambda point: point.bits)):
            out[f"codec.points.{name}.{codec}.{at:02d}.bits"] = point.bits
            out[f"codec.points.{name}.{codec}.{at:02d}.error"] = point.error
    return out
