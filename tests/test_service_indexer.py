"""/query and /query_by_hash answer routers in the forms of Dynamo's and Mooncake's indexers."""

from __future__ import annotations

import contextlib
import http.client
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.compose import open_store
from kvstore.config import Config, ModelConfig, ServiceConfig, Settings, TierConfig, load
from kvstore.connect import connect
from kvstore.connectors.vllm.naming import ModelName
from kvstore.connectors.vllm.settings import VllmSettings
from kvstore.errors import ConfigError
from kvstore.events import EventRing
from kvstore.hash_index import HashIndex, block_hash
from kvstore.keys import KeyScheme
from kvstore.service.bodies import decode_body
from kvstore.service.indexer import QueryByHashRequest, QueryRequest
from kvstore.service.refusal import RefusalError
from kvstore.testing.chunks import FINGERPRINT, sample_container, sample_key, sample_spec
from kvstore.testing.client_harness import put_chunk
from kvstore.testing.serving import ServerThread, small_store
from kvstore.tier import Entry

TOKENS = [int(token) for token in np.random.default_rng(3).integers(0, 1 << 32, 70)]
CHUNK_TOKENS = 16
SALT = "tenant ü"
KEYS = KeyScheme(FINGERPRINT, chunk_tokens=CHUNK_TOKENS, salt=SALT.encode()).chain(TOKENS)
MODELS = {
    "org/model": ModelConfig(fingerprint=FINGERPRINT.hex(), chunk_tokens=CHUNK_TOKENS, salt=SALT),
    "sql-adapter": ModelConfig(fingerprint="ab" * 32, chunk_tokens=CHUNK_TOKENS),
}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ServerThread]:
    config = ServiceConfig(request_keys_max=10, instance_id="7", models=MODELS)
    with ServerThread(small_store(tmp_path), config) as running:
        yield running


def ask(server: ServerThread, path: str, **body: object) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server.port, timeout=20)
    try:
        connection.request("POST", path, msgspec.json.encode(body))
        answer = connection.getresponse()
        return answer.status, msgspec.json.decode(answer.read())
    finally:
        connection.close()


def put(server: ServerThread, keys: list[bytes], *, durable: bool = True) -> None:
    """Chunks in memory and on disk, if there is one."""
    with connect(server.unix_url) as client:
        chunks = [put_chunk(key, sample_container(key, tokens=CHUNK_TOKENS)) for key in keys]
        assert all(status.stored for status in client.put(chunks, durable=durable))


def leave_memory(server: ServerThread, key: bytes) -> None:
    assert server.store.memory is not None
    assert server.store.memory.delete([key]) == [True]


def hashes(keys: list[bytes]) -> list[int]:
    return [block_hash(key) for key in keys]


def signed(number: int) -> int:
    return number - (1 << 64) if number >> 63 else number


def test_dynamos_form_counts_each_place_with_those_before_it(server: ServerThread) -> None:
    put(server, KEYS[:3])
    leave_memory(server, KEYS[1])
    status, answer = ask(server, "/query", model_name="org/model", token_ids=TOKENS, routing_group="default")
    instance = {"longest_matched": 48, "gpu": 0, "dp": {"0": 0}, "cpu": 16, "disk": 48}
    assert (status, answer) == (200, {"scores": {}, "frequencies": [], "instances": {"7": instance}})
    assert ask(server, "/query_by_hash", model_name="org/model", block_hashes=hashes(KEYS)) == (200, answer)
    negative = [signed(number) for number in hashes(KEYS)]
    assert ask(server, "/query_by_hash", model_name="org/model", block_hashes=negative) == (200, answer)


def test_mooncakes_form_counts_each_place_alone(server: ServerThread) -> None:
    put(server, KEYS[:3])
    leave_memory(server, KEYS[0])
    question = {"model": "org/model", "block_size": CHUNK_TOKENS, "tenant_id": "acme", "additionalsalt": "w8a8"}
    status, answer = ask(server, "/query", **question, token_ids=TOKENS)
    instance = {"longest_matched": 48, "GPU": 0, "DP": {"0": 48}, "CPU": 0, "DISK": 48}
    assert (status, answer) == (200, {"acme": {"7": instance}})
    assert ask(server, "/query_by_hash", **question, seq_hashes=hashes(KEYS)) == (200, answer)
    assert ask(server, "/query", **question, token_ids=TOKENS, instance_id="7")[1] == answer
    assert ask(server, "/query", **question, token_ids=TOKENS, instance_id=7)[1] == answer
    assert ask(server, "/query", **question, token_ids=TOKENS, instance_id="other") == (200, {"acme": {}})


