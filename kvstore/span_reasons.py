"""Why each token of a prompt would be recomputed, while its plan is being made."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

import numpy as np

from kvstore.spans import SpanReason

DETAILS = {
    SpanReason.NEW: "no chunk with this text is known",
    SpanReason.ABSENT: "a document's chunk that no tier holds",
    SpanReason.OVERLAP: "part of a chunk, of which another part is covered by a better span",
    SpanReason.NOT_WORTH_IT: "computing it is quicker than loading it",
    SpanReason.TOKENISATION: "the document's tokens are not the prompt's from here on",
    SpanReason.PREAMBLE: "computed behind another preamble",
    SpanReason.LAST_TOKEN: "the last token is always computed",
    SpanReason.UNAVAILABLE: "the store does not answer",
}
"""One line for a person."""

_REASONS = tuple(SpanReason)
_CODES = {reason: code for code, reason in enumerate(_REASONS)}


class Reasons:
    """A reason for every token of a prompt, `new` until another one is painted over it."""

    def __init__(self, tokens: int) -> None:
        self._codes = np.full(tokens, _CODES[SpanReason.NEW], np.uint8)

    def paint(self, start: int, stop: int, reason: SpanReason) -> None:
        """Tokens start..stop would be recomputed for this reason; nothing if there are none."""
        self._codes[start : max(start, stop)] = _CODES[reason]

    def runs(self, start: int, stop: int) -> Iterator[tuple[int, int, SpanReason]]:
        """(start, stop, reason) of the neighbours that have the same, from left to right."""
        for code, run in groupby(self._codes[start:stop].tolist()):
            end = start + sum(1 for _ in run)
            yield start, end, _REASONS[code]
            start = end
