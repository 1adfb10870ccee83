"""Loading and storing a prefix over plain NumPy memory: what a store may answer, and what becomes of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest

from kvstore.chunk import encode_chunk, encoded_bytes_max
from kvstore.client import Order, Part
from kvstore.codecs import registry
from kvstore.connectors.prefix import PrefixStore
from kvstore.container import FLAG_CONTENT_KEY, ChunkMeta
from kvstore.keys import KeyScheme
from kvstore.outcome import Lookup, Miss, Reason
from kvstore.spec import KVArrays, KVSpec
from kvstore.testing.chunks import FINGERPRINT, sample_kv, sample_spec
from kvstore.testing.memory_client import MemoryClient

SPEC = sample_spec()
CHUNK, CHUNKS = 8, 3
TOKENS = list(range(CHUNK * CHUNKS + 3))


class Memory:
    """KV of a few tokens in one flat array; refuses to be filled twice at the same place."""

    def __init__(self, seed: int | None = None) -> None:
        tokens = len(TOKENS)
        flat = np.zeros(SPEC.chunk_bytes(tokens), np.uint8) if seed is None else sample_kv(SPEC, tokens, seed)
        self.arrays = SPEC.arrays(flat, tokens)
        self.committed: list[tuple[int, int]] = []

    def writable(self, start: int, stop: int) -> KVArrays:
        return self.readable(start, stop)

    def commit(self, start: int, stop: int) -> None:
        assert (start, stop) not in self.committed
        self.committed.append((start, stop))

    def readable(self, start: int, stop: int) -> KVArrays:
        return [(keys[:, start:stop], values[:, start:stop]) for keys, values in self.arrays]


class Scripted(MemoryClient):
    """Answers a fetch with whatever `script` makes of the right parts, after a lookup that finds everything."""

    script: Callable[[list[Part]], Iterator[Part]] = staticmethod(iter)

    def lookup(self, keys: Sequence[bytes]) -> Lookup:
        return Lookup(("memory",) * len(keys))

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
        return self.script([self.part(index, key) for index, key in enumerate(keys)])


def prefixes(client: MemoryClient, spec: KVSpec = SPEC) -> PrefixStore:
    return PrefixStore(client, spec, KeyScheme(FINGERPRINT, chunk_tokens=CHUNK), registry.get("raw"))


def filled(client: MemoryClient) -> PrefixStore:
    store = prefixes(client)
    assert store.store(store.chain(TOKENS), 0, Memory(seed=1)).chunks == CHUNKS
    return store


def test_what_was_stored_is_loaded() -> None:
    store = filled(MemoryClient())
    memory = Memory()
    loaded = store.load(store.chain(TOKENS), memory, len(TOKENS) - 1)
    assert (loaded.chunks, loaded.stop, loaded.misses) == (CHUNKS, None, {})
    assert memory.committed == [(0, 8), (8, 16), (16, 24)]
    for mine, theirs in zip(memory.readable(0, 24), Memory(seed=1).readable(0, 24), strict=True):
        np.testing.assert_array_equal(mine[0], theirs[0])
        np.testing.assert_array_equal(mine[1], theirs[1])
    assert not any(keys[:, 24:].any() for keys, _ in memory.arrays)


def test_no_more_chunks_are_loaded_than_tokens_are_wanted() -> None:
    store = filled(MemoryClient())
    for tokens, chunks in ((0, 0), (1, 1), (8, 1), (9, 2), (100, 3)):
        assert store.load(store.chain(TOKENS), Memory(), tokens).chunks == chunks


@pytest.mark.parametrize(
    ("changes", "spec", "reason"),
    [
        ({"first_position": 0}, SPEC, Reason.MALFORMED),
        ({"flags": FLAG_CONTENT_KEY}, SPEC, Reason.MALFORMED),
        ({"tokens": CHUNK - 1}, SPEC, Reason.MALFORMED),
        ({}, sample_spec(dim=8), Reason.MALFORMED),
        ({"fingerprint": bytes(32)}, SPEC, Reason.WRONG_FINGERPRINT),
        ({"key": bytes(32)}, SPEC, Reason.WRONG_KEY),
    ],
    ids=["position", "content key", "tokens", "geometry", "fingerprint", "key"],
)
def test_a_chunk_that_does_not_belong_there_is_not_used(
    changes: dict[str, object], spec: KVSpec, reason: Reason
) -> None:
    client = MemoryClient()
    store = filled(client)
    key = store.chain(TOKENS)[1]
    fields = {"fingerprint": FINGERPRINT, "key": key, "spec": spec, "tokens": CHUNK, "first_position": CHUNK, **changes}
    meta = ChunkMeta(**fields)  # type: ignore[arg-type]
    buffer = bytearray(encoded_bytes_max(store.codec, spec, meta.tokens))
    arrays = spec.arrays(sample_kv(spec, meta.tokens, 2), meta.tokens)
    client.chunks[key] = bytes(buffer[: encode_chunk(store.codec, meta, arrays, memoryview(buffer))])
    memory = Memory()
    loaded = store.load(store.chain(TOKENS), memory, len(TOKENS))
    assert (loaded.chunks, memory.committed) == (1, [(0, 8)])
    assert loaded.stop is not None
    assert loaded.stop.reason == reason


def test_a_lossy_chunk_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    store = filled(MemoryClient())
    monkeypatch.setattr(type(store.codec), "exact", False)
    loaded = store.load(store.chain(TOKENS), Memory(), len(TOKENS))
    assert loaded.chunks == 0
    assert str(loaded.stop) == "ungated (codec 'raw' is lossy, and exact KV is wanted)"


def _expired(part: Part) -> Part:
    return Part(part.index, None, part.header, part.groups, expires_at=0.0)


def _then_raise(parts: list[Part]) -> Iterator[Part]:
    yield parts[0]
    raise OSError("cable pulled")


def _close_badly(parts: list[Part]) -> Iterator[Part]:
    try:
        yield from parts
    finally:
        raise OSError("cable pulled")


@pytest.mark.parametrize(
    ("script", "chunks", "reason"),
    [
        (iter, 3, None),
        (_close_badly, 3, None),
        (lambda parts: iter(parts[:1]), 1, Reason.UNAVAILABLE),
        (lambda parts: iter(()), 0, Reason.UNAVAILABLE),
        (lambda parts: iter([*parts, *parts]), 3, None),
        (lambda parts: reversed(parts), 0, Reason.MALFORMED),
        (lambda parts: iter([parts[0], parts[0]]), 1, Reason.MALFORMED),
        (lambda parts: iter([Part(0, header=parts[0].header)]), 0, Reason.MALFORMED),
        (lambda parts: iter([Part(0)]), 0, Reason.MALFORMED),
        (lambda parts: iter([parts[0], Part(1, miss=Miss(Reason.BUSY))]), 1, Reason.BUSY),
        (lambda parts: iter([parts[0], _expired(parts[1])]), 1, Reason.DEADLINE),
        (_then_raise, 1, Reason.UNAVAILABLE),
        (lambda parts: None, 0, Reason.UNAVAILABLE),
    ],
    ids=[
        "right",
        "closes badly",
        "ends early",
        "nothing",
        "goes on",
        "backwards",
        "repeats",
        "no segments",
        "empty part",
        "miss",
        "lease expired",
        "raises",
        "no iterator",
    ],
)
def test_whatever_a_store_answers_the_good_prefix_is_kept(
    script: Callable[[list[Part]], Iterator[Part]], chunks: int, reason: Reason | None
) -> None:
    client = Scripted()
    store = filled(client)
    client.script = script
    memory = Memory()
    loaded = store.load(store.chain(TOKENS), memory, len(TOKENS))
    assert loaded.chunks == len(memory.committed) == chunks
    assert (loaded.stop.reason if loaded.stop else None) == reason
    assert list(loaded.misses) == ([] if reason is None else list(range(chunks, CHUNKS)))


def test_a_lookup_that_names_no_reason_still_gives_one() -> None:
    class Silent(MemoryClient):
        def lookup(self, keys: Sequence[bytes]) -> Lookup:
            return Lookup(())

    store = prefixes(Silent())
    loaded = store.load(store.chain(TOKENS), Memory(), len(TOKENS))
    assert str(loaded.stop) == "absent (the store named no reason)"


def test_only_what_is_missing_is_stored() -> None:
    client = MemoryClient()
    store = prefixes(client)
    chain = store.chain(TOKENS)
    assert store.store(chain, 2, Memory(seed=1)).chunks == 1
    assert list(client.chunks) == chain[2:]
    both = store.store(chain, 0, Memory(seed=1))
    assert (both.chunks, both.existed, both.failures) == (2, 1, {})
    assert store.store(chain, 3, Memory(seed=1)).store_ms == 0
