"""The JSON verbs. What is answered from memory runs on the event loop; what may block runs on a worker thread."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

from aiohttp import web

import kvstore
from kvstore.keys import ROOT
from kvstore.outcome import PutStatus, Reason
from kvstore.places import Place
from kvstore.protocol import (
    SESSION_HEADER,
    FlushReply,
    FlushRequest,
    FoundReply,
    HeadEntry,
    HeadReply,
    InfoReply,
    KeysRequest,
    MoveRequest,
    PinReply,
    PinRequest,
    PrefetchRequest,
    PutEntry,
    PutRequest,
    UnpinRequest,
)
from kvstore.service.bodies import deadline_of, key_of, keys_of, read_body, remaining_ms
from kvstore.service.daemon import DAEMON, Daemon
from kvstore.service.refusal import RefusalError, json_response, put_response
from kvstore.service.staging import Staging
from kvstore.store import Store
from kvstore.tier import PutItem

R = TypeVar("R")

INLINE_KEYS_MAX = 2048
"""Keys that are looked up on the event loop: about a millisecond's worth."""


async def head(request: web.Request) -> web.Response:
    """Size and tiers of each chunk, null where there is none."""
    daemon = request.app[DAEMON]
    body = await read_body(request, KeysRequest)
    infos = await _from_memory(daemon, daemon.store.head, body.keys)
    durable = {tier.name for tier in daemon.store.tiers if tier.durable}
    return json_response(
        HeadReply(
            [
                None if info is None else HeadEntry(info.nbytes, info.tiers, not durable.isdisjoint(info.tiers))
                for info in infos
            ]
        )
    )


async def put(request: web.Request) -> web.Response:
    """Store containers out of the session's staging memory."""
    daemon = request.app[DAEMON]
    body = await read_body(request, PutRequest)
    deadline = deadline_of(body.deadline_ms)
    staging = None
    if any(entry.nbytes for entry in body.chunks):
        staging = daemon.session(request.headers.get(SESSION_HEADER)).staging
    if len(body.chunks) > daemon.config.request_keys_max:
        raise RefusalError(413, "too_large", f"more than {daemon.config.request_keys_max} chunks", "chunks")
    tenant = daemon.gate.tenant_of(request)
    items = [_put_item(entry, staging, index, tenant) for index, entry in enumerate(body.chunks)]
    statuses = await daemon.workers.run(deadline, _store_all, daemon.store, items, body.durable, deadline)
    return put_response(statuses)


async def prefetch(request: web.Request) -> web.Response:
    """Queue promotions and answer at once."""
    daemon = request.app[DAEMON]
    body = await read_body(request, PrefetchRequest)
    keys = keys_of(body.keys, daemon.config.request_keys_max)
    deadline = deadline_of(body.deadline_ms)
    statuses = daemon.store.prefetch(keys, priority=body.priority, deadline_ms=remaining_ms(deadline))
    return put_response(statuses)


async def cancel(request: web.Request) -> web.Response:
    """Forget promotions that have not begun."""
    body = await read_body(request, KeysRequest)
    return await _found(request, body.keys, request.app[DAEMON].store.cancel)


async def park(request: web.Request) -> web.Response:
    """Move a chain out of memory."""
    return await _moved(request, request.app[DAEMON].store.park)


async def resume(request: web.Request) -> web.Response:
    """Move a chain into memory."""
    return await _moved(request, request.app[DAEMON].store.resume)


async def pin(request: web.Request) -> web.Response:
    """Keep chunks from eviction for a while."""
    body = await read_body(request, PinRequest)
    if not 0 < body.ttl_seconds < float("inf"):
        raise RefusalError(400, "invalid", f"ttl_seconds is {body.ttl_seconds}; it must be positive", "ttl_seconds")
    daemon = request.app[DAEMON]
    keys = keys_of(body.keys, daemon.config.request_keys_max)
    pinning = partial(
        daemon.store.try_pin, keys, ttl_seconds=body.ttl_seconds, owner=body.owner, priority=body.priority
    )
    misses = await daemon.workers.run(deadline_of(None), pinning)
    return json_response(PinReply([miss is None for miss in misses], misses))


