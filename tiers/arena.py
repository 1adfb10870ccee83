"""One block of memory, by default shared and sealed: its owner writes, whoever is handed the descriptor can only read.

Shared memory is a memfd: it has no name to leak and is gone with its last holder. After the owner has mapped it, it is
sealed against shrinking, growing, and any *new* way of writing (F_SEAL_FUTURE_WRITE, Linux 5.1): a process that
receives the descriptor (`socket.send_fds`) cannot map it writable, write() to it, or truncate it under the others.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import threading
from contextlib import suppress
from pathlib import Path
from typing import Literal

import numpy as np

from kvstore.errors import ConfigError, TierError
from kvstore.tiers.placement import bind_to_node, register_with_cuda, unregister_from_cuda

F_SEAL_FUTURE_WRITE = 0x10
"""linux/fcntl.h; Python's fcntl module has no name for it."""

SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | F_SEAL_FUTURE_WRITE | fcntl.F_SEAL_SEAL

MADV_POPULATE_WRITE = 23
"""linux/mman.h, Linux 5.14: back pages with memory without changing what they hold."""

PREFAULT_STEP_BYTES = 2 << 20
"""Pages are prefaulted in steps of this size: madvise holds the interpreter lock, and other threads want their turn."""

CLOSE_TIMEOUT_SECONDS = 30.0

_SHMEM_HUGE = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
_PRIVATE_HUGE = Path("/sys/kernel/mm/transparent_hugepage/enabled")

Pages = Literal["hugetlb", "transparent", "base"]
"""What backs the arena: reserved huge pages, huge pages where the kernel finds some, or ordinary pages."""


class _Mapping:
    """A mapping that outlives `close` for as long as views of it are in use, and not longer."""

    def __init__(self, mapping: mmap.mmap) -> None:
        self._map: mmap.mmap | None = mapping
        self._view = memoryview(mapping)
        self._pinned_at = 0

    @property
    def address(self) -> int:
        """Where the memory is mapped in this process."""
        return int(np.frombuffer(self._view, dtype=np.uint8).ctypes.data)

    @property
    def pinned(self) -> bool:
        """True if a GPU of this process copies from and to this memory on its own."""
        return bool(self._pinned_at)

    def pin(self) -> bool:
        """Register the memory with CUDA, which backs all of it now; False, and no harm done, where that cannot be."""
        address = self.address
        if not self._pinned_at and register_with_cuda(address, len(self._view), read_only=self._view.readonly):
            self._pinned_at = address
        return self.pinned

    def view(self, offset: int, nbytes: int) -> memoryview:
        """Bytes from `offset` on, writable for the owner only. Raises ValueError outside and after `close`."""
        if offset < 0 or nbytes < 0 or offset + nbytes > len(self._view):
            raise ValueError(f"bytes {offset}..{offset + nbytes} are outside the arena of {len(self._view)} bytes")
        return self._view[offset : offset + nbytes]

    def close(self) -> None:
        """Unmap. Idempotent.

        Views that are still in use elsewhere keep the mapping until the last of them is gone: unmapping under them
        would turn a late read into a crash.
        """
        if self._map is not None:
            if self._pinned_at:
                unregister_from_cuda(self._pinned_at)
                self._pinned_at = 0
            self._view.release()
            with suppress(BufferError):
                self._map.close()
            self._map = None


