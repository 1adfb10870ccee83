"""The stream of a fetch, read: frames into parts. Trusts nothing in it but what it has checked."""

from __future__ import annotations

import http.client
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import msgspec

from kvstore import container
from kvstore.buffers import aligned_buffer
from kvstore.client import Part
from kvstore.codec import LayerSegments
from kvstore.connectors.remote_session import ClientSession
from kvstore.container import Header, Segment
from kvstore.errors import ContainerError, ServiceError
from kvstore.levels import parse_up_to
from kvstore.outcome import Miss, Reason
from kvstore.protocol import CHUNK_BYTES_MAX, FRAME_HEADER_BYTES_MAX, FRAME_PREFIX, Frame

_FRAMES = msgspec.json.Decoder(Frame)
READ_BYTES = 64 * 1024
BUFFERS_KEPT_MAX = 4

EXPIRED = Miss(Reason.DEADLINE, "the lease on the chunk's bytes expired before they were read")


class Buffers:
    """Receive and send buffers, used again so that their pages stay warm. Safe for many threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free: list[memoryview] = []

    def take(self, nbytes: int) -> memoryview:
        """Writable memory of at least `nbytes`."""
        with self._lock:
            for index, buffer in enumerate(self._free):
                if len(buffer) >= nbytes:
                    return self._free.pop(index)
        return aligned_buffer(max(1, nbytes))

    def give(self, buffer: memoryview) -> None:
        """Give memory back; the caller uses no view of it any more."""
        with self._lock:
            self._free.append(buffer)
            if len(self._free) > BUFFERS_KEPT_MAX:
                self._free.remove(min(self._free, key=len))


class FrameSource:
    """Frames out of an HTTP answer.

    Raises, from every method, ServiceError for what is not the protocol, OSError and HTTPException for the connection.
    """

    def __init__(self, answer: http.client.HTTPResponse) -> None:
        self._answer = answer
        self._data = b""
        self._at = 0

    @property
    def drained(self) -> bool:
        """True if the next frame has not arrived yet, as far as is known without asking."""
        return self._at == len(self._data)

    def next(self) -> Frame:
        """The next frame's header."""
        (nbytes,) = FRAME_PREFIX.unpack(self._take(FRAME_PREFIX.size))
        if not 0 < nbytes <= FRAME_HEADER_BYTES_MAX:
            raise ServiceError(f"a frame header of {nbytes} bytes; at most {FRAME_HEADER_BYTES_MAX}")
        try:
            return _FRAMES.decode(self._take(nbytes))
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise ServiceError(f"a frame header is not one: {error}") from error

    def payload(self, target: memoryview) -> None:
        """Fill `target` with the next payload bytes."""
        done = min(len(target), len(self._data) - self._at)
        target[:done] = self._data[self._at : self._at + done]
        self._at += done
        while done < len(target):
            count = self._answer.readinto(target[done:])
            if not count:
                raise ServiceError("the stream was cut short")
            done += count

    def _take(self, nbytes: int) -> bytes:
        while len(self._data) - self._at < nbytes:
            more = self._answer.read1(READ_BYTES)
            if not more:
                raise ServiceError("the stream was cut short")
            self._data = self._data[self._at :] + more
            self._at = 0
        taken = self._data[self._at : self._at + nbytes]
        self._at += nbytes
        return taken


class _Chunk:
    """What is known so far of one chunk of the fetch."""

    __slots__ = ("done", "given_up", "groups", "header", "next_group")

    def __init__(self) -> None:
        self.header: Header | None = None
        self.groups: list[tuple[Segment, ...]] = []
        self.next_group = 0
        self.done = False
        self.given_up = False

    def accept(self, head: memoryview, available: int, key: bytes, level_max: int | None) -> None:
        """Check the header, in memory that nobody else writes. Raises ContainerError."""
        self.header = parse_up_to(head, level_max, available=available)
        container.expect(self.header, key=key)
        self.groups = self.header.groups()