def test_chunks_on_the_gpu_count_as_such(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="needs the torch extra")
    tiers = {
        "hbm": TierConfig(capacity="4MiB", options={"device": "cpu"}),
        "dram": TierConfig(capacity="16MiB"),
    }
    with ServerThread(open_store(Config(tiers=tiers)), ServiceConfig(models=MODELS)) as server:
        put(server, KEYS[:3], durable=False)
        assert all(status.stored for status in server.store.prefetch(KEYS[:2], tier="hbm", deadline_ms=20_000))
        answer = ask(server, "/query", model_name="org/model", token_ids=TOKENS)[1]
        assert (answer["scores"], answer["frequencies"]) == ({"kvstore": {"0": 32}}, [1, 1])
        there = {"longest_matched": 48, "gpu": 32, "dp": {"0": 32}, "cpu": 48, "disk": 48}
        assert answer["instances"] == {"kvstore": there}
        answer = ask(server, "/query", model="org/model", block_size=16, token_ids=TOKENS)[1]
        alone = {"longest_matched": 48, "GPU": 32, "DP": {"0": 48}, "CPU": 48, "DISK": 0}
        assert answer == {"default": {"kvstore": alone}}


@pytest.mark.parametrize(("block_size", "matched"), [(1, 48), (5, 45), (32, 32), (64, 0)])
def test_tokens_are_counted_in_the_routers_whole_blocks(server: ServerThread, block_size: int, matched: int) -> None:
    put(server, KEYS[:3])
    answer = ask(server, "/query", model="org/model", block_size=block_size, token_ids=TOKENS)[1]
    assert answer["default"]["7"]["longest_matched"] == matched


def test_what_is_not_there_matches_nothing(server: ServerThread) -> None:
    nothing: dict[str, Any] = {"scores": {}, "frequencies": [], "instances": {}}
    for token_ids in (TOKENS, TOKENS[:15], []):
        assert ask(server, "/query", model_name="org/model", token_ids=token_ids) == (200, nothing)
    assert ask(server, "/query_by_hash", model_name="org/model", block_hashes=[1, -1, 1 << 80]) == (200, nothing)
    put(server, KEYS[1:])  # the first chunk of the chain is missing
    assert ask(server, "/query", model_name="org/model", token_ids=TOKENS) == (200, nothing)
    empty = {"longest_matched": 0, "GPU": 0, "DP": {"0": 0}, "CPU": 0, "DISK": 0}
    assert ask(server, "/query", model="org/model", block_size=16, token_ids=TOKENS)[1] == {"default": {"7": empty}}


def test_salts_and_adapters_select_other_chunks(server: ServerThread) -> None:
    salted = KeyScheme(FINGERPRINT, chunk_tokens=CHUNK_TOKENS, salt=SALT.encode(), extras={"cache_salt": "mine"})
    put(server, salted.chain(TOKENS))
    put(server, KeyScheme(b"\xab" * 32, chunk_tokens=CHUNK_TOKENS).chain(TOKENS)[:1])
    question = {"model_name": "org/model", "token_ids": TOKENS}
    assert ask(server, "/query", **question)[1]["instances"] == {}
    assert ask(server, "/query", **question, cache_salt="mine")[1]["instances"]["7"]["longest_matched"] == 64
    assert ask(server, "/query", **question, lora_name="sql-adapter")[1]["instances"]["7"]["longest_matched"] == 16


def test_what_vllms_connector_stores_is_found_by_the_fingerprint_that_it_logs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    settings = VllmSettings(url="unix:/x", chunk_tokens=CHUNK_TOKENS, salt=SALT, weights_identity="w")
    keys = ModelName(settings, sample_spec(), [], {}, "").scheme_wait("mine").chain(TOKENS)
    (logged,) = re.findall(r"the model's fingerprint is (\w+)", caplog.text)
    models = {"m": ModelConfig(fingerprint=logged, chunk_tokens=CHUNK_TOKENS, salt=SALT)}
    with ServerThread(small_store(tmp_path), ServiceConfig(models=models)) as server:
        put(server, keys)
        answer = ask(server, "/query", model_name="m", token_ids=TOKENS, cache_salt="mine")[1]
    assert answer["instances"]["kvstore"]["longest_matched"] == 64


def test_hashes_of_what_was_there_before_the_daemon_are_known(tmp_path: Path) -> None:
    config = ServiceConfig(models=MODELS)
    with ServerThread(small_store(tmp_path), config) as server:
        put(server, KEYS)
    with ServerThread(small_store(tmp_path), config) as server:
        answer = ask(server, "/query_by_hash", model_name="org/model", block_hashes=hashes(KEYS))[1]
        assert answer["instances"]["kvstore"] == {"longest_matched": 64, "gpu": 0, "dp": {"0": 0}, "cpu": 0, "disk": 64}


