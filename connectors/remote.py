"""The client of a daemon, on this host or another.

Bytes move through shared memory when the daemon is on this host and offers a session, else over the connection. Once
connected nothing raises because of the daemon: when it is gone, slow, or talks nonsense, chunks miss and puts are
refused with the reason, and after a short back-off the next call tries again.
"""

from __future__ import annotations

import http.client
import math
import time
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import msgspec

from kvstore.arguments import check_fetch, check_keys, check_owner, check_pin, check_place, check_room, deadline_at
from kvstore.client import PLAN_DEFAULT, ChunkInfo, Client, Order, Part, PutChunk
from kvstore.connectors.remote_events import RemoteEvents
from kvstore.connectors.remote_http import Connection, UnreachableError, unreachable
from kvstore.connectors.remote_link import CONTROL_SECONDS, GRACE_SECONDS, Link, counted, decode
from kvstore.connectors.remote_put import RemotePut
from kvstore.connectors.remote_session import ClientSession
from kvstore.connectors.remote_stream import FrameSource, PartReader
from kvstore.errors import ConfigError, ServiceError
from kvstore.events import EventFilter, EventStream
from kvstore.explaining import Explanation
from kvstore.keys import KeyScheme, Tokens, token_array
from kvstore.outcome import Lookup, Miss, PutStatus, Reason
from kvstore.plan_protocol import PlanReply, parse_plan, plan_request
from kvstore.protocol import (
    ExplainReply,
    FetchRequest,
    FlushReply,
    FlushRequest,
    FoundReply,
    HeadReply,
    KeysRequest,
    MoveRequest,
    PinRequest,
    PrefetchRequest,
    PromptRequest,
    StatusesReply,
    Transport,
    UnpinRequest,
    VerifyReply,
    VerifyRequest,
)
from kvstore.span_plan import PlanOptions, SpanPlan
from kvstore.span_planning import recompute_all
from kvstore.verifying import STEP_BYTES_DEFAULT