class Arena(_Mapping):
    """Memory of `capacity_bytes` bytes, mapped writable here and, where others read it, read-only there.

    Args:
        capacity_bytes: size; a multiple of 2 MiB if reserved huge pages are wanted.
        shared: whether other processes may map it. Memory that is not shared gets huge pages without any set-up, and a
            forked child writes into a copy of its own.
        huge_pages: try reserved huge pages (MFD_HUGETLB), then transparent ones; `pages` says what was got.
        prefault: back all of it with memory now, in a thread, so that first writes run at full speed.
        numa_node: take the memory from this node (a CXL expander is one) and no other; None: wherever the kernel likes.

    Raises:
        ConfigError: this machine does not have that much memory, or no such node.
        TierError: the system has no memfd with these seals, or cannot map it.
    """

    def __init__(
        self,
        capacity_bytes: int,
        *,
        shared: bool = True,
        huge_pages: bool = False,
        prefault: bool = False,
        numa_node: int | None = None,
    ) -> None:
        memory_bytes = os.sysconf("SC_PHYS_PAGES") * mmap.PAGESIZE
        if not 0 < capacity_bytes <= memory_bytes:
            raise ConfigError(f"dram capacity is {capacity_bytes} bytes; this machine has {memory_bytes}")
        self.capacity_bytes = capacity_bytes
        self.pages: Pages = "base"
        reserved = _map_hugetlb(capacity_bytes) if huge_pages and shared else None
        self._fd, mapping = reserved or (_map_memfd(capacity_bytes) if shared else _map_private(capacity_bytes))
        super().__init__(mapping)
        if reserved:
            self.pages = "hugetlb"
        elif huge_pages and _advise_huge(mapping, _SHMEM_HUGE if shared else _PRIVATE_HUGE):
            self.pages = "transparent"
        self._closing = threading.Event()
        self._prefaulter: threading.Thread | None = None
        try:
            if numa_node is not None:
                bind_to_node(self.address, capacity_bytes, numa_node)
            if shared:
                self._seal()
        except (OSError, ConfigError):
            self.close()
            raise
        if prefault:
            self._prefaulter = threading.Thread(target=self._prefault, args=(mapping,), daemon=True)
            self._prefaulter.start()

    @property
    def fd(self) -> int:
        """The descriptor to hand to readers. Stays this arena's. Raises ValueError after `close`, or if not shared."""
        if self._map is None or self._fd < 0:
            raise ValueError("the arena is closed" if self._map is None else "the arena is not shared")
        return self._fd

    def wait_prefaulted(self, timeout_seconds: float) -> bool:
        """True once prefaulting has ended (or was not asked for); False if it has not after `timeout_seconds`."""
        if self._prefaulter is None:
            return True
        self._prefaulter.join(timeout_seconds)
        return not self._prefaulter.is_alive()

    def close(self) -> None:
        """Give the memory and the descriptor back. Idempotent; a view in use keeps the memory until it is gone."""
        if self._map is not None:
            self._closing.set()
            self.wait_prefaulted(CLOSE_TIMEOUT_SECONDS)
            if self._fd >= 0:
                os.close(self._fd)
        super().close()

    def _seal(self) -> None:
        try:
            fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, SEALS)
        except OSError as error:
            raise TierError(f"cannot seal shared memory: {error.strerror}; the dram tier needs Linux 5.1") from error

    def _prefault(self, mapping: mmap.mmap) -> None:
        for start in range(0, self.capacity_bytes, PREFAULT_STEP_BYTES):
            if self._closing.is_set():
                return
            try:
                mapping.madvise(MADV_POPULATE_WRITE, start, min(PREFAULT_STEP_BYTES, self.capacity_bytes - start))
            except OSError:  # an older kernel, or memory has run out: first writes will be slower, nothing else
                return


class ReaderArena(_Mapping):
    """Another process's arena, mapped read-only from the descriptor it sent.

    The descriptor stays the caller's, who may close it at once.

    Args:
        fd: what was received.
        nbytes: the arena's capacity as its owner stated it.

    Raises:
        TierError: it is not a sealed arena of that size; reading from it could crash this process.
    """

    def __init__(self, fd: int, nbytes: int) -> None:
        try:
            seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        except OSError as error:
            raise TierError("descriptor is not shared memory with seals; connect to a kvstore daemon") from error
        if not seals & fcntl.F_SEAL_SHRINK:
            raise TierError("shared memory is not sealed: its owner could truncate it under this process")
        size = os.fstat(fd).st_size
        if not 0 < nbytes <= size:
            raise TierError(f"shared memory has {size} bytes; {nbytes} were announced")
        super().__init__(mmap.mmap(fd, nbytes, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ))


def _map_memfd(capacity_bytes: int, flags: int = 0) -> tuple[int, mmap.mmap]:
    try:
        fd = os.memfd_create("kvstore-dram", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | flags)
    except (AttributeError, OSError) as error:
        raise TierError(f"no shared memory: {error}; the dram tier needs Linux with memfd_create") from error
    try:
        os.ftruncate(fd, capacity_bytes)
        return fd, mmap.mmap(fd, capacity_bytes)
    except (OSError, ValueError) as error:
        os.close(fd)
        raise TierError(f"cannot map {capacity_bytes} bytes of shared memory: {error}") from error


def _map_private(capacity_bytes: int) -> tuple[int, mmap.mmap]:
    try:
        return -1, mmap.mmap(-1, capacity_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, ValueError) as error:
        raise TierError(f"cannot map {capacity_bytes} bytes of memory: {error}") from error


def _map_hugetlb(capacity_bytes: int) -> tuple[int, mmap.mmap] | None:
    """A mapping on reserved huge pages; None if there are too few, or the capacity is not a multiple of them."""
    try:
        return _map_memfd(capacity_bytes, os.MFD_HUGETLB)
    except TierError:
        return None


def _advise_huge(mapping: mmap.mmap, setting: Path) -> bool:
    """Ask for transparent huge pages; True if this kernel gives any to memory that `setting` is for."""
    try:
        mapping.madvise(mmap.MADV_HUGEPAGE)
        return not any(f"[{off}]" in setting.read_text() for off in ("never", "deny"))
    except OSError:
        return False


def copy_bytes(source: memoryview, target: memoryview) -> int:
    """Copy `source` to the beginning of `target`, others run meanwhile; answers how many bytes that are."""
    np.copyto(np.frombuffer(target, dtype=np.uint8)[: source.nbytes], np.frombuffer(source, dtype=np.uint8))
    return source.nbytes
