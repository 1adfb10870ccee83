"""The simulation finds what it is for: each of these mistakes, made on purpose, within so many schedules."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from kvstore import container
from kvstore.demotion import WriteBehind
from kvstore.layer_fetching import LayerFetch
from kvstore.promotion import Promoter
from kvstore.putting import Putter
from kvstore.store import Store
from kvstore.testing import simulation_plan
from kvstore.testing.simulation import simulate
from kvstore.testing.simulation_plan import draw
from kvstore.tiers import disk
from kvstore.tiers.groupcommit import GroupCommitter
from kvstore.tiers.index import Index
from kvstore.tiers.journal import Journal
from kvstore.tiers.nvme_put import PutPath
from kvstore.tiers.space import ChunkSpace
from kvstore.tiers.volume_space import VolumeSpace

Patch = pytest.MonkeyPatch
Mistake = Callable[[Patch], None]


def publish_before_verify(patch: Patch) -> None:
    patch.setattr(container, "verify", lambda view, *, key: container.parse(view))


def reuse_before_the_deletion_is_durable(patch: Patch) -> None:
    patch.setattr(VolumeSpace, "_tickets_of", lambda self, offset, length: [])


def acknowledge_before_the_flush(patch: Patch) -> None:
    def flush(self: GroupCommitter) -> None:
        self._journal.confirm()
        self._since_checkpoint |= ((operation.key, operation.record) for operation in self._unflushed)
        self._unflushed.clear()

    patch.setattr(GroupCommitter, "_flush", flush)


def release_journal_pages_before_the_checkpoint(patch: Patch) -> None:
    def append(self: Journal, operations: Any) -> None:
        self.release(self._next)
        real(self, operations)

    real = Journal.append
    patch.setattr(Journal, "append", append)


def believe_what_was_never_flushed(patch: Patch) -> None:
    patch.setattr(disk, "flush_volume", lambda path, io: None)


def forget_to_notify(patch: Patch) -> None:
    real = PutPath._finish

    def finish(self: PutPath, filling: Any, status: Any) -> None:
        done, filling.done = filling.done, threading.Event()
        real(self, filling, status)
        filling.done = done

    patch.setattr(PutPath, "_finish", finish)


def lose_a_lease(patch: Patch) -> None:
    real = Promoter.lease

    def lease(self: Promoter, key: bytes, *, count: bool = True, min_quality: int = 0) -> Any:
        if count:
            real(self, key, count=False)
        return real(self, key, count=count, min_quality=min_quality)

    patch.setattr(Promoter, "lease", lease)


def cancel_after_the_deletion(patch: Patch) -> None:
    real = WriteBehind.cancel
    later: list[tuple[WriteBehind, bytes, float]] = []

    def delete(self: Store, keys: Any) -> list[bool]:
        found = real_delete(self, keys)
        while later:
            behind, key, deadline = later.pop()
            real(behind, key, deadline=deadline)
        return found

    real_delete = Store.delete
    patch.setattr(WriteBehind, "cancel", lambda self, key, *, deadline: later.append((self, key, deadline)))
    patch.setattr(Store, "delete", delete)


def let_a_deleted_chunk_come_back(patch: Patch) -> None:
    patch.setattr(simulation_plan, "DUELS", 1.0)  # elsewhere a read and a deletion of one chunk seldom meet
    patch.setattr(ChunkSpace, "is_doomed", lambda self, entry: False)


def evict_what_is_being_read(patch: Patch) -> None:
    patch.setattr(Index, "protected", lambda self, now: [])


def end_places_that_are_being_read_into(patch: Patch) -> None:
    patch.setattr(LayerFetch, "_end_all", lambda self: None)
    real = LayerFetch._collect

    def collect(self: LayerFetch, loads: Any) -> Any:
        misses = real(self, loads)
        self._reading = None
        return misses

    patch.setattr(LayerFetch, "_collect", collect)


def answer_durable_for_what_is_only_in_memory(patch: Patch) -> None:
    real = Putter._existing

    def existing(self: Putter, key: bytes, *, durable: bool) -> Any:
        return real(self, key, durable=False)

    patch.setattr(Putter, "_existing", existing)


def count_a_queue_twice(patch: Patch) -> None:
    real = WriteBehind.cancel

    def cancel(self: WriteBehind, key: bytes, *, deadline: float) -> None:
        waiting = self._waiting.get(key)
        real(self, key, deadline=deadline)
        if waiting is not None:
            self.queued_bytes += waiting.nbytes

    patch.setattr(WriteBehind, "cancel", cancel)


MISTAKES: dict[Mistake, int] = {
    publish_before_verify: 300,
    reuse_before_the_deletion_is_durable: 600,
    acknowledge_before_the_flush: 300,
    release_journal_pages_before_the_checkpoint: 300,
    believe_what_was_never_flushed: 1000,
    forget_to_notify: 300,
    lose_a_lease: 300,
    cancel_after_the_deletion: 300,
    let_a_deleted_chunk_come_back: 600,
    evict_what_is_being_read: 300,
    end_places_that_are_being_read_into: 300,
    answer_durable_for_what_is_only_in_memory: 300,
    count_a_queue_twice: 300,
}
"""Each mistake, and the number of schedules within which it must be found; docs/simulation.md has them too."""


@pytest.fixture
def patch() -> Iterator[Patch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.mark.parametrize(
    ("mistake", "schedules_max"), MISTAKES.items(), ids=lambda value: getattr(value, "__name__", "")
)
def test_a_mistake_is_found(mistake: Mistake, schedules_max: int, patch: Patch) -> None:
    mistake(patch)
    for seed in range(schedules_max):
        if simulate(draw(seed)).error:
            return
    pytest.fail(f"{schedules_max} schedules found nothing")
