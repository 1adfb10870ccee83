"""/query and /query_by_hash: which tiers hold how much of a prompt, in the forms that cache-aware routers speak.

There are two such forms, and an answer has that of its question. A question with `model_name` is one to the KV indexer
of NVIDIA Dynamo (1.0 to 1.6), one with `model` is one to Mooncake's Conductor (its RFC 1403). This daemon is then one
instance, with one data-parallel rank. As those indexers do, these verbs pass over fields that they do not know.

A name stands for what `service.models` says of it: routers know names, and keys are made of fingerprints.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import msgspec
from aiohttp import web

from kvstore.config import ModelConfig, unknown_name
from kvstore.protocol import TokenId
from kvstore.service.bodies import deadline_of, read_body
from kvstore.service.daemon import DAEMON, Daemon
from kvstore.service.prompts import INLINE_TOKENS_MAX, schemes_of
from kvstore.service.refusal import RefusalError, json_response
from kvstore.tier import SupportsHold, SupportsLease, Tier

RANK = "0"
"""The one data-parallel rank of a store."""

Name = Annotated[str, msgspec.Meta(max_length=256)]
Reply = dict[str, object]


class Question(msgspec.Struct, frozen=True, kw_only=True):
    """What both verbs take.

    `model_name` or `model` is a name in `service.models`, unless `lora_name` is given: then that is. `tenant_id` and
    `instance_id` choose and name nothing here but the places of Mooncake's answer; `block_size` are its tokens a block.
    `cache_salt` is a request's own salt, as vLLM takes it; hashes contain it already.
    """

    model_name: Name = ""
    model: Name = ""
    lora_name: Name | None = None
    lora_id: int | None = None
    tenant_id: Name = "default"
    instance_id: Name | int | None = None
    block_size: Annotated[int, msgspec.Meta(ge=1)] | None = None
    cache_salt: Name | None = None


class QueryRequest(Question, frozen=True, kw_only=True):
    """query: the ids of a prompt's tokens; a tail that does not fill a chunk counts for nothing."""

    token_ids: list[TokenId]


class QueryByHashRequest(Question, frozen=True, kw_only=True):
    """query_by_hash: a chain's hashes as this store's KV events have them; `seq_hashes` or `block_hashes`."""

    seq_hashes: list[int] | None = None
    block_hashes: list[int] | None = None
    block_hash: list[int] | None = None


class Reach(msgspec.Struct, frozen=True):
    """Leading tokens of a prompt, by where they are.

    `gpu`, `cpu` and `disk` are those that this kind of place holds alone; `through_cpu` those that the first two hold
    together, `through_disk` all.
    """

    gpu: int
    cpu: int
    disk: int
    through_cpu: int
    through_disk: int


async def query(request: web.Request) -> web.Response:
    """How much of a prompt is where."""
    daemon = request.app[DAEMON]
    body = await read_body(request, QueryRequest)
    model = _model(daemon, body)
    tokens_max = daemon.config.request_keys_max * model.chunk_tokens
    if len(body.token_ids) > tokens_max:
        raise RefusalError(413, "too_large", f"{len(body.token_ids)} token ids; at most {tokens_max}", "token_ids")
    if len(body.token_ids) <= INLINE_TOKENS_MAX:
        return json_response(_query(daemon, body, model))
    return json_response(await daemon.workers.run(deadline_of(None), _query, daemon, body, model))


async def query_by_hash(request: web.Request) -> web.Response:
    """How much of a chain of hashes is where."""
    daemon = request.app[DAEMON]
    body = await read_body(request, QueryByHashRequest)
    model = _model(daemon, body)
    given = [hashes for hashes in (body.seq_hashes, body.block_hashes, body.block_hash) if hashes is not None]
    if len(given) != 1:
        raise RefusalError(400, "invalid", "give either seq_hashes or block_hashes", "seq_hashes")
    if len(given[0]) > daemon.config.request_keys_max:
        detail = f"{len(given[0])} hashes; at most {daemon.config.request_keys_max}"
        raise RefusalError(413, "too_large", detail, "seq_hashes")
    if body.block_size not in (None, model.chunk_tokens):
        detail = f"block_size is {body.block_size}; the hashes are of chunks of {model.chunk_tokens} tokens"
        raise RefusalError(400, "invalid", detail, "block_size")
    return json_response(await daemon.workers.run(deadline_of(None), _query_by_hash, daemon, body, model, given[0]))


