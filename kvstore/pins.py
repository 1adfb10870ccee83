"""Pins with owners: a chunk that several contexts share stays until the last of them lets go.

The tiers keep a pinned chunk; here stands who asked for it. A pin holds in every tier that has the chunk, and in the
memory and durable tiers that it comes to later: whoever puts it there calls `apply`, with a lease on it or before it
could be evicted again.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

from kvstore.tier import Tier

PINS_MAX = 1 << 18
"""Pins (a chunk, an owner) at once; beyond it a pin is refused."""


class Pins:
    """Who keeps which chunks of `tiers`, and until when. Safe for threads.

    Args:
        tiers: the store's.
        pins_max: most pins at once.
    """

    def __init__(self, tiers: Sequence[Tier], *, pins_max: int = PINS_MAX) -> None:
        self._tiers = tiers
        self._pins_max = pins_max
        self._lock = threading.Lock()
        self._owners: dict[bytes, dict[str, float]] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def pin(self, keys: Sequence[bytes], *, owner: str, expires_at: float) -> list[bool]:
        """Keep chunks until then; of several pins of one owner the longest holds. False where there is no chunk, or
        there are too many pins.
        """
        with self._lock:
            if self._count + len(keys) > self._pins_max:
                self._clear_expired()
            before = [self._owners.get(key, {}).get(owner) for key in keys]
            taken = [self._note(key, owner, expires_at) for key in keys]
            wanted = [key for key, noted in zip(keys, taken, strict=True) if noted]
            answers = [tier.pin(wanted, expires_at=expires_at) for tier in self._tiers]
            held = iter([any(column) for column in zip(*answers, strict=True)])
            found = [noted and next(held) for noted in taken]
            for key, old, noted, there in zip(keys, before, taken, found, strict=True):
                if noted and not there and old is None:
                    self._drop(key, owner)
        return found

    def unpin(self, keys: Sequence[bytes], *, owner: str) -> list[bool]:
        """End an owner's pins, and leave those of others. True where there was one that had not expired."""
        now = time.monotonic()
        found = []
        with self._lock:
            for key in keys:
                expires_at = self._drop(key, owner)
                found.append(expires_at > now)
                rest = max(self._owners.get(key, {}).values(), default=0.0)
                if expires_at > rest:
                    for tier in self._tiers:
                        tier.unpin([key], until=rest)
        return found

    def apply(self, key: bytes, tier: Tier) -> None:
        """A tier has got a chunk: pin it there if it is pinned."""
        if key not in self._owners:
            return
        with self._lock:
            until = max(self._owners.get(key, {}).values(), default=0.0)
            if until:
                tier.pin([key], expires_at=until)

    def forget(self, keys: Sequence[bytes]) -> None:
        """Chunks have been deleted, and their pins with them."""
        with self._lock:
            for key in keys:
                self._count -= len(self._owners.pop(key, ()))

    def _note(self, key: bytes, owner: str, expires_at: float) -> bool:
        owners = self._owners.get(key, {})
        if owner not in owners:
            if self._count >= self._pins_max:
                return False
            self._count += 1
        owners[owner] = max(expires_at, owners.get(owner, 0.0))
        self._owners[key] = owners
        return True

    def _drop(self, key: bytes, owner: str) -> float:
        """Forget a pin; answers when it would have ended, 0 if there was none."""
        owners = self._owners.get(key, {})
        if owner not in owners:
            return 0.0
        expires_at = owners.pop(owner)
        self._count -= 1
        if not owners:
            del self._owners[key]
        return expires_at

    def _clear_expired(self) -> None:
        now = time.monotonic()
        over = [(key, owner) for key, owners in self._owners.items() for owner, at in owners.items() if at <= now]
        for key, owner in over:
            self._drop(key, owner)
