"""The conformance table is what the script makes of the checked-in outcomes, and these are of the versions tested."""

from __future__ import annotations

import json
import re
from pathlib import Path

import msgspec
import pytest

from tests import conformance

ROOT = Path(__file__).parent.parent


def test_the_page_is_what_the_script_makes_of_the_outcomes() -> None:
    assert conformance.PAGE.read_text() == conformance.page(conformance.load()), "run python tests/conformance.py"


def test_there_are_outcomes_of_the_versions_that_the_tests_run_with() -> None:
    there = {(result.engine, result.version) for result in conformance.load()}
    for name, engine in conformance.engines().items():
        if engine.version:
            assert (name, engine.version) in there, f"run {engine.command} with a report, and take it in"
        else:
            assert any(engine_name == name for engine_name, _ in there)


def test_the_documentation_names_the_tested_versions() -> None:
    text = (ROOT / "docs" / "engines.md").read_text()
    for engine in conformance.engines().values():
        assert engine.version in text


def test_every_capability_is_decided_by_a_test() -> None:
    latest = {result.engine: result for result in conformance.load()}
    for name, engine in conformance.engines().items():
        for capability in engine.capabilities:
            if capability.pattern:
                assert any(re.search(capability.pattern, test) for test in latest[name].outcomes), capability.text


def test_a_report_is_taken_in_and_replaces_its_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report, results, page = tmp_path / "report", tmp_path / "results.json", tmp_path / "page.md"
    outcomes = [("a", "test_x[1]", "passed"), ("a", "test_x[2]", "skipped"), ("sglang_events", "test_y", "failed")]
    report.write_text(
        "".join(json.dumps({"group": g, "test": t, "outcome": outcome}) + "\n" for g, t, outcome in outcomes)
    )
    version = conformance.engines()["sglang"].version
    old = [conformance.Results("sglang", version, "2000-01-01", {}), conformance.Results("sglang", "0.1", "", {})]
    results.write_bytes(msgspec.json.encode(old))
    monkeypatch.setattr(conformance, "RESULTS", results)
    monkeypatch.setattr(conformance, "PAGE", page)
    monkeypatch.setattr("sys.argv", ["conformance.py", "--date", "2026-01-02", f"sglang={report}"])
    assert conformance.main() == 0
    assert [(each.version, each.date, len(each.outcomes)) for each in conformance.load()] == [
        ("0.1", "", 0),
        (version, "2026-01-02", 3),
    ]
    assert f"| {version} | everything else | 1 failed, 1 passed, 1 skipped | 2026-01-02 |" in page.read_text()


@pytest.mark.parametrize(
    ("arguments", "says"), [(["vllm=x"], "need --date"), (["--date", "d", "vlm=x"], "no ENGINE=FILE")]
)
def test_mistakes_are_one_clear_line(
    arguments: list[str], says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["conformance.py", *arguments])
    with pytest.raises(SystemExit):
        conformance.main()
    assert says in capsys.readouterr().err
