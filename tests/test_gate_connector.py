"""The connectors' side of the quality gate: lossy KV is written and read only where it has passed."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import msgspec
import pytest

pytest.importorskip("transformers")

import torch

from kvstore import gate, gate_records
from kvstore.codec import Codec
from kvstore.codecs import registry
from kvstore.connectors.gate import run_gate
from kvstore.connectors.gate_trials import text_trials
from kvstore.connectors.transformers import TransformersConnector
from kvstore.errors import ConfigError
from kvstore.gate import GateRecord
from kvstore.outcome import Reason
from kvstore.testing.memory_client import MemoryClient
from kvstore.testing.models import VOCABULARY, random_model, random_prompt
from kvstore.testing.noise import NoiseCodec

CHUNK = 16
PROMPT = random_prompt(3 * CHUNK + 5, 1)
FEW = msgspec.structs.replace(gate.STANDARD, scored_tokens_min=8)


@pytest.fixture(autouse=True)
def noise_is_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = EntryPoint("noise", "kvstore.testing.noise:NoiseCodec", registry.GROUP)
    monkeypatch.setitem(registry._entries(), "noise", entry)
    monkeypatch.delenv(gate_records.DIRECTORIES_VARIABLE, raising=False)


def measure(model: Any, codec: Codec) -> GateRecord:
    ids = random_prompt(400, 2)[0].tolist()
    text = text_trials(
        ids,
        start=[],
        tokens_max=400,
        chunk_tokens=CHUNK,
        following=8,
        seed=0,
        positions_max=2048,
        vocabulary=VOCABULARY,
    )
    (record,) = run_gate(model, [codec], text=text, limits=FEW, chunk_tokens=CHUNK).records
    return record


def connect(client: MemoryClient, model: Any = None, **options: Any) -> TransformersConnector:
    return TransformersConnector(model or random_model(), client, chunk_tokens=CHUNK, **options)


def test_a_lossy_codec_without_a_record_is_refused_with_the_command() -> None:
    with pytest.raises(ConfigError) as caught:
        connect(MemoryClient(), codec="noise")
    message = str(caught.value)
    assert message.startswith("codec: codec 'noise' level 1 is lossy and has not been measured on model ")
    assert message.endswith(
        "use 'lossless', or get a pass with: "
        "kvstore gate --model MODEL --dtype float32 --chunk-tokens 16 --codecs noise --text FILE..."
    )
    assert "\n" not in message


def test_a_codec_that_failed_is_refused_with_what_failed() -> None:
    model = random_model()
    good = measure(model, NoiseCodec())
    metrics = msgspec.structs.replace(good.levels[1].metrics, kl_nats=0.5)
    bad = msgspec.structs.replace(good, levels=(good.levels[0], gate.LevelResult(1, metrics)))
    with pytest.raises(ConfigError, match="fails the quality gate of this model: KL nats 0.5, at most 0.02; use"):
        connect(MemoryClient(), codec="noise", gates=[bad], limits=FEW)


def test_a_variant_needs_a_record_of_its_own() -> None:
    model = random_model()
    record = measure(model, NoiseCodec())
    with pytest.raises(ConfigError, match=r"codec 'noise' \(deviation=0.5\) level 1 is lossy and has not been"):
        connect(MemoryClient(), codec=NoiseCodec(deviation=0.5), gates=[record], limits=FEW)


def test_a_record_of_other_weights_is_none() -> None:
    record = measure(random_model(seed=1), NoiseCodec())
    with pytest.raises(ConfigError, match="has not been measured on model"):
        connect(MemoryClient(), codec="noise", gates=[record], limits=FEW)


def test_weights_that_change_later_need_a_record_too() -> None:
    model = random_model()
    connector = connect(MemoryClient(), model, codec="noise", gates=[measure(model, NoiseCodec())], limits=FEW)
    with torch.no_grad():
        model.base_model.layers[0].self_attn.k_proj.weight.mul_(2)
    with pytest.raises(ConfigError, match="has not been measured on model"):
        connector.prefill(PROMPT)


def test_a_pass_in_the_profiles_directory_opens_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model()
    gate_records.save(measure(model, NoiseCodec()), tmp_path)
    monkeypatch.setenv(gate_records.DIRECTORIES_VARIABLE, str(tmp_path))
    client = MemoryClient()
    _, expected, cold = connect(client, model, codec="noise", limits=FEW).prefill(PROMPT)
    _, logits, warm = connect(client, model, codec="noise", limits=FEW).prefill(PROMPT)
    assert (cold.stored_chunks, warm.reused_tokens, warm.misses) == (3, 3 * CHUNK, {})
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)  # level 1 is exact
    with pytest.raises(ConfigError, match="tokens scored"):
        connect(client, model, codec="noise")  # by the standard limits that was too little text


def test_exact_connectors_neither_find_nor_take_lossy_chunks() -> None:
    model, client = random_model(), MemoryClient()
    records = [measure(model, NoiseCodec())]
    _, _, cold = connect(client, model, codec="noise", gates=records, limits=FEW).prefill(PROMPT)
    assert cold.stored_chunks == 3
    lossy = dict(client.chunks)
    exact = connect(client, model, gates=records)
    _, _, report = exact.prefill(PROMPT)
    assert (report.loaded_chunks, report.stored_chunks) == (0, 3)
    assert not set(lossy) & (set(client.chunks) - set(lossy))


def test_a_lossy_chunk_whose_record_is_gone_is_a_miss_with_its_reason() -> None:
    model, client = random_model(), MemoryClient()
    connect(client, model, codec="noise", gates=[measure(model, NoiseCodec())], limits=FEW).prefill(PROMPT)
    _, _, report = connect(client, model, limits=FEW, gates=[]).prefill(PROMPT)
    assert report.loaded_chunks == 0
    assert report.stop is not None
    assert report.stop.reason == Reason.UNGATED
    assert "codec 'noise' level 1 is lossy and has not been measured" in report.stop.detail


def test_a_connector_with_limits_reads_lossy_chunks_and_writes_exact_ones() -> None:
    """A daemon may have made the chunks lossy on their way down; what the connector writes is its own choice."""
    model, client = random_model(), MemoryClient()
    records = [measure(model, NoiseCodec())]
    connect(client, model, codec="noise", gates=records, limits=FEW).prefill(PROMPT)
    _, _, report = connect(client, model, gates=records, limits=FEW).prefill(PROMPT)
    assert (report.loaded_chunks, report.misses) == (3, {})
