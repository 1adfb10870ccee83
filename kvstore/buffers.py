"""Memory for bytes on their way: on page boundaries, and in huge pages where the kernel gives them on request."""

from __future__ import annotations

import mmap
from contextlib import suppress

HUGE_PAGE_BYTES = 2 << 20


def aligned_buffer(nbytes: int) -> memoryview:
    """Writable zeros that start on a page; they go when the last view of them goes.

    Private memory, not shared: it can have huge pages without the system's being set up for it, and a disk moves those
    in a fraction of the transfers (docs/nvme.md).
    """
    memory = mmap.mmap(-1, max(1, nbytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if nbytes >= HUGE_PAGE_BYTES:
        with suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(memory)[:nbytes]
