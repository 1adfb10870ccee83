"""Bits for error: every codec with its settings on the same samples, and the ratios at equal attention-output error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kvstore.bench.attention_error import Point, attention_error, bits_ratio
from kvstore.bench.codec_baselines import Kvtc, KvtcBasis, Lloyd, Result
from kvstore.bench.kv_samples import SampleChunk, Samples
from kvstore.bench.ladder_samples import cachegen_profile, ladder_profile
from kvstore.chunk import decode_chunk, encode_chunk, encoded_bytes_max
from kvstore.codec import Codec
from kvstore.codecs import registry
from kvstore.codecs.cachegen import CacheGenCodec
from kvstore.codecs.ladder import LadderCodec
from kvstore.container import ChunkMeta, Header, parse
from kvstore.spec import KVArrays

CACHEGEN_SCALINGS = (4.0, 2.0, 1.0, 0.5, 0.25, 0.125)
LADDER_SHIFTS = (0, 4)
"""A shift of 8 is a level, so these put another point between any two levels."""

KVTC_BITS = (0.5, 1.0, 2.0, 3.0, 4.0, 5.0)
LLOYD_BITS = (2, 3, 4, 5)
FIXED = ("int8", "int4", "fp8")

Curves = dict[str, list[Point]]
Run = Callable[[SampleChunk], Result]


@dataclass(frozen=True)
class RateOptions:
    """How much is measured: groupings of the ladder's profiles, and its shifts."""

    groupings: tuple[str, ...] = ("x0", "head", "layer", "all")
    shifts: tuple[int, ...] = LADDER_SHIFTS


def curves(samples: Samples, options: RateOptions) -> Curves:
    """Points of every codec and setting, by name; ladder profiles by `ladder_<grouping>`."""
    found: Curves = {}
    for name in FIXED:
        found[name] = [_point(samples, _codec_run(registry.get(name), samples))]
    calibrated = cachegen_profile(samples)
    for label, profile in (("cachegen", calibrated), ("cachegen_uncalibrated", bytes(32))):
        found[label] = [
            _point(samples, _codec_run(CacheGenCodec(profile, scaling=scaling), samples))
            for scaling in CACHEGEN_SCALINGS
        ]
    found["lloyd"] = [_point(samples, _rival(Lloyd(samples.spec, bits).run)) for bits in LLOYD_BITS]
    basis = KvtcBasis(samples)
    found["kvtc"] = [_point(samples, _rival(Kvtc(samples, basis, bits).run)) for bits in KVTC_BITS]
    return found | _ladder_curves(samples, options)


def ratios(found: Curves) -> dict[str, float]:
    """`bits_vs_<rival>` of the best ladder profile, and `<codec>_bits_vs_<rival>` of cachegen."""
    rivals = {"cachegen": "cachegen", "int4g32": "int4", "lloyd": "lloyd", "kvtc": "kvtc"}
    out: dict[str, float] = {}
    for label, rival in rivals.items():
        own = {
            name: ratio
            for name, points in found.items()
            if name.startswith("ladder") and (ratio := bits_ratio(points, found[rival])) is not None
        }
        if own:
            out[f"ladder.bits_vs_{label}"] = min(own.values())
        for name, ratio in own.items():
            out[f"{name}.bits_vs_{label}"] = ratio
        if rival != "cachegen" and (ratio := bits_ratio(found["cachegen"], found[rival])) is not None:
            out[f"cachegen.bits_vs_{label}"] = ratio
    return out


def lossless_bits(samples: Samples, codec_id: str) -> float:
    """Bits an element of whole objects, every element checked to come back."""
    point = _point(samples, _codec_run(registry.get(codec_id), samples))
    if point.error:
        raise AssertionError(f"{codec_id} changed the output of attention by {point.error}")
    return point.bits


def _ladder_curves(samples: Samples, options: RateOptions) -> Curves:
    found: Curves = {}
    for grouping in ("uncalibrated", *options.groupings):
        profile = bytes(32) if grouping == "uncalibrated" else ladder_profile(samples, grouping)
        codecs = [LadderCodec(profile, shift=shift) for shift in options.shifts]
        found[f"ladder_{grouping}"] = [point for codec in codecs for point in _levels(samples, codec, codec.levels)]
    return found


def _levels(samples: Samples, codec: Codec, levels: int) -> list[Point]:
    """One point a quality level, each chunk encoded once."""
    found: list[list[tuple[float, float]]] = [[] for _ in range(levels)]
    for chunk in samples.chunks:
        container = _encode(samples, codec, chunk)
        for level, own in enumerate(found):
            nbytes, decoded = _decode(samples, codec, container, level)
            own.append((8 * nbytes / samples.elements, attention_error(chunk, decoded, samples.spec)))
    return [Point(*(sum(values) / len(own) for values in zip(*own, strict=True))) for own in found]


def _point(samples: Samples, run: Run) -> Point:
    """Mean bits and mean error over the samples' chunks."""
    bits, errors = [], []
    for chunk in samples.chunks:
        result = run(chunk)
        bits.append(8 * result.nbytes / samples.elements)
        errors.append(attention_error(chunk, result.arrays, samples.spec))
    return Point(sum(bits) / len(bits), sum(errors) / len(errors))


def _rival(run: Callable[[KVArrays, int], Result]) -> Run:
    return lambda chunk: run(chunk.arrays, chunk.first_position)


def _codec_run(codec: Codec, samples: Samples) -> Run:
    """Through a whole container."""
    return lambda chunk: Result(*_decode(samples, codec, _encode(samples, codec, chunk), None))


def _encode(samples: Samples, codec: Codec, chunk: SampleChunk) -> memoryview:
    spec, tokens = samples.spec, chunk.arrays[0][0].shape[1]
    meta = ChunkMeta(
        fingerprint=bytes(32), key=bytes(32), spec=spec, tokens=tokens, first_position=chunk.first_position
    )
    buffer = memoryview(bytearray(encoded_bytes_max(codec, spec, tokens)))
    return buffer[: encode_chunk(codec, meta, chunk.arrays, buffer)]


def _decode(samples: Samples, codec: Codec, container: memoryview, level: int | None) -> tuple[int, KVArrays]:
    """Bytes of the container's prefix up to a level, and what it decodes to."""
    tokens = parse(container).meta.tokens
    decoded = samples.spec.arrays(bytearray(samples.spec.chunk_bytes(tokens)), tokens)
    header = decode_chunk(container, decoded, lambda _id, _profile: codec, level_max=level)
    return _prefix_bytes(header, level), decoded


def _prefix_bytes(header: Header, level: int | None) -> int:
    """Bytes of the container up to the end of a level."""
    if level is None:
        return header.total_bytes
    return max(segment.offset + segment.length for segment in header.segments if segment.level <= level)
