"""GET /v1/events: what enters and leaves the tiers, as Server-Sent Events."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress

from aiohttp import web

from kvstore.config import unknown_name
from kvstore.errors import ConfigError
from kvstore.events import EventFilter
from kvstore.service.daemon import DAEMON, Daemon
from kvstore.service.refusal import RefusalError
from kvstore.sse import EVENTS_TYPE, KEEP_ALIVE_SECONDS, encode, encode_position

LAST_EVENT_ID = "Last-Event-ID"
PARAMETERS = ("after", "kind", "tier")


async def events(request: web.Request) -> web.StreamResponse:
    """Events until the client leaves or the daemon stops."""
    daemon = request.app[DAEMON]
    wanted = _filter(request, daemon)
    after = _after(request)
    with daemon.listeners.admit() as woken:
        position = daemon.store.events.ring.last if after is None else after
        response = web.StreamResponse(headers={"Content-Type": EVENTS_TYPE, "Cache-Control": "no-store"})
        response.enable_chunked_encoding()
        await response.prepare(request)
        follower = _Follower(daemon, request, response, woken)
        with suppress(ConnectionResetError):
            await follower.follow(position, wanted)
            await response.write_eof()
        return response


class _Follower:
    """One reader's stream. A reader that is slower than the events finds some of them lost.

    Args:
        daemon: whose events.
        request: the reader's.
        response: to write to, prepared.
        woken: set when there is something to do.
    """

    def __init__(
        self, daemon: Daemon, request: web.Request, response: web.StreamResponse, woken: asyncio.Event
    ) -> None:
        self._daemon = daemon
        self._ring = daemon.store.events.ring
        self._request = request
        self._response = response
        self._woken = woken
        self._loop = asyncio.get_running_loop()

    async def follow(self, position: int, wanted: EventFilter) -> None:
        """Write what comes after `position` until the daemon stops. Raises ConnectionResetError: the reader left."""
        await self._write(encode_position(position))
        written_at = time.monotonic()
        try:
            while not self._daemon.listeners.stopping:
                found = self._ring.read(position)
                blocks = [encode(event) for event in found if wanted.wants(event)]
                position = found[-1].seq if found else position
                if not blocks and time.monotonic() - written_at >= KEEP_ALIVE_SECONDS:
                    blocks.append(encode_position(position))
                if blocks:
                    await self._write(b"".join(blocks))
                    written_at = time.monotonic()
                elif found:
                    await asyncio.sleep(0)  # others have their turn while events that nobody wants are passed over
                elif not await self._wait(position, written_at + KEEP_ALIVE_SECONDS):
                    return
        finally:
            self._ring.forget(self._wake)

    async def _wait(self, position: int, until: float) -> bool:
        """Wait for an event after `position`, or until a moment of time.monotonic; False if there will be none."""
        self._woken.clear()
        if not self._ring.wake_after(position, self._wake):
            return not (self._ring.closed and self._ring.last == position)
        with suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, until - time.monotonic())):
                await self._woken.wait()
        self._ring.forget(self._wake)
        return True

    def _wake(self) -> None:
        with suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._woken.set)

    async def _write(self, data: bytes) -> None:
        try:
            async with asyncio.timeout(self._daemon.config.lease_ttl_seconds):
                await self._response.write(data)
        except TimeoutError:
            if self._request.transport is not None:
                self._request.transport.abort()
            raise ConnectionResetError("the reader took nothing for too long") from None


def _filter(request: web.Request, daemon: Daemon) -> EventFilter:
    """What the query asks for. Raises RefusalError (400) naming the parameter."""
    for name in request.query:
        if name not in PARAMETERS:
            raise RefusalError(400, "invalid", str(unknown_name("parameter", name[:80], PARAMETERS)), name[:80])
    tiers = request.query.getall("tier", [])
    names = [tier.name for tier in daemon.store.tiers]
    for tier in tiers:
        if tier not in names:
            raise RefusalError(400, "invalid", str(unknown_name("tier", tier[:80], names)), "tier")
    try:
        return EventFilter(tiers, request.query.getall("kind", []))
    except ConfigError as error:
        raise RefusalError(400, "invalid", str(error), "kind") from error


def _after(request: web.Request) -> int | None:
    """The number to go on after, from the header that a browser sends or the query; None for from now on."""
    for field, text in ((LAST_EVENT_ID, request.headers.get(LAST_EVENT_ID)), ("after", request.query.get("after"))):
        if text is not None:
            if not (text.isascii() and text.isdigit() and len(text) < 20):
                raise RefusalError(400, "invalid", f"{field} is {text!r:.80}; give the id of an event", field)
            return int(text)
    return None