@pytest.mark.parametrize(
    ("change", "status", "field", "message"),
    [
        ({"model_name": "org/modell"}, 404, "model_name", "did you mean 'org/model'"),
        ({"lora_name": "sql"}, 404, "lora_name", "unknown model 'sql'"),
        ({"model_name": ""}, 400, "model_name", "either model_name"),
        ({"model": "org/model"}, 400, "model_name", "either model_name"),
        ({"model_name": "", "model": "org/model"}, 400, "block_size", "needs block_size"),
        ({"lora_id": 3}, 400, "lora_id", "give lora_name"),
        ({"block_size": 0}, 400, "block_size", ">= 1"),
        ({"model_name": "x" * 257}, 400, "model_name", "<= 256"),
        ({"token_ids": [-1]}, 400, "token_ids[0]", ">= 0"),
        ({"token_ids": [1] * 161}, 413, "token_ids", "161 token ids; at most 160"),
    ],
)
def test_mistakes_are_refused_by_field(
    server: ServerThread, change: dict[str, object], status: int, field: str, message: str
) -> None:
    got, answer = ask(server, "/query", **{"model_name": "org/model", "token_ids": TOKENS, **change})
    assert (got, answer["error"].get("field")) == (status, field)
    assert message in answer["error"]["message"]


@pytest.mark.parametrize(
    ("change", "status", "field"),
    [
        ({"block_hashes": None}, 400, "seq_hashes"),
        ({"seq_hashes": [1]}, 400, "seq_hashes"),
        ({"block_hashes": [1] * 11}, 413, "seq_hashes"),
        ({"block_hashes": ["1"]}, 400, "block_hashes[0]"),
        ({"block_size": 64}, 400, "block_size"),
    ],
)
def test_mistakes_with_hashes_are_refused_by_field(
    server: ServerThread, change: dict[str, object], status: int, field: str
) -> None:
    got, answer = ask(server, "/query_by_hash", **{"model_name": "org/model", "block_hashes": [1], **change})
    assert (got, answer["error"].get("field")) == (status, field)


def test_a_daemon_that_names_no_model_says_so(tmp_path: Path) -> None:
    with ServerThread(small_store(tmp_path, nvme="")) as server:
        status, answer = ask(server, "/query", model_name="m", token_ids=[])
    assert status == 404
    assert "service.models" in answer["error"]["message"]


def test_a_router_needs_the_token(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("0123456789abcdef0123")
    token.chmod(0o600)
    with ServerThread(small_store(tmp_path, nvme=""), ServiceConfig(token_file=str(token), models=MODELS)) as server:
        assert ask(server, "/query", model_name="org/model", token_ids=TOKENS)[0] == 401
        assert ask(server, "/query_by_hash", model_name="org/model", block_hashes=[])[0] == 401


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200) | st.recursive(st.none() | st.integers() | st.text(), st.lists, max_leaves=9).map(
    lambda value: msgspec.json.encode({"model": value, "token_ids": value, "block_hashes": value})
))  # fmt: skip
def test_whatever_is_sent_is_a_question_or_refused(body: bytes) -> None:
    for kind in (QueryRequest, QueryByHashRequest):
        with contextlib.suppress(RefusalError):
            assert isinstance(decode_body(body, kind), kind)


class Scanned:
    """Of a tier what the index asks."""

    def __init__(self, keys: list[bytes]) -> None:
        self.keys = keys
        self.scans = 0

    def scan(self) -> Iterator[Entry]:
        self.scans += 1
        return iter([Entry(key, b"", 1) for key in self.keys])


def test_the_index_of_hashes_follows_the_events_and_is_bounded() -> None:
    keys = [sample_key(number) for number in range(600)]
    ring, tier = EventRing(16), Scanned(keys[:2])
    index = HashIndex([tier], ring, hashes_max=8)  # type: ignore[list-item]
    assert index.find(hashes(keys[:3])) == [*keys[:2], None]
    ring.emit("stored", "dram", keys[2], 1)
    ring.emit("removed", "dram", keys[0], 1)
    assert index.find([*hashes(keys[:3]), block_hash(keys[1]) + (7 << 64)]) == [*keys[:3], keys[1]]
    assert tier.scans == 1
    for key in keys[3:]:  # more than the ring holds: the tiers are read again
        ring.emit("stored", "dram", key, 1)
    assert index.find(hashes(keys[-8:])) == keys[-8:]
    assert (tier.scans, len(index)) == (2, 8)
    assert index.find(hashes(keys[:3])) == [None] * 3


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"fingerprint": "ab"}, "service.models.m.fingerprint is 'ab'"),
        ({"fingerprint": "ab" * 32, "chunk_tokens": 0}, "service.models.m.chunk_tokens is 0"),
        ({"fingerprintt": "ab" * 32}, "did you mean 'fingerprint'"),
    ],
)
def test_a_wrong_model_in_the_configuration_is_one_clear_line(model: dict[str, object], message: str) -> None:
    wanted = Settings()
    wanted.add({"service": {"models": {"m": model}}}, "test")
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        wanted.resolve()


def test_models_come_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "kvstore.toml"
    path.write_text(f'[service]\ninstance_id = "7"\n[service.models."org/model"]\nfingerprint = "{"ab" * 32}"\n')
    config, _ = load(str(path), environment={})
    assert config.service.models["org/model"] == ModelConfig(fingerprint="ab" * 32)
