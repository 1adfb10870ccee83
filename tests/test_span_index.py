"""The index of documents' pieces: what it finds, against comparing everything with everything, and its bounds."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvstore import rolling_hash, span_index
from kvstore.errors import ConfigError
from kvstore.rolling_hash import WindowHasher, window_hash
from kvstore.sidecar import SideCar, describe, scope_of
from kvstore.span_index import ENTRY_BYTES, Match, SpanIndex
from kvstore.spans import cut
from kvstore.testing.client_plan import sample_tokens, scheme

FEW = st.integers(0, 2)  # few ids, so that documents begin alike, repeat themselves and overlap
DOCUMENTS = st.lists(st.lists(FEW, min_size=1, max_size=45), max_size=5)


def sidecars(document: list[int], preamble: tuple[int, ...] = (), salt: bytes = b"") -> list[SideCar]:
    keys = scheme(salt=salt)
    return [describe(keys, piece, document, preamble) for piece in cut(keys, document, preamble=preamble)]


def row(tokens: list[int]) -> npt.NDArray[np.uint32]:
    return np.array(tokens, np.uint32)


def find(index: SpanIndex, tokens: list[int], salt: bytes = b"") -> list[Match]:
    return index.find(scope_of(scheme(salt=salt)), row(tokens))


def everywhere(documents: list[list[int]], prompt: list[int]) -> set[tuple[int, int, int, bytes]]:
    """(start, stop, origin, key) of each piece, by comparing each document with each place."""
    found = set()
    for document in documents:
        pieces = sidecars(document)
        if len(pieces[0].tokens) < 4 * span_index.SCAN_WIDTHS[-1]:
            continue
        for origin in range(len(prompt)):
            for piece in pieces:
                stop = origin + piece.position + len(piece.tokens) // 4
                if prompt[origin:stop] != document[: stop - origin]:
                    break
                found.add((origin + piece.position, stop, origin, piece.key))
    return found


@settings(max_examples=200, deadline=None)
@given(DOCUMENTS, st.lists(st.integers(-1, 2), max_size=40), st.randoms())
@example([[0] * 45], [0] * 15, np.random.default_rng(0))
def test_it_finds_what_comparing_everything_finds(documents: list[list[int]], gaps: list[int], random: object) -> None:
    index = SpanIndex()
    known = [piece for document in documents for piece in sidecars(document)]
    random.shuffle(known)  # type: ignore[attr-defined]
    for piece in known:
        assert index.add(piece)
    prompt: list[int] = []
    for gap in gaps:
        prompt += documents[gap] if 0 <= gap < len(documents) else [max(0, gap)]
    found = find(index, prompt)
    assert [match.origin for match in found] == sorted(match.origin for match in found)
    places = [(match.start, match.stop, match.origin, match.piece.key) for match in found]
    assert len(places) == len(set(places))
    assert set(places) == everywhere(documents, prompt)


@given(st.lists(st.integers(0, 0xFFFFFFFF), min_size=1, max_size=90), st.integers(1, 90))
def test_a_window_hash_depends_on_the_windows_tokens_only(tokens: list[int], width: int) -> None:
    hashes = WindowHasher(row(tokens)).windows(width)
    expected = [window_hash(row(tokens[place : place + width])) for place in range(len(tokens) - width + 1)]
    assert hashes.tolist() == expected


def test_windows_of_different_tokens_have_different_hashes() -> None:
    tokens = np.random.default_rng(1).integers(0, 4, 40_000).astype(np.uint32)
    hashes = WindowHasher(tokens).windows(64)
    assert len(np.unique(hashes)) == len(hashes)
    assert len(np.unique(hashes >> np.uint64(44))) > 30_000  # the bits that the filter looks at


def test_tokens_are_compared_whatever_the_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    class Same(WindowHasher):
        def windows(self, width: int) -> rolling_hash.Hashes:
            return np.zeros_like(super().windows(width))

    monkeypatch.setattr(rolling_hash, "WindowHasher", Same)
    monkeypatch.setattr(span_index, "WindowHasher", Same)
    index = SpanIndex()
    documents = [sample_tokens(40, seed) for seed in range(3)]
    for document in documents:
        for piece in sidecars(document):
            index.add(piece)
    prompt = [*sample_tokens(30, 9), *documents[1], *sample_tokens(30, 10)]
    assert [(match.start, match.stop) for match in find(index, prompt)] == [(30, 46), (46, 62), (62, 70)]


def test_the_bound_holds_and_the_least_recently_found_leave_first() -> None:
    documents = [sample_tokens(32, seed) for seed in range(4)]
    room = 6 * (ENTRY_BYTES + 64)
    index = SpanIndex(room)
    for document in documents[:3]:
        for piece in sidecars(document):
            index.add(piece)
    assert len(find(index, documents[0])) == 2
    for piece in sidecars(documents[3]):
        index.add(piece)
        assert index.stats()["used_bytes"] <= room
    assert [len(find(index, document)) for document in documents] == [2, 0, 2, 2]
    assert index.stats()["evicted"] == 2
    assert not SpanIndex(ENTRY_BYTES).add(sidecars(documents[0])[0])
    full = SpanIndex(2 * (ENTRY_BYTES + 64))
    assert [full.add(piece) for piece in sidecars(sample_tokens(64, 9))] == [True, True, False, False]
    assert not full.add(sidecars(documents[0])[0], evict=False)
    assert full.add(sidecars(documents[0])[0])
    for bytes_max in (0, -1):
        with pytest.raises(ConfigError, match="bytes_max"):
            SpanIndex(bytes_max)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(DOCUMENTS, st.booleans()), max_size=4), st.integers(3, 6))
def test_what_leaves_takes_with_it_what_continues_it(steps: list[tuple[list[list[int]], bool]], pieces: int) -> None:
    room = pieces * (ENTRY_BYTES + 64)
    index = SpanIndex(room)
    known: dict[bytes, SideCar] = {}
    for documents, forget in steps:
        for document in documents:
            for piece in sidecars(document):
                index.add(piece)
                known[piece.key] = piece
            find(index, document)
            if forget:
                index.discard(sidecars(document)[0].key)
        there = [piece for key, piece in known.items() if key in index]
        assert index.stats()["used_bytes"] == sum(ENTRY_BYTES + len(piece.tokens) for piece in there) <= room
        assert len(index) == len(there)
        assert all(piece.is_first or piece.parent in index for piece in there)
    index.clear()
    assert index.stats()["used_bytes"] == 0
    assert all(find(index, document) == [] for documents, _ in steps for document in documents)


def test_scopes_and_preambles_are_told_apart() -> None:
    index = SpanIndex()
    document = sample_tokens(20, 1)
    for piece in [*sidecars(document), *sidecars(document, preamble=(1, 2)), *sidecars(document, salt=b"t")]:
        index.add(piece)
    assert sorted(match.piece.preamble_tokens for match in find(index, document)) == [0, 0, 2, 2]
    assert len(find(index, document, salt=b"t")) == 2
    assert find(index, document, salt=b"u") == []


def test_a_prompt_that_repeats_itself_is_bounded() -> None:
    index = SpanIndex()
    for length in range(8, 200):
        for piece in sidecars([7] * length):
            index.add(piece)
    assert len(find(index, [7] * 8000)) == span_index.MATCHES_MAX
    assert index.stats()["scans_cut_short"] == 1


def test_documents_that_are_too_short_are_kept_and_not_found() -> None:
    index = SpanIndex()
    short = sample_tokens(7, 1)
    assert index.add(sidecars(short)[0])
    assert find(index, [1, *short, 2]) == []
    assert index.discard(sidecars(short)[0].key)
    assert not index.discard(sidecars(short)[0].key)


def test_threads_may_add_find_and_discard_at_once() -> None:
    index = SpanIndex(40 * (ENTRY_BYTES + 64))
    documents = [sample_tokens(64, seed) for seed in range(20)]

    def work(seed: int) -> None:
        for step in range(30):
            document = documents[(seed * 7 + step) % 20]
            for piece in sidecars(document):
                index.add(piece)
            assert all(match.stop <= 64 for match in find(index, document))
            if step % 5 == 0:
                index.discard(sidecars(document)[1].key)

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(work, seed) for seed in range(4)]:
            done.result(timeout=60)
    assert index.stats()["used_bytes"] <= index.bytes_max
