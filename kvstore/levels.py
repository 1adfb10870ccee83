"""Containers up to a quality level: their first bytes, because a level is a prefix of the bytes."""

from __future__ import annotations

import sys

import msgspec

from kvstore.container import PART_ANCILLARY, Header, parse
from kvstore.errors import ContainerError
from kvstore.outcome import Reason


def up_to_level(header: Header, level_max: int) -> Header:
    """The header without what lies above a level, or beside the KV; `total_bytes` is where the rest ends.

    One that has no more levels, as every exact container, is answered as it is.
    """
    if header.levels - 1 <= level_max:
        return header
    kept = tuple(segment for segment in header.segments if segment.part < PART_ANCILLARY and segment.level <= level_max)
    return msgspec.structs.replace(header, segments=kept, total_bytes=kept[-1].offset + kept[-1].length)


def parse_up_to(head: memoryview, level_max: int | None, *, available: int) -> Header:
    """The checked header of a container of which `available` bytes are there, up to a level; None for all.

    Args:
        head: at least the header's bytes.
        level_max: the highest level wanted.
        available: bytes of the container that the caller has or can read.

    Raises:
        ContainerError: as `container.parse`; truncated if bytes of the wanted levels are missing.
    """
    if level_max is None:
        return parse(head, available=available)
    header = up_to_level(parse(head, available=sys.maxsize), level_max)
    if not header.segments:
        raise ContainerError(Reason.MALFORMED, "no segments of the lowest level")
    if header.total_bytes > available:
        raise ContainerError(Reason.TRUNCATED, f"{available} bytes of {header.total_bytes} up to level {level_max}")
    return header
