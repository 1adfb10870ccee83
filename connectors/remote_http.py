"""HTTP to one daemon over TCP, TLS or a UNIX socket: kept-alive connections, every wait under the caller's deadline."""

from __future__ import annotations

import http.client
import io
import socket
import ssl
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, BinaryIO
from urllib.parse import parse_qsl, urlsplit

import msgspec

from kvstore.config import unknown_name
from kvstore.errors import ConfigError
from kvstore.outcome import Miss, Reason
from kvstore.tenants import TENANT_HEADER, check_tenant_name

if TYPE_CHECKING:
    from typing_extensions import Buffer

IDLE_MAX = 8
"""Connections kept for the next call."""

CONNECTIONS_MAX = 32
"""Calls at once; the next waits for one of them to end, until its deadline."""

GATHER_BYTES_MAX = 64 * 1024
_REASONS = {429: Reason.BUSY, 503: Reason.BUSY, 504: Reason.DEADLINE, 413: Reason.TOO_LARGE}


class UnreachableError(Exception):
    """A call got no usable answer; `miss` says why. Never leaves the connectors."""

    def __init__(self, reason: Reason, detail: str, *, code: str = "") -> None:
        super().__init__(f"{reason}: {detail}")
        self.miss = Miss(reason, detail)
        self.code = code


class Address(msgspec.Struct, frozen=True, kw_only=True):
    """Where a daemon is. `socket_path` is set for UNIX sockets, `host` and `port` otherwise. `tenant` is who asks."""

    url: str
    socket_path: str = ""
    host: str = "localhost"
    port: int = 0
    tls: bool = False
    shared_memory: bool = False
    tenant: str = ""

    def connect(self, timeout_seconds: float) -> socket.socket:
        """A connected socket. Raises OSError."""
        if self.socket_path:
            plain = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                plain.settimeout(timeout_seconds)
                plain.connect(self.socket_path)
            except BaseException:
                plain.close()
                raise
            return plain
        plain = socket.create_connection((self.host, self.port), timeout_seconds)
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return ssl.create_default_context().wrap_socket(plain, server_hostname=self.host) if self.tls else plain


def parse_url(url: str) -> Address:
    """The address in a `unix:`, `http:` or `https:` URL. Raises ConfigError naming the part that is wrong."""
    parts = urlsplit(url)
    query = {"transport": "", "tenant": ""}
    for name, value in parse_qsl(parts.query, keep_blank_values=True):
        if name not in query:
            raise unknown_name("URL parameter", name, query)
        query[name] = value
    transport, tenant = query["transport"], query["tenant"]
    if tenant:
        check_tenant_name(tenant)
    if transport not in ("", "shm", "bytes"):
        raise ConfigError(f"transport in {url!r} is {transport!r}; use shm or bytes")
    if parts.scheme == "unix":
        if parts.netloc or not parts.path:
            raise ConfigError(f"{url!r} names no socket; write unix:/path/to/kvstore.sock")
        return Address(url=url, socket_path=parts.path, shared_memory=transport != "bytes", tenant=tenant)
    try:
        port = parts.port
    except ValueError as error:
        raise ConfigError(f"{url!r}: {error}") from error
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username:
        raise ConfigError(f"{url!r} is no daemon's address; write unix:/path or http://host:port")
    if parts.path not in ("", "/") or transport == "shm":
        raise ConfigError(f"{url!r}: a path or transport=shm does not belong in an {parts.scheme} URL")
    tls = parts.scheme == "https"
    return Address(url=url, host=parts.hostname, port=port or (443 if tls else 8650), tls=tls, tenant=tenant)


class DeadlineSocket:
    """A socket as http.client wants it, whose every wait ends at `deadline` (time.monotonic seconds).

    Small writes are gathered until the next read, so that a request leaves in one piece.
    """

    def __init__(self, plain: socket.socket, deadline: float) -> None:
        self.plain = plain
        self.deadline = deadline
        self._gathered = bytearray()

    def sendall(self, data: Buffer) -> None:
        """Send, or keep for the next read."""
        view = memoryview(data).cast("B")
        if len(view) + len(self._gathered) <= GATHER_BYTES_MAX:
            self._gathered += view
            return
        self.flush()
        self._wait_at_most()
        self.plain.sendall(view)

    def flush(self) -> None:
        """Send what has been kept."""
        if self._gathered:
            gathered, self._gathered = self._gathered, bytearray()
            self._wait_at_most()
            self.plain.sendall(gathered)

    def receive(self, target: Buffer) -> int:
        """Like recv_into."""
        self.flush()
        self._wait_at_most()
        return self.plain.recv_into(target)

    def makefile(self, mode: str) -> BinaryIO:
        """A buffered reader; closing it leaves the socket open."""
        return io.BufferedReader(_Reader(self), GATHER_BYTES_MAX)

    def close(self) -> None:
        """Close the socket."""
        self.plain.close()

    def _wait_at_most(self) -> None:
        remaining = self.deadline - time.monotonic()
        if remaining <= 0:
            raise TimeoutError("the deadline has passed")
        self.plain.settimeout(remaining)


class _Reader(io.RawIOBase):
    def __init__(self, source: DeadlineSocket) -> None:
        self._source = source

    def readable(self) -> bool:
        return True

    def readinto(self, target: Buffer) -> int:
        return self._source.receive(target)


