"""Pins with owners and priorities: a chunk that several contexts share stays until the last of them lets go.

The tiers keep a pinned chunk; here stands who asked for it. A pin holds in every tier that has the chunk, and in the
memory and durable tiers that it comes to later: whoever puts it there calls `apply`, with a lease on it or before it
could be evicted again.

Of each tier only so much may be pinned (`kvstore.pin_room`). Where that is reached, pins of lower priorities give way
to one of a higher: all pins of a chunk end together, whoever's they are. A pin that finds no room is refused in all
tiers, and so are those behind it in the same call.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import msgspec

from kvstore.counters import Counters
from kvstore.outcome import Miss, Reason
from kvstore.pin_room import PinRoom, Rank
from kvstore.tier import Tier

PINS_MAX = 1 << 18
"""Pins (a chunk, an owner) at once; beyond it a pin is refused."""

_ABSENT = Miss(Reason.ABSENT, "no tier holds the key")


class Pin(msgspec.Struct, gc=False):
    """One owner's pin on a chunk, until `expires_at` (time.monotonic seconds)."""

    expires_at: float = 0.0
    priority: int = 0


class Pins:
    """Who keeps which chunks of `tiers`, and until when. Safe for threads.

    Args:
        tiers: the store's.
        pins_max: most pins at once.
        share_max: of each tier's capacity, what may be pinned; 1 for all of it.
        counters: gets pins_displaced, and pins_refused by reason.
    """

    def __init__(
        self,
        tiers: Sequence[Tier],
        *,
        pins_max: int = PINS_MAX,
        share_max: float = 1.0,
        counters: Counters | None = None,
    ) -> None:
        self._tiers = tiers
        self._pins_max = pins_max
        self._counters = counters or Counters()
        self._lock = threading.Lock()
        self._owners: dict[bytes, dict[str, Pin]] = {}
        self._count = 0
        self._room = PinRoom(tiers, share_max, self._rank)

    def __len__(self) -> int:
        return self._count

    def pin(self, keys: Sequence[bytes], *, owner: str, expires_at: float, priority: int = 0) -> list[Miss | None]:
        """Keep chunks until then; of several pins of one owner the longest and the highest priority hold.

        None where that is so; else a miss: there is no such chunk (`absent`), or no room for the pin (`full`).
        """
        with self._lock:
            if self._count + len(keys) > self._pins_max:
                self._clear_expired()
            before = [owner in self._owners.get(key, ()) for key in keys]
            outcomes = self._note_all(keys, owner, Pin(expires_at, priority))
            wanted = [key for key, miss in zip(keys, outcomes, strict=True) if miss is None]
            answers = [tier.pin(wanted, expires_at=expires_at) for tier in self._tiers]
            held = iter([any(column) for column in zip(*answers, strict=True)])
            for number, (key, old) in enumerate(zip(keys, before, strict=True)):
                if outcomes[number] is None and not next(held):
                    outcomes[number] = _ABSENT  # it has left between the two looks
                    if not old:
                        self._drop(key, owner)
        for miss in outcomes:
            if miss is not None:
                self._counters.add("pins_refused", str(miss.reason))
        return outcomes

    def unpin(self, keys: Sequence[bytes], *, owner: str) -> list[bool]:
        """End an owner's pins, and leave those of others. True where there was one that had not expired."""
        now = time.monotonic()
        found = []
        with self._lock:
            for key in keys:
                expires_at = self._drop(key, owner)
                found.append(expires_at > now)
                rest = self._until(key)
                if expires_at > rest:
                    for tier in self._tiers:
                        tier.unpin([key], until=rest)
        return found

    def apply(self, key: bytes, tier: Tier) -> None:
        """A tier has got a chunk: pin it there if it is pinned, and there is room for that."""
        if key not in self._owners:
            return
        with self._lock:
            until = self._until(key)
            (nbytes,) = tier.sizes([key])
            if until and nbytes is not None and self._room.take(key, tier, nbytes):
                tier.pin([key], expires_at=until)

    def forget(self, keys: Sequence[bytes]) -> None:
        """Chunks have been deleted, and their pins with them."""
        with self._lock:
            for key in keys:
                self._forget(key)

    def _note_all(self, keys: Sequence[bytes], owner: str, pin: Pin) -> list[Miss | None]:
        """Write down the pins that there is room for, and end those that give way."""
        sizes = list(zip(*[tier.sizes(keys) for tier in self._tiers], strict=True)) if keys else []
        self._room.begin()
        refused: Miss | None = None
        outcomes: list[Miss | None] = []
        for key, there in zip(keys, sizes, strict=True):
            if not any(nbytes is not None for nbytes in there):
                outcomes.append(_ABSENT)
                continue
            refused = refused or self._note(key, there, owner, pin)
            outcomes.append(refused)
        return outcomes

    def _note(self, key: bytes, sizes: Sequence[int | None], owner: str, pin: Pin) -> Miss | None:
        known = owner in self._owners.get(key, ())
        if not known and self._count >= self._pins_max:
            return Miss(Reason.FULL, f"there are {self._pins_max} pins, and can be no more; end some")
        displaced = self._room.make(key, sizes, pin.priority)
        if isinstance(displaced, Miss):
            return displaced
        now = time.monotonic()
        for victim in displaced:
            if self._until(victim) > now:
                self._counters.add("pins_displaced", "", len(self._owners[victim]))
            self._forget(victim)
            for tier in self._tiers:
                tier.unpin([victim])
        owners = self._owners.setdefault(key, {})
        old = owners.get(owner, Pin())
        owners[owner] = Pin(max(pin.expires_at, old.expires_at), max(pin.priority, old.priority))
        self._count += not known
        return None

    def _rank(self, key: bytes) -> Rank:
        now = time.monotonic()
        owners = self._owners.get(key, {}).values()
        return max((pin.priority for pin in owners if pin.expires_at > now), default=-1), self._until(key)

    def _until(self, key: bytes) -> float:
        """When the last pin on a chunk ends, 0 if there is none."""
        return max((pin.expires_at for pin in self._owners.get(key, {}).values()), default=0.0)

    def _forget(self, key: bytes) -> None:
        self._count -= len(self._owners.pop(key, ()))
        self._room.drop(key)

    def _drop(self, key: bytes, owner: str) -> float:
        """Forget a pin; answers when it would have ended, 0 if there was none."""
        owners = self._owners.get(key, {})
        if owner not in owners:
            return 0.0
        pin = owners.pop(owner)
        self._count -= 1
        if not owners:
            self._forget(key)
        return pin.expires_at

    def _clear_expired(self) -> None:
        now = time.monotonic()
        over = [(key, owner) for key, owners in self._owners.items() for owner, pin in owners.items()]
        for key, owner in over:
            if self._owners[key][owner].expires_at <= now:
                self._drop(key, owner)
