"""Places of a volume that its device cannot read or write any more: never used again, whoever opens the volume.

A bad place is a row of the catalog like a chunk, under a key that no chunk can have: "bad" and the offset, 11 bytes
where a chunk key has 32. In the journal it is an operation of its own kind, padded with zeros to the length of a key.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from kvstore.tier import IO_ALIGN
from kvstore.tiers.evidence import Evidence, Kind
from kvstore.tiers.index import ChunkEntry
from kvstore.tiers.records import Operation, pack_record, place_of

_PREFIX = b"bad"
KEY_BYTES = len(_PREFIX) + 8
_OFFSET_MAX = 1 << 62

Place = tuple[int, int]
"""(start, end), multiples of IO_ALIGN, from the first byte behind the journal."""

_MEDIA_ERRORS = frozenset({errno.EIO, errno.ENODATA, errno.EILSEQ, errno.EBADMSG, errno.EREMOTEIO})
_PASSING_ERRORS = frozenset({errno.EINTR, errno.EBUSY, errno.EAGAIN, errno.ENOMEM, errno.ENOSPC, errno.EDQUOT})


def is_media_error(error: OSError) -> bool:
    """True if the device says that it cannot read or write the place."""
    return error.errno in _MEDIA_ERRORS


def is_passing(error: OSError) -> bool:
    """True if an error says nothing about the place or its bytes, so that another try may succeed."""
    return error.errno in _PASSING_ERRORS


def bad_place(offset: int, nbytes: int) -> Operation:
    """The operation that makes an extent a bad place for ever."""
    key = _PREFIX + offset.to_bytes(8, "big")
    return Operation(key, pack_record(ChunkEntry(key, offset, nbytes)), Evidence(Kind.BAD_PLACE))


def parse_row(key: bytes, record: bytes) -> Place | None:
    """The place that a row of the catalog calls bad; None if the row is no such thing, or damaged."""
    if len(key) != KEY_BYTES or not key.startswith(_PREFIX):
        return None
    place = place_of(key, record, _OFFSET_MAX)
    if place is None or key != _PREFIX + place[0].to_bytes(8, "big") or place[0] % IO_ALIGN:
        return None
    return place[0], -(-(place[0] + place[1]) // IO_ALIGN) * IO_ALIGN


def merged(places: Iterable[Place], data_bytes: int) -> list[Place]:
    """The same places by start, without overlaps, as far as they lie within the first `data_bytes`."""
    out: list[Place] = []
    for start, end in sorted(places):
        end = min(end, data_bytes)
        if out and start <= out[-1][1]:
            out[-1] = (out[-1][0], max(end, out[-1][1]))
        elif start < end:
            out.append((start, end))
    return out


def touching(
    places: list[Place], offsets: npt.NDArray[np.int64], nbytes: npt.NDArray[np.int64]
) -> npt.NDArray[np.bool_]:
    """True for every extent that shares a byte with one of `places`, which are as `merged` answers them."""
    if not places:
        return np.zeros(len(offsets), dtype=np.bool_)
    starts, ends = (np.array(side, dtype=np.int64) for side in zip(*places, strict=True))
    first = np.searchsorted(ends, offsets, side="right")
    inside = first < len(starts)
    hits: npt.NDArray[np.bool_] = inside & (starts[np.where(inside, first, 0)] - offsets < nbytes)
    return hits
