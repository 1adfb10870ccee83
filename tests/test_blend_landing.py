"""A chunk that lands: whole or layer by layer the same bits, and nothing of a chunk that is not the one asked for."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

pytest.importorskip("torch")

import torch

from kvstore.chunk import encode_chunk, encoded_bytes_max, group_segments
from kvstore.client import Part
from kvstore.codec import Codec
from kvstore.codecs import registry
from kvstore.connectors.blend.landing import Landing, WantedChunk
from kvstore.connectors.blend.sources import document_numbers, of_tokens
from kvstore.container import FLAG_CONTENT_KEY, FLAG_FROM_LOSSY, ChunkMeta, parse
from kvstore.errors import ContainerError
from kvstore.gate import Verdict
from kvstore.keys import ROOT
from kvstore.outcome import Reason
from kvstore.testing.chunks import FINGERPRINT, LayerwiseRaw, sample_key, sample_kv, sample_spec

SPEC = sample_spec()
TOKENS = 12
WANTED = WantedChunk(key=sample_key(0), tokens=TOKENS - 2, position=40)


def judge(codec: Codec, level: int) -> Verdict:
    return Verdict(codec.exact, "" if codec.exact else f"codec {codec.id} level {level} has no pass")


def landing(wanted: WantedChunk = WANTED, *, tokens_max: int = TOKENS) -> Landing:
    return Landing(wanted, SPEC, FINGERPRINT, judge, tokens_max=tokens_max)


def chunk(*, flags: int = FLAG_CONTENT_KEY, position: int = 40, codec: Codec | None = None) -> Part:
    """The whole chunk as a store answers it."""
    codec = codec or LayerwiseRaw()
    meta = ChunkMeta(
        fingerprint=FINGERPRINT,
        key=WANTED.key,
        spec=SPEC,
        tokens=TOKENS,
        parent=ROOT,
        first_position=position,
        flags=flags,
    )
    kv = np.zeros(SPEC.chunk_bytes(TOKENS), np.uint8) if not codec.exact else sample_kv(SPEC, TOKENS, 1)
    buffer = memoryview(bytearray(encoded_bytes_max(codec, SPEC, TOKENS)))
    container = buffer[: encode_chunk(codec, meta, SPEC.arrays(kv, TOKENS), buffer)]
    header = parse(container)
    return Part(0, header=header, groups=tuple(group_segments(header, container)))


def refused(own: Landing, part: Part) -> tuple[Reason, str]:
    with pytest.raises(ContainerError) as caught:
        own.take(part)
    return caught.value.reason, caught.value.detail


def test_whole_or_layer_by_layer_the_wanted_tokens_land() -> None:
    part = chunk()
    whole, layered = landing(), landing()
    assert whole.take(part) == SPEC.layers
    for layer, group in enumerate(part.groups):
        assert layered.take(Part(0, header=part.header, groups=(group,))) == layer + 1
    expected = SPEC.arrays(sample_kv(SPEC, TOKENS, 1), TOKENS)
    for own in (whole, layered):
        assert own.nbytes == SPEC.chunk_bytes(TOKENS)
        assert own.codec is not None
        assert (own.codec.id, own.level) == ("raw", 0)
        for tensors, arrays in zip(own.tensors, expected, strict=True):
            for tensor, array in zip(tensors, arrays, strict=True):
                assert np.array_equal(tensor.view(torch.int16).numpy(), array[:, : WANTED.tokens].view(np.int16))


@pytest.mark.parametrize(
    ("part", "wanted", "reason", "says"),
    [
        (chunk(position=39), WANTED, Reason.MALFORMED, "computed at 39, not at 40"),
        (chunk(flags=0), WANTED, Reason.MALFORMED, "another kind of key"),
        (chunk(), msgspec.structs.replace(WANTED, exact=True), Reason.MALFORMED, "another kind of key"),
        (chunk(), msgspec.structs.replace(WANTED, tokens=TOKENS + 1), Reason.MALFORMED, "geometry or size"),
        (chunk(), msgspec.structs.replace(WANTED, key=sample_key(1)), Reason.WRONG_KEY, ""),
        (chunk(flags=FLAG_CONTENT_KEY | FLAG_FROM_LOSSY), WANTED, Reason.UNGATED, "been through a lossy codec"),
        (chunk(codec=registry.get("int8", ROOT)), WANTED, Reason.UNGATED, "int8 level 0 has no pass"),
        (Part(0), WANTED, Reason.MALFORMED, "no layers"),
        (msgspec.structs.replace(chunk(), groups=chunk().groups[1:]), WANTED, Reason.MALFORMED, "layer 1 instead of 0"),
        (msgspec.structs.replace(chunk(), expires_at=0.0), WANTED, Reason.DEADLINE, "lease"),
    ],
)
def test_what_is_not_the_chunk_that_was_asked_for_is_refused(
    part: Part, wanted: WantedChunk, reason: Reason, says: str
) -> None:
    found, detail = refused(landing(wanted), part)
    assert found is reason
    assert says in detail


def test_a_longer_chunk_gets_no_memory() -> None:
    own = landing(tokens_max=TOKENS - 1)
    assert refused(own, chunk())[0] is Reason.MALFORMED
    assert own.tensors == []


def test_a_damaged_layer_is_refused_and_those_before_it_stay() -> None:
    own, part = landing(), chunk()
    assert own.take(Part(0, header=part.header, groups=part.groups[:1])) == 1
    (segment, _), *_ = part.groups[1]
    assert refused(own, Part(0, header=part.header, groups=([(segment, memoryview(bytes(segment.length)))],)))[0] is (
        Reason.CORRUPT
    )
    assert own.take(Part(0, header=part.header, groups=part.groups[1:])) == SPEC.layers


def test_pieces_that_follow_one_another_are_one_document() -> None:
    pieces = [(0, 4, 0), (4, 8, 4), (8, 12, 4), (12, 16, 8), (18, 20, 14)]
    assert document_numbers(pieces) == [0, 0, 1, 1, 2]
    assert document_numbers([(3, 5, 3)]) == [1]
    assert document_numbers([]) == []


def test_a_source_of_some_tokens() -> None:
    layers = [(torch.arange(24).view(2, 6, 2), torch.arange(24, 48).view(2, 6, 2))]
    keys, values = of_tokens(layers, slice(2, 5))(0)
    assert torch.equal(keys, layers[0][0][:, 2:5])
    assert torch.equal(values, layers[0][1][:, 2:5])
