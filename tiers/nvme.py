"""The nvme tier: chunks in a preallocated volume file, found through a durable journal and catalog.

What must hold at every instant, and after `kill -9` or power loss at any instant:

    A record that is believed never points at bytes that were not written for it.

A chunk's life, in the order that makes it so. `bytes` and `record` go to the same file, the record to its journal:

    put     1  reserve an extent (evicting if need be), in memory only
            2  wait until no durable record names any part of that extent any more
            3  write the bytes, many pieces at once, and hash them meanwhile
            4  queue the record; the commit thread writes all queued records and flushes the volume once
            5  the chunk enters the index and the put is answered `durable`
    evict,  1  the chunk leaves the index; if it is being read (delete only), the last reader frees its extent
    delete  2  the record of its deletion is queued; the extent can be reserved at once, but is *unsettled* until that
               has been flushed: whoever reserves a part of it waits in step 2 of put

One flush makes bytes and records durable together, so after a crash a record may be there without all of its bytes.
Recovery therefore believes a record only if a later page of the journal says that it had been flushed, or if the bytes
have the checksum that the record names. From time to time what the journal has said is applied to the catalog, and its
pages are used again (`kvstore.tiers.journal`, `kvstore.tiers.groupcommit`).

Queueing happens under the tier's lock, at the moment the index changes, so records are committed in the order in
which the index changed. At start the allocator is derived from catalog and journal alone: what no record names is
free, so nothing leaks. Bytes of a put that did not reach step 4 are never named by anything.

An extent that its device cannot read or write (EIO) is quarantined for ever: its chunk is dropped, and a row of the
catalog keeps every later opening from using the place (`kvstore.tiers.bad_places`). A commit that fails makes the tier
read-only until it is reopened, since nobody can know what has become durable.

Chunks that are fetched together lie together: the chunks of a chain that are put in one call get one run of the file
where there is one, and a chunk lies behind its parent where that place is free; neighbours move in one transfer.

The lock guards memory only; it is never held across I/O.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from kvstore.errors import TierError
from kvstore.keys import ROOT
from kvstore.outcome import Miss, PutStatus, Reason
from kvstore.tier import Entry, PutItem, ReadItem, Removal, TenantUsage, Tier, TierListener, Usage
from kvstore.tiers.backends import open_backend
from kvstore.tiers.checks import check_put, check_read
from kvstore.tiers.directio import PIECE_BYTES_DEFAULT, THREADS_DEFAULT, Io
from kvstore.tiers.disk import VolumeOptions
from kvstore.tiers.eviction_order import NATIVE, attach
from kvstore.tiers.index import ChunkEntry
from kvstore.tiers.nvme_put import PutPath
from kvstore.tiers.nvme_read import DeviceReadItem, ReadPath
from kvstore.tiers.open_volume import COMMIT_WAIT_SECONDS, OpenVolume
from kvstore.verifying import STEP_BYTES_DEFAULT, Verified

CLOSE_WAIT_SECONDS = 120.0
EVICT_AHEAD_CAPACITY_MIN = 1 << 30
EVICT_AHEAD_FRACTION = 64
_CLOSED = "the tier is closed"


class NvmeTier(Tier):
    """Chunks on a local disk, durable.

    Args:
        path: directory of the volume; made if missing, owned by one tier at a time. Or the directories of several
            volumes, one a disk, among which chunks are striped; one may be added, and one that is left out takes its
            chunks with it.
        capacity_bytes: hard bound of the volume files together, superblocks and journals included; rounded down to
            whole pages of each. A larger value than last time grows the volumes; a smaller one shrinks them, and the
            chunks behind the new ends leave, with those after them in their chains. The catalogs' files come on top;
            `info()` says how large they are and may become.
        io_threads: transfers in flight at once, in each direction.
        piece_bytes: size of one transfer.
        direct_io: False never bypasses the page cache.
        evict_ahead_bytes: room kept free by evicting together with a commit that happens anyway, so that the next put
            need not wait for a deletion to become durable. None: a 64th of a capacity of at least 1 GiB, else nothing.
        policy: who is evicted first, one of `kvstore.tiers.policies.registry.EVICTIONS`.
        admission: who may enter, one of `ADMISSIONS` there; empty for what the policy brings. Chunks that are
            `required` always may.
        ttl_seconds: how long a chunk stays unused, see `kvstore.tiers.expiry`; None: until its room is needed.
        quotas: the most bytes of each tenant, see `kvstore.tiers.quotas`; whose the chunks are is saved at a flush and
            when the tier is closed.
        clock: seconds that pins expire by.
        io_backend: how bytes move, one of `kvstore.tiers.backends.BACKENDS`.
        io: the system calls, in place of a back end's.

    After a fork the child's copy is closed; the parent's is not touched.

    Raises:
        ConfigError: there is no such policy, admission or back end; `ttl_seconds` is not positive.
        VolumeBusyError: another tier has the volume.
        VolumeFormatError: what lies at `path` is not a volume, is damaged, or of another version.
        TierError: no space, no permission, or `capacity_bytes` too small.
    """

    durable = True

    def __init__(
        self,
        path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        capacity_bytes: int,
        *,
        name: str = "nvme",
        io_threads: int = THREADS_DEFAULT,
        piece_bytes: int = PIECE_BYTES_DEFAULT,
        direct_io: bool = True,
        evict_ahead_bytes: int | None = None,
        policy: str = NATIVE,
        admission: str = "",
        ttl_seconds: float | None = None,
        quotas: Mapping[str, int] | None = None,
        clock: Callable[[], float] = time.monotonic,
        io_backend: str = "posix",
        io: Io | None = None,
    ) -> None:
        options = VolumeOptions(
            capacity_bytes=capacity_bytes,
            io_threads=io_threads,
            piece_bytes=piece_bytes,
            direct_io=direct_io,
        )
        self.name = name
        self._clock = clock
        io = io or open_backend(io_backend, threads=io_threads, piece_bytes=piece_bytes)
        self._volume = OpenVolume(_directories(path), options, io)
        self.capacity_bytes = self._volume.capacity_bytes
        self.chunk_bytes_max = self._volume.chunk_bytes_max
        if evict_ahead_bytes is None:
            ahead = capacity_bytes >= EVICT_AHEAD_CAPACITY_MIN
            evict_ahead_bytes = capacity_bytes // EVICT_AHEAD_FRACTION if ahead else 0
        self._reads = ReadPath(self._volume)
        try:
            order = attach(self._volume.space.index, policy, admission, self._volume.data_bytes, asks=True)
            if ttl_seconds is not None:
                self._volume.start_expiry(ttl_seconds, clock)
            self._volume.limit_tenants(quotas or {}, clock)
        except BaseException:
            self._volume.close()
            raise
        self._puts = PutPath(self._volume, evict_ahead_bytes, clock, order)
        self._idle = threading.Condition(self._volume.lock)
        self._calls = 0
        self._closed = False
        _open_tiers.add(self)

    @property
    def listener(self) -> TierListener:
        """Told of every chunk that enters or leaves."""
        return self._volume.listener

    @listener.setter
    def listener(self, listener: TierListener) -> None:
        self._volume.listener = listener

    def put(self, items: Sequence[PutItem]) -> list[PutStatus]:
        """Store chunks; returns when they are durable. See `Tier.put`."""
        for item in items:
            check_put(item)
        if not self._enter():
            return [PutStatus(stored=False, reason=Reason.UNAVAILABLE, detail=_CLOSED)] * len(items)
        try:
            statuses: list[PutStatus] = [
                PutStatus(stored=False, reason=Reason.TOO_LARGE, detail=f"chunk_bytes_max is {self.chunk_bytes_max}")
            ] * len(items)
            fitting = [index for index, item in enumerate(items) if len(item.data) <= self.chunk_bytes_max]
            for index, status in zip(fitting, self._puts.put([items[index] for index in fitting]), strict=True):
                statuses[index] = status
            return statuses
        finally:
            self._leave()

    def read(self, items: Sequence[ReadItem]) -> list[int | Miss]:
        """Fill targets, see `Tier.read`: straight from the device where target and offset are aligned."""
        for item in items:
            check_read(item)
        if not self._enter():
            return [Miss(Reason.UNAVAILABLE, _CLOSED)] * len(items)
        try:
            return self._reads.read(items)
        finally:
            self._leave()

    def read_device(self, items: Sequence[DeviceReadItem]) -> list[int | Miss]:
        """Fill memory on a device, where the back end can (`kvikio`); else a miss (`unavailable`).

        The bytes have not been verified: whoever decodes them checks the hashes that the container carries.
        """
        if not self._volume.file.device_io or not self._enter():
            detail = (
                _CLOSED if self._closed else "the back end cannot reach a device's memory; set io_backend to kvikio"
            )
            return [Miss(Reason.UNAVAILABLE, detail)] * len(items)
        try:
            return self._reads.read_device(items)
        finally:
            self._leave()

    def verify(self, start: int = 0, *, bytes_max: int = STEP_BYTES_DEFAULT, repair: bool = False) -> Verified:
        """Compare the hashes of some chunks while the tier is in use; see `kvstore.verifying.SupportsVerify`."""
        if not self._enter():
            return Verified(0, 0, [], None)
        try:
            return self._reads.verify(start, bytes_max, repair=repair)
        finally:
            self._leave()

    def sizes(self, keys: Sequence[bytes]) -> list[int | None]:
        """Bytes of each chunk, None where there is none."""
        with self._volume.lock:
            return [None] * len(keys) if self._closed else self._volume.sizes(keys)

    def touch(self, keys: Sequence[bytes]) -> None:
        """Count a use of each chunk that is there."""
        with self._volume.lock:
            if not self._closed:
                self._volume.touch(keys)

    def delete(self, keys: Sequence[bytes]) -> list[bool]:
        """Remove chunks; returns when their removal is durable, or after COMMIT_WAIT_SECONDS."""
        if not self._enter():
            return [False] * len(keys)
        volume = self._volume
        try:
            found = []
            with volume.lock:
                ticket = volume.ticket()
                for key in keys:
                    entry = volume.space.index.get(key)
                    found.append(entry is not None)
                    if entry is not None:
                        volume.space.remove(entry, ticket)
                        volume.tell_removed([entry], Removal.DELETED)
                volume.counts["deletions"] += sum(found)
                if ticket.operations:
                    volume.committer.submit(ticket)
                waits = [ticket, *volume.space.unsettled()] if not all(found) else [ticket]
            for one in waits:  # also for the deletion by somebody else of what is not there any more
                if one.operations:
                    one.done.wait(COMMIT_WAIT_SECONDS)
            return found
        finally:
            self._leave()

    def pin(self, keys: Sequence[bytes], *, expires_at: float) -> list[bool]:
        """Keep chunks from eviction until `expires_at`; the longest pin holds. Pins end with the process."""
        with self._volume.lock:
            entries = [None] * len(keys) if self._closed else self._volume.live(keys)
            for entry in entries:
                if entry is not None:
                    self._volume.space.index.pin(entry, expires_at)
        return [entry is not None for entry in entries]

    def unpin(self, keys: Sequence[bytes], *, until: float = 0.0) -> list[bool]:
        """End pins, or those that last longer at `until`. True where there was a pinned chunk."""
        now = self._clock()
        with self._volume.lock:
            entries = [self._find(key) for key in keys]
            return [entry is not None and self._volume.space.index.unpin(entry, now, until) for entry in entries]

    def parents(self, keys: Sequence[bytes]) -> list[bytes]:
        """The chunk before each in its chain, ROOT where there is none."""
        with self._volume.lock:
            return [ROOT] * len(keys) if self._closed else self._volume.space.index.parents(keys)

    def tenants(self, keys: Sequence[bytes]) -> list[str]:
        """Whose quota each chunk counts against, "" for nobody's."""
        with self._volume.lock:
            return [""] * len(keys) if self._closed else [self._volume.space.quotas.tenant_of(key) for key in keys]

    def tenant_usage(self) -> dict[str, TenantUsage]:
        """What each tenant has, what is being written or still read included."""
        with self._volume.lock:
            return self._volume.space.quotas.usage()

    def scan(self) -> Iterator[Entry]:
        """Every stored chunk, least recently used first, as of the call."""
        with self._volume.lock:
            entries = [] if self._closed else list(self._volume.space.index)
        return (Entry(entry.key, entry.parent, entry.nbytes) for entry in entries)

    def usage(self) -> Usage:
        """What the tier holds now. Extents being filled, or quarantined, or read after deletion count as pinned."""
        with self._volume.lock:
            usage = self._volume.space.usage(self._clock())
        return msgspec.structs.replace(usage, capacity_bytes=self.capacity_bytes)

    def counters(self) -> dict[str, int]:
        """Monotonic counts since start."""
        with self._volume.lock:
            committer = self._volume.committer
            return {**self._volume.counts, "commits": committer.groups, "checkpoints": committer.checkpoints}

    @property
    def read_only(self) -> str:
        """Why the tier takes no writes until it is opened again; "" if it does."""
        return self._volume.broken

    def info(self) -> dict[str, Any]:
        """What the tier is and how it works here; JSON types only."""
        volume = self._volume
        return {
            "paths": [str(disk.path) for disk in volume.disks],
            "uuids": [disk.superblock.uuid.hex() for disk in volume.disks],
            "direct_io": volume.file.direct,
            **volume.file.describe(),
            "read_only": self.read_only,
            "entries_max": volume.entries_max,
            "journal_bytes": sum(disk.journal_bytes for disk in volume.disks),
            "catalog_bytes": sum(disk.catalog.file_bytes for disk in volume.disks),
            "catalog_bytes_max": sum(disk.catalog.bytes_max for disk in volume.disks),
        }

    def flush(self) -> None:
        """Make the order of use durable; the chunks themselves are durable once put.

        Raises:
            TierError: the catalog cannot be written.
        """
        if self._enter():
            try:
                self._volume.flush()
            finally:
                self._leave()

    def close(self) -> None:
        """Wait for the calls in progress, flush and release everything. Idempotent.

        Raises:
            TierError: the last flush failed; or calls are still in progress after CLOSE_WAIT_SECONDS, and nothing has
                been released.
        """
        with self._volume.lock:
            if self._closed:
                return
            self._closed = True
            if not self._idle.wait_for(lambda: not self._calls, CLOSE_WAIT_SECONDS):
                self._closed = False
                raise TierError(f"{self._calls} calls are still in progress in the tier {self.name}")
        self._volume.close()

    def _find(self, key: bytes) -> ChunkEntry | None:
        return None if self._closed else self._volume.space.index.get(key)

    def _enter(self) -> bool:
        """Begin a call that does I/O; False if the tier is closed."""
        with self._volume.lock:
            if not self._closed:
                self._calls += 1
            return not self._closed

    def _leave(self) -> None:
        with self._volume.lock:
            self._calls -= 1
            self._idle.notify_all()

    def _forget(self) -> None:
        """Close the copy of a forked child."""
        self._closed = True
        self._volume.forget()


_open_tiers: weakref.WeakSet[NvmeTier] = weakref.WeakSet()


def _forget_open_tiers() -> None:
    for tier in list(_open_tiers):
        tier._forget()


os.register_at_fork(after_in_child=_forget_open_tiers)


def _directories(path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> list[Path]:
    """The directories of the volumes. Raises ValueError if there is none, or one is named twice."""
    paths = [Path(path)] if isinstance(path, str | os.PathLike) else [Path(one) for one in path]
    if not paths or len({one.resolve() for one in paths}) < len(paths):
        raise ValueError("path names no directory, or one of them twice; a volume has a directory of its own")
    return paths
