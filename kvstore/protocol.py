"""What a remote client and the daemon say to each other: bodies, frames and session messages. docs/service.md explains.

Everything here is data from another process: requests are decoded strictly (an unknown field is refused), replies and
frames are checked for type and bounds, and no count or length is trusted before it has been compared with a limit.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Annotated, Literal

import msgspec

from kvstore.arguments import PIN_PRIORITY_MAX
from kvstore.client import Order, Origin
from kvstore.errors import ConfigError
from kvstore.explaining import Why
from kvstore.keys import DEFAULT_CHUNK_TOKENS, KEY_BYTES, ROOT
from kvstore.outcome import Lookup, Miss, PutStatus
from kvstore.spec import CHUNK_TOKENS_MAX
from kvstore.verifying import STEP_BYTES_DEFAULT

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

PRIORITY_MAX = (1 << 31) - 1

Transport = Literal["bytes", "shm"]


class Request(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A request body. Keys are 64 hexadecimal characters each."""


TokenId = Annotated[int, msgspec.Meta(ge=0, le=0xFFFFFFFF)]


class HexBytes(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Bytes among the `extras` of a prompt, as hexadecimal characters."""

    hex: str


class PromptRequest(Request, frozen=True, kw_only=True, omit_defaults=True):
    """lookup, explain: a chain of chunks, by its `keys`, or by what its keys are made of (`kvstore.keys.KeyScheme`).

    `fingerprint` and `salt` are hexadecimal. A tail of `token_ids` that does not fill a chunk has no key.
    """

    keys: list[str] | None = None
    token_ids: list[TokenId] | None = None
    fingerprint: str = ""
    chunk_tokens: Annotated[int, msgspec.Meta(ge=1, le=CHUNK_TOKENS_MAX)] = DEFAULT_CHUNK_TOKENS
    salt: str = ""
    extras: dict[str, str | int | HexBytes] = {}


class KeysRequest(Request, frozen=True, kw_only=True):
    """head, cancel, delete."""

    keys: list[str]


class PinRequest(Request, frozen=True, kw_only=True):
    """pin: keep the chunks from eviction for `ttl_seconds`, in the owner's name; lower priorities give way to it."""

    keys: list[str]
    ttl_seconds: float
    owner: str = ""
    priority: Annotated[int, msgspec.Meta(ge=0, le=PIN_PRIORITY_MAX)] = 0


class UnpinRequest(Request, frozen=True, kw_only=True):
    """unpin: end the owner's pins."""

    keys: list[str]
    owner: str = ""


class PrefetchRequest(Request, frozen=True, kw_only=True):
    """prefetch: promote the chunks to memory, higher priorities first."""

    keys: list[str]
    priority: Annotated[int, msgspec.Meta(ge=-PRIORITY_MAX, le=PRIORITY_MAX)] = 0
    deadline_ms: float | None = None


class MoveRequest(Request, frozen=True, kw_only=True):
    """park, resume: move the chain out of memory, or into it, and wait for that."""

    keys: list[str]
    deadline_ms: float | None = None


class FetchRequest(Request, frozen=True, kw_only=True):
    """fetch: the chunks as one stream of frames; with `decode`, decoded by the daemon into codec raw."""

    keys: list[str]
    order: Order = "chunk"
    deadline_ms: float | None = None
    transport: Transport = "bytes"
    min_quality: int = 0
    max_quality: int | None = None
    decode: bool = False


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


class VerifyRequest(Request, frozen=True, kw_only=True):
    """verify: compare the hashes of some chunks of a tier from a place on; see `kvstore.verifying.SupportsVerify`."""

    tier: str = ""
    start: int = 0
    bytes_max: int = STEP_BYTES_DEFAULT
    repair: bool = False
    deadline_ms: float | None = None


class BadEntry(msgspec.Struct, frozen=True):
    """A chunk whose bytes are not what they should be, and how."""

    key: str
    detail: str


class VerifyReply(msgspec.Struct, frozen=True):
    """Answer to verify: the tier, what was seen there, and where to go on; null at the end."""

    tier: str
    chunks: int
    nbytes: int
    bad: list[BadEntry]
    next_start: int | None


class HeadEntry(msgspec.Struct, frozen=True):
    """What is known of a stored chunk: container bytes, tiers holding it (fastest first), if one of them is durable."""

    nbytes: int
    tiers: tuple[str, ...]
    durable: bool = False


class PromptLookup(Lookup, frozen=True, kw_only=True):
    """Answer to a lookup by token ids: that of a lookup by keys, and the keys."""

    keys: list[str]


class ExplainEntry(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One chunk of a prompt; see `kvstore.explaining.Explanation`."""

    key: str
    why: Why
    tiers: tuple[str, ...] = ()
    nbytes: int = 0
    detail: str = ""
    removed_from: str = ""
    removed_unix_seconds: float | None = None


class ExplainReply(msgspec.Struct, frozen=True):
    """Answer to explain."""

    chunks: list[ExplainEntry]


class HeadReply(msgspec.Struct, frozen=True):
    """Answer to head."""

    chunks: list[HeadEntry | None]


class StatusesReply(msgspec.Struct, frozen=True):
    """Answer to put, prefetch, park and resume."""

    statuses: list[PutStatus]


class FoundReply(msgspec.Struct, frozen=True):
    """Answer to unpin, cancel and delete."""

    found: list[bool]


class PinReply(msgspec.Struct, frozen=True):
    """Answer to pin; `misses` says why a chunk is not pinned: it is `absent`, or there is no room (`full`)."""

    found: list[bool]
    misses: list[Miss | None]


class FlushReply(msgspec.Struct, frozen=True):
    """Answer to flush."""

    flushed: bool


class InfoReply(msgspec.Struct, frozen=True):
    """Answer to info: who answers, the limits a client must keep, and the codec it had better put chunks in."""

    version: str
    request_bytes_max: int
    request_keys_max: int
    put_codec: str = ""


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

    `expires_at` (time.monotonic seconds of this host) is when the right to read the arena ends. `origin` is what a
    chunk was stored as, if it was lossy and has been decoded on request.
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
    origin: Origin | None = None


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
