"""What the verbs of a remote client share: asking the daemon, backing off from a dead one, the session."""

from __future__ import annotations

import http.client
import logging
import os
import threading
import time
import weakref
from typing import TypeVar

import msgspec

from kvstore.connectors.remote_http import Address, Connection, Pool, UnreachableError, parse_url
from kvstore.connectors.remote_session import ClientSession
from kvstore.connectors.remote_stream import Buffers
from kvstore.decoding import decode_json
from kvstore.errors import ServiceError, ServiceUnavailableError
from kvstore.outcome import Reason
from kvstore.protocol import SESSION_HEADER, InfoReply

_log = logging.getLogger(__name__)

CONTROL_SECONDS = 5.0
"""Deadline of the verbs that have none of their own."""

SESSION_SECONDS = 1.0
"""How long opening a session may take: the daemon is on this host."""

GRACE_SECONDS = 0.3
"""The daemon answers at the deadline what became of each chunk; the client waits this much longer to hear it."""

BACKOFF_SECONDS_MIN = 0.05
BACKOFF_SECONDS_MAX = 2.0
SILENCE_SECONDS = 1.0
"""A daemon that has not answered for so long counts as gone; a shorter deadline says nothing about it."""

T = TypeVar("T")

_links: weakref.WeakSet[Link] = weakref.WeakSet()


