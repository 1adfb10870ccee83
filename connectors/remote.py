"""The client of a daemon, on this host or another.

Bytes move through shared memory when the daemon is on this host and offers a session, else over the connection. Once
connected nothing raises because of the daemon: when it is gone, slow, or talks nonsense, chunks miss and puts are
refused with the reason, and after a short back-off the next call tries again.
"""

from __future__ import annotations

import http.client
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import msgspec

from kvstore.client import ChunkInfo, Client, Order, Part, PutChunk
from kvstore.connectors.remote_http import Pool, UnreachableError, parse_url, unreachable
from kvstore.connectors.remote_put import RemotePut
from kvstore.connectors.remote_session import ClientSession
from kvstore.connectors.remote_stream import Buffers, FrameSource, PartReader
from kvstore.errors import ConfigError, ServiceError, ServiceUnavailableError
from kvstore.outcome import Lookup, Miss, PutStatus, Reason
from kvstore.protocol import (
    SESSION_HEADER,
    FetchRequest,
    FlushReply,
    FlushRequest,
    FoundReply,
    HeadEntry,
    HeadReply,
    InfoReply,
    KeysRequest,
    PinRequest,
    PrefetchRequest,
    StatusesReply,
    check_keys,
)
from kvstore.store import deadline_at

_log = logging.getLogger(__name__)

CONTROL_SECONDS = 5.0
"""Deadline of the verbs that have none of their own."""

GRACE_SECONDS = 0.3
"""The daemon answers at the deadline what became of each chunk; the client waits this much longer to hear it."""

BACKOFF_SECONDS_MIN = 0.05
BACKOFF_SECONDS_MAX = 2.0
SILENCE_SECONDS = 1.0
"""A daemon that has not answered for so long counts as gone; a shorter deadline says nothing about it."""

T = TypeVar("T")


