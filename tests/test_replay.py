"""Replaying traces: the figures of small traces worked out by hand, made-up workloads, files that are no traces."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore import cli
from kvstore.bench.replay import Chain, belady, chains, compare, replay
from kvstore.bench.replay_trace import KINDS, Request, TraceError, read_trace, synthetic
from kvstore.tiers.policies.registry import EVICTIONS, open_policy


def prompts_of(*prompts: tuple[int, ...]) -> list[Chain]:
    return chains([Request(0, 512 * len(blocks), 1, blocks) for blocks in prompts])


def test_only_leading_blocks_are_hits() -> None:
    prompts = prompts_of((1, 2, 3), (1, 2, 4), (9, 2), (1, 2, 3))
    outcome = replay(prompts, open_policy("lru", capacity_bytes=100), 100)
    assert (outcome.asked, outcome.found, outcome.written) == (11, 2 + 0 + 3, 5)


def test_lru_evicts_the_end_of_the_chain_used_longest_ago() -> None:
    prompts = prompts_of((1, 2, 3), (4, 5), (1, 2, 3))
    outcome = replay(prompts, open_policy("lru", capacity_bytes=4), 4)
    assert (outcome.found, outcome.written) == (2, 6)


@settings(max_examples=60, deadline=None)
@given(
    tails=st.lists(st.tuples(st.integers(0, 5), st.integers(1, 5)), min_size=1, max_size=60),
    capacity=st.integers(1, 12),
)
def test_no_policy_finds_more_than_the_one_that_knows_the_future(tails: list[tuple[int, int]], capacity: int) -> None:
    prompts = prompts_of(*(tuple(10 * family + depth for depth in range(length)) for family, length in tails))
    best = belady(prompts, capacity)
    for eviction in EVICTIONS:
        outcome = replay(prompts, open_policy(eviction, capacity_bytes=capacity), capacity)
        assert outcome.found <= best.found
        assert outcome.asked == best.asked


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_made_up_workloads_are_in_order_and_the_same_for_the_same_seed(kind: str) -> None:
    requests = synthetic(kind, 300, seed=4)
    assert len(requests) == 300
    assert requests == synthetic(kind, 300, seed=4)
    assert requests != synthetic(kind, 300, seed=5)
    assert [request.timestamp for request in requests] == sorted(request.timestamp for request in requests)
    assert compare(chains(requests), [100_000])["replay.lru.hit_100k"] > 0.05


def test_the_command_replays_a_file(tmp_path: Path) -> None:
    trace, report = tmp_path / "trace.jsonl", tmp_path / "report.json"
    lines = [
        {"timestamp": request.timestamp, "input_length": 512, "output_length": 9, "hash_ids": request.hash_ids}
        for request in synthetic("chat", 60)
    ]
    trace.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    assert cli.main(["bench", "replay", "--trace", str(trace), "--json", str(report), "--dir", str(tmp_path)]) == 0
    metrics = json.loads(report.read_text())["metrics"]
    assert metrics["replay.requests"] == 60
    for policy in ("belady", "default", "lru"):
        for capacity in ("1k", "5k", "10k", "30k", "50k"):
            assert 0 <= metrics[f"replay.{policy}.hit_{capacity}"] <= 1
    assert metrics["replay.lru.writes_vs_lru_1k"] == 1
    assert metrics["replay.default.writes_vs_lru_1k"] <= 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no requests"),
        ('{"timestamp": 1, "input_length": 1, "output_length": 1, "hash_ids": [1]}\n{', "line 2"),
        ('{"timestamp": 1}', "line 1: .*needs timestamp, input_length"),
        ('{"timestamp": 1, "input_length": 1, "output_length": 1, "hash_ids": ["x"]}', "line 1"),
    ],
)
def test_a_file_that_is_no_trace_is_an_error_that_names_the_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(text)
    with pytest.raises(TraceError, match=message):
        read_trace(path)
    with pytest.raises(TraceError, match="cannot read"):
        read_trace(tmp_path / "absent")


def test_a_trace_for_another_suite_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["bench", "tiers", "--trace", "x"])
    assert "--trace is for the suite replay" in capsys.readouterr().err
