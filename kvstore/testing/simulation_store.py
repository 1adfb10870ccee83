"""One life of a simulated store: real tiers on a simulated disk, clients, an end, and what must hold then."""

from __future__ import annotations

import functools
import random
from collections import Counter
from pathlib import Path
from typing import Any

from kvstore.errors import TierError
from kvstore.fetching import Step
from kvstore.outcome import Reason
from kvstore.store import Store
from kvstore.store_settings import StoreSettings
from kvstore.testing.faults import Fault, FaultyIo, RandomFaults
from kvstore.testing.simulation_clients import Client, check_bounds, close_store
from kvstore.testing.simulation_disk import SimulatedDisk
from kvstore.testing.simulation_oracle import InvariantError, Oracle, number
from kvstore.testing.simulation_plan import CHUNK_PAGES_MAX, TENANTS, LifePlan, Plan, chunks
from kvstore.testing.simulation_scheduler import Scheduler
from kvstore.tier import IO_ALIGN
from kvstore.tiers import fsck
from kvstore.tiers.dram import DramTier
from kvstore.tiers.nvme import NvmeTier
from kvstore.tiers.volume import VOLUME_NAME

STALL_SECONDS = 20.0
PINNED_SECONDS = 10.0
"""Longer than any client's pin."""
SUSPICIOUS_SECONDS = 10.0
"""Without a stalled device, and with clients that hold things for milliseconds, nobody waits that long in vain."""


class Crash(BaseException):
    """The instant at which the process ends."""


