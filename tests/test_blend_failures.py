"""What a blend does when the store does not: chunks that are late, damaged or foreign, and a store that goes away."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

import torch

from kvstore.bench.daemon import Daemon
from kvstore.client import Client, Part
from kvstore.compose import open_store
from kvstore.config import Config, TierConfig
from kvstore.connectors.blend.connector import BlendConnector
from kvstore.connectors.blend.outcomes import BlendedReport
from kvstore.connectors.blend.policies.recommended import Recommended
from kvstore.connectors.model_identity import identify
from kvstore.container import parse
from kvstore.embedded import EmbeddedClient
from kvstore.outcome import Miss, Reason
from kvstore.spans import Document
from kvstore.testing.blend_pass import blend_record
from kvstore.testing.memory_client import FaultyClient, flip_bit
from kvstore.testing.models import random_model, random_prompt

CHUNK = 16
LAYERS = 3
PREAMBLE = random_prompt(6, 99)[0].tolist()
DOCUMENTS = [random_prompt(2 * CHUNK, seed)[0].tolist() for seed in (1, 2)]
IDS = torch.tensor([[*PREAMBLE, *DOCUMENTS[0], *DOCUMENTS[1], *random_prompt(9, 98)[0].tolist()]])
STOPS = [len(PREAMBLE) + 2 * CHUNK * count for count in range(3)]
POINTED_OUT = [Document(start, stop) for start, stop in pairwise(STOPS)]  # a scan may find them only with the next plan
POLICY = Recommended(ratio=0.3)
TOLERANCE = 1e-4
PATIENT_MS = 60_000.0


@pytest.fixture(scope="module")
def model() -> Any:
    # wide enough that every layer is a group of its own, as in real models
    return random_model("llama", changes={"num_hidden_layers": LAYERS})


def blending(model: Any, client: Client, **options: Any) -> BlendConnector:
    records = [blend_record(identify(model)[1], POLICY)]
    settings = {"load_policy": "always", "load_deadline_ms": PATIENT_MS, "codec": "raw", **options}
    return BlendConnector(
        model, client, preamble=PREAMBLE, policy=POLICY, blend_gates=records, chunk_tokens=CHUNK, **settings
    )


class GroupsClient(FaultyClient):
    """Serves chunks layer by layer, and may be told what becomes of each layer.

    `layer_gate(index, layer)` is called first; it may wait, and answers a miss for the chunk from this layer on, or
    None. What is in `damaged` is served instead of what is stored.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layer_gate: Callable[[int, int], Miss | None] = lambda index, layer: None
        self.damaged: dict[bytes, bytes] = {}

    def fetch(self, keys: Sequence[bytes], **options: Any) -> Iterator[Part]:
        if options.get("order") != "layer":
            yield from super().fetch(keys, **options)
            return
        self.chunks, whole = {**self.chunks, **self.damaged}, self.chunks
        parts = {part.index: part for part in super().fetch(keys, **{**options, "order": "chunk"})}
        self.chunks = whole
        groups = max((len(part.groups) for part in parts.values()), default=0)
        gone = set()
        for layer in range(max(1, groups)):
            for index, part in parts.items():
                if index in gone:
                    continue
                miss = part.miss or self.layer_gate(index, layer)
                gone |= {index} if miss else set()
                yield Part(index, miss) if miss else Part(index, None, part.header, part.groups[layer : layer + 1])


@pytest.fixture
def client(model: Any, monkeypatch: pytest.MonkeyPatch) -> GroupsClient:
    """A store that holds both documents, every layer in a segment of its own."""
    monkeypatch.setattr("kvstore.codec.LAYER_GROUP_BYTES", 1)
    client = GroupsClient()
    connector = blending(model, client)
    for document in DOCUMENTS:
        connector.store_document(document)
    assert {len(parse(memoryview(data)).groups()) for data in pieces(client).values()} == {LAYERS}
    return client


