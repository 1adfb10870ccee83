"""Profiles through a store: whoever calibrated puts one, whoever meets its id in a container fetches it.

A profile travels as an ordinary container, so every tier, daemon and client can carry it: codec id `profile`, key and
profile id both the profile's id, one segment (level 0, part K and V) with the profile's bytes, and a KVSpec of one
element, for it holds no KV. Its id is the SHA-256 of its bytes, so a reader needs to trust nobody.
"""

from __future__ import annotations

from contextlib import closing
from typing import Any

from kvstore import kernels
from kvstore.client import Client, PutChunk
from kvstore.codecs import profiles
from kvstore.codecs.profile import Profile, parse_profile
from kvstore.container import PART_KV, ChunkMeta, ContainerWriter, check_segment, container_bytes_max
from kvstore.errors import ContainerError
from kvstore.keys import ROOT
from kvstore.outcome import Miss, PutStatus, Reason
from kvstore.spec import KVSpec, Rope

CODEC_ID = "profile"

_NO_KV = KVSpec(layers=1, kv_heads=1, key_dim=1, value_dim=1, dtype="float32", rope=Rope(kind="none"))


def publish(client: Client, profile: Profile, *, deadline_ms: float | None = None) -> PutStatus:
    """Put a profile into a store under its id."""

    def write(buffer: memoryview) -> int:
        meta = ChunkMeta(fingerprint=ROOT, key=profile.id, spec=_NO_KV, tokens=1)
        writer = ContainerWriter(buffer, meta, codec=CODEC_ID, segment_count=1, profile=profile.id)
        xxh3 = kernels.copy_xxh3(writer.tail(0)[: len(profile.blob)], profile.blob)
        writer.commit(level=0, part=PART_KV, layers=(0, 1), nbytes=len(profile.blob), xxh3=xxh3)
        return writer.finish()

    nbytes_max = container_bytes_max(_NO_KV, [(0, len(profile.blob))])
    return client.put([PutChunk(key=profile.id, nbytes_max=nbytes_max, write=write)], deadline_ms=deadline_ms)[0]


def obtain(client: Client, profile_id: bytes, *, deadline_ms: float | None = None) -> Profile | Miss:
    """The profile of that id, from this process, its profile directories or the store, and known to codecs from now on.

    A miss says why there is none; bytes of another id never become known.
    """
    try:
        return profiles.get(profile_id)
    except ContainerError as error:
        if error.reason != Reason.UNKNOWN_PROFILE:
            return Miss(error.reason, error.detail)
    try:
        blob = _fetch(client, profile_id, deadline_ms)
        if isinstance(blob, Miss):
            return blob
        profile = parse_profile(blob, profile_id=profile_id)
        profiles.add(profile)
    except ContainerError as error:
        return Miss(error.reason, error.detail)
    return profile


def _fetch(client: Client, profile_id: bytes, deadline_ms: float | None) -> bytes | Miss:
    parts: Any = client.fetch([profile_id], deadline_ms=deadline_ms)  # a generator; the contract says iterator
    with closing(parts):
        for part in parts:
            if part.miss is not None:
                return Miss(part.miss.reason, part.miss.detail)
            if part.header is None or part.header.codec != CODEC_ID or len(part.groups) != 1:
                return Miss(Reason.MALFORMED, f"what is stored as profile {profile_id.hex()[:12]} is none")
            segment, data = part.groups[0][0]
            check_segment(segment, data)
            return bytes(data)
    return Miss(Reason.ABSENT)
