"""What a request asks of blending, in vLLM's `kv_transfer_params`, and what has become of it.

    {"kvstore": {"blend": {"preamble_tokens": 12, "documents": [[12, 524], [524, 1036]]}}}
    {"kvstore": {"store_document": {"preamble_tokens": 12}}}

The first has the KV of documents put together for this request. The second is sent with a prompt that is a preamble and
one document, and has the KV of the document stored, so that other requests can be blended from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from kvstore.errors import ConfigError
from kvstore.span_plan import PlanOptions
from kvstore.spans import Document

FIELD = "kvstore"


class BlendAsked(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Reuse documents: tokens start..stop of the prompt each, from left to right, and what they were computed behind.

    With `scan`, known documents are looked for everywhere else, too. Documents with another `salt` are others.
    """

    documents: tuple[tuple[int, int], ...] = ()
    preamble_tokens: int = 0
    scan: bool = False
    salt: str = ""

    def options(self, context_tokens: int) -> PlanOptions:
        """How to plan it. Raises ConfigError if the documents do not make sense."""
        return PlanOptions(
            documents=[Document(start, stop) for start, stop in self.documents],
            preamble_tokens=self.preamble_tokens,
            scan=self.scan,
            context_tokens=context_tokens,
        )


class StoreAsked(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Store the prompt behind its first `preamble_tokens` tokens as a document, apart from those of other salts."""

    preamble_tokens: int = 0
    salt: str = ""


class _Asked(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    blend: BlendAsked | None = None
    store_document: StoreAsked | None = None


def asked(params: Mapping[str, Any] | None) -> BlendAsked | StoreAsked | None:
    """What a request's `kv_transfer_params` ask for, None if nothing.

    Raises:
        ConfigError: they are not understood; names the field.
    """
    if not isinstance(params, Mapping) or FIELD not in params:
        return None
    try:
        found = msgspec.convert(params[FIELD], _Asked)
    except msgspec.ValidationError as error:
        raise ConfigError(f"kv_transfer_params.{FIELD}: {error}") from error
    if found.blend is not None and found.store_document is not None:
        raise ConfigError(f"kv_transfer_params.{FIELD} has both blend and store_document; send two requests")
    return found.blend or found.store_document


def answered(fields: Mapping[str, Any]) -> dict[str, Any]:
    """`kv_transfer_params` of a finished request, which say what has become of it."""
    return {FIELD: dict(fields)}