async def unpin(request: web.Request) -> web.Response:
    """End pins."""
    body = await read_body(request, UnpinRequest)
    store = request.app[DAEMON].store
    return await _found(request, body.keys, lambda keys: store.unpin(keys, owner=body.owner))


async def delete(request: web.Request) -> web.Response:
    """Remove chunks from every tier."""
    body = await read_body(request, KeysRequest)
    return await _found(request, body.keys, request.app[DAEMON].store.delete)


async def flush(request: web.Request) -> web.Response:
    """Wait until everything put so far is durable."""
    daemon = request.app[DAEMON]
    deadline = deadline_of((await read_body(request, FlushRequest)).deadline_ms)
    try:
        flushed = await daemon.workers.run(deadline, lambda: daemon.store.flush(deadline_ms=remaining_ms(deadline)))
    except RefusalError as refusal:
        if refusal.status != 504:
            raise
        flushed = False
    return json_response(FlushReply(flushed))


async def info(request: web.Request) -> web.Response:
    """Who answers, and the limits to keep."""
    daemon = request.app[DAEMON]
    return json_response(
        InfoReply(kvstore.__version__, daemon.request_bytes_max, daemon.config.request_keys_max, daemon.store.put_codec)
    )


async def stats(request: web.Request) -> web.Response:
    """Counters and usage of the store and of each tier, and what plans have been made."""
    daemon = request.app[DAEMON]
    stats = await daemon.workers.run(deadline_of(None), daemon.store.stats)
    return json_response({**stats, "spans": daemon.planner.stats()})


async def _from_memory(daemon: Daemon, verb: Callable[[list[bytes]], R], texts: Sequence[str]) -> R:
    """The answer of a verb that does no I/O; a long list goes to a thread so that others are not kept waiting."""
    keys = keys_of(texts, daemon.config.request_keys_max)
    if len(keys) <= INLINE_KEYS_MAX:
        return verb(keys)
    return await daemon.workers.run(deadline_of(None), verb, keys)


async def _found(request: web.Request, texts: Sequence[str], verb: Callable[[list[bytes]], list[bool]]) -> web.Response:
    daemon = request.app[DAEMON]
    keys = keys_of(texts, daemon.config.request_keys_max)
    return json_response(FoundReply(await daemon.workers.run(deadline_of(None), verb, keys)))


async def _moved(request: web.Request, verb: Callable[..., list[PutStatus]]) -> web.Response:
    daemon = request.app[DAEMON]
    body = await read_body(request, MoveRequest)
    keys = keys_of(body.keys, daemon.config.request_keys_max)
    deadline = deadline_of(body.deadline_ms)
    statuses = await daemon.workers.run(deadline, lambda: verb(keys, deadline_ms=remaining_ms(deadline)))
    return put_response(statuses)


def _put_item(entry: PutEntry, staging: Staging | None, index: int, tenant: str) -> PutItem:
    field = f"chunks[{index}]"
    view = (
        memoryview(b"")
        if not entry.nbytes
        else staging.view(entry.offset, entry.nbytes)
        if staging is not None
        else None
    )
    if view is None:
        size = len(staging) if staging is not None else 0
        raise RefusalError(
            400, "invalid", f"{field} is not inside the session's staging memory of {size} bytes", "offset"
        )
    parent = ROOT if entry.parent == ROOT.hex() else key_of(entry.parent, f"{field}.parent")
    return PutItem(key_of(entry.key, f"{field}.key"), view, parent, tenant=tenant)


def _store_all(store: Store, items: list[PutItem], durable: bool, deadline: float) -> list[PutStatus]:
    """Statuses of all items; those without bytes are only made durable if they are there."""
    with_bytes = [item for item in items if len(item.data)]
    stored = iter(store.put(with_bytes, durable=durable, deadline_ms=remaining_ms(deadline)))
    return [next(stored) if len(item.data) else _confirm(store, item, durable, deadline) for item in items]


def _confirm(store: Store, item: PutItem, durable: bool, deadline: float) -> PutStatus:
    if store.head([item.key])[0] is not None:
        place = store.reserve(item.key, 1, parent=item.parent, durable=durable)
        if not isinstance(place, Place):
            return store.settle(place, deadline)
        place.abort()  # evicted between the two calls
    return PutStatus(stored=False, reason=Reason.ABSENT, detail="no tier holds the key")
