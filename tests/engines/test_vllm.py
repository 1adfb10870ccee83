"""Real vLLM on the CPU: greedy tokens in float32 are the same with the store as without it, whatever the store does.

Needs vLLM, so it runs by `make test-vllm` and is skipped elsewhere. Seven engine starts.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvstore.bench.daemon import Daemon
from tests.engines.vllm_engine import Engine, Outcome, mixed_prompts, save_checkpoint, second_turns

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed; see make test-vllm"),
]

NEW_TOKENS = 40
CHUNK_TOKENS = 64
# Few blocks and small steps: requests are preempted, and prompts computed in pieces.
TIGHT: dict[str, Any] = {
    "block_size": 32,
    "max_model_len": 512,
    "max_num_seqs": 6,
    "num_gpu_blocks_override": 36,
    "max_num_batched_tokens": 128,
}
ROOMY: dict[str, Any] = {"block_size": 32, "max_model_len": 512, "max_num_seqs": 8}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("log") / "vllm.log"


class Reference:
    """The thirty-two requests, and what vLLM alone answers."""

    def __init__(self, engine: Engine) -> None:
        self.first = mixed_prompts()
        self.first_tokens = engine.run(self.first, NEW_TOKENS).tokens
        self.second = second_turns(self.first, self.first_tokens)
        self.second_tokens = engine.run(self.second, NEW_TOKENS).tokens

    def check(self, engine: Engine, **options: Any) -> Outcome:
        """Run all requests, and compare; answers the second part's outcome."""
        first = engine.run(self.first, NEW_TOKENS, **options)
        assert first.tokens == self.first_tokens
        second = engine.run(self.second, NEW_TOKENS, **options)
        assert second.tokens == self.second_tokens
        return second


@pytest.fixture(scope="module")
def reference(model: Path, log: Path) -> Reference:
    with Engine(model, None, log, **TIGHT) as engine:
        return Reference(engine)


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    with Daemon(tmp_path, dram="256MiB", nvme="512MiB") as daemon:
        daemon.start().close()
        yield daemon


def settings(daemon: Daemon, **more: Any) -> dict[str, Any]:
    return {"url": daemon.url, "chunk_tokens": CHUNK_TOKENS, **more}


def flush(daemon: Daemon) -> None:
    """Wait until all that was put is on disk."""
    time.sleep(0.5)  # puts that the engine has begun
    from kvstore import connect

    with connect(daemon.url) as client:
        assert client.flush(deadline_ms=30_000)


def counted(outcome: Outcome, name: str) -> float:
    return sum(value for key, value in outcome.counters.items() if key.startswith(f"vllm:{name}"))


def test_nothing_that_happens_to_the_store_changes_a_token(
    model: Path, log: Path, reference: Reference, daemon: Daemon
) -> None:
    with Engine(model, settings(daemon), log, **TIGHT) as engine:
        cold = reference.check(engine)
        assert counted(cold, "num_preemptions") > 0
        warm = reference.check(engine)
        assert sum(warm.cached) > sum(cold.cached)
        assert min(warm.cached) >= CHUNK_TOKENS
        missing = reference.check(engine, fault="miss", fault_rate=0.1)
        assert counted(missing, "kvstore_failed_loads") > 0
        corrupt = reference.check(engine, fault="corrupt", fault_rate=0.1)
        assert counted(corrupt, "kvstore_failed_loads") > counted(missing, "kvstore_failed_loads")
        flush(daemon)
        daemon.kill()
        daemon.start().close()
        restarted = reference.check(engine)
        assert sum(restarted.cached) > sum(cold.cached)
        engine.start(reference.first, NEW_TOKENS, fault="slow", fault_rate=0.5)
        time.sleep(0.5)
        daemon.kill()
        assert engine.finish().tokens == reference.first_tokens
        assert reference.check(engine).finished == ["length"] * len(reference.second)


def test_a_second_process_reuses_what_the_first_has_stored(
    model: Path, log: Path, reference: Reference, daemon: Daemon
) -> None:
    # Codec raw, so that damage to a number is not noticed where hashes are made to fit.
    with Engine(model, settings(daemon, codec="raw"), log, **ROOMY) as engine:
        reference.check(engine)
        salted = engine.run(reference.first, NEW_TOKENS, salt="another tenant")
        assert salted.tokens == reference.first_tokens
        assert sum(salted.cached) < sum(map(len, reference.first)) // 2
    flush(daemon)
    served = hits(daemon)
    with Engine(model, settings(daemon, load="sync"), log, **ROOMY) as engine:
        warm = engine.run(reference.first, NEW_TOKENS)
        assert warm.tokens == reference.first_tokens
        chunks = [len(prompt) // CHUNK_TOKENS for prompt in reference.first]
        # The last token is always computed; what is loaded before the step has to leave a block for it.
        expected = [
            min(count * CHUNK_TOKENS, (len(prompt) - 1) // ROOMY["block_size"] * ROOMY["block_size"])
            for count, prompt in zip(chunks, reference.first, strict=True)
        ]
        assert warm.cached == expected
        assert counted(warm, "external_prefix_cache_hits") == sum(expected)
        assert hits(daemon) - served == sum(chunks)
        failing = reference.check(engine, fault="corrupt", fault_rate=0.1)
        assert counted(failing, "kvstore_failed_loads.corrupt") > 0
        assert engine.run(reference.second, NEW_TOKENS).tokens == reference.second_tokens
        wrong = engine.run(reference.first, NEW_TOKENS, fault="unverified", fault_rate=1.0)
        assert wrong.tokens != reference.first_tokens, "the comparison would not notice wrong KV"


def test_what_one_rank_wrote_two_read_and_the_reverse(
    model: Path, log: Path, reference: Reference, daemon: Daemon, tmp_path: Path
) -> None:
    two: dict[str, Any] = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    expected = [len(prompt) // CHUNK_TOKENS * CHUNK_TOKENS for prompt in reference.first]
    (tmp_path / "second").mkdir()
    with Daemon(tmp_path / "second", dram="256MiB") as other:
        other.start().close()
        with Engine(model, settings(daemon), log, **ROOMY) as engine:
            assert engine.run(reference.first, NEW_TOKENS).tokens == reference.first_tokens
            flush(daemon)
        with Engine(model, settings(daemon), log, **ROOMY, **two) as engine:
            read = engine.run(reference.first, NEW_TOKENS)
            assert (read.tokens, read.cached) == (reference.first_tokens, expected)
        with Engine(model, settings(other), log, **ROOMY, **two) as engine:
            assert engine.run(reference.first, NEW_TOKENS).tokens == reference.first_tokens
            flush(other)
        with Engine(model, settings(other), log, **ROOMY) as engine:
            read = engine.run(reference.first, NEW_TOKENS)
            assert (read.tokens, read.cached) == (reference.first_tokens, expected)


def hits(daemon: Daemon) -> int:
    """Chunks that the daemon has served."""
    from kvstore import connect

    with connect(daemon.url) as client:
        return sum(client.stats()["counters"]["hits"].values())
