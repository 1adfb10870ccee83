"""One store out of an ordered list of tiers: put, lookup, fetch, prefetch, pin, delete.

Bytes in, bytes out: containers, not tensors. The fastest tier whose bytes are addressable is the store's memory: chunks
are put there, lent from there, and promoted to there. Durable tiers below it are written behind a put. A store without
an addressable tier works too, through transient buffers.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping, Sequence
from typing import Any, cast

import msgspec

from kvstore import gate
from kvstore.arguments import check_fetch, check_key, check_keys, check_owner, check_pin, check_place, deadline_at
from kvstore.client import ChunkInfo, Order
from kvstore.counters import Counters, tier_stats
from kvstore.demotion import WriteBehind
from kvstore.errors import ConfigError
from kvstore.event_log import EventLog
from kvstore.explaining import Explanation, explain_chain
from kvstore.fetching import Step, chunk_steps
from kvstore.handing_down import connect_tiers
from kvstore.keys import ROOT
from kvstore.layer_fetching import layer_steps
from kvstore.loan import Loan, TransientPool
from kvstore.movers import Movers, borrow_by, done_by
from kvstore.outcome import Lookup, Miss, PutStatus, Reason
from kvstore.parking import Parking
from kvstore.pins import Pins
from kvstore.places import Place
from kvstore.prefetching import Prefetcher
from kvstore.promotion import Promoter
from kvstore.promotion_gate import open_gate
from kvstore.putting import PendingPut, Putter
from kvstore.store_settings import StoreSettings
from kvstore.tier import PutItem, SupportsLease, Tier
from kvstore.transcode import Codecs, Recipe, Transcoder, decoded_steps, quality


class Store:
    """A store over `tiers`, fastest first; owns them and closes them.

    Safe to use from many threads. Verbs answer per chunk and raise only for the caller's mistakes.

    Args:
        tiers: fastest first.
        settings: bounds.
        codecs: to transcode and to judge quality with; None for a store that moves bytes only.
        recipes: codecs of the tiers that have one of their own, by the tier's name.
        gates: records of the quality gate, for lossy recipes.

    Raises:
        ConfigError: no tier, two tiers of one name, or a recipe without codecs.
    """

    def __init__(
        self,
        tiers: Sequence[Tier],
        settings: StoreSettings | None = None,
        *,
        codecs: Codecs | None = None,
        recipes: Mapping[str, Recipe] | None = None,
        gates: Sequence[gate.GateRecord] = (),
    ) -> None:
        names = [tier.name for tier in tiers]
        if not tiers or len(set(names)) != len(names):
            raise ConfigError(f"tiers are {names}; give at least one, each with a name of its own")
        self.settings = settings or StoreSettings()
        self.tiers = tuple(tiers)
        self.counters = Counters()
        self.events = EventLog()
        for tier in tiers:
            tier.listener = self.events.listener(tier.name)
        self.memory = next((tier for tier in tiers if isinstance(tier, SupportsLease)), None)
        lower = [tier for tier in tiers if tier is not self.memory]
        quarter = max(64 << 20, self.memory.capacity_bytes // 4) if self.memory is not None else 64 << 20
        self._window_bytes = self.settings.nbytes("fetch_window_bytes", quarter)
        self._transient = TransientPool(self.settings.nbytes("transient_bytes_max", quarter))
        self._codecs = codecs
        self._pins = Pins(self.tiers, share_max=self.settings.pinned_share_max, counters=self.counters)
        self._promoter = Promoter(
            self.memory,
            lower,
            self._transient,
            self.counters,
            self.events,
            self._pins,
            open_gate(self.settings.promotion, self.memory),
            None if codecs is None else lambda header: quality(header, codecs),
        )
        first = (recipes or {}).get((self.memory or tiers[0]).name)
        self.put_codec = first.codec if first is not None else ""
        transcoders = self._transcoders(recipes or {}, gates)
        self._movers = Movers(self.settings.mover_threads)
        self._prefetcher = Prefetcher(
            self._promoter,
            tiers,
            threads=self.settings.prefetch_threads,
            chunks_max=self.settings.prefetch_chunks_max,
            batch_bytes=self.settings.nbytes("prefetch_batch_bytes", quarter),
            counters=self.counters,
        )
        durable = next((tier for tier in lower if tier.durable), None)
        self._behind = (
            WriteBehind(
                durable,
                self.counters,
                queue_bytes_max=self.settings.nbytes("write_behind_bytes_max", quarter),
                batch_bytes_max=self.settings.nbytes("write_behind_batch_bytes", quarter),
                pins=self._pins,
                events=self.events,
                transcoder=transcoders.get(durable.name),
            )
            if durable is not None and self.memory is not None
            else None
        )
        self._putter = Putter(
            self._promoter, self._transient, self._behind, self._movers.holders, self.counters, self.events, transcoders
        )
        self._parking = Parking(
            tiers, self._promoter, self._movers.seekers, self._behind, self._window_bytes, self.counters
        )
        connect_tiers(tiers, self.counters)
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
            check_place(item.key, item.parent)
        return self._putter.put(items, durable=durable, deadline=deadline_at(deadline_ms))

    def reserve(
        self, key: bytes, nbytes_max: int, *, parent: bytes = ROOT, durable: bool = False, tenant: str = ""
    ) -> Place | PendingPut:
        """A place for the caller to write a container into, to be followed by `publish` or the place's `abort`.

        Answers something else, for `settle`, when there is nothing to write: the key is there, or there is no room.
        `tenant` is whose quota the chunk counts against.
        """
        check_place(key, parent)
        if self._closed:
            return _CLOSED
        return self._putter.reserve(key, nbytes_max, parent=parent, durable=durable, tenant=tenant)

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
        check_keys(keys)
        where: list[str | None] = [None] * len(keys)
        sizes = [0] * len(keys)
        for tier in reversed(self.tiers):
            for index, nbytes in enumerate(tier.sizes(keys)):
                if nbytes is not None:
                    where[index], sizes[index] = tier.name, nbytes
        found = where.index(None) if None in where else len(keys)
        prefix = tuple(cast("list[str]", where[:found]))
        self.counters.add("lookups")
        self.counters.add("lookup_chunks", "hit", len(prefix))
        self.counters.add("lookup_chunks", "miss", len(keys) - len(prefix))
        if len(prefix) == len(keys):
            return Lookup(prefix, None, tuple(sizes))
        miss = self.events.told(keys[found], Miss(Reason.ABSENT, f"chunk {found} of {len(keys)} is in no tier"))
        return Lookup(prefix, miss, tuple(sizes[:found]))

    def fetch(
        self,
        keys: Sequence[bytes],
        *,
        order: Order = "chunk",
        deadline_ms: float | None = None,
        min_quality: int = 0,
        max_quality: int | None = None,
        decode: bool = False,
    ) -> Generator[Step, None, None]:
        """Iterate over the chunks' steps; see `kvstore.client.Client.fetch`. Close the iterator to release early."""
        check_keys(keys)
        check_fetch(order, min_quality, max_quality, decode=decode)
        if (min_quality or decode) and self._codecs is None:
            raise ConfigError("min_quality and decode need a store that knows codecs: open it with kvstore.connect")
        deadline = deadline_at(deadline_ms)
        if self._closed:
            return self._counted(keys, (Step(index, _CLOSED_MISS) for index in range(len(keys))))
        self.touch(keys)
        if order == "layer":
            self._prefetcher.overtake(keys)
        plan = chunk_steps if order == "chunk" else layer_steps
        steps = plan(
            self._promoter,
            self._movers,
            keys,
            self._sizes,
            window_bytes=self._window_bytes,
            deadline=deadline,
            min_quality=min_quality,
            max_quality=max_quality,
        )
        if decode and self._codecs is not None:
            steps = decoded_steps(steps, self._codecs, self._transient, deadline)
        return self._counted(keys, steps)

    def borrow(self, key: bytes, *, deadline_ms: float | None = None) -> Loan | Miss:
        """A loan on one chunk's container bytes."""
        check_key(key)
        deadline = deadline_at(deadline_ms)
        outcome: Loan | Miss | None = _CLOSED_MISS if self._closed else self._promoter.lease(key)
        if outcome is None:
            (outcome,) = borrow_by(self._movers.seekers, self._promoter, [key], deadline)
        if isinstance(outcome, Miss):
            outcome = self.events.told(key, outcome)
            self.counters.add("misses", str(outcome.reason))
        return outcome

    def head(self, keys: Sequence[bytes]) -> list[ChunkInfo | None]:
        """Size and tiers of each chunk, None where there is none."""
        check_keys(keys)
        per_tier = [(tier.name, tier.sizes(keys)) for tier in self.tiers]
        infos: list[ChunkInfo | None] = []
        for index in range(len(keys)):
            holds = [(name, sizes[index]) for name, sizes in per_tier if sizes[index] is not None]
            infos.append(ChunkInfo(cast(int, holds[0][1]), tuple(name for name, _ in holds)) if holds else None)
        return infos

    def explain(self, keys: Sequence[bytes]) -> list[Explanation]:
        """For each chunk of a chain where it is, or why it is nowhere."""
        return explain_chain(keys, self.head(keys), self.events.last_removal, self.events.last_refusal)

    def prefetch(
        self, keys: Sequence[bytes], *, priority: int = 0, tier: str = "", deadline_ms: float | None = None
    ) -> list[PutStatus]:
        """Queue promotions to memory, or to a device's tier by name, and return at once; `busy` if the queue is full.

        Raises ConfigError if `tier` names any other.
        """
        return self._prefetcher.submit(keys, self.head, tier, deadline_at(deadline_ms), priority)

    def cancel(self, keys: Sequence[bytes]) -> list[bool]:
        """Forget promotions that were asked for and have not begun. True where there was one."""
        check_keys(keys)
        return self._prefetcher.cancel(keys)

    def park(self, keys: Sequence[bytes], *, deadline_ms: float | None = None) -> list[PutStatus]:
        """Make a chain durable and let go of its copies above; see `kvstore.client.Client.park`."""
        check_keys(keys)
        if self._closed:
            return [_CLOSED] * len(keys)
        self._prefetcher.cancel(keys)
        return self._parking.park(keys, deadline_at(deadline_ms))

    def resume(self, keys: Sequence[bytes], *, deadline_ms: float | None = None) -> list[PutStatus]:
        """Promote to memory what is missing there; see `kvstore.client.Client.resume`."""
        check_keys(keys)
        if self._closed:
            return [_CLOSED] * len(keys)
        self._prefetcher.overtake(keys)
        return self._parking.resume(keys, deadline_at(deadline_ms))

    # -- keep and remove -----------------------------------------------------------------------------------------------

    def touch(self, keys: Sequence[bytes]) -> None:
        """Count a use of a chain, last chunk first, so that a parent is always more recent than its children."""
        for tier in self.tiers:
            tier.touch(keys[::-1])

    def pin(self, keys: Sequence[bytes], *, ttl_seconds: float, owner: str = "", priority: int = 0) -> list[bool]:
        """As `try_pin`; True where the chunk is pinned."""
        return [miss is None for miss in self.try_pin(keys, ttl_seconds=ttl_seconds, owner=owner, priority=priority)]

    def try_pin(self, keys: Sequence[bytes], *, ttl_seconds: float, owner: str, priority: int) -> list[Miss | None]:
        """Keep chunks from eviction in every tier that holds them; None, or why not: `absent`, or no room (`full`)."""
        check_keys(keys)
        check_pin(ttl_seconds, owner, priority)
        return self._pins.pin(keys, owner=owner, expires_at=time.monotonic() + ttl_seconds, priority=priority)

    def unpin(self, keys: Sequence[bytes], *, owner: str = "") -> list[bool]:
        """End an owner's pins."""
        check_keys(keys)
        check_owner(owner)
        return self._pins.unpin(keys, owner=owner)

    def delete(self, keys: Sequence[bytes]) -> list[bool]:
        """Remove chunks from every tier, and from the way down; what a tier does not finish writing may come yet."""
        check_keys(keys)
        deadline = deadline_at(None)
        self._prefetcher.cancel(keys)
        self._pins.forget(keys)
        self._putter.wait_for_late(keys, deadline)
        found = []
        for tier in self.tiers:
            found.append(tier.delete(keys))
            if tier is self.memory and self._behind is not None:
                for key in keys:
                    self._behind.cancel(key, deadline=deadline)
        if self.memory is not None:
            found.append(self.memory.delete(keys))  # who was reading one from below may have brought it back
        self.counters.add("deletes", "", len(keys))
        return _any_of(found)

    # -- state ---------------------------------------------------------------------------------------------------------

    def stats(self) -> dict[str, Any]:
        """Counters and usage of the store and of each tier; JSON types only."""
        return {
            "tiers": {tier.name: tier_stats(tier) for tier in self.tiers},
            "counters": self.counters.snapshot(),
            "write_behind_bytes": self._behind.queued_bytes if self._behind is not None else 0,
            "transient_bytes": self._transient.used_bytes,
            "prefetch_chunks": self._prefetcher.waiting,
            "pins": len(self._pins),
        }

    def flush(self, *, deadline_ms: float | None = None) -> bool:
        """Wait until everything put so far is as durable as the tiers make it; False if not by the deadline."""
        deadline = deadline_at(deadline_ms)
        if self._closed:
            return True  # closing has flushed
        if self._behind is not None and not self._behind.flush(deadline=deadline):
            return False
        return all(done_by(self._movers.holders, tier.flush, deadline) for tier in self.tiers if tier.durable)

    def close(self) -> None:
        """Write what is on its way down, then close every tier. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._prefetcher.close()
        self._movers.shutdown()
        if self._behind is not None:
            self._behind.close()
        for tier in self.tiers:
            tier.close()
        self.events.ring.close()

    # -- inside --------------------------------------------------------------------------------------------------------

    def _transcoders(self, recipes: Mapping[str, Recipe], gates: Sequence[gate.GateRecord]) -> dict[str, Transcoder]:
        """The transcoder of every tier below memory that has a recipe."""
        if recipes and self._codecs is None:
            raise ConfigError("recipes need codecs to follow them with")
        return {
            tier.name: Transcoder(
                recipes[tier.name],
                cast(Codecs, self._codecs),
                gates=gates,
                limits=gate.PURPOSES[self.settings.lossy_limits],
                transient=self._transient,
                counters=self.counters,
            )
            for tier in self.tiers
            if tier is not self.memory and tier.name in recipes
        }

    def _sizes(self, keys: Sequence[bytes]) -> list[int]:
        return [info.nbytes if info is not None else 0 for info in self.head(keys)]

    def _counted(self, keys: Sequence[bytes], steps: Generator[Step, None, None]) -> Generator[Step]:
        try:
            for step in steps:
                if step.miss is not None:
                    miss = self.events.told(keys[step.index], step.miss)
                    step = msgspec.structs.replace(step, miss=miss)
                    self.counters.add("misses", str(miss.reason))
                yield step
        finally:
            steps.close()


_CLOSED_MISS = Miss(Reason.UNAVAILABLE, "the store is closed")
_CLOSED = PutStatus(stored=False, reason=_CLOSED_MISS.reason, detail=_CLOSED_MISS.detail)


def _any_of(answers: list[list[bool]]) -> list[bool]:
    return [any(column) for column in zip(*answers, strict=True)]