def pieces(client: GroupsClient) -> dict[bytes, bytes]:
    return {key: data for key, data in client.chunks.items() if parse(memoryview(data)).codec == "raw"}


def alone(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(IDS).logits[:, -1]
    return logits


def reasons(report: BlendedReport) -> dict[int, str]:
    return {span.start: span.reason for span in report.spans if span.kind == "recompute"}


def check_full_prefill(model: Any, logits: torch.Tensor, report: BlendedReport) -> None:
    assert report.blend is None
    assert report.reused_tokens == 0
    torch.testing.assert_close(logits, alone(model), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("reason", [Reason.IO_ERROR, Reason.BUSY, Reason.DEADLINE, Reason.UNKNOWN_PROFILE])
def test_a_chunk_that_misses_is_computed_and_the_others_blended(
    model: Any, client: GroupsClient, reason: Reason
) -> None:
    client.miss[list(pieces(client))[1]] = reason
    _, _, report = blending(model, client).prefill(IDS)
    assert report.blend is not None
    assert report.blend.moved_tokens == 3 * CHUNK
    assert reasons(report)[len(PREAMBLE) + CHUNK] == reason


@pytest.mark.parametrize("layer", range(LAYERS))
def test_a_chunk_that_is_lost_in_any_layer_is_computed(model: Any, client: GroupsClient, layer: int) -> None:
    """Layers before it have been computed over the chunk by then: that run is thrown away."""
    client.layer_gate = lambda index, own: Miss(Reason.IO_ERROR) if (index, own) == (2, layer) else None
    _, logits, report = blending(model, client).prefill(IDS)
    assert report.blend is not None
    assert report.blend.moved_tokens == 3 * CHUNK
    assert reasons(report)[len(PREAMBLE) + 2 * CHUNK] == "io_error"
    client.layer_gate = lambda index, own: Miss(Reason.IO_ERROR) if index == 2 else None
    torch.testing.assert_close(logits, blending(model, client).prefill(IDS)[1], rtol=0, atol=TOLERANCE)


def test_all_chunks_lost_is_a_full_prefill_which_is_exact_and_stored(model: Any, client: GroupsClient) -> None:
    client.layer_gate = lambda index, own: Miss(Reason.IO_ERROR) if own == LAYERS - 1 else None
    _, logits, report = blending(model, client).prefill(IDS)
    check_full_prefill(model, logits, report)
    assert report.stored_chunks == IDS.shape[1] // CHUNK


@pytest.mark.parametrize("damage", ["flip", "truncate", "swap", "foreign"])
def test_damaged_and_foreign_chunks_are_computed(model: Any, client: GroupsClient, damage: str) -> None:
    first, second = list(pieces(client))[:2]
    if damage == "flip":
        client.damaged[first] = flip_bit(client.chunks[first], keep_hashes=True)
    elif damage == "truncate":
        client.damaged[first] = client.chunks[first][:-1]
    elif damage == "swap":
        client.damaged[first] = client.chunks[second]
    else:
        other = GroupsClient()
        stranger = random_model("llama", seed=9, changes={"num_hidden_layers": LAYERS})
        blending(stranger, other).store_document(DOCUMENTS[0])
        client.damaged[first] = next(iter(pieces(other).values()))
    _, logits, report = blending(model, client).prefill(IDS)
    wanted = {"flip": "corrupt", "truncate": "truncated", "swap": "wrong_key", "foreign": "wrong_"}[damage]
    assert reasons(report)[len(PREAMBLE)].startswith(wanted)
    assert report.blend is not None
    assert report.blend.moved_tokens == 3 * CHUNK
    assert bool(torch.isfinite(logits).all())


def test_a_layer_that_is_late_is_not_waited_for(model: Any, client: GroupsClient) -> None:
    def stall(index: int, layer: int) -> Miss | None:
        time.sleep(1.0 if layer == 1 else 0.0)
        return None

    client.layer_gate = stall
    connector = blending(model, client, load_deadline_ms=150.0)
    started = time.monotonic()
    _, logits, report = connector.prefill(IDS)
    assert time.monotonic() - started < 60
    check_full_prefill(model, logits, report)
    assert set(reasons(report).values()) >= {"deadline"}


def test_pipelining_computes_the_first_layers_before_the_last_have_come(model: Any, client: GroupsClient) -> None:
    """The store hands out layer 2 only once the engine has computed layer 0."""
    computed: list[int] = []
    for index, layer in enumerate(model.base_model.layers):
        layer.register_forward_hook(lambda *_args, own=index: computed.append(own))
    seen: list[bool] = []

    def gated(index: int, layer: int) -> Miss | None:
        deadline = time.monotonic() + 30
        while layer == LAYERS - 1 and computed.count(0) < 2 and time.monotonic() < deadline:
            time.sleep(0.001)  # once for the preamble, once for the first run of the query
        seen.append(computed.count(0) >= 2)
        return None

    client.layer_gate = gated
    _, _, report = blending(model, client).prefill(IDS)
    assert seen[-1]
    assert report.blend is not None
    assert report.discarded_runs == 0


@pytest.mark.parametrize("verb", ["plan", "lookup", "fetch", "put", "head"])
def test_a_client_that_raises_never_reaches_the_engine(
    model: Any, client: GroupsClient, verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise OSError("gone")

    connector = blending(model, client, store_documents=True)
    monkeypatch.setattr(client, verb, fail)
    _, logits, report = connector.prefill(IDS)
    if verb in ("plan", "fetch", "lookup", "head"):
        assert report.blend is None or verb in ("lookup", "head")
    assert bool(torch.isfinite(logits).all())
    stored = connector.store_document(random_prompt(20, 77)[0].tolist())
    assert (stored.failures == {}) == (verb != "put")


def test_over_a_real_store_with_a_disk(model: Any, tmp_path: Path) -> None:
    tiers = {
        "dram": TierConfig(kind="dram", capacity="32MiB"),
        "nvme": TierConfig(kind="nvme", capacity="64MiB", options={"path": str(tmp_path / "nvme")}),
    }
    with EmbeddedClient(open_store(Config(tiers=tiers))) as client:
        connector = blending(model, client, durable=True)
        for document in DOCUMENTS:
            connector.store_document(document)
        report = connector.prefill(IDS, documents=POINTED_OUT)[2]
        assert report.blend is not None
        logits = connector.prefill(IDS, documents=POINTED_OUT)[1]
    with EmbeddedClient(open_store(Config(tiers=tiers))) as client:  # read from disk
        _, again, report = blending(model, client).prefill(IDS, documents=POINTED_OUT)
        assert report.blend is not None
        assert report.blend.moved_tokens == 4 * CHUNK
        torch.testing.assert_close(again, logits, rtol=0, atol=TOLERANCE)


def test_a_daemon_that_is_killed_costs_a_prefill_and_nothing_else(model: Any, tmp_path: Path) -> None:
    with Daemon(tmp_path, dram="32MiB", nvme="64MiB") as daemon:
        with daemon.start() as client:
            connector = blending(model, client, durable=True)
            for document in DOCUMENTS:
                connector.store_document(document)
            _, _, report = connector.prefill(IDS, documents=POINTED_OUT)
            assert report.blend is not None
            assert client.flush()
            daemon.kill()
            _, logits, report = connector.prefill(IDS, documents=POINTED_OUT)
            check_full_prefill(model, logits, report)
            assert {span.reason for span in report.spans} == {"unavailable"}
            assert connector.store_document(DOCUMENTS[0][::-1]).failures == {Reason.UNAVAILABLE: 2}
        with daemon.start() as client:
            _, _, report = blending(model, client).prefill(IDS, documents=POINTED_OUT)
            assert report.blend is not None
            assert report.blend.moved_tokens == 4 * CHUNK
