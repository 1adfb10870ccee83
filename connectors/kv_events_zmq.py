"""Publishes KV events over ZeroMQ as vLLM does, so that what listens to engines can listen to a store.

PUB socket: parts [topic, sequence number u64 big-endian, batch]. ROUTER socket for replay: a request is the number to
begin with (8 bytes, big-endian), the answer the batches that are remembered from there on, parts as above, and one with
number -1 at the end. Numbers start at 0 with every publisher. A listener that finds a gap asks for a replay; one that
finds that impossible forgets everything of this publisher.

Needs pyzmq (`pip install "kvstore-tiered[events]"`).
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from types import TracebackType
from typing import Any, Self

import zmq

from kvstore.connectors.kv_events import block_events, encode
from kvstore.errors import ConfigError
from kvstore.events import BATCH_EVENTS, Event

_log = logging.getLogger(__name__)

EVENTS_WAITING_MAX = 4096
"""Events accepted and not yet published."""
BATCHES_KEPT_MAX = 10_000
"""Batches remembered for replay."""
LISTENER_BATCHES_MAX = 100_000
"""Batches queued for one slow listener; beyond it ZeroMQ drops, and the listener sees a gap."""
CLOSE_SECONDS = 5.0
WAIT_MILLISECONDS = 10_000
"""The publishing thread looks up this often even if nobody wakes it."""

END = (-1).to_bytes(8, "big", signed=True)


class KVEventPublisher:
    """Publishes events from a thread of its own. A context manager.

    Args:
        endpoint: where listeners connect, such as tcp://127.0.0.1:5557.
        replay_endpoint: where they ask for what they missed; "" for no replay.
        topic: first part of every message.
        rank: data-parallel rank in every batch.

    Raises:
        ConfigError: an endpoint cannot be bound.
    """

    def __init__(self, endpoint: str, *, replay_endpoint: str = "", topic: str = "", rank: int | None = None) -> None:
        self._topic = topic.encode()
        self._rank = rank
        self._waiting: queue.Queue[Event] = queue.Queue(EVENTS_WAITING_MAX)
        self._kept: deque[tuple[int, bytes]] = deque(maxlen=BATCHES_KEPT_MAX)
        self._next = 0
        self._stopping = False
        self._context = zmq.Context()
        self._sockets: list[zmq.Socket[bytes]] = []
        try:
            self._pull = self._bound(zmq.PULL, "inproc://wake")
            self._wake = self._context.socket(zmq.PUSH)
            self._sockets.append(self._wake)
            self._wake.connect("inproc://wake")
            self._publish = self._bound(zmq.PUB, endpoint)
            self._replay = self._bound(zmq.ROUTER, replay_endpoint) if replay_endpoint else None
        except ConfigError:
            self._context.destroy(linger=0)
            raise
        self.endpoint = self._publish.getsockopt_string(zmq.LAST_ENDPOINT)
        self.replay_endpoint = self._replay.getsockopt_string(zmq.LAST_ENDPOINT) if self._replay else ""
        self._thread = threading.Thread(target=self._run, name="kvstore-kv-events", daemon=True)
        self._thread.start()

    def publish(self, event: Event, *, timeout_seconds: float = CLOSE_SECONDS) -> bool:
        """Hand over an event, from one thread only; False if the publisher is so far behind that it was dropped."""
        try:
            self._waiting.put(event, timeout=timeout_seconds)
        except queue.Full:
            return False
        self._poke()
        return True

    def close(self) -> None:
        """Publish what waits, then end. Idempotent."""
        if self._thread.is_alive():
            self._stopping = True
            self._poke()
            self._thread.join(CLOSE_SECONDS)
        if not self._context.closed:
            self._context.destroy(linger=0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _bound(self, kind: int, endpoint: str) -> zmq.Socket[bytes]:
        socket: zmq.Socket[bytes] = self._context.socket(kind)
        self._sockets.append(socket)
        socket.set_hwm(LISTENER_BATCHES_MAX)
        try:
            socket.bind(endpoint)
        except zmq.ZMQError as error:
            raise ConfigError(f"KV events cannot be published at {endpoint!r}: {error}") from error
        return socket

    def _poke(self) -> None:
        try:
            self._wake.send(b"", zmq.NOBLOCK)
        except zmq.Again:
            return  # as many wakes as fit are on their way

    def _run(self) -> None:
        poller = zmq.Poller()
        for socket in (self._pull, self._replay):
            if socket is not None:
                poller.register(socket, zmq.POLLIN)
        while True:
            ready = dict(poller.poll(WAIT_MILLISECONDS))
            if self._pull in ready:
                self._pull.recv()
            self._publish_waiting()
            if self._stopping:
                return
            if self._replay is not None and self._replay in ready:
                self._answer(self._replay, self._replay.recv_multipart())

    def _publish_waiting(self) -> None:
        while events := self._take():
            payload = encode(block_events(events), time.time(), self._rank)
            self._publish.send_multipart([self._topic, self._next.to_bytes(8, "big"), payload])
            self._kept.append((self._next, payload))
            self._next += 1

    def _take(self) -> list[Event]:
        """The events that wait, at most as many as one batch holds."""
        events: list[Event] = []
        while len(events) < BATCH_EVENTS:
            try:
                events.append(self._waiting.get_nowait())
            except queue.Empty:
                break
        return events

    def _answer(self, socket: zmq.Socket[bytes], request: list[Any]) -> None:
        """Send what is remembered from the requested number on; a request that is none is passed over."""
        if len(request) != 3 or len(request[2]) != 8:
            _log.info("a replay request of %d parts is not one", len(request))
            return
        listener, _, begin = request
        for number, payload in self._kept:
            if number >= int.from_bytes(begin, "big"):
                socket.send_multipart([listener, b"", self._topic, number.to_bytes(8, "big"), payload])
        socket.send_multipart([listener, b"", b"", END, b""])
