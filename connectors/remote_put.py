"""Puts of a remote client: containers written once, into staging memory the daemon reads or a buffer that is sent."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvstore.client import PutChunk
from kvstore.connectors.remote_http import UnreachableError
from kvstore.connectors.remote_session import ClientSession
from kvstore.container import align
from kvstore.errors import ConfigError
from kvstore.keys import KEY_BYTES
from kvstore.outcome import PutStatus, Reason
from kvstore.protocol import PutEntry, PutRequest, StatusesReply
from kvstore.tier import IO_ALIGN

if TYPE_CHECKING:
    from kvstore.connectors.remote import RemoteClient


class RemotePut:
    """One put. `run` is used once.

    Args:
        client: whose connections, session and buffers to use.
        chunks: what to store; the caller's `write`s run in this thread.
        durable: whether to wait until they would survive kill -9.
        deadline: time.monotonic seconds.
    """

    def __init__(self, client: RemoteClient, chunks: Sequence[PutChunk], *, durable: bool, deadline: float) -> None:
        for chunk in chunks:
            if len(chunk.parent) != KEY_BYTES or chunk.nbytes_max < 1:
                raise ConfigError(f"chunk {chunk.key.hex()[:12]} has a bad parent key or nbytes_max {chunk.nbytes_max}")
        self._client = client
        self._chunks = chunks
        self._durable = durable
        self._deadline = deadline
        self._statuses: list[PutStatus | None] = [None] * len(chunks)

    def run(self) -> list[PutStatus]:
        """One status a chunk. Raises only what a `write` raises."""
        self._skip_existing()
        session = self._client.session()
        if session is not None:
            self._put_shared(session)
        for index in self._todo():
            self._put_body(index)
        missing = PutStatus(stored=False, reason=Reason.UNAVAILABLE, detail="the daemon did not answer")
        return [missing if status is None else status for status in self._statuses]

    def _todo(self) -> list[int]:
        return [index for index, status in enumerate(self._statuses) if status is None]

    def _skip_existing(self) -> None:
        """Answer for chunks that are there already, without writing them."""
        entries = self._client.head_entries([chunk.key for chunk in self._chunks], self._deadline)
        for index, entry in enumerate(entries):
            if entry is not None:
                self._statuses[index] = PutStatus(stored=True, durable=entry.durable, existed=True)
        if self._durable:
            self._make_durable(
                [i for i, status in enumerate(self._statuses) if status is not None and not status.durable]
            )

    def _make_durable(self, indices: list[int]) -> None:
        """Ask for the durability of chunks that are there, without their bytes; those that have gone stay to be done."""
        if not indices:
            return
        chunks = [self._chunks[index] for index in indices]
        entries = [PutEntry(key=chunk.key.hex(), parent=chunk.parent.hex()) for chunk in chunks]
        body = PutRequest(chunks=entries, durable=True, deadline_ms=self._remaining_ms())
        try:
            statuses = self._client.ask("put", body, StatusesReply, deadline=self._deadline).statuses
        except UnreachableError:
            return
        for index, status in zip(indices, statuses, strict=False):
            self._statuses[index] = status if status.stored or status.reason != Reason.ABSENT else None

    def _put_shared(self, session: ClientSession) -> None:
        """Put what fits the staging memory, batch after batch; the rest stays to be done."""
        if not session.staging_lock.acquire(timeout=max(0.0, self._deadline - time.monotonic())):
            late = PutStatus(stored=False, reason=Reason.DEADLINE, detail="another put was using the staging memory")
            for index in self._todo():
                self._statuses[index] = late
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
        batch: list[int] = []
        end = 0
        for index in todo:
            chunk = self._chunks[index]
            if end + chunk.nbytes_max > len(session.staging):
                break
            nbytes = chunk.write(session.staging[end : end + chunk.nbytes_max])
            entries.append(PutEntry(key=chunk.key.hex(), parent=chunk.parent.hex(), offset=end, nbytes=nbytes))
            batch.append(index)
            end = align(end + nbytes, IO_ALIGN)
        body = PutRequest(chunks=entries, durable=self._durable, deadline_ms=self._remaining_ms())
        try:
            statuses = self._client.ask("put", body, StatusesReply, deadline=self._deadline, session=session).statuses
            if len(statuses) != len(batch):
                raise UnreachableError(
                    Reason.UNAVAILABLE, f"the daemon answered {len(statuses)} of {len(batch)} chunks"
                )
        except UnreachableError as error:
            # The daemon may still be reading the staging memory, so it must not be written again.
            session.close()
            statuses = [PutStatus(stored=False, reason=error.miss.reason, detail=error.miss.detail)] * len(batch)
        for index, status in zip(batch, statuses, strict=True):
            self._statuses[index] = status
        return todo[len(batch) :]

    def _put_body(self, index: int) -> None:
        """Put one chunk as the body of a request."""
        chunk = self._chunks[index]
        if chunk.nbytes_max > self._client.info.request_bytes_max:
            detail = f"{chunk.nbytes_max} bytes; the daemon takes {self._client.info.request_bytes_max} a request"
            self._statuses[index] = PutStatus(stored=False, reason=Reason.TOO_LARGE, detail=detail)
            return
        buffer = self._client.buffers.take(chunk.nbytes_max)
        try:
            nbytes = chunk.write(buffer[: chunk.nbytes_max])
            path = f"/v1/chunks/{chunk.key.hex()}?parent={chunk.parent.hex()}&durable={int(self._durable)}"
            reply = self._client.put_body(
                f"{path}&deadline_ms={self._remaining_ms():.0f}", buffer[:nbytes], self._deadline
            )
            self._statuses[index] = reply.statuses[0] if reply.statuses else None
        except UnreachableError as error:
            self._statuses[index] = PutStatus(stored=False, reason=error.miss.reason, detail=error.miss.detail)
        finally:
            self._client.buffers.give(buffer)

    def _remaining_ms(self) -> float:
        return max(0.0, (self._deadline - time.monotonic()) * 1000)
