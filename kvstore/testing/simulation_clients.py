"""The clients of a simulated store: each makes its calls one after the other and judges every answer."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing

from kvstore.arguments import deadline_at
from kvstore.fetching import Step
from kvstore.loan import Loan
from kvstore.outcome import PutStatus
from kvstore.places import Place
from kvstore.store import Store
from kvstore.testing.simulation_oracle import InvariantError, Oracle, number
from kvstore.testing.simulation_plan import Chunk, Op, chunks
from kvstore.testing.simulation_scheduler import Scheduler
from kvstore.tier import PutItem

LATE_SECONDS = 1.0
"""How much later than its deadline a call may answer in virtual time, stalls of the device aside."""


class Client:
    """Makes the calls of one client, who puts for `tenant`. What it holds at the end of a call it has given back."""

    def __init__(self, store: Store, oracle: Oracle, scheduler: Scheduler, tenant: str) -> None:
        self._tenant = tenant
        self._store = store
        self._oracle = oracle
        self._scheduler = scheduler

    def run(self, ops: Sequence[Op]) -> None:
        """Make all calls."""
        for op in ops:
            if self._scheduler.trace is not None:
                self._scheduler.trace.append(f"{self._scheduler.current.name}: {op}")
            picked = [chunks()[at] for at in op.chunks]
            getattr(self, f"_{op.verb}")(op, picked, [chunk.key for chunk in picked])

    def _hold(self, op: Op) -> None:
        self._scheduler.sleep(op.hold_seconds, "client")

    def _put(self, op: Op, picked: list[Chunk], keys: list[bytes]) -> None:
        """Puts the chunks in one call."""
        begun = self._oracle.begin_put(keys)
        items = [PutItem(chunk.key, memoryview(chunk.data), chunk.parent, tenant=self._tenant) for chunk in picked]
        statuses = self._store.put(items, durable=op.durable, deadline_ms=op.deadline_ms)
        for key, status in zip(keys, statuses, strict=True):
            self._judge_put(op, key, status, begun)

    def _write(self, op: Op, picked: list[Chunk], keys: list[bytes]) -> None:
        """Puts the chunks one by one in place; changes its mind after `stop_after`."""
        for at, chunk in enumerate(picked):
            begun = self._oracle.begin_put([chunk.key])
            deadline = deadline_at(op.deadline_ms)
            place = self._store.reserve(
                chunk.key, len(chunk.data) + 100, parent=chunk.parent, durable=op.durable, tenant=self._tenant
            )
            if isinstance(place, Place):
                place.view[: len(chunk.data)] = chunk.data
                self._hold(op)
                if at >= op.stop_after:
                    place.abort()
                    self._oracle.end_put(chunk.key, PutStatus(stored=True), begun)
                    continue
                place = self._store.publish(
                    place, chunk.key, chunk.parent, len(chunk.data), durable=op.durable, deadline=deadline
                )
            self._judge_put(op, chunk.key, self._store.settle(place, deadline), begun)

    def _judge_put(self, op: Op, key: bytes, status: PutStatus, begun: int) -> None:
        self._oracle.end_put(key, status, begun)
        if op.durable and status.stored and not status.durable and status.reason is None:
            raise InvariantError(f"a durable put of chunk {number(key)} is not durable, for no reason")

    def _fetch(self, op: Op, picked: list[Chunk], keys: list[bytes]) -> None:
        """Fetches the chunks in the given order; closes the fetch after `stop_after` steps; holds each step."""
        banned = dict(self._oracle.banned)
        seen: dict[int, list[Step]] = {}
        whole = False
        steps = self._store.fetch(keys, order="layer" if op.order == "layer" else "chunk", deadline_ms=op.deadline_ms)
        with closing(steps):
            for count, step in enumerate(steps):
                seen.setdefault(step.index, []).append(step)
                self._judge_step(op, keys[step.index], step, banned)
                if count >= op.stop_after:
                    break
            else:
                whole = True
        if whole and len(seen) != len(keys):
            raise InvariantError(f"a fetch of {len(keys)} chunks told of {len(seen)}")
        for index, told in seen.items():
            misses = [step for step in told if step.miss is not None]
            if whole and not misses and (not told[0].first or not told[-1].last):
                raise InvariantError(f"a fetch told of chunk {number(keys[index])} in part")
            if misses and told[-1].miss is None:
                raise InvariantError(f"chunk {number(keys[index])} came after its miss")

    def _judge_step(self, op: Op, key: bytes, step: Step, banned: dict[bytes, int]) -> None:
        oracle = self._oracle
        if step.miss is not None:
            oracle.judge_miss(key, step.miss, "a fetch missed")
            return
        oracle.judge_served(key, banned)
        expected = next(chunk.data for chunk in chunks() if chunk.key == key)
        for _ in range(2):
            for group in step.groups:
                for segment in group:
                    place = slice(segment.offset, segment.offset + segment.length)
                    if step.view[place] != expected[place]:
                        raise InvariantError(f"wrong bytes for chunk {number(key)}: fetch, tier {step.tier}")
            if op.order == "chunk":
                oracle.judge_bytes(key, step.view, f"fetch, tier {step.tier}")
            self._hold(op)

    def _borrow(self, op: Op, picked: list[Chunk], keys: list[bytes]) -> None:
        """Borrows the chunks, holds all of them at once for a while."""
        banned = dict(self._oracle.banned)
        loans: list[tuple[bytes, Loan]] = []
        try:
            for key in keys:
                # What this client holds itself may be what there is no room for.
                loan = self._store.borrow(key, deadline_ms=op.deadline_ms or 5.0)
                if isinstance(loan, Loan):
                    loans.append((key, loan))
                    self._oracle.judge_served(key, banned)
                else:
                    self._oracle.judge_miss(key, loan, "a loan was refused")
            for _ in range(2):
                for key, loan in loans:
                    self._oracle.judge_bytes(key, loan.view, f"loan, tier {loan.tier}")
                self._hold(op)
        finally:
            for _, loan in loans:
                loan.release()

    def _look(self, op: Op, picked: list[Chunk], keys: list[bytes]) -> None:
        """Looks the chunks up in every way."""
        found = self._store.lookup(keys)
        if (found.stop is None) != (found.chunks == len(keys)):
            raise InvariantError(
                f"lookup of {len(keys)} chunks found {found.chunks} and stopped because of {found.stop}"
            )
        names = {tier.name for tier in self._store.tiers}
        for chunk, tier, nbytes in zip(picked, found.tiers, found.nbytes, strict=False):
            if tier not in names or nbytes != len(chunk.data):
                raise InvariantError(f"lookup says chunk {number(chunk.key)} has {nbytes} bytes in {tier}")
        for chunk, info in zip(picked, self._store.head(keys), strict=True):
            if info is not None and info.nbytes != len(chunk.data):
                raise InvariantError(f"head says chunk {number(chunk.key)} has {info.nbytes} bytes")
        self._store.explain(keys)

    def _delete(self, op: Op, picked: list[Chunk], keys: list[bytes]) -> None:
        """Deletes the chunks."""
        begun = self._oracle.begin_delete(keys)
        self._store.delete(keys)
        if not self._store._closed:  # a store that is being closed deletes what it still can
            self._oracle.end_delete(begun, self._being_written())

    def _being_written(self) -> set[bytes]:
        """Chunks that a tier is writing: a delete waits for it, but not beyond its deadline."""
        behind, putter = self._store._behind, self._store._putter
        return {*(behind._writing if behind is not None else ()), *putter._late.values()}

    def _prefetch(self, op: Op, picked: list[Chunk], keys: list[bytes]) -> None:
        """Asks for the chunks in memory."""
        for key, status in zip(keys, self._store.prefetch(keys, deadline_ms=op.deadline_ms), strict=True):
            if not status.stored and status.reason is None:
                raise InvariantError(f"a prefetch of chunk {number(key)} was refused for no reason")

    def _cancel(self, op: Op, picked: list[Chunk], keys: list[bytes]) -> None:
        """Cancels prefetches."""
        self._store.cancel(keys)

    def _park(self, op: Op, picked: list[Chunk], keys: list[bytes]) -> None:
        """Parks the chunks: what is acknowledged as durable is so from then on."""
        begun = self._oracle.begin_park(keys)
        for key, status in zip(keys, self._store.park(keys, deadline_ms=op.deadline_ms), strict=True):
            self._oracle.end_park(key, status, begun)

    def _resume(self, op: Op, picked: list[Chunk], keys: list[bytes]) -> None:
        """Brings the chunks back to memory."""
        banned = dict(self._oracle.banned)
        for key, status in zip(keys, self._store.resume(keys, deadline_ms=op.deadline_ms), strict=True):
            if status.stored:
                self._oracle.judge_served(key, banned)

    def _pin(self, op: Op, picked: list[Chunk], keys: list[bytes]) -> None:
        """Pins the chunks for ten times as long as it holds."""
        self._store.pin(keys, ttl_seconds=10 * op.hold_seconds + 1e-3)

    def _unpin(self, op: Op, picked: list[Chunk], keys: list[bytes]) -> None:
        self._store.unpin(keys)

    def _touch(self, op: Op, picked: list[Chunk], keys: list[bytes]) -> None:
        self._store.touch(keys)

    def _flush(self, op: Op, picked: list[Chunk], keys: list[bytes]) -> None:
        """Flushes; a tier that has failed says so."""
        try:
            self._store.flush(deadline_ms=op.deadline_ms)
        except OSError:
            if not (self._oracle.device_fails or self._oracle.hasty):
                raise

    def _stats(self, op: Op, picked: list[Chunk], keys: list[bytes]) -> None:
        """Asks for the state and checks the bounds."""
        check_bounds(self._store)

    def _close(self, op: Op, picked: list[Chunk], keys: list[bytes]) -> None:
        """Closes the store under the other clients."""
        close_store(self._store, self._oracle)


def close_store(store: Store, oracle: Oracle) -> None:
    """Close; a tier that has failed says so, or that has not answered in time."""
    try:
        store.close()
    except OSError:
        if not (oracle.device_fails or oracle.hasty):
            raise


def check_bounds(store: Store) -> None:
    """No tier, queue or budget holds more than it may."""
    stats = store.stats()
    for name, tier in stats["tiers"].items():
        usage = tier["usage"]
        if not 0 <= usage["used_bytes"] <= usage["capacity_bytes"]:
            raise InvariantError(f"tier {name} uses {usage['used_bytes']} of {usage['capacity_bytes']} bytes")
        if not 0 <= usage["pinned_bytes"] <= usage["used_bytes"]:
            raise InvariantError(f"tier {name} has {usage['pinned_bytes']} of {usage['used_bytes']} used bytes pinned")
        for tenant, part in tier["tenants"].items():
            if not 0 <= part["used_bytes"] <= part["quota_bytes"]:
                raise InvariantError(
                    f"tenant {tenant} uses {part['used_bytes']} of {part['quota_bytes']} bytes of {name}"
                )
    if not 0 <= stats["transient_bytes"] <= store.settings.nbytes("transient_bytes_max", 0):
        raise InvariantError(f"transient buffers have {stats['transient_bytes']} bytes")
    largest = max(len(chunk.data) for chunk in chunks())
    if not 0 <= stats["write_behind_bytes"] <= max(largest, store.settings.nbytes("write_behind_bytes_max", 0)):
        raise InvariantError(f"the write-behind queue has {stats['write_behind_bytes']} bytes")
