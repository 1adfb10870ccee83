"""Benchmarks run, small, so that they cannot rot; what they measure is for `make bench` to say."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from kvstore import cli

EXPECTED = {
    "blend": {
        "blend.full_ratio_logit_error",
        "blend.recall_gap_points",
        "blend.kl_vs_concat",
        "blend.links.worst_vs_prefill",
        "blend.ttft_vs_prefill",
    },
    "codec": {
        "codec.ladder.bits_vs_cachegen",
        "codec.lossless_dense.bits",
        "codec.lossless_fast.decode_vs_memcpy",
        "codec.r32.excess_bits",
    },
    "tiers": {"tiers.dram.get_vs_memcpy", "tiers.nvme.read_vs_odirect", "tiers.nvme.write_vs_odirect"},
    "engine": {
        "engine.plan.stalling.vs_recompute_worst",
        "engine.plan.bursty.vs_oracle_mean",
        "engine.plan.decide_ms",
        "engine.spans.scan_ms",
        "engine.striped.vs_one_thread",
    },
    "service": {"service.shm_fetch_vs_memcpy", "service.lookup_p50_ms", "service.http_get_vs_socket"},
    "ttft": {"ttft.warm_vs_cold", "ttft.warm_nvme_vs_cold", "ttft.equal_tokens"},
}


@pytest.mark.parametrize("suite", sorted(EXPECTED))
def test_every_suite_runs_and_reports(suite: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report_path = tmp_path / "report.json"
    assert cli.main(["bench", suite, "--quick", "--dir", str(tmp_path), "--json", str(report_path)]) == 0
    report = json.loads(report_path.read_text())
    assert set(report) == {"environment", "metrics"}
    assert report["metrics"].keys() >= EXPECTED[suite]
    assert all(isinstance(value, (int, float)) for value in report["metrics"].values())
    assert {"cpu", "cores", "date", "kernels", "commit"} <= report["environment"].keys()
    assert report["metrics"].get("ttft.equal_tokens", 1) == 1
    assert list(tmp_path.iterdir()) == [report_path], "a benchmark left files behind"


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="needs an environment without vLLM: make test")
def test_an_engine_that_is_not_installed_is_asked_for_by_its_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", "ttft", "--engine", "vllm", "--quick", "--dir", str(tmp_path)]) != 0
    assert "vLLM is not installed here" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["bench", "tiers", "--engine", "vllm"])


def test_an_unknown_suite_names_the_valid_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["bench", "teirs"])
    assert "tiers" in capsys.readouterr().err
