"""/v1/chunks/{key}: one container as a plain HTTP resource."""

from __future__ import annotations

import asyncio
import logging
import time

from aiohttp import hdrs, web

from kvstore import container
from kvstore.errors import ContainerError
from kvstore.keys import ROOT
from kvstore.loan import Loan
from kvstore.outcome import Miss, PutStatus, Reason
from kvstore.places import Place
from kvstore.protocol import CHUNK_TYPE, FoundReply
from kvstore.putting import PendingPut
from kvstore.service.bodies import deadline_of, key_of, parent_of, remaining_ms
from kvstore.service.daemon import DAEMON
from kvstore.service.refusal import RefusalError, json_response, missed, put_response
from kvstore.service.streaming import Sender
from kvstore.store import Store

_log = logging.getLogger(__name__)


async def get(request: web.Request) -> web.StreamResponse:
    """The container, or one range of its bytes."""
    daemon = request.app[DAEMON]
    key = _key(request)
    deadline = deadline_of(None)
    loan = await daemon.workers.run(deadline, daemon.store.borrow, key, deadline_ms=remaining_ms(deadline))
    if isinstance(loan, Miss):
        raise missed(loan)
    with loan:
        return await _send(request, loan, key, daemon.config.lease_ttl_seconds)


async def head(request: web.Request) -> web.Response:
    """Size and tiers of the chunk."""
    daemon = request.app[DAEMON]
    key = _key(request)
    (found,) = daemon.store.head([key])
    if found is None:
        raise missed(Miss(Reason.ABSENT, "no tier holds the key"))
    headers = {**_headers(key), hdrs.CONTENT_LENGTH: str(found.nbytes), "X-KVStore-Tiers": ",".join(found.tiers)}
    return web.Response(headers=headers)


async def put(request: web.Request) -> web.Response:
    """Store the container in the body: streamed to its place, verified there, then published."""
    daemon = request.app[DAEMON]
    key = _key(request)
    parent, durable, deadline = _put_query(request)
    nbytes = request.content_length
    if nbytes is None:
        raise RefusalError(411, "invalid", "a chunk needs a Content-Length", hdrs.CONTENT_LENGTH)
    if nbytes > daemon.request_bytes_max:
        raise RefusalError(413, "too_large", f"{nbytes} bytes; at most {daemon.request_bytes_max}", hdrs.CONTENT_LENGTH)
    if nbytes < container.FIXED.size:
        raise RefusalError(400, "truncated", f"{nbytes} bytes are no container", hdrs.CONTENT_LENGTH)
    place = await daemon.workers.acquire(
        deadline,
        _give_back,
        daemon.store.reserve,
        key,
        nbytes,
        parent=parent,
        durable=durable,
        tenant=daemon.gate.tenant_of(request),
    )
    if not isinstance(place, Place):
        await _drain(request, deadline)
        status = await daemon.workers.run(deadline, daemon.store.settle, place, deadline)
        return put_response([status])
    try:
        await _receive(request, place, nbytes, deadline)
        publishing = daemon.workers.start(_publish, daemon.store, place, key, parent, durable, deadline)
    except BaseException:
        place.abort()
        raise
    status = await daemon.workers.result(publishing, deadline)
    return put_response([status])


async def delete(request: web.Request) -> web.Response:
    """Remove the chunk from every tier."""
    daemon = request.app[DAEMON]
    return json_response(FoundReply(await daemon.workers.run(deadline_of(None), daemon.store.delete, [_key(request)])))


def _key(request: web.Request) -> bytes:
    return key_of(request.match_info["key"])


def _headers(key: bytes) -> dict[str, str]:
    return {hdrs.CONTENT_TYPE: CHUNK_TYPE, hdrs.ETAG: f'"{key.hex()}"', hdrs.ACCEPT_RANGES: "bytes"}


async def _send(request: web.Request, loan: Loan, key: bytes, stall_seconds: float) -> web.StreamResponse:
    total = len(loan.view)
    start, stop = _range(request, total)
    response = web.StreamResponse(headers=_headers(key))
    if hdrs.RANGE in request.headers:
        response.set_status(206)
        response.headers[hdrs.CONTENT_RANGE] = f"bytes {start}-{stop - 1}/{total}"
    response.content_length = stop - start
    writer = await response.prepare(request)
    assert writer is not None
    # The first bytes go through the response so that the headers leave with them; the rest bypasses its bookkeeping.
    first = min(stop, start + container.FIXED.size)
    await response.write(bytes(loan.view[start:first]))
    sender = Sender(request, writer, stall_seconds)
    try:
        await sender.send(loan.view[first:stop])
    except BaseException as error:
        sender.abort()
        if not isinstance(error, ConnectionError):
            raise
        _log.info("a chunk was not sent whole: %s", error)
        return response
    await response.write_eof()
    return response


def _range(request: web.Request, total: int) -> tuple[int, int]:
    """(start, stop) of the bytes asked for. Raises RefusalError (416) for a range that is none of them."""
    try:
        asked = request.http_range
        start, stop, _ = asked.indices(total)
    except ValueError as error:
        raise RefusalError(416, "range", f"the chunk has {total} bytes; give one range of them", hdrs.RANGE) from error
    if start >= stop:
        raise RefusalError(416, "range", f"the chunk has {total} bytes", hdrs.RANGE)
    return start, stop


def _put_query(request: web.Request) -> tuple[bytes, bool, float]:
    known = {"parent", "durable", "deadline_ms"}
    for name in request.query:
        if name not in known:
            raise RefusalError(
                400, "invalid", f"unknown parameter {name!r:.80}; valid are: {', '.join(sorted(known))}", name[:80]
            )
    durable = request.query.get("durable", "0")
    if durable not in ("0", "1"):
        raise RefusalError(400, "invalid", f"durable is {durable!r:.80}; it must be 0 or 1", "durable")
    try:
        deadline_ms = float(request.query["deadline_ms"]) if "deadline_ms" in request.query else None
    except ValueError as error:
        raise RefusalError(400, "invalid", "deadline_ms is not a number", "deadline_ms") from error
    parent = parent_of(request.query.get("parent")) if "parent" in request.query else ROOT
    return parent, durable == "1", deadline_of(deadline_ms)


async def _receive(request: web.Request, place: Place, nbytes: int, deadline: float) -> None:
    """Copy the body to its place. Raises RefusalError if it is shorter or too slow."""
    target = place.view
    done = 0
    try:
        async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
            while data := await request.content.readany():
                target[done : done + len(data)] = data
                done += len(data)
    except TimeoutError:
        raise RefusalError(504, "deadline", f"{done} of {nbytes} bytes came by the deadline") from None
    if done != nbytes:
        raise RefusalError(400, "truncated", f"{done} of {nbytes} bytes came")


def _give_back(place: Place | PendingPut) -> None:
    if isinstance(place, Place):
        place.abort()


async def _drain(request: web.Request, deadline: float) -> None:
    """Read a body that is not wanted, so that its sender gets to reading the answer."""
    try:
        async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
            while await request.content.readany():
                pass
    except TimeoutError:
        raise RefusalError(504, "deadline", "the body did not come by the deadline") from None


def _publish(store: Store, place: Place, key: bytes, parent: bytes, durable: bool, deadline: float) -> PutStatus:
    """Verify what has been received and store it."""
    try:
        header = container.verify(place.view, key=key)
    except ContainerError as error:
        place.abort()
        return PutStatus(stored=False, reason=error.reason, detail=error.detail)
    except BaseException:
        place.abort()
        raise
    published = store.publish(place, key, parent, header.total_bytes, durable=durable, deadline=deadline)
    return store.settle(published, deadline)