class PartReader:
    """The parts of one fetch.

    Args:
        source: frames.
        keys: what was asked for.
        buffers: where inline payloads go.
        session: whose arena frames may refer to; None if none may.
        level_max: the highest quality level asked for; None for all.
    """

    def __init__(
        self,
        source: FrameSource,
        keys: Sequence[bytes],
        buffers: Buffers,
        session: ClientSession | None,
        level_max: int | None = None,
    ) -> None:
        self._source = source
        self._keys = keys
        self._buffers = buffers
        self._session = session
        self._level_max = level_max
        self._buffer: memoryview | None = None
        self._chunks = [_Chunk() for _ in keys]
        self._fetch = 0

    def parts(self) -> Iterator[Part]:
        """Parts up to the end frame.

        Raises:
            ServiceError, OSError, HTTPException: the stream broke; chunks in `unfinished` have missed.
        """
        opening = self._source.next()
        if opening.kind != "open":
            raise ServiceError(f"the stream begins with a frame of kind {opening.kind}")
        self._fetch = opening.fetch
        frames = acknowledged = 0
        finished = False
        try:
            while True:
                if self._session is not None and frames > acknowledged and self._source.drained:
                    self._session.acknowledge(self._fetch, frames)
                    acknowledged = frames
                frame = self._source.next()
                if frame.kind == "end":
                    finished = True
                    return
                part = self._part(frame)
                if part is not None:
                    yield part
                frames += 1
        finally:
            if self._session is not None:
                self._session.acknowledge(self._fetch, *([frames] if finished else []))
            if self._buffer is not None:
                self._buffers.give(self._buffer)

    @property
    def unfinished(self) -> list[int]:
        """Indices of chunks that have neither missed nor been delivered whole."""
        return [index for index, chunk in enumerate(self._chunks) if not chunk.done]

    def _part(self, frame: Frame) -> Part | None:
        """The part that a frame is; None if it is more of a chunk that has been given up here."""
        payload = self._payload(frame.payload_bytes)
        chunk = self._chunks[frame.index] if 0 <= frame.index < len(self._chunks) else None
        if chunk is not None and chunk.given_up:
            return None
        if chunk is None or chunk.done:
            raise ServiceError(f"a frame for chunk {frame.index}, which is not awaited")
        if frame.kind == "miss":
            return self._miss(frame.index, frame.miss or Miss(Reason.UNAVAILABLE, "no reason given"))
        try:
            if frame.offset >= 0:
                return self._lent(frame, chunk)
            if frame.kind == "chunk":
                chunk.accept(payload, len(payload), self._keys[frame.index], self._level_max)
                return self._whole(frame, chunk, payload)
            if frame.kind == "layers":
                return self._layers(frame, chunk, payload)
        except ContainerError as error:
            return self._give_up(frame.index, Miss(error.reason, error.detail))
        raise ServiceError(f"a frame of kind {frame.kind} in the middle of the stream")

    def _payload(self, nbytes: int) -> memoryview:
        if not 0 <= nbytes <= CHUNK_BYTES_MAX:
            raise ServiceError(f"a payload of {nbytes} bytes; at most {CHUNK_BYTES_MAX}")
        if self._buffer is None or len(self._buffer) < nbytes:
            if self._buffer is not None:
                self._buffers.give(self._buffer)
            self._buffer = self._buffers.take(nbytes)
        payload = self._buffer[:nbytes]
        self._source.payload(payload)
        return payload.toreadonly()

    def _lent(self, frame: Frame, chunk: _Chunk) -> Part:
        if self._session is None:
            raise ServiceError("a frame refers to shared memory, which this client has not mapped")
        if time.monotonic() >= frame.expires_at:
            return self._give_up(frame.index, EXPIRED)
        try:
            view = self._session.arena.view(frame.offset, frame.nbytes)
        except ValueError as error:
            raise ServiceError(f"a frame refers to bytes outside the arena: {error}") from error
        if chunk.header is None:
            # Copied before it is checked: should the lease have been lost, the bytes may be changing.
            head = bytes(view[: container.peek_header_bytes(view)])
            chunk.accept(memoryview(head), len(view), self._keys[frame.index], self._level_max)
        if frame.kind == "chunk":
            return self._whole(frame, chunk, view)
        return self._deliver(frame, chunk, lambda segment: view[segment.offset : segment.offset + segment.length])

    def _whole(self, frame: Frame, chunk: _Chunk, view: memoryview) -> Part:
        whole = msgspec.structs.replace(frame, group=0, groups=len(chunk.groups))
        return self._deliver(whole, chunk, lambda segment: view[segment.offset : segment.offset + segment.length])

    def _layers(self, frame: Frame, chunk: _Chunk, payload: memoryview) -> Part:
        if chunk.header is None:
            if not 0 < frame.header_bytes <= len(payload):
                raise ServiceError("the first layers of a chunk came without its header")
            head = payload[: frame.header_bytes]
            chunk.accept(head, CHUNK_BYTES_MAX, self._keys[frame.index], self._level_max)
        coming = chunk.groups[frame.group : frame.group + frame.groups] if frame.group >= 0 else ()
        nbytes = frame.header_bytes + sum(segment.length for group in coming for segment in group)
        if nbytes != len(payload):  # before the chunk counts as delivered
            raise ServiceError(f"layers of {nbytes} bytes came with {len(payload)}")
        at = frame.header_bytes

        def take(segment: Segment) -> memoryview:
            nonlocal at
            at += segment.length
            return payload[at - segment.length : at]

        return self._deliver(frame, chunk, take)

    def _deliver(self, frame: Frame, chunk: _Chunk, bytes_of: Callable[[Segment], memoryview]) -> Part:
        stop = frame.group + frame.groups
        if frame.group != chunk.next_group or not frame.group <= stop <= len(chunk.groups):
            raise ServiceError(f"layer groups {frame.group} to {stop} came instead of {chunk.next_group}")
        chunk.next_group = stop
        chunk.done = stop == len(chunk.groups)
        groups: list[LayerSegments] = [
            [(segment, bytes_of(segment)) for segment in group] for group in chunk.groups[frame.group : stop]
        ]
        expires_at = frame.expires_at if frame.offset >= 0 else math.inf
        return Part(frame.index, None, chunk.header, tuple(groups), expires_at, frame.origin)

    def _miss(self, index: int, miss: Miss) -> Part:
        self._chunks[index].done = True
        return Part(index, miss)

    def _give_up(self, index: int, miss: Miss) -> Part:
        """A miss that the daemon does not know of: what it still sends of the chunk is skipped."""
        self._chunks[index].given_up = True
        return self._miss(index, miss)
