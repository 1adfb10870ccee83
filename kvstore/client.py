"""The one interface to a store, embedded or remote; `kvstore.connect` makes one.

Blocking and safe to use from many threads. Once connected, no verb raises because of the store: a daemon that died, a
full disk, a corrupt chunk are outcomes (`Miss`, `PutStatus`), so that an engine recomputes and goes on. What raises is
the caller's mistake (a key of 31 bytes, a negative deadline).

`kvstore.aio.AsyncClient` is the same interface for asyncio.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from types import TracebackType
from typing import Any, Literal, Self

import msgspec

from kvstore.batching import BatchPlan, plan_batch
from kvstore.codec import LayerSegments
from kvstore.container import Header
from kvstore.events import EventStream
from kvstore.explaining import Explanation
from kvstore.keys import ROOT, KeyScheme, Tokens
from kvstore.outcome import Lookup, Miss, PutStatus
from kvstore.span_plan import PlanOptions, SpanPlan

Order = Literal["chunk", "layer"]

DEADLINE_MS_DEFAULT = 30_000
"""No operation waits for ever: what is not there by then is a miss with reason deadline."""

DEADLINE_MS_MAX = 3_600_000.0
"""A longer deadline counts as this one, but for events."""


PLAN_DEFAULT = PlanOptions()

QUALITY_EXACT = 255
"""As a minimum quality: the bits that were computed, no lossy codec in between."""


class Origin(msgspec.Struct, frozen=True, kw_only=True):
    """The lossy coding that a chunk's numbers have been through before they were decoded into an exact container.

    `codec` and `profile` (hex) are what wrote it, `level` is the highest level that was decoded.
    """

    codec: str
    profile: str
    level: int


class PutChunk(msgspec.Struct, frozen=True):
    """A chunk to store. `write(buffer) -> nbytes` writes its container into a buffer of at least `nbytes_max` bytes.

    The buffer is wherever the bytes go next (the arena itself, shared memory, a socket's buffer), so a container is
    written once. `write` may be called from the caller's thread only, at most once, and not at all if the key is there.
    """

    key: bytes
    nbytes_max: int
    write: Callable[[memoryview], int]
    parent: bytes = ROOT


class Part(msgspec.Struct, frozen=True):
    """One step of a fetch: a miss, or one or more layer groups of one chunk.

    `index` is the position in the list of keys. Without a miss, `header` is the chunk's and `groups` are the segments
    of each layer group in this part, ready for `Codec.decode`; their views are valid until the next step of the fetch.
    The header's hash has been verified; the segments' hashes are `decode`'s to check.

    `expires_at` (time.monotonic seconds) is when the right to read the views ends. They may lie in another process's
    memory, which nothing can take from a reader that stalls: one that finishes decoding later than that must treat the
    chunk as missed, whatever the hashes said.

    `origin` is set where the store has decoded a lossy chunk on request; the header is then that of the result.
    """

    index: int
    miss: Miss | None = None
    header: Header | None = None
    groups: tuple[LayerSegments, ...] = ()
    expires_at: float = math.inf
    origin: Origin | None = None


class ChunkInfo(msgspec.Struct, frozen=True):
    """What is known of a stored chunk without reading it: container bytes, the tiers that hold it (fastest first)."""

    nbytes: int
    tiers: tuple[str, ...]


class Client(ABC):
    """A store, near or far. See the module's text for what every verb promises.

    Keys are 32 bytes. `deadline_ms` counts from the call; None means DEADLINE_MS_DEFAULT, more than
    DEADLINE_MS_MAX counts as that.

    A chunk's quality is the highest level of the lossy codec that it is stored in, counted from 0; in an exact codec it
    is QUALITY_EXACT.
    """

    @property
    def put_codec(self) -> str:
        """Id of the codec that the store would like chunks to be put in; "" if it leaves that to the writer."""
        return ""

    @abstractmethod
    def put(
        self, chunks: Sequence[PutChunk], *, durable: bool = False, deadline_ms: float | None = None
    ) -> list[PutStatus]:
        """Store chunks; one status each. With `durable`, answer only when they would survive kill -9."""

    @abstractmethod
    def lookup(self, keys: Sequence[bytes]) -> Lookup:
        """Longest prefix of the chain `keys` that can be fetched now, walked from the first; counts as no use."""

    @abstractmethod
    def fetch(
        self,
        keys: Sequence[bytes],
        *,
        order: Order = "chunk",
        deadline_ms: float | None = None,
        min_quality: int = 0,
        max_quality: int | None = None,
        decode: bool = False,
    ) -> Iterator[Part]:
        """Iterate over the chunks' parts.

        With order "chunk" every chunk is one part, in the order of `keys`. With order "layer" every part is one layer
        group, group by group over all chunks of a window (`store.fetch_window_bytes`), so that the first layers of all
        of them come first. A chunk that misses has exactly one part with a miss, after which it has no more. What is
        left at the deadline misses with reason deadline. Closing the iterator early releases everything.

        A chunk that no tier has in `min_quality` misses with reason low_quality; a lower tier may have it better than a
        higher one, and is then read. With `max_quality` a lossy chunk comes without its levels above it, which are not
        read if it is not in memory; its header is that of what comes. With `decode`, which needs order "chunk", chunks
        come in codec raw, of all levels: the store has done the decoding.
        """

    @abstractmethod
    def head(self, keys: Sequence[bytes]) -> list[ChunkInfo | None]:
        """Size and tiers of each chunk, None where there is none."""

    @abstractmethod
    def explain(self, keys: Sequence[bytes]) -> list[Explanation]:
        """For each chunk of the chain `keys` where it is, or why it is nowhere; [] if the store does not answer."""

    @abstractmethod
    def plan(self, tokens: Tokens, keys: KeyScheme, options: PlanOptions = PLAN_DEFAULT) -> SpanPlan:
        """What to do about each token of a prompt: load it with a prefix or a document, or compute it, and why.

        `keys` is the model's and the tenant's scheme. If the store does not answer everything is recomputed, and the
        plan's `miss` says so. A plan is a snapshot: a chunk may be gone when it is fetched.

        Raises:
            ConfigError: an empty prompt, or options that do not fit it.
            SpecError: a token id is not in 0..2**32-1.
        """

    def plan_batch(self, prompts: Sequence[Tokens], keys: KeyScheme, *, cache_tokens: int | None = None) -> BatchPlan:
        """The tree of the prefixes that prompts share, and the order that reuses most; see `kvstore.batching`."""
        return plan_batch(prompts, keys, cache_tokens=cache_tokens, store=self)

    @abstractmethod
    def prefetch(
        self, keys: Sequence[bytes], *, priority: int = 0, deadline_ms: float | None = None
    ) -> list[PutStatus]:
        """Ask for promotion to memory and return at once; `stored` is True where it is there or queued.

        Chunks of a higher priority are promoted first, then those asked for earlier, in the order of `keys`. What has
        not begun by the deadline is not promoted.
        """

    @abstractmethod
    def cancel(self, keys: Sequence[bytes]) -> list[bool]:
        """Take back what was asked for with `prefetch`. True where there was a promotion that had not begun."""

    @abstractmethod
    def park(self, keys: Sequence[bytes], *, deadline_ms: float | None = None) -> list[PutStatus]:
        """Move a chain out of memory: write what is not durable, then let go of the copies above the durable tier.

        `durable` is True where the chunk is safe below. What is leased or pinned, or needed by a chunk that stays,
        keeps its copy in memory.
        """

    @abstractmethod
    def resume(self, keys: Sequence[bytes], *, deadline_ms: float | None = None) -> list[PutStatus]:
        """Move a chain into memory, in few large reads, and wait for it; `existed` where it was there already."""

    @abstractmethod
    def pin(self, keys: Sequence[bytes], *, ttl_seconds: float, owner: str = "", priority: int = 0) -> list[bool]:
        """Keep chunks from eviction for a while, in every tier that holds them. True where there was one.

        Every owner, a name that the callers agree on, has pins of its own; a chunk stays until the last has ended. A
        store has room for so many pins (`kvstore.pins.PINS_MAX`) and pinned bytes (`store.pinned_share_max`); beyond
        the bytes, pins of a lower `priority` (0..255) end to make room. Where none can, the answer is False.
        """

    @abstractmethod
    def unpin(self, keys: Sequence[bytes], *, owner: str = "") -> list[bool]:
        """End an owner's pins. True where there was one."""

    @abstractmethod
    def delete(self, keys: Sequence[bytes]) -> list[bool]:
        """Remove chunks from every tier. True where there was one."""

    @abstractmethod
    def stats(self) -> dict[str, Any]:
        """Counters and usage of the store and of each tier; JSON types only. {} if the store does not answer."""

    @abstractmethod
    def events(
        self,
        *,
        after: int | None = None,
        tiers: Collection[str] = (),
        kinds: Collection[str] = (),
        deadline_ms: float | None = None,
    ) -> EventStream:
        """What enters and leaves the tiers, as it happens, until the deadline (math.inf for none).

        `after` is the number of the last event seen: what has come since is delivered first, behind a `lost` marker if
        some of it is no longer remembered. None: from now on. `tiers` and `kinds` choose, empty for all. A stream that
        ends early (the store went away, or has too many readers) can be taken up again after its `position`.

        Raises:
            ConfigError: a kind that does not exist.
        """

    @abstractmethod
    def flush(self, *, deadline_ms: float | None = None) -> bool:
        """Wait until everything put so far is as durable as the store makes it; False if not by the deadline."""

    @abstractmethod
    def close(self) -> None:
        """Release everything. Idempotent."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
