"""Checking a tier of a running daemon: one bounded step a request, on a worker thread."""

from __future__ import annotations

from aiohttp import web

from kvstore.protocol import BadEntry, VerifyReply, VerifyRequest
from kvstore.service.bodies import deadline_of, read_body
from kvstore.service.daemon import DAEMON
from kvstore.service.refusal import RefusalError, json_response
from kvstore.store import Store
from kvstore.verifying import SupportsVerify

STEP_BYTES_MAX = 1 << 30


async def verify(request: web.Request) -> web.Response:
    """Compare the hashes of some chunks of a tier."""
    daemon = request.app[DAEMON]
    body = await read_body(request, VerifyRequest)
    if not 0 < body.bytes_max <= STEP_BYTES_MAX:
        detail = f"bytes_max is {body.bytes_max}; it must be in 1..{STEP_BYTES_MAX}"
        raise RefusalError(400, "invalid", detail, "bytes_max")
    name, tier = _tier(daemon.store, body.tier)
    deadline = deadline_of(body.deadline_ms)
    found = await daemon.workers.run(
        deadline, lambda: tier.verify(body.start, bytes_max=body.bytes_max, repair=body.repair)
    )
    bad = [BadEntry(chunk.key.hex(), chunk.detail) for chunk in found.bad]
    return json_response(VerifyReply(name, found.chunks, found.nbytes, bad, found.next_start))


def _tier(store: Store, name: str) -> tuple[str, SupportsVerify]:
    """The tier of that name, or the first that can be checked. Raises RefusalError (404)."""
    able = {tier.name: tier for tier in store.tiers if isinstance(tier, SupportsVerify)}
    for tier_name, tier in able.items():
        if name in ("", tier_name):
            return tier_name, tier
    detail = f"no tier {name!r} that can be checked; there is {', '.join(able) or 'none'}"
    raise RefusalError(404, "absent", detail, "tier")
