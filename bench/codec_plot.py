"""The rate-distortion plot of the codec benchmark, from its points: bits of whole objects against attention error."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvstore.errors import KVStoreError

SUFFIXES = (".svg", ".png")
CURVES = {
    "ladder_all": ("ladder, profile all", "#08306b", "-"),
    "ladder_layer": ("ladder, profile layer", "#2171b5", "-"),
    "ladder_head": ("ladder, profile head", "#6baed6", "-"),
    "ladder_uncalibrated": ("ladder, no profile", "#9ecae1", "-"),
    "kvtc": ("KVTC-like", "#a63603", "--"),
    "cachegen": ("cachegen", "#fd8d3c", "--"),
    "lloyd": ("rotated Lloyd-Max", "#737373", "--"),
    "int4": ("int4", "#000000", "o"),
    "int8": ("int8", "#000000", "s"),
    "fp8": ("fp8", "#000000", "^"),
}
"""Codec in the metrics -> its name, colour, and line or marker; others are not drawn."""

_POINT = re.compile(r"codec\.points\.(?P<samples>[^.]+)\.(?P<codec>[^.]+)\.(?P<at>\d+)\.(?P<axis>bits|error)")

Points = dict[str, dict[str, list[tuple[float, float]]]]


class PlotError(KVStoreError):
    """A plot cannot be drawn; says what it needs."""


def check(path: Path) -> None:
    """Raise PlotError unless a plot can be written to such a path here; takes no time, so it comes before measuring."""
    if path.suffix not in SUFFIXES:
        raise PlotError(f"--plot {path}: the name must end in {' or '.join(SUFFIXES)}")
    _matplotlib()


def points(metrics: Mapping[str, float]) -> Points:
    """Samples -> codec -> (bits, error), from the metrics `codec.points.*`, in the order of bits."""
    found: dict[tuple[str, str, str], dict[str, float]] = {}
    for name, value in metrics.items():
        if match := _POINT.fullmatch(name):
            found.setdefault((match["samples"], match["codec"], match["at"]), {})[match["axis"]] = value
    out: Points = {}
    for (samples, codec, _), point in sorted(found.items()):
        if point.keys() == {"bits", "error"} and point["error"] > 0:
            out.setdefault(samples, {}).setdefault(codec, []).append((point["bits"], point["error"]))
    return out


def draw(metrics: Mapping[str, float], path: Path) -> None:
    """Write the plot, one panel for each kind of sample; the same metrics give the same bytes.

    Raises:
        PlotError: matplotlib is missing, the suffix is unknown, or there are no points.
    """
    check(path)
    found = points(metrics)
    if not found:
        raise PlotError("no points to plot: run `kvstore bench codec`")
    matplotlib = _matplotlib()
    with matplotlib.rc_context({"svg.hashsalt": "kvstore", "svg.fonttype": "none", "font.size": 9}):
        figure_module = importlib.import_module("matplotlib.figure")
        figure = figure_module.Figure(figsize=(3.4 * len(found), 3.6), layout="constrained")
        panels = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
        for panel, (samples, curves) in zip(panels, sorted(found.items()), strict=True):
            _panel(panel, samples, curves)
        panels[0].set_ylabel("error of attention outputs")
        lines = {line.get_label(): line for panel in panels for line in panel.get_lines()}
        figure.legend(
            lines.values(), lines.keys(), loc="outside lower center", ncols=min(5, 2 * len(found)), frameon=False
        )
        figure.savefig(path, dpi=120, metadata={"Date": None} if path.suffix == ".svg" else None)


def _panel(panel: Any, samples: str, curves: dict[str, list[tuple[float, float]]]) -> None:
    for codec, (label, colour, style) in CURVES.items():
        if codec in curves:
            bits, errors = zip(*curves[codec], strict=True)
            line = style if style.startswith("-") else "none"
            marker = "." if style.startswith("-") else style
            panel.plot(
                bits, errors, linestyle=line, marker=marker, color=colour, label=label, linewidth=1.2, markersize=4
            )
    panel.set_yscale("log")
    panel.set_xlim(0, 9)
    panel.set_title(samples)
    panel.set_xlabel("bits an element, whole object")
    panel.minorticks_off()
    panel.grid(True, linewidth=0.3, alpha=0.5)


def _matplotlib() -> Any:
    try:
        return importlib.import_module("matplotlib")
    except ImportError as error:
        raise PlotError(f"--plot needs matplotlib ({error}): pip install 'kvstore-tiered[bench]'") from error
