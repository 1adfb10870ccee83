"""Real vLLM on the CPU: greedy tokens in float32 are the same with the store as without it, whatever the store does.

Needs vLLM, so it runs by `make test-vllm` and is skipped elsewhere. Ten engine starts.
"""

from __future__ import annotations

import importlib
import importlib.util
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvstore import connect
from kvstore.bench.daemon import Daemon
from kvstore.bench.vllm_engine import Engine, Outcome
from kvstore.connectors.vllm.layouts import kv_views
from kvstore.testing.chunks import sample_spec
from kvstore.testing.vllm import cache_tensors
from tests.engines.vllm_interface import problems
from tests.engines.vllm_samples import (
    ROOT,
    flush,
    mixed_prompts,
    save_checkpoint,
    save_windowed_checkpoint,
    second_turns,
    start_engine,
)
from tests.engines.vllm_shared import PROMPT_TOKENS, TEXT, compare

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
    with start_engine(model, None, log, **TIGHT) as engine:
        return Reference(engine)


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    with Daemon(tmp_path, dram="256MiB", nvme="512MiB") as daemon:
        daemon.start().close()
        yield daemon


def settings(daemon: Daemon, **more: Any) -> dict[str, Any]:
    """With deadlines that busy cores do not miss, and loads of what so small a model computes sooner."""
    deadlines = {"lookup_deadline_ms": 30_000.0, "load_deadline_ms": 30_000.0, "store_deadline_ms": 30_000.0}
    return {"url": daemon.url, "chunk_tokens": CHUNK_TOKENS, "load_policy": "always", **deadlines, **more}


def test_the_connector_fits_this_version_of_vllm_and_is_found_by_its_name() -> None:
    import vllm
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    assert problems(Path(vllm.__file__).parents[1]) == []
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, _, function = project["entry-points"]["vllm.general_plugins"]["kvstore"].partition(":")
    getattr(importlib.import_module(module), function)()
    assert KVConnectorFactory.get_connector_class_by_name("KVStoreConnector").__module__.startswith("kvstore.")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("isa", ["vec", "vec16"])
