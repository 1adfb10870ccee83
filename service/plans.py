"""plan and plan_batch: what to do about the tokens of a prompt, and in which order to compute many."""

from __future__ import annotations

from aiohttp import web

from kvstore.batching import plan_batch
from kvstore.errors import ConfigError
from kvstore.keys import KeyScheme
from kvstore.plan_protocol import (
    PlanBatchReply,
    PlanBatchRequest,
    PlanReply,
    PlanRequest,
    batch_reply,
    plan_reply,
)
from kvstore.service.bodies import deadline_of, read_body
from kvstore.service.daemon import DAEMON, Daemon
from kvstore.service.prompts import schemes_of
from kvstore.service.refusal import RefusalError, json_response


async def plan(request: web.Request) -> web.Response:
    """Spans that cover the prompt: chunks to load with the prefix, chunks of documents, and what to recompute."""
    daemon = request.app[DAEMON]
    body = await read_body(request, PlanRequest)
    keys = _scheme(daemon, body, len(body.token_ids))
    return json_response(await daemon.workers.run(deadline_of(None), _plan, daemon, keys, body))


async def batch(request: web.Request) -> web.Response:
    """The tree of the prefixes that prompts share, and the order that reuses most."""
    daemon = request.app[DAEMON]
    body = await read_body(request, PlanBatchRequest)
    keys = _scheme(daemon, body, sum(map(len, body.prompts)))
    return json_response(await daemon.workers.run(deadline_of(None), _plan_batch, daemon, keys, body))


def _scheme(daemon: Daemon, body: PlanRequest | PlanBatchRequest, tokens: int) -> KeyScheme:
    """The keys of a request's model and tenant. Raises RefusalError: 400 or 413, naming the field."""
    tokens_max = daemon.config.request_keys_max * body.chunk_tokens
    if tokens > tokens_max:
        detail = f"{tokens} token ids; with this chunk_tokens a request has at most {tokens_max}"
        raise RefusalError(413, "too_large", detail, "token_ids" if isinstance(body, PlanRequest) else "prompts")
    return schemes_of(body.fingerprint, body.salt, body.extras).of(body.chunk_tokens)


def _plan(daemon: Daemon, keys: KeyScheme, body: PlanRequest) -> PlanReply:
    try:
        return plan_reply(daemon.planner.plan(body.token_ids, keys, body.options()))
    except ConfigError as error:
        raise RefusalError(400, "invalid", str(error), _field(str(error))) from error


def _plan_batch(daemon: Daemon, keys: KeyScheme, body: PlanBatchRequest) -> PlanBatchReply:
    return batch_reply(plan_batch(body.prompts, keys, cache_tokens=body.cache_tokens, store=daemon.store))


def _field(message: str) -> str | None:
    """The request's field that a message begins with."""
    name = message.partition(" ")[0].partition("[")[0].partition(".")[0]
    return {"tokens": "token_ids", "the": "token_ids"}.get(
        name, name if name in PlanRequest.__struct_fields__ else None
    )
