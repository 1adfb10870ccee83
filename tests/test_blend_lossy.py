"""Documents in a lossy codec: blended where the gate has passed codec and blending together, else computed."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("transformers")

import torch

from kvstore.client import Client
from kvstore.codec import Codec
from kvstore.codecs import registry
from kvstore.connectors.blend import engine, run
from kvstore.connectors.blend.connector import BlendConnector
from kvstore.connectors.blend.policies.hkvd import HighDeviation
from kvstore.connectors.blend.prompt import Prompt
from kvstore.connectors.model_identity import identify
from kvstore.errors import ConfigError
from kvstore.testing.blend_pass import BAD, blend_record, gate_record
from kvstore.testing.memory_client import MemoryClient
from kvstore.testing.models import random_model, random_prompt

CHUNK = 16
LEVEL = 3
PREAMBLE = random_prompt(6, 99)[0].tolist()
DOCUMENT = random_prompt(2 * CHUNK, 1)[0].tolist()
IDS = torch.tensor([[*PREAMBLE, *DOCUMENT, *random_prompt(9, 98)[0].tolist()]])
POLICY = HighDeviation(ratio=0.5)
NOISE = ((1e-3, 2e-3),) * 3


@pytest.fixture(scope="module")
def model() -> Any:
    return random_model("llama", changes={"num_hidden_layers": 3})


def blending(model: Any, client: Client, lossy: list[dict[str, Any]], *, codec: Codec | None = None) -> BlendConnector:
    spec, fingerprint = identify(model)
    codec = codec or registry.get("ladder")
    assert max(plan.level for plan in codec.plan(spec, CHUNK)) == LEVEL
    exact = blend_record(fingerprint, POLICY)
    records = [exact, *(blend_record(fingerprint, POLICY, codec=codec, level=LEVEL, **own) for own in lossy)]
    return BlendConnector(
        model,
        client,
        preamble=PREAMBLE,
        policy=POLICY,
        codec=codec,
        gates=[gate_record(fingerprint, codec, LEVEL)],
        blend_gates=records,
        chunk_tokens=CHUNK,
        load_policy="always",
    )


def test_lossy_documents_are_blended_with_their_noise_floor(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Prompt] = []
    blend_into = engine.blend_into

    def spied(model: Any, spec: Any, prompt: Prompt, *args: Any, **options: Any) -> Any:
        seen.append(prompt)
        return blend_into(model, spec, prompt, *args, **options)

    monkeypatch.setattr(run, "blend_into", spied)
    connector = blending(model, MemoryClient(), [{"noise": NOISE}])
    assert connector.store_document(DOCUMENT).chunks == 2
    _, _, report = connector.prefill(IDS)
    assert report.blend is not None
    assert report.blend.moved_tokens == 2 * CHUNK
    assert [span.source.noise for span in seen[0].spans if not span.source.exact] == [NOISE, NOISE]


@pytest.mark.parametrize("lossy", [[], [{"metrics": BAD}]], ids=["not measured", "failed"])
def test_lossy_documents_without_a_pass_for_blending_are_computed(model: Any, lossy: list[dict[str, Any]]) -> None:
    client = MemoryClient()
    blending(model, client, [{}]).store_document(DOCUMENT)
    _, logits, report = blending(model, client, lossy).prefill(IDS)
    assert report.blend is None
    assert {span.reason for span in report.spans if span.start in (6, 22)} == {"ungated"}
    with torch.no_grad():
        torch.testing.assert_close(logits, model(IDS).logits[:, -1], rtol=0, atol=1e-4)


def test_the_codec_s_own_gate_is_needed_too(model: Any) -> None:
    with pytest.raises(ConfigError, match="codec: .*ladder"):
        BlendConnector(
            model,
            MemoryClient(),
            policy=POLICY,
            codec="ladder",
            gates=[],
            blend_gates=[blend_record(identify(model)[1], POLICY)],
        )
