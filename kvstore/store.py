"""One store out of an ordered list of tiers: put, lookup, fetch, prefetch, pin, delete.

Bytes in, bytes out: containers, not tensors. The fastest tier whose bytes are addressable is the store's memory: chunks
are put there, lent from there, and promoted to there. Durable tiers below it are written behind a put. A store without
an addressable tier works too, through transient buffers.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from threading import Semaphore
from typing import Any, cast

import msgspec

from kvstore import container
from kvstore.client import DEADLINE_MS_DEFAULT, ChunkInfo, Order
from kvstore.counters import Counters
from kvstore.demotion import WriteBehind
from kvstore.errors import ConfigError, ContainerError
from kvstore.fetching import Step, chunk_steps
from kvstore.keys import KEY_BYTES, ROOT
from kvstore.layer_fetching import LayerFetch
from kvstore.loan import Loan, TransientPool
from kvstore.outcome import Lookup, Miss, PutStatus, Reason
from kvstore.promotion import Place, Promoter
from kvstore.tier import PutItem, SupportsLease, Tier


class StoreSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Bounds of a store's movements. None means: a quarter of the memory tier, at least 64 MiB."""

    write_behind_bytes_max: int | None = None
    write_behind_batch_bytes: int = 64 << 20
    fetch_window_bytes: int | None = None
    transient_bytes_max: int = 512 << 20
    prefetch_chunks_max: int = 1024
    mover_threads: int = 4


