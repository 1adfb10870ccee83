"""Time to first token on a random-weight model of Qwen2.5-0.5B geometry, where recomputing a prompt costs real time.

Cold: the model alone. Miss: through the connector with nothing stored. Warm: the prompt's chunks come out of the
daemon's memory, or, after kill -9 and a restart, from its disk (read with O_DIRECT, so not from the page cache).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from kvstore.bench.daemon import Daemon
from kvstore.bench.first_token import Generated, generate
from kvstore.bench.timing import median
from kvstore.client import Client
from kvstore.connectors.transformers import TransformersConnector

QUESTION_TOKENS = 32
NEW_TOKENS = 2


def measure(directory: Path, quick: bool) -> dict[str, float]:
    """`ttft.*` metrics; seconds, and ratios to cold."""
    torch.manual_seed(0)
    model = half_billion_model(layers=2 if quick else 24)
    metrics: dict[str, float] = {}
    lengths = {"": 512} if quick else {"": 2048, "_4k": 4096}
    for suffix, tokens in lengths.items():
        print(f"ttft: prompt of {tokens} + {QUESTION_TOKENS} tokens")
        metrics |= _measure_length(directory / f"run{suffix}", model, tokens, suffix, rounds=1 if quick else 3)
    return metrics


def half_billion_model(*, layers: int = 24) -> Any:
    """A PreTrainedModel: random weights in the shape of Qwen2.5-0.5B (24 layers, 2 KV heads of 64), bfloat16."""
    config = Qwen2Config(
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=layers,
        num_attention_heads=14,
        num_key_value_heads=2,
        max_position_embeddings=32768,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
        tie_word_embeddings=True,
        dtype="bfloat16",
    )
    model: Any = Qwen2ForCausalLM(config)
    return model.to(torch.bfloat16).eval()


def _measure_length(directory: Path, model: Any, tokens: int, suffix: str, *, rounds: int) -> dict[str, float]:
    directory.mkdir()
    cold: list[float] = []
    miss: list[float] = []
    dram: list[float] = []
    nvme: list[float] = []
    loads_dram: list[float] = []
    loads_nvme: list[float] = []
    equal = True
    reused = 0
    with Daemon(directory, dram="1GiB", nvme="2GiB") as daemon:
        for round_index in range(rounds):
            generator = torch.Generator().manual_seed(1000 * tokens + round_index)
            prompt = torch.randint(0, 150000, (1, tokens + QUESTION_TOKENS), generator=generator)
            reference = generate(model.generate, prompt, NEW_TOKENS)
            cold.append(reference.ttft_seconds)
            with daemon.start() as client:
                miss.append(_through(client, model, prompt).ttft_seconds)
                warm = _through(client, model, prompt)
                dram.append(warm.ttft_seconds)
                client.flush()
            daemon.kill()
            with daemon.start() as client:
                from_disk = _through(client, model, prompt)
                nvme.append(from_disk.ttft_seconds)
            daemon.kill()
            reused = warm.extra[0].reused_tokens
            loads_dram.append(warm.extra[0].load_ms / 1e3)
            loads_nvme.append(from_disk.extra[0].load_ms / 1e3)
            equal &= reference.tokens == warm.tokens == from_disk.tokens
            print(
                f"  cold {cold[-1]:.2f} s, miss {miss[-1]:.2f} s,"
                f" warm dram {dram[-1]:.3f} s ({loads_dram[-1]:.3f} of it loading),"
                f" warm nvme {nvme[-1]:.3f} s ({loads_nvme[-1]:.3f}),"
                f" {reused} tokens reused, equal tokens: {'yes' if equal else 'no'}"
            )
    return {
        f"ttft.cold_seconds{suffix}": median(cold),
        f"ttft.warm_dram_seconds{suffix}": median(dram),
        f"ttft.warm_nvme_seconds{suffix}": median(nvme),
        f"ttft.miss_vs_cold{suffix}": median([m / c for m, c in zip(miss, cold, strict=True)]),
        f"ttft.warm_vs_cold{suffix}": median([w / c for w, c in zip(dram, cold, strict=True)]),
        f"ttft.warm_nvme_vs_cold{suffix}": median([w / c for w, c in zip(nvme, cold, strict=True)]),
        f"ttft.load_dram_seconds{suffix}": median(loads_dram),
        f"ttft.load_nvme_seconds{suffix}": median(loads_nvme),
        f"ttft.reused_tokens{suffix}": reused,
        f"ttft.equal_tokens{suffix}": float(equal),
    }


def _through(client: Client, model: Any, prompt: torch.Tensor) -> Generated:
    connector = TransformersConnector(model, client)
    return generate(connector.generate, prompt, NEW_TOKENS)
