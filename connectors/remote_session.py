"""The client's end of a shared-memory session: the daemon's arena mapped read-only, and staging memory of its own."""

from __future__ import annotations

import fcntl
import mmap
import os
import select
import socket
import threading
import time

import msgspec

from kvstore.decoding import decode_json
from kvstore.errors import ServiceError, TierError
from kvstore.protocol import (
    ACK,
    ACK_ALL,
    SESSION_MESSAGE_BYTES_MAX,
    SESSION_SUFFIX,
    SESSION_VERSION,
    SessionHello,
    SessionReady,
    SessionStaging,
)
from kvstore.tiers.arena import ReaderArena

CLOCK_DIFFERENCE_SECONDS_MAX = 1.0
STAGING_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class ClientSession:
    """A session with the daemon at `socket_path`.

    Attributes:
        name: what requests carry in X-KVStore-Session.
        arena: the daemon's memory, read-only.
        staging: memory of this process that the daemon reads; hold `staging_lock` from writing to the put's answer.

    Raises:
        OSError: the daemon has no session socket, or does not answer in time.
        ServiceError, TierError: it answers, but a session is not possible.
    """

    def __init__(self, socket_path: str, *, timeout_seconds: float) -> None:
        self.staging_lock = threading.Lock()
        self._lock = threading.Lock()
        self._readers = 0
        self._alive = True
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self._socket.settimeout(timeout_seconds)
            self._socket.connect(socket_path + SESSION_SUFFIX)
            hello = self._receive_hello()
            self.name = hello.session
            self.staging = self._send_staging(hello.staging_bytes_max)
            ready = decode_json(self._socket.recv(SESSION_MESSAGE_BYTES_MAX), SessionReady)
            if ready.error:
                raise ServiceError(f"the daemon refused the session: {ready.error}")
        except msgspec.MsgspecError as error:
            self.close()
            raise ServiceError(f"the session socket does not speak the protocol: {error}") from error
        except BaseException:
            self.close()
            raise
        # An acknowledgement that does not fit the socket's buffer means that the daemon has stopped reading.
        self._socket.settimeout(1.0)

    @property
    def alive(self) -> bool:
        """False once the daemon has ended the session, or this side has."""
        with self._lock:
            if self._alive:
                # The daemon sends nothing after the handshake: if there is something to read, it is the end.
                poll = select.poll()
                poll.register(self._socket, select.POLLIN)
                self._alive = not poll.poll(0)
            return self._alive

    def begin_reading(self) -> bool:
        """Keep the session open until `end_reading`; False if it has ended already."""
        with self._lock:
            self._readers += self._alive
            return self._alive

    def end_reading(self) -> None:
        """Undo `begin_reading`."""
        with self._lock:
            self._readers -= 1
            if not self._alive and not self._readers:
                self._socket.close()

    def acknowledge(self, fetch: int, frames: int = ACK_ALL) -> None:
        """Tell the daemon that `frames` frames of a fetch are done with; by default that no more are wanted."""
        try:
            self._socket.send(ACK.pack(fetch, frames))
        except OSError:
            with self._lock:
                self._alive = False

    def close(self) -> None:
        """Use the session for nothing new; it ends once nobody reads under its leases any more. Idempotent."""
        with self._lock:
            self._alive = False
            if not self._readers:
                self._socket.close()

    def leave_to_parent(self) -> None:
        """In a forked process: let go of the session, which its parent goes on with."""
        self._lock = threading.Lock()
        self._alive = False
        self._socket.close()

    def _receive_hello(self) -> SessionHello:
        data, fds, _, _ = socket.recv_fds(self._socket, SESSION_MESSAGE_BYTES_MAX, 1)
        try:
            # A refusal has the shape of the last message, so that it can be said at any point.
            refusal = decode_json(data, SessionReady)
            if refusal.error:
                raise ServiceError(f"the daemon refused the session: {refusal.error}")
            hello = decode_json(data, SessionHello)
            if hello.version != SESSION_VERSION or len(fds) != 1:
                raise ServiceError(f"session version {hello.version} with {len(fds)} descriptors; this build speaks 1")
            if abs(hello.now - time.monotonic()) > CLOCK_DIFFERENCE_SECONDS_MAX:
                raise ServiceError(
                    "the daemon's clock is not this process's; leases cannot be told apart from expired ones"
                )
            self.arena = ReaderArena(fds[0], hello.arena_bytes)
            return hello
        except TierError as error:
            raise ServiceError(str(error)) from error
        finally:
            for fd in fds:
                os.close(fd)

    def _send_staging(self, nbytes: int) -> memoryview:
        """Staging memory of `nbytes`; its pages are backed only as they are written."""
        fd = os.memfd_create("kvstore-staging", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, nbytes)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, STAGING_SEALS)
            staging = memoryview(mmap.mmap(fd, nbytes))
            socket.send_fds(self._socket, [msgspec.json.encode(SessionStaging(nbytes))], [fd])
            return staging
        finally:
            os.close(fd)
