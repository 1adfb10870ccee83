"""lookup and explain: the verbs that take a chain of keys, or the token ids that the keys are made of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import msgspec
from aiohttp import web

from kvstore.explaining import Explanation, explain_prompt
from kvstore.keys import KEY_BYTES, KeyScheme
from kvstore.outcome import Lookup
from kvstore.protocol import ExplainEntry, ExplainReply, HexBytes, PromptLookup, PromptRequest
from kvstore.service.bodies import deadline_of, keys_of, read_body
from kvstore.service.daemon import DAEMON, Daemon
from kvstore.service.refusal import RefusalError, json_response

INLINE_KEYS_MAX = 2048
INLINE_TOKENS_MAX = 16384
"""Keys and token ids that are handled on the event loop: about a millisecond's worth."""


class Schemes(NamedTuple):
    """What the keys of a prompt are made of, apart from its tokens and their number a chunk."""

    fingerprint: bytes
    salt: bytes
    extras: dict[str, str | bytes | int]

    def of(self, chunk_tokens: int) -> KeyScheme:
        """The keys of chunks of that many tokens."""
        return KeyScheme(self.fingerprint, chunk_tokens=chunk_tokens, salt=self.salt, extras=self.extras)


async def lookup(request: web.Request) -> web.Response:
    """The longest prefix of the chain that can be fetched now; with the keys, if they had to be computed."""
    daemon = request.app[DAEMON]
    body = await read_body(request, PromptRequest)
    if _is_short(body):
        return json_response(_lookup(daemon, body))
    return json_response(await daemon.workers.run(deadline_of(None), _lookup, daemon, body))


async def explain(request: web.Request) -> web.Response:
    """For each chunk of the chain where it is, or why it is nowhere."""
    daemon = request.app[DAEMON]
    body = await read_body(request, PromptRequest)
    if _is_short(body):
        return json_response(_explain(daemon, body))
    return json_response(await daemon.workers.run(deadline_of(None), _explain, daemon, body))


def _is_short(body: PromptRequest) -> bool:
    return len(body.keys or ()) <= INLINE_KEYS_MAX and len(body.token_ids or ()) <= INLINE_TOKENS_MAX


def _lookup(daemon: Daemon, body: PromptRequest) -> Lookup | PromptLookup:
    schemes = _schemes(daemon, body)
    if schemes is None:
        return daemon.store.lookup(keys_of(body.keys or (), daemon.config.request_keys_max))
    keys = schemes.of(body.chunk_tokens).chain(body.token_ids or ())
    found = daemon.store.lookup(keys)
    return PromptLookup(**msgspec.structs.asdict(found), keys=[key.hex() for key in keys])


def _explain(daemon: Daemon, body: PromptRequest) -> ExplainReply:
    schemes = _schemes(daemon, body)
    if schemes is None:
        explained = daemon.store.explain(keys_of(body.keys or (), daemon.config.request_keys_max))
    else:
        explained = explain_prompt(daemon.store, body.token_ids or (), body.chunk_tokens, schemes.of)
    return ExplainReply([_entry(explanation) for explanation in explained])


def _entry(explanation: Explanation) -> ExplainEntry:
    return ExplainEntry(**{**msgspec.structs.asdict(explanation), "key": explanation.key.hex()})


def _schemes(daemon: Daemon, body: PromptRequest) -> Schemes | None:
    """How to make the keys of a request by token ids, None for one by keys.

    Raises:
        RefusalError: 400 or 413 naming the field.
    """
    if (body.keys is None) == (body.token_ids is None):
        raise RefusalError(400, "invalid", "give either keys, or token_ids with a fingerprint", "keys")
    if body.token_ids is None:
        for field in ("fingerprint", "salt", "extras"):
            if getattr(body, field):
                raise RefusalError(400, "invalid", f"{field} belongs to token_ids; keys already contain it", field)
        return None
    tokens_max = daemon.config.request_keys_max * body.chunk_tokens
    if len(body.token_ids) > tokens_max:
        detail = f"{len(body.token_ids)} token ids; with this chunk_tokens a request has at most {tokens_max}"
        raise RefusalError(413, "too_large", detail, "token_ids")
    return schemes_of(body.fingerprint, body.salt, body.extras)


def schemes_of(fingerprint: str, salt: str, extras: Mapping[str, str | int | HexBytes]) -> Schemes:
    """How to make keys, out of a request's fields. Raises RefusalError (400) naming the field."""
    model = _bytes_of(fingerprint, "fingerprint")
    if len(model) != KEY_BYTES:
        detail = f"fingerprint has {len(model)} bytes; a model's has {KEY_BYTES}, in hexadecimal characters"
        raise RefusalError(400, "invalid", detail, "fingerprint")
    values = {
        name: _bytes_of(value.hex, f"extras.{name:.40}.hex") if isinstance(value, HexBytes) else value
        for name, value in extras.items()
    }
    return Schemes(model, _bytes_of(salt, "salt"), values)


def _bytes_of(text: str, field: str) -> bytes:
    try:
        value = bytes.fromhex(text)
    except ValueError:
        value = None
    if value is None or len(text) != 2 * len(value):
        raise RefusalError(400, "invalid", f"{field} is {text!r:.80}; write bytes as hexadecimal characters", field)
    return value
