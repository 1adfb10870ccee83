"""Pieces of documents that stand in a prompt where they may be used: found by scanning, and said by the caller.

Nothing is assumed of either: tokens are compared, and a piece's key is made again from the prompt's own tokens.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import numpy as np
import numpy.typing as npt

from kvstore.keys import KeyScheme, token_array
from kvstore.sidecar import scope_of
from kvstore.span_index import SpanIndex
from kvstore.span_plan import PlanOptions
from kvstore.span_reasons import Reasons
from kvstore.spans import SpanReason, cut, preamble_key


class Candidate(msgspec.Struct, frozen=True):
    """Tokens start..stop of the prompt are the first of a piece, whose first token was computed at `position`."""

    start: int
    stop: int
    key: bytes
    position: int
    preamble_matches: bool


def candidates(
    index: SpanIndex | None,
    ids: npt.NDArray[np.uint32],
    keys: KeyScheme,
    options: PlanOptions,
    covered: int,
    reasons: Reasons,
) -> list[Candidate]:
    """Every piece that may be used behind the first `covered` tokens, once, from left to right.

    None has the prompt's last token. What may not be used is painted with the reason.
    """
    last = len(ids) - 1
    found = {}
    for candidate in [*_scanned(index, ids, keys, options, reasons), *_given(ids, keys, options, reasons)]:
        if candidate.stop > last:
            reasons.paint(last, last + 1, SpanReason.LAST_TOKEN)
            candidate = msgspec.structs.replace(candidate, stop=last)
        if candidate.start < covered:
            reasons.paint(covered, candidate.stop, SpanReason.OVERLAP)
        elif candidate.start < candidate.stop:
            found[candidate.start, candidate.key] = candidate
    return [found[place] for place in sorted(found)]


def _scanned(
    index: SpanIndex | None, ids: npt.NDArray[np.uint32], keys: KeyScheme, options: PlanOptions, reasons: Reasons
) -> Iterator[Candidate]:
    if index is None or not options.scan:
        return
    first = options.preamble_tokens
    preamble = preamble_key(keys, ids[:first])
    for match in index.find(scope_of(keys), ids):
        piece = match.piece
        if keys.content(ids[match.start : match.stop], piece.parent) != piece.key:
            continue  # its side-car says something else than its key
        matches = piece.preamble == preamble and match.origin >= first
        if matches or options.any_preamble:
            position = first + match.start - match.origin if matches else piece.position
            yield Candidate(match.start, match.stop, piece.key, position, matches)
        else:
            reasons.paint(match.start, match.stop, SpanReason.PREAMBLE)


def _given(ids: npt.NDArray[np.uint32], keys: KeyScheme, options: PlanOptions, reasons: Reasons) -> Iterator[Candidate]:
    for document in options.documents:
        own = token_array(ids[document.start : document.stop] if document.tokens is None else document.tokens)
        for piece in cut(keys, own, preamble=ids[: options.preamble_tokens]):
            start, stop = document.start + piece.start, document.start + piece.stop
            if stop > document.stop or not np.array_equal(ids[start:stop], own[piece.start : piece.stop]):
                reasons.paint(start, document.stop, SpanReason.TOKENISATION)
                break
            yield Candidate(start, stop, piece.key, piece.position, True)
        else:
            reasons.paint(document.start + len(own), document.stop, SpanReason.TOKENISATION)
