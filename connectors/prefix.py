"""Loading and storing the prefix of a prompt: what a connector does between engine and client, whatever the engine.

Knows KV only as bits in NumPy arrays and never raises because of the store.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Literal

from kvstore import gate
from kvstore.arguments import check_fetch
from kvstore.chunk import check_coverage, encode_chunk, encoded_bytes_max
from kvstore.client import Client, Origin, Part, PutChunk
from kvstore.codec import Codec
from kvstore.codecs import registry
from kvstore.connector import KVMemory, Loaded, Stored
from kvstore.connectors.filling import fill
from kvstore.connectors.objects import check_lease
from kvstore.connectors.prefix_levels import LevelShares
from kvstore.connectors.store_errors import one_line, unavailable
from kvstore.container import (
    FLAG_CONTENT_KEY,
    FLAG_FROM_LOSSY,
    FLAG_LOSSY_ALLOWED,
    ChunkMeta,
    Header,
    expect,
)
from kvstore.cost import CostModel
from kvstore.errors import ConfigError, ContainerError
from kvstore.keys import ROOT, KeyScheme, Tokens
from kvstore.load_control import Batch, Candidate, LoadControl
from kvstore.outcome import Lookup, Miss, Reason
from kvstore.spec import KVSpec

LOAD_DEADLINE_MS_DEFAULT = 5_000.0
STORE_DEADLINE_MS_DEFAULT = 5_000.0

LoadPolicy = Literal["cost", "always"]
LOAD_POLICIES: tuple[LoadPolicy, ...] = ("cost", "always")


class PrefixStore:
    """Prefixes of one model's prompts in one store.

    Args:
        client: the store.
        spec: geometry of the model's KV.
        keys: the model's key scheme; its fingerprint is what stored chunks must carry.
        codec: how to write. Chunks are read with whatever codec wrote them; a lossy one as `limits` allows.
        durable: whether a put waits until its chunks would survive kill -9.
        load_deadline_ms: bound on lookup and load of one prompt; what is there by then is used.
        store_deadline_ms: bound on the put of one prompt.
        limits: what lossy codecs may do to the model, by their records; None for exact codecs only. What is computed
            behind lossy KV is not exact either, so `keys` must not be those of exact readers.
        gates: records of the quality gate, of this model and others.
        gate_command: for a lossy codec, the command line that would get a record.
        min_quality: chunks stored in a lower quality are not loaded, see `Client`.
        decode_in_store: let the store decode; for hosts where that is cheaper.
        load_policy: "cost" loads what is expected to come sooner than the engine would compute it, once both have been
            observed; "always" loads whatever there is.
        costs: what loads and prefills took so far; None for nothing yet.

    Raises:
        ConfigError: a deadline is not positive, there is no such policy, or the codec is lossy and has no pass; says
            how to get one.
        CodecError: the codec cannot serve the spec.
    """

    def __init__(
        self,
        client: Client,
        spec: KVSpec,
        keys: KeyScheme,
        codec: Codec,
        *,
        durable: bool = False,
        load_deadline_ms: float = LOAD_DEADLINE_MS_DEFAULT,
        store_deadline_ms: float = STORE_DEADLINE_MS_DEFAULT,
        limits: gate.Limits | None = None,
        gates: Sequence[gate.GateRecord] = (),
        gate_command: Callable[[Codec], str] = gate.command,
        min_quality: int = 0,
        decode_in_store: bool = False,
        load_policy: LoadPolicy = "cost",
        costs: CostModel | None = None,
    ) -> None:
        for field, value in (("load_deadline_ms", load_deadline_ms), ("store_deadline_ms", store_deadline_ms)):
            if not value > 0:
                raise ConfigError(f"{field} is {value}; give a positive number of milliseconds")
        if load_policy not in LOAD_POLICIES:
            raise ConfigError(f"load_policy is {load_policy!r}; use one of {', '.join(LOAD_POLICIES)}")
        self.client = client
        self.costs = costs or CostModel()
        self._load_policy = load_policy
        self.spec = spec
        self.keys = keys
        check_fetch("chunk", min_quality, decode=decode_in_store)
        self._min_quality = min_quality
        self._decode_in_store = decode_in_store
        self._limits = limits
        self._gates = gates
        self._levels = LevelShares(lambda codec, level: self._judge(codec, level).passed, min_quality)
        verdict = self._judge(codec, max(plan.level for plan in codec.plan(spec, keys.chunk_tokens)))
        if not verdict.passed:
            raise ConfigError(f"codec: {verdict.reason}; use 'lossless', or get a pass with: {gate_command(codec)}")
        self.codec = codec
        self.durable = durable
        self.load_deadline_ms = load_deadline_ms
        self.store_deadline_ms = store_deadline_ms
        self._chunk_bytes_max = encoded_bytes_max(codec, spec, keys.chunk_tokens)

    def chain(self, tokens: Tokens) -> list[bytes]:
        """Keys of the full chunks of a prompt."""
        return self.keys.chain(tokens)

    def load(self, chain: Sequence[bytes], memory: KVMemory, tokens_max: int) -> Loaded:
        """Load the longest stored prefix of `chain` into `memory`, no more chunks than `tokens_max` tokens need."""
        wanted = chain[: -(-tokens_max // self.keys.chunk_tokens)]
        if not wanted:
            return Loaded()
        started = time.perf_counter()
        found = self._lookup(wanted)
        looked_up = time.perf_counter()
        chunks, nbytes, stop = 0, 0, None
        if found.chunks:
            savings_ms = None
            if self._load_policy == "cost":
                savings_ms = self.costs.savings_ms(found.chunks, self.keys.chunk_tokens)
            deadline_ms = self.load_deadline_ms - (looked_up - started) * 1e3
            control = LoadControl(self.costs, self._candidates(found), savings_ms, deadline_ms=deadline_ms)
            nbytes, stop = self._fetch(wanted[: found.chunks], memory, control)
            chunks = control.loaded
        stop = stop or found.stop
        if stop is None and chunks < len(wanted):
            stop = Miss(Reason.ABSENT, "the store named no reason")
        misses = {} if stop is None else _misses(chunks, len(wanted), stop)
        return Loaded(
            chunks=chunks,
            nbytes=nbytes,
            stop=stop,
            misses=misses,
            lookup_ms=(looked_up - started) * 1e3,
            load_ms=(time.perf_counter() - looked_up) * 1e3,
        )

    def fetch(
        self,
        keys: Sequence[bytes],
        first: int,
        memory: KVMemory,
        *,
        found: Lookup,
        savings_ms: Sequence[float] | None = None,
        deadline_ms: float = math.inf,
    ) -> Loaded:
        """Load chunks that a lookup has `found` into `memory`; the first of them is chunk `first` of its prompt.

        `chunks` counts from there, and so do the positions of `misses`. With `savings_ms`, what each chunk saves the
        engine, loading ends when computing the rest is quicker; without, at the deadline.
        """
        started = time.perf_counter()
        deadline_ms = min(deadline_ms, self.load_deadline_ms)
        control = LoadControl(self.costs, self._candidates(found), savings_ms, deadline_ms=deadline_ms)
        nbytes, stop = self._fetch(keys, memory, control, first)
        misses = {} if stop is None else _misses(control.loaded, len(keys), stop)
        load_ms = (time.perf_counter() - started) * 1e3
        return Loaded(chunks=control.loaded, nbytes=nbytes, stop=stop, misses=misses, load_ms=load_ms)

    def store(self, chain: Sequence[bytes], first: int, memory: KVMemory, *, replace: bool = False) -> Stored:
        """Store chunks `first` and later of `chain` from `memory`, which holds the KV of all their tokens.

        With `replace`, what the store has of them is deleted first: see `replaceable`.
        """
        if first >= len(chain):
            return Stored()
        started = time.perf_counter()
        puts = [self._put(chain, index, memory) for index in range(first, len(chain))]
        failures: Counter[Reason] = Counter()
        chunks, existed, detail = 0, 0, ""
        try:
            if replace:
                self.client.delete(chain[first:])
            for status in self.client.put(puts, durable=self.durable, deadline_ms=self.store_deadline_ms):
                if status.existed:
                    existed += 1
                elif status.stored:
                    chunks += 1
                else:
                    failures[status.reason or Reason.UNAVAILABLE] += 1
                    detail = status.detail or detail
        except Exception as error:  # whatever goes wrong with the store must not reach the engine
            failures[Reason.UNAVAILABLE] += len(puts)
            chunks, existed, detail = 0, 0, one_line(error)
        return Stored(
            chunks=chunks,
            existed=existed,
            failures=dict(failures),
            detail=detail,
            store_ms=(time.perf_counter() - started) * 1e3,
        )

    def _lookup(self, wanted: Sequence[bytes]) -> Lookup:
        try:
            return self.client.lookup(wanted)
        except Exception as error:  # whatever goes wrong with the store must not reach the engine
            return Lookup((), unavailable(error))

    def _candidates(self, found: Lookup) -> list[Candidate]:
        """What could be loaded. A store that does not tell sizes is taken to hold chunks of the largest."""
        sizes = found.nbytes if len(found.nbytes) == found.chunks else (self._chunk_bytes_max,) * found.chunks
        return [self._levels.candidate(tier, max(1, nbytes)) for tier, nbytes in zip(found.tiers, sizes, strict=True)]

    def _fetch(
        self, keys: Sequence[bytes], memory: KVMemory, control: LoadControl, first: int = 0
    ) -> tuple[int, Miss | None]:
        """Fill `memory` as `control` has it; answers the container bytes, and why it stopped early."""
        began = time.perf_counter()

        def now_ms() -> float:
            return (time.perf_counter() - began) * 1e3

        nbytes = 0
        while (batch := control.next(now_ms())) is not None:
            here = control.loaded
            added, miss = self._fetch_batch(keys[here : batch.stop], memory, control, batch, first + here, now_ms)
            control.ended(now_ms(), miss)
            nbytes += added
        return nbytes, control.stop

    def _fetch_batch(
        self,
        keys: Sequence[bytes],
        memory: KVMemory,
        control: LoadControl,
        batch: Batch,
        first: int,
        now_ms: Callable[[], float],
    ) -> tuple[int, Miss | None]:
        candidate = control.candidates[control.loaded]
        max_quality = self._levels.max_quality(candidate, batch.level)
        try:
            parts = self.client.fetch(
                keys,
                order="chunk",
                deadline_ms=max(0.0, batch.deadline_ms - now_ms()),
                min_quality=self._min_quality,
                max_quality=max_quality,
                decode=self._decode_in_store,
            )
        except Exception as error:  # whatever goes wrong with the store must not reach the engine
            return 0, unavailable(error)
        try:
            nbytes, miss = self._take(parts, keys, memory, control, batch, first, now_ms)
            if miss is not None and miss.reason == Reason.UNGATED and max_quality is not None:
                # The chunk is good enough as it is stored, and must not be taken for one to replace.
                self._levels.forget(candidate.tier)
                miss = Miss(Reason.NOT_WORTH_IT, f"up to level {max_quality} it may not be served: {miss.detail}")
            return nbytes, miss
        finally:
            close = getattr(parts, "close", None)  # an Iterator need not have one; a generator does
            with suppress(Exception):  # what was taken has been verified, whatever closing says
                if close is not None:
                    close()

    def _take(
        self,
        parts: Iterator[Part],
        keys: Sequence[bytes],
        memory: KVMemory,
        control: LoadControl,
        batch: Batch,
        first: int,
        now_ms: Callable[[], float],
    ) -> tuple[int, Miss | None]:
        """What `_fetch` answers; holds no view of the parts when it returns, so that they can be given back."""
        good, nbytes = 0, 0
        try:
            for part in parts:
                if part.miss is not None:
                    return nbytes, part.miss
                control.arrived(now_ms())
                header = self._decode(part, good, keys[good], memory, first)
                if batch.level == -1 or len(control.candidates[control.loaded].nbytes) == 1:
                    self._learn(control.candidates[control.loaded].tier, header)
                control.decoded(now_ms(), header.codec)
                nbytes += header.total_bytes
                good += 1
                if good == len(keys):
                    return nbytes, None
                if now_ms() > batch.deadline_ms:
                    return nbytes, Miss(Reason.DEADLINE, f"{control.loaded} chunks in {now_ms():.0f} ms")
        except ContainerError as error:
            return nbytes, Miss(error.reason, error.detail)
        except Exception as error:  # whatever goes wrong with the store must not reach the engine
            return nbytes, unavailable(error)
        return nbytes, Miss(Reason.UNAVAILABLE, f"the store answered {good} of {len(keys)} chunks")

    def _decode(self, part: Part, index: int, key: bytes, memory: KVMemory, first: int) -> Header:
        """Check that a part is the chunk asked for, whole, and decode it to its place: `index` behind chunk `first`."""
        header = part.header
        if header is None or part.index != index or len(part.groups) != len(header.groups()):
            raise ContainerError(Reason.MALFORMED, f"the store answered chunk {part.index} in parts; asked for {index}")
        expect(header, key=key, fingerprint=self.keys.fingerprint)
        start = (first + index) * self.keys.chunk_tokens
        meta = header.meta
        if meta.spec != self.spec or meta.tokens != self.keys.chunk_tokens:
            raise ContainerError(Reason.MALFORMED, "the container is of another geometry or chunk size")
        if meta.first_position != start or meta.flags & FLAG_CONTENT_KEY:
            raise ContainerError(Reason.MALFORMED, f"the chunk was computed at {meta.first_position}, not at {start}")
        codec = registry.get(header.codec, header.profile)
        level = min((max(segment.level for segment, _ in group) for group in part.groups), default=0)
        verdict = self._judge(codec, level)
        if meta.flags & FLAG_FROM_LOSSY:
            verdict = self._judge_origin(part.origin)
        if not verdict.passed:
            raise ContainerError(Reason.UNGATED, verdict.reason)
        check_coverage(header)
        on_device = fill(codec, part.groups, memory, start, meta)
        check_lease(part)
        if not on_device:
            memory.commit(start, start + meta.tokens)
        return header

    def _learn(self, tier: str, header: Header) -> None:
        """Take note of the levels of a chunk that has come whole."""
        if self._limits is not None and not self._decode_in_store:
            self._levels.learn(tier, header, registry.get(header.codec, header.profile))

    def _judge(self, codec: Codec | gate.Coding, level: int) -> gate.Verdict:
        """Whether chunks of a codec, decoded up to a level, may be served here."""
        if self._limits is None and not codec.exact:
            return gate.Verdict(False, f"{gate.describe(codec)} is lossy, and exact KV is wanted")
        return gate.check(self._gates, self.keys.fingerprint, codec, level, self._limits or gate.STANDARD)

    def _judge_origin(self, origin: Origin | None) -> gate.Verdict:
        """Whether what the store has decoded may be served here, by what it was stored as."""
        if origin is None:
            return gate.Verdict(False, "the chunk has been through a lossy codec, and the store does not say which")
        profile = bytes.fromhex(origin.profile)
        return self._judge(gate.Coding(id=origin.codec, profile=profile), origin.level)

    def _put(self, chain: Sequence[bytes], index: int, memory: KVMemory) -> PutChunk:
        tokens = self.keys.chunk_tokens
        start = index * tokens
        parent = chain[index - 1] if index else ROOT
        meta = ChunkMeta(
            fingerprint=self.keys.fingerprint,
            key=chain[index],
            spec=self.spec,
            tokens=tokens,
            parent=parent,
            first_position=start,
            flags=0 if self._limits is None else FLAG_LOSSY_ALLOWED,
        )

        def write(buffer: memoryview) -> int:
            return encode_chunk(self.codec, meta, memory.readable(start, start + tokens), buffer)

        return PutChunk(key=chain[index], nbytes_max=self._chunk_bytes_max, write=write, parent=parent)


def replaceable(loaded: Loaded) -> bool:
    """Whether the load stopped at a chunk that is there and too poor for this reader: its own will be better."""
    return loaded.stop is not None and loaded.stop.reason in (Reason.LOW_QUALITY, Reason.UNGATED)


def _misses(first: int, stop: int, miss: Miss) -> dict[int, Miss]:
    """A reason for each chunk from `first` on: `miss` for that one, a hole in the prefix for those behind it."""
    behind = Miss(Reason.PARENT_ABSENT, f"chunk {first} is missing: {miss.reason}")
    return {index: miss if index == first else behind for index in range(first, stop)}
