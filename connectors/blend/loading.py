"""Chunks of documents on their way from a store, layer by layer: a thread loads and decodes, the engine waits.

The thread fetches in layer order, so that the first layers of all chunks come first and the engine computes on them
while later ones are read. Every chunk has staging memory of its own, in the order of its container, from which a blend
takes each layer once, or again if it has to begin anew.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress

import msgspec
import numpy as np
import torch

from kvstore.blend_control import hopeless
from kvstore.chunk import check_coverage, decode_group
from kvstore.client import Client, Part
from kvstore.codec import Codec
from kvstore.codecs import registry
from kvstore.connectors.blend.sources import KV
from kvstore.connectors.torch_kv import TORCH_DTYPE
from kvstore.container import FLAG_CONTENT_KEY, FLAG_FROM_LOSSY, Header, expect
from kvstore.cost import CostModel
from kvstore.errors import ContainerError, KVStoreError
from kvstore.gate import Verdict
from kvstore.outcome import Miss, Reason
from kvstore.spec import KVArrays, KVSpec

Judge = Callable[[Codec, int], Verdict]
"""Whether chunks of a codec, decoded up to a level, may be blended."""


class SpansLostError(KVStoreError):
    """Chunks that a blend counted on do not come. Ends a running blend; never reaches the engine's caller."""


class WantedChunk(msgspec.Struct, frozen=True, kw_only=True):
    """A chunk to load: `tokens` of it are used, its first token was computed at `position`; where it lies."""

    key: bytes
    tokens: int
    position: int
    tier: str
    nbytes: int


class _Landing:
    """Where one chunk goes, and how far it has come."""

    def __init__(self, wanted: WantedChunk) -> None:
        self.wanted = wanted
        self.layers = 0
        self.miss: Miss | None = None
        self.codec: Codec | None = None
        self.level = 0
        self.arrays: KVArrays = []
        self.tensors: list[KV] = []


