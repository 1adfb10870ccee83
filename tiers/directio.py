"""Parallel positioned I/O on one file, past the page cache where the file system allows it.

A batch of spans (bytes of the caller <-> a place in the file) is cut into pieces that a few threads move at once;
that is the queue depth the device sees. Under O_DIRECT memory, offset and length of every transfer must be multiples
of
IO_ALIGN: what is aligned moves straight from or to the caller's memory, the tail of a span through one aligned page,
and what is not aligned at all through a bounded pool of aligned buffers.

Nothing here waits on a clock for the device: a transfer whose buffers the kernel may still fill cannot be abandoned.
EINTR is retried by Python itself (PEP 475).
"""

from __future__ import annotations

import errno
import os
import queue
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, Protocol, runtime_checkable

import msgspec
import numpy as np

from kvstore.buffers import aligned_buffer
from kvstore.tier import IO_ALIGN
from kvstore.tiers.pieces import Piece, joined, slice_of

PIECE_BYTES_DEFAULT = 4 << 20
THREADS_DEFAULT = 8
BOUNCE_WAIT_SECONDS = 60.0


class Io(Protocol):
    """The system calls a volume needs. Tests put one in their place that fails on purpose."""

    def open(self, path: str, flags: int) -> int:
        """A file descriptor."""

    def close(self, descriptor: int) -> None:
        """Close it."""

    def read(self, descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        """Bytes read into `buffers`; may be fewer than they hold."""

    def write(self, descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        """Bytes written from `buffers`; may be fewer than they hold."""

    def sync(self, descriptor: int) -> None:
        """Return when what was written has reached the device's durable memory."""

    def allocate(self, descriptor: int, nbytes: int) -> None:
        """Make the first `nbytes` of the file exist on the device."""


@runtime_checkable
class SupportsDeviceIo(Protocol):
    """System calls that can also fill memory on a device."""

    def start_device_read(self, descriptor: int, target: Any, nbytes: int, offset: int) -> Callable[[], int]:
        """Begin to fill `nbytes` of `target`; what is answered waits for the end and says how many were read."""

    def describe(self) -> dict[str, Any]:
        """How transfers go here; JSON types only."""


class PosixIo:
    """The real system calls."""

    def open(self, path: str, flags: int) -> int:
        """A file descriptor, closed on exec; a new file is private to its owner."""
        return os.open(path, flags | os.O_CLOEXEC, 0o600)

    def close(self, descriptor: int) -> None:
        """Close it."""
        os.close(descriptor)

    def read(self, descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        """preadv."""
        return os.preadv(descriptor, buffers, offset)

    def write(self, descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        """pwritev."""
        return os.pwritev(descriptor, buffers, offset)

    def sync(self, descriptor: int) -> None:
        """fdatasync."""
        os.fdatasync(descriptor)

    def allocate(self, descriptor: int, nbytes: int) -> None:
        """posix_fallocate."""
        os.posix_fallocate(descriptor, 0, nbytes)


class Span(msgspec.Struct, frozen=True):
    """`nbytes` of the caller's memory at the start of `view`, and where they lie in the file."""

    view: memoryview
    position: int
    nbytes: int


def address(view: memoryview) -> int:
    """Address of the first byte of a non-empty contiguous view."""
    return int(np.frombuffer(view, dtype=np.uint8).__array_interface__["data"][0])


def page_up(nbytes: int) -> int:
    """The first multiple of IO_ALIGN at or after `nbytes`."""
    return -(-nbytes // IO_ALIGN) * IO_ALIGN


def probe_direct(io: Io, path: str, first_page: bytes) -> int | None:
    """A descriptor of `path` opened with O_DIRECT if a real read and write of its first page work, else None.

    The page is written only if `first_page` is what was read: a bit that was read wrong must not be stored.
    """
    try:
        descriptor = io.open(path, os.O_RDWR | os.O_DIRECT)
    except OSError:
        return None
    page = aligned_buffer(IO_ALIGN)
    try:
        read = io.read(descriptor, [page], 0)
        if read == IO_ALIGN and page == first_page and io.write(descriptor, [page], 0) == IO_ALIGN:
            return descriptor
    except OSError:
        pass
    io.close(descriptor)
    return None


class ParallelFile:
    """Reads and writes batches of spans of one open file. Safe to use from many threads."""

    def __init__(
        self,
        io: Io,
        descriptor: int,
        *,
        direct: bool,
        threads: int = THREADS_DEFAULT,
        piece_bytes: int = PIECE_BYTES_DEFAULT,
    ) -> None:
        if threads < 1:
            raise ValueError(f"threads is {threads}; it must be at least 1")
        if piece_bytes < 2 * IO_ALIGN or piece_bytes % IO_ALIGN:
            raise ValueError(f"piece_bytes is {piece_bytes}; it must be a multiple of {IO_ALIGN}, at least twice that")
        self._io = io
        self._descriptor = descriptor
        self._threads = threads
        self._piece_bytes = piece_bytes
        self.direct = direct
        self._align = IO_ALIGN if direct else 1
        # Readers never queue behind a batch of writes: each direction has its own threads.
        self._readers = ThreadPoolExecutor(threads, "kvstore-read")
        self._writers = ThreadPoolExecutor(threads, "kvstore-write")
        self._bounce: queue.Queue[memoryview | None] = queue.Queue()
        for _ in range(threads):
            self._bounce.put(None)

    def read(self, spans: Sequence[Span]) -> list[OSError | None]:
        """Fill every span's memory from the file; one error or None a span.

        Bytes of a view behind `nbytes`, up to the next page, may be overwritten with what follows in the file.
        """
        tails: list[tuple[memoryview, memoryview]] = []
        pieces: deque[Piece] = deque()
        for index, span in enumerate(spans):
            tail = self._cut(pieces, index, span, whole_pages=len(span.view) >= page_up(span.nbytes))
            if tail is not None:
                tails.append(tail)
        errors = self._run(self._readers, joined(pieces, self._piece_bytes, self._threads), self._read_piece)
        for page, target in tails:
            target[:] = page[: len(target)]
        return [errors.get(index) for index in range(len(spans))]

    def write(self, spans: Sequence[Span], meanwhile: Callable[[], None] | None = None) -> list[OSError | None]:
        """Write every span's bytes; one error or None a span. Under O_DIRECT the last page is filled up with zeros.

        `meanwhile` runs on the calling thread while the others write.
        """
        pieces: deque[Piece] = deque()
        for index, span in enumerate(spans):
            tail = self._cut(pieces, index, span, whole_pages=False)
            if tail is not None:
                page, source = tail
                page[: len(source)] = source
        errors = self._run(
            self._writers, joined(pieces, self._piece_bytes, self._threads), self._write_piece, meanwhile
        )
        return [errors.get(index) for index in range(len(spans))]

    @property
    def device_io(self) -> bool:
        """True if memory on a device can be filled."""
        return isinstance(self._io, SupportsDeviceIo)

    def describe(self) -> dict[str, Any]:
        """How bytes move here; JSON types only."""
        return self._io.describe() if isinstance(self._io, SupportsDeviceIo) else {"io_backend": "posix"}

    def start_device_read(self, target: Any, position: int, nbytes: int) -> Callable[[], OSError | None]:
        """Begin to fill memory on a device, where `device_io`; the answer waits for the end. Raises OSError."""
        assert isinstance(self._io, SupportsDeviceIo), "only some back ends reach a device's memory"
        wait_for = self._io.start_device_read(self._descriptor, target, nbytes, position)

        def end() -> OSError | None:
            try:
                got = wait_for()
            except OSError as error:
                return error
            return None if got == nbytes else OSError(errno.EIO, f"only {got} of {nbytes} bytes read at {position}")

        return end

    def sync(self) -> None:
        """Return when everything written before has reached the device. Raises OSError."""
        self._io.sync(self._descriptor)

    def close(self) -> None:
        """Stop the threads and close the file."""
        self._readers.shutdown()
        self._writers.shutdown()
        self._io.close(self._descriptor)

    def _cut(
        self, pieces: deque[Piece], index: int, span: Span, *, whole_pages: bool
    ) -> tuple[memoryview, memoryview] | None:
        """Append the pieces of one span; answers (page, part of the view) if its tail needs a page of its own."""
        if not span.nbytes:
            return None
        tail = None
        buffers = [span.view[: span.nbytes]]
        if self.direct:
            if (address(span.view) | span.position) % IO_ALIGN:
                for start in range(0, span.nbytes, self._piece_bytes - IO_ALIGN):
                    part = span.view[start : min(start + self._piece_bytes - IO_ALIGN, span.nbytes)]
                    pieces.append(Piece(index, span.position + start, [], part))
                return None
            body = span.nbytes // IO_ALIGN * IO_ALIGN
            if whole_pages:
                buffers = [span.view[: page_up(span.nbytes)]]
            elif body < span.nbytes:
                tail = (aligned_buffer(IO_ALIGN), span.view[body : span.nbytes])
                buffers = [span.view[:body], tail[0]]
        total = sum(map(len, buffers))
        for start in range(0, total, self._piece_bytes):
            part_buffers = slice_of(buffers, start, min(start + self._piece_bytes, total))
            pieces.append(Piece(index, span.position + start, part_buffers, span.view))
        return tail

    def _run(
        self,
        executor: ThreadPoolExecutor,
        pieces: deque[Piece],
        move: Callable[[Piece], None],
        meanwhile: Callable[[], None] | None = None,
    ) -> dict[int, OSError]:
        """Move all pieces, the calling thread lending a hand after `meanwhile`; answers the first error of each span
        that had one.
        """
        errors: dict[int, OSError] = {}

        def work() -> None:
            while True:
                try:
                    piece = pieces.popleft()
                except IndexError:
                    return
                if piece.parts or piece.span not in errors:
                    try:
                        move(piece)
                    except OSError as error:
                        if piece.parts:
                            pieces.extend(piece.parts)  # one by one, to learn whose trouble it is
                        else:
                            errors.setdefault(piece.span, error)

        helpers = [executor.submit(work) for _ in range(min(self._threads, len(pieces)) - 1)]
        try:
            if meanwhile is not None:
                meanwhile()
            work()
        finally:
            # Also when this thread was interrupted: nothing may touch the caller's memory after the return.
            pieces.clear()
            wait([helper for helper in helpers if not helper.cancel()])
        for helper in helpers:
            if not helper.cancelled():
                helper.result()
        return errors

    def _read_piece(self, piece: Piece) -> None:
        if piece.buffers:
            _move_all(self._io.read, self._descriptor, piece.buffers, piece.position, self._align)
            return
        skip = piece.position % IO_ALIGN
        bounce = self._take_bounce()
        try:
            pages = bounce[: page_up(skip + len(piece.view))]
            _move_all(self._io.read, self._descriptor, [pages], piece.position - skip, self._align)
            _copy(piece.view, pages[skip : skip + len(piece.view)])
        finally:
            self._bounce.put(bounce)

    def _write_piece(self, piece: Piece) -> None:
        if piece.buffers:
            _move_all(self._io.write, self._descriptor, piece.buffers, piece.position, self._align)
            return
        bounce = self._take_bounce()
        try:
            pages = bounce[: page_up(len(piece.view))]
            _copy(pages[: len(piece.view)], piece.view)
            pages[len(piece.view) :] = bytes(len(pages) - len(piece.view))
            _move_all(self._io.write, self._descriptor, [pages], piece.position, self._align)
        finally:
            self._bounce.put(bounce)

    def _take_bounce(self) -> memoryview:
        try:
            bounce = self._bounce.get(timeout=BOUNCE_WAIT_SECONDS)
        except queue.Empty:
            raise OSError(errno.EBUSY, f"no bounce buffer came free within {BOUNCE_WAIT_SECONDS:g} s") from None
        return aligned_buffer(self._piece_bytes) if bounce is None else bounce


def _copy(target: memoryview, source: memoryview) -> None:
    """Copy without holding the interpreter's lock."""
    np.copyto(np.frombuffer(target, dtype=np.uint8), np.frombuffer(source, dtype=np.uint8))


def _move_all(
    call: Callable[[int, Sequence[memoryview], int], int],
    descriptor: int,
    buffers: Sequence[memoryview],
    position: int,
    align: int,
) -> None:
    """Repeat a read or write until all of `buffers` is moved. Raises OSError (EIO if it makes no progress)."""
    total = sum(map(len, buffers))
    done = 0
    while done < total:
        moved = call(descriptor, slice_of(buffers, done, total) if done else buffers, position + done)
        moved -= moved % align  # direct I/O can only go on from an aligned place
        if moved <= 0:
            raise OSError(errno.EIO, f"only {done} of {total} bytes moved at {position}")
        done += moved