class Store:
    """A store over `tiers`, fastest first; owns them and closes them.

    Safe to use from many threads. Verbs answer per chunk and raise only for the caller's mistakes.

    Raises:
        ConfigError: no tier, or two tiers of one name.
    """

    def __init__(self, tiers: Sequence[Tier], settings: StoreSettings | None = None) -> None:
        names = [tier.name for tier in tiers]
        if not tiers or len(set(names)) != len(names):
            raise ConfigError(f"tiers are {names}; give at least one, each with a name of its own")
        self.settings = settings or StoreSettings()
        self.tiers = tuple(tiers)
        self.counters = Counters()
        self.memory = next((tier for tier in tiers if isinstance(tier, SupportsLease)), None)
        lower = [tier for tier in tiers if tier is not self.memory]
        quarter = max(64 << 20, self.memory.capacity_bytes // 4) if self.memory is not None else 64 << 20
        self._window_bytes = self.settings.fetch_window_bytes or quarter
        self._transient = TransientPool(self.settings.transient_bytes_max)
        self._promoter = Promoter(self.memory, lower, self._transient, self.counters)
        self._movers = ThreadPoolExecutor(self.settings.mover_threads, thread_name_prefix="kvstore-mover")
        self._prefetch_room = Semaphore(self.settings.prefetch_chunks_max)
        durable = next((tier for tier in lower if tier.durable), None)
        self._durable = durable
        self._behind = (
            WriteBehind(
                durable,
                self.counters,
                queue_bytes_max=self.settings.write_behind_bytes_max or quarter,
                batch_bytes_max=self.settings.write_behind_batch_bytes,
            )
            if durable is not None and self.memory is not None
            else None
        )
        self._closed = False

    # -- put ---------------------------------------------------------------------------------------------------------

    def put(
        self, items: Sequence[PutItem], *, durable: bool = False, deadline_ms: float | None = None, owner: str = ""
    ) -> list[PutStatus]:
        """Store containers given as bytes: each is copied and verified in one pass. One status an item.

        A container that does not verify, or is not the one its key names, is refused with the reason.
        """
        deadline = deadline_at(deadline_ms)
        pending: list[PendingPut] = []
        for item in items:
            place = self.reserve(item.key, len(item.data), parent=item.parent, durable=durable, owner=owner)
            if isinstance(place, PutStatus):
                pending.append(place)
                continue
            try:
                total_bytes = container.copy_verified(item.data, place.view, key=item.key).total_bytes
            except ContainerError as error:
                place.abort()
                pending.append(self._refused(error.reason, error.detail))
            except BaseException:
                place.abort()
                raise
            else:
                pending.append(
                    self.publish(place, item.key, item.parent, total_bytes, durable=durable, deadline=deadline)
                )
        return [self.settle(status, deadline) for status in pending]

    def reserve(
        self, key: bytes, nbytes_max: int, *, parent: bytes = ROOT, durable: bool = False, owner: str = ""
    ) -> Place | PutStatus:
        """A place for the caller to write a container into, to be followed by `publish` or the place's `abort`.

        Answers a status instead when there is nothing to write: the key is there (and durable, if that was asked for),
        or there is no room.
        """
        _check_key(key)
        if self._closed:
            return PutStatus(stored=False, reason=Reason.UNAVAILABLE, detail="the store is closed")
        existing = self._existing(key, durable=durable)
        if existing is not None:
            self.counters.add("puts", "existed")
            return existing
        if self.memory is not None:
            slot = cast(SupportsLease, self.memory).reserve(key, nbytes_max, parent=parent, owner=owner)
            if not isinstance(slot, PutStatus):
                return Place(self.memory.name, nbytes_max, slot, None)
            if not slot.stored and slot.reason is not None:
                self.counters.add("puts", str(slot.reason))
            return slot
        buffer = self._transient.take(nbytes_max, deadline=deadline_at(None))
        if buffer is None:
            return self._refused(Reason.FULL, f"no room for {nbytes_max} bytes in memory")
        return Place("transient", nbytes_max, None, buffer)

    def publish(
        self, place: Place, key: bytes, parent: bytes, nbytes: int, *, durable: bool, deadline: float
    ) -> PendingPut:
        """Make the `nbytes` written to a reserved place a stored chunk, or refuse them; `settle` tells the status.

        The header is checked here; the segments are the writer's responsibility, who has just hashed them.
        """
        try:
            header = container.parse(place.view[:nbytes])
            container.expect(header, key=key)
        except ContainerError as error:
            place.abort()
            return self._refused(error.reason, error.detail)
        self.counters.add("puts", "stored")
        self.counters.add("put_bytes", "", nbytes)
        loan = place.publish(nbytes)
        if self.memory is None:
            with loan:
                (status,) = self.tiers[0].put([PutItem(key, loan.view, parent)])
            return status
        if self._behind is None:
            loan.release()
            return PutStatus(stored=True)
        future = self._behind.submit(key, parent, loan, deadline=deadline if durable else None)
        if not durable:
            return PutStatus(stored=True)
        return _NO_ROOM_BELOW if future is None else future

    def settle(self, status: PendingPut, deadline: float) -> PutStatus:
        """The status of a put, once it is durable if that was asked for; `deadline` in time.monotonic seconds."""
        if isinstance(status, PutStatus):
            return status
        try:
            below = status.result(timeout=max(0.0, deadline - time.monotonic()))
        except FutureTimeoutError:
            return PutStatus(stored=True, durable=False, reason=Reason.DEADLINE, detail="in memory, not yet durable")
        return msgspec.structs.replace(below, stored=True, existed=False)

    # -- read --------------------------------------------------------------------------------------------------------

    def lookup(self, keys: Sequence[bytes]) -> Lookup:
        """Longest prefix of `keys` that can be fetched now, walked from the first key: eviction can leave holes."""
        _check_keys(keys)
        where: list[str | None] = [None] * len(keys)
        for tier in reversed(self.tiers):
            for index, nbytes in enumerate(tier.sizes(keys)):
                if nbytes is not None:
                    where[index] = tier.name
        prefix: list[str] = []
        for name in where:
            if name is None:
                break
            prefix.append(name)
        self.counters.add("lookups")
        self.counters.add("lookup_chunks", "hit", len(prefix))
        self.counters.add("lookup_chunks", "miss", len(keys) - len(prefix))
        if len(prefix) == len(keys):
            return Lookup(tuple(prefix))
        return Lookup(tuple(prefix), Miss(Reason.ABSENT, f"chunk {len(prefix)} of {len(keys)} is in no tier"))

    def fetch(
        self, keys: Sequence[bytes], *, order: Order = "chunk", deadline_ms: float | None = None
    ) -> Iterator[Step]:
        """Iterate over the chunks' steps; see `kvstore.client.Client.fetch`. Close the iterator to release early."""
        _check_keys(keys)
        if order not in ("chunk", "layer"):
            raise ConfigError(f"order is {order!r}; use chunk or layer")
        deadline = deadline_at(deadline_ms)
        self.touch(keys)
        if order == "chunk":
            steps = chunk_steps(
                self._promoter, self._movers, keys, self._sizes, window_bytes=self._window_bytes, deadline=deadline
            )
        else:
            steps = LayerFetch(self._promoter, self._movers, keys, deadline=deadline).steps()
        return self._counted(steps)

    def borrow(self, key: bytes, *, deadline_ms: float | None = None) -> Loan | Miss:
        """A loan on one chunk's container bytes."""
        _check_key(key)
        (outcome,) = self._promoter.borrow([key], deadline=deadline_at(deadline_ms))
        if isinstance(outcome, Miss):
            self.counters.add("misses", str(outcome.reason))
        return outcome

    def head(self, keys: Sequence[bytes]) -> list[ChunkInfo | None]:
        """Size and tiers of each chunk, None where there is none."""
        _check_keys(keys)
        per_tier = [(tier.name, tier.sizes(keys)) for tier in self.tiers]
        infos: list[ChunkInfo | None] = []
        for index in range(len(keys)):
            holds = [(name, sizes[index]) for name, sizes in per_tier if sizes[index] is not None]
            infos.append(ChunkInfo(cast(int, holds[0][1]), tuple(name for name, _ in holds)) if holds else None)
        return infos

    def prefetch(self, keys: Sequence[bytes], *, deadline_ms: float | None = None) -> list[PutStatus]:
        """Queue promotions to memory and return at once; `busy` where the queue is full."""
        deadline = deadline_at(deadline_ms)
        statuses = []
        for key, info in zip(keys, self.head(keys), strict=True):
            if info is None:
                statuses.append(PutStatus(stored=False, reason=Reason.ABSENT, detail="no tier holds the key"))
            elif self.memory is None or self.memory.name in info.tiers:
                statuses.append(PutStatus(stored=True, existed=True))
            elif self._prefetch_room.acquire(blocking=False):
                self._movers.submit(self._prefetch_one, key, deadline)
                statuses.append(PutStatus(stored=True))
            else:
                self.counters.add("prefetches", "busy")
                statuses.append(PutStatus(stored=False, reason=Reason.BUSY, detail="the prefetch queue is full"))
        return statuses

    # -- keep and remove -----------------------------------------------------------------------------------------------

    def touch(self, keys: Sequence[bytes]) -> None:
        """Count a use of a chain, last chunk first, so that a parent is always more recent than its children."""
        for tier in self.tiers:
            tier.touch(keys[::-1])

    def pin(self, keys: Sequence[bytes], *, ttl_seconds: float) -> list[bool]:
        """Keep chunks from eviction for `ttl_seconds`, in every tier that holds them."""
        _check_keys(keys)
        if not ttl_seconds > 0:
            raise ConfigError(f"ttl_seconds is {ttl_seconds}; it must be positive")
        expires_at = time.monotonic() + ttl_seconds
        return _any_of([tier.pin(keys, expires_at=expires_at) for tier in self.tiers])

    def unpin(self, keys: Sequence[bytes]) -> list[bool]:
        """End pins."""
        _check_keys(keys)
        return _any_of([tier.unpin(keys) for tier in self.tiers])

    def delete(self, keys: Sequence[bytes]) -> list[bool]:
        """Remove chunks from every tier, and from the way down."""
        _check_keys(keys)
        found = []
        for tier in self.tiers:
            found.append(tier.delete(keys))
            if tier is self.memory and self._behind is not None:
                for key in keys:
                    self._behind.cancel(key)
        self.counters.add("deletes", "", len(keys))
        return _any_of(found)

    # -- state ---------------------------------------------------------------------------------------------------------

    def stats(self) -> dict[str, Any]:
        """Counters and usage of the store and of each tier; JSON types only."""
        return {
            "tiers": {
                tier.name: {
                    "usage": msgspec.to_builtins(tier.usage()),
                    "counters": tier.counters(),
                    "durable": tier.durable,
                }
                for tier in self.tiers
            },
            "counters": self.counters.snapshot(),
            "write_behind_bytes": self._behind.queued_bytes if self._behind is not None else 0,
            "transient_bytes": self._transient.used_bytes,
        }

    def flush(self, *, deadline_ms: float | None = None) -> bool:
        """Wait until everything put so far is as durable as the tiers make it; False if not by the deadline."""
        if self._behind is not None and not self._behind.flush(deadline=deadline_at(deadline_ms)):
            return False
        for tier in self.tiers:
            tier.flush()
        return True

    def close(self) -> None:
        """Write what is on its way down, then close every tier. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._movers.shutdown(wait=True, cancel_futures=True)
        if self._behind is not None:
            self._behind.close()
        for tier in self.tiers:
            tier.close()

    # -- inside --------------------------------------------------------------------------------------------------------

    def _existing(self, key: bytes, *, durable: bool) -> PutStatus | None:
        (info,) = self.head([key])
        if info is None:
            return None
        is_durable = self._durable is not None and self._durable.name in info.tiers
        if is_durable or not durable or self._behind is None:
            return PutStatus(stored=True, durable=is_durable, existed=True)
        loan = self._promoter.lease(key)
        if loan is None:
            return None
        deadline = deadline_at(None)
        future = self._behind.submit(key, container.parse(loan.view).meta.parent, loan, deadline=deadline)
        status = _NO_ROOM_BELOW if future is None else self.settle(future, deadline)
        return msgspec.structs.replace(status, existed=True)

    def _refused(self, reason: Reason, detail: str) -> PutStatus:
        self.counters.add("puts", str(reason))
        return PutStatus(stored=False, reason=reason, detail=detail)

    def _sizes(self, keys: Sequence[bytes]) -> list[int]:
        return [info.nbytes if info is not None else 0 for info in self.head(keys)]

    def _prefetch_one(self, key: bytes, deadline: float) -> None:
        try:
            (outcome,) = self._promoter.borrow([key], deadline=deadline)
            if isinstance(outcome, Loan):
                outcome.release()
            self.counters.add("prefetches", "late" if isinstance(outcome, Miss) else "done")
        finally:
            self._prefetch_room.release()

    def _counted(self, steps: Iterator[Step]) -> Iterator[Step]:
        try:
            for step in steps:
                if step.miss is not None:
                    self.counters.add("misses", str(step.miss.reason))
                yield step
        finally:
            cast(Any, steps).close()


PendingPut = PutStatus | Future[PutStatus]
"""A put whose chunk is stored; a future where durability is still awaited."""

_NO_ROOM_BELOW = PutStatus(
    stored=True, durable=False, reason=Reason.BUSY, detail="in memory; the write-behind queue is full"
)


def deadline_at(deadline_ms: float | None) -> float:
    """time.monotonic seconds of a deadline given from now; None means DEADLINE_MS_DEFAULT. Raises ConfigError."""
    if deadline_ms is None:
        deadline_ms = DEADLINE_MS_DEFAULT
    if not deadline_ms >= 0:
        raise ConfigError(f"deadline_ms is {deadline_ms}; it must not be negative")
    return time.monotonic() + deadline_ms / 1000


def _check_key(key: bytes) -> None:
    if not isinstance(key, bytes) or len(key) != KEY_BYTES:
        raise ConfigError(f"a chunk key is {KEY_BYTES} bytes, not {key!r:.60}")


def _check_keys(keys: Sequence[bytes]) -> None:
    for key in keys:
        _check_key(key)


def _any_of(answers: list[list[bool]]) -> list[bool]:
    return [any(column) for column in zip(*answers, strict=True)]
