"""A chunk's way between tensors and container bytes: the one place where codecs and containers meet."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from kvstore.codec import Codec, LayerSegments
from kvstore.container import ChunkMeta, ContainerWriter, Header, container_bytes_max, expect, parse
from kvstore.errors import ContainerError
from kvstore.outcome import Reason
from kvstore.parallel import for_each
from kvstore.spec import KVArrays, KVSpec

PARALLEL_BYTES_MIN = 1 << 19
"""Fewer coded bytes are decoded sooner than another thread starts."""

CodecFor = Callable[[str, bytes], Codec]
"""(codec id, profile id) -> codec; raises ContainerError with unknown_codec or unknown_profile."""


def encoded_bytes_max(codec: Codec, spec: KVSpec, tokens: int) -> int:
    """Upper bound of the container of a chunk of that many tokens. Raises CodecError if the codec cannot serve the
    spec.
    """
    return container_bytes_max(spec, [(plan.level, plan.bytes_max) for plan in codec.plan(spec, tokens)])


def encode_chunk(
    codec: Codec, meta: ChunkMeta, arrays: KVArrays, target: memoryview, *, level_max: int | None = None
) -> int:
    """Write the container of a chunk to the start of `target` and return its size in bytes.

    Args:
        codec: how to write.
        meta: what to write in the header; `meta.tokens` is the arrays' token count.
        arrays: K and V of every layer, each (heads, tokens, dim), any strides.
        target: at least `encoded_bytes_max` writable bytes.
        level_max: the highest quality level to write; None for all.

    Raises:
        SpecError: the arrays do not fit `meta.spec`.
        CodecError: the codec cannot encode them.
    """
    meta.spec.check_arrays(arrays, meta.tokens)
    plans = [plan for plan in codec.plan(meta.spec, meta.tokens) if level_max is None or plan.level <= level_max]
    encode = codec.encoder(meta, arrays)
    writer = ContainerWriter(target, meta, codec=codec.id, segment_count=len(plans), profile=codec.profile)
    for plan in plans:
        encoded = encode(plan, writer.tail(plan.level)[: plan.bytes_max])
        writer.commit(
            level=plan.level,
            part=plan.part,
            layers=plan.layers,
            nbytes=encoded.nbytes,
            xxh3=encoded.xxh3,
            params=encoded.params,
        )
    return writer.finish()


def group_segments(header: Header, container: memoryview, level_max: int | None = None) -> Iterable[LayerSegments]:
    """The segments of every layer group with their bytes, in layer order, up to a level."""
    for group in header.groups(level_max):
        yield [(segment, container[segment.offset : segment.offset + segment.length]) for segment in group]


def decode_chunk(
    container: memoryview,
    arrays: KVArrays,
    codec_for: CodecFor,
    *,
    key: bytes | None = None,
    fingerprint: bytes | None = None,
    level_max: int | None = None,
    level_min: int | None = None,
    threads: int | None = None,
) -> Header:
    """Fill `arrays` from a container, every byte used verified, and return its header.

    Quality levels above `level_max` (None: none) are left out. Where a level is damaged the ones below it serve, down
    to `level_min` (None: never). Layer groups are decoded by up to `threads` threads (None: the available cores).

    Raises:
        ContainerError: with the reason for the miss; `arrays` are then unspecified.
        SpecError: the arrays do not fit the container's spec.
    """
    header = parse(container)
    expect(header, key=key, fingerprint=fingerprint)
    header.meta.spec.check_arrays(arrays, header.meta.tokens)
    codec = codec_for(header.codec, header.profile)
    check_coverage(header)
    groups = list(group_segments(header, container, level_max))
    decode_groups(codec, groups, arrays, header.meta.spec, level_min=level_min, threads=threads)
    return header


def decode_groups(
    codec: Codec,
    groups: Sequence[LayerSegments],
    arrays: KVArrays,
    spec: KVSpec,
    *,
    level_min: int | None = None,
    threads: int | None = None,
) -> None:
    """`decode_group` for every one of some groups, in any order and at once; when it ends, nothing reads them any more.

    Raises:
        ContainerError: of one of them; the arrays are then unspecified.
    """
    small = sum(segment.length for group in groups for segment, _ in group) < PARALLEL_BYTES_MIN
    for_each(
        lambda group: decode_group(codec, group, arrays, spec, level_min=level_min),
        groups,
        threads if codec.parallel and not small else 1,
    )


def decode_group(
    codec: Codec, segments: LayerSegments, arrays: KVArrays, spec: KVSpec, *, level_min: int | None = None
) -> int:
    """Fill one layer group from the highest of its levels that is good, and answer which one that was.

    Args:
        codec: what wrote it.
        segments: of one group, lowest level first.
        arrays: of all layers.
        spec: geometry of the arrays.
        level_min: the lowest level that may serve instead of a damaged one; None: none may.

    Raises:
        ContainerError: no level that may serve is good; the group's arrays are then unspecified.
    """
    while True:
        level = segments[-1][0].level if segments else 0
        try:
            codec.decode(segments, arrays, spec)
        except ContainerError:
            lower = [pair for pair in segments if pair[0].level < level]
            if level_min is None or not lower or lower[-1][0].level < level_min:
                raise
            segments = lower
        else:
            return level


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
