"""Chunks of documents on their way from a store, layer by layer: a thread loads and decodes, the engine waits.

The thread fetches in layer order, so that the first layers of all chunks come first and the engine computes on them
while later ones are read. Every chunk has memory of its own (`Landing`), from which a blend takes each layer once, or
again if it has to begin anew.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress

from kvstore.blend_control import hopeless
from kvstore.client import Client, Part
from kvstore.codec import Codec
from kvstore.connectors.blend.landing import Judge, Landing, WantedChunk
from kvstore.connectors.blend.sources import KV
from kvstore.connectors.store_errors import unavailable
from kvstore.cost import CostModel
from kvstore.errors import ContainerError, KVStoreError
from kvstore.outcome import Miss, Reason
from kvstore.spec import KVSpec


class SpansLostError(KVStoreError):
    """Chunks that a blend counted on do not come. Ends a running blend; never reaches the engine's caller."""


class _Coming:
    """One chunk: where it lands, how many of its layers have, and why it is lost."""

    def __init__(self, landing: Landing) -> None:
        self.landing = landing
        self.wanted = landing.wanted
        self.layers = 0
        self.miss: Miss | None = None


class SpanLoader:
    """Loads chunks in a thread of its own. Use as a context manager: behind it the thread ends with the step it is in.

    Args:
        client: the store.
        wanted: the chunks.
        spec, fingerprint, judge, tokens_max: see `Landing`.
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
        self._wait_ms = wait_ms
        self._min_quality = min_quality
        self._costs = costs
        self._chunks = [_Coming(Landing(own, spec, fingerprint, judge, tokens_max=tokens_max)) for own in wanted]
        self._changed = threading.Condition()
        self._closing = False
        self._accepted_losses: set[int] = set()
        self._read_ms: defaultdict[str, float] = defaultdict(float)
        self._decode_ms: defaultdict[str, float] = defaultdict(float)
        self._thread = threading.Thread(target=self._run, name="kvstore-blend-load", daemon=True)
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
        for index in range(len(self._chunks)):
            with suppress(SpansLostError):
                self.layer(index, layer)

    def layer(self, index: int, layer: int) -> KV:
        """K and V of a layer of a chunk, (heads, tokens, dim), as soon as they are there.

        Raises:
            SpansLostError: a chunk that was not known to be lost is; this one, or another.
        """
        chunk = self._chunks[index]
        began = time.monotonic()
        with self._changed:
            while chunk.layers <= layer and chunk.miss is None:
                left = self._started + self._wait_ms / 1e3 - time.monotonic()
                if left <= 0 or self._is_hopeless():
                    self._lose_rest(Miss(Reason.DEADLINE, f"not there within {self._wait_ms - left * 1e3:.0f} ms"))
                else:
                    self._changed.wait(left)
            self.waited_ms += (time.monotonic() - began) * 1e3
            if any(own.miss and at not in self._accepted_losses for at, own in enumerate(self._chunks)):
                raise SpansLostError("chunks of documents do not come")
            return chunk.landing.tensors[layer]

    def lost(self) -> dict[int, Miss]:
        """What is lost so far, by index; from now on that is no reason to raise."""
        with self._changed:
            found = {index: own.miss for index, own in enumerate(self._chunks) if own.miss is not None}
            self._accepted_losses |= found.keys()
            return found

    def coding(self, index: int) -> tuple[Codec, int] | None:
        """Codec and level of a chunk whose header has come."""
        landing = self._chunks[index].landing
        return None if landing.codec is None else (landing.codec, landing.level)

    @property
    def nbytes(self) -> int:
        """What has been decoded."""
        return sum(own.landing.nbytes for own in self._chunks)

    def _is_hopeless(self) -> bool:
        share = sum(own.layers for own in self._chunks) / (len(self._chunks) * self._spec.layers)
        return hopeless((time.monotonic() - self._started) * 1e3, share, self._wait_ms)

    def _lose_rest(self, miss: Miss) -> None:
        """Whatever is not whole is lost; under the lock."""
        for chunk in self._chunks:
            if chunk.miss is None and chunk.layers < self._spec.layers:
                chunk.miss = miss
        self._changed.notify_all()

    def _run(self) -> None:
        miss = Miss(Reason.UNAVAILABLE, "the store did not answer for all of the chunk")
        try:
            parts = self._client.fetch(
                [own.wanted.key for own in self._chunks],
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
            miss = unavailable(error)
        with self._changed:
            self._lose_rest(miss)
        self.load_ms = (time.monotonic() - self._started) * 1e3
        self._learn()

    def _take_all(self, parts: object) -> None:
        mark = time.perf_counter()
        for part in parts:  # type: ignore[attr-defined]
            came = time.perf_counter()
            if self._closing or not 0 <= part.index < len(self._chunks):
                return
            chunk = self._chunks[part.index]
            self._read_ms[chunk.wanted.tier] += (came - mark) * 1e3
            self._take(chunk, part)
            mark = time.perf_counter()
            if chunk.landing.codec is not None and part.miss is None:
                self._decode_ms[chunk.landing.codec.id] += (mark - came) * 1e3

    def _take(self, chunk: _Coming, part: Part) -> None:
        """Decode what has come of a chunk, unless it is lost."""
        if chunk.miss is not None:
            return
        miss, layers = part.miss, chunk.layers
        try:
            if miss is None:
                layers = chunk.landing.take(part)
        except ContainerError as error:
            miss = Miss(error.reason, error.detail)
        with self._changed:
            if chunk.miss is None:
                chunk.miss, chunk.layers = miss, layers
                self._changed.notify_all()

    def _learn(self) -> None:
        """Tell the cost model what the chunks that have come whole took."""
        whole = [own for own in self._chunks if own.miss is None and own.landing.codec is not None]
        if len(whole) != len(self._chunks):
            return  # what it took is not what these bytes take
        for tier, ms in self._read_ms.items():
            nbytes = sum(own.wanted.nbytes for own in whole if own.wanted.tier == tier)
            if nbytes:
                self._costs.observe_load(tier, nbytes=nbytes, ms=ms)
        for codec_id, ms in self._decode_ms.items():
            own = [chunk for chunk in whole if chunk.landing.codec is not None and chunk.landing.codec.id == codec_id]
            nbytes = sum(chunk.wanted.nbytes for chunk in own)
            if nbytes:
                tier = own[0].wanted.tier
                self._costs.observe_decode(codec_id, tier=tier, nbytes=max(1, nbytes // len(own)), ms=ms / len(own))
