"""What became of every part of a prompt that was blended, or could have been."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from kvstore.connector import Loaded, ReuseReport, Stored
from kvstore.connectors.blend.report import BlendReport
from kvstore.outcome import Miss, Reason
from kvstore.span_plan import SpanPlan
from kvstore.spans import Span, SpanKind


class SpanUse(msgspec.Struct, frozen=True):
    """Tokens start..stop of a prompt.

    `kind` is what was done with them: "prefix" loaded in place, "content" loaded and moved, "recompute" computed.
    `reason` and `detail` say why they were computed, a `SpanReason` or the `Reason` of a chunk that did not come.
    """

    kind: SpanKind
    start: int
    stop: int
    reason: str = ""
    detail: str = ""


class BlendedReport(ReuseReport, frozen=True, kw_only=True):
    """What the store did for one prompt, and what blending did.

    `reused_tokens` are the exact ones of the prefix and the moved ones; what the policy has computed of the latter
    again is in `blend`. `compute_ms` includes waiting for layers that had not come.

    Attributes:
        spans: from the first token to the last.
        blend: what the engine did; None if nothing was blended, `detail` says why.
        ratio: share of the moved tokens that the controller chose.
        discarded_runs: blended runs that were given up because a chunk did not come.
        plan_ms, load_ms_content, waited_ms: asking for the plan; until the last content chunk had come; what the engine
            waited for them.
        documents: what became of documents that were stored on the way.
    """

    spans: tuple[SpanUse, ...]
    blend: BlendReport | None = None
    ratio: float | None = None
    detail: str = ""
    discarded_runs: int = 0
    plan_ms: float = 0.0
    load_ms_content: float = 0.0
    waited_ms: float = 0.0
    documents: Stored = Stored()


class Reused(msgspec.Struct, kw_only=True):
    """The state of one prompt while it is worked on; `report` tells it in the end."""

    tokens: int
    plan: SpanPlan
    plan_ms: float
    loaded: Loaded = Loaded()
    exact_loaded: int = 0
    stored: Stored = Stored()
    compute_ms: float = 0.0
    content_bytes: int = 0
    load_ms_content: float = 0.0
    waited_ms: float = 0.0
    lost: dict[int, Miss] = {}
    discarded_runs: int = 0
    used: tuple[Span, ...] = ()
    blend: BlendReport | None = None
    ratio: float | None = None
    detail: str = ""
    documents: Stored = Stored()

    def report(self) -> BlendedReport:
        """For the caller."""
        moved = sum(span.tokens for span in self.used)
        plain = ReuseReport.of(
            prompt_tokens=self.tokens,
            reused_tokens=self.exact_loaded + moved,
            loaded=self.loaded,
            stored=self.stored,
            compute_ms=self.compute_ms,
        )
        fields = msgspec.structs.asdict(plain)
        fields["loaded_chunks"] += len(self.used)
        fields["loaded_bytes"] += self.content_bytes
        return BlendedReport(
            **fields,
            spans=tuple(_uses(self.plan.spans, self.exact_loaded, self.used, self.lost, self.loaded.stop, self.detail)),
            blend=self.blend,
            ratio=self.ratio,
            detail=self.detail,
            discarded_runs=self.discarded_runs,
            plan_ms=self.plan_ms,
            load_ms_content=self.load_ms_content,
            waited_ms=self.waited_ms,
            documents=self.documents,
        )


def _uses(
    planned: Sequence[Span], exact: int, used: Sequence[Span], lost: dict[int, Miss], stop: Miss | None, detail: str
) -> list[SpanUse]:
    """What was done with each planned span; `lost` is by the token that a content span begins at."""
    uses = []
    for span in planned:
        start = span.start
        if start < exact:
            start = min(exact, span.stop)
            uses.append(SpanUse("prefix", span.start, start))
        if start == span.stop:
            continue
        if span.kind == "content" and span in used:
            uses.append(SpanUse("content", start, span.stop))
            continue
        reason, why = str(span.reason or ""), span.detail
        miss = lost.get(span.start) if span.kind == "content" else stop
        if span.kind != "recompute":
            reason, why = (str(Reason.NOT_WORTH_IT), detail) if miss is None else (str(miss.reason), miss.detail)
        uses.append(SpanUse("recompute", start, span.stop, reason, why))
    return uses
