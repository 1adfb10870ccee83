"""The extent allocator against a list of pages."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.tiers.extents import ExtentAllocator

PAGE = 4096
PAGES = 32


def check(allocator: ExtentAllocator, taken: dict[int, int]) -> None:
    """The allocator's free runs are exactly the pages that no extent takes, coalesced."""
    free = np.ones(PAGES, dtype=bool)
    for offset, nbytes in taken.items():
        pages = slice(offset // PAGE, offset // PAGE + max(1, -(-nbytes // PAGE)))
        assert free[pages].all(), "extents overlap"
        free[pages] = False
    edges = np.flatnonzero(np.diff(np.concatenate(([0], free.astype(int), [0]))))
    runs = [(start * PAGE, (stop - start) * PAGE) for start, stop in edges.reshape(-1, 2).tolist()]
    assert allocator.free_runs() == runs
    assert allocator.free_bytes == sum(length for _, length in runs)
    assert allocator.used_bytes + allocator.free_bytes == PAGES * PAGE
    assert allocator.largest_free_bytes == max((length for _, length in runs), default=0)


@settings(deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 10 * PAGE)), max_size=60))
def test_allocate_and_free_like_a_list_of_pages(steps: list[tuple[bool, int]]) -> None:
    allocator = ExtentAllocator(PAGES * PAGE)
    taken: dict[int, int] = {}
    for release, nbytes in steps:
        if release and taken:
            offset = sorted(taken)[nbytes % len(taken)]
            allocator.free(offset, taken.pop(offset))
        else:
            longest = allocator.largest_free_bytes
            offset_or_none = allocator.allocate(nbytes)
            assert (offset_or_none is None) == (allocator.padded(nbytes) > longest)
            if offset_or_none is not None:
                taken[offset_or_none] = nbytes
        check(allocator, taken)


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(-2 * PAGE, PAGES * PAGE + PAGE), st.integers(-1, 6 * PAGE)), max_size=12),
    st.booleans(),
)
def test_claim_all_refuses_exactly_what_does_not_fit_or_overlaps(extents: list[tuple[int, int]], aligned: bool) -> None:
    if aligned:
        extents = [(offset // PAGE * PAGE, nbytes) for offset, nbytes in extents]
    allocator = ExtentAllocator(PAGES * PAGE)
    offsets, sizes = (np.array([extent[side] for extent in extents], dtype=np.int64) for side in (0, 1))
    refused = allocator.claim_all(offsets, sizes).tolist()
    fits = [
        offset >= 0 and nbytes >= 0 and offset % PAGE == 0 and offset + allocator.padded(nbytes) <= PAGES * PAGE
        for offset, nbytes in extents
    ]
    ends = [offset + allocator.padded(nbytes) for offset, nbytes in extents]
    for at, (offset, _) in enumerate(extents):
        overlaps = any(
            fits[other] and other != at and offset < ends[other] and extents[other][0] < ends[at]
            for other in range(len(extents))
        )
        assert refused[at] == (not fits[at] or overlaps)
    check(allocator, {offset: nbytes for (offset, nbytes), no in zip(extents, refused, strict=True) if not no})


def test_claim_all_takes_absurd_numbers() -> None:
    allocator = ExtentAllocator(PAGES * PAGE)
    huge = np.iinfo(np.int64).max
    refused = allocator.claim_all(np.array([huge, 0, -huge, huge // PAGE * PAGE]), np.array([huge, huge, -huge, PAGE]))
    assert refused.all()
    assert allocator.free_bytes == PAGES * PAGE


def test_claim_all_needs_an_empty_allocator() -> None:
    allocator = ExtentAllocator(PAGES * PAGE)
    allocator.allocate(1)
    with pytest.raises(ValueError, match="nothing has been taken"):
        allocator.claim_all(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64))


@pytest.mark.parametrize("capacity_bytes", [0, 100, PAGE + 1])
def test_the_capacity_is_whole_pages(capacity_bytes: int) -> None:
    with pytest.raises(ValueError, match="multiple"):
        ExtentAllocator(capacity_bytes)


def test_best_fit_keeps_the_long_run() -> None:
    allocator = ExtentAllocator(PAGES * PAGE)
    first, _, third, _ = (allocator.allocate(size * PAGE) for size in (3, 1, 2, 1))
    assert first is not None
    assert third is not None
    allocator.free(first, 3 * PAGE)
    allocator.free(third, 2 * PAGE)
    assert allocator.allocate(2 * PAGE) == third
    assert allocator.allocate(3 * PAGE) == first
