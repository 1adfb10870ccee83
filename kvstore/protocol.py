"""What a remote client and the daemon say to each other: bodies, frames and session messages. docs/service.md explains.

Everything here is data from another process: requests are decoded strictly (an unknown field is refused), replies and
frames are checked for type and bounds, and no count or length is trusted before it has been compared with a limit.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Literal

import msgspec

from kvstore.client import Order
from kvstore.errors import ConfigError
from kvstore.keys import KEY_BYTES, ROOT
from kvstore.outcome import Miss, PutStatus

CHUNK_TYPE = "application/vnd.kvstore.chunk"
STREAM_TYPE = "application/vnd.kvstore.stream"
SESSION_HEADER = "X-KVStore-Session"
SESSION_SUFFIX = ".session"
"""The session socket lies beside the daemon's UNIX socket, under its name and this."""

SESSION_VERSION = 1
SESSION_MESSAGE_BYTES_MAX = 4096
FRAME_HEADER_BYTES_MAX = 4096
CHUNK_BYTES_MAX = 4 << 30
"""No container on the wire is larger; a length beyond it is a broken peer, not an allocation."""

FRAME_PREFIX = struct.Struct("<I")
"""Bytes of the frame header that follows."""

ACK = struct.Struct("<QQ")
"""Fetch number, frames of it that the client has done with, counted from the first."""

ACK_ALL = (1 << 64) - 1
"""As a frame count: the client wants no more of that fetch."""

Transport = Literal["bytes", "shm"]


class Request(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A request body. Keys are 64 hexadecimal characters each."""


class KeysRequest(Request, frozen=True, kw_only=True):
    """lookup, head, unpin, delete."""

    keys: list[str]


class PinRequest(Request, frozen=True, kw_only=True):
    """pin: keep the chunks from eviction for `ttl_seconds`."""

    keys: list[str]
    ttl_seconds: float


class PrefetchRequest(Request, frozen=True, kw_only=True):
    """prefetch: promote the chunks to the fastest tier."""

    keys: list[str]
    deadline_ms: float | None = None


class FetchRequest(Request, frozen=True, kw_only=True):
    """fetch: the chunks as one stream of frames."""

    keys: list[str]
    order: Order = "chunk"
    deadline_ms: float | None = None
    transport: Transport = "bytes"


class PutEntry(Request, frozen=True, kw_only=True):
    """One container in the session's staging memory.

    With `nbytes` 0 nothing is read: a chunk that is there is made durable if that was asked for, else it is a miss.
    """

    key: str
    offset: int = 0
    nbytes: int = 0
    parent: str = ROOT.hex()


class PutRequest(Request, frozen=True, kw_only=True):
    """put: containers out of the session's staging memory."""

    chunks: list[PutEntry]
    durable: bool = False
    deadline_ms: float | None = None


class FlushRequest(Request, frozen=True, kw_only=True):
    """flush: wait until everything put so far is durable."""

    deadline_ms: float | None = None


class HeadEntry(msgspec.Struct, frozen=True):
    """What is known of a stored chunk: container bytes, tiers holding it (fastest first), if one of them is durable."""

    nbytes: int
    tiers: tuple[str, ...]
    durable: bool = False


class HeadReply(msgspec.Struct, frozen=True):
    """Answer to head."""

    chunks: list[HeadEntry | None]


class StatusesReply(msgspec.Struct, frozen=True):
    """Answer to put and prefetch."""

    statuses: list[PutStatus]


class FoundReply(msgspec.Struct, frozen=True):
    """Answer to pin, unpin and delete."""

    found: list[bool]


class FlushReply(msgspec.Struct, frozen=True):
    """Answer to flush."""

    flushed: bool


class InfoReply(msgspec.Struct, frozen=True):
    """Answer to info: who answers, and the limits a client must keep."""

    version: str
    request_bytes_max: int
    request_keys_max: int


class ErrorBody(msgspec.Struct, frozen=True, omit_defaults=True):
    """What went wrong: a stable code, one line for a person, and the field of the request if one is to blame."""

    code: str
    message: str
    field: str | None = None


class ErrorReply(msgspec.Struct, frozen=True):
    """The one shape of every error answer."""

    error: ErrorBody


class Frame(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Header of one frame of a fetch; `payload_bytes` bytes follow it.

    open   first frame: `fetch` numbers this fetch inside the session.
    chunk  a whole container: the payload, or with transport shm the `nbytes` at `offset` of the arena.
    layers layer groups `group .. group + groups` of a container. The payload is the container's header
           (`header_bytes`, in the first such frame of a chunk only), then the groups' segments one after another; with
           transport shm the whole container lies at `offset` and only those segments may be read yet.
    miss   the chunk cannot be served.
    end    last frame; a stream that stops without it was cut short.

    `expires_at` (time.monotonic seconds of this host) is when the right to read the arena ends.
    """

    kind: Literal["open", "chunk", "layers", "miss", "end"]
    fetch: int = 0
    index: int = 0
    miss: Miss | None = None
    payload_bytes: int = 0
    header_bytes: int = 0
    group: int = 0
    groups: int = 0
    offset: int = -1
    nbytes: int = 0
    expires_at: float = 0.0


class SessionHello(msgspec.Struct, frozen=True, kw_only=True):
    """First message of the daemon on a session socket; the arena's descriptor comes with it.

    `now` is the daemon's time.monotonic: a client whose clock differs lives in another time namespace and must not use
    leases.
    """

    version: int
    session: str
    arena_bytes: int
    staging_bytes_max: int
    now: float


class SessionStaging(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The client's answer: size of its staging memory, whose descriptor comes with it; 0 and no descriptor for none."""

    staging_bytes: int


class SessionReady(msgspec.Struct, frozen=True, omit_defaults=True):
    """The daemon's answer: the session is open, or why not."""

    error: str = ""


def encode_frame(frame: Frame) -> bytes:
    """Prefix and header of a frame; its payload goes behind."""
    header = msgspec.json.encode(frame)
    return FRAME_PREFIX.pack(len(header)) + header


def parse_keys(texts: Sequence[str], field: str = "keys") -> list[bytes]:
    """The 32-byte keys written as 64 hexadecimal characters each. Raises ConfigError naming `field`."""
    keys = []
    for index, text in enumerate(texts):
        try:
            key = bytes.fromhex(text)
        except ValueError:
            key = b""
        if len(key) != KEY_BYTES or len(text) != 2 * KEY_BYTES:
            raise ConfigError(f"{field}[{index}] is {text!r:.80}; a chunk key is 64 hexadecimal characters")
        keys.append(key)
    return keys


def check_keys(keys: Sequence[bytes]) -> None:
    """Raise ConfigError unless every key is 32 bytes."""
    for key in keys:
        if not isinstance(key, bytes) or len(key) != KEY_BYTES:
            raise ConfigError(f"a chunk key is {KEY_BYTES} bytes, not {key!r:.60}")
