"""Lookup and explain over HTTP, by keys and by token ids: one answer, whichever way the chain is given."""

from __future__ import annotations

import http.client
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from kvstore.config import ServiceConfig
from kvstore.connect import connect
from kvstore.keys import KeyScheme
from kvstore.service import prompts
from kvstore.testing.chunks import FINGERPRINT, sample_container
from kvstore.testing.client_harness import put_chunk
from kvstore.testing.serving import ServerThread, small_store

TOKENS = [int(token) for token in np.random.default_rng(7).integers(0, 1 << 32, 70)]
CHUNK_TOKENS = 16
BY_TOKENS = {"token_ids": TOKENS, "fingerprint": FINGERPRINT.hex(), "chunk_tokens": CHUNK_TOKENS}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ServerThread]:
    config = ServiceConfig(request_keys_max=100, inflight_max=4)
    with ServerThread(small_store(tmp_path, nvme=""), config) as running:
        yield running


def ask(server: ServerThread, verb: str, body: object) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server.port, timeout=20)
    try:
        connection.request("POST", f"/v1/{verb}", body if isinstance(body, bytes) else msgspec.json.encode(body))
        answer = connection.getresponse()
        return answer.status, msgspec.json.decode(answer.read())
    finally:
        connection.close()


def put_prompt(server: ServerThread, keys: list[bytes]) -> None:
    with connect(server.unix_url) as client:
        client.put([put_chunk(key, sample_container(key, tokens=CHUNK_TOKENS)) for key in keys])


@pytest.mark.parametrize(
    ("salt", "extras"),
    [
        (b"", {}),
        (b"tenant \xff", {}),
        (b"", {"image": "cat", "count": 3, "digest": b"\x00\xff"}),
        (b"t", {"": "", "negative": -(1 << 80)}),
    ],
)
def test_both_ways_give_the_same_answer(
    server: ServerThread, salt: bytes, extras: Mapping[str, str | bytes | int]
) -> None:
    keys = KeyScheme(FINGERPRINT, chunk_tokens=CHUNK_TOKENS, salt=salt, extras=extras).chain(TOKENS)
    assert len(keys) == 4
    put_prompt(server, [keys[0], keys[1], keys[3]])
    body = BY_TOKENS | {
        "salt": salt.hex(),
        "extras": {name: {"hex": value.hex()} if isinstance(value, bytes) else value for name, value in extras.items()},
    }
    hexed = [key.hex() for key in keys]
    status, by_keys = ask(server, "lookup", {"keys": hexed})
    assert (status, by_keys["tiers"], by_keys["stop"]["reason"]) == (200, ["dram", "dram"], "absent")
    assert ask(server, "lookup", body) == (200, by_keys | {"keys": hexed})

    status, by_keys = ask(server, "explain", {"keys": hexed})
    assert [chunk["why"] for chunk in by_keys["chunks"]] == ["present", "present", "absent", "parent_absent"]
    assert [chunk["key"] for chunk in by_keys["chunks"]] == hexed
    assert ask(server, "explain", body) == (status, by_keys)


def test_explain_by_token_ids_knows_the_wrong_chunk_size(server: ServerThread) -> None:
    put_prompt(server, KeyScheme(FINGERPRINT, chunk_tokens=CHUNK_TOKENS).chain(TOKENS))
    status, answer = ask(server, "explain", BY_TOKENS | {"chunk_tokens": 32})
    assert status == 200
    assert [chunk["why"] for chunk in answer["chunks"]] == ["wrong_chunk_tokens"] * 2
    assert "in chunks of 16 tokens, not of 32" in answer["chunks"][0]["detail"]