def _query(daemon: Daemon, body: QueryRequest, model: ModelConfig) -> Reply:
    extras = {"cache_salt": body.cache_salt} if body.cache_salt else {}
    scheme = schemes_of(model.fingerprint, model.salt.encode().hex(), extras).of(model.chunk_tokens)
    return _reply(daemon, body, model, scheme.chain(body.token_ids))


def _query_by_hash(daemon: Daemon, body: QueryByHashRequest, model: ModelConfig, hashes: Sequence[int]) -> Reply:
    keys = daemon.hashes.find(hashes)
    known = next((index for index, key in enumerate(keys) if key is None), len(keys))
    return _reply(daemon, body, model, [key for key in keys[:known] if key is not None])


def _model(daemon: Daemon, body: Question) -> ModelConfig:
    """What a question's model stands for. Raises RefusalError: 400, or 404 for a name that nothing is known of."""
    if bool(body.model_name) == bool(body.model):
        raise RefusalError(400, "invalid", "give either model_name (Dynamo) or model (Mooncake)", "model_name")
    field = "model_name" if body.model_name else "model"
    if body.model and body.block_size is None:
        raise RefusalError(400, "invalid", "a question with model needs block_size", "block_size")
    if body.lora_id is not None:
        raise RefusalError(400, "invalid", "lora_id says nothing here; give lora_name", "lora_id")
    name = body.lora_name or body.model_name or body.model
    model = daemon.config.models.get(name)
    if model is None:
        detail = f"unknown model {name!r}; name models and their fingerprints in service.models"
        if daemon.config.models:
            detail = str(unknown_name("model", name, daemon.config.models))
        raise RefusalError(404, "unknown_model", detail, "lora_name" if body.lora_name else field)
    return model


def _reply(daemon: Daemon, body: Question, model: ModelConfig, keys: Sequence[bytes]) -> Reply:
    reach = _reach(daemon, keys, model.chunk_tokens, body.block_size or 1)
    instance = daemon.config.instance_id
    if body.model:
        there = body.instance_id is None or str(body.instance_id) == instance
        return {body.tenant_id: {instance: _conductor(reach)} if there else {}}
    gpu_chunks = reach.gpu // model.chunk_tokens
    return {
        "scores": {instance: {RANK: reach.gpu}} if gpu_chunks else {},
        "frequencies": [1] * gpu_chunks,
        "instances": {instance: _dynamo(reach)} if reach.through_disk else {},
    }


def _dynamo(reach: Reach) -> Reply:
    """What Dynamo's indexer says of an instance: each place counts what the ones before it hold, too."""
    return {
        "longest_matched": reach.through_disk,
        "gpu": reach.gpu,
        "dp": {RANK: reach.gpu},
        "cpu": reach.through_cpu,
        "disk": reach.through_disk,
    }


def _conductor(reach: Reach) -> Reply:
    """What Mooncake's Conductor says of an instance: each place counts what it holds itself."""
    return {
        "longest_matched": reach.through_disk,
        "GPU": reach.gpu,
        "DP": {RANK: reach.through_disk},
        "CPU": reach.cpu,
        "DISK": reach.disk,
    }


def _reach(daemon: Daemon, keys: Sequence[bytes], chunk_tokens: int, block_size: int) -> Reach:
    """How many leading tokens are where, in whole blocks."""
    media = {tier.name: _medium(tier) for tier in daemon.store.tiers}
    places = [{media[name] for name in info.tiers} if info else set() for info in daemon.store.head(keys)]

    def leading(*wanted: str) -> int:
        chunks = next((at for at, place in enumerate(places) if place.isdisjoint(wanted)), len(places))
        return chunks * chunk_tokens // block_size * block_size

    return Reach(
        gpu=leading("gpu"),
        cpu=leading("cpu"),
        disk=leading("disk"),
        through_cpu=leading("gpu", "cpu"),
        through_disk=leading("gpu", "cpu", "disk"),
    )


def _medium(tier: Tier) -> str:
    """What kind of place a tier is, by what can be done with its bytes."""
    if isinstance(tier, SupportsHold):
        return "gpu"
    return "cpu" if isinstance(tier, SupportsLease) else "disk"
