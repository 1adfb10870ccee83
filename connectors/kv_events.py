"""A store's events in the form in which vLLM tells of its cache, for routers and indexers that listen to engines.

The form is that of vllm.distributed.kv_events (0.24 to 0.33): MessagePack of an array (seconds since 1970, events,
rank), each event a map with its kind under "type". Before vLLM 0.24 events were arrays, kind first; `decode` reads
both.

A chunk is one block of `chunk_tokens` tokens. Its hash is the last 8 bytes of its key as an integer, as vLLM makes its
own hashes integers. A store knows names and not tokens, so `token_ids` is empty: an indexer that wants to know which
prompts a block belongs to computes their keys (`kvstore.keys`), or asks the daemon.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from kvstore.decoding import convert
from kvstore.errors import ServiceError
from kvstore.events import Event
from kvstore.hash_index import block_hash
from kvstore.keys import ROOT
from kvstore.sidecar import sidecar_key

BLOCKS_MAX = 256
"""Blocks of one event."""

BATCH_BYTES_MAX = 16 << 20
"""No batch that is read is longer."""

MEDIA = {"hbm": "GPU", "dram": "CPU"}
"""Tier -> vLLM's word for where it is; every other tier is STORAGE."""

LOCAL = "LOCAL"


class BlockStored(msgspec.Struct, frozen=True, omit_defaults=True, tag=True):
    """Blocks of one chain can be read from a medium; `ownership` is the tier."""

    block_hashes: list[int | bytes]
    parent_block_hash: int | bytes | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None
    lora_name: str | None
    locality: str | None = None
    ownership: str | None = None


class BlockRemoved(msgspec.Struct, frozen=True, omit_defaults=True, tag=True):
    """Blocks cannot be read from a medium any more."""

    block_hashes: list[int | bytes]
    medium: str | None
    locality: str | None = None
    ownership: str | None = None


class AllBlocksCleared(msgspec.Struct, frozen=True, tag=True):
    """Forget every block of this publisher: what comes next is all that is known."""


BlockEvent = BlockStored | BlockRemoved | AllBlocksCleared


class Batch(msgspec.Struct, frozen=True, array_like=True, omit_defaults=True):
    """Events in the order in which they happened."""

    unix_seconds: float
    events: list[BlockEvent]
    data_parallel_rank: int | None = None


class _AnyBatch(msgspec.Struct, frozen=True, array_like=True):
    """A batch whose events may have either form."""

    unix_seconds: float
    events: list[dict[str, Any] | list[Any]]
    data_parallel_rank: int | None = None


_IN_ARRAYS: dict[str, tuple[str, ...]] = {
    "BlockStored": BlockStored.__struct_fields__[: BlockStored.__struct_fields__.index("locality")],
    "BlockRemoved": BlockRemoved.__struct_fields__[: BlockRemoved.__struct_fields__.index("locality")],
    "AllBlocksCleared": (),
}
"""Kind -> the fields of an event in an array, in their order; what is behind them differs between versions."""

_UNSAID = {"parent_block_hash": None, "lora_id": None, "medium": None, "lora_name": None}
"""What an event means that leaves these out, as old vLLM and SGLang do."""

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(_AnyBatch)


def block_events(events: Sequence[Event]) -> list[BlockEvent]:
    """A store's events as blocks: neighbours of one chain, or of one removal, become one event.

    After a `lost` marker nobody can tell what is stored, so everything is cleared. Side-cars are no blocks; that one
    was removed is told, for a removal does not say of what, and listeners pass over hashes that they do not know.
    """
    made: list[BlockEvent] = []
    run: list[Event] = []
    for event in events:
        if _is_sidecar(event):
            continue
        if run and not (len(run) < BLOCKS_MAX and _continues(run[-1], event)):
            made.append(_block_event(run))
            run = []
        run.append(event)
    return [*made, _block_event(run)] if run else made


def encode(events: Sequence[BlockEvent], unix_seconds: float, rank: int | None = None) -> bytes:
    """The bytes of a batch."""
    return _encoder.encode(Batch(unix_seconds, list(events), rank))


def decode(payload: bytes) -> Batch:
    """The batch in bytes from a publisher, whichever form it has; fields that are not known here are passed over.

    Raises:
        ServiceError: they are no batch.
    """
    if len(payload) > BATCH_BYTES_MAX:
        raise ServiceError(f"a batch of KV events has {len(payload)} bytes; at most {BATCH_BYTES_MAX}")
    try:
        batch = _decoder.decode(payload)
        events = [_event(event) for event in batch.events]
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ServiceError(f"a batch of KV events is not one: {error}") from error
    return Batch(batch.unix_seconds, events, batch.data_parallel_rank)


def _event(given: dict[str, Any] | list[Any]) -> BlockEvent:
    """An event of either form. Raises msgspec.ValidationError."""
    if isinstance(given, list):
        kind = given[0] if given and isinstance(given[0], str) else ""
        given = {"type": kind, **dict(zip(_IN_ARRAYS.get(kind, ()), given[1:], strict=False))}
    event: BlockEvent = convert({**_UNSAID, **given}, BlockEvent)  # type: ignore[arg-type]
    return event


def _is_sidecar(event: Event) -> bool:
    """Whether what was stored only describes the chunk that it names as its parent."""
    return event.tokens == 1 and event.parent not in (None, ROOT) and event.key == sidecar_key(event.parent)


def _continues(before: Event, event: Event) -> bool:
    """Whether an event belongs into the same block event as the one before it."""
    if before.kind != event.kind or before.tier != event.tier or event.kind == "lost":
        return False
    if event.kind == "removed":
        return True
    return event.parent == before.key and event.tokens == before.tokens


def _block_event(run: Sequence[Event]) -> BlockEvent:
    first = run[0]
    if first.kind == "lost":
        return AllBlocksCleared()
    medium = MEDIA.get(first.tier, "STORAGE")
    hashes: list[int | bytes] = [block_hash(event.key) for event in run]
    if first.kind == "removed":
        return BlockRemoved(hashes, medium, LOCAL, first.tier)
    parent = None if first.parent in (None, ROOT) else block_hash(first.parent)
    return BlockStored(hashes, parent, [], first.tokens or 0, None, medium, None, LOCAL, first.tier)
