"""Which chunks of a tier have not been used for so long that they are to leave.

No timers, and nothing is kept for each chunk: uses are numbered already (`ChunkEntry.access`), so it is enough to know
up to which number they are too old. Time is cut into ticks of a TICKS-th of the time to live; of each tick stands here
when its last use was and which number that had. A chunk expires when the last use in the tick of its own last use is
`ttl_seconds` ago: never earlier than that after its own, and at most a tick later.

A use of a chunk counts as one of all before it in its chain, since it is of no use without them: with the first use in
a tick they are renewed. So what has expired is closed under "behind": no child outlives its parent here. Pins, leases
and reads in flight renew what they keep.

Chunks that have expired leave in the course of the tier's calls: those that a call asks for at once, of the others up
to SWEEP_MAX a call. Until it has left, an expired chunk is not served; a put of it finds it there and counts as a use.

No locks: the owner of the index serialises the calls.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence

from kvstore.errors import ConfigError
from kvstore.keys import ROOT
from kvstore.tiers.index import ChunkEntry, Index

TICKS = 64
SWEEP_MAX = 256
"""Chunks that leave in one call beside those it asks for."""

Mark = tuple[float, int]
"""When the last use of a tick was, in seconds of the clock, and its number."""


class Expiry:
    """The ages of the chunks of `index`, whose `expiry` it becomes. What is there counts as used now.

    Args:
        index: what is there.
        ttl_seconds: how long a chunk stays unused.
        clock: seconds; never goes backwards.
        leave: removes chunks, children before their parents, from the index too.
        marks: what `marks` has answered before the tier was closed, for an index that has been saved with its numbers.

    Attributes:
        ticks: how many have ended.

    Raises:
        ConfigError: `ttl_seconds` is not positive.
    """

    def __init__(
        self,
        index: Index,
        ttl_seconds: float,
        clock: Callable[[], float],
        leave: Callable[[list[ChunkEntry]], None],
        marks: Iterable[Mark] = (),
    ) -> None:
        if not ttl_seconds > 0:
            raise ConfigError(f"ttl_seconds is {ttl_seconds}; it must be positive")
        self.ttl_seconds = ttl_seconds
        self._index = index
        self.clock = clock
        self._leave = leave
        self._started = self._used_at = now = clock()
        # A crash can lose the last numbers: then those that are left were given before the mark, too.
        self._marks = deque(sorted((min(at, now), min(access, index.accesses)) for at, access in marks))
        self._renewed_to = index.accesses
        self._dead = self._swept = -1
        self.ticks = 0
        index.expiry = self

    def tick(self) -> None:
        """A use is about to be numbered."""
        now = self._advance()
        if now - self._started >= self.ttl_seconds / TICKS:
            self._marks.append((self._used_at, self._index.accesses))
            self._started, self._renewed_to = now, self._index.accesses
            self.ticks += 1
        self._used_at = now

    def used(self, keys: Iterable[bytes]) -> None:
        """Chunks have been used: renew those before them."""
        asked = set(keys)
        for key in asked:
            before = []
            entry = self._index.get(key)
            parent = None if entry is None or entry.parent in asked else self._index.get(entry.parent)
            while parent is not None and parent.access <= self._renewed_to:
                before.append(parent.key)
                parent = self._index.get(parent.parent)
            self._index.renew(before)

    def live(self, keys: Sequence[bytes]) -> list[ChunkEntry | None]:
        """The chunks that may be served, None where there is none. Not a use."""
        self.sweep(keys)
        return self._unexpired(keys)

    def sizes(self, keys: Sequence[bytes]) -> list[int | None]:
        """Bytes of each chunk that may be served, None where there is none."""
        self.sweep(keys)
        if self._swept == self._dead:
            return self._index.sizes(keys)
        return [None if entry is None else entry.nbytes for entry in self._unexpired(keys)]

    def has_expired(self, key: bytes) -> bool:
        """True for a chunk that has expired and could not leave yet."""
        entry = self._index.get(key)
        return entry is not None and entry.access <= self._dead

    def sweep(self, asked: Sequence[bytes] = ()) -> None:
        """Let some chunks leave that have expired: those asked for first."""
        now = self._advance()
        if self._swept == self._dead:
            return
        kept = [entry.key for entry in self._index.kept(now) if entry.access <= self._dead]
        if kept:
            self.tick()
            self._index.renew(kept)
        leaving = self._asked_leaves(asked)
        limit = len(leaving) + SWEEP_MAX
        for entry in self._index.least_recent(now):
            if entry.access > self._dead:
                self._swept = self._dead
                break
            if len(leaving) == limit:
                break
            leaving.setdefault(entry.key, entry)
        else:
            self._swept = self._dead
        if leaving:
            self._leave(list(leaving.values()))

    def marks(self) -> list[Mark]:
        """What to save with the numbers, so that the ages go on when they are read again."""
        return [*self._marks, (self._used_at, self._index.accesses)]

    def _unexpired(self, keys: Sequence[bytes]) -> list[ChunkEntry | None]:
        entries = [self._index.get(key) for key in keys]
        return [entry if entry is not None and entry.access > self._dead else None for entry in entries]

    def _advance(self) -> float:
        """Let chunks expire by now, and answer when that is."""
        now = self.clock()
        born_by = now - self.ttl_seconds
        while self._marks and self._marks[0][0] <= born_by:
            self._dead = max(self._dead, self._marks.popleft()[1])
        if self._used_at <= born_by:
            self._dead = self._index.accesses
        return now

    def _asked_leaves(self, asked: Sequence[bytes]) -> dict[bytes, ChunkEntry]:
        """Those asked for that have expired, but for the ones with children that are not among them."""
        leaving: dict[bytes, ChunkEntry] = {}
        orphaned: Counter[bytes] = Counter()
        for key in reversed(asked):
            entry = self._index.get(key)
            if entry is None or entry.access > self._dead or key in leaving:
                continue
            if self._index.children(key) == orphaned[key]:
                leaving[key] = entry
                if entry.parent != ROOT:
                    orphaned[entry.parent] += 1
        return leaving