class Link:
    """The way to one daemon, shared by threads.

    Args:
        url: where it is; see `RemoteClient`.
        token: bearer token, None for none.
        timeout_seconds: how long to wait for the first answer.

    Raises:
        ConfigError, ServiceUnavailableError, ServiceError: as `RemoteClient` says.
    """

    def __init__(self, url: str, token: str | None, timeout_seconds: float) -> None:
        self.address: Address = parse_url(url)
        self.pool = Pool(self.address, token)
        self.buffers = Buffers()
        self._opening = threading.Lock()
        self._session: ClientSession | None = None
        self._session_retry_at = 0.0
        self._down_until = 0.0
        self._backoff_seconds = BACKOFF_SECONDS_MIN
        self._closed = False
        _links.add(self)
        try:
            deadline = time.monotonic() + timeout_seconds
            self.info = self._greet(deadline)
            self.session(deadline)
        except BaseException:
            self.close()
            raise

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
        """The answer to a JSON verb; `deadline` in time.monotonic seconds. Raises UnreachableError."""
        self.check_keys_max(keys)
        deadline = deadline if deadline is not None else time.monotonic() + CONTROL_SECONDS
        data = self.call("POST", f"/v1/{verb}", msgspec.json.encode(body), deadline + GRACE_SECONDS, session=session)
        return decode(data, kind)

    def call(
        self,
        method: str,
        path: str,
        body: bytes | memoryview | None,
        deadline: float,
        *,
        session: ClientSession | None = None,
    ) -> bytes:
        """The body of the answer. Raises UnreachableError."""
        connection, answer = self.open(method, path, body, deadline, session=session)
        started = time.monotonic()
        try:
            return self.pool.finish(connection, answer)
        except UnreachableError as error:
            self._note(error, started)
            raise

    def open(
        self,
        method: str,
        path: str,
        body: bytes | memoryview | None,
        deadline: float,
        *,
        session: ClientSession | None = None,
    ) -> tuple[Connection, http.client.HTTPResponse]:
        """An answer that is still to be read. Raises UnreachableError, at once while the daemon is known to be down."""
        if self._closed:
            raise UnreachableError(Reason.UNAVAILABLE, "the client is closed")
        if time.monotonic() < self._down_until:
            raise UnreachableError(Reason.UNAVAILABLE, "the daemon did not answer a moment ago")
        headers = {"Content-Type": "application/json" if method == "POST" else "application/octet-stream"}
        if session is not None:
            headers[SESSION_HEADER] = session.name
        started = time.monotonic()
        try:
            opened = self.pool.open(method, path, body, deadline=deadline, headers=headers)
        except UnreachableError as error:
            if session is not None and error.code == "no_session":
                session.close()
            self._note(error, started)
            raise
        self._backoff_seconds = BACKOFF_SECONDS_MIN
        return opened

    def check_keys_max(self, keys: int) -> None:
        """Raise UnreachableError (too_large) for more keys than the daemon takes in one request."""
        if keys > self.info.request_keys_max:
            detail = f"{keys} keys; the daemon takes {self.info.request_keys_max} a request"
            raise UnreachableError(Reason.TOO_LARGE, detail)

    def session(self, deadline: float) -> ClientSession | None:
        """The shared-memory session; None if there is none to be had now, or by `deadline` (time.monotonic seconds)."""
        if self._session is not None and self._session.alive:
            return self._session
        # While one thread opens a session the others do without.
        if not self.address.shared_memory or not self._opening.acquire(blocking=False):
            return None
        try:
            if self._session is None or not self._session.alive:
                self._open_session(deadline)
            return self._session
        finally:
            self._opening.release()

    def close(self) -> None:
        """End the session and close every idle connection. Idempotent."""
        self._closed = True
        session = self._session
        if session is not None:
            session.close()
        self.pool.close()

    def start_again_in_child(self) -> None:
        """Leave connections and session to the process that this one was forked from; two would mix up their answers.

        Locks are made anew, because a thread that is not here may have held them.
        """
        self._opening = threading.Lock()
        self.buffers = Buffers()
        self.pool.start_again_in_child()
        session, self._session = self._session, None
        if session is not None:
            session.leave_to_parent()

    def _open_session(self, deadline: float) -> None:
        if self._session is not None:
            self._session.close()
            self._session = None
        now = time.monotonic()
        if self._closed or now < self._session_retry_at:
            return
        self._session_retry_at = now + BACKOFF_SECONDS_MAX
        timeout_seconds = min(SESSION_SECONDS, max(0.001, deadline - now))
        try:
            session = ClientSession(self.address.socket_path, timeout_seconds=timeout_seconds)
        except (OSError, ServiceError) as error:
            _log.info("no shared-memory session, bytes go over the socket: %s", error)
            return
        self._session_retry_at = 0.0
        self._session = session
        if self._closed:
            session.close()

    def _greet(self, deadline: float) -> InfoReply:
        try:
            return decode(self.pool.finish(*self.pool.open("GET", "/v1/info", deadline=deadline)), InfoReply)
        except UnreachableError as error:
            url = self.address.url
            if error.code == "unauthorised":
                raise ServiceError(
                    f"the daemon at {url} refuses the token; give the one in its service.token_file"
                ) from error
            if isinstance(error.__cause__, OSError):
                cause = error.__cause__.strerror or str(error.__cause__)
                raise ServiceUnavailableError(
                    f"no daemon answers at {url} ({cause}); start one: kvstore serve"
                ) from error
            if error.code:
                raise ServiceError(f"the daemon at {url} refuses: {error.miss.detail}") from error
            raise ServiceError(f"what answers at {url} is not a kvstore daemon: {error.miss.detail}") from error

    def _note(self, error: UnreachableError, started: float) -> None:
        """Back off if the daemon itself is gone or silent, rather than this request being refused."""
        gone = isinstance(error.__cause__, OSError) and not isinstance(error.__cause__, TimeoutError)
        silent = isinstance(error.__cause__, TimeoutError) and time.monotonic() - started >= SILENCE_SECONDS
        if gone or silent:
            self._down_until = time.monotonic() + self._backoff_seconds
            self._backoff_seconds = min(BACKOFF_SECONDS_MAX, 2 * self._backoff_seconds)


def decode(data: bytes, kind: type[T]) -> T:
    """An answer's body as a `kind`. Raises UnreachableError if it is none."""
    try:
        return decode_json(data, kind)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise UnreachableError(Reason.UNAVAILABLE, f"the daemon's answer is not one: {error}") from error


def counted(answers: list[T], count: int) -> list[T]:
    """`answers`, one a chunk. Raises UnreachableError if there are more or fewer."""
    if len(answers) != count:
        raise UnreachableError(Reason.UNAVAILABLE, f"the daemon answered {len(answers)} of {count} chunks")
    return answers


def _after_fork() -> None:
    for link in list(_links):
        link.start_again_in_child()


os.register_at_fork(after_in_child=_after_fork)