class Life:
    """A store from its opening to its end.

    Args:
        plan: of the whole schedule.
        number: which of its lives this is.
        scheduler: of this life.
        disk: of this life.
        directory: of the volume.
        oracle: of the whole schedule.
    """

    def __init__(
        self, plan: Plan, number: int, scheduler: Scheduler, disk: SimulatedDisk, directory: Path, oracle: Oracle
    ) -> None:
        self._plan = plan
        self._life: LifePlan = plan.lives[number]
        self._scheduler = scheduler
        self._disk = disk
        self._oracle = oracle
        self._directory = directory
        self._rng = random.Random(plan.seed * 10 + number)
        self._tiers: list[Any] = []
        oracle.hasty = self._life.impatient or Fault.STALL in self._life.rates
        self.faulty: FaultyIo | None = None
        self.store: Store | None = None

    def run(self) -> bool:
        """Live; True if the store was closed, False if it could not be opened. Raises Crash at the end of a crash."""
        if not self._open():
            return False
        store = self.store
        assert store is not None
        clients = [Client(store, self._oracle, self._scheduler, tenant) for tenant in TENANTS]
        tasks = [
            self._scheduler.spawn(functools.partial(clients[at % len(clients)].run, ops), f"client{at}")
            for at, ops in enumerate(self._life.clients)
        ]
        for task in tasks:
            self._scheduler.join(task)
        if self._life.ending != "close":
            raise Crash
        self._check_quiet(store)
        self._check_certain(store)
        close_store(store, self._oracle)
        self._check_closed()
        return True

    def bury(self) -> None:
        """Release what the process had, after all of its tasks have ended."""
        self._disk.close_all()
        for tier in self._tiers:
            if isinstance(tier, DramTier):
                tier.arena.close()
            else:
                tier._forget()
                for disk in tier._volume.disks:
                    disk.catalog.close()

    def _open(self) -> bool:
        plan = self._plan
        rates = {Fault(name): rate for name, rate in self._life.rates.items()}
        self._oracle.device_fails = bool(rates.keys() - {Fault.SHORT, Fault.STALL})
        faults = RandomFaults(self._rng, rates)
        self.faulty = FaultyIo(
            self._disk, faults, rng=self._rng, stall_seconds=STALL_SECONDS, sleep=self._scheduler.sleep
        )
        try:
            nvme = NvmeTier(
                [self._directory / f"disk{number}" for number in range(plan.disks)],
                plan.pages("nvme"),
                io_threads=2,
                piece_bytes=2 * IO_ALIGN,
                direct_io=plan.direct_io,
                evict_ahead_bytes=plan.evict_ahead_bytes,
                clock=lambda: self._scheduler.now,
                io=self.faulty,
                policy=plan.policies[1],
                quotas=plan.quotas(1),
            )
        except TierError:
            # With `hasty`, the first flush may have been waited for in vain.
            if not (self._oracle.device_fails or self._oracle.rotten or self._oracle.hasty):
                raise
            return False
        self._tiers.append(nvme)
        dram = DramTier(
            plan.pages("dram"), clock=lambda: self._scheduler.now, policy=plan.policies[0], quotas=plan.quotas(0)
        )
        self._tiers.append(dram)
        settings = StoreSettings(
            write_behind_bytes_max=plan.pages("queue"),
            write_behind_batch_bytes=plan.pages("batch"),
            fetch_window_bytes=plan.pages("window"),
            transient_bytes_max=plan.pages("transient"),
            prefetch_chunks_max=plan.prefetch_chunks_max,
            mover_threads=plan.mover_threads,
        )
        self.store = Store([dram, nvme], settings)
        for tier in (dram, nvme):
            tier.listener = self._oracle.listen(tier.name, tier.listener, durable=tier.durable)
        self._check_recovered(nvme)
        return True

    def _check_recovered(self, nvme: NvmeTier) -> None:
        """What must be there is there; and what is there now must be there from now on."""
        found = {entry.key for entry in nvme.scan()}
        lost = self._oracle.certain - found
        if lost and not self._oracle.rotten:
            raise InvariantError(f"acknowledged chunks are lost: {sorted(map(number, lost))}")
        back = self._oracle.banned.keys() & found
        if back:
            raise InvariantError(f"deleted chunks are back: {sorted(map(number, back))}")
        self._oracle.present[nvme.name] |= found
        self._oracle.certain = found
        used = nvme.usage().used_bytes - nvme.counters()["quarantined_bytes"]
        held = sum(_padded(entry.nbytes) for entry in nvme.scan())
        if used != held:
            raise InvariantError(f"bytes of the volume have leaked: {used} are used, chunks have {held}")

    def _check_quiet(self, store: Store) -> None:
        """Nobody does anything any more: nothing may be held, queued or on its way."""
        try:
            store.flush()
        except OSError:
            if not (self._oracle.device_fails or self._oracle.hasty):
                raise
        self._scheduler.settle()
        self._check_patience()
        if store._closed:
            return
        check_bounds(store)
        self._scheduler.sleep(PINNED_SECONDS)
        stats = store.stats()
        for name, value in stats.items():
            if name.endswith(("_bytes", "_waiting")) and value:
                raise InvariantError(f"{name} is {value} when all is quiet")
        quarantined = stats["tiers"]["nvme"]["counters"]["quarantined_bytes"]
        for tier in store.tiers:
            extra = quarantined if tier.durable else 0
            usage = tier.usage()
            entries = list(tier.scan())
            if usage.pinned_bytes != extra:
                raise InvariantError(f"{tier.name} has {usage.pinned_bytes} bytes pinned when all is quiet")
            if usage.used_bytes != sum(_padded(entry.nbytes) for entry in entries) + extra:
                raise InvariantError(f"bytes of {tier.name} have leaked")
            whose = zip(tier.tenants([entry.key for entry in entries]), entries, strict=True)
            owned = Counter(dict.fromkeys(tier.tenant_usage(), 0))
            for tenant, entry in whose:
                owned[tenant] += _padded(entry.nbytes) if tenant else 0
            del owned[""]
            if owned != {tenant: part.used_bytes for tenant, part in tier.tenant_usage().items()}:
                raise InvariantError(f"the tenants' bytes of {tier.name} do not add up: {owned}")
            if {entry.key for entry in entries} != self._oracle.present[tier.name]:
                raise InvariantError(f"the events of {tier.name} do not add up to what it holds")

    def _check_patience(self) -> None:
        """Nobody waited for long in vain: a wait that ends by its time-out is a notification that never came."""
        if self._oracle.hasty:
            return
        vain = [
            (seconds, task, what) for seconds, task, what in self._scheduler.timeouts if seconds > SUSPICIOUS_SECONDS
        ]
        if vain:
            raise InvariantError(f"waited in vain: {vain[:3]}")

    def _check_certain(self, store: Store) -> None:
        """Every chunk is there, or was evicted, or deleted; and certain ones can be fetched."""
        if store._closed:
            return
        for chunk in chunks():
            held = any(chunk.key in present for present in self._oracle.present.values())
            for step in store.fetch([chunk.key]):
                self._check_step(chunk.key, step, held=held)

    def _check_step(self, key: bytes, step: Step, *, held: bool) -> None:
        oracle = self._oracle
        if step.miss is None:
            oracle.judge_served(key, dict(oracle.banned))
            oracle.judge_bytes(key, step.view, f"at the end, tier {step.tier}")
        elif held and not (oracle.device_fails or self._oracle.hasty or self._outgrown(step)):
            raise InvariantError(f"chunk {number(key)} is there and cannot be fetched: {step.miss}")
        else:
            oracle.judge_miss(key, step.miss, "at the end")

    def _outgrown(self, step: Step) -> bool:
        """True for a chunk that its tenant has no room for in memory, and that buffers outside it are too small for."""
        plan = self._plan
        limited = bool(plan.quotas(0)) and plan.transient_pages < CHUNK_PAGES_MAX
        return limited and step.miss is not None and step.miss.reason is Reason.FULL

    def _check_closed(self) -> None:
        if len(self._scheduler.live) > 1:
            names = [task.name for task in self._scheduler.live[1:]]
            raise InvariantError(f"threads outlive the store: {names}")


def check_files(directory: Path, oracle: Oracle) -> None:
    """The volume that a life has left is in order, every byte of it."""
    for volume in sorted(directory.glob(f"*/{VOLUME_NAME}")):
        # A device that fails may have lost what was written last, and what is wrong then is for a repair.
        report = fsck.check(volume.parent, deep=True, repair=oracle.device_fails or oracle.rotten)
        if not report.clean and not oracle.rotten:
            raise InvariantError(f"fsck: {report.text()}")
        if report.leaked_bytes:
            raise InvariantError(f"{report.leaked_bytes} bytes have leaked")


def _padded(nbytes: int) -> int:
    return -(-nbytes // IO_ALIGN) * IO_ALIGN
