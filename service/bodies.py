"""Request bodies into checked values: strict JSON, bounded key lists, deadlines."""

from __future__ import annotations

import asyncio
import difflib
import re
import time
from collections.abc import Sequence
from typing import TypeVar

import msgspec
from aiohttp import web

from kvstore.client import DEADLINE_MS_DEFAULT, DEADLINE_MS_MAX
from kvstore.decoding import decode_json
from kvstore.errors import ConfigError
from kvstore.keys import ROOT
from kvstore.protocol import parse_keys
from kvstore.service.refusal import RefusalError

BODY_SECONDS_MAX = 30.0
"""A sender that takes longer over a JSON body must not keep others from being served."""

T = TypeVar("T", bound=msgspec.Struct)

_UNKNOWN_FIELD = re.compile(r"unknown field `([^`]*)`")
_PLACE = re.compile(r"at `\$\.([^`]{1,80})`")


async def read_body(request: web.Request, kind: type[T]) -> T:
    """The request's JSON body as a `kind`.

    Raises:
        RefusalError: 400 if it is not one, with the nearest valid name of an unknown field; 413 if too large; 504 if
            it does not come.
    """
    if (request.content_length or 0) > request.client_max_size > 0:
        raise RefusalError(413, "too_large", f"the request body is larger than {request.client_max_size} bytes")
    try:
        async with asyncio.timeout(BODY_SECONDS_MAX):
            data = await request.read()
    except TimeoutError:
        raise RefusalError(504, "deadline", f"the request body did not come in {BODY_SECONDS_MAX:.0f} s") from None
    except web.HTTPRequestEntityTooLarge as error:
        raise RefusalError(
            413, "too_large", f"the request body is larger than {request.client_max_size} bytes"
        ) from error
    return decode_body(data or b"{}", kind)


def decode_body(data: bytes, kind: type[T]) -> T:
    """Like `read_body`, of bytes."""
    try:
        return decode_json(data, kind)
    except (msgspec.ValidationError, msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        unknown = _UNKNOWN_FIELD.search(str(error))
        if unknown is None:
            place = _PLACE.search(str(error))
            raise RefusalError(400, "invalid", f"request body: {error}", place and place[1]) from error
        names = kind.__struct_fields__
        near = difflib.get_close_matches(unknown[1], names, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"valid are: {', '.join(names)}"
        raise RefusalError(400, "invalid", f"unknown field {unknown[1]!r:.80}; {hint}", unknown[1][:80]) from error


def keys_of(texts: Sequence[str], keys_max: int) -> list[bytes]:
    """The keys of a request. Raises RefusalError: 413 for too many, 400 for one that is no key."""
    if len(texts) > keys_max:
        raise RefusalError(413, "too_large", f"{len(texts)} keys; a request has at most {keys_max}", "keys")
    try:
        return parse_keys(texts)
    except ConfigError as error:
        raise RefusalError(400, "invalid", str(error), "keys") from error


def key_of(text: str, field: str = "key") -> bytes:
    """One key. Raises RefusalError (400) if it is none."""
    try:
        return parse_keys([text], field)[0]
    except ConfigError as error:
        raise RefusalError(400, "invalid", str(error), field) from error


def parent_of(text: str | None) -> bytes:
    """The parent key of a put; the root if none is given."""
    return key_of(text, "parent") if text is not None else ROOT


def deadline_of(deadline_ms: float | None) -> float:
    """time.monotonic seconds of a request's deadline. Raises RefusalError (400) if it is no duration."""
    if deadline_ms is None:
        deadline_ms = DEADLINE_MS_DEFAULT
    if not 0 <= deadline_ms <= DEADLINE_MS_MAX:
        raise RefusalError(
            400, "invalid", f"deadline_ms is {deadline_ms}; it must be in 0..{DEADLINE_MS_MAX:.0f}", "deadline_ms"
        )
    return time.monotonic() + deadline_ms / 1000


def remaining_ms(deadline: float) -> float:
    """Milliseconds until `deadline` (time.monotonic seconds), at least 0."""
    return max(0.0, (deadline - time.monotonic()) * 1000)
