"""Whether to blend a prompt, how much of it to compute again, and how long to wait for what is reused.

Layer i + 1 of all reused chunks is loaded and decoded while layer i computes. CacheBlend (Yao et al., EuroSys 2025,
arXiv 2405.16444) chooses by T_load = bytes / bandwidth against T_recompute(r) = r * prefill. Here the bytes are the
compressed ones, decoding goes on beside reading, and both kinds of recompute policies are told apart:

    T_load(layer)   = max(bytes / bandwidth, chunks x overhead + bytes / decode rate) / layers
    T(layer, r)     = rows(layer, r) x (token rate + pair rate x T) / layers
    arrival(i)      = request + (i + 1) x T_load(layer)
    end(i)          = max(end(i - 1), arrival(i)) + T(layer i, r)

A policy that lets the query run over the reused KV first needs all layers before it can choose: its first run is what
loading overlaps with, and the second comes behind. A policy that computes from the first layer on overlaps all of it.

What is promised. Let P be what the engine takes to compute the rest of the prompt behind its exact beginning, W the
patience: PATIENCE of P by the estimate, or PATIENCE_MS_MIN. Whatever store, disk and network do, and however wrong the
estimates of loads are, all that is waited for has come, or is given up, W after loading began: what was computed by
then over what is given up is thrown away, and the rest computed without. So where nothing is reused in the end the
prompt takes at most

    P + W + o

with o how much later than asked a fetch ends, and one layer's computing, which is not interrupted. Where all has come,
it takes at most W + o plus what the blended run takes: its rows, which are no more than those of P, and those of the
query. Nothing smaller than W is possible for one who waits at all: who needs every layer has nothing to show before
the last one has come.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from kvstore.cost import CostModel
from kvstore.errors import ConfigError

PATIENCE = 0.5
PATIENCE_MS_MIN = 20.0

MARGIN = 1.25
"""Loads are begun if they would end within the patience even if they took this many times longer than expected."""

SAVED_MIN = 0.05
"""Blending has to be expected to save this share of a prefill: it costs quality, and its estimate is an estimate."""

FREE = 0.02
"""What a higher ratio may add to the time and still count as free."""

RATIO_STEPS = 32
PACE_FADE = 0.7
HOPELESS = 2.0
"""Loads that by their pace so far would take this many times the patience are given up at once."""

HOPELESS_SHARE_MIN = 0.1


class BlendWork(msgspec.Struct, frozen=True, kw_only=True):
    """What there is to load and to compute for one prompt.

    Attributes:
        layers: of the model.
        prompt_tokens: T.
        exact_tokens: the prompt's beginning whose KV is there.
        moved_tokens: tokens whose KV would be loaded and moved.
        query_rows: rows of a first run over all layers, before anything is chosen; 0 for policies without.
        compared_layers: first layers that the policy computes for all moved tokens.
        loads: (tier, container bytes) of each chunk.
    """

    layers: int
    prompt_tokens: int
    exact_tokens: int
    moved_tokens: int
    query_rows: int = 0
    compared_layers: int = 0
    loads: tuple[tuple[str, int], ...]

    @property
    def fresh_tokens(self) -> int:
        """Tokens that are computed in any case."""
        return self.prompt_tokens - self.exact_tokens - self.moved_tokens


class BlendDecision(msgspec.Struct, frozen=True, kw_only=True):
    """What to do with one prompt.

    `ratio` is the share of the moved tokens to compute again; None to compute everything. `wait_ms` counts from the
    start of the load: what has not come by then is given up. The times are expected ones, None where unknown.
    """

    ratio: float | None
    wait_ms: float
    load_ms: float | None = None
    blend_ms: float | None = None
    prefill_ms: float | None = None
    detail: str = ""


class BlendControl:
    """Decides for one engine. Not safe for threads: a connector has its own.

    Args:
        costs: what loads, decoding and prefill took so far.
        patience: share of a prefill that may be lost with waiting in vain.
        load_deadline_ms: loading never takes longer.
        weighs: False to blend whatever there is, at the wanted ratio.

    Raises:
        ConfigError: the patience is negative.
    """

    def __init__(
        self, costs: CostModel, *, patience: float = PATIENCE, load_deadline_ms: float, weighs: bool = True
    ) -> None:
        if patience < 0:
            raise ConfigError(f"patience is {patience}; give 0 or more, a share of a prefill")
        self._costs = costs
        self._patience = patience
        self._deadline_ms = load_deadline_ms
        self._weighs = weighs
        self._pace = 1.0

    def decide(self, work: BlendWork, *, ratio: float, lowest: float, fixed: bool = False) -> BlendDecision:
        """What to do.

        Args:
            work: of the prompt.
            ratio: that is wanted where time does not decide.
            lowest: the least that may be chosen.
            fixed: the ratio cannot be chosen.
        """
        if not self._weighs:
            return BlendDecision(ratio=ratio, wait_ms=self._deadline_ms)
        prefill_ms = self._costs.prefill_ms(work.prompt_tokens - work.exact_tokens, work.exact_tokens)
        if prefill_ms is None:
            return BlendDecision(
                ratio=ratio, wait_ms=self._deadline_ms, detail="nothing has been computed yet to compare with"
            )
        wait_ms = min(self._deadline_ms, max(PATIENCE_MS_MIN, self._patience * prefill_ms))
        first_ms, each_ms = self.load_ms(work)
        load_ms = first_ms + work.layers * each_ms
        if MARGIN * load_ms > wait_ms:
            tried = self._costs.probes.allow(prefill_ms, wait_ms)
            return BlendDecision(
                ratio=ratio if tried else None,
                wait_ms=wait_ms,
                load_ms=load_ms,
                prefill_ms=prefill_ms,
                detail=f"loading would take {load_ms:.0f} ms, and no more than {wait_ms:.0f} ms are waited for",
            )
        worth = self._worth(work, ratio, prefill_ms)
        chosen = worth if fixed else self._ratio(work, ratio, lowest, prefill_ms)
        blend_ms = self.blend_ms(work, lowest if chosen is None else chosen)
        refused = f"blending would take {blend_ms:.0f} ms, computing everything {prefill_ms:.0f} ms"
        return BlendDecision(
            ratio=chosen,
            wait_ms=wait_ms,
            load_ms=load_ms,
            blend_ms=blend_ms,
            prefill_ms=prefill_ms,
            detail=refused if chosen is None else "",
        )

    def observe(self, work: BlendWork, ratio: float, compute_ms: float) -> None:
        """A blended run whose loads had all come took so long: later estimates are corrected by it."""
        expected = self._compute_ms(work, ratio)
        if expected > 0:
            self._pace = PACE_FADE * self._pace + (1 - PACE_FADE) * self._pace * compute_ms / expected

    def blend_ms(self, work: BlendWork, ratio: float) -> float:
        """Expected time of load and computing together. 0 while the engine's rates are not known."""
        first_ms, each_ms = self.load_ms(work)
        arrivals = [first_ms + (layer + 1) * each_ms for layer in range(work.layers)]
        main = [self._layer_ms(work, rows) for rows in _rows(work, ratio)]
        if not work.query_rows:
            return finish_ms(arrivals, main)
        return finish_ms(arrivals, [self._layer_ms(work, work.query_rows)] * work.layers) + sum(main)

    def load_ms(self, work: BlendWork) -> tuple[float, float]:
        """Milliseconds before the first layer begins to come, and of each layer. Tiers not seen yet count nothing."""
        first = read = decode = 0.0
        for tier in dict.fromkeys(tier for tier, _ in work.loads):
            sizes = [nbytes for own, nbytes in work.loads if own == tier]
            load, chunk = self._costs.load(tier), self._costs.chunk(tier)
            if load is None or chunk is None:
                continue
            first += load.fixed_ms
            read += load.ms_per_byte * sum(sizes)
            decode += chunk.fixed_ms * len(sizes) + (chunk.ms_per_byte - load.ms_per_byte) * sum(sizes)
        return first, max(read, decode) / work.layers

    def _ratio(self, work: BlendWork, ratio: float, lowest: float, prefill_ms: float) -> float | None:
        """The highest ratio that is free, or, where the wanted one is not worth it, the highest one that is."""
        if self._worth(work, ratio, prefill_ms) is not None:
            free_ms = (1 + FREE) * self.blend_ms(work, ratio)
            return next(r for r in _steps(ratio, 1.0) if r == ratio or self.blend_ms(work, r) <= free_ms)
        return next((r for r in _steps(lowest, ratio) if self._worth(work, r, prefill_ms) is not None), None)

    def _worth(self, work: BlendWork, ratio: float, prefill_ms: float) -> float | None:
        return ratio if self.blend_ms(work, ratio) <= (1 - SAVED_MIN) * prefill_ms else None

    def _compute_ms(self, work: BlendWork, ratio: float) -> float:
        rows = [*_rows(work, ratio), *([work.query_rows] * work.layers if work.query_rows else [])]
        return sum(self._layer_ms(work, count) for count in rows)

    def _layer_ms(self, work: BlendWork, rows: float) -> float:
        known = self._costs.rates().prefill
        if known is None:
            return 0.0
        each = known.token_ms + known.pair_ms * work.prompt_tokens
        return self._pace * (rows * each + known.call_ms) / work.layers


def hopeless(elapsed_ms: float, share: float, wait_ms: float) -> bool:
    """Whether loads of which this share has come by now will by their pace not end anywhere near the patience."""
    return share >= HOPELESS_SHARE_MIN and elapsed_ms > share * HOPELESS * wait_ms


def finish_ms(arrivals: Sequence[float], computes: Sequence[float]) -> float:
    """When the last layer has been computed, each as soon as it has arrived and the one before it has been."""
    now = 0.0
    for arrival, compute in zip(arrivals, computes, strict=True):
        now = max(now, arrival) + compute
    return now


def _rows(work: BlendWork, ratio: float) -> list[float]:
    """Rows of the run that counts, layer by layer."""
    chosen = work.fresh_tokens + ratio * work.moved_tokens
    everything = float(work.fresh_tokens + work.moved_tokens)
    return [everything if layer < work.compared_layers and ratio else chosen for layer in range(work.layers)]


def _steps(low: float, high: float) -> list[float]:
    """Ratios from the highest to the lowest."""
    return [high - (high - low) * step / RATIO_STEPS for step in range(RATIO_STEPS)] + [low]