class RemoteClient(Client):
    """A client of the daemon at `url`.

    Args:
        url: unix:/path/to/socket[?transport=bytes], http://host:port or https://host:port.
        token: bearer token, if the daemon wants one.
        timeout_ms: how long to wait for the first answer.

    Raises:
        ConfigError: the URL is wrong.
        ServiceUnavailableError: nobody answers there.
        ServiceError: somebody does, but refuses the token or is not a kvstore daemon.
    """

    def __init__(self, url: str, *, token: str | None = None, timeout_ms: float = 5000) -> None:
        self._address = parse_url(url)
        self._pool = Pool(self._address, token)
        self._buffers = Buffers()
        self._lock = threading.Lock()
        self._session: ClientSession | None = None
        self._session_retry_at = 0.0
        self._down_until = 0.0
        self._backoff_seconds = BACKOFF_SECONDS_MIN
        self._closed = False
        try:
            self.info = self._greet(time.monotonic() + timeout_ms / 1000)
            self.session()
        except BaseException:
            self.close()
            raise

    def put(
        self, chunks: Sequence[PutChunk], *, durable: bool = False, deadline_ms: float | None = None
    ) -> list[PutStatus]:
        """Store chunks: through the session's staging memory if there is one, else one request each."""
        check_keys([chunk.key for chunk in chunks])
        deadline = deadline_at(deadline_ms)
        return RemotePut(self, chunks, durable=durable, deadline=deadline).run() if chunks else []

    def lookup(self, keys: Sequence[bytes]) -> Lookup:
        """Longest prefix; empty, with the reason, if the daemon does not answer."""
        check_keys(keys)
        try:
            return self.ask("lookup", KeysRequest(keys=_hex(keys)), Lookup, keys=len(keys))
        except UnreachableError as error:
            return Lookup((), error.miss)

    def fetch(
        self, keys: Sequence[bytes], *, order: Order = "chunk", deadline_ms: float | None = None
    ) -> Iterator[Part]:
        """Iterate over the chunks' parts; what the daemon does not deliver misses."""
        check_keys(keys)
        if order not in ("chunk", "layer"):
            raise ConfigError(f"order is {order!r}; use chunk or layer")
        return self._fetch(list(keys), order, deadline_at(deadline_ms))

    def head(self, keys: Sequence[bytes]) -> list[ChunkInfo | None]:
        """Size and tiers of each chunk."""
        entries = self.head_entries(keys, time.monotonic() + CONTROL_SECONDS)
        return [None if entry is None else ChunkInfo(entry.nbytes, entry.tiers) for entry in entries]

    def prefetch(self, keys: Sequence[bytes], *, deadline_ms: float | None = None) -> list[PutStatus]:
        """Ask for promotion and return at once."""
        check_keys(keys)
        deadline_at(deadline_ms)
        body = PrefetchRequest(keys=_hex(keys), deadline_ms=deadline_ms)
        try:
            statuses = self.ask("prefetch", body, StatusesReply, keys=len(keys)).statuses
            return _counted(statuses, len(keys))
        except UnreachableError as error:
            return [refused(error)] * len(keys)

    def pin(self, keys: Sequence[bytes], *, ttl_seconds: float) -> list[bool]:
        """Keep chunks from eviction for a while."""
        if not 0 < ttl_seconds < float("inf"):
            raise ConfigError(f"ttl_seconds is {ttl_seconds}; it must be positive")
        return self._found("pin", keys, PinRequest(keys=_hex(keys), ttl_seconds=ttl_seconds))

    def unpin(self, keys: Sequence[bytes]) -> list[bool]:
        """End pins."""
        return self._found("unpin", keys, KeysRequest(keys=_hex(keys)))

    def delete(self, keys: Sequence[bytes]) -> list[bool]:
        """Remove chunks from every tier."""
        return self._found("delete", keys, KeysRequest(keys=_hex(keys)))

    def stats(self) -> dict[str, Any]:
        """Counters and usage of the daemon's store."""
        try:
            data = self._call("GET", "/v1/stats", None, time.monotonic() + CONTROL_SECONDS)
            return _decode(data, dict[str, Any])
        except UnreachableError:
            return {}

    def flush(self, *, deadline_ms: float | None = None) -> bool:
        """Wait until everything put so far is durable."""
        deadline = deadline_at(deadline_ms)
        try:
            body = FlushRequest(deadline_ms=_remaining_ms(deadline))
            return self.ask("flush", body, FlushReply, deadline=deadline).flushed
        except UnreachableError:
            return False

    def close(self) -> None:
        """End the session and close every idle connection."""
        with self._lock:
            self._closed = True
            session, self._session = self._session, None
        if session is not None:
            session.close()
        self._pool.close()

    # -- for RemotePut -----------------------------------------------------------------------------------------------

    @property
    def buffers(self) -> Buffers:
        """Memory for containers on their way."""
        return self._buffers

    def session(self) -> ClientSession | None:
        """The shared-memory session; None if there is none to be had now."""
        if not self._address.shared_memory:
            return None
        with self._lock:
            if self._session is not None and self._session.alive:
                return self._session
            now = time.monotonic()
            if self._closed or now < self._session_retry_at:
                return None
            if self._session is not None:
                self._session.close()
            self._session = None
            self._session_retry_at = now + BACKOFF_SECONDS_MAX
            try:
                self._session = ClientSession(self._address.socket_path, timeout_seconds=CONTROL_SECONDS)
                self._session_retry_at = 0.0
            except (OSError, ServiceError) as error:
                _log.info("no shared-memory session, bytes go over the socket: %s", error)
            return self._session

    def head_entries(self, keys: Sequence[bytes], deadline: float) -> list[HeadEntry | None]:
        """What the daemon knows of each chunk; None for all if it does not answer."""
        check_keys(keys)
        try:
            body = KeysRequest(keys=_hex(keys))
            entries = self.ask("head", body, HeadReply, deadline=deadline, keys=len(keys)).chunks
            return _counted(entries, len(keys))
        except UnreachableError:
            return [None] * len(keys)

    def ask(
        self,
        verb: str,
        body: msgspec.Struct,
        kind: type[T],
        *,
        deadline: float | None = None,
        keys: int = 0,
        session: ClientSession | None = None,
    ) -> T:
        """The answer to a JSON verb. Raises UnreachableError."""
        if keys > self.info.request_keys_max:
            raise UnreachableError(
                Reason.TOO_LARGE, f"{keys} keys; the daemon takes {self.info.request_keys_max} a request"
            )
        deadline = deadline if deadline is not None else time.monotonic() + CONTROL_SECONDS
        data = self._call("POST", f"/v1/{verb}", msgspec.json.encode(body), deadline + GRACE_SECONDS, session=session)
        return _decode(data, kind)

    def put_body(self, path: str, body: memoryview, deadline: float) -> StatusesReply:
        """The answer to a PUT of one container. Raises UnreachableError."""
        return _decode(self._call("PUT", path, body, deadline + GRACE_SECONDS), StatusesReply)

    # -- inside --------------------------------------------------------------------------------------------------------

    def _fetch(self, keys: list[bytes], order: Order, deadline: float) -> Iterator[Part]:
        if not keys:
            return
        session = self.session()
        body = FetchRequest(
            keys=_hex(keys),
            order=order,
            deadline_ms=_remaining_ms(deadline),
            transport="shm" if session is not None else "bytes",
        )
        try:
            if len(keys) > self.info.request_keys_max:
                raise UnreachableError(
                    Reason.TOO_LARGE, f"the daemon takes {self.info.request_keys_max} keys a request"
                )
            stream = self._open_stream(body, deadline, session)
        except UnreachableError as error:
            for index in range(len(keys)):
                yield Part(index, error.miss)
            return
        connection, answer, session = stream
        reader = PartReader(FrameSource(answer), keys, self._buffers, session)
        whole = False
        miss = Miss(Reason.UNAVAILABLE, "the stream ended early")
        try:
            yield from reader.parts()
            whole = True
        except ServiceError as error:
            miss = Miss(Reason.UNAVAILABLE, f"the daemon broke the protocol: {error}")
        except (OSError, http.client.HTTPException) as error:
            miss = unreachable(error).miss
        finally:
            if whole:
                # The end frame has been read; what follows is the end of the HTTP body.
                whole = _read_to_end(answer)
            self._pool.give_back(connection, answer) if whole else self._pool.drop(connection)
        for index in reader.unfinished:
            yield Part(index, miss)

    def _open_stream(
        self, body: FetchRequest, deadline: float, session: ClientSession | None
    ) -> tuple[Any, http.client.HTTPResponse, ClientSession | None]:
        """An answer to read frames from. Raises UnreachableError."""
        self._check_up()
        headers = {"Content-Type": "application/json"}
        if session is not None:
            headers[SESSION_HEADER] = session.name
        started = time.monotonic()
        try:
            connection, answer = self._pool.open(
                "POST", "/v1/fetch", msgspec.json.encode(body), deadline=deadline + GRACE_SECONDS, headers=headers
            )
        except UnreachableError as error:
            if session is not None and error.code == "no_session":
                session.close()
                return self._open_stream(msgspec.structs.replace(body, transport="bytes"), deadline, None)
            self._note(error, started)
            raise
        self._backoff_seconds = BACKOFF_SECONDS_MIN
        return connection, answer, session

    def _found(self, verb: str, keys: Sequence[bytes], body: msgspec.Struct) -> list[bool]:
        check_keys(keys)
        try:
            return _counted(self.ask(verb, body, FoundReply, keys=len(keys)).found, len(keys))
        except UnreachableError:
            return [False] * len(keys)

    def _greet(self, deadline: float) -> InfoReply:
        try:
            return _decode(self._pool.call("GET", "/v1/info", deadline=deadline), InfoReply)
        except UnreachableError as error:
            url = self._address.url
            if error.code == "unauthorised":
                raise ServiceError(
                    f"the daemon at {url} refuses the token; give the one in its service.token_file"
                ) from error
            if isinstance(error.__cause__, OSError):
                cause = error.__cause__.strerror or str(error.__cause__)
                raise ServiceUnavailableError(
                    f"no daemon answers at {url} ({cause}); start one: kvstore serve"
                ) from error
            raise ServiceError(f"what answers at {url} is not a kvstore daemon: {error.miss.detail}") from error

    def _call(
        self,
        method: str,
        path: str,
        body: bytes | memoryview | None,
        deadline: float,
        *,
        session: ClientSession | None = None,
    ) -> bytes:
        self._check_up()
        headers = {"Content-Type": "application/json" if method == "POST" else "application/octet-stream"}
        if session is not None:
            headers[SESSION_HEADER] = session.name
        started = time.monotonic()
        try:
            data = self._pool.call(method, path, body, deadline=deadline, headers=headers)
        except UnreachableError as error:
            if session is not None and error.code == "no_session":
                session.close()
            self._note(error, started)
            raise
        self._backoff_seconds = BACKOFF_SECONDS_MIN
        return data

    def _check_up(self) -> None:
        if self._closed:
            raise UnreachableError(Reason.UNAVAILABLE, "the client is closed")
        if time.monotonic() < self._down_until:
            raise UnreachableError(Reason.UNAVAILABLE, "the daemon did not answer a moment ago")

    def _note(self, error: UnreachableError, started: float) -> None:
        """Back off if the daemon itself is gone or silent, rather than this request being refused."""
        gone = isinstance(error.__cause__, OSError) and not isinstance(error.__cause__, TimeoutError)
        silent = isinstance(error.__cause__, TimeoutError) and time.monotonic() - started >= SILENCE_SECONDS
        if gone or silent:
            self._down_until = time.monotonic() + self._backoff_seconds
            self._backoff_seconds = min(BACKOFF_SECONDS_MAX, 2 * self._backoff_seconds)


def refused(error: UnreachableError) -> PutStatus:
    """The status of a put that the daemon did not take."""
    return PutStatus(stored=False, reason=error.miss.reason, detail=error.miss.detail)


def _hex(keys: Sequence[bytes]) -> list[str]:
    return [key.hex() for key in keys]


def _remaining_ms(deadline: float) -> float:
    return max(0.0, (deadline - time.monotonic()) * 1000)


def _decode(data: bytes, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise UnreachableError(Reason.UNAVAILABLE, f"the daemon's answer is not one: {error}") from error


def _counted(answers: list[T], count: int) -> list[T]:
    if len(answers) != count:
        raise UnreachableError(Reason.UNAVAILABLE, f"the daemon answered {len(answers)} of {count} chunks")
    return answers


def _read_to_end(answer: http.client.HTTPResponse) -> bool:
    try:
        return not answer.read(1)
    except (OSError, http.client.HTTPException):
        return False
