"""The controller of blending on simulated links, in virtual time: what pipelining saves, what the worst link costs.

A prompt of 4096 document tokens in 24 layers, 15 % computed again, prefill as the unit of time. Exact, and the same on
every machine.
"""

from __future__ import annotations

from pathlib import Path

from kvstore.blend_control import BlendControl, BlendDecision, BlendWork
from kvstore.cost import CostModel
from kvstore.testing.blend_links import Engine, arrivals_ms, simulate_blend
from kvstore.testing.links import Link

LAYERS = 24
TOKENS = 4096
QUERY = 32
CHUNKS = 16
CHUNK_BYTES = 1 << 20
PREFILL_MS = 4000.0
RATIO = 0.15
LOADS = (0.02, 0.1, 0.25, 0.38)
"""Of a prefill, what loading takes."""

STALLS = (0.0, 0.1, 0.5, 0.9)
"""Of the bytes, what has come when a link stalls for ever."""

KINDS = {"query_first": QUERY, "one_run": 0}


def measure(directory: Path, quick: bool) -> dict[str, float]:
    """`blend.links.*`: time over a prefill, over loading everything first, the ratio chosen; the worst of all links."""
    metrics: dict[str, float] = {}
    worst = 0.0
    engine = Engine(row_layer_ms=PREFILL_MS / ((TOKENS + QUERY) * LAYERS))
    for kind, query_rows in KINDS.items():
        work = _work(query_rows)
        for share in LOADS:
            bandwidth = CHUNKS * CHUNK_BYTES / (share * PREFILL_MS)
            decision = _decide(work, bandwidth)
            link = Link(then=bandwidth)
            took = simulate_blend(decision, link, engine, work)
            name = f"{kind}_load_{share:g}"
            ratio = RATIO if decision.ratio is None else decision.ratio
            rows = query_rows + QUERY + ratio * TOKENS if query_rows else QUERY + ratio * TOKENS
            first = arrivals_ms(link, engine, work)[-1] + rows * LAYERS * engine.row_layer_ms
            metrics[f"blend.links.{name}_vs_prefill"] = took / PREFILL_MS
            metrics[f"blend.links.{name}_vs_load_first"] = took / first
            metrics[f"blend.links.{name}_ratio"] = ratio
            for came in STALLS:
                stalled = Link(steps=((came * share * PREFILL_MS + 1e-9, bandwidth),), then=0.0)
                worst = max(worst, simulate_blend(decision, stalled, engine, work) / PREFILL_MS)
    return {**metrics, "blend.links.worst_vs_prefill": worst}


def _work(query_rows: int) -> BlendWork:
    return BlendWork(
        layers=LAYERS,
        prompt_tokens=TOKENS + QUERY,
        exact_tokens=0,
        moved_tokens=TOKENS,
        query_rows=query_rows,
        loads=(("link", CHUNK_BYTES),) * CHUNKS,
    )


def _decide(work: BlendWork, bandwidth: float) -> BlendDecision:
    """By a model that has seen prefills of this engine and loads over this link."""
    costs = CostModel()
    for tokens in (64, 512, 4096):
        costs.observe_prefill(tokens=tokens, context=0, ms=tokens * PREFILL_MS / (TOKENS + QUERY))
    for nbytes in (CHUNK_BYTES, 8 * CHUNK_BYTES):
        costs.observe_load("link", nbytes=nbytes, ms=nbytes / bandwidth)
    return BlendControl(costs, load_deadline_ms=1e9).decide(work, ratio=RATIO, lowest=RATIO)
