"""Blended prefills in virtual time over simulated links: what a decision comes to, whatever the link then does."""

from __future__ import annotations

import msgspec

from kvstore.blend_control import BlendDecision, BlendWork, hopeless
from kvstore.testing.links import Link


class Engine(msgspec.Struct, frozen=True, kw_only=True):
    """What really takes how long: a row in a layer, everything behind the exact beginning, decoding a layer."""

    row_layer_ms: float
    decode_layer_ms: float = 0.0

    def prefill_ms(self, work: BlendWork) -> float:
        """Computing all of the prompt that is not exact."""
        return self.row_layer_ms * (work.prompt_tokens - work.exact_tokens) * work.layers


def arrivals_ms(link: Link, engine: Engine, work: BlendWork) -> list[float]:
    """When each layer has been loaded and decoded; infinity if never."""
    flowing, decoded = link.latency_ms, 0.0
    out = []
    for _ in range(work.layers):
        flowing = link.arrival_ms(flowing, sum(nbytes for _, nbytes in work.loads) / work.layers)
        decoded = max(flowing, decoded) + engine.decode_layer_ms
        out.append(decoded)
    return out


def simulate_blend(decision: BlendDecision, link: Link, engine: Engine, work: BlendWork) -> float:
    """Milliseconds until the prompt is computed, as the connector goes about it."""
    if decision.ratio is None:
        return engine.prefill_ms(work)
    arrivals = arrivals_ms(link, engine, work)
    chosen = work.fresh_tokens + decision.ratio * work.moved_tokens
    rows = [work.query_rows] * work.layers if work.query_rows else [chosen] * work.layers
    late = arrivals[-1] > decision.wait_ms
    now = 0.0
    for layer, arrival in enumerate(arrivals):
        if late and now >= decision.wait_ms:
            return now + engine.prefill_ms(work)
        if arrival > now:
            share = sum(own <= now for own in arrivals) / work.layers
            if hopeless(now, share, decision.wait_ms):
                return now + engine.prefill_ms(work)
            now = min(arrival, decision.wait_ms)
            if arrival > decision.wait_ms:
                return now + engine.prefill_ms(work)
        now += rows[layer] * engine.row_layer_ms
    return now + (chosen * work.layers * engine.row_layer_ms if work.query_rows else 0.0)
