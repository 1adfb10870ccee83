"""Why a prompt would hit or miss: for each of its chunks where it is, or why it is nowhere.

What is known of a chunk that has left is in the store's `EventLog`: the last removals since the store was opened, no
more than `removals_max` of them.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Protocol

import msgspec

from kvstore.events import Event
from kvstore.keys import KeyScheme, Tokens, token_array
from kvstore.tier import Removal

if TYPE_CHECKING:
    from kvstore.client import ChunkInfo

OTHER_CHUNK_TOKENS = (16, 32, 64, 128, 256, 512, 1024, 2048)
"""Chunk sizes that writers use; a prompt that is not found at all is looked for in these."""


class Why(enum.StrEnum):
    """What would become of a chunk in a fetch of the whole prompt. Stable names: they are wire values."""

    PRESENT = "present"  # it would be served
    PARENT_ABSENT = "parent_absent"  # it is there, but a chunk before it is not
    ABSENT = "absent"  # no tier holds it, and nothing is known of it
    EVICTED = "evicted"  # its room was needed
    DELETED = "deleted"  # somebody asked for it
    QUARANTINED = "quarantined"  # its bytes were bad
    EXPIRED = "expired"  # it was not used for as long as its tier keeps such
    WRONG_CHUNK_TOKENS = "wrong_chunk_tokens"  # the prompt is stored in chunks of another size


class Explanation(msgspec.Struct, frozen=True, kw_only=True):
    """One chunk of a prompt. `tiers` (fastest first) and `nbytes` say what is there.

    `removed_from` and `removed_unix_seconds` are of its last removal from a tier, if that is remembered and the chunk
    is in no tier. `detail` is one line for a person.
    """

    key: bytes
    why: Why
    tiers: tuple[str, ...] = ()
    nbytes: int = 0
    detail: str = ""
    removed_from: str = ""
    removed_unix_seconds: float | None = None


class Explainer(Protocol):
    """What `explain_prompt` asks: a store or a client."""

    def explain(self, keys: Sequence[bytes]) -> list[Explanation]:
        """One explanation a key."""

    def head(self, keys: Sequence[bytes]) -> list[ChunkInfo | None]:
        """What is known of each chunk."""


def explain_chain(
    keys: Sequence[bytes],
    infos: Sequence[ChunkInfo | None],
    last_removal: Callable[[bytes], Event | None],
    last_refusal: Callable[[bytes], str] = lambda _: "",
) -> list[Explanation]:
    """One explanation a key of the chain `keys`, out of what `head` and the log of removals and refusals know."""
    hole: int | None = None
    explained = []
    for index, (key, info) in enumerate(zip(keys, infos, strict=True)):
        if info is None:
            hole = index if hole is None else hole
            explained.append(_gone(key, last_removal(key), last_refusal(key)))
        elif hole is None:
            refusal = last_refusal(key) if len(info.tiers) == 1 else ""
            explained.append(
                Explanation(key=key, why=Why.PRESENT, tiers=info.tiers, nbytes=info.nbytes, detail=refusal)
            )
        else:
            detail = f"it is there, but chunk {hole} before it is not"
            explained.append(
                Explanation(key=key, why=Why.PARENT_ABSENT, tiers=info.tiers, nbytes=info.nbytes, detail=detail)
            )
    return explained


def explain_prompt(
    store: Explainer, tokens: Tokens, chunk_tokens: int, scheme_of: Callable[[int], KeyScheme]
) -> list[Explanation]:
    """One explanation a full chunk of `tokens`; tells of a prompt that is stored in chunks of another size.

    Args:
        store: whom to ask.
        tokens: ids of the whole prompt.
        chunk_tokens: tokens of a chunk, as the reader has it.
        scheme_of: the keys of this model and tenant for a number of tokens a chunk.

    Raises:
        SpecError: a token id is not in 0..2**32-1.
    """
    ids = token_array(tokens)
    explained = store.explain(scheme_of(chunk_tokens).chain(ids))
    if explained and explained[0].why != Why.ABSENT:
        return explained
    sizes = [size for size in OTHER_CHUNK_TOKENS if size != chunk_tokens and size <= len(ids)]
    first_keys = [scheme_of(size).chain(ids[:size])[0] for size in sizes]
    found = [str(size) for size, info in zip(sizes, store.head(first_keys), strict=True) if info is not None]
    if not found:
        return explained
    detail = f"the prompt is stored in chunks of {' and '.join(found)} tokens, not of {chunk_tokens}"
    return [
        msgspec.structs.replace(chunk, why=Why.WRONG_CHUNK_TOKENS, detail=detail) if chunk.why is Why.ABSENT else chunk
        for chunk in explained
    ]


def _gone(key: bytes, event: Event | None, refusal: str) -> Explanation:
    if event is None or event.reason is None:
        detail = "no tier holds it, and no removal of it is remembered" + (f"; {refusal}" if refusal else "")
        return Explanation(key=key, why=Why.ABSENT, detail=detail)
    when = datetime.fromtimestamp(event.unix_seconds, UTC).isoformat(timespec="milliseconds")
    because = {
        Removal.EVICTED: "to make room",
        Removal.DELETED: "on request",
        Removal.EXPIRED: "because it had not been used for long (ttl)",
        Removal.QUARANTINED: f"because it is bad: {event.detail or 'the device failed to read it'}",
    }[event.reason]
    return Explanation(
        key=key,
        why=Why(str(event.reason)),
        detail=f"removed from {event.tier} at {when} {because}" + (f"; {refusal}" if refusal else ""),
        removed_from=event.tier,
        removed_unix_seconds=event.unix_seconds,
    )
