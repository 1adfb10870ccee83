"""Codecs by name: those of this package, and those that other distributions register.

A third-party codec registers the class (or any callable that takes the profile's 32 bytes and returns a `Codec`) in the
entry-point group `kvstore.codecs`, under its id:

    [project.entry-points."kvstore.codecs"]
    mycodec = "mypackage.mycodec:MyCodec"

Nothing is imported before it is asked for, and a name of this package is never overridden.
"""

from __future__ import annotations

import functools
from importlib.metadata import EntryPoint, entry_points

from kvstore.codec import Codec
from kvstore.errors import ContainerError
from kvstore.keys import ROOT
from kvstore.outcome import Reason

GROUP = "kvstore.codecs"
"""Entry-point group of third-party codecs."""

_BUILTIN = {
    name: EntryPoint(name, value, GROUP)
    for name, value in (
        ("raw", "kvstore.codecs.raw:RawCodec"),
        ("lossless", "kvstore.codecs.lossless:LosslessCodec"),
        ("lossless_dense", "kvstore.codecs.lossless_dense:LosslessDenseCodec"),
        ("cachegen", "kvstore.codecs.cachegen:CacheGenCodec"),
        ("ladder", "kvstore.codecs.ladder:LadderCodec"),
        ("int8", "kvstore.codecs.fixed_width:Int8Codec"),
        ("int4", "kvstore.codecs.fixed_width:Int4Codec"),
        ("fp8", "kvstore.codecs.fixed_width:Fp8Codec"),
    )
}


def available() -> tuple[str, ...]:
    """Ids of all codecs of this installation, sorted. Imports none of them."""
    return tuple(sorted(_entries()))


@functools.lru_cache(maxsize=64)
def get(codec_id: str, profile: bytes = ROOT) -> Codec:
    """The codec with that id and calibrated profile (ROOT for none); the same instance for every caller.

    Raises:
        ContainerError: unknown_codec if there is none or it cannot be imported; unknown_profile from the codec itself.
    """
    entry = _entries().get(codec_id)
    if entry is None:
        raise ContainerError(Reason.UNKNOWN_CODEC, f"{codec_id!r} is not one of {', '.join(available())}")
    try:
        factory = entry.load()
    except (ImportError, AttributeError) as error:
        raise ContainerError(
            Reason.UNKNOWN_CODEC, f"{codec_id!r} ({entry.value}) cannot be imported: {error}"
        ) from error
    codec = factory(profile)
    if not isinstance(codec, Codec) or codec.id != codec_id:
        raise ContainerError(Reason.UNKNOWN_CODEC, f"{entry.value} does not make a codec with the id {codec_id!r}")
    return codec


@functools.cache
def is_exact(codec_id: str) -> bool | None:
    """Whether a codec returns the bits it was given; None if there is no such codec. Needs no profile."""
    entry = _entries().get(codec_id)
    if entry is None:
        return None
    try:
        return bool(getattr(entry.load(), "exact", False))
    except (ImportError, AttributeError):
        return None


@functools.cache
def _entries() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=GROUP)} | _BUILTIN
