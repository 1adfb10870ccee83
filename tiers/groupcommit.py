"""Group commit: one thread makes changes durable; what arrives while it does goes into the next group together.

A group is some pages of the journal and one flush of the volume, which covers the chunks they name as well. Before the
ring is full, the changes since the last checkpoint are applied to the catalog in one transaction, on a thread of its
own while further groups are committed; then their pages can be used again.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from kvstore.tiers.catalog import Position
from kvstore.tiers.journal import OPERATIONS_PER_PAGE, Journal
from kvstore.tiers.records import Operation, Row

_log = logging.getLogger(__name__)

OPERATIONS_MAX = 65536
"""A group is closed when it has this many operations, so that a commit takes a bounded time."""
CHECKPOINT_WAIT_SECONDS = 60.0
"""How long a commit waits for pages of the journal; a checkpoint takes milliseconds unless the device is in trouble."""


Settled = Callable[["Ticket", Exception | None], None]


class Ticket:
    """Operations that must become durable together, and what to do when they have or have failed.

    `settled(ticket, error)` is called on the commit thread, before `done` is set; `error` is None on success. A ticket
    with `rows` asks for a checkpoint: it is settled when its operations, all before it, and these records of chunks
    that are in the catalog or the journal already, are in the catalog.
    """

    def __init__(self, *, rows: Sequence[Row] | None = None, settled: Settled | None = None) -> None:
        self.operations: list[Operation] = []
        self.offsets: list[int] = []
        self.rows = rows
        self.error: Exception | None = None
        self.done = threading.Event()
        self._settled = settled

    def add(self, operation: Operation, offset: int) -> None:
        """Add an operation about the chunk, or the place, at `offset`."""
        self.operations.append(operation)
        self.offsets.append(offset)

    def settle(self, error: Exception | None) -> None:
        """Record the outcome and tell whom it concerns."""
        self.error = error
        try:
            if self._settled is not None:
                self._settled(self, error)
        finally:
            self.done.set()


class GroupCommitter:
    """Commits tickets in the order of `submit`, many at once.

    After a failure nothing is committed any more: whether the failed write became durable is not known, and neither is
    what the device has kept of the bytes it names.

    Args:
        journal: where operations go; used by this object alone.
        sync: makes everything written to the volume durable; raises OSError.
        apply: moves the catalog's checkpoint in one durable transaction.
        ride_along: records whose access number has changed, to go with a checkpoint that happens anyway.
    """

    def __init__(
        self,
        journal: Journal,
        sync: Callable[[], None],
        apply: Callable[[Iterable[Row], Position], None],
        ride_along: Callable[[], list[Row]],
    ) -> None:
        self._journal = journal
        self._sync = sync
        self._apply = apply
        self._ride_along = ride_along
        self._queue: queue.SimpleQueue[Ticket | None] = queue.SimpleQueue()
        self._unflushed: list[Operation] = []
        self._since_checkpoint: dict[bytes, bytes | None] = {}
        self._checkpointer = ThreadPoolExecutor(1, "kvstore-checkpoint")
        self._checkpoint: Future[None] | None = None
        self.failure: Exception | None = None
        self.groups = 0
        self.checkpoints = 0
        self._thread = threading.Thread(target=self._run, name="kvstore-commit", daemon=True)
        self._thread.start()

    def submit(self, ticket: Ticket) -> None:
        """Queue a ticket; returns at once. Each caller waits for its own, so callers bound the queue."""
        self._queue.put(ticket)

    def close(self) -> None:
        """Commit what is queued and end the threads."""
        self._queue.put(None)
        self._thread.join()
        self._checkpointer.shutdown()

    def _run(self) -> None:
        running = True
        while running:
            ticket = self._queue.get()
            group: list[Ticket] = []
            operations: list[Operation] = []
            while ticket is not None:
                group.append(ticket)
                operations += ticket.operations
                if len(operations) >= OPERATIONS_MAX or ticket.rows is not None:
                    break
                try:
                    ticket = self._queue.get_nowait()
                except queue.Empty:
                    break
            running = ticket is not None
            error = self.failure or self._commit(operations)
            asking = group.pop() if group and group[-1].rows is not None and error is None else None
            for member in group:
                member.settle(error)
            if asking is not None:
                self._since_checkpoint |= asking.rows or ()
                self._start_checkpoint(asking)
            elif error is None and self._journal.free_pages * 2 <= self._journal.pages and not self._checkpointing:
                self._start_checkpoint()

    def _commit(self, operations: list[Operation]) -> Exception | None:
        try:
            self._write(operations)
        except Exception as error:  # whatever it was, the callers must hear of it and not wait for ever
            return self._fail(error)
        self.groups += 1
        return None

    def _write(self, operations: list[Operation]) -> None:
        """Append operations to the journal and flush; in several rounds if the ring has not the room."""
        done = 0
        while done < len(operations):
            room = self._journal.free_pages * OPERATIONS_PER_PAGE
            if not room:
                self._flush()
                self._make_room()
                continue
            part = operations[done : done + room]
            self._journal.append(part)
            self._unflushed += part
            done += len(part)
        self._flush()

    def _flush(self) -> None:
        if self._unflushed:
            self._sync()
            self._journal.confirm()
            self._since_checkpoint |= ((operation.key, operation.record) for operation in self._unflushed)
            self._unflushed.clear()

    def _make_room(self) -> None:
        """Wait for a checkpoint. Raises what failed, TimeoutError after CHECKPOINT_WAIT_SECONDS."""
        if not self._checkpointing:
            self._start_checkpoint()
        assert self._checkpoint is not None
        self._checkpoint.result(CHECKPOINT_WAIT_SECONDS)

    @property
    def _checkpointing(self) -> bool:
        return self._checkpoint is not None and not self._checkpoint.done()

    def _start_checkpoint(self, asking: Ticket | None = None) -> None:
        """Have everything flushed so far applied to the catalog; `asking` is settled when it has been."""
        rows, self._since_checkpoint = self._since_checkpoint, {}
        rows |= self._ride_along()
        self._checkpoint = self._checkpointer.submit(self._apply_rows, rows, self._journal.position, asking)

    def _apply_rows(self, rows: dict[bytes, bytes | None], position: Position, asking: Ticket | None) -> None:
        failure = self.failure
        try:
            if failure is None:
                self._apply(rows.items(), position)
                self._journal.release(position.sequence)
                self.checkpoints += 1
        except Exception as error:
            failure = self._fail(error)
            raise
        finally:
            if asking is not None:
                asking.settle(failure)

    def _fail(self, error: Exception) -> Exception:
        _log.error("a commit failed, the tier takes no more writes until it is reopened: %s", error)
        self.failure = error
        return error
