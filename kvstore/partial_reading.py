"""Reading chunks up to a quality level: the byte prefix that holds those levels, from a lower tier, and no more."""

from __future__ import annotations

from collections.abc import Sequence

from kvstore import container
from kvstore.container import Header
from kvstore.errors import ContainerError
from kvstore.levels import parse_up_to, up_to_level
from kvstore.loan import Loan, Standby, TransientBuffer, holds_room
from kvstore.outcome import Miss, Reason
from kvstore.promotion import HEAD_READ_BYTES, Promoter
from kvstore.tier import ReadItem, Tier

_TAKEN = Miss(Reason.BUSY, "others waited for the room outside memory that it took")


def borrow_up_to(
    promoter: Promoter, keys: Sequence[bytes], level_max: int | None, *, deadline: float, min_quality: int = 0
) -> list[Loan | Miss]:
    """What `Promoter.borrow` answers, with chunks of more levels cut behind `level_max`, if that is not None.

    A cut chunk is a transient loan: its bytes are the container's first, as far as `levels.up_to_level` says, every
    segment verified; nobody else sees it. Chunks in memory, and those that have no more levels, come whole.
    """
    if level_max is None:
        return promoter.borrow(keys, deadline=deadline, min_quality=min_quality)
    loans = _leading(promoter, keys, level_max, deadline, min_quality)
    cut = {index for index, loan in enumerate(loans) if loan is not None}
    rest = [key for index, key in enumerate(keys) if index not in cut]
    with Standby(promoter.transient, loans):  # the others may have to wait for room
        others = iter(promoter.borrow(rest, deadline=deadline, min_quality=min_quality) if rest else ())
    return [(loans[index] or _TAKEN) if index in cut else next(others) for index in range(len(keys))]


def _leading(
    promoter: Promoter, keys: Sequence[bytes], level_max: int, deadline: float, min_quality: int
) -> list[Loan | Miss | None]:
    """The cut chunks; None for one that is to be read whole, whether it is short or in any trouble."""
    loans: list[Loan | Miss | None] = [None] * len(keys)
    left = set(range(len(keys)))
    if promoter.memory is not None:
        left = {index for index, held in enumerate(promoter.memory.sizes(keys)) if held is None}
    for tier in promoter.lower:
        found = {index: nbytes for index, nbytes in enumerate(tier.sizes(keys)) if nbytes is not None and index in left}
        left -= found.keys()
        if holds_room(loans):
            deadline = 0.0
        headers = _headers(promoter, tier, {index: (keys[index], nbytes) for index, nbytes in found.items()}, deadline)
        cut = {
            index: up_to_level(header, level_max)
            for index, header in headers.items()
            if header.levels - 1 > level_max and promoter.poor(header, min_quality) is None
        }
        for index, loan in _bodies(promoter, tier, keys, cut, level_max, deadline).items():
            loans[index] = loan
    return loans


def _headers(
    promoter: Promoter, tier: Tier, chunks: dict[int, tuple[bytes, int]], deadline: float
) -> dict[int, Header]:
    """The headers of chunks, as far as they are good and short enough for one read."""
    buffers: dict[int, TransientBuffer] = {}
    headers: dict[int, Header] = {}
    try:
        sizes = [min(nbytes, HEAD_READ_BYTES) for _, nbytes in chunks.values()]
        for index, buffer in zip(chunks, promoter.transient.take_all(sizes, deadline=deadline), strict=True):
            if buffer is not None:
                buffers[index] = buffer
        outcomes = tier.read([ReadItem(chunks[index][0], buffer.padded) for index, buffer in buffers.items()])
        for (index, buffer), outcome in zip(buffers.items(), outcomes, strict=True):
            key, nbytes = chunks[index]
            if isinstance(outcome, Miss):
                continue
            try:
                header = container.parse(buffer.view[:outcome], available=nbytes)
                container.expect(header, key=key)
            except ContainerError:
                continue
            headers[index] = header
    finally:
        for buffer in buffers.values():
            buffer.release()
    return headers


def _bodies(
    promoter: Promoter, tier: Tier, keys: Sequence[bytes], cut: dict[int, Header], level_max: int, deadline: float
) -> dict[int, Loan]:
    """Loans on the leading bytes of chunks, as far as they are good."""
    buffers: dict[int, TransientBuffer] = {}
    loans: dict[int, Loan] = {}
    try:
        sizes = [header.total_bytes for header in cut.values()]
        for index, buffer in zip(cut, promoter.transient.take_all(sizes, deadline=deadline), strict=True):
            if buffer is not None:
                buffers[index] = buffer
        reads = [ReadItem(keys[index], buffer.padded) for index, buffer in buffers.items()]
        for (index, buffer), outcome in zip(list(buffers.items()), tier.read(reads), strict=True):
            if not isinstance(outcome, Miss) and _is_good(buffer.view, keys[index], level_max):
                promoter.hit(tier, cut[index].total_bytes)
                loans[index] = Loan(buffer.view, "transient", buffers.pop(index))
    finally:
        for buffer in buffers.values():
            buffer.release()
    return loans


def _is_good(view: memoryview, key: bytes, level_max: int) -> bool:
    try:
        header = parse_up_to(view, level_max, available=len(view))
        container.expect(header, key=key)
        for segment in header.segments:
            container.check_segment(segment, view[segment.offset : segment.offset + segment.length])
    except ContainerError:
        return False
    return True
