"""Side-cars: what they say, and that damaged or hostile bytes say nothing."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.client import Client
from kvstore.container import verify
from kvstore.errors import ContainerError, SpecError
from kvstore.kernels import xxh3
from kvstore.keys import ROOT, KeyScheme
from kvstore.outcome import Reason
from kvstore.sidecar import (
    HASH,
    HEAD,
    SECTION,
    SECTIONS_MAX,
    SideCar,
    describe,
    pack_sections,
    parse_sections,
    parse_sidecar,
    put_packed,
    put_sidecar,
    read_container,
    read_part,
    scope_of,
    sidecar_key,
)
from kvstore.spans import cut, preamble_key
from kvstore.testing.chunks import sample_container, sample_key
from kvstore.testing.client_plan import scheme
from kvstore.testing.memory_client import MemoryClient

DOCUMENT = list(range(100, 140))
NAMES = st.text("abz019_.-", min_size=1, max_size=16)


def sample(place: int = 0, preamble: tuple[int, ...] = (1, 2), **sections: bytes) -> SideCar:
    keys = scheme()
    return describe(keys, cut(keys, DOCUMENT, preamble=preamble)[place], DOCUMENT, preamble, sections)


def stored(sidecar: SideCar) -> bytes:
    put = put_sidecar(sidecar, scheme().fingerprint)
    buffer = bytearray(put.nbytes_max)
    return bytes(buffer[: put.write(memoryview(buffer))])


def with_header_hash(data: bytearray) -> bytes:
    """The bytes with the header's hash made right."""
    _, _, count, _ = HEAD.unpack_from(data)
    end = HEAD.size + count * SECTION.size
    data[end : end + HASH.size] = HASH.pack(xxh3(bytes(data[:end])))
    return bytes(data)


@pytest.mark.parametrize("preamble", [(), (1, 2)])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_what_is_packed_is_parsed(place: int, preamble: tuple[int, ...]) -> None:
    keys = scheme()
    sidecar = sample(place, preamble, statistics=b"\x00\x01", empty=b"")
    assert parse_sidecar(sidecar.pack()) == sidecar
    assert sidecar.is_of(keys)
    assert not sidecar.is_of(KeyScheme(keys.fingerprint, chunk_tokens=16, salt=b"other"))
    assert sidecar.ids.tolist() == DOCUMENT[16 * place : 16 * (place + 1)]
    assert sidecar.position == len(preamble) + 16 * place
    assert sidecar.is_first == (place == 0)
    assert (sidecar.preamble == ROOT) == (not preamble)


def test_a_side_car_whose_tokens_are_others_is_recognised() -> None:
    sidecar = sample(1)
    other = msgspec.structs.replace(sidecar, tokens=np.arange(16, dtype="<u4").tobytes())
    assert not parse_sidecar(other.pack()).is_of(scheme())


def test_key_and_parent_tell_a_side_car_apart() -> None:
    sidecar = sample(1)
    header = verify(memoryview(stored(sidecar)))
    assert header.meta.key == sidecar_key(header.meta.parent) == sidecar_key(sidecar.key)
    assert sidecar_key(sidecar.key, "statistics") != sidecar_key(sidecar.key)


def test_it_travels_through_a_store() -> None:
    client: Client = MemoryClient()
    sidecar = sample(1, score=b"12345")
    statistics = pack_sections({"score": b"1"})
    puts = [put_sidecar(sidecar, bytes(32)), put_packed(statistics, sidecar.key, bytes(32), "statistics")]
    assert all(status.stored for status in client.put(puts))
    (part,) = client.fetch([sidecar_key(sidecar.key)])
    assert read_part(part) == sidecar
    (part,) = client.fetch([sidecar_key(sidecar.key, "statistics")])
    assert parse_sections(part.groups[0][0][1]) == {"score": b"1"}
    with pytest.raises(ContainerError, match="malformed"):
        read_part(part)


def test_a_side_car_of_another_chunk_is_refused() -> None:
    put = put_packed(sample().pack(), sample_key(1), bytes(32), "tokens")
    buffer = bytearray(put.nbytes_max)
    nbytes = put.write(memoryview(buffer))
    with pytest.raises(ContainerError, match="wrong_key"):
        read_container(memoryview(buffer)[:nbytes])
    with pytest.raises(ContainerError, match="no side-car"):
        read_container(memoryview(sample_container(sample_key(1))))