def test_long_prompts_are_answered_by_a_worker(tmp_path: Path) -> None:
    tokens = list(range(3 * prompts.INLINE_TOKENS_MAX))
    with ServerThread(small_store(tmp_path, nvme="")) as server:
        status, answer = ask(server, "lookup", BY_TOKENS | {"token_ids": tokens})
        assert status == 200
        keys = KeyScheme(FINGERPRINT, chunk_tokens=CHUNK_TOKENS).chain(tokens)
        assert answer["keys"] == [key.hex() for key in keys]
        assert ask(server, "explain", BY_TOKENS | {"token_ids": tokens})[1]["chunks"][-1]["why"] == "absent"


def test_fewer_tokens_than_a_chunk_have_no_keys(server: ServerThread) -> None:
    for tokens in ([], TOKENS[:15]):
        status, answer = ask(server, "lookup", BY_TOKENS | {"token_ids": tokens})
        assert (status, answer["tiers"], answer["stop"], answer["keys"]) == (200, [], None, [])
        assert ask(server, "explain", BY_TOKENS | {"token_ids": tokens}) == (200, {"chunks": []})


@pytest.mark.parametrize("verb", ["lookup", "explain"])
@pytest.mark.parametrize(
    ("change", "status", "field", "message"),
    [
        ({"keys": []}, 400, "keys", "either keys, or token_ids"),
        ({"token_ids": None}, 400, "keys", "either keys, or token_ids"),
        ({"token_ids": None, "keys": []}, 400, "fingerprint", "fingerprint belongs to token_ids"),
        ({"fingerprint": ""}, 400, "fingerprint", "fingerprint has 0 bytes; a model's has 32"),
        ({"fingerprint": "ab"}, 400, "fingerprint", "fingerprint has 1 bytes"),
        ({"fingerprint": "zz" * 32}, 400, "fingerprint", "write bytes as hexadecimal"),
        ({"fingerprint": "ab " * 32}, 400, "fingerprint", "write bytes as hexadecimal"),
        ({"salt": "abc"}, 400, "salt", "write bytes as hexadecimal"),
        ({"token_ids": [1, 2, -1]}, 400, "token_ids[2]", ">= 0"),
        ({"token_ids": [1 << 32]}, 400, "token_ids[0]", "<= 4294967295"),
        ({"token_ids": [1 << 80]}, 400, "token_ids[0]", ""),
        ({"token_ids": [1.5]}, 400, "token_ids[0]", "Expected `int`"),
        ({"token_ids": [True]}, 400, "token_ids[0]", "Expected `int`"),
        ({"token_ids": "1,2"}, 400, "token_ids", "Expected `array | null`"),
        (
            {"token_ids": [1] * 1601},
            413,
            "token_ids",
            "1601 token ids; with this chunk_tokens a request has at most 1600",
        ),
        ({"chunk_tokens": 0}, 400, "chunk_tokens", ">= 1"),
        ({"chunk_tokens": 65537}, 400, "chunk_tokens", "<= 65536"),
        ({"extras": {"a": 1.5}}, 400, "extras[...]", "Expected"),
        ({"extras": {"a": None}}, 400, "extras[...]", "Expected"),
        ({"extras": {"a": {"hex": "z"}}}, 400, "extras.a.hex", "write bytes as hexadecimal"),
        ({"extras": {"a": {"hax": "00"}}}, 400, "hax", "unknown field 'hax'"),
        ({"token_idz": []}, 400, "token_idz", "did you mean 'token_ids'?"),
    ],
)
def test_mistakes_are_refused_by_field(
    server: ServerThread, verb: str, change: dict[str, object], status: int, field: str, message: str
) -> None:
    got, answer = ask(server, verb, BY_TOKENS | change)
    assert (got, answer["error"].get("field")) == (status, field)
    assert message in answer["error"]["message"]
    assert "\n" not in answer["error"]["message"]


def test_more_keys_than_allowed_are_refused(server: ServerThread) -> None:
    for verb in ("lookup", "explain"):
        status, answer = ask(server, verb, {"keys": ["ab" * 32] * 101})
        assert (status, answer["error"]["field"]) == (413, "keys")
