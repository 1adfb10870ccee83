"""What a simulated store may and may not do: the facts that its clients and its tiers' listeners report, judged."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from kvstore.outcome import Miss, PutStatus, Reason
from kvstore.testing.simulation_plan import by_key
from kvstore.tier import Entry, Removal, TierListener

CALM_MISSES = frozenset({Reason.ABSENT, Reason.DEADLINE, Reason.BUSY, Reason.FULL, Reason.UNAVAILABLE})
"""Why a chunk may miss although no device has failed."""

DEVICE_MISSES = frozenset(
    {Reason.IO_ERROR, Reason.CORRUPT, Reason.TRUNCATED, Reason.MALFORMED, Reason.WRONG_KEY, Reason.UNKNOWN_VERSION}
    | {Reason.UNKNOWN_CODEC, Reason.UNKNOWN_PROFILE, Reason.WRONG_FINGERPRINT}
)
"""Why it may miss besides on a device that fails; a wrong bit can make any of these of a header."""

CALM_REFUSALS = frozenset(
    {
        Reason.BUSY,
        Reason.FULL,
        Reason.DEADLINE,
        Reason.UNAVAILABLE,
        Reason.TOO_LARGE,
        Reason.ABSENT,
        Reason.NOT_ADMITTED,
        Reason.OVER_QUOTA,
    }
)
"""Why a put may be refused, or not be durable, although no device has failed."""


class InvariantError(AssertionError):
    """The store did what it must not do."""


class Oracle:
    """Follows the chunks over all lives of a store.

    A chunk is `certain` once a put of it has been acknowledged as durable, unless it has left the durable tier since
    that put began: then no crash may lose it. A key is `banned` while it has been deleted and nobody has begun to put
    it since the deletion began: then nobody may get it.

    Of the life at hand, `device_fails` says that calls of the system may fail, and `hasty` that any wait may end too
    soon; of all lives, `rotten` that a bit has changed on a disk.
    """

    def __init__(self) -> None:
        self.certain: set[bytes] = set()
        self.banned: dict[bytes, int] = {}
        self.present: dict[str, set[bytes]] = {}
        self.trace: list[str] | None = None
        self.rotten = False
        self.device_fails = False
        self.hasty = False
        self.facts = 0
        self._gone: dict[bytes, int] = {}
        self._put_begun: dict[bytes, int] = {}
        self._put_running: dict[bytes, int] = {}

    # -- clients -----------------------------------------------------------------------------------------------------

    def begin_put(self, keys: Collection[bytes]) -> int:
        """Puts of `keys` begin; answers when, for `end_put`."""
        self.facts += 1
        for key in keys:
            self.banned.pop(key, None)
            self._put_begun[key] = self.facts
            self._put_running[key] = self._put_running.get(key, 0) + 1
        return self.facts

    def end_put(self, key: bytes, status: PutStatus, begun: int) -> None:
        """A put has been answered."""
        self._put_running[key] -= 1
        self._note(f"put of chunk {number(key)}: {status}")
        if status.durable and self._gone.get(key, -1) < begun:
            self.certain.add(key)
        if not status.stored:
            self.judge_reason(status.reason, CALM_REFUSALS, "a put was refused", key)
        elif status.reason is not None:
            self.judge_reason(status.reason, CALM_REFUSALS, "a put was not durable", key)

    def begin_park(self, keys: Collection[bytes]) -> int:
        """Chunks that are there are to be made durable; answers when, for `end_park`."""
        for key in keys:
            self._put_running[key] = self._put_running.get(key, 0) + 1
        return self.facts

    def end_park(self, key: bytes, status: PutStatus, begun: int) -> None:
        """A chunk was asked to be made durable, in a call that began after `begun` facts."""
        self._put_running[key] -= 1
        self._note(f"parked chunk {number(key)}: {status}")
        if status.durable and self._gone.get(key, -1) <= begun:
            self.certain.add(key)

    def begin_delete(self, keys: Sequence[bytes]) -> dict[bytes, int]:
        """The deletion of `keys` begins; answers those that nobody is putting, for `end_delete`."""
        return {key: self._put_begun.get(key, 0) for key in keys if not self._put_running.get(key)}

    def end_delete(self, begun: dict[bytes, int], being_written: Collection[bytes]) -> None:
        """A deletion has been answered: what nobody has begun to put since it began, nobody may find.

        Only who does not wait for long finds what a tier was writing, is still or has written meanwhile.
        """
        self._note(f"deleted {sorted(map(number, begun))}")
        for key, put_begun in begun.items():
            if self.hasty and (key in being_written or any(key in keys for keys in self.present.values())):
                continue
            if self._put_begun.get(key, 0) == put_begun:
                self.banned[key] = self.facts

    def judge_bytes(self, key: bytes, data: memoryview, where: str) -> None:
        """Bytes were served for a key: header and segments must be what was put; between them nothing is promised."""
        chunk = by_key()[key]
        if len(data) != len(chunk.data):
            raise InvariantError(f"{len(data)} of {len(chunk.data)} bytes for chunk {number(key)}: {where}")
        if any(data[start:stop] != chunk.data[start:stop] for start, stop in chunk.parts):
            raise InvariantError(f"wrong bytes for chunk {number(key)}: {where}")

    def judge_served(self, key: bytes, banned_before: dict[bytes, int]) -> None:
        """A chunk was found by a call that began when `banned_before` was what was banned."""
        if key in banned_before and self.banned.get(key) == banned_before[key]:
            raise InvariantError(f"chunk {number(key)} was found after its deletion")

    def judge_miss(self, key: bytes, miss: Miss, where: str) -> None:
        """A chunk was missed."""
        self.judge_reason(miss.reason, CALM_MISSES, where, key)

    def judge_reason(self, reason: Reason | None, calm: Collection[Reason], where: str, key: bytes) -> None:
        """A reason was given; without a failing device it must be one of `calm`."""
        if reason not in calm and not (self.device_fails and reason in DEVICE_MISSES):
            raise InvariantError(f"chunk {number(key)}: {where}, reason {reason} although nothing had failed")

    # -- tiers -------------------------------------------------------------------------------------------------------

    def listen(self, name: str, inner: TierListener, *, durable: bool) -> TierListener:
        """A listener that reports to this oracle and to `inner`."""
        self.present[name] = set()
        return _Witness(self, name, inner, durable=durable)

    def stored(self, name: str, key: bytes) -> None:
        """A chunk entered a tier."""
        self._note(f"chunk {number(key)} enters {name}")
        if key in self.present[name]:
            raise InvariantError(f"chunk {number(key)} entered {name} twice")
        self.present[name].add(key)

    def removed(self, name: str, key: bytes, removal: Removal, *, durable: bool) -> None:
        """A chunk left a tier."""
        self._note(f"chunk {number(key)} leaves {name}: {removal}")
        if key not in self.present[name]:
            raise InvariantError(f"chunk {number(key)} left {name}, where it was not")
        self.present[name].remove(key)
        if durable:
            self._gone[key] = self.facts
            self.certain.discard(key)

    def _note(self, fact: str) -> None:
        self.facts += 1
        if self.trace is not None:
            self.trace.append(f"       {fact}")

    def reopened(self, *, sure: bool) -> None:
        """A new life begins: the puts of the last one are over. Unless `sure`, what it was told is not certain."""
        self._put_running.clear()
        self.present.clear()
        if not sure:
            self.banned.clear()
        self.device_fails = False


class _Witness:
    def __init__(self, oracle: Oracle, name: str, inner: TierListener, *, durable: bool) -> None:
        self._oracle = oracle
        self._name = name
        self._inner = inner
        self._durable = durable

    def stored(self, entry: Entry, data: memoryview) -> None:
        self._inner.stored(entry, data)
        self._oracle.stored(self._name, entry.key)

    def removed(self, entries: Sequence[Entry], removal: Removal) -> None:
        self._inner.removed(entries, removal)
        for entry in entries:
            self._oracle.removed(self._name, entry.key, removal, durable=self._durable)


def number(key: bytes) -> int:
    """Which of the chunks has that key."""
    return list(by_key()).index(key)
