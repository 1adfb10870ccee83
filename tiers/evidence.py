"""What a journal record says about a chunk's bytes, so that recovery can tell whether all of them reached the device.

A container carries the hashes of all its parts, which its writer has computed already; the hash of its header pins
them, so it costs nothing to name. Any other bytes are hashed.
"""

from __future__ import annotations

import enum
from typing import NamedTuple

from kvstore import container, kernels
from kvstore.errors import ContainerError


class Kind(enum.IntEnum):
    """How bytes are compared, or that no chunk is meant at all. Values are stored."""

    NONE = 0
    BYTES = 1
    CONTAINER = 2
    BAD_PLACE = 3


class Evidence(NamedTuple):
    """The XXH3-64 of all bytes, or of a container's header whose own hashes cover the rest."""

    kind: int = Kind.NONE
    digest: int = 0


def evidence_of(data: memoryview) -> Evidence:
    """The cheapest evidence for a chunk that is about to be stored."""
    try:
        body_end = container.peek_header_bytes(data) - container.HASH.size
    except ContainerError:
        return Evidence(Kind.BYTES, kernels.xxh3(data))
    if container.FIXED.unpack_from(data)[5] == len(data) and body_end + container.HASH.size <= len(data):
        digest = kernels.xxh3(data[:body_end])
        if container.HASH.unpack_from(data, body_end)[0] == digest:
            return Evidence(Kind.CONTAINER, digest)
    return Evidence(Kind.BYTES, kernels.xxh3(data))


def agrees(evidence: Evidence, key: bytes, data: memoryview) -> bool:
    """True if `data`, read back, are the bytes that the evidence was taken of."""
    if evidence.kind != Kind.CONTAINER:
        return evidence == Evidence(Kind.BYTES, kernels.xxh3(data))
    try:
        header = container.verify(data, key=key)
    except ContainerError:
        return False
    body = data[: header.header_bytes - container.HASH.size]
    return header.total_bytes == len(data) and kernels.xxh3(body) == evidence.digest
