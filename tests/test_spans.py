"""Documents cut into pieces, and the options of a plan: what a key says, and mistakes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.errors import ConfigError, SpecError
from kvstore.keys import KeyScheme
from kvstore.span_plan import PlanOptions
from kvstore.spans import Document, cut, preamble_key
from kvstore.testing.client_plan import scheme

IDS = st.lists(st.integers(0, 0xFFFFFFFF), min_size=1, max_size=70)


@given(IDS, IDS | st.just([]))
def test_pieces_cover_the_document_and_each_key_names_all_before_it(document: list[int], preamble: list[int]) -> None:
    keys = scheme()
    pieces = cut(keys, document, preamble=preamble)
    assert [piece.start for piece in pieces] == list(range(0, len(document), 16))
    assert pieces[-1].stop == len(document)
    parent = preamble_key(keys, preamble)
    for piece in pieces:
        assert piece.parent == parent
        assert piece.position == len(preamble) + piece.start
        assert piece.key == keys.content(document[piece.start : piece.stop], parent)
        parent = piece.key
    assert cut(keys, np.array(document, np.uint32), preamble=preamble) == pieces
    # The KV of a piece does not depend on what comes behind it, and neither does its key.
    assert cut(keys, [*document[: pieces[-1].start], 5], preamble=preamble)[:-1] == pieces[:-1]


def test_what_a_piece_was_computed_behind_is_part_of_its_key() -> None:
    document = list(range(40))
    own = {piece.key for piece in cut(scheme(), document, preamble=[1])}
    for other in (
        cut(scheme(), document),
        cut(scheme(), document, preamble=[2]),
        cut(scheme(), [9, *document[1:]], preamble=[1]),
        cut(KeyScheme(scheme().fingerprint, chunk_tokens=16, salt=b"t"), document, preamble=[1]),
        cut(KeyScheme(bytes(32), chunk_tokens=16), document, preamble=[1]),
    ):
        assert own.isdisjoint(piece.key for piece in other)
    assert not own & set(scheme().chain(document))


def test_documents_that_cannot_be_cut_are_refused() -> None:
    with pytest.raises(ConfigError, match="document is empty"):
        cut(scheme(), [])
    assert len(cut(scheme(), range(30), preamble=[1, 2], context_tokens=32)) == 2
    with pytest.raises(ConfigError, match="context of 31"):
        cut(scheme(), range(30), preamble=[1, 2], context_tokens=31)
    with pytest.raises(SpecError):
        cut(scheme(), [-1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"documents": [Document(5, 5)]}, r"documents\[0\] is empty"),
        ({"documents": [Document(5, 4)]}, r"documents\[0\] is empty"),
        ({"documents": [Document(5, 6, ())]}, r"documents\[0\]\.tokens is empty"),
        ({"documents": [Document(0, 9), Document(8, 12)]}, r"documents\[1\] starts at token 8, before documents\[0\]"),
        ({"documents": [Document(9, 12), Document(0, 9)]}, r"documents\[1\] starts at token 0"),
        ({"documents": [Document(2, 9)], "preamble_tokens": 3}, "before the preamble ends at 3"),
        ({"documents": [Document(place, place + 1) for place in range(4097)]}, "documents has 4097 entries"),
        ({"preamble_tokens": -1}, "preamble_tokens is -1"),
        ({"recompute_share": 1.5}, "recompute_share is 1.5"),
        ({"recompute_share": float("nan")}, "recompute_share is nan"),
    ],
)
def test_options_that_contradict_themselves_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PlanOptions(**options)
