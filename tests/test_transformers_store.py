"""The transformers connector on a real store: memory and disk tiers, a restart, and damage on the disk."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("transformers")

import torch

import kvstore
from kvstore.connector import ReuseReport
from kvstore.connectors.transformers import TransformersConnector
from kvstore.testing.models import random_model, random_prompt

CHUNK = 16


@pytest.mark.parametrize("codec", ["raw", "lossless"])
def test_prompts_come_back_after_a_restart(tmp_path: Path, codec: str) -> None:
    model, prompt = random_model("qwen3", dtype=torch.bfloat16), random_prompt(5 * CHUNK + 3, 1)
    url = f"embedded:{tmp_path}?dram=8MiB&nvme=32MiB"
    expected = model.generate(prompt, max_new_tokens=8, do_sample=False)

    def run(*, durable: bool = False) -> ReuseReport:
        with kvstore.connect(url) as client:
            connector = TransformersConnector(
                model, client, chunk_tokens=CHUNK, codec=codec, durable=durable, load_policy="always"
            )
            sequences, (report,) = connector.generate(prompt, max_new_tokens=8, do_sample=False)
        assert torch.equal(sequences, expected)
        return report

    cold = run(durable=True)
    assert (cold.reused_tokens, cold.stored_chunks, cold.store_failures) == (0, 5, {})
    warm = run()
    assert (warm.reused_tokens, warm.stored_chunks, warm.misses) == (5 * CHUNK, 0, {})


def test_a_closed_store_is_gone_around() -> None:
    model, prompt = random_model(), random_prompt(40, 2)
    client = kvstore.connect("embedded:?dram=8MiB")
    connector = TransformersConnector(model, client, chunk_tokens=CHUNK, codec="raw", load_policy="always")
    expected, _ = connector.generate(prompt, max_new_tokens=4, do_sample=False)
    client.close()
    sequences, (report,) = connector.generate(prompt, max_new_tokens=4, do_sample=False)
    assert torch.equal(sequences, expected)
    assert report.reused_tokens == 0
    assert report.stop is not None
    assert sum(report.store_failures.values()) == 2
