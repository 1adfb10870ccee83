"""Load or recompute, in virtual time: the real controller on links of many kinds, against an oracle that knows them.

engine.plan.KIND.vs_recompute_worst   load and computing together against computing everything, the worst of all
                                      prompts; 1 is never slower
engine.plan.KIND.vs_oracle_mean       against whoever knows all arrivals beforehand, 1 is perfect; `_p99`, `_worst`
engine.plan.KIND.always_vs_oracle_mean, .never_vs_oracle_mean
                                      the same for loading whatever is there, and for never loading
engine.plan.decide_ms                 what deciding on a prefix of 128 chunks takes, out of known costs

A kind is a link: steady ones, one that collapses and recovers, stalls, bursts, and one that never delivers. On each
kind prompts follow one another with one cost model, so that what is learned on one serves the next. Chunks are those of
an 8B model (256 tokens, 128 KiB a token, two thirds of that after lossless coding), the engine computes 4000 tokens a
second and looks at 10^9 pairs of tokens a second.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable
from pathlib import Path

from kvstore.bench.timing import median, seconds
from kvstore.cost import CostModel
from kvstore.load_control import Candidate, LoadControl
from kvstore.testing.links import Link, Prompt, load_all_ms, oracle_ms, simulate

CHUNK_TOKENS = 256
CHUNK_BYTES = 256 * 128 * 1024 * 2 // 3
TOKEN_MS = 1 / 4.0
PAIR_MS = 1e-6
GB_PER_S = 1e6
"""Bytes per millisecond."""

PROMPTS = 400
PROMPTS_QUICK = 40
DECIDE_CHUNKS = 128


def measure(_directory: Path, quick: bool) -> dict[str, float]:
    """Metrics `engine.plan.*`."""
    metrics = {"engine.plan.decide_ms": _decide_ms()}
    for kind, link_of in KINDS.items():
        metrics |= _measure_kind(kind, link_of, PROMPTS_QUICK if quick else PROMPTS)
    return metrics


def _steady(gb_per_s: float) -> Callable[[random.Random, int], Link]:
    return lambda dice, _: Link(then=gb_per_s * GB_PER_S * dice.uniform(0.8, 1.2), latency_ms=1.0)


def _collapsing(dice: random.Random, number: int) -> Link:
    """A hundred prompts at 2 GB/s, a hundred at 50 MB/s, and so on."""
    return Link(then=(2.0 if number // 100 % 2 == 0 else 0.05) * GB_PER_S * dice.uniform(0.8, 1.2), latency_ms=1.0)


def _stalling(dice: random.Random, _: int) -> Link:
    """2 GB/s, but a stall of up to 20 seconds begins somewhere in the first second of one prompt in five."""
    stall = (dice.uniform(0, 1000), 2 * GB_PER_S), (dice.uniform(0, 20_000), 0.0)
    return Link(steps=stall if dice.random() < 0.2 else (), then=2 * GB_PER_S, latency_ms=1.0)


def _bursty(dice: random.Random, _: int) -> Link:
    """Anything between nothing and 4 GB/s, anew every few hundred milliseconds."""
    rates = [0.0, 0.05, 0.2, 1.0, 4.0]
    steps = tuple((dice.uniform(20, 500), dice.choice(rates) * GB_PER_S) for _ in range(60))
    return Link(steps=steps, then=0.5 * GB_PER_S, latency_ms=dice.uniform(0, 50))


KINDS: dict[str, Callable[[random.Random, int], Link]] = {
    "fast": _steady(5.0),
    "even": _steady(0.3),
    "slow": _steady(0.05),
    "collapsing": _collapsing,
    "stalling": _stalling,
    "bursty": _bursty,
    "dead": lambda dice, number: Link(),
}


def _measure_kind(kind: str, link_of: Callable[[random.Random, int], Link], prompts: int) -> dict[str, float]:
    dice = random.Random(kind)
    costs = CostModel()
    against_recompute, against_oracle, always, never = [], [], [], []
    for number in range(prompts):
        prompt, link = _prompt(dice), link_of(dice, number)
        control = LoadControl(costs, _candidates(prompt), prompt.savings_ms, deadline_ms=float("inf"))
        took, _ = simulate(control, link, prompt)
        best = oracle_ms(link, prompt)
        against_recompute.append(took / prompt.recompute_ms)
        against_oracle.append(took / best)
        always.append(min(load_all_ms(link, prompt), ALWAYS_MS_MAX) / best)
        never.append(prompt.recompute_ms / best)
    name = f"engine.plan.{kind}"
    return {
        f"{name}.vs_recompute_worst": max(against_recompute),
        f"{name}.vs_recompute_mean": statistics.fmean(against_recompute),
        f"{name}.vs_oracle_mean": statistics.fmean(against_oracle),
        f"{name}.vs_oracle_p99": sorted(against_oracle)[int(0.99 * (prompts - 1))],
        f"{name}.vs_oracle_worst": max(against_oracle),
        f"{name}.always_vs_oracle_mean": statistics.fmean(always),
        f"{name}.never_vs_oracle_mean": statistics.fmean(never),
    }


ALWAYS_MS_MAX = 30_000.0
"""Who loads whatever is there gives up in the end, too: at the default deadline of a fetch."""


def _prompt(dice: random.Random) -> Prompt:
    """4 to 128 stored chunks and up to 2000 tokens behind them."""
    chunks = dice.choice([4, 8, 16, 32, 64, 128])
    return Prompt(
        nbytes=tuple((round(CHUNK_BYTES * dice.uniform(0.95, 1.05)),) for _ in range(chunks)),
        savings_ms=tuple(_prefill_ms(CHUNK_TOKENS, index * CHUNK_TOKENS) for index in range(chunks)),
        rest_ms=_prefill_ms(dice.randrange(1, 2000), chunks * CHUNK_TOKENS),
    )


def _prefill_ms(tokens: int, context: int) -> float:
    return TOKEN_MS * tokens + PAIR_MS * (tokens * context + tokens * tokens / 2)


def _candidates(prompt: Prompt) -> list[Candidate]:
    return [Candidate("link", nbytes) for nbytes in prompt.nbytes]


def _decide_ms() -> float:
    costs = CostModel()
    for nbytes in (CHUNK_BYTES, 4 * CHUNK_BYTES):
        costs.observe_load("link", nbytes=nbytes, ms=nbytes / GB_PER_S)
        costs.observe_decode("lossless", tier="link", nbytes=nbytes, ms=nbytes / GB_PER_S)
    for tokens in (CHUNK_TOKENS, 8 * CHUNK_TOKENS):
        costs.observe_prefill(tokens=tokens, context=0, ms=_prefill_ms(tokens, 0))
    candidates = [Candidate("link", (CHUNK_BYTES,))] * DECIDE_CHUNKS

    def decide() -> None:
        savings = costs.savings_ms(DECIDE_CHUNKS, CHUNK_TOKENS)
        assert LoadControl(costs, candidates, savings, deadline_ms=1e5).next(0.0) is not None

    decide()
    return 1e3 * median([seconds(decide) for _ in range(50)])
