"""The plot of the codec benchmark: its points, what it refuses, and that the same metrics draw the same picture."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from kvstore import cli
from kvstore.bench import codec_plot

METRICS = {
    "codec.points.text.ladder_all.01.bits": 0.6,
    "codec.points.text.ladder_all.01.error": 0.04,
    "codec.points.text.ladder_all.00.bits": 0.3,
    "codec.points.text.ladder_all.00.error": 0.12,
    "codec.points.recall.int8.00.bits": 8.5,
    "codec.points.recall.int8.00.error": 0.002,
    "codec.points.recall.lossless.00.bits": 12.0,
    "codec.points.recall.lossless.00.error": 0.0,
    "codec.ladder.bits_vs_kvtc": 0.7,
}


def test_points_come_by_samples_and_codec_in_the_order_of_bits() -> None:
    assert codec_plot.points(METRICS) == {
        "text": {"ladder_all": [(0.3, 0.12), (0.6, 0.04)]},
        "recall": {"int8": [(8.5, 0.002)]},
    }


def test_without_matplotlib_the_remedy_is_named_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(codec_plot.PlotError, match=r"pip install 'kvstore-tiered\[bench\]'"):
        codec_plot.draw(METRICS, tmp_path / "plot.svg")
    assert cli.main(["bench", "codec", "--quick", "--plot", str(tmp_path / "plot.svg")]) != 0
    assert "pip install" in capsys.readouterr().err


def test_other_suffixes_and_suites_are_refused(tmp_path: Path) -> None:
    with pytest.raises(codec_plot.PlotError, match=".svg or .png"):
        codec_plot.check(tmp_path / "plot.pdf")
    with pytest.raises(SystemExit):
        cli.main(["bench", "tiers", "--plot", str(tmp_path / "plot.svg")])


def test_the_same_points_draw_the_same_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for name in ("one.svg", "other.svg", "plot.png"):
        codec_plot.draw(METRICS, tmp_path / name)
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "other.svg").read_bytes()
    assert "ladder, profile all" in (tmp_path / "one.svg").read_text()
    with pytest.raises(codec_plot.PlotError, match="no points"):
        codec_plot.draw({}, tmp_path / "none.svg")
