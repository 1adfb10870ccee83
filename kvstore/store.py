"""One store out of an ordered list of tiers: put, lookup, fetch, prefetch, pin, delete.

Bytes in, bytes out: containers, not tensors. The fastest tier whose bytes are addressable is the store's memory: chunks
are put there, lent from there, and promoted to there. Durable tiers below it are written behind a put. A store without
an addressable tier works too, through transient buffers.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Semaphore
from typing import Any, cast

import msgspec

from kvstore.client import DEADLINE_MS_DEFAULT, ChunkInfo, Order
from kvstore.counters import Counters
from kvstore.demotion import WriteBehind
from kvstore.errors import ConfigError
from kvstore.fetching import Step, chunk_steps
from kvstore.keys import KEY_BYTES, ROOT
from kvstore.layer_fetching import layer_steps
from kvstore.loan import Loan, TransientPool
from kvstore.outcome import Lookup, Miss, PutStatus, Reason
from kvstore.promotion import Place, Promoter
from kvstore.putting import PendingPut, Putter
from kvstore.sizes import parse_bytes
from kvstore.tier import PutItem, SupportsLease, Tier


class StoreSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Bounds of a store's movements; sizes in bytes or as "64MiB". None: a quarter of the memory tier, at least 64 MiB.

    Raises:
        ConfigError: a size cannot be read or is not positive.
    """

    write_behind_bytes_max: int | str | None = None
    write_behind_batch_bytes: int | str = "64MiB"
    fetch_window_bytes: int | str | None = None
    transient_bytes_max: int | str = "512MiB"
    prefetch_chunks_max: int = 1024
    mover_threads: int = 4

    def __post_init__(self) -> None:
        for field in self.__struct_fields__:
            value = getattr(self, field)
            if value is not None and parse_bytes(value, f"store.{field}") <= 0:
                raise ConfigError(f"store.{field} is {value!r}; it must be positive")

    def nbytes(self, field: str, default: int) -> int:
        """A size in bytes."""
        value = getattr(self, field)
        return default if value is None else parse_bytes(value, f"store.{field}")


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
        self._window_bytes = self.settings.nbytes("fetch_window_bytes", quarter)
        self._transient = TransientPool(self.settings.nbytes("transient_bytes_max", quarter))
        self._promoter = Promoter(self.memory, lower, self._transient, self.counters)
        self._movers = ThreadPoolExecutor(self.settings.mover_threads, thread_name_prefix="kvstore-mover")
        self._prefetch_room = Semaphore(self.settings.prefetch_chunks_max)
        durable = next((tier for tier in lower if tier.durable), None)
        self._behind = (
            WriteBehind(
                durable,
                self.counters,
                queue_bytes_max=self.settings.nbytes("write_behind_bytes_max", quarter),
                batch_bytes_max=self.settings.nbytes("write_behind_batch_bytes", quarter),
            )
            if durable is not None and self.memory is not None
            else None
        )
        self._putter = Putter(self._promoter, self._transient, self._behind, self.counters)
        self._closed = False

    # -- put ---------------------------------------------------------------------------------------------------------

    def put(
        self, items: Sequence[PutItem], *, durable: bool = False, deadline_ms: float | None = None
    ) -> list[PutStatus]:
        """Store containers given as bytes: each is copied and verified in one pass. One status an item.

        A container that does not verify, or is not the one its key names, is refused with the reason.
        """
        if self._closed:
            return [_CLOSED] * len(items)
        for item in items:
            _check_key(item.key)
        return self._putter.put(items, durable=durable, deadline=deadline_at(deadline_ms))

    def reserve(
        self, key: bytes, nbytes_max: int, *, parent: bytes = ROOT, durable: bool = False
    ) -> Place | PendingPut:
        """A place for the caller to write a container into, to be followed by `publish` or the place's `abort`.

        Answers something else, for `settle`, when there is nothing to write: the key is there, or there is no room.
        """
        _check_key(key)
        if self._closed:
            return _CLOSED
        return self._putter.reserve(key, nbytes_max, parent=parent, durable=durable)

    def publish(
        self, place: Place, key: bytes, parent: bytes, nbytes: int, *, durable: bool, deadline: float
    ) -> PendingPut:
        """Make the `nbytes` written to a reserved place a stored chunk, or refuse them; `settle` tells the status.

        The header is checked here; the segments are the writer's responsibility, who has just hashed them. `deadline`
        is in time.monotonic seconds, as `deadline_at` answers.
        """
        return self._putter.publish(place, key, parent, nbytes, durable=durable, deadline=deadline)

    def settle(self, pending: PendingPut, deadline: float) -> PutStatus:
        """The status of a put, once its chunk is durable if that was asked for."""
        return self._putter.settle(pending, deadline)

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
    ) -> Generator[Step, None, None]:
        """Iterate over the chunks' steps; see `kvstore.client.Client.fetch`. Close the iterator to release early."""
        _check_keys(keys)
        if order not in ("chunk", "layer"):
            raise ConfigError(f"order is {order!r}; use chunk or layer")
        deadline = deadline_at(deadline_ms)
        if self._closed:
            return self._counted(Step(index, _CLOSED_MISS) for index in range(len(keys)))
        self.touch(keys)
        plan = chunk_steps if order == "chunk" else layer_steps
        steps = plan(
            self._promoter, self._movers, keys, self._sizes, window_bytes=self._window_bytes, deadline=deadline
        )
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
        deadline = deadline_at(None)
        found = []
        for tier in self.tiers:
            found.append(tier.delete(keys))
            if tier is self.memory and self._behind is not None:
                for key in keys:
                    self._behind.cancel(key, deadline=deadline)
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

    def _counted(self, steps: Generator[Step, None, None]) -> Generator[Step]:
        try:
            for step in steps:
                if step.miss is not None:
                    self.counters.add("misses", str(step.miss.reason))
                yield step
        finally:
            steps.close()


_CLOSED_MISS = Miss(Reason.UNAVAILABLE, "the store is closed")
_CLOSED = PutStatus(stored=False, reason=_CLOSED_MISS.reason, detail=_CLOSED_MISS.detail)


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
