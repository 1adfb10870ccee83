"""Sending large bytes on a connection: from memory to the socket in pieces, under back-pressure and a stall limit.

Bytes are copied into the socket (`send`), not lent to it (`sendfile`): sendfile puts the arena's own pages into the
connection, where a slow reader would see them after they have been reused for another chunk. Over loopback it was not
faster either.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from aiohttp import web
from aiohttp.abc import AbstractStreamWriter

PIECE_BYTES = 256 * 1024
"""asyncio copies what the socket does not take at once; pieces keep that copy small."""


class Sender:
    """Writes a prepared response's body.

    Args:
        request: whose connection it is.
        writer: what `response.prepare` returned; its headers have been sent.
        stall_seconds: a reader that takes nothing for so long loses the connection.
    """

    def __init__(self, request: web.Request, writer: AbstractStreamWriter, stall_seconds: float) -> None:
        self._transport = request.transport
        self._writer = writer
        self._stall_seconds = stall_seconds

    async def send(self, piece: bytes | memoryview) -> None:
        """Send all of `piece`, which is no longer used when this returns or raises.

        Raises:
            ConnectionResetError: the reader has gone, or takes nothing.
        """
        for start in range(0, len(piece), PIECE_BYTES):
            if self._transport is None or self._transport.is_closing():
                raise ConnectionResetError("the reader has gone")
            self._transport.write(piece[start : start + PIECE_BYTES])
            await self.drain()

    async def drain(self) -> None:
        """Wait until the reader has taken enough. Raises ConnectionResetError if it takes nothing."""
        try:
            async with asyncio.timeout(self._stall_seconds):
                await self._writer.drain()
        except TimeoutError:
            self.abort()
            raise ConnectionResetError(f"the reader took nothing for {self._stall_seconds:g} seconds") from None

    async def send_http_chunk(self, pieces: Iterable[bytes | memoryview]) -> None:
        """Send the pieces as one chunk of a chunked body."""
        pieces = list(pieces)
        total = sum(len(piece) for piece in pieces)
        small = [b"%x\r\n" % total]
        for piece in pieces:
            if len(piece) <= PIECE_BYTES // 4:
                small.append(bytes(piece))
                continue
            await self.send(b"".join(small))
            small.clear()
            await self.send(piece)
        small.append(b"\r\n")
        await self.send(b"".join(small))

    def abort(self) -> None:
        """Drop the connection and what is buffered for it, so that nothing of a cut answer looks whole."""
        if self._transport is not None:
            self._transport.abort()
