"""The connectors' side of the quality gate: lossy KV is written and read only where it has passed."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import msgspec
import pytest

pytest.importorskip("transformers")

import torch

from kvstore import container, gate, gate_records, record_files
from kvstore.client import QUALITY_EXACT, Client
from kvstore.codec import Codec
from kvstore.codecs import registry
from kvstore.compose import open_store
from kvstore.config import Config, TierConfig
from kvstore.connectors.gate import run_gate
from kvstore.connectors.gate_trials import text_trials
from kvstore.connectors.transformers import TransformersConnector
from kvstore.embedded import EmbeddedClient
from kvstore.errors import ConfigError
from kvstore.gate import GateRecord
from kvstore.outcome import Reason
from kvstore.store import Store
from kvstore.testing.memory_client import MemoryClient
from kvstore.testing.models import VOCABULARY, random_model, random_prompt
from kvstore.testing.noise import NoiseCodec
from kvstore.tier import Tier
from kvstore.tiers.dram import DramTier
from kvstore.tiers.nvme import NvmeTier
from kvstore.transcode import Recipe

CHUNK = 16
PROMPT = random_prompt(3 * CHUNK + 5, 1)
FEW = msgspec.structs.replace(gate.STANDARD, scored_tokens_min=8)


@pytest.fixture(autouse=True)
def noise_is_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = EntryPoint("noise", "kvstore.testing.noise:NoiseCodec", registry.GROUP)
    monkeypatch.setitem(registry._entries(), "noise", entry)
    monkeypatch.delenv(record_files.DIRECTORIES_VARIABLE, raising=False)


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


def connect(client: Client, model: Any = None, **options: Any) -> TransformersConnector:
    return TransformersConnector(model or random_model(), client, chunk_tokens=CHUNK, load_policy="always", **options)


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
    monkeypatch.setenv(record_files.DIRECTORIES_VARIABLE, str(tmp_path))
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


class Lossy:
    """A model, its record, and a store whose nvme tier keeps chunks in codec int8."""

    def __init__(self, directory: Path) -> None:
        self.model = random_model()
        record = measure(self.model, registry.get("int8"))
        metrics = msgspec.structs.replace(record.levels[0].metrics, scored_tokens=4096)
        self.record = msgspec.structs.replace(record, levels=(gate.LevelResult(0, metrics),))
        tiers: list[Tier] = [DramTier(16 << 20), NvmeTier(directory / "nvme", capacity_bytes=64 << 20)]
        self.store = Store(tiers, codecs=registry, recipes={"nvme": Recipe("int8")}, gates=[self.record])
        self.client = EmbeddedClient(self.store)

    def connect(self, **options: Any) -> TransformersConnector:
        options = {"limits": FEW, "gates": [self.record], "codec": "raw", "durable": True, **options}
        return TransformersConnector(self.model, self.client, chunk_tokens=CHUNK, load_policy="always", **options)

    def forget_memory(self) -> None:
        assert self.store.memory is not None
        self.store.memory.delete([entry.key for entry in self.store.memory.scan()])


@pytest.fixture
def lossy(tmp_path: Path) -> Iterator[Lossy]:
    made = Lossy(tmp_path)
    yield made
    made.client.close()


@pytest.mark.parametrize("decode_in_store", [False, True])
def test_chunks_that_a_tier_made_lossy_serve_those_who_accept_them(lossy: Lossy, decode_in_store: bool) -> None:
    _, expected, report = lossy.connect().prefill(PROMPT)
    assert report.stored_chunks == 3
    assert lossy.store.counters.snapshot()["transcodes"] == {"done": 3}
    lossy.forget_memory()
    _, logits, report = lossy.connect(decode_in_store=decode_in_store).prefill(PROMPT)
    assert report.loaded_chunks == 3
    assert 0 < (logits - expected).abs().max() < 0.1


@pytest.mark.parametrize("decode_in_store", [False, True])
def test_who_does_not_accept_them_computes_and_puts_better_ones(lossy: Lossy, decode_in_store: bool) -> None:
    _, expected, _ = lossy.connect().prefill(PROMPT)
    lossy.forget_memory()
    _, logits, report = lossy.connect(gates=(), decode_in_store=decode_in_store).prefill(PROMPT)
    assert report.stop is not None
    assert report.stop.reason == Reason.UNGATED
    assert (report.loaded_chunks, report.stored_chunks) == (0, 3)
    assert torch.equal(logits, expected)
    _, logits, report = lossy.connect(min_quality=QUALITY_EXACT).prefill(PROMPT)
    assert report.loaded_chunks == 3
    lossy.forget_memory()
    _, logits, report = lossy.connect(min_quality=QUALITY_EXACT).prefill(PROMPT)
    assert report.stop is not None
    assert report.stop.reason == Reason.LOW_QUALITY
    assert report.stored_chunks == 3
    torch.testing.assert_close(logits, expected)


def test_exact_readers_chunks_stay_exact_in_a_lossy_tier(lossy: Lossy) -> None:
    exact = lossy.connect(limits=None, gates=None)
    _, expected, _ = exact.prefill(PROMPT)
    lossy.forget_memory()
    _, logits, report = exact.prefill(PROMPT)
    assert report.loaded_chunks == 3
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    assert lossy.store.counters.snapshot()["transcodes"] == {"exact_wanted": 3}


def test_decoded_chunks_of_unknown_origin_are_refused() -> None:
    client = MemoryClient()
    model = random_model()
    record = measure(model, NoiseCodec())
    connector = connect(client, model, limits=FEW, gates=[record])
    connector.prefill(PROMPT)
    for key, data in client.chunks.items():
        header = container.parse(memoryview(data))
        meta = msgspec.structs.replace(header.meta, flags=header.meta.flags | container.FLAG_FROM_LOSSY)
        packed = container.pack_header(msgspec.structs.replace(header, meta=meta))
        client.chunks[key] = packed + data[len(packed) :]
    _, _, report = connector.prefill(PROMPT)
    assert report.stop is not None
    assert report.stop.reason == Reason.UNGATED
    assert "does not say which" in report.stop.detail


def test_the_codec_that_the_store_asks_for_is_written(tmp_path: Path) -> None:
    model = random_model()
    for asked, written in (("lossless_dense", "lossless_dense"), ("ladder@1", "lossless"), ("as_is", "lossless")):
        config = Config(tiers={"dram": TierConfig(capacity="16MiB", codec=asked)})
        with EmbeddedClient(open_store(config)) as client:
            connect(client, model).prefill(PROMPT)
            assert client.store.memory is not None
            keys = [entry.key for entry in client.store.memory.scan()]
            assert len(keys) == 3
            assert {part.header.codec for part in client.fetch(keys) if part.header is not None} == {written}