class Connection(http.client.HTTPConnection):
    """One connection of the pool. `reused` is True once it has carried a whole answer."""

    def __init__(self, address: Address) -> None:
        super().__init__(address.host, address.port or None)
        self._address = address
        self._deadline = 0.0
        self.reused = False

    def connect(self) -> None:
        """Connect to the pool's address."""
        plain = self._address.connect(max(0.001, self._deadline - time.monotonic()))
        self.sock = DeadlineSocket(plain, self._deadline)

    def until(self, deadline: float) -> None:
        """Set the deadline of everything that follows (time.monotonic seconds)."""
        self._deadline = deadline
        if isinstance(self.sock, DeadlineSocket):
            self.sock.deadline = deadline


class Pool:
    """Connections to one daemon, shared by threads.

    Args:
        address: where it is.
        token: bearer token, None for none.
    """

    def __init__(self, address: Address, token: str | None) -> None:
        self.address = address
        self._headers = {"Authorization": f"Bearer {token}"} if token is not None else {}
        if address.tenant:
            self._headers[TENANT_HEADER] = address.tenant
        self._lock = threading.Lock()
        self._idle: list[Connection] = []
        # Not a bounded one: see start_again_in_child.
        self._slots = threading.Semaphore(CONNECTIONS_MAX)
        self._closed = False

    def open(
        self,
        method: str,
        path: str,
        body: Buffer | None = None,
        *,
        deadline: float,
        headers: Mapping[str, str] | None = None,
    ) -> tuple[Connection, http.client.HTTPResponse]:
        """A 2xx answer whose body is still to be read, and its connection: to be dropped or given back.

        A kept connection that the daemon has meanwhile closed is replaced, once; every verb may be repeated.

        Raises:
            UnreachableError: no answer by `deadline` (time.monotonic seconds), or one that is not 2xx.
        """
        if not self._slots.acquire(timeout=max(0.0, deadline - time.monotonic())):
            raise UnreachableError(Reason.BUSY, f"{CONNECTIONS_MAX} calls are under way")
        connection = self._take()
        try:
            answer = self._ask(connection, method, path, body, deadline, headers)
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            if not connection.reused or isinstance(error, TimeoutError):
                self._slots.release()
                raise unreachable(error) from error
            connection = Connection(self.address)
            try:
                answer = self._ask(connection, method, path, body, deadline, headers)
            except (OSError, http.client.HTTPException) as again:
                self.drop(connection)
                raise unreachable(again) from again
        if not 200 <= answer.status < 300:
            self._raise_refusal(connection, answer)
        return connection, answer

    def finish(self, connection: Connection, answer: http.client.HTTPResponse) -> bytes:
        """The rest of an answer; the connection is given back. Raises UnreachableError."""
        try:
            data = answer.read()
        except (OSError, http.client.HTTPException) as error:
            self.drop(connection)
            raise unreachable(error) from error
        self.give_back(connection, answer)
        return data

    def give_back(self, connection: Connection, answer: http.client.HTTPResponse) -> None:
        """Keep a connection whose answer has been read whole."""
        if answer.will_close or not answer.isclosed():
            self.drop(connection)
            return
        connection.reused = True
        with self._lock:
            keep = len(self._idle) < IDLE_MAX and not self._closed
            if keep:
                self._idle.append(connection)
        if not keep:
            connection.close()
        self._slots.release()

    def drop(self, connection: Connection) -> None:
        """Close a connection that is in the middle of something."""
        connection.close()
        self._slots.release()

    def start_again_in_child(self) -> None:
        """Let go of the connections of the process that this one was forked from, without ending them."""
        self._lock = threading.Lock()
        # What was under way when the process forked may still be dropped here, and counts for nothing then.
        self._slots = threading.Semaphore(CONNECTIONS_MAX)
        idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def close(self) -> None:
        """Close what is idle; connections in use are closed when their calls end."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def _take(self) -> Connection:
        with self._lock:
            return self._idle.pop() if self._idle else Connection(self.address)

    def _ask(
        self,
        connection: Connection,
        method: str,
        path: str,
        body: Buffer | None,
        deadline: float,
        headers: Mapping[str, str] | None,
    ) -> http.client.HTTPResponse:
        connection.until(deadline)
        connection.request(method, path, body, {**self._headers, **(headers or {})})
        return connection.getresponse()

    def _raise_refusal(self, connection: Connection, answer: http.client.HTTPResponse) -> None:
        data = b""
        with suppress(OSError, http.client.HTTPException):
            data = answer.read(GATHER_BYTES_MAX)
        self.give_back(connection, answer)
        code, message = _error_of(data)
        raise UnreachableError(
            _REASONS.get(answer.status, Reason.UNAVAILABLE), message or f"HTTP {answer.status}", code=code
        )


def unreachable(error: Exception) -> UnreachableError:
    """What a network error means for the chunks of the call."""
    if isinstance(error, TimeoutError):
        return UnreachableError(Reason.DEADLINE, "the daemon did not answer by the deadline")
    return UnreachableError(Reason.UNAVAILABLE, f"connection to the daemon failed: {error or type(error).__name__}")


def _error_of(data: bytes) -> tuple[str, str]:
    try:
        error: Any = msgspec.json.decode(data)["error"]
        return str(error["code"]), str(error["message"])[:500]
    except (msgspec.MsgspecError, UnicodeDecodeError, KeyError, TypeError):
        return "", ""
