"""POST /v1/fetch: chunks as one stream of frames, inline or by reference into the arena."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator
from typing import Any, cast

from aiohttp import web

from kvstore.fetching import Step
from kvstore.protocol import SESSION_HEADER, STREAM_TYPE, FetchRequest, Frame, encode_frame
from kvstore.service.bodies import deadline_of, keys_of, read_body, remaining_ms
from kvstore.service.daemon import DAEMON, Daemon
from kvstore.service.frames import Framer, Packet
from kvstore.service.ledger import Ledger
from kvstore.service.limits import DEADLINE_GRACE_SECONDS
from kvstore.service.refusal import RefusalError
from kvstore.service.streaming import PIECE_BYTES, Sender

_log = logging.getLogger(__name__)

SMALL_PAYLOAD_BYTES = PIECE_BYTES // 4
"""Payloads up to this size are copied and sent together, so that small chunks do not cost a thread hop each."""


async def fetch(request: web.Request) -> web.StreamResponse:
    """The chunks' frames; ends with an end frame unless it was cut short."""
    daemon = request.app[DAEMON]
    body = await read_body(request, FetchRequest)
    keys = keys_of(body.keys, daemon.config.request_keys_max)
    deadline = deadline_of(body.deadline_ms)
    session = daemon.session(request.headers.get(SESSION_HEADER)) if body.transport == "shm" else None
    ledger = session.open_fetch() if session is not None else None
    pull = None
    sender = None
    try:
        steps = daemon.store.fetch(
            keys,
            order=body.order,
            deadline_ms=remaining_ms(deadline),
            min_quality=body.min_quality,
            max_quality=body.max_quality,
            decode=body.decode,
        )
        pull = Pull(daemon, steps, Framer(keys, ledger, daemon.memory_name), ledger, deadline)
        response = web.StreamResponse(headers={"Content-Type": STREAM_TYPE})
        response.enable_chunked_encoding()
        writer = await response.prepare(request)
        assert writer is not None
        sender = Sender(request, writer, daemon.config.lease_ttl_seconds)
        await response.write(encode_frame(Frame(kind="open", fetch=ledger.number if ledger is not None else 0)))
        async for packets in pull.batches():
            await _send(sender, packets)
        await response.write(encode_frame(Frame(kind="end")))
        await response.write_eof()
        return response
    except Exception as error:
        if sender is None:
            raise
        # The answer has begun: all that can still be said is that it was cut short.
        log = _log.info if isinstance(error, ConnectionError | RefusalError) else _log.exception
        log("a fetch of %d chunks was cut short: %s", len(keys), error)
        sender.abort()
        return response
    except BaseException:
        if sender is not None:
            sender.abort()
        raise
    finally:
        if pull is not None:
            pull.close()
        if session is not None and ledger is not None:
            session.end_fetch(ledger)


async def _send(sender: Sender, packets: list[Packet]) -> None:
    light: list[bytes | memoryview] = []
    for packet in packets:
        light.append(packet.head)
        if packet.pieces:
            await sender.send_http_chunk([*light, *packet.pieces])
            light.clear()
    if light:
        await sender.send_http_chunk(light)


class Pull:
    """Advances a fetch on worker threads and hands its packets to the event loop as they come.

    At most one thread is inside the fetch at a time, and none while views that it lent are being sent.
    """

    def __init__(
        self, daemon: Daemon, steps: Iterator[Step], framer: Framer, ledger: Ledger | None, deadline: float
    ) -> None:
        self._workers = daemon.workers
        self._steps = steps
        self._framer = framer
        self._ledger = ledger
        self._deadline = deadline
        self._loop = asyncio.get_running_loop()
        self._inside = threading.Lock()
        self._arrived = asyncio.Event()
        self._packets: deque[Packet] = deque()
        self._exhausted = False

    async def batches(self) -> AsyncIterator[list[Packet]]:
        """Packets in order, as many at a time as are ready. The views of a batch are valid until the next one.

        Raises:
            ConnectionResetError: the client acknowledges nothing, or the store does not come back: cut the stream.
        """
        job: asyncio.Future[None] | None = None
        while True:
            if self._packets:
                packets = list(self._packets)
                self._packets.clear()
                yield packets
            elif job is not None:
                await self._wait(job)
                if job.done():
                    job.result()
                    job = None
            elif self._exhausted:
                return
            else:
                if self._ledger is not None and not await self._ledger.wait_for_room():
                    raise ConnectionResetError("the session ended, or acknowledged nothing before its leases expired")
                job = self._workers.start(self._pull)
                job.add_done_callback(lambda _: self._arrived.set())

    def close(self) -> None:
        """Release what the fetch holds, once no thread is inside."""
        if not self._exhausted:
            self._workers.leave(self._close)

    async def _wait(self, job: asyncio.Future[None]) -> None:
        """Wait for packets or the end of the job."""
        try:
            async with asyncio.timeout(max(0.0, self._deadline - time.monotonic()) + DEADLINE_GRACE_SECONDS):
                while not self._packets and not job.done():
                    self._arrived.clear()
                    await self._arrived.wait()
        except TimeoutError:
            raise ConnectionResetError("the store did not come back by the deadline") from None

    def _pull(self) -> None:
        """Take steps until the client's room is used up, bytes must be sent first, or there are no more."""
        copied_bytes = 0
        with self._inside:
            while self._ledger is None or self._ledger.has_room:
                step = next(self._steps, None)
                if step is None:
                    self._exhausted = True
                    return
                packet = self._framer.packet(step)
                inline = packet.payload_bytes
                if 0 < inline <= SMALL_PAYLOAD_BYTES:
                    packet.flatten()
                    copied_bytes += inline
                self._loop.call_soon_threadsafe(self._deliver, packet)
                if packet.pieces or copied_bytes >= PIECE_BYTES:
                    return

    def _deliver(self, packet: Packet) -> None:
        self._packets.append(packet)
        self._arrived.set()

    def _close(self) -> None:
        with self._inside:
            cast(Any, self._steps).close()
