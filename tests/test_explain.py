"""Why a prompt misses: a reason for every chunk, by keys and by token ids."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import numpy as np
import pytest

from kvstore import cli
from kvstore.client import Client
from kvstore.connect import connect
from kvstore.embedded import EmbeddedClient
from kvstore.explaining import Why, explain_prompt
from kvstore.keys import KeyScheme
from kvstore.testing.chunks import FINGERPRINT, sample_container, sample_key, sample_keys, sample_spec
from kvstore.testing.client_harness import put_chunk
from kvstore.testing.memory_client import flip_bit
from kvstore.testing.serving import ServerThread, small_store
from kvstore.tier import PutItem

TOKENS = list(range(100, 164))


def scheme_of(chunk_tokens: int) -> KeyScheme:
    return KeyScheme(FINGERPRINT, chunk_tokens=chunk_tokens)


def put_prompt(client: Client, tokens: Sequence[int], chunk_tokens: int) -> list[bytes]:
    keys = scheme_of(chunk_tokens).chain(tokens)
    client.put([put_chunk(key, sample_container(key, tokens=chunk_tokens)) for key in keys])
    assert client.flush()
    return keys


@pytest.fixture
def client(tmp_path: Path) -> Iterator[EmbeddedClient]:
    with EmbeddedClient(small_store(tmp_path, dram="1MiB", nvme="2MiB")) as client:
        yield client


def test_what_left_says_when_and_why(client: EmbeddedClient) -> None:
    store = client.store
    spec = sample_spec(layers=8, kv_heads=4, dim=64)
    keys = sample_keys(12)
    for key in keys:
        client.put([put_chunk(key, sample_container(key, spec=spec, tokens=32))], durable=True)
    explained = client.explain(keys)
    assert explained[0].why is Why.EVICTED
    assert explained[0].removed_from == "nvme"
    assert "to make room" in explained[0].detail
    assert {str(chunk.why) for chunk in explained} == {"evicted", "parent_absent"}
    assert [chunk.tiers != () for chunk in explained] == [info is not None for info in client.head(keys)]
    assert explained[-1].tiers == ("dram", "nvme")

    bad = sample_key(50)
    store.tiers[1].put([PutItem(bad, memoryview(flip_bit(sample_container(bad), keep_hashes=True)))])
    assert [part.miss is not None for part in client.fetch([bad])] == [True]
    (quarantined,) = client.explain([bad])
    assert quarantined.why is Why.QUARANTINED
    assert "because it is bad: corrupt: segment" in quarantined.detail


def test_a_chunk_that_came_back_is_present(client: EmbeddedClient) -> None:
    for _ in range(2):
        keys = put_prompt(client, TOKENS, 16)
        assert {chunk.why for chunk in client.explain(keys)} == {Why.PRESENT}
        client.delete(keys)
        assert {chunk.why for chunk in client.explain(keys)} == {Why.DELETED}


def test_a_prompt_in_chunks_of_another_size_is_found_out(client: EmbeddedClient) -> None:
    put_prompt(client, TOKENS, 32)
    explained = explain_prompt(client, np.array(TOKENS), 16, scheme_of)
    assert [chunk.why for chunk in explained] == [Why.WRONG_CHUNK_TOKENS] * 4
    assert explained[0].detail == "the prompt is stored in chunks of 32 tokens, not of 16"
    assert {chunk.why for chunk in explain_prompt(client, TOKENS, 32, scheme_of)} == {Why.PRESENT}
    assert {chunk.why for chunk in explain_prompt(client, TOKENS[1:], 16, scheme_of)} == {Why.ABSENT}
    assert explain_prompt(client, TOKENS[:15], 16, scheme_of) == []


def test_the_first_chunk_alone_does_not_blame_the_chunk_size(client: EmbeddedClient) -> None:
    put_prompt(client, TOKENS[:16], 16)
    put_prompt(client, TOKENS, 32)
    assert [chunk.why for chunk in explain_prompt(client, TOKENS, 16, scheme_of)] == [Why.PRESENT, *[Why.ABSENT] * 3]


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ServerThread]:
    with ServerThread(small_store(tmp_path, nvme="")) as running:
        yield running


def test_the_command_explains_by_keys_and_by_tokens(
    server: ServerThread, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with connect(server.unix_url) as remote:
        keys = put_prompt(remote, TOKENS, 16)
        remote.delete(keys[2:3])
    by_keys = ["explain", "--url", server.unix_url, "--keys", *(key.hex() for key in keys)]
    assert cli.main(by_keys) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"0 {keys[0].hex()[:16]} present in dram, ")
    assert lines[2].startswith(f"2 {keys[2].hex()[:16]} deleted: removed from dram at 20")
    assert lines[3].endswith("it is there, but chunk 2 before it is not")
    assert lines[4] == "2 of 4 chunks can be fetched now"

    prompt = tmp_path / "prompt.json"
    prompt.write_text(str(TOKENS[:32]))
    by_tokens = ["explain", "--url", server.unix_url, "--tokens", str(prompt), "--fingerprint", FINGERPRINT.hex()]
    assert cli.main([*by_tokens, "--chunk-tokens", "16", "--json"]) == 0
    answer = msgspec.json.decode(capsys.readouterr().out)
    assert [(chunk["key"], chunk["why"]) for chunk in answer] == [(key.hex(), "present") for key in keys[:2]]
    assert cli.main([*by_tokens, "--chunk-tokens", "32"]) == 1
    assert "wrong_chunk_tokens: the prompt is stored in chunks of 16 tokens, not of 32" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "give either --keys, or --tokens"),
        (["--keys", "ab"], "--keys[0] is 'ab'; a chunk key is 64"),
        (["--tokens", "FILE"], "fingerprint has 0 bytes"),
        (["--tokens", "nowhere.json", "--fingerprint", "ab" * 32], "--tokens nowhere.json: No such file"),
        (["--tokens", "FILE", "--fingerprint", "x"], "--fingerprint is 'x'; write bytes"),
        (["--tokens", "FILE", "--fingerprint", "ab" * 32], "64 tokens do not fill a chunk of 256"),
        (["--tokens", "FILE", "--fingerprint", "ab" * 32, "--chunk-tokens", "0"], "chunk_tokens is 0"),
    ],
)
def test_mistakes_in_the_command_are_one_clear_line(
    server: ServerThread, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    prompt = tmp_path / "prompt.json"
    prompt.write_text(str(TOKENS))
    flags = [str(prompt) if flag == "FILE" else flag for flag in flags]
    assert cli.main(["explain", "--url", server.unix_url, *flags]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
