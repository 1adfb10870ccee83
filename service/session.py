"""Sessions: same-host clients that read the arena in place and hand over memory of their own.

A session is one connection to the session socket (SOCK_SEQPACKET, beside the daemon's UNIX socket). The daemon sends
its hello with the arena's descriptor, which can only be mapped read-only; the client answers with its staging memory;
from then on the client sends acknowledgements and nothing else. HTTP requests name the session in X-KVStore-Session.
Whatever a session holds ends when its connection does, so a client that dies releases everything at once.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import socket
import struct
import time
from contextlib import suppress
from typing import Protocol, cast

import msgspec

from kvstore.decoding import decode_json
from kvstore.errors import ServiceError
from kvstore.protocol import ACK, SESSION_MESSAGE_BYTES_MAX, SESSION_VERSION, SessionHello, SessionReady, SessionStaging
from kvstore.service.ledger import Ledger
from kvstore.service.refusal import RefusalError
from kvstore.service.staging import Staging
from kvstore.store import Store
from kvstore.tier import SupportsLease

_log = logging.getLogger(__name__)

SESSIONS_MAX = 256
FETCHES_MAX = 64
"""Fetches of one session whose leases have not all ended."""

HANDSHAKE_SECONDS = 5.0
_CREDENTIALS = struct.Struct("3i")


class SharedMemory(Protocol):
    """The arena of a tier that other processes can map."""

    @property
    def fd(self) -> int:
        """The descriptor to hand to readers."""

    @property
    def capacity_bytes(self) -> int:
        """Its size."""


class Session:
    """One connected client: its staging memory, and what its fetches have lent.

    Args:
        memory: the tier it reads in place.
        arena_bytes: capacity of that tier.
        lease_ttl_seconds: how long one lease lasts.
    """

    def __init__(self, memory: SupportsLease, arena_bytes: int, *, lease_ttl_seconds: float) -> None:
        self.name = secrets.token_hex(16)
        self.staging: Staging | None = None
        self._memory = memory
        self._lent_bytes_max = arena_bytes // 8
        self._lease_ttl_seconds = lease_ttl_seconds
        self._ledgers: dict[int, Ledger] = {}
        self._next_number = 1

    def open_fetch(self) -> Ledger:
        """A ledger for a new fetch. Raises RefusalError (429) if too many of this session's are open."""
        for number in [number for number, ledger in self._ledgers.items() if ledger.settled and ledger.sealed]:
            self._ledgers.pop(number).close()
        if len(self._ledgers) >= FETCHES_MAX:
            raise RefusalError(429, "busy", f"{FETCHES_MAX} fetches of this session are not acknowledged yet")
        ledger = Ledger(
            self._next_number,
            self._memory,
            self.name,
            ttl_seconds=self._lease_ttl_seconds,
            bytes_max=self._lent_bytes_max,
        )
        self._ledgers[ledger.number] = ledger
        self._next_number += 1
        return ledger

    def acknowledge(self, number: int, frames: int) -> None:
        """The client is done with the first `frames` frames of a fetch."""
        ledger = self._ledgers.get(number)
        if ledger is not None:
            ledger.acknowledge(frames)
            if ledger.settled and ledger.sealed:
                del self._ledgers[number]

    def end_fetch(self, ledger: Ledger) -> None:
        """No more frames of that fetch will be sent."""
        ledger.seal()
        if ledger.settled:
            self._ledgers.pop(ledger.number, None)

    def close(self) -> None:
        """End everything the session holds."""
        for ledger in self._ledgers.values():
            ledger.close()
        self._ledgers.clear()
        self._memory.release_owner(self.name)