@given(st.dictionaries(NAMES, st.binary(max_size=50), max_size=8))
def test_sections_come_back(sections: dict[str, bytes]) -> None:
    assert parse_sections(pack_sections(sections)) == sections


def test_sections_that_do_not_fit_are_refused() -> None:
    for name in ("", "x" * 17, "UPPER", "a b", "ü", "a\0"):
        with pytest.raises(SpecError, match="section name"):
            pack_sections({name: b""})
    with pytest.raises(SpecError, match="at most 64"):
        pack_sections({str(number): b"" for number in range(SECTIONS_MAX + 1)})
    with pytest.raises(SpecError, match="'tokens' is the side-car's own"):
        sample(tokens=b"1").pack()
    with pytest.raises(SpecError, match="bytes; at most"):
        pack_sections({"a": bytes(16 << 20)})


def test_every_byte_counts() -> None:
    good = sample(2, score=b"123").pack()
    for place in range(len(good)):
        damaged = bytearray(good)
        damaged[place] ^= 1
        with pytest.raises(ContainerError) as caught:
            parse_sidecar(bytes(damaged))
        assert caught.value.reason in (Reason.CORRUPT, Reason.MALFORMED, Reason.UNKNOWN_VERSION, Reason.TRUNCATED)
    for length in range(len(good)):
        with pytest.raises(ContainerError, match=r"truncated|malformed"):
            parse_sidecar(good[:length])
    with pytest.raises(ContainerError, match="after the last section"):
        parse_sidecar(good + b"\0")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"preamble_tokens": 1}, "parent does not fit"),
        ({"position": 1}, "before the end of the preamble"),
        ({"position": 40}, "parent does not fit"),
        ({"parent": b"x" * 32}, "parent does not fit"),
        ({"preamble": ROOT, "parent": ROOT}, "preamble's key does not fit"),
        ({"tokens": b""}, "token ids"),
        ({"tokens": b"12345"}, "token ids"),
        ({"tokens": bytes(4 * 65537)}, "token ids"),
    ],
)
def test_contradictions_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ContainerError, match=message):
        parse_sidecar(msgspec.structs.replace(sample(), **change).pack())


@settings(max_examples=400)
@given(st.data())
def test_hostile_headers_with_good_hashes_never_do_anything_else(data: st.DataObject) -> None:
    good = sample(1, score=b"123456").pack()
    damaged = bytearray(good)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, HEAD.size + 3 * SECTION.size - 1))
        damaged[place] = data.draw(st.integers(0, 255))
    _, _, count, _ = HEAD.unpack_from(damaged)
    if HEAD.size + count * SECTION.size + HASH.size <= len(damaged):
        damaged = bytearray(with_header_hash(damaged))
    with suppress(ContainerError):
        assert sum(map(len, parse_sections(bytes(damaged)).values())) <= len(damaged)


@settings(max_examples=300)
@given(st.binary(max_size=300))
def test_any_bytes_are_refused_with_a_reason(data: bytes) -> None:
    for prefix in (b"", b"KVS1", b"KVS1\x01\x00"):
        with pytest.raises(ContainerError):
            parse_sidecar(prefix + data)


def test_golden_bytes() -> None:
    golden = json.loads((Path(__file__).parent / "golden" / "spans.json").read_text())
    keys = KeyScheme(bytes(range(32)), chunk_tokens=4, salt=b"tenant", extras={"adapter": "a"})
    preamble, document = [1, 2, 3], [10, 11, 12, 13, 14, 0xFFFFFFFF]
    assert scope_of(keys).hex() == golden["scope"]
    assert preamble_key(keys, preamble).hex() == golden["preamble"]
    pieces = cut(keys, document, preamble=preamble)
    for piece, expected in zip(pieces, golden["pieces"], strict=True):
        assert (piece.key.hex(), piece.parent.hex()) == (expected["key"], expected["parent"])
        assert piece.position == expected["position"]
        assert sidecar_key(piece.key).hex() == expected["sidecar_key"]
        sidecar = describe(keys, piece, document, preamble, {"score": b"\x01\x02"})
        assert sidecar.pack().hex() == expected["sidecar"]
        assert parse_sidecar(bytes.fromhex(expected["sidecar"])) == sidecar


def test_the_preamble_of_no_tokens_is_the_root() -> None:
    assert preamble_key(scheme(), ()) == ROOT
    assert preamble_key(scheme(), [5]) == scheme().content([5])
