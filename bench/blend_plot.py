"""The curves of the blend benchmark: accuracy across documents and KL on text over what is computed again."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvstore.bench.codec_plot import PlotError, check

CURVES = {
    "recommended": ("recommended", "#08306b", "o-"),
    "query": ("query", "#2171b5", "o-"),
    "chunk_score": ("chunk_score", "#238b45", "s-"),
    "first_k": ("first_k", "#74c476", "s-"),
    "hkvd": ("hkvd", "#a63603", "^-"),
    "cacheblend": ("CacheBlend as published", "#fd8d3c", "^--"),
    "none": ("none", "#000000", "x"),
    "parallel": ("parallel", "#737373", "+"),
}
"""Policy in the metrics -> its name, colour, and marker with line."""

_POINT = re.compile(r"blend\.(?P<task>recall|text)\.(?P<policy>\w+)\.(?P<at>\d+)\.(?P<field>\w+)")
_SHARES = {"token_share": "moved tokens computed again", "layer_share": "token-layers computed, everything counted"}

Points = dict[str, list[dict[str, float]]]


def points(metrics: Mapping[str, float], task: str) -> Points:
    """Policy -> its points (right, kl, token_share, layer_share), in the order of ratios."""
    found: dict[tuple[str, str], dict[str, float]] = {}
    for name, value in sorted(metrics.items()):
        match = _POINT.fullmatch(name)
        if match and match["task"] == task:
            found.setdefault((match["policy"], match["at"]), {})[match["field"]] = value
    out: Points = {}
    for (policy, _), point in sorted(found.items()):
        out.setdefault(policy, []).append(point)
    return out


def draw(metrics: Mapping[str, float], path: Path) -> None:
    """Write the plot, accuracy above KL, each over both ways to count; the same metrics give the same bytes.

    Raises:
        PlotError: matplotlib is missing, the suffix is unknown, or there are no points.
    """
    check(path)
    tasks = {task: points(metrics, task) for task in ("recall", "text")}
    if not all(tasks.values()):
        raise PlotError("no points to plot: run `kvstore bench blend`")
    matplotlib: Any = importlib.import_module("matplotlib")
    with matplotlib.rc_context({"svg.hashsalt": "kvstore", "svg.fonttype": "none", "font.size": 9}):
        figure_module: Any = importlib.import_module("matplotlib.figure")
        figure = figure_module.Figure(figsize=(7.6, 6.4), layout="constrained")
        grid = figure.subplots(2, 2, sharex="col", sharey="row")
        for row, (task, field, label) in enumerate(
            (("recall", "right", "right answers across documents"), ("text", "kl", "KL to full prefill, nats a token"))
        ):
            for column, share in enumerate(_SHARES):
                _panel(grid[row][column], tasks[task], share, field)
            grid[row][0].set_ylabel(label)
        for column, label in enumerate(_SHARES.values()):
            grid[1][column].set_xlabel(label)
        grid[1][0].set_yscale("log")
        lines = {line.get_label(): line for line in grid[0][0].get_lines()}
        figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=4, frameon=False)
        figure.savefig(path, dpi=120, metadata={"Date": None} if path.suffix == ".svg" else None)


def _panel(panel: Any, curves: Points, share: str, field: str) -> None:
    for policy, (label, colour, style) in CURVES.items():
        if policy in curves:
            own = curves[policy]
            panel.plot(
                [point[share] for point in own],
                [point[field] for point in own],
                style,
                color=colour,
                label=label,
                linewidth=1.2,
                markersize=4,
            )
    panel.grid(True, linewidth=0.3, alpha=0.5)
