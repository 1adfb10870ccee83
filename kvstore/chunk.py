"""A chunk's way between tensors and container bytes: the one place where codecs and containers meet."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from kvstore.codec import Codec, LayerSegments
from kvstore.container import ChunkMeta, ContainerWriter, Header, container_bytes_max, expect, parse
from kvstore.errors import ContainerError
from kvstore.outcome import Reason
from kvstore.spec import KVArrays, KVSpec

CodecFor = Callable[[str, bytes], Codec]
"""(codec id, profile id) -> codec; raises ContainerError with unknown_codec or unknown_profile."""


def encoded_bytes_max(codec: Codec, spec: KVSpec, tokens: int) -> int:
    """Upper bound of the container of a chunk of that many tokens. Raises CodecError if the codec cannot serve the
    spec.
    """
    return container_bytes_max(spec, [(plan.level, plan.bytes_max) for plan in codec.plan(spec, tokens)])


def encode_chunk(codec: Codec, meta: ChunkMeta, arrays: KVArrays, target: memoryview) -> int:
    """Write the container of a chunk to the start of `target` and return its size in bytes.

    Args:
        codec: how to write.
        meta: what to write in the header; `meta.tokens` is the arrays' token count.
        arrays: K and V of every layer, each (heads, tokens, dim), any strides.
        target: at least `encoded_bytes_max` writable bytes.

    Raises:
        SpecError: the arrays do not fit `meta.spec`.
        CodecError: the codec cannot encode them.
    """
    meta.spec.check_arrays(arrays, meta.tokens)
    plans = codec.plan(meta.spec, meta.tokens)
    writer = ContainerWriter(target, meta, codec=codec.id, segment_count=len(plans), profile=codec.profile)
    for plan in plans:
        encoded = codec.encode(plan, arrays, meta.spec, writer.tail(plan.level)[: plan.bytes_max])
        writer.commit(
            level=plan.level,
            part=plan.part,
            layers=plan.layers,
            nbytes=encoded.nbytes,
            xxh3=encoded.xxh3,
            params=encoded.params,
        )
    return writer.finish()


def group_segments(header: Header, container: memoryview) -> Iterable[LayerSegments]:
    """The segments of every layer group with their bytes, in layer order."""
    for group in header.groups():
        yield [(segment, container[segment.offset : segment.offset + segment.length]) for segment in group]


def decode_chunk(
    container: memoryview,
    arrays: KVArrays,
    codec_for: CodecFor,
    *,
    key: bytes | None = None,
    fingerprint: bytes | None = None,
) -> Header:
    """Fill `arrays` from a container, every byte verified, and return its header.

    Raises:
        ContainerError: with the reason for the miss; `arrays` are then unspecified.
        SpecError: the arrays do not fit the container's spec.
    """
    header = parse(container)
    expect(header, key=key, fingerprint=fingerprint)
    header.meta.spec.check_arrays(arrays, header.meta.tokens)
    codec = codec_for(header.codec, header.profile)
    check_coverage(header)
    for segments in group_segments(header, container):
        codec.decode(segments, arrays, header.meta.spec)
    return header


def check_coverage(header: Header) -> None:
    """Raise ContainerError unless the layer groups together hold every layer exactly once."""
    next_layer = 0
    for group in header.groups():
        start, stop = group[0].layers
        if start != next_layer:
            raise ContainerError(Reason.MALFORMED, f"a layer group starts at layer {start} instead of {next_layer}")
        next_layer = stop
    if next_layer != header.meta.spec.layers:
        raise ContainerError(Reason.MALFORMED, f"{next_layer} layers of {header.meta.spec.layers}")
