"""The hbm tier: chunks in fixed blocks of GPU memory, in the engine's own process.

A chunk lies in any free blocks of one preallocated pool, so the bound is the pool itself and nothing fragments. Host
bytes come and go by `put` and `read`; kernels read a chunk in place, or gathered into one run, under a `hold`. What is
evicted is handed down, bytes and all, before its blocks are used again. `device="cpu"` is the same tier in host memory.

One lock guards the bookkeeping and is never held while bytes are copied.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Self

from kvstore.errors import ConfigError
from kvstore.keys import ROOT
from kvstore.outcome import Miss, PutStatus, Reason
from kvstore.sizes import parse_bytes
from kvstore.tier import IO_ALIGN, Entry, HandDown, PutItem, ReadItem, Removal, Tier, Usage
from kvstore.tiers.checks import check_key, check_put, check_read
from kvstore.tiers.hbm_blocks import Blocks, LanesBusyError
from kvstore.tiers.hbm_space import BlockEntry, BlockSpace, Room

if TYPE_CHECKING:
    import torch

_log = logging.getLogger(__name__)

BLOCK_BYTES_DEFAULT = 256 << 10
"""A 32 MiB chunk takes 128 of them; one copy of this size runs at nearly the full rate of PCIe."""

_CLOSED = "the hbm tier is closed"
_ABSENT = Miss(Reason.ABSENT)
_STORED = PutStatus(stored=True)
_EXISTED = PutStatus(stored=True, existed=True)


class HbmTier(Tier):
    """A bounded tier in a device's memory; evicts the least recently used chunk that is neither held nor pinned.

    Args:
        capacity_bytes: the hard bound, rounded down to whole blocks; a chunk takes whole blocks.
        name: metric label.
        device: cuda, cuda:N, or cpu.
        block_bytes: size of a block, bytes or as "256KiB"; a multiple of 4096.
        clock: seconds, monotonic; pins expire by it.

    Attributes:
        hand_down: told of each chunk that is evicted while its bytes can still be read; set it before the first call.

    Raises:
        ConfigError: torch is not installed, there is no such device, or a size does not fit.
        TierError: the device has less memory free.
    """

    durable = False

    def __init__(
        self,
        capacity_bytes: int,
        *,
        name: str = "hbm",
        device: str = "cuda",
        block_bytes: int | str = BLOCK_BYTES_DEFAULT,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        block_bytes = parse_bytes(block_bytes, "block_bytes")
        if block_bytes < IO_ALIGN or block_bytes % IO_ALIGN:
            raise ConfigError(f"block_bytes is {block_bytes}; it must be a positive multiple of {IO_ALIGN}")
        blocks = capacity_bytes // block_bytes
        if blocks < 1:
            raise ConfigError(f"hbm capacity is {capacity_bytes} bytes; give at least one block of {block_bytes}")
        try:
            from kvstore.tiers.hbm_device import open_device
            from kvstore.tiers.hbm_memory import BlockMemory
        except ImportError as error:
            raise ConfigError("the hbm tier needs torch; install kvstore-tiered[torch]") from error
        self.name = name
        self.capacity_bytes = self.chunk_bytes_max = blocks * block_bytes
        self.hand_down: HandDown | None = None
        self.memory = BlockMemory(open_device(device), blocks, block_bytes)
        self._clock = clock
        self._lock = threading.Lock()
        self._space = BlockSpace(blocks, block_bytes)
        self._closed = False
        self._counters = dict.fromkeys(
            ("evictions", "evicted_bytes", "handed_down", "holds", "io_errors", "read_bytes", "written_bytes"), 0
        )

    def put(self, items: Sequence[PutItem]) -> list[PutStatus]:
        """Store chunks, evicting the least recently used to make room. Raises ValueError on empty data or a bad key."""
        for item in items:
            check_put(item)
        return [self._put_item(item) for item in items]

    def adopt(self, key: bytes, data: torch.Tensor, *, parent: bytes = ROOT) -> PutStatus:
        """Store a chunk whose container already lies in the device's memory, without a way through the host.

        Args:
            key: of the chunk.
            data: the container, (nbytes,) uint8 on the tier's device; it is the writer's word that its hashes fit.
            parent: the chunk before it in its chain.

        Raises:
            ValueError: a bad key, or data of another shape, type or device.
        """
        check_key(key, parent)
        pool = self.memory.pool
        if data.dtype != pool.dtype or data.dim() != 1 or not len(data) or data.device != pool.device:
            raise ValueError(f"data must be the container's bytes, one axis of uint8 on {pool.device}")
        data = data.contiguous()
        head = data[:IO_ALIGN].cpu().numpy().data
        return self._put(key, len(data), parent, head, lambda blocks: self.memory.adopt(blocks, data))

    def read(self, items: Sequence[ReadItem]) -> list[int | Miss]:
        """Copy ranges of chunks into host memory. Raises ValueError on a target or offset that cannot be."""
        for item in items:
            check_read(item)
        return [self._read(item) for item in items]

    def hold(self, key: bytes) -> HbmHold | Miss:
        """The right to read a chunk on the device; counts as a use."""
        with self._lock:
            entry = self._find(key)
            if isinstance(entry, Miss):
                return entry
            self._space.index.start_reading(entry)
            self._counters["holds"] += 1
        return HbmHold(self, entry)

    def sizes(self, keys: Sequence[bytes]) -> list[int | None]:
        """Bytes of each chunk, None where there is none."""
        with self._lock:
            return [None if entry is None else entry.nbytes for entry in map(self._space.get, keys)]

    def touch(self, keys: Sequence[bytes]) -> None:
        """Count a use of each chunk that is there, in the given order."""
        with self._lock:
            for key in keys:
                if (entry := self._space.get(key)) is not None:
                    self._space.index.use(entry)

    def delete(self, keys: Sequence[bytes]) -> list[bool]:
        """Remove chunks, pinned or not; True where there was one. Bytes of a held chunk stay until its holds end."""
        found = []
        with self._lock:
            for key in keys:
                entry = self._space.get(key)
                found.append(entry is not None)
                if entry is not None:
                    self._space.remove(entry)
                    self.listener.removed([_entry(entry)], Removal.DELETED)
        return found

    def pin(self, keys: Sequence[bytes], *, expires_at: float) -> list[bool]:
        """Keep chunks from eviction until then; the longest of several pins holds. True where there was one."""
        with self._lock:
            entries = [self._space.get(key) for key in keys]
            for entry in entries:
                if entry is not None:
                    self._space.index.pin(entry, expires_at)
        return [entry is not None for entry in entries]

    def unpin(self, keys: Sequence[bytes], *, until: float = 0.0) -> list[bool]:
        """End pins, or those that last longer at `until`. True where there was a pinned chunk."""
        now = self._clock()
        with self._lock:
            entries = [self._space.get(key) for key in keys]
            return [entry is not None and self._space.index.unpin(entry, now, until) for entry in entries]

    def evict(self, keys: Sequence[bytes]) -> list[bool]:
        """Let chunks leave now, the last key first; False where there is none, or it must stay. See `Tier.evict`."""
        now = self._clock()
        left = []
        with self._lock:
            for key in reversed(keys):
                entry = self._space.get(key)
                left.append(entry is not None and self._space.index.may_leave(entry, now))
                if entry is not None and left[-1]:
                    self._space.remove(entry)
                    self._count_evicted([_entry(entry)])
        return left[::-1]

    def parents(self, keys: Sequence[bytes]) -> list[bytes]:
        """The chunk before each in its chain, ROOT where there is none."""
        with self._lock:
            return self._space.index.parents(keys)

    def scan(self) -> Iterator[Entry]:
        """Every stored chunk, least recently used first, as of the call."""
        with self._lock:
            return iter([Entry(entry.key, entry.parent, entry.nbytes) for entry in self._space.index])

    def usage(self) -> Usage:
        """What the tier holds now; holds, pins, unfinished puts and what is being handed down count as pinned."""
        with self._lock:
            return self._space.usage(self._clock())

    def counters(self) -> dict[str, int]:
        """Monotonic counts since start."""
        with self._lock:
            return dict(self._counters)

    def flush(self) -> None:
        """Do nothing: a put has been copied when it is answered."""

    def close(self) -> None:
        """Drop every chunk and give the memory back. Idempotent; a tensor that shows it keeps it until it is gone."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._space = BlockSpace(self.capacity_bytes // self._space.block_bytes, self._space.block_bytes)
        self.memory.close()

    # -- inside --------------------------------------------------------------------------------------------------------

    def _put_item(self, item: PutItem) -> PutStatus:
        data = item.data.cast("B") if item.data.format != "B" or item.data.ndim != 1 else item.data
        return self._put(item.key, len(data), item.parent, data, lambda blocks: self.memory.write(blocks, data))

    def _put(
        self, key: bytes, nbytes: int, parent: bytes, head: memoryview, fill: Callable[[Blocks], None]
    ) -> PutStatus:
        with self._lock:
            space = self._space
            room = self._reserve(key, nbytes, parent)
        if isinstance(room, PutStatus):
            return room
        filled = False
        try:
            self._hand_down(space, room)
            fill(room.entry.blocks)
            filled = True
        except RuntimeError as error:  # what torch raises when the device fails
            miss = self._failed(error)
            return PutStatus(stored=False, reason=miss.reason, detail=miss.detail)
        finally:
            with self._lock:
                if not filled:
                    space.abandon(room.entry)
                elif not self._closed:
                    space.publish(room.entry)
                    self._counters["written_bytes"] += nbytes
                    self.listener.stored(Entry(key, parent, nbytes), head)
        return _STORED if space is self._space else PutStatus(stored=False, reason=Reason.UNAVAILABLE, detail=_CLOSED)

    def _reserve(self, key: bytes, nbytes: int, parent: bytes) -> Room | PutStatus:
        """A place for a chunk; the lock is held."""
        if self._closed:
            return PutStatus(stored=False, reason=Reason.UNAVAILABLE, detail=_CLOSED)
        if (entry := self._space.get(key)) is not None:
            self._space.index.use(entry)
            return _EXISTED
        if self._space.is_filling(key):
            return PutStatus(stored=False, reason=Reason.BUSY, detail="another writer is storing this chunk")
        room = self._space.reserve(key, nbytes, parent, self._clock())
        if isinstance(room, Reason):
            detail = f"chunk of {nbytes} bytes, hbm tier of {self.capacity_bytes}"
            return PutStatus(stored=False, reason=room, detail=detail)
        if room.leaving:
            self._count_evicted([_entry(entry) for entry in room.leaving])
        return room

    def _count_evicted(self, evicted: list[Entry]) -> None:
        self._counters["evictions"] += len(evicted)
        self._counters["evicted_bytes"] += sum(entry.nbytes for entry in evicted)
        self.listener.removed(evicted, Removal.EVICTED)

    def _hand_down(self, space: BlockSpace, room: Room) -> None:
        """Offer what was evicted to whoever is below, then let go of the blocks that the new chunk does not take."""
        try:
            if self.hand_down is not None:
                for entry in room.leaving:
                    self.hand_down(_entry(entry), partial(self._copy_out, entry, 0))
                with self._lock:
                    self._counters["handed_down"] += len(room.leaving)
        finally:
            with self._lock:
                space.vacate(room)

    def _read(self, item: ReadItem) -> int | Miss:
        with self._lock:
            space = self._space
            entry = self._find(item.key)
            if isinstance(entry, Miss):
                return entry
            count = min(item.target.nbytes, entry.nbytes - item.offset)
            if count <= 0:
                return Miss(Reason.TRUNCATED, f"offset {item.offset} of a chunk of {entry.nbytes} bytes")
            space.index.start_reading(entry)
        try:
            return self._copy_out(entry, item.offset, item.target.cast("B")[:count])
        finally:
            with self._lock:
                space.stop_reading(entry)

    def _copy_out(self, entry: BlockEntry, offset: int, target: memoryview) -> int | Miss:
        """Fill `target`, which is no longer than what remains of the chunk."""
        try:
            self.memory.read(entry.blocks, offset, target)
        except RuntimeError as error:
            return self._failed(error)
        with self._lock:
            self._counters["read_bytes"] += len(target)
        return len(target)

    def _failed(self, error: RuntimeError) -> Miss:
        """Why a copy failed."""
        if self._closed:
            return Miss(Reason.UNAVAILABLE, _CLOSED)
        if isinstance(error, LanesBusyError):
            return Miss(Reason.BUSY, str(error))
        with self._lock:
            self._counters["io_errors"] += 1
        _log.warning("tier %s: a copy failed: %s", self.name, error)
        return Miss(Reason.IO_ERROR, str(error))

    def _find(self, key: bytes) -> BlockEntry | Miss:
        """The chunk, as its latest use; the lock is held."""
        if self._closed:
            return Miss(Reason.UNAVAILABLE, _CLOSED)
        entry = self._space.get(key)
        if entry is None:
            return _ABSENT
        self._space.index.use(entry)
        return entry

    def _end_hold(self, entry: BlockEntry) -> None:
        self.memory.end_use()
        with self._lock:
            if not self._closed:
                self._space.stop_reading(entry)


class HbmHold:
    """The right to read one chunk on the device; see `kvstore.tier.Hold`.

    Attributes:
        nbytes: of the chunk.
        blocks: where it lies: numbers of the pool's blocks, in the order of its bytes.
    """

    def __init__(self, tier: HbmTier, entry: BlockEntry) -> None:
        self.nbytes = entry.nbytes
        self.blocks = entry.blocks
        self._entry = entry
        self._tier: HbmTier | None = tier

    def contiguous(self) -> torch.Tensor:
        """The chunk's bytes in one run on the device, (nbytes,) uint8; valid until `release`.

        Raises:
            ValueError: the hold has ended, or its tier is closed.
        """
        if self._tier is None or self._tier._closed:
            raise ValueError("the hold has ended, or its tier is closed; hold the chunk again")
        return self._tier.memory.contiguous(self.blocks, self.nbytes)

    def release(self) -> None:
        """End the hold, once the kernels that the caller's current stream has been given are done. Idempotent."""
        tier, self._tier = self._tier, None
        if tier is not None:
            tier._end_hold(self._entry)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: Any) -> None:
        self.release()


def _entry(entry: BlockEntry) -> Entry:
    return Entry(entry.key, entry.parent, entry.nbytes)
