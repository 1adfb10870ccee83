"""Chunk keys: golden vectors, the documented encoding written out a second time, and what keys promise."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.errors import SpecError
from kvstore.keys import ROOT, KeyScheme, encode_extras, token_array

GOLDEN = json.loads((Path(__file__).parent / "golden" / "keys.json").read_text())

digests = st.binary(min_size=32, max_size=32)
tokens_lists = st.lists(st.integers(0, 0xFFFFFFFF), max_size=20)
extras_maps = st.dictionaries(
    st.text(max_size=4), st.one_of(st.binary(max_size=4), st.text(max_size=4), st.integers()), max_size=3
)


def documented_key(
    kind: int, fingerprint: bytes, salt: bytes, extras: bytes, parent: bytes, tokens: list[int]
) -> bytes:
    """A key by the letter of the module's text."""
    data = b"kvstore-key-1\0" + bytes([kind]) + fingerprint
    data += struct.pack("<I", len(salt)) + salt + struct.pack("<I", len(extras)) + extras
    data += parent + struct.pack("<I", len(tokens)) + struct.pack(f"<{len(tokens)}I", *tokens)
    return hashlib.sha256(data).digest()


def scheme_of(case: dict[str, Any]) -> KeyScheme:
    extras = {name: bytes.fromhex(v["hex"]) if isinstance(v, dict) else v for name, v in case["extras"].items()}
    return KeyScheme(
        bytes.fromhex(case["fingerprint"]),
        chunk_tokens=case["chunk_tokens"],
        salt=bytes.fromhex(case["salt"]),
        extras=extras,
    )


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case["name"])
def test_golden_vectors(case: dict[str, Any]) -> None:
    scheme = scheme_of(case)
    parent = bytes.fromhex(case["parent"])
    assert [key.hex() for key in scheme.chain(case["tokens"], parent)] == case["chain"]
    assert scheme.content(case["tokens"], parent).hex() == case["content"]


@given(digests, st.binary(max_size=5), extras_maps, digests, tokens_lists)
def test_keys_follow_the_documented_encoding(
    fingerprint: bytes, salt: bytes, extras: dict[str, Any], parent: bytes, tokens: list[int]
) -> None:
    scheme = KeyScheme(fingerprint, chunk_tokens=3, salt=salt, extras=extras)
    packed = encode_extras(extras)
    expected, above = [], parent
    for start in range(0, len(tokens) // 3 * 3, 3):
        above = documented_key(0, fingerprint, salt, packed, above, tokens[start : start + 3])
        expected.append(above)
    assert scheme.chain(tokens, parent) == expected
    assert scheme.content(tokens, parent) == documented_key(1, fingerprint, salt, packed, parent, tokens)


def content_key(fingerprint: bytes, salt: bytes, extras: dict[str, Any], parent: bytes, tokens: list[int]) -> bytes:
    return KeyScheme(fingerprint, salt=salt, extras=extras).content(tokens, parent)


@given(st.data())
def test_any_change_of_any_input_changes_the_key(data: st.DataObject) -> None:
    def draw() -> tuple[bytes, bytes, dict[str, Any], bytes, list[int]]:
        return data.draw(st.tuples(digests, st.binary(max_size=3), extras_maps, digests, tokens_lists))

    one, other = draw(), draw()
    for changed in range(5):
        mixed: list[Any] = list(one)
        mixed[changed] = other[changed]
        same = mixed[changed] == one[changed]
        assert (content_key(*one) == content_key(*mixed)) == same


@given(tokens_lists, tokens_lists, tokens_lists)
def test_a_prefix_s_keys_never_depend_on_what_follows(prefix: list[int], one: list[int], other: list[int]) -> None:
    scheme = KeyScheme(b"f" * 32, chunk_tokens=4)
    alone = scheme.chain(prefix)
    assert scheme.chain(prefix + one)[: len(alone)] == alone
    assert scheme.chain(prefix + other)[: len(alone)] == alone


@given(tokens_lists, st.integers(0, 19), st.integers(0, 0xFFFFFFFF))
def test_a_changed_token_changes_its_chunk_and_all_that_follow(tokens: list[int], at: int, token: int) -> None:
    scheme = KeyScheme(b"f" * 32, chunk_tokens=4)
    if at >= len(tokens) or tokens[at] == token:
        return
    before, after = scheme.chain(tokens), scheme.chain([*tokens[:at], token, *tokens[at + 1 :]])
    assert before[: at // 4] == after[: at // 4]
    assert not set(before[at // 4 :]) & set(after[at // 4 :])


def test_a_chain_can_be_continued_from_its_last_key() -> None:
    scheme = KeyScheme(b"f" * 32, chunk_tokens=4)
    whole = scheme.chain(range(12))
    assert scheme.chain(range(4, 12), whole[0]) == whole[1:]
    assert scheme.chain(range(3)) == []


def test_chain_and_content_keys_never_meet() -> None:
    scheme = KeyScheme(b"f" * 32, chunk_tokens=4)
    assert scheme.chain([1, 2, 3, 4]) != [scheme.content([1, 2, 3, 4])]
    assert scheme.content([]) != ROOT


def test_extras_are_injective_where_joining_would_not_be() -> None:
    maps: list[dict[str, str | bytes | int]] = [
        {"a": "bc"},
        {"ab": "c"},
        {"a": b"bc"},
        {"a": "b", "c": ""},
        {"a": 1},
        {"a": "1"},
        {"a": b"1"},
        {"a": -1},
        {},
    ]
    assert len({encode_extras(extras) for extras in maps}) == len(maps)
    assert encode_extras({"a": 1, "b": 2}) == encode_extras({"b": 2, "a": 1})


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint32, np.uint16, ">u4", ">i8"])
def test_token_ids_of_any_integer_type_give_the_same_key(dtype: Any) -> None:
    scheme = KeyScheme(b"f" * 32)
    ids = [0, 1, 258, 65535 if dtype == np.uint16 else 30000]
    assert scheme.content(np.array(ids, dtype=dtype)) == scheme.content(ids)
    assert scheme.content(np.array(ids + ids, dtype=dtype)[::2]) == scheme.content((ids + ids)[::2])


@pytest.mark.parametrize(
    "tokens", [[-1], [1 << 32], [1 << 70], [-1, 1 << 63], [1.5], ["a"], [True], [[1, 2]], np.array(3)], ids=repr
)
def test_what_is_not_a_row_of_token_ids_is_refused(tokens: Any) -> None:
    with pytest.raises(SpecError, match="token ids"):
        token_array(tokens)


def test_mistakes_are_named() -> None:
    with pytest.raises(SpecError, match="fingerprint has 31 bytes"):
        KeyScheme(bytes(31))
    with pytest.raises(SpecError, match="chunk_tokens is 0"):
        KeyScheme(bytes(32), chunk_tokens=0)
    with pytest.raises(SpecError, match="parent key has 3 bytes"):
        KeyScheme(bytes(32)).content([1], b"abc")
    for wrong in (True, 1.5, None):
        with pytest.raises(SpecError, match="use str, bytes or int"):
            encode_extras({"a": wrong})  # type: ignore[dict-item]