class SessionServer:
    """Accepts sessions on a listening SOCK_SEQPACKET socket.

    Args:
        store: whose memory tier is shared.
        arena: that tier's shared memory.
        staging_bytes_max: largest staging memory of one client.
        lease_ttl_seconds: how long one lease lasts.
    """

    def __init__(self, store: Store, arena: SharedMemory, *, staging_bytes_max: int, lease_ttl_seconds: float) -> None:
        self._memory = cast(SupportsLease, store.memory)
        self._arena = arena
        self._staging_bytes_max = staging_bytes_max
        self._lease_ttl_seconds = lease_ttl_seconds
        self._sessions: dict[str, Session] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        return len(self._sessions)

    def get(self, name: str | None) -> Session:
        """The session of that name. Raises RefusalError (409) if there is none."""
        session = self._sessions.get(name or "")
        if session is None:
            raise RefusalError(409, "no_session", "no such session; connect to the session socket again")
        return session

    async def run(self, listener: socket.socket) -> None:
        """Accept clients until cancelled."""
        loop = asyncio.get_running_loop()
        try:
            while True:
                connection, _ = await loop.sock_accept(listener)
                if len(self._tasks) >= SESSIONS_MAX:
                    connection.close()
                    continue
                task = loop.create_task(self._serve(connection))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        session = Session(self._memory, self._arena.capacity_bytes, lease_ttl_seconds=self._lease_ttl_seconds)
        try:
            _check_peer(connection)
            async with asyncio.timeout(HANDSHAKE_SECONDS):
                session.staging = await self._shake_hands(connection, session.name)
            self._sessions[session.name] = session
            connection.send(msgspec.json.encode(SessionReady()))
            await _read_acknowledgements(connection, session)
        except (ServiceError, msgspec.MsgspecError) as error:
            _log.warning("session refused: %s", error)
            with suppress(OSError):
                connection.send(msgspec.json.encode(SessionReady(error=str(error)[:1000])))
        except (OSError, TimeoutError) as error:
            _log.info("session ended: %s", error or "no handshake in time")
        finally:
            self._sessions.pop(session.name, None)
            session.close()
            connection.close()

    async def _shake_hands(self, connection: socket.socket, name: str) -> Staging | None:
        hello = SessionHello(
            version=SESSION_VERSION,
            session=name,
            arena_bytes=self._arena.capacity_bytes,
            staging_bytes_max=self._staging_bytes_max,
            now=time.monotonic(),
        )
        socket.send_fds(connection, [msgspec.json.encode(hello)], [self._arena.fd])
        await _readable(connection)
        data, fds, flags, _ = socket.recv_fds(connection, SESSION_MESSAGE_BYTES_MAX, 1)
        try:
            if not data:
                raise ServiceError("the client left during the handshake")
            if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
                raise ServiceError("the client's hello is too long or carries more than one descriptor")
            staging = decode_json(data, SessionStaging)
            if not staging.staging_bytes and not fds:
                return None
            if len(fds) != 1:
                raise ServiceError("staging memory was announced without its descriptor")
            return Staging(fds[0], staging.staging_bytes, bytes_max=self._staging_bytes_max)
        finally:
            for fd in fds:
                os.close(fd)


def _check_peer(connection: socket.socket) -> None:
    """Raise ServiceError unless the peer is this user or root: file permissions may have been loosened."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    _, uid, _ = _CREDENTIALS.unpack(raw)
    if uid not in (0, os.geteuid()):
        raise ServiceError(f"user {uid} may not open a session; the daemon runs as user {os.geteuid()}")


async def _read_acknowledgements(connection: socket.socket, session: Session) -> None:
    """Hand on acknowledgements until the client closes. Raises ServiceError if it sends anything else."""
    loop = asyncio.get_running_loop()
    while data := await loop.sock_recv(connection, SESSION_MESSAGE_BYTES_MAX):
        if len(data) != ACK.size:
            raise ServiceError(f"a session message has {len(data)} bytes; an acknowledgement has {ACK.size}")
        session.acknowledge(*ACK.unpack(data))


async def _readable(connection: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    ready = loop.create_future()

    def wake() -> None:
        if not ready.done():
            ready.set_result(None)

    loop.add_reader(connection, wake)
    try:
        await ready
    finally:
        loop.remove_reader(connection)
