"""A prompt and what is known of each of its tokens before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch

from kvstore.connectors.blend.sources import Source
from kvstore.errors import SpecError


class Kind(IntEnum):
    """What a token's KV is before blending."""

    FRESH = 0
    """There is none: it will be computed."""
    EXACT = 1
    """What a prefill would compute."""
    MOVED = 2
    """Computed behind other tokens: right at its place in the rotation, stale in what it attended to."""


@dataclass(frozen=True, eq=False)
class Span:
    """The usable part of a source: tokens start..stop of the prompt; `document` counts from 0 in prompt order."""

    source: Source
    start: int
    stop: int
    document: int


@dataclass(frozen=True, eq=False)
class Prompt:
    """What policies know of a prompt. All tensors are on the CPU; T tokens.

    Attributes:
        ids: (T,).
        spans: usable parts of the sources, in prompt order, without overlap.
        kind: `Kind` of every token, (T,) uint8.
        document: of every token, (T,); -1 for tokens of no source.
        mismatched: tokens of sources that were not those of the prompt, or stood behind one that was not.
        layers: of the model.
    """

    ids: torch.Tensor
    spans: tuple[Span, ...]
    kind: torch.Tensor
    document: torch.Tensor
    mismatched: int
    layers: int

    @property
    def tokens(self) -> int:
        """T."""
        return len(self.ids)

    @property
    def fresh(self) -> torch.Tensor:
        """Which tokens have no KV and are always computed, bool (T,)."""
        return self.kind == Kind.FRESH

    @property
    def moved(self) -> torch.Tensor:
        """Which tokens have KV that was computed behind other tokens, bool (T,)."""
        return self.kind == Kind.MOVED

    @property
    def query(self) -> torch.Tensor:
        """The tokens behind all sources, else the last token: what the documents are there for, bool (T,)."""
        out = torch.zeros(self.tokens, dtype=torch.bool)
        behind = self.spans[-1].stop if self.spans else 0
        out[min(behind, self.tokens - 1) :] = True
        return out

    def budget(self, ratio: float) -> int:
        """How many moved tokens a ratio of them is, rounded up."""
        return -int(-ratio * int(self.moved.sum()) // 1)

    def first_of_documents(self, count: int, *, skip_first: bool) -> torch.Tensor:
        """The first `count` moved tokens of every document, bool (T,).

        With `skip_first`, not those of a document that begins the prompt, as it did when it was computed.
        """
        out = torch.zeros(self.tokens, dtype=torch.bool)
        begins = skip_first and any(span.start == 0 and span.source.computed_at == 0 for span in self.spans[:1])
        for document in range(int(self.document.max()) + 1 if self.tokens else 0):
            places = torch.nonzero((self.document == document) & self.moved)[:count, 0]
            if not (begins and len(places) and int(places[0]) == 0):
                out[places] = True
        return out


def assemble(ids: Sequence[int], sources: Sequence[Source], layers: int) -> Prompt:
    """A prompt of these tokens over these sources.

    A source's tokens are compared with the prompt's: KV from the first difference on is left out and its tokens are
    fresh, because everything behind a wrong token has attended to it.

    Raises:
        SpecError: no tokens, sources overlap or reach beyond the prompt, or an exact one does not continue an exact
            beginning.
    """
    if not len(ids):
        raise SpecError("the prompt has no tokens")
    spans: list[Span] = []
    kind = torch.zeros(len(ids), dtype=torch.uint8)
    document = torch.full((len(ids),), -1, dtype=torch.long)
    numbers: dict[object, int] = {}
    mismatched = reach = exact_stop = exact_stated = 0
    for source in sorted(sources, key=lambda source: source.start):
        if source.start < reach:
            raise SpecError(f"sources overlap at token {source.start}; give each token one source")
        if source.stop > len(ids):
            raise SpecError(f"the source at token {source.start} ends at {source.stop}, the prompt at {len(ids)}")
        reach = source.stop
        usable = _equal_beginning(source.ids, ids[source.start : source.stop])
        if source.exact:
            if source.start != exact_stated:
                raise SpecError(
                    f"the exact source at token {source.start} does not follow an exact beginning, which ends at "
                    f"{exact_stated}; exact=False for KV computed behind other tokens"
                )
            exact_stated = source.stop
            usable = usable if source.start == exact_stop else 0
            exact_stop += usable
        mismatched += len(source.ids) - usable
        if usable:
            stop = source.start + usable
            label = ("span", len(spans)) if source.document is None else source.document
            number = numbers.setdefault(label, len(numbers))
            kind[source.start : stop] = Kind.EXACT if source.exact else Kind.MOVED
            document[source.start : stop] = number
            spans.append(Span(source, source.start, stop, number))
    return Prompt(torch.tensor(list(ids)), tuple(spans), kind, document, mismatched, layers)


def _equal_beginning(left: Sequence[int], right: Sequence[int]) -> int:
    for index, (one, other) in enumerate(zip(left, right, strict=True)):
        if int(one) != int(other):
            return index
    return len(left)
