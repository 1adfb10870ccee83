"""How many bytes of each tier may be pinned, what is, and who gives way to a pin of a higher priority.

Bytes count in whole pages, as they lie in a tier. What a pin keeps before its chunk in the chain does not count, unless
it is pinned itself. No locks: the owner serialises calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from kvstore.outcome import Miss, Reason
from kvstore.sizes import format_bytes
from kvstore.tier import IO_ALIGN, Tier

Rank = tuple[int, float]
"""Of the pins on a chunk: the highest priority, -1 if all have ended, and when the last of them ends.

The lowest rank gives way first.
"""


class PinRoom:
    """Pinned bytes of the tiers.

    Args:
        tiers: the store's.
        share_max: of each tier's capacity, what may be pinned; 1 for all of it.
        rank: of the pins on a chunk.
    """

    def __init__(self, tiers: Sequence[Tier], share_max: float, rank: Callable[[bytes], Rank]) -> None:
        self._tiers = tiers
        self._bytes_max = [int(tier.capacity_bytes * share_max) for tier in tiers]
        self._rank = rank
        self._held: list[dict[bytes, int]] = [{} for _ in tiers]
        self._used = [0] * len(tiers)
        self._ranked: list[Iterator[bytes] | None] = [None] * len(tiers)
        self._made: set[bytes] = set()
        """For whom room was made in this call; their rank is not what it was when it began."""

    def begin(self) -> None:
        """A call begins that will `make` room for chunks of one priority; after a miss it makes none any more."""
        self._ranked = [None] * len(self._tiers)
        self._made = set()

    def make(self, key: bytes, sizes: Sequence[int | None], priority: int) -> list[bytes] | Miss:
        """The chunks whose pins have to end so that this one can be pinned in the tiers where it has a size.

        Pins of the same or a higher priority stay: then it is a miss, and nobody gives way. What is answered is not
        held any more, and the chunk is.
        """
        leaving: list[bytes] = []
        for number, nbytes in enumerate(sizes):
            if nbytes is None or key in self._held[number]:
                continue
            victims = self._victims(number, _pages(nbytes), priority, leaving)
            if isinstance(victims, Miss):
                return victims
            leaving += victims
        self._made.add(key)
        for victim in leaving:
            self.drop(victim)
        for number, nbytes in enumerate(sizes):
            if nbytes is not None:
                self._hold(number, key, nbytes)
        return leaving

    def take(self, key: bytes, tier: Tier, nbytes: int) -> bool:
        """Hold a chunk that has come to a tier, if there is room without anybody giving way whose pins go on."""
        self.begin()
        sizes = [nbytes if one is tier else None for one in self._tiers]
        return not isinstance(self.make(key, sizes, 0), Miss)

    def drop(self, key: bytes) -> None:
        """A chunk is not pinned any more."""
        for number, held in enumerate(self._held):
            self._used[number] -= held.pop(key, 0)

    def _hold(self, number: int, key: bytes, nbytes: int) -> None:
        if key not in self._held[number]:
            self._held[number][key] = _pages(nbytes)
            self._used[number] += _pages(nbytes)

    def _victims(self, number: int, nbytes: int, priority: int, leaving: Sequence[bytes]) -> list[bytes] | Miss:
        """Who gives way in one tier, besides those that are leaving already."""
        held = self._held[number]
        over = self._used[number] + nbytes - self._bytes_max[number]
        if over <= 0:
            return []
        ranked = self._ranked[number]
        if ranked is None:
            self._forget_absent(number)
            lower = sorted((rank, key) for key in held if (rank := self._rank(key))[0] < priority)
            ranked = self._ranked[number] = iter([key for _, key in lower])
        over = self._used[number] + nbytes - self._bytes_max[number] - sum(held.get(key, 0) for key in leaving)
        victims: list[bytes] = []
        while over > 0 and (key := next(ranked, None)) is not None:
            if key in held and key not in leaving and key not in self._made:
                victims.append(key)
                over -= held[key]
        if over > 0:
            bound = format_bytes(self._bytes_max[number])
            detail = (
                f"{bound} of {self._tiers[number].name} may be pinned, and are with a priority of {priority} or more"
            )
            return Miss(Reason.FULL, detail)
        return victims

    def _forget_absent(self, number: int) -> None:
        """Chunks that have left a tier although they were pinned, deleted or gone bad, take no room."""
        held = self._held[number]
        keys = list(held)
        for key, nbytes in zip(keys, self._tiers[number].sizes(keys), strict=True):
            if nbytes is None:
                self._used[number] -= held.pop(key)


def _pages(nbytes: int) -> int:
    return -(-nbytes // IO_ALIGN) * IO_ALIGN
