"""The plan of one prompt: the longest stored prefix, then the documents' pieces worth most, and the rest recomputed.

What is exact comes first: a prefix is loaded as far as it goes, or as far as it is worth loading, and nothing else
covers its tokens. Behind it, every piece that stands in the prompt where it may be used (`kvstore.spans`) is a
candidate; those that are stored are weighed by the time they save, or by their tokens while times are not known, and
the best of them that do not overlap are taken (`kvstore.span_cover`). A piece is never trimmed at its beginning: what
the prefix covers in part is recomputed from there on.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from kvstore.client import ChunkInfo
from kvstore.keys import KeyScheme, Tokens, token_array
from kvstore.outcome import Lookup, Miss, Reason
from kvstore.planning import plan_loads
from kvstore.span_candidates import Candidate, candidates
from kvstore.span_cover import Interval, best_cover
from kvstore.span_index import SpanIndex
from kvstore.span_plan import PlanOptions, SpanPlan
from kvstore.span_reasons import DETAILS, Reasons
from kvstore.spans import Span, SpanReason


class Findable(Protocol):
    """What a plan asks of a store or a client."""

    def lookup(self, keys: Sequence[bytes]) -> Lookup:
        """The longest prefix of a chain that can be fetched now."""

    def head(self, keys: Sequence[bytes]) -> list[ChunkInfo | None]:
        """Size and tiers of each chunk."""


def plan_prompt(
    store: Findable, index: SpanIndex | None, tokens: Tokens, keys: KeyScheme, options: PlanOptions
) -> SpanPlan:
    """The plan of a prompt.

    Args:
        store: whom to ask where chunks are.
        index: known documents, for `options.scan`; None for none.
        tokens: ids of the whole prompt.
        keys: the key scheme of the model and tenant.
        options: what the caller knows and wants.

    Raises:
        ConfigError: the options do not fit the prompt.
        SpecError: a token id is not in 0..2**32-1.
    """
    ids = token_array(tokens)
    options.check(len(ids))
    return _Planning(store, index, ids, keys, options).run()


def recompute_all(tokens: int, miss: Miss, options: PlanOptions) -> SpanPlan:
    """The plan of a prompt when the store did not answer."""
    span = Span(kind="recompute", start=0, stop=tokens, reason=SpanReason.UNAVAILABLE, detail=str(miss))
    prefill = options.rates.prefill
    ms = None if prefill is None else prefill.call_ms + prefill.tokens_ms(tokens, 0)
    return SpanPlan(spans=(span,), load_ms=0.0, compute_ms=ms, prefill_ms=ms, miss=miss)


class _Planning:
    """One plan in the making."""

    def __init__(
        self,
        store: Findable,
        index: SpanIndex | None,
        ids: npt.NDArray[np.uint32],
        keys: KeyScheme,
        options: PlanOptions,
    ) -> None:
        self._store = store
        self._index = index
        self._ids = ids
        self._keys = keys
        self._options = options
        self._rates = options.rates
        self._last = len(ids) - 1
        self._reasons = Reasons(len(ids))

    def run(self) -> SpanPlan:
        """The plan."""
        found = self._store.lookup(self._keys.chain(self._ids))
        if found.stop is not None and found.stop.reason is Reason.UNAVAILABLE:
            return recompute_all(len(self._ids), found.stop, self._options)
        spans = self._prefix(found)
        covered = spans[0].stop if spans else 0
        spans += self._contents(covered)
        return self._totals(list(self._with_gaps(spans)))

    def _prefix(self, found: Lookup) -> list[Span]:
        size = self._keys.chunk_tokens
        stops = [min((index + 1) * size, self._last) for index in range(found.chunks)]
        if stops and stops[-1] == self._last:
            self._reasons.paint(self._last, self._last + 1, SpanReason.LAST_TOKEN)
        count = sum(1 for index, stop in enumerate(stops) if stop > index * size)
        nbytes = found.nbytes[:count] or (0,) * count
        loads: list[float | None] = [None] * count
        if found.nbytes:
            loads = [self._rates.load_ms(tier, size) for tier, size in zip(found.tiers, nbytes, strict=False)]
        prefill = self._rates.prefill
        if prefill is not None and count:
            savings = [prefill.tokens_ms(stops[index] - index * size, index * size) for index in range(count)]
            fixed_ms = sum(self._rates.request_ms(tier) for tier in set(found.tiers[:count]))
            worth = plan_loads(
                savings,
                [[load or 0.0] for load in loads],
                [math.inf] * count,
                fixed_ms=fixed_ms,
                room_ms=math.inf,
                budget_ms=math.inf,
            )
            self._reasons.paint(len(worth.levels) * size, stops[count - 1], SpanReason.NOT_WORTH_IT)
            count = len(worth.levels)
        if not count:
            return []
        stop = stops[count - 1]
        known = [load for load in loads[:count] if load is not None]
        return [
            Span(
                kind="prefix",
                start=0,
                stop=stop,
                keys=tuple(self._keys.chain(self._ids[: count * size])),
                tiers=found.tiers[:count],
                nbytes=tuple(nbytes[:count]),
                load_ms=sum(known) if len(known) == count else None,
                compute_ms=None if prefill is None else prefill.tokens_ms(stop, 0),
            )
        ]

    def _contents(self, covered: int) -> list[Span]:
        found = candidates(self._index, self._ids, self._keys, self._options, covered, self._reasons)
        names = list({candidate.key: None for candidate in found})
        infos = dict(zip(names, self._store.head(names) if names else (), strict=True))
        spans = []
        for candidate in found:
            info = infos[candidate.key]
            if info is None:
                self._reasons.paint(candidate.start, candidate.stop, SpanReason.ABSENT)
            else:
                spans.append(self._span(candidate, info))
        weights = [self._weight(span) for span in spans]
        for span, weight in zip(spans, weights, strict=True):
            self._reasons.paint(span.start, span.stop, SpanReason.OVERLAP if weight > 0 else SpanReason.NOT_WORTH_IT)
        intervals = [
            Interval(span.start, span.stop, weight, span.keys[0]) for span, weight in zip(spans, weights, strict=True)
        ]
        return self._worth_a_request([(spans[index], weights[index]) for index in best_cover(intervals)])

    def _span(self, candidate: Candidate, info: ChunkInfo) -> Span:
        prefill = self._rates.prefill
        return Span(
            kind="content",
            start=candidate.start,
            stop=candidate.stop,
            keys=(candidate.key,),
            position=candidate.position,
            preamble_matches=candidate.preamble_matches,
            tiers=info.tiers[:1],
            nbytes=(info.nbytes,),
            load_ms=self._rates.load_ms(info.tiers[0], info.nbytes),
            compute_ms=(
                None if prefill is None else prefill.tokens_ms(candidate.stop - candidate.start, candidate.start)
            ),
        )

    def _weight(self, span: Span) -> float:
        """Milliseconds that a content span saves; its tokens where that cannot be told. At most 0: not worth it."""
        if span.compute_ms is None:
            return float(span.tokens)
        return span.compute_ms * (1 - self._options.recompute_share) - (span.load_ms or 0.0)

    def _worth_a_request(self, chosen: list[tuple[Span, float]]) -> list[Span]:
        """The spans of those tiers from which all that is loaded together saves more than the request takes."""
        if self._rates.prefill is None:
            return [span for span, _ in chosen]
        saved: dict[str, float] = {}
        for span, weight in chosen:
            saved[span.tiers[0]] = saved.get(span.tiers[0], 0.0) + weight
        kept = []
        for span, _ in chosen:
            if saved[span.tiers[0]] > self._rates.request_ms(span.tiers[0]):
                kept.append(span)
            else:
                self._reasons.paint(span.start, span.stop, SpanReason.NOT_WORTH_IT)
        return kept

    def _with_gaps(self, spans: Sequence[Span]) -> Iterator[Span]:
        end = 0
        for span in spans:
            yield from self._recompute(end, span.start)
            yield span
            end = span.stop
        yield from self._recompute(end, len(self._ids))

    def _recompute(self, start: int, stop: int) -> Iterator[Span]:
        prefill = self._rates.prefill
        for first, end, reason in self._reasons.runs(start, stop):
            yield Span(
                kind="recompute",
                start=first,
                stop=end,
                compute_ms=None if prefill is None else prefill.tokens_ms(end - first, first),
                reason=reason,
                detail=DETAILS[reason],
            )

    def _totals(self, spans: Sequence[Span]) -> SpanPlan:
        loaded = [span for span in spans if span.kind != "recompute"]
        loads = [span.load_ms for span in loaded if span.load_ms is not None]
        tiers = {(span.kind, tier) for span in loaded for tier in span.tiers}
        requests_ms = sum(self._rates.request_ms(tier) for _, tier in tiers)
        prefill = self._rates.prefill
        compute_ms = prefill_ms = None
        if prefill is not None:
            shares = {"recompute": 1.0, "content": self._options.recompute_share, "prefix": 0.0}
            compute_ms = prefill.call_ms + sum(shares[span.kind] * (span.compute_ms or 0.0) for span in spans)
            prefill_ms = prefill.call_ms + prefill.tokens_ms(len(self._ids), 0)
        return SpanPlan(
            spans=tuple(spans),
            load_ms=sum(loads) + requests_ms if len(loads) == len(loaded) else None,
            compute_ms=compute_ms,
            prefill_ms=prefill_ms,
        )