VERIFY_SECONDS = 60.0
"""How long the daemon may take to read one step of a check."""


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
        self._link = Link(url, token, timeout_ms / 1000)

    @property
    def put_codec(self) -> str:
        """What the daemon said when it was first reached."""
        return self._link.info.put_codec

    def put(
        self, chunks: Sequence[PutChunk], *, durable: bool = False, deadline_ms: float | None = None
    ) -> list[PutStatus]:
        """Store chunks: through the session's staging memory if there is one, else one request each."""
        for chunk in chunks:
            check_place(chunk.key, chunk.parent)
            check_room(chunk.nbytes_max)
        deadline = deadline_at(deadline_ms)
        return RemotePut(self._link, chunks, durable=durable, deadline=deadline).run() if chunks else []

    def lookup(self, keys: Sequence[bytes]) -> Lookup:
        """Longest prefix; empty, with the reason, if the daemon does not answer."""
        try:
            return self._link.ask("lookup", PromptRequest(keys=_hex(keys)), Lookup, keys=len(keys))
        except UnreachableError as error:
            return Lookup((), error.miss)

    def fetch(
        self,
        keys: Sequence[bytes],
        *,
        order: Order = "chunk",
        deadline_ms: float | None = None,
        min_quality: int = 0,
        max_quality: int | None = None,
        decode: bool = False,
    ) -> Iterator[Part]:
        """Iterate over the chunks' parts; what the daemon does not deliver misses."""
        check_fetch(order, min_quality, max_quality, decode=decode)
        request = FetchRequest(
            keys=_hex(keys), order=order, min_quality=min_quality, max_quality=max_quality, decode=decode
        )
        return self._fetch(list(keys), request, deadline_at(deadline_ms))

    def head(self, keys: Sequence[bytes]) -> list[ChunkInfo | None]:
        """Size and tiers of each chunk."""
        try:
            reply = self._link.ask("head", KeysRequest(keys=_hex(keys)), HeadReply, keys=len(keys))
            entries = counted(reply.chunks, len(keys))
        except UnreachableError:
            return [None] * len(keys)
        return [None if entry is None else ChunkInfo(entry.nbytes, entry.tiers) for entry in entries]

    def explain(self, keys: Sequence[bytes]) -> list[Explanation]:
        """Where each chunk is, or why it is nowhere."""
        try:
            reply = self._link.ask("explain", PromptRequest(keys=_hex(keys)), ExplainReply, keys=len(keys))
            entries = counted(reply.chunks, len(keys))
        except UnreachableError:
            return []
        return [
            Explanation(**{**msgspec.structs.asdict(entry), "key": key})
            for key, entry in zip(keys, entries, strict=True)
        ]

    def plan(self, tokens: Tokens, keys: KeyScheme, options: PlanOptions = PLAN_DEFAULT) -> SpanPlan:
        """What to do about each token of a prompt."""
        ids = token_array(tokens)
        options.check(len(ids))
        try:
            reply = self._link.ask("plan", plan_request(ids, keys, options), PlanReply)
            return parse_plan(reply, len(ids))
        except UnreachableError as error:
            return recompute_all(len(ids), error.miss, options)
        except ConfigError as error:
            return recompute_all(len(ids), Miss(Reason.UNAVAILABLE, f"the daemon's plan is none: {error}"), options)

    def prefetch(
        self, keys: Sequence[bytes], *, priority: int = 0, deadline_ms: float | None = None
    ) -> list[PutStatus]:
        """Ask for promotion and return at once."""
        deadline = deadline_at(deadline_ms)
        body = PrefetchRequest(keys=_hex(keys), priority=priority, deadline_ms=_remaining_ms(deadline))
        return self._moved("prefetch", keys, body)

    def cancel(self, keys: Sequence[bytes]) -> list[bool]:
        """Take back what was asked for with `prefetch`."""
        return self._found("cancel", keys, KeysRequest(keys=_hex(keys)))

    def park(self, keys: Sequence[bytes], *, deadline_ms: float | None = None) -> list[PutStatus]:
        """Move a chain out of memory."""
        deadline = deadline_at(deadline_ms)
        return self._moved("park", keys, MoveRequest(keys=_hex(keys), deadline_ms=_remaining_ms(deadline)), deadline)

    def resume(self, keys: Sequence[bytes], *, deadline_ms: float | None = None) -> list[PutStatus]:
        """Move a chain into memory."""
        deadline = deadline_at(deadline_ms)
        return self._moved("resume", keys, MoveRequest(keys=_hex(keys), deadline_ms=_remaining_ms(deadline)), deadline)

    def pin(self, keys: Sequence[bytes], *, ttl_seconds: float, owner: str = "", priority: int = 0) -> list[bool]:
        """Keep chunks from eviction for a while."""
        check_pin(ttl_seconds, owner, priority)
        body = PinRequest(keys=_hex(keys), ttl_seconds=ttl_seconds, owner=owner, priority=priority)
        return self._found("pin", keys, body)

    def unpin(self, keys: Sequence[bytes], *, owner: str = "") -> list[bool]:
        """End an owner's pins."""
        check_owner(owner)
        return self._found("unpin", keys, UnpinRequest(keys=_hex(keys), owner=owner))

    def delete(self, keys: Sequence[bytes]) -> list[bool]:
        """Remove chunks from every tier."""
        return self._found("delete", keys, KeysRequest(keys=_hex(keys)))

    def stats(self) -> dict[str, Any]:
        """Counters and usage of the daemon's store."""
        try:
            data = self._link.call("GET", "/v1/stats", None, time.monotonic() + CONTROL_SECONDS)
            return decode(data, dict[str, Any])
        except UnreachableError:
            return {}

    def verify(
        self, start: int = 0, *, tier: str = "", bytes_max: int = STEP_BYTES_DEFAULT, repair: bool = False
    ) -> VerifyReply:
        """Compare the hashes of some chunks of a tier of the daemon; see `kvstore.verifying.SupportsVerify`.

        Raises:
            ServiceError: the daemon has no such tier, is too busy, or does not answer.
        """
        deadline = time.monotonic() + VERIFY_SECONDS
        body = VerifyRequest(
            tier=tier, start=start, bytes_max=bytes_max, repair=repair, deadline_ms=_remaining_ms(deadline)
        )
        try:
            return self._link.ask("verify", body, VerifyReply, deadline=deadline)
        except UnreachableError as error:
            raise ServiceError(f"the check of a part of the tier failed: {error.miss.detail}") from error

    def events(
        self,
        *,
        after: int | None = None,
        tiers: Collection[str] = (),
        kinds: Collection[str] = (),
        deadline_ms: float | None = None,
    ) -> EventStream:
        """What enters and leaves the daemon's tiers."""
        EventFilter(tiers, kinds)
        deadline = deadline_at(deadline_ms, longest_ms=math.inf)
        return RemoteEvents(self._link, after=after, tiers=tiers, kinds=kinds, deadline=deadline)

    def flush(self, *, deadline_ms: float | None = None) -> bool:
        """Wait until everything put so far is durable."""
        deadline = deadline_at(deadline_ms)
        try:
            body = FlushRequest(deadline_ms=_remaining_ms(deadline))
            return self._link.ask("flush", body, FlushReply, deadline=deadline).flushed
        except UnreachableError:
            return False

    def close(self) -> None:
        """End the session and close every idle connection."""
        self._link.close()

    def session(self) -> ClientSession | None:
        """The shared-memory session that bytes move through now; None if they go over the connection."""
        return self._link.session(time.monotonic() + CONTROL_SECONDS)

    def _moved(
        self, verb: str, keys: Sequence[bytes], body: msgspec.Struct, deadline: float | None = None
    ) -> list[PutStatus]:
        try:
            reply = self._link.ask(verb, body, StatusesReply, deadline=deadline, keys=len(keys))
            return counted(reply.statuses, len(keys))
        except UnreachableError as error:
            return [PutStatus(stored=False, reason=error.miss.reason, detail=error.miss.detail)] * len(keys)

    def _found(self, verb: str, keys: Sequence[bytes], body: msgspec.Struct) -> list[bool]:
        try:
            return counted(self._link.ask(verb, body, FoundReply, keys=len(keys)).found, len(keys))
        except UnreachableError:
            return [False] * len(keys)

    def _fetch(self, keys: list[bytes], request: FetchRequest, deadline: float) -> Iterator[Part]:
        if not keys:
            return
        session = self._link.session(deadline)
        if session is not None and not session.begin_reading():
            session = None
        try:
            yield from self._fetch_in(session, keys, request, deadline)
        finally:
            if session is not None:
                session.end_reading()

    def _fetch_in(
        self, session: ClientSession | None, keys: list[bytes], request: FetchRequest, deadline: float
    ) -> Iterator[Part]:
        try:
            connection, answer, session = self._open_stream(request, deadline, session)
        except UnreachableError as error:
            for index in range(len(keys)):
                yield Part(index, error.miss)
            return
        reader = PartReader(FrameSource(answer), keys, self._link.buffers, session, request.max_quality)
        whole = False
        miss = Miss(Reason.UNAVAILABLE, "the stream ended early")
        try:
            yield from reader.parts()
            # The end frame has been read; what follows is the end of the HTTP body.
            whole = not answer.read(1)
        except ServiceError as error:
            miss = Miss(Reason.UNAVAILABLE, f"the daemon broke the protocol: {error}")
        except (OSError, http.client.HTTPException) as error:
            miss = unreachable(error).miss
        finally:
            if whole:
                self._link.pool.give_back(connection, answer)
            else:
                self._link.pool.drop(connection)
        for index in reader.unfinished:
            yield Part(index, miss)

    def _open_stream(
        self, request: FetchRequest, deadline: float, session: ClientSession | None
    ) -> tuple[Connection, http.client.HTTPResponse, ClientSession | None]:
        """An answer to read frames from, and the session they may refer to. Raises UnreachableError."""
        self._link.check_keys_max(len(request.keys))
        transport: Transport = "shm" if session is not None else "bytes"
        data = msgspec.json.encode(
            msgspec.structs.replace(request, deadline_ms=_remaining_ms(deadline), transport=transport)
        )
        try:
            return *self._link.open("POST", "/v1/fetch", data, deadline + GRACE_SECONDS, session=session), session
        except UnreachableError as error:
            if error.code != "no_session" or session is None:
                raise
        return self._open_stream(request, deadline, None)


def _hex(keys: Sequence[bytes]) -> list[str]:
    check_keys(keys)
    return [key.hex() for key in keys]


def _remaining_ms(deadline: float) -> float:
    return max(0.0, (deadline - time.monotonic()) * 1000)
