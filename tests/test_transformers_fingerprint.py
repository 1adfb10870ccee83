"""KV is reused only by the model that computed it: weights, configuration, precision, rope, tenant, chunk size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("transformers")

import torch
from transformers import PreTrainedModel

from kvstore.connectors.hf_spec import kv_spec
from kvstore.connectors.transformers import TransformersConnector
from kvstore.connectors.weights import weights_digest
from kvstore.outcome import Reason
from kvstore.spec import KVSpec, Rope
from kvstore.testing.memory_client import MemoryClient, flip_bit
from kvstore.testing.models import FAMILIES, ROPES, random_model, random_prompt

PROMPT = random_prompt(40, 1)


def connect(model: PreTrainedModel, client: MemoryClient, **options: Any) -> TransformersConnector:
    return TransformersConnector(
        model, client, **{"chunk_tokens": 16, "codec": "raw", "load_policy": "always", **options}
    )


def fingerprint(model: PreTrainedModel) -> bytes:
    return connect(model, MemoryClient()).fingerprint


@pytest.mark.parametrize("family", FAMILIES)
def test_the_spec_is_the_models(family: str) -> None:
    model = random_model(family, dtype=torch.bfloat16)
    assert kv_spec(model) == KVSpec(
        layers=2,
        kv_heads=2,
        key_dim=16,
        value_dim=16,
        dtype="bfloat16",
        rope=Rope(kind="default", theta=10000.0, dims=16),
    )


def test_the_rope_is_the_models() -> None:
    assert kv_spec(random_model(rope="linear")).rope == Rope(
        kind="linear", theta=10000.0, dims=16, params={"factor": 4.0}
    )
    assert kv_spec(random_model(rope="llama3")).rope.params == {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64.0,
    }
    assert kv_spec(random_model(rope="yarn")).rope.params["attention_factor"] == pytest.approx(1.1386, abs=1e-4)


def test_the_same_model_has_the_same_fingerprint() -> None:
    assert fingerprint(random_model()) == fingerprint(random_model())


def test_cosmetic_fields_do_not_count() -> None:
    changes = {"eos_token_id": 5, "initializer_range": 0.2, "attention_dropout": 0.5, "name_or_path": "elsewhere"}
    assert fingerprint(random_model(changes=changes)) == fingerprint(random_model())


def test_everything_that_changes_kv_changes_the_fingerprint() -> None:
    models = [
        random_model(),
        random_model(seed=1),
        random_model("mistral"),
        random_model("mistral", window=20),
        random_model("mistral", window=21),
        random_model(changes={"rms_norm_eps": 1e-5}),
        random_model(changes={"hidden_act": "gelu"}),
        random_model(dtype=torch.bfloat16),
        *(random_model(rope=rope) for rope in ROPES if rope != "default"),
    ]
    assert len({fingerprint(model) for model in models}) == len(models)


def test_rounded_rotary_frequencies_are_other_weights() -> None:
    """Loading in bfloat16 keeps the frequencies in fp32, casting a loaded model rounds them: the KV differs."""
    cast, loaded = random_model(dtype=torch.bfloat16), random_model()
    for parameter in loaded.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    assert cast.model.rotary_emb.inv_freq.dtype == torch.bfloat16
    assert loaded.model.rotary_emb.inv_freq.dtype == torch.float32
    assert fingerprint(cast) != fingerprint(loaded)


def test_one_bit_of_one_weight_changes_the_digest() -> None:
    model = random_model()
    before = weights_digest(model)
    weight = model.model.layers[1].mlp.down_proj.weight
    weight.data.view(torch.int32)[3, 5] ^= 1
    assert weights_digest(model) != before
    weight.data.view(torch.int32)[3, 5] ^= 1
    assert weights_digest(model) == before


def test_names_and_shapes_count() -> None:
    def module(**tensors: torch.Tensor) -> torch.nn.Module:
        return torch.nn.ParameterDict({name: torch.nn.Parameter(tensor) for name, tensor in tensors.items()})

    digests = {
        weights_digest(module(a=torch.zeros(2, 3))),
        weights_digest(module(b=torch.zeros(2, 3))),
        weights_digest(module(a=torch.zeros(3, 2))),
        weights_digest(module(a=torch.zeros(2, 3, dtype=torch.float16))),
        weights_digest(module(a=torch.zeros(()))),
        weights_digest(module(a=torch.zeros(2), b=torch.zeros(4))),
    }
    assert len(digests) == 6


@pytest.mark.parametrize(
    "other",
    [
        lambda client: connect(random_model(seed=1), client),
        lambda client: connect(random_model(changes={"rms_norm_eps": 1e-5}), client),
        lambda client: connect(random_model(), client, salt=b"tenant"),
        lambda client: connect(random_model(), client, chunk_tokens=8),
    ],
    ids=["weights", "configuration", "tenant", "chunk size"],
)
def test_another_model_or_tenant_reuses_nothing(other: Callable[[MemoryClient], TransformersConnector]) -> None:
    client = MemoryClient()
    connect(random_model(), client).prefill(PROMPT)
    _, _, report = other(client).prefill(PROMPT)
    assert report.reused_tokens == 0
    assert report.stop is not None
    assert report.stop.reason == Reason.ABSENT


def test_bytes_of_another_model_under_the_right_name_are_not_used() -> None:
    mine, theirs = MemoryClient(), MemoryClient()
    _, expected, _ = connect(random_model(), mine).prefill(PROMPT)
    connect(random_model(seed=1), theirs).prefill(PROMPT)
    mine.chunks = dict(zip(mine.chunks, theirs.chunks.values(), strict=True))
    _, logits, report = connect(random_model(), mine).prefill(PROMPT)
    assert report.stop is not None
    assert report.stop.reason == Reason.WRONG_FINGERPRINT
    assert torch.equal(logits, expected)


def test_weights_changed_in_place_are_another_model() -> None:
    client, model = MemoryClient(), random_model()
    connector = connect(model, client)
    before = connector.fingerprint
    connector.prefill(PROMPT)
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight.mul_(2)
    _, logits, report = connector.prefill(PROMPT)
    assert report.reused_tokens == 0
    assert connector.fingerprint != before
    with torch.no_grad():
        torch.testing.assert_close(logits, model(PROMPT).logits[:, -1], rtol=0, atol=1e-4)
    model.model.layers[0].self_attn.k_proj.weight = torch.nn.Parameter(torch.zeros(32, 64))
    assert connector.prefill(PROMPT)[2].reused_tokens == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_one_wrong_bit_would_change_the_tokens(family: str) -> None:
    """The control of every comparison of tokens: KV that is wrong under a right hash is seen in the answer."""
    client, model = MemoryClient(), random_model(family)
    connector = connect(model, client)
    right, _ = connector.generate(PROMPT, max_new_tokens=8, do_sample=False)
    client.chunks = {key: flip_bit(container, keep_hashes=False) for key, container in client.chunks.items()}
    wrong, (report,) = connector.generate(PROMPT, max_new_tokens=8, do_sample=False)
    assert report.reused_tokens == 32
    assert not torch.equal(wrong, right)