def test_the_layout_is_what_the_kernels_of_vllm_write(isa: str, dtype: str) -> None:
    import torch
    from vllm import _custom_ops as kernels
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    spec = sample_spec(layers=1, kv_heads=2, dim=32, dtype=dtype)
    (cache,) = cache_tensors("LBHNC", spec, 4, 32)
    keys, values = torch.randn(2, 50, 2, 32, generator=torch.Generator().manual_seed(1)).to(cache.dtype)
    slots = torch.randperm(4 * 32, generator=torch.Generator().manual_seed(2))[:50]
    halves = cache.view(4, 2, 64, 32).chunk(2, dim=2)
    kernels.cpu_attn_reshape_and_cache(keys, values, *halves, slots, isa)
    views = kv_views(f"CPU_ATTN/{isa}", cache, heads=2, key_dim=32, value_dim=32)
    for written, view in zip((keys, values), views, strict=True):
        assert torch.equal(view[slots // 32, :, slots % 32], written)


def test_nothing_that_happens_to_the_store_changes_a_token(
    model: Path, log: Path, reference: Reference, daemon: Daemon
) -> None:
    with start_engine(model, settings(daemon), log, **TIGHT) as engine:
        cold = reference.check(engine)
        assert cold.counted("num_preemptions") > 0
        warm = reference.check(engine)
        assert sum(warm.cached) > sum(cold.cached)
        assert min(warm.cached) >= CHUNK_TOKENS
        missing = reference.check(engine, fault="miss", fault_rate=0.1)
        assert missing.counted("kvstore_failed_loads") > 0
        corrupt = reference.check(engine, fault="corrupt", fault_rate=0.1)
        assert corrupt.counted("kvstore_failed_loads") > missing.counted("kvstore_failed_loads")
        broken = reference.check(engine, fault="raise", fault_rate=0.1)
        assert broken.counted("kvstore_failed_loads") > corrupt.counted("kvstore_failed_loads")
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
    with start_engine(model, settings(daemon, codec="raw"), log, **ROOMY, enable_prefix_caching=True) as engine:
        reference.check(engine)
        salted = engine.run(reference.first, NEW_TOKENS, salt="another tenant")
        assert salted.tokens == reference.first_tokens
        assert sum(salted.cached) < sum(map(len, reference.first)) // 2
    flush(daemon)
    daemon.kill()
    daemon.start().close()
    served = hits(daemon)
    with start_engine(model, settings(daemon, load="sync"), log, **ROOMY) as engine:
        warm = engine.run(reference.first, NEW_TOKENS)
        assert warm.tokens == reference.first_tokens
        chunks = [len(prompt) // CHUNK_TOKENS for prompt in reference.first]
        # The last token is always computed; what is loaded before the step has to leave a block for it.
        expected = [
            min(count * CHUNK_TOKENS, (len(prompt) - 1) // ROOMY["block_size"] * ROOMY["block_size"])
            for count, prompt in zip(chunks, reference.first, strict=True)
        ]
        assert warm.cached == expected, warm.counters
        assert warm.counted("external_prefix_cache_hits") == sum(expected)
        assert hits(daemon) - served == sum(chunks)
        failing = reference.check(engine, fault="corrupt", fault_rate=0.1)
        assert failing.counted("kvstore_failed_loads.corrupt") > 0
        assert engine.run(reference.second, NEW_TOKENS).tokens == reference.second_tokens
        wrong = engine.run(reference.first, NEW_TOKENS, fault="unverified", fault_rate=1.0)
        assert wrong.tokens != reference.first_tokens, "the comparison would not notice wrong KV"


def test_what_one_rank_wrote_two_read_and_the_reverse(
    model: Path, log: Path, reference: Reference, daemon: Daemon, tmp_path: Path
) -> None:
    two: dict[str, Any] = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    large = {**ROOMY, **two, "block_size": 2 * CHUNK_TOKENS}
    expected = [len(prompt) // CHUNK_TOKENS * CHUNK_TOKENS for prompt in reference.first]
    whole_blocks = [tokens // large["block_size"] * large["block_size"] for tokens in expected]
    (tmp_path / "second").mkdir()
    with Daemon(tmp_path / "second", dram="256MiB") as other:
        other.start().close()
        with start_engine(model, settings(daemon), log, **ROOMY) as engine:
            assert engine.run(reference.first, NEW_TOKENS).tokens == reference.first_tokens
            flush(daemon)
        with start_engine(model, settings(daemon), log, **large) as engine:
            read = engine.run(reference.first, NEW_TOKENS)
            assert (read.tokens, read.cached) == (reference.first_tokens, whole_blocks)
        with start_engine(model, settings(other), log, **ROOMY, **two) as engine:
            assert engine.run(reference.first, NEW_TOKENS).tokens == reference.first_tokens
            flush(other)
        with start_engine(model, settings(other), log, **ROOMY) as engine:
            read = engine.run(reference.first, NEW_TOKENS)
            assert (read.tokens, read.cached) == (reference.first_tokens, expected)


def test_layers_with_sliding_windows_beside_others(log: Path, daemon: Daemon, tmp_path: Path) -> None:
    model, prompts = save_windowed_checkpoint(tmp_path / "windowed"), mixed_prompts()
    with start_engine(model, settings(daemon), log, **ROOMY) as engine:
        alone = engine.run(prompts, NEW_TOKENS, salt="nobody else")
        expected = alone.tokens
        assert engine.run(prompts, NEW_TOKENS).tokens == expected
        flush(daemon)
        warm = engine.run(prompts, NEW_TOKENS)
        assert warm.tokens == expected
        assert warm.cached == [len(prompt) // CHUNK_TOKENS * CHUNK_TOKENS for prompt in prompts]


def test_transformers_and_vllm_use_what_the_other_has_stored_where_both_opt_in(log: Path) -> None:
    both = compare(TEXT, "float32", log)
    assert both.cached_in_vllm == both.cached_in_transformers == [PROMPT_TOKENS // 64 * 64] * both.prompts
    assert both.unshared == 0, "a connector that has not opted in shares nothing"
    assert max(both.key_difference, both.value_difference) < 1e-5
    assert both.key_difference > 0, "nothing was shared, or the engines do not differ at all"
    assert both.kl < 1e-9
    assert both.same_first_tokens == both.prompts
    assert both.vllm_agrees == both.transformers_agree == both.engines_agree == 1.0


def hits(daemon: Daemon) -> int:
    """Chunks that the daemon has served."""
    with connect(daemon.url) as client:
        return sum(client.stats()["counters"].get("hits", {}).values())
