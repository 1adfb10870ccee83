"""Chunks that are fetched together lie together, and neighbours in the file move in one transfer."""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Sequence
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.buffers import aligned_buffer
from kvstore.keys import ROOT
from kvstore.testing.harness import bytes_of, key_of
from kvstore.tier import IO_ALIGN, PutItem
from kvstore.tiers.directio import ParallelFile, PosixIo, Span, page_up
from kvstore.tiers.extents import ExtentAllocator
from kvstore.tiers.nvme import NvmeTier
from kvstore.tiers.volume import JOURNAL_PAGES_MIN

CHUNK_BYTES = 5000
PADDED_BYTES = page_up(CHUNK_BYTES)


def put_chain(tier: NvmeTier, numbers: Sequence[int], parent: bytes = ROOT) -> None:
    """Put chunks of a chain in one call."""
    keys = [key_of(number) for number in numbers]
    data = [memoryview(bytes_of(number, CHUNK_BYTES)) for number in numbers]
    items = [PutItem(key, bytes_, before) for key, bytes_, before in zip(keys, data, [parent, *keys], strict=False)]
    assert all(status.durable for status in tier.put(items))


def offsets(tier: NvmeTier, numbers: Sequence[int]) -> list[int]:
    """Where chunks lie."""
    entries = [tier._volume.space.index.get(key_of(number)) for number in numbers]
    return [entry.offset for entry in entries if entry is not None]


def together(tier: NvmeTier, numbers: Sequence[int]) -> bool:
    """True if the chunks lie one behind the other."""
    places = offsets(tier, numbers)
    return len(places) == len(numbers) and all(b - a == PADDED_BYTES for a, b in itertools.pairwise(places))


def test_a_chain_lies_together_and_grows_behind_its_end(tmp_path: Path) -> None:
    tier = NvmeTier(tmp_path, 64 * PADDED_BYTES)
    put_chain(tier, range(4))
    put_chain(tier, range(10, 12))
    tier.delete([key_of(10), key_of(11)])
    put_chain(tier, range(4, 8), key_of(3))
    assert together(tier, range(8))
    tier.close()


def test_a_chain_is_not_scattered_over_holes_while_there_is_a_run(tmp_path: Path) -> None:
    tier = NvmeTier(tmp_path, 64 * PADDED_BYTES)
    for number in range(40):
        put_chain(tier, [number])
    tier.delete([key_of(number) for number in range(0, 40, 2)])
    put_chain(tier, range(100, 108))
    assert together(tier, range(100, 108))
    tier.close()


def test_in_a_full_volume_a_chain_takes_the_place_of_an_old_one(tmp_path: Path) -> None:
    tier = NvmeTier(tmp_path, (1 + JOURNAL_PAGES_MIN) * IO_ALIGN + 30 * PADDED_BYTES)
    for start in range(0, 200, 10):
        put_chain(tier, range(start, start + 10))
        tier.touch([key_of(number) for number in reversed(range(start, start + 10))])
        assert together(tier, range(start, start + 10)), f"the chain at {start} is scattered"
    assert tier.counters()["evictions"] > 100
    tier.close()


def test_the_allocator_takes_the_place_behind_and_the_run_asked_for() -> None:
    allocator = ExtentAllocator(64 * IO_ALIGN)
    taken = [allocator.allocate(IO_ALIGN) for _ in range(10)]
    for at in (2, 5, 6):
        allocator.free(taken[at] or 0, IO_ALIGN)
    assert allocator.allocate(IO_ALIGN, behind=5 * IO_ALIGN) == 5 * IO_ALIGN
    assert allocator.allocate(IO_ALIGN, behind=IO_ALIGN) == 2 * IO_ALIGN, "taken there, so the shortest run"
    assert allocator.allocate(IO_ALIGN, run_bytes=4 * IO_ALIGN) == 10 * IO_ALIGN
    assert allocator.allocate(IO_ALIGN, run_bytes=99 * IO_ALIGN) == 6 * IO_ALIGN
    assert allocator.allocate(60 * IO_ALIGN, behind=11 * IO_ALIGN) is None
    assert allocator.free_runs() == [(11 * IO_ALIGN, 53 * IO_ALIGN)]


class CountingIo(PosixIo):
    """The real system calls, counted; pages in `bad` cannot be read."""

    def __init__(self, bad: frozenset[int] = frozenset()) -> None:
        self.bad = bad
        self.reads = 0

    def read(self, descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        self.reads += 1
        if any(page in self.bad for page in range(offset // IO_ALIGN, (offset + sum(map(len, buffers))) // IO_ALIGN)):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return super().read(descriptor, buffers, offset)


def test_neighbours_are_read_in_one_call(tmp_path: Path) -> None:
    io = CountingIo()
    path = tmp_path / "file"
    path.write_bytes(bytes_of(1, 32 * IO_ALIGN))
    file = ParallelFile(io, io.open(str(path), os.O_RDWR), direct=False)
    views = [aligned_buffer(IO_ALIGN) for _ in range(32)]
    assert file.read([Span(view, at * IO_ALIGN, IO_ALIGN) for at, view in enumerate(views)]) == [None] * 32
    assert b"".join(views) == bytes_of(1, 32 * IO_ALIGN)
    assert io.reads == 1
    file.close()


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(1, 5 * IO_ALIGN)), min_size=1, max_size=12),
    st.frozensets(st.integers(0, 30), max_size=3),
    st.booleans(),
)
def test_every_span_is_filled_or_has_its_own_error(
    tmp_path_factory: object, places: list[tuple[int, int]], bad: frozenset[int], direct: bool
) -> None:
    content = bytes_of(2, 40 * IO_ALIGN)
    path = Path(tmp_path_factory.getbasetemp()) / "spans"  # type: ignore[attr-defined]
    path.write_bytes(content)
    io = CountingIo(bad)
    # Not opened with O_DIRECT, so that it runs anywhere; what differs is how spans are cut.
    file = ParallelFile(io, io.open(str(path), os.O_RDWR), direct=direct, threads=3, piece_bytes=4 * IO_ALIGN)
    spans = [Span(aligned_buffer(page_up(nbytes)), page * IO_ALIGN, nbytes) for page, nbytes in places]
    try:
        errors = file.read(spans)
    finally:
        file.close()
    for span, error in zip(spans, errors, strict=True):
        first = span.position // IO_ALIGN
        touched = set(range(first, first + page_up(span.nbytes) // IO_ALIGN))
        if error is None:
            assert span.view[: span.nbytes] == content[span.position : span.position + span.nbytes]
        assert (error is not None) == bool(touched & bad) or not direct
