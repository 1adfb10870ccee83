"""Events on the wire: Server-Sent Events, one JSON object each, as WHATWG HTML section 9.2 defines the stream.

    id: 1795262400000017        the event's number, to be given back as Last-Event-ID
    event: stored
    data: {"seq": 1795262400000017, "kind": "stored", ...}

A block with an id and no data says how far the stream has come; it is sent first and as keep-alive.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from kvstore.errors import ServiceError
from kvstore.events import Event, Kind
from kvstore.keys import KEY_BYTES
from kvstore.tier import Removal

EVENTS_TYPE = "text/event-stream"
KEEP_ALIVE_SECONDS = 10.0
"""The daemon says something at least this often."""

SILENCE_SECONDS = 3 * KEEP_ALIVE_SECONDS
"""A stream that has said nothing for so long is broken."""

BLOCK_BYTES_MAX = 16 * 1024
"""No block is longer; a peer that sends a longer one does not speak the protocol."""


class EventBody(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The JSON of one event; see `kvstore.events.Event`. Keys are 64 hexadecimal characters."""

    seq: int
    kind: Kind
    unix_seconds: float
    tier: str = ""
    key: str = ""
    parent: str | None = None
    nbytes: int = 0
    tokens: int | None = None
    reason: Removal | None = None
    detail: str = ""
    lost: int | None = None


class Block(NamedTuple):
    """One block of a stream: the number it carries, None if none, and its event, None if it is a keep-alive."""

    seq: int | None
    event: Event | None


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(EventBody)


def to_json(event: Event) -> bytes:
    """The event as one line of JSON."""
    body = EventBody(
        seq=event.seq,
        kind=event.kind,
        unix_seconds=event.unix_seconds,
        tier=event.tier,
        key=event.key.hex(),
        parent=None if event.parent is None else event.parent.hex(),
        nbytes=event.nbytes,
        tokens=event.tokens,
        reason=event.reason,
        detail=event.detail,
        lost=event.lost,
    )
    return _encoder.encode(body)


def encode(event: Event) -> bytes:
    """The event's block."""
    return b"id: %d\nevent: %s\ndata: %s\n\n" % (event.seq, event.kind.encode(), to_json(event))


def encode_position(seq: int) -> bytes:
    """A block that says how far the stream has come."""
    return b": keep-alive\nid: %d\n\n" % seq


class BlockReader:
    """Blocks out of bytes as they come. Nothing is kept beyond one unfinished block."""

    def __init__(self) -> None:
        self._unfinished = b""

    def feed(self, data: bytes) -> list[Block]:
        """The blocks that `data` completes, in order.

        Raises:
            ServiceError: the bytes are not a stream of events.
        """
        *whole, self._unfinished = (self._unfinished + data).split(b"\n\n")
        if len(self._unfinished) > BLOCK_BYTES_MAX:
            raise ServiceError(f"a block of the event stream is longer than {BLOCK_BYTES_MAX} bytes")
        return [_block(lines) for lines in whole]


def _block(text: bytes) -> Block:
    seq: int | None = None
    data = b""
    for line in text.split(b"\n"):
        field, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if field == b"id" and value.isdigit() and len(value) < 20:
            seq = int(value)
        elif field == b"data":
            data = value
    return Block(seq, _event(data) if data else None)


def _event(data: bytes) -> Event:
    """An event out of its JSON. Raises ServiceError."""
    try:
        body = _decoder.decode(data)
        key = bytes.fromhex(body.key)
        parent = None if body.parent is None else bytes.fromhex(body.parent)
    except (msgspec.MsgspecError, ValueError) as error:
        raise ServiceError(f"an event of the stream is not one: {error}") from error
    if len(key) != (0 if body.kind == "lost" else KEY_BYTES) or (parent is not None and len(parent) != KEY_BYTES):
        raise ServiceError(f"an event of the stream has a key of another size than {KEY_BYTES} bytes")
    return Event(
        seq=body.seq,
        kind=body.kind,
        unix_seconds=body.unix_seconds,
        tier=body.tier,
        key=key,
        parent=parent,
        nbytes=body.nbytes,
        tokens=body.tokens,
        reason=body.reason,
        detail=body.detail,
        lost=body.lost,
    )
