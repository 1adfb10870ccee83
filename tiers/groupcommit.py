"""Group commit: one thread writes the catalog; what arrives while it writes goes into the next transaction together."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable

from kvstore.tiers.catalog import Operation

_log = logging.getLogger(__name__)

OPERATIONS_MAX = 65536
"""A group is closed when it has this many operations, so that a commit takes a bounded time."""


Settled = Callable[["Ticket", Exception | None], None]


class Ticket:
    """Operations that must become durable together, and what to do when they have or have failed.

    `sync` says that the operations name bytes whose durability the commit must ensure first. `settled(ticket, error)`
    is called on the commit thread, before `done` is set; `error` is None on success.
    """

    def __init__(self, *, sync: bool = False, settled: Settled | None = None) -> None:
        self.operations: list[Operation] = []
        self.sync = sync
        self.error: Exception | None = None
        self.done = threading.Event()
        self._settled = settled

    def settle(self, error: Exception | None) -> None:
        """Record the outcome and tell whom it concerns."""
        self.error = error
        try:
            if self._settled is not None:
                self._settled(self, error)
        finally:
            self.done.set()


class GroupCommitter:
    """Applies tickets in the order of `submit`, many in one transaction.

    After a failure nothing is applied any more: whether the failed transaction became durable is not known, and
    neither is what the device has kept of the bytes it names.

    Args:
        sync: makes the volume's bytes durable; raises OSError.
        apply: makes operations durable in one transaction.
    """

    def __init__(self, sync: Callable[[], None], apply: Callable[[list[Operation]], None]) -> None:
        self._sync = sync
        self._apply = apply
        self._queue: queue.SimpleQueue[Ticket | None] = queue.SimpleQueue()
        self.failure: Exception | None = None
        self.groups = 0
        self._thread = threading.Thread(target=self._run, name="kvstore-commit", daemon=True)
        self._thread.start()

    def submit(self, ticket: Ticket) -> None:
        """Queue a ticket; returns at once. Each caller waits for its own, so callers bound the queue."""
        self._queue.put(ticket)

    def close(self) -> None:
        """Apply what is queued and end the thread."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        running = True
        while running:
            ticket = self._queue.get()
            group: list[Ticket] = []
            operations: list[Operation] = []
            while ticket is not None:
                group.append(ticket)
                operations += ticket.operations
                if len(operations) >= OPERATIONS_MAX:
                    break
                try:
                    ticket = self._queue.get_nowait()
                except queue.Empty:
                    break
            running = ticket is not None
            error = self.failure or self._commit(group, operations)
            for member in group:
                member.settle(error)

    def _commit(self, group: list[Ticket], operations: list[Operation]) -> Exception | None:
        try:
            if any(ticket.sync for ticket in group):
                self._sync()
            if operations:
                self._apply(operations)
        except Exception as error:  # whatever it was, the callers must hear of it and not wait for ever
            _log.error("catalog commit failed, the tier takes no more writes until it is reopened: %s", error)
            self.failure = error
            return error
        self.groups += 1
        return None
