"""What the tests with vLLM share: a checkpoint, prompts, and an engine whose store can be spoilt."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

from kvstore import connect
from kvstore.bench.daemon import Daemon
from kvstore.bench.vllm_engine import Engine

ROOT = Path(__file__).resolve().parents[2]
SESSION = Path(__file__).with_name("vllm_session.py")
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "PYTHONPATH": str(ROOT)}


def start_engine(model: Path, connector: dict[str, Any] | None, log: Path, **llm: Any) -> Engine:
    """An engine in float32 that keeps no prefixes itself, with `vllm_session`'s faults on offer."""
    settings = {"dtype": "float32", "enable_prefix_caching": False, **llm}
    return Engine(model, connector, log, session=[SESSION], environment=ENVIRONMENT, **settings)


SHAPE: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "initializer_range": 0.15,
}
"""Small, with weights large enough that attention is peaked, so that wrong KV changes tokens at once."""


def save_checkpoint(directory: Path) -> Path:
    """A Llama of three layers with random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(LlamaConfig(**SHAPE, num_hidden_layers=3, tie_word_embeddings=False))
    model.to(torch.float32).save_pretrained(directory)
    return directory


def save_windowed_checkpoint(directory: Path) -> Path:
    """A Gemma 3 with random weights: five layers of sliding windows and one of full attention."""
    import torch
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    model: Any = Gemma3ForCausalLM(Gemma3TextConfig(**SHAPE, num_hidden_layers=6, sliding_window=64))
    model.to(torch.float32).save_pretrained(directory)
    return directory


def mixed_prompts(seed: int = 0) -> list[list[int]]:
    """Twenty prompts of 69 to 310 tokens, most of which begin like others."""
    random_ = random.Random(seed)

    def ids(count: int) -> list[int]:
        return [random_.randrange(3, 500) for _ in range(count)]

    beginnings = [ids(64), ids(128), ids(160)]
    shared = [beginning + ids(random_.randrange(5, 150)) for beginning in beginnings for _ in range(6)]
    return [*shared, ids(96), ids(256)]


def second_turns(prompts: list[list[int]], answers: list[list[int]]) -> list[list[int]]:
    """Twelve of the conversations continued: prompt, answer, and a new question."""
    random_ = random.Random(99)
    turns = zip(prompts[:12], answers[:12], strict=True)
    return [[*prompt, *answer, *(random_.randrange(3, 500) for _ in range(20))] for prompt, answer in turns]


def flush(daemon: Daemon) -> None:
    """Wait until all that was put is on disk, and what an engine may still be putting has come."""
    with connect(daemon.url) as client:
        before, now = -1, 0
        for _ in range(20):
            before, now = now, client.stats()["tiers"]["dram"]["usage"]["entries"]
            if before == now:
                break
            time.sleep(0.5)
        assert client.flush(deadline_ms=30_000)
