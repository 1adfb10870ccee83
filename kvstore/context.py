"""A context: the chain of one prompt and what follows it, kept, parked, resumed and forked as a whole.

Chunks are named by their content, so a fork shares its prefix without a copy, and what it adds is its own: all that a
context needs is pins in a name of its own. A tree search forks one context many times; every branch lets go when it is
closed, and a chunk may be evicted once no branch wants it.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from kvstore.client import Client
from kvstore.outcome import PutStatus

TTL_SECONDS_DEFAULT = 600.0


class Context:
    """The chunks `keys` of one chain, in order, pinned in `client`'s store until `close` or `ttl_seconds` after the
    last verb called here: a branch that its process forgets, or dies with, keeps nothing for long.

    Not safe for threads; contexts that share chunks are.

    Args:
        client: of the store; it stays open.
        keys: of the chain, from its first chunk.
        ttl_seconds: how long its pins last without a verb.
        priority: of its pins, 0..255: where no more may be pinned, those of lower priorities end for them.
    """

    def __init__(
        self,
        client: Client,
        keys: Sequence[bytes] = (),
        *,
        ttl_seconds: float = TTL_SECONDS_DEFAULT,
        priority: int = 0,
    ) -> None:
        self._client = client
        self._keys = list(keys)
        self._ttl_seconds = ttl_seconds
        self._priority = priority
        self._owner = secrets.token_hex(8)
        self.renew()

    @property
    def keys(self) -> tuple[bytes, ...]:
        """Of the chain."""
        return tuple(self._keys)

    def renew(self) -> int:
        """Pin the chain for another `ttl_seconds`; answers how many leading chunks of it are there and pinned."""
        found = self._client.pin(self._keys, ttl_seconds=self._ttl_seconds, owner=self._owner, priority=self._priority)
        return found.index(False) if False in found else len(found)

    def extend(self, keys: Sequence[bytes]) -> None:
        """Add chunks behind the chain, once they are stored. Contexts forked before do not see them."""
        self._keys += keys
        self.renew()

    def fork(self) -> Context:
        """A context of the same chain, with pins of its own; it costs no copy."""
        return Context(self._client, self._keys, ttl_seconds=self._ttl_seconds, priority=self._priority)

    def park(self, *, deadline_ms: float | None = None) -> list[PutStatus]:
        """Move the chain out of memory, except what other contexts keep there; one status a chunk."""
        self._client.unpin(self._keys, owner=self._owner)
        return self._client.park(self._keys, deadline_ms=deadline_ms)

    def resume(self, *, deadline_ms: float | None = None) -> list[PutStatus]:
        """Move the chain into memory, only what is missing, and keep it there; one status a chunk."""
        self.renew()
        return self._client.resume(self._keys, deadline_ms=deadline_ms)

    def close(self) -> None:
        """Let go of the chain. Idempotent."""
        if self._keys:
            self._client.unpin(self._keys, owner=self._owner)
        self._keys = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
