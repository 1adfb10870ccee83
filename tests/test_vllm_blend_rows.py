"""Rows of a prompt on layers of vLLM's shape: computing all again is a full prefill, computing none concatenation."""

from __future__ import annotations

import math
import time
from typing import Any

import pytest

pytest.importorskip("transformers")

import torch

from kvstore.connectors.blend.engine import blend_prefill
from kvstore.connectors.blend.policies.first_k import FirstK
from kvstore.connectors.blend.policies.hkvd import HighDeviation
from kvstore.connectors.blend.policies.none import Nothing
from kvstore.connectors.blend.policies.query import QueryAttention
from kvstore.connectors.blend.policies.recommended import Recommended
from kvstore.connectors.blend.policy import Policy
from kvstore.connectors.blend.report import BlendReport
from kvstore.connectors.blend.sources import Source, of_layers
from kvstore.connectors.hf_spec import kv_spec
from kvstore.connectors.torch_kv import TorchKV
from kvstore.connectors.vllm import blend_rows
from kvstore.connectors.vllm.blend_model import ModelFinder, RowsModel
from kvstore.connectors.vllm.blend_rows import TooLateError
from kvstore.connectors.vllm.blend_run import blend_beginning
from kvstore.errors import UnsupportedModelError
from kvstore.testing.blending import Blendable, blendable, full_prefill
from kvstore.testing.models import FAMILIES, ROPES, random_model
from kvstore.testing.vllm_layers import NoAttention, VllmShaped

TOLERANCE = 1e-4
EVERYTHING: tuple[Policy, ...] = (FirstK(tokens=1000), HighDeviation(ratio=1.0), Recommended(ratio=1.0))
SOME: tuple[Policy, ...] = (FirstK(4), HighDeviation(ratio=0.3), QueryAttention(ratio=0.3), Recommended(ratio=0.3))


def blend(model: Any, prompt: Blendable, policy: Policy, sources: list[Source] | None = None) -> tuple[Any, Any]:
    """KV of all but the query, a list of (K, V), and the report."""
    own = prompt.sources if sources is None else sources
    spec = kv_spec(model)
    room = TorchKV.allocate(spec, 1, len(prompt.ids), torch.device("cpu"))
    stop = prompt.sources[-1].stop
    with torch.no_grad():
        report = blend_beginning(RowsModel(VllmShaped(model)), room, prompt.ids, stop, own, policy, math.inf)
    return [(keys[:, :, :stop], values[:, :, :stop]) for keys, values in room.layers], report


def assert_near(found: Any, cache: Any) -> None:
    for (keys, values), layer in zip(found, cache.layers, strict=True):
        torch.testing.assert_close(keys, layer.keys[:, :, : keys.shape[2]], rtol=0, atol=TOLERANCE)
        torch.testing.assert_close(values, layer.values[:, :, : keys.shape[2]], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_computing_all_again_is_a_full_prefill(family: str, rope: str) -> None:
    model = random_model(family, rope=rope)
    prompt = blendable(model)
    _, cache = full_prefill(model, prompt.ids)
    for policy in EVERYTHING:
        found, report = blend(model, prompt, policy)
        assert_near(found, cache)
        assert report.token_share == 1.0


@pytest.mark.parametrize("policy", [Nothing(), *SOME], ids=lambda policy: policy.name)
@pytest.mark.parametrize("slab", [5, 256])
def test_every_policy_does_what_it_does_on_transformers(
    policy: Policy, slab: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blend_rows, "SLAB_ROWS", slab)
    model = random_model("qwen3", changes={"num_hidden_layers": 4})
    prompt = blendable(model)
    expected = blend_prefill(model, prompt.ids, prompt.sources, policy)
    found, report = blend(model, prompt, policy)
    assert_near(found, expected.cache)
    assert report.moved_rows == expected.report.moved_rows


def test_an_exact_beginning_is_kept() -> None:
    model = random_model("llama")
    prompt = blendable(model)
    _, cache = full_prefill(model, prompt.ids)
    stop = prompt.sources[0].start
    beginning: Any = [(layer.keys[0, :, :stop], layer.values[0, :, :stop]) for layer in cache.layers]
    sources = [Source(0, prompt.ids[:stop], of_layers(beginning), exact=True), *prompt.sources]
    found, report = blend(model, prompt, FirstK(tokens=1000), sources)
    assert_near(found, cache)
    assert (report.exact_tokens, report.fresh_tokens) == (stop, 7)


def test_a_run_ends_at_its_deadline() -> None:
    model = random_model("llama")
    prompt = blendable(model)
    room = TorchKV.allocate(kv_spec(model), 1, len(prompt.ids), torch.device("cpu"))
    rows = RowsModel(VllmShaped(model))
    late = time.monotonic() - 1
    with pytest.raises(TooLateError):
        blend_beginning(rows, room, prompt.ids, prompt.sources[-1].stop, prompt.sources, Nothing(), late)
    assert rows.running is None


def test_the_engine_s_own_modules_are_not_changed() -> None:
    shaped = VllmShaped(random_model("llama"))
    before = [(module, dict(module._modules)) for module in shaped.modules()]
    rows = RowsModel(shaped)
    assert [(module, dict(module._modules)) for module in shaped.modules()] == before
    assert isinstance(shaped.model.layers[0].self_attn.attn, NoAttention)  # type: ignore[union-attr]
    own = {id(parameter) for layer in rows.layers for parameter in layer.parameters()}
    assert own <= {id(parameter) for parameter in shaped.parameters()}


def test_models_built_otherwise_are_refused_by_name() -> None:
    with pytest.raises(UnsupportedModelError, match="Linear has no decoder layers"):
        RowsModel(torch.nn.Linear(1, 1))
    windowed = VllmShaped(random_model("llama"))
    windowed.model.layers[1].self_attn.attn.sliding_window = 8  # type: ignore[union-attr]
    with pytest.raises(UnsupportedModelError, match="layer 1 has a sliding window"):
        RowsModel(windowed)


def test_the_model_is_found_when_it_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    shaped, other = VllmShaped(random_model("llama")), VllmShaped(random_model("llama"))
    attention: Any = shaped.model.layers[0].self_attn.attn  # type: ignore[union-attr]
    ids = torch.tensor([1, 2])
    finder = ModelFinder("VllmShaped", attention)
    other(ids)
    assert finder.model() == "the model has not been called yet"
    shaped(ids)
    assert "not one of vLLM's own" in str(finder.model())
    monkeypatch.setattr(VllmShaped, "__module__", "vllm.model_executor.models.llama")
    finder = ModelFinder("VllmShaped", attention)
    shaped(ids)
    assert isinstance(finder.model(), RowsModel)
    assert not torch.nn.modules.module._global_forward_pre_hooks
    finder.close()


def test_a_report_says_what_was_computed() -> None:
    model = random_model("llama")
    prompt = blendable(model)
    _, report = blend(model, prompt, Nothing())
    assert isinstance(report, BlendReport)
    assert (report.moved_tokens, report.moved_rows) == (72, (0, 0))
