"""A trained model answers across documents that come blended out of a store, where plain concatenation fails."""

from __future__ import annotations

import importlib.util
import random
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

import torch
from transformers import AutoModelForCausalLM

from kvstore.connectors.blend import registry
from kvstore.connectors.blend.connector import BlendConnector
from kvstore.connectors.model_identity import identify
from kvstore.spans import Document
from kvstore.testing.blend_pass import blend_record
from kvstore.testing.memory_client import MemoryClient

MODELS = Path(__file__).parent / "models"
QUESTIONS = 20


@pytest.fixture
def task(monkeypatch: pytest.MonkeyPatch) -> Any:
    spec = importlib.util.spec_from_file_location("recall_task", MODELS / "recall_task.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # its dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


def right(model: Any, sample: Any, policy: str, **settings: Any) -> int:
    """Questions across passages answered right, when the passages come out of a store."""
    own = registry.get(policy, **settings)
    connector = BlendConnector(
        model,
        MemoryClient(),
        preamble=sample.tokens[:1],
        policy=own,
        blend_gates=[blend_record(identify(model)[1], own)],
        load_policy="always",
    )
    for passage in sample.passages:
        connector.store_document(passage)
    documents = [Document(start, stop) for start, stop in sample.boundaries]
    asked = [at for at, cross in zip(sample.answer_positions, sample.cross, strict=True) if cross][:QUESTIONS]
    assert len(asked) >= 5
    count = 0
    for at in asked:
        ids = [*sample.tokens[: sample.context_length], *sample.tokens[at - 2 : at]]
        _, logits, report = connector.prefill(torch.tensor([ids]), documents=documents)
        assert report.blend is not None
        assert report.blend.moved_tokens == sum(map(len, sample.passages))
        count += int(logits.argmax()) == sample.tokens[at]
    return count * 100 // len(asked)


def test_questions_across_documents_are_answered(task: Any) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(MODELS / "recall", dtype=torch.float32, local_files_only=True)
    sample = task.make_sample(random.Random(3), **task.EVAL_SPECS["bindings_first_4p_long"])
    assert right(model, sample, "recommended", ratio=0.2) >= 90
    assert right(model, sample, "none") < 60
