"""The events of a daemon: its Server-Sent Events as a stream of `kvstore.events.Event`."""

from __future__ import annotations

import http.client
import logging
import socket
import threading
import time
from collections import deque
from collections.abc import Collection
from contextlib import suppress
from urllib.parse import urlencode

from kvstore.connectors.remote_http import Connection, DeadlineSocket, UnreachableError
from kvstore.connectors.remote_link import CONTROL_SECONDS, Link
from kvstore.errors import ServiceError
from kvstore.events import Event, EventStream
from kvstore.sse import SILENCE_SECONDS, Block, BlockReader

_log = logging.getLogger(__name__)

READ_BYTES = 64 * 1024
CLOSE_SECONDS = 5.0


class RemoteEvents(EventStream):
    """Events of the daemon behind `link`. It ends early, saying why in the log, if the daemon does not serve it.

    Args:
        link: the way to the daemon.
        after: the number to go on after; None: from now on.
        tiers: names of the tiers wanted, empty for all.
        kinds: kinds wanted, empty for all.
        deadline: time.monotonic seconds.
    """

    def __init__(
        self, link: Link, *, after: int | None, tiers: Collection[str], kinds: Collection[str], deadline: float
    ) -> None:
        self.position = after or 0
        self._link = link
        self._deadline = deadline
        self._blocks: deque[Block] = deque()
        self._reader = BlockReader()
        self._inside = threading.Lock()
        self._closed = False
        self._connection: Connection | None = None
        query = [("tier", tier) for tier in tiers] + [("kind", kind) for kind in kinds]
        query += [("after", str(after))] if after is not None else []
        path = f"/v1/events?{urlencode(query)}"
        try:
            opening_ends = min(deadline, time.monotonic() + CONTROL_SECONDS)
            self._connection, self._answer = link.open("GET", path, None, opening_ends)
            self._socket = self._connection.sock
            with self._inside:
                self._read()  # the first block says from which number on the daemon listens
                self._accept_positions()
        except UnreachableError as error:
            _log.info("no events from %s: %s", link.address.url, error)
            self._closed = True

    def __next__(self) -> Event:
        with self._inside:
            while not self._closed:
                while self._blocks:
                    block = self._blocks.popleft()
                    self.position = block.seq if block.seq is not None else self.position
                    if block.event is not None:
                        return block.event
                self._read()
            self._end()
        raise StopIteration

    def close(self) -> None:
        self._closed = True
        if self._connection is not None and isinstance(self._socket, DeadlineSocket):
            with suppress(OSError):  # wakes a thread that is waiting in a read
                self._socket.plain.shutdown(socket.SHUT_RDWR)
        if self._inside.acquire(timeout=CLOSE_SECONDS):
            try:
                self._end()
            finally:
                self._inside.release()

    def _read(self) -> None:
        """Wait for blocks; marks the stream closed when there will be no more, or none in time."""
        assert self._connection is not None
        try:
            self._connection.until(min(self._deadline, time.monotonic() + SILENCE_SECONDS))
            data = self._answer.read1(READ_BYTES)
            self._blocks.extend(self._reader.feed(data))
            self._closed = self._closed or not data
        except (OSError, ValueError, http.client.HTTPException, ServiceError) as error:
            if not self._closed and time.monotonic() < self._deadline:
                _log.info("the events from %s ended: %s", self._link.address.url, error)
            self._closed = True

    def _accept_positions(self) -> None:
        while self._blocks and self._blocks[0].event is None:
            seq = self._blocks.popleft().seq
            self.position = seq if seq is not None else self.position

    def _end(self) -> None:
        """Give the connection up; the caller holds the lock."""
        if self._connection is not None:
            self._link.pool.drop(self._connection)
            self._connection = None