class SpanLoader:
    """Loads chunks in a thread of its own. Use as a context manager: behind it the thread ends with the step it is in.

    Args:
        client: the store.
        wanted: the chunks.
        spec: geometry that they must have.
        fingerprint: of the model that they must be of.
        judge: whether a codec's level may be used.
        tokens_max: of a chunk; a longer one is none of ours, and gets no memory.
        wait_ms: what has not come so long after the start is lost.
        min_quality: see `Client`.
        costs: told what loads and decoding took.
    """

    def __init__(
        self,
        client: Client,
        wanted: Sequence[WantedChunk],
        spec: KVSpec,
        fingerprint: bytes,
        judge: Judge,
        *,
        tokens_max: int,
        wait_ms: float,
        min_quality: int = 0,
        costs: CostModel,
    ) -> None:
        self._client = client
        self._spec = spec
        self._fingerprint = fingerprint
        self._judge = judge
        self._tokens_max = tokens_max
        self._wait_ms = wait_ms
        self._min_quality = min_quality
        self._costs = costs
        self._landings = [_Landing(own) for own in wanted]
        self._changed = threading.Condition()
        self._closing = False
        self._accepted_losses: set[int] = set()
        self._read_ms: defaultdict[str, float] = defaultdict(float)
        self._decode_ms: defaultdict[str, float] = defaultdict(float)
        self._thread = threading.Thread(target=self._run, name="kvstore-blend-load", daemon=True)
        self.nbytes = 0
        self.load_ms = 0.0
        self.waited_ms = 0.0
        self._started = time.monotonic()

    def __enter__(self) -> SpanLoader:
        self._started = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        with self._changed:
            self._closing = True  # the engine does not wait for the thread, which may be waiting for the store

    def wait(self, layer: int) -> None:
        """Wait until every chunk has this layer, or is lost; nothing raises."""
        for index in range(len(self._landings)):
            with suppress(SpansLostError):
                self.layer(index, layer)

    def layer(self, index: int, layer: int) -> KV:
        """K and V of a layer of a chunk, (heads, tokens, dim), as soon as they are there.

        Raises:
            SpansLostError: a chunk that was not known to be lost is; this one, or another.
        """
        landing = self._landings[index]
        began = time.monotonic()
        with self._changed:
            while landing.layers <= layer and landing.miss is None:
                left = self._started + self._wait_ms / 1e3 - time.monotonic()
                if left <= 0 or self._is_hopeless():
                    self._lose_rest(Miss(Reason.DEADLINE, f"not there within {self._wait_ms - left * 1e3:.0f} ms"))
                else:
                    self._changed.wait(left)
            self.waited_ms += (time.monotonic() - began) * 1e3
            if any(own.miss and at not in self._accepted_losses for at, own in enumerate(self._landings)):
                raise SpansLostError("chunks of documents do not come")
            return landing.tensors[layer]

    def lost(self) -> dict[int, Miss]:
        """What is lost so far, by index; from now on that is no reason to raise."""
        with self._changed:
            found = {index: own.miss for index, own in enumerate(self._landings) if own.miss is not None}
            self._accepted_losses |= found.keys()
            return found

    def coding(self, index: int) -> tuple[Codec, int] | None:
        """Codec and level of a chunk whose header has come."""
        landing = self._landings[index]
        return None if landing.codec is None else (landing.codec, landing.level)

    @property
    def complete(self) -> bool:
        """Whether everything that is not lost has come."""
        with self._changed:
            return all(own.miss is not None or own.layers == self._spec.layers for own in self._landings)

    def _is_hopeless(self) -> bool:
        share = sum(own.layers for own in self._landings) / (len(self._landings) * self._spec.layers)
        return hopeless((time.monotonic() - self._started) * 1e3, share, self._wait_ms)

    def _lose_rest(self, miss: Miss) -> None:
        """Whatever is not whole is lost; under the lock."""
        for landing in self._landings:
            if landing.miss is None and landing.layers < self._spec.layers:
                landing.miss = miss
        self._changed.notify_all()

    def _run(self) -> None:
        miss = Miss(Reason.UNAVAILABLE, "the store did not answer for all of the chunk")
        try:
            parts = self._client.fetch(
                [own.wanted.key for own in self._landings],
                order="layer",
                deadline_ms=self._wait_ms,
                min_quality=self._min_quality,
            )
            try:
                self._take_all(iter(parts))
            finally:
                close = getattr(parts, "close", None)  # an Iterator need not have one; a generator does
                if close is not None:
                    close()
        except Exception as error:  # whatever goes wrong with the store must not reach the engine
            miss = Miss(Reason.UNAVAILABLE, f"{type(error).__name__}: {error}".splitlines()[0])
        with self._changed:
            self._lose_rest(miss)
        self.load_ms = (time.monotonic() - self._started) * 1e3
        self._learn()

    def _take_all(self, parts: object) -> None:
        mark = time.perf_counter()
        for part in parts:  # type: ignore[attr-defined]
            came = time.perf_counter()
            if self._closing or not 0 <= part.index < len(self._landings):
                return
            landing = self._landings[part.index]
            self._read_ms[landing.wanted.tier] += (came - mark) * 1e3
            self._take(landing, part)
            mark = time.perf_counter()
            if landing.codec is not None and part.miss is None:
                self._decode_ms[landing.codec.id] += (mark - came) * 1e3

    def _take(self, landing: _Landing, part: Part) -> None:
        """Decode what has come of a chunk, unless it is lost."""
        if landing.miss is not None:
            return
        try:
            miss, stop = part.miss, landing.layers
            if miss is None:
                stop = self._decode(landing, part)
        except ContainerError as error:
            miss = Miss(error.reason, error.detail)
        with self._changed:
            if landing.miss is None:
                landing.miss = miss
                landing.layers = stop if miss is None else landing.layers
                self._changed.notify_all()

    def _decode(self, landing: _Landing, part: Part) -> int:
        """Decode the groups of a part; answers up to which layer the chunk has now come."""
        header = part.header
        if header is None or not part.groups:
            raise ContainerError(Reason.MALFORMED, "the store answered no layers")
        if landing.codec is None:
            self._accept(landing, header)
        assert landing.codec is not None
        stop = landing.layers
        for group in part.groups:
            start, after = group[0][0].layers
            if start != stop:
                raise ContainerError(Reason.MALFORMED, f"the store answered layer {start} instead of {stop}")
            level = max(segment.level for segment, _ in group)
            verdict = self._judge(landing.codec, level)
            if not verdict.passed:
                raise ContainerError(Reason.UNGATED, verdict.reason)
            landing.level = level
            decode_group(landing.codec, group, landing.arrays, self._spec)
            stop = after
            self.nbytes += sum(segment.length for segment, _ in group)
        if time.monotonic() > part.expires_at:
            raise ContainerError(Reason.DEADLINE, "the lease on the chunk's bytes expired while they were read")
        return stop

    def _accept(self, landing: _Landing, header: Header) -> None:
        """Check that a chunk is the one that was asked for, and make room for it."""
        expect(header, key=landing.wanted.key, fingerprint=self._fingerprint)
        meta, wanted = header.meta, landing.wanted
        if meta.spec != self._spec or not wanted.tokens <= meta.tokens <= self._tokens_max:
            raise ContainerError(Reason.MALFORMED, "the container is of another geometry or size")
        if not meta.flags & FLAG_CONTENT_KEY or meta.first_position != wanted.position:
            raise ContainerError(
                Reason.MALFORMED, f"the chunk was computed at {meta.first_position}, not at {wanted.position}"
            )
        if meta.flags & FLAG_FROM_LOSSY:
            raise ContainerError(
                Reason.UNGATED, "the chunk has been through a lossy codec that its header does not name"
            )
        check_coverage(header)
        codec = registry.get(header.codec, header.profile)
        landing.arrays = self._spec.arrays(np.empty(self._spec.chunk_bytes(meta.tokens), np.uint8), meta.tokens)
        dtype = TORCH_DTYPE[self._spec.dtype]
        landing.tensors = [
            (torch.from_numpy(k).view(dtype)[:, : wanted.tokens], torch.from_numpy(v).view(dtype)[:, : wanted.tokens])
            for k, v in landing.arrays
        ]
        landing.codec = codec

    def _learn(self) -> None:
        """Tell the cost model what the chunks that have come whole took."""
        whole = [own for own in self._landings if own.miss is None and own.codec is not None]
        if len(whole) != len(self._landings):
            return  # what it took is not what these bytes take
        for tier, ms in self._read_ms.items():
            nbytes = sum(own.wanted.nbytes for own in whole if own.wanted.tier == tier)
            if nbytes:
                self._costs.observe_load(tier, nbytes=nbytes, ms=ms)
        for codec_id, ms in self._decode_ms.items():
            own = [landing for landing in whole if landing.codec is not None and landing.codec.id == codec_id]
            nbytes = sum(landing.wanted.nbytes for landing in own)
            if nbytes:
                tier = own[0].wanted.tier
                self._costs.observe_decode(codec_id, tier=tier, nbytes=max(1, nbytes // len(own)), ms=ms / len(own))
