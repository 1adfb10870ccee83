"""Puts of a remote client: containers written once, into staging memory the daemon reads or a buffer that is sent."""

from __future__ import annotations

import time
from collections.abc import Sequence

from kvstore.arguments import write_chunk
from kvstore.client import PutChunk
from kvstore.connectors.remote_http import UnreachableError
from kvstore.connectors.remote_link import GRACE_SECONDS, Link, counted, decode
from kvstore.connectors.remote_session import ClientSession
from kvstore.container import align
from kvstore.outcome import PutStatus, Reason
from kvstore.protocol import HeadReply, KeysRequest, PutEntry, PutRequest, StatusesReply
from kvstore.tier import IO_ALIGN

_LATE = PutStatus(stored=False, reason=Reason.DEADLINE, detail="not sent by the deadline")


class RemotePut:
    """One put. `run` is used once.

    Args:
        link: the way to the daemon.
        chunks: what to store; the caller's `write`s run in this thread.
        durable: whether to wait until they would survive kill -9.
        deadline: time.monotonic seconds.
    """

    def __init__(self, link: Link, chunks: Sequence[PutChunk], *, durable: bool, deadline: float) -> None:
        self._link = link
        self._chunks = chunks
        self._durable = durable
        self._deadline = deadline
        self._statuses: list[PutStatus | None] = [None] * len(chunks)

    def run(self) -> list[PutStatus]:
        """One status a chunk. Raises only what a `write` raises, and ConfigError for one that answers no size."""
        try:
            self._skip_existing()
        except UnreachableError as error:
            return [_refused(error)] * len(self._chunks)
        session = self._link.session(self._deadline) if self._todo() else None
        if session is not None:
            self._put_shared(session)
        for index in self._todo():
            self._statuses[index] = self._put_body(self._chunks[index])
        return [status for status in self._statuses if status is not None]

    def _todo(self) -> list[int]:
        return [index for index, status in enumerate(self._statuses) if status is None]

    def _skip_existing(self) -> None:
        """Answer for chunks that are there already, without writing them. Raises UnreachableError."""
        body = KeysRequest(keys=[chunk.key.hex() for chunk in self._chunks])
        reply = self._link.ask("head", body, HeadReply, deadline=self._deadline, keys=len(self._chunks))
        volatile: list[int] = []
        for index, entry in enumerate(counted(reply.chunks, len(self._chunks))):
            if entry is not None:
                self._statuses[index] = PutStatus(stored=True, durable=entry.durable, existed=True)
                if self._durable and not entry.durable:
                    volatile.append(index)
        if volatile:
            self._make_durable(volatile)

    def _make_durable(self, indices: list[int]) -> None:
        """Ask for the durability of chunks that are there, without their bytes. Raises UnreachableError."""
        chunks = [self._chunks[index] for index in indices]
        entries = [PutEntry(key=chunk.key.hex(), parent=chunk.parent.hex()) for chunk in chunks]
        body = PutRequest(chunks=entries, durable=True, deadline_ms=self._remaining_ms())
        reply = self._link.ask("put", body, StatusesReply, deadline=self._deadline)
        for index, status in zip(indices, counted(reply.statuses, len(indices)), strict=True):
            evicted_meanwhile = not status.stored and status.reason == Reason.ABSENT
            self._statuses[index] = None if evicted_meanwhile else status

    def _put_shared(self, session: ClientSession) -> None:
        """Put what fits the staging memory, batch after batch; the rest stays to be done."""
        if not session.staging_lock.acquire(timeout=max(0.0, self._deadline - time.monotonic())):
            return
        try:
            todo = [index for index in self._todo() if self._chunks[index].nbytes_max <= len(session.staging)]
            while todo and session.alive:
                todo = self._put_batch(session, todo)
        finally:
            session.staging_lock.release()

    def _put_batch(self, session: ClientSession, todo: list[int]) -> list[int]:
        """Write as many as fit, hand them over, and answer what is left."""
        entries: list[PutEntry] = []
        end = 0
        for index in todo:
            chunk = self._chunks[index]
            if end + chunk.nbytes_max > len(session.staging):
                break
            nbytes = write_chunk(chunk, session.staging[end : end + chunk.nbytes_max])
            entries.append(PutEntry(key=chunk.key.hex(), parent=chunk.parent.hex(), offset=end, nbytes=nbytes))
            end = align(end + nbytes, IO_ALIGN)
        body = PutRequest(chunks=entries, durable=self._durable, deadline_ms=self._remaining_ms())
        try:
            reply = self._link.ask("put", body, StatusesReply, deadline=self._deadline, session=session)
            statuses = counted(reply.statuses, len(entries))
        except UnreachableError as error:
            # The daemon may still be reading the staging memory, so it must not be written again.
            session.close()
            if error.code == "no_session":  # a daemon that has been restarted: what has been written is sent instead
                staged = [session.staging[entry.offset : entry.offset + entry.nbytes] for entry in entries]
                statuses = [self._send(self._chunks[index], data) for index, data in zip(todo, staged, strict=False)]
            else:
                statuses = [_refused(error)] * len(entries)
        for index, status in zip(todo, statuses, strict=False):
            self._statuses[index] = status
        return todo[len(entries) :]

    def _put_body(self, chunk: PutChunk) -> PutStatus:
        """Put one chunk as the body of a request."""
        bytes_max = self._link.info.request_bytes_max
        if chunk.nbytes_max > bytes_max:
            detail = f"{chunk.nbytes_max} bytes; the daemon takes {bytes_max} a request"
            return PutStatus(stored=False, reason=Reason.TOO_LARGE, detail=detail)
        if time.monotonic() >= self._deadline:
            return _LATE
        buffer = self._link.buffers.take(chunk.nbytes_max)
        try:
            return self._send(chunk, buffer[: write_chunk(chunk, buffer[: chunk.nbytes_max])])
        finally:
            self._link.buffers.give(buffer)

    def _send(self, chunk: PutChunk, data: memoryview) -> PutStatus:
        try:
            path = f"/v1/chunks/{chunk.key.hex()}?parent={chunk.parent.hex()}&durable={int(self._durable)}"
            path += f"&deadline_ms={self._remaining_ms():.0f}"
            reply = decode(self._link.call("PUT", path, data, self._deadline + GRACE_SECONDS), StatusesReply)
            return counted(reply.statuses, 1)[0]
        except UnreachableError as error:
            return _refused(error)

    def _remaining_ms(self) -> float:
        return max(0.0, (self._deadline - time.monotonic()) * 1000)


def _refused(error: UnreachableError) -> PutStatus:
    return PutStatus(stored=False, reason=error.miss.reason, detail=error.miss.detail)
