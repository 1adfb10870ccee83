"""The trained test models are what their card says, and answer the same from stored KV as from computed KV."""

from __future__ import annotations

import importlib.util
import inspect
import random
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import kvstore
from kvstore.connectors.transformers import TransformersConnector

MODELS = Path(__file__).parent / "models"
WEIGHTS_BYTES_MAX = 16 << 20


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """More threads cost more than they bring on models this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def recall_task() -> ModuleType:
    """tests/models/recall_task.py."""
    spec = importlib.util.spec_from_file_location("recall_task", MODELS / "recall_task.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["recall_task"] = module  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


def load(name: str) -> Any:
    """A trained model in fp32."""
    model: Any = AutoModelForCausalLM.from_pretrained(MODELS / name, dtype=torch.float32)
    return model.eval()


def test_the_weights_are_small_enough_to_keep_in_the_repository() -> None:
    assert sum(path.stat().st_size for path in MODELS.glob("*/model.safetensors")) <= WEIGHTS_BYTES_MAX


def test_the_text_model_has_the_geometry_that_the_tests_need() -> None:
    model = load("text")
    config = model.config
    assert config.model_type == "llama"
    assert config.num_hidden_layers >= 6
    assert config.num_key_value_heads < config.num_attention_heads
    assert config.head_dim == 64
    assert 3e6 <= sum(parameter.numel() for parameter in model.parameters()) <= 8e6


def test_recall_needs_attention_between_passages(recall_task: ModuleType) -> None:
    model = load("recall")
    spec = {"bindings": 12, "aliases": 10, "passages": 2}
    with torch.no_grad():
        full = recall_task.accuracy(model, 1, 16, **spec)
        blocked = recall_task.accuracy(model, 1, 16, block_passages=True, **spec)
    assert full["one_hop"] >= 0.95
    assert full["two_hop"] >= 0.90
    assert blocked["two_hop"] <= full["two_hop"] - 0.2


def test_recall_from_stored_kv_is_the_same(recall_task: ModuleType, tmp_path: Path) -> None:
    model = load("recall")
    rng = random.Random(5)
    samples = [recall_task.make_sample(rng, bindings=20, aliases=16, passages=4, prefix=16) for _ in range(8)]
    url = f"embedded:{tmp_path}?dram=64MiB&nvme=64MiB"
    right = asked = 0
    for warm in (False, True):
        with kvstore.connect(url) as client:
            connector = TransformersConnector(model, client, chunk_tokens=32, durable=True, load_policy="always")
            for sample in samples:
                for position in sample.answer_positions[:6]:
                    prompt = torch.tensor([sample.tokens[:position]])
                    _, logits, report = connector.prefill(prompt)
                    with torch.no_grad():
                        expected = model(prompt).logits[:, -1]
                    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
                    assert not warm or report.reused_tokens >= 32 * ((position - 1) // 32)
                    asked += 1
                    right += int(logits.argmax()) == sample.tokens[position]
    assert right / asked >= 0.9


def test_real_text_continues_the_same_after_a_restart(tmp_path: Path) -> None:
    model = load("text")
    tokenizer = AutoTokenizer.from_pretrained(MODELS / "text")
    text = inspect.getsource(textwrap)
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    prompts = [ids[:, :end] for end in (300, 513, 768, 1100)]
    expected = [model.generate(prompt, max_new_tokens=12, do_sample=False, pad_token_id=1) for prompt in prompts]
    url = f"embedded:{tmp_path}?dram=64MiB&nvme=128MiB"
    for reused in ([0, 256, 512, 768], [256, 512, 512, 1024]):
        with kvstore.connect(url) as client:
            connector = TransformersConnector(model, client, durable=True, load_policy="always")
            for prompt, sequence, at_least in zip(prompts, expected, reused, strict=True):
                got, reports = connector.generate(prompt, max_new_tokens=12, do_sample=False, pad_token_id=1)
                assert torch.equal(got, sequence)
                assert reports[0].reused_tokens >= at_least
