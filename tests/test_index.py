"""The two indexes: they answer alike whatever is done to them, and no parent is evicted before its children."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore import kernels
from kvstore.keys import ROOT
from kvstore.testing.harness import key_of
from kvstore.tiers import catalog, packed_index
from kvstore.tiers.catalog import load_index
from kvstore.tiers.index import ChunkEntry, ChunkIndex, Index
from kvstore.tiers.packed_index import PackedIndex
from kvstore.tiers.records import pack_record

native = pytest.importorskip("kvstore._native", reason="the C++ kernels were not built")

NUMBERS = st.integers(0, 11)
STEPS = st.lists(
    st.tuples(st.sampled_from(["add", "add", "add", "remove", "use", "read", "stop", "pin", "unpin", "take", "evict"]),
              NUMBERS, st.none() | NUMBERS),
    max_size=60,
)  # fmt: skip


def packed() -> PackedIndex:
    """An empty native index."""
    return PackedIndex(native.ChunkTable(random.getrandbits(64)))


def fields(entry: ChunkEntry) -> tuple[bytes, int, int, int, bytes]:
    """What both indexes must agree on."""
    return entry.key, entry.offset, entry.nbytes, entry.access, entry.parent


def do(index: Index, step: str, number: int, parent: int | None, now: float) -> object:
    """Do a step; answers what can be compared."""
    entry = index.get(key_of(number))
    if step == "add":
        if entry is None:
            parent_key = ROOT if parent is None else key_of(parent)
            index.add(ChunkEntry(key_of(number), number << 12, number + 1, index.next_access(), parent_key))
    elif step == "take":
        return sorted(fields(taken) for taken in index.take_used())
    elif step == "evict":
        victims = [victim for victim, _ in zip(index.oldest(now), range(number), strict=False)]
        for victim in victims:
            index.remove(victim)
        return [victim.key for victim in victims]
    elif entry is not None:
        if step == "remove":
            index.remove(entry)
        elif step == "use":
            index.use(entry)
        elif step == "read":
            index.start_reading(entry)
        elif step == "stop" and entry.readers:
            index.stop_reading(entry)
        elif step == "pin":
            index.pin(entry, now + (parent or 0))
        elif step == "unpin":
            return index.unpin(entry, now)
    return None


@settings(max_examples=300, deadline=None)
@given(STEPS)
def test_both_indexes_answer_alike(steps: list[tuple[str, int, int | None]]) -> None:
    plain, table = ChunkIndex(), packed()
    keys = [key_of(number) for number in range(13)]
    for now, (step, number, parent) in enumerate(steps):
        assert do(plain, step, number, parent, now) == do(table, step, number, parent, now), step
        assert len(plain) == len(table)
        assert [entry.key for entry in plain] == [entry.key for entry in table]
        assert plain.sizes(keys) == table.sizes(keys)
        assert {entry.key for entry in plain.kept(now)} == {entry.key for entry in table.kept(now)}
        for key in keys:
            one, other = plain.get(key), table.get(key)
            assert (one is None) == (other is None)
            assert one is None or other is None or (fields(one)[:3], one.parent) == (fields(other)[:3], other.parent)
        assert list(map(fields, plain.by_offset(3 << 12, 4))) == list(map(fields, table.by_offset(3 << 12, 4)))
        assert [array.tolist() for array in plain.extents()] == [array.tolist() for array in table.extents()]


@pytest.mark.parametrize("kind", [ChunkIndex, packed])
@settings(max_examples=100, deadline=None)
@given(st.randoms(use_true_random=False), st.integers(1, 40))
def test_no_parent_leaves_before_its_children(kind: type[Index], rng: random.Random, count: int) -> None:
    index = kind()
    parents: dict[bytes, bytes] = {}
    for number in range(count):
        parent = key_of(rng.randrange(number)) if number and rng.random() < 0.8 else ROOT
        parents[key_of(number)] = parent
        index.add(ChunkEntry(key_of(number), 0, 1, index.next_access(), parent))
    for _ in range(count):
        index.touch([key_of(rng.randrange(count))])
    held = index.get(key_of(rng.randrange(count)))
    assert held is not None
    index.start_reading(held)
    there = dict.fromkeys(entry.key for entry in index)
    order = list(index.oldest(0.0))
    for victim in order:
        assert victim.key not in {parents[key] for key in there}, "a parent left before its child"
        leaves = [key for key in there if key not in {parents[other] for other in there} and key != held.key]
        assert victim.key == leaves[0], "not the least recently used leaf"
        del there[victim.key]
    chain = set()
    key = held.key
    while key != ROOT:
        chain.add(key)
        key = parents[key]
    assert set(there) == chain, "what stays is what is held, and the chunks before it"


@pytest.mark.parametrize("kind", [ChunkIndex, packed])
def test_chunks_that_are_their_own_ancestors_can_leave(kind: type[Index]) -> None:
    index = kind()
    for number, parent in ((0, 1), (1, 0), (2, 2), (3, 1)):
        index.add(ChunkEntry(key_of(number), 0, 1, index.next_access(), key_of(parent)))
    assert [entry.key for entry in index.oldest(0.0)] == [key_of(number) for number in (3, 0, 1, 2)]


@pytest.mark.parametrize("kind", [ChunkIndex, packed])
def test_what_is_held_knows_its_last_use(kind: type[Index]) -> None:
    index = kind()
    for number in range(2):
        index.add(ChunkEntry(key_of(number), number << 12, 1))
    held = index.get(key_of(0))
    assert held is not None
    index.pin(held, 10.0)
    index.touch([key_of(1), key_of(0)])
    assert held.access == index.accesses


@settings(deadline=None)
@given(st.lists(st.tuples(st.binary(min_size=30, max_size=34), st.binary(max_size=70)), max_size=4), st.randoms())
def test_both_ways_of_loading_agree(noise: list[tuple[bytes, bytes]], rng: random.Random) -> None:
    entries = [
        ChunkEntry(key_of(number), number << 12, 5, rng.randrange(6), key_of(rng.randrange(20))) for number in range(8)
    ]
    rows = [(entry.key, pack_record(entry)) for entry in entries] + noise
    rows.append((key_of(3), pack_record(entries[3])))
    damaged = bytearray(rows[0][1])
    damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
    rows.append((key_of(90), bytes(damaged)))
    with pytest.MonkeyPatch.context() as patch:
        index, bad = load_index(rows)
        assert isinstance(index, PackedIndex)
        patch.setattr(catalog, "native_table", lambda: None)
        plain, plain_bad = load_index(rows)
        assert isinstance(plain, ChunkIndex)
    assert [fields(entry) for entry in index] == [fields(entry) for entry in plain]
    assert bad == plain_bad
    assert index.next_access() == plain.next_access()


def test_the_table_refuses_what_it_cannot_use() -> None:
    table = native.ChunkTable(1)
    table.add(key_of(1), ROOT, 0, 1, 1)
    with pytest.raises(ValueError, match="32 bytes"):
        table.get(b"short")
    with pytest.raises(ValueError, match="32 bytes"):
        table.sizes([b"x"])
    with pytest.raises(ValueError, match="32 bytes"):
        table.add(b"", ROOT, 0, 0, 0)
    with pytest.raises(TypeError):
        table.sizes([1])
    with pytest.raises(ValueError, match="cursor"):
        table.walk(5, 10)
    with pytest.raises(TypeError):
        table.load([1], 1)
    with pytest.raises(ValueError, match="range"):
        table.load([], 1 << 40)
    assert table.load([(b"", b"")], 1) == [(b"", b"", "size")]
    assert not table.add(key_of(1), ROOT, 0, 1, 1)
    assert not table.remove(key_of(2))


def test_the_table_is_small_and_keeps_its_room() -> None:
    table = native.ChunkTable(7)
    for turn in range(3):
        keys = [key_of(turn * 20_000 + number) for number in range(20_000)]
        for number, key in enumerate(keys):
            table.add(key, keys[number - 1] if number % 100 else ROOT, number, 1, number)
        assert len(table) == 20_000
        assert table.nbytes() < 120 * 20_000
        for key in keys:
            table.remove(key)
    assert len(table) == 0
    assert table.walk(0xFFFFFFFF, 5) == ([], 0xFFFFFFFF)


def test_without_native_kernels_the_index_is_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "NAME", "numpy")
    assert isinstance(packed_index.new_index(), ChunkIndex)
