"""What things take, learned from what they took: loads from each tier, decoding in each codec, prefill in the engine.

Everything is in milliseconds, bytes and tokens, and nothing outlives the process: a rate from yesterday is a guess
about another machine. An estimate is a sum of non-negative terms,

    load      requests x latency + bytes / bandwidth                     of a tier, the way to it included
    decode    chunks x overhead + bytes / rate                           of a codec, container bytes
    prefill   calls x overhead + tokens x rate + pairs x rate            of the engine

where pairs are the (token, earlier token) pairs that attention looks at: for n tokens behind a context of c tokens
n * c + n * n / 2, the quadratic term of a long prompt.
"""

from __future__ import annotations

import math
import threading
from collections import defaultdict, deque
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvstore.cost_rates import CostRates, PrefillRates, TierRates
from kvstore.errors import ConfigError

KEPT_A_SIZE = 8
"""Observations kept of about one size (within a factor of four): what is rare is not pushed out by what is frequent."""

FADE_LOAD = 0.8
FADE_ENGINE = 0.97
"""Weight of an observation against the one after it: four new loads outweigh all before them, links and disks have
moods. An engine's speed changes with its settings.
"""

WEIGHT_MIN = 1e-3
"""Weight of the oldest observations: they decide only what the others leave open."""

ROUNDS = 6
DEVIATION_MIN = 0.05
"""Relative deviation below which an observation counts in full."""

OPEN_COST = 1e-6
PROBE_SHARE = 0.02
"""Of the time of computing what is stored, this much may be spent on finding out whether loading is worth it again."""

MS_MIN = 1e-4
"""No clock here tells less apart."""


class Estimate:
    """Milliseconds as a non-negative linear function of a few amounts, by what has been observed.

    A weighted least-absolute-deviations fit (by iteratively reweighted least squares) with weights that fade: outliers
    move it little as long as they have less than half of the weight, a lasting change moves it as soon as it has more.
    What the observations leave open is attributed to the first amount. Not safe for threads.

    Args:
        fade: weight of an observation against the one after it.
    """

    def __init__(self, fade: float) -> None:
        self._fade = fade
        self._seen = 0
        self._kept: defaultdict[int, deque[tuple[int, tuple[float, ...], float]]] = defaultdict(
            lambda: deque(maxlen=KEPT_A_SIZE)
        )
        self._rates: tuple[float, ...] | None = None

    def observe(self, amounts: Sequence[float], ms: float) -> None:
        """So much took so long. The first amount is positive."""
        self._seen += 1
        size = int(math.log2(max(1.0, amounts[0])) // 2)
        self._kept[size].append((self._seen, tuple(amounts), max(MS_MIN, ms)))
        self._rates = None

    def rates(self) -> tuple[float, ...] | None:
        """Milliseconds for one of each amount; None if nothing has been observed."""
        if self._rates is None and self._seen:
            self._rates = self._fit()
        return self._rates

    def _fit(self) -> tuple[float, ...]:
        kept = [entry for entries in self._kept.values() for entry in entries]
        amounts = np.array([entry[1] for entry in kept])
        took = np.array([entry[2] for entry in kept])
        ages = self._seen - np.array([entry[0] for entry in kept])
        weights = np.maximum(WEIGHT_MIN, self._fade**ages)
        # What is usual for the size is a first guess that outliers do not reach. Deviations count relative to what is
        # expected, so that small and large loads weigh the same.
        expected = np.concatenate(
            [np.full(len(entries), np.median([entry[2] for entry in entries])) for entries in self._kept.values()]
        )
        rates = np.zeros(amounts.shape[1])
        for _ in range(ROUNDS):
            spread = np.maximum(np.abs(took - expected) / expected, DEVIATION_MIN)
            rates = _non_negative(amounts, took, np.sqrt(weights / spread) / expected)
            expected = np.maximum(amounts @ rates, MS_MIN)
        return tuple(float(rate) for rate in rates)


def _non_negative(
    amounts: npt.NDArray[np.float64], took: npt.NDArray[np.float64], weights: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """The least-squares rates of weighted rows, none negative; what is left open goes to the first."""
    rows = amounts * weights[:, None]
    size = np.sqrt((rows * rows).sum(axis=0))
    rows = rows / size
    gram = rows.T @ rows
    # A slight cost on all rates but the first: it decides only where the rows do not.
    gram[np.diag_indices(len(gram))] += [0.0, *[OPEN_COST] * (len(gram) - 1)]
    wanted = rows.T @ (took * weights)
    active = list(range(len(gram)))
    rates = np.zeros(len(gram))
    while active:
        solution = np.linalg.solve(gram[np.ix_(active, active)], wanted[active])
        if solution.min() >= 0:
            rates[active] = solution
            break
        del active[int(solution.argmin())]
    return np.asarray(rates / size)


class Line(NamedTuple):
    """Milliseconds as a function of bytes."""

    fixed_ms: float
    ms_per_byte: float

    def ms(self, nbytes: int) -> float:
        """For so many bytes."""
        return self.fixed_ms + self.ms_per_byte * nbytes


class Probes:
    """Lets a refused load through now and then: a tier that was slow once is not written off for ever.

    Safe for threads.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._saved_up_ms = 0.0

    def allow(self, compute_ms: float, patience_ms: float) -> bool:
        """Whether a load that has just been refused may be tried; it costs at most `patience_ms`."""
        with self._lock:
            self._saved_up_ms += PROBE_SHARE * compute_ms
            if self._saved_up_ms < patience_ms:
                return False
            self._saved_up_ms = 0.0
            return True


class CostModel:
    """Estimates of loads, decoding and prefill. Safe for threads; an observation or a question takes microseconds,
    the first question after an observation some 300 of them.

    `probes` says when to load from where it seems not worth it.
    """

    def __init__(self) -> None:
        self.probes = Probes()
        self._lock = threading.Lock()
        self._loads: dict[str, Estimate] = {}
        self._decodes: dict[str, Estimate] = {}
        self._prefill = Estimate(FADE_ENGINE)
        self._codecs: dict[str, str] = {}

    def observe_load(self, tier: str, *, nbytes: int, ms: float) -> None:
        """One request had to be waited for so long until so many container bytes had come from a tier."""
        _check(nbytes=nbytes, ms=ms)
        with self._lock:
            self._loads.setdefault(tier, Estimate(FADE_LOAD)).observe((nbytes, 1.0), ms)

    def observe_decode(self, codec: str, *, nbytes: int, ms: float, tier: str = "") -> None:
        """Decoding one chunk of so many container bytes took so long; `tier` is where it came from."""
        _check(nbytes=nbytes, ms=ms)
        with self._lock:
            self._decodes.setdefault(codec, Estimate(FADE_LOAD)).observe((nbytes, 1.0), ms)
            self._codecs[tier] = codec

    def observe_prefill(self, *, tokens: int, context: int, ms: float) -> None:
        """The engine took so long to compute `tokens` tokens behind `context` others."""
        _check(tokens=tokens, ms=ms)
        with self._lock:
            self._prefill.observe(_prefill_amounts(tokens, context), ms)

    def load(self, tier: str) -> Line | None:
        """A request to a tier, without decoding; None if nothing was ever loaded from there."""
        with self._lock:
            return _line(self._loads.get(tier))

    def decode(self, codec: str) -> Line | None:
        """Decoding one chunk of a codec; None if none has been."""
        with self._lock:
            return _line(self._decodes.get(codec))

    def chunk(self, tier: str) -> Line | None:
        """One chunk more in a request to a tier, decoded; None if nothing was ever loaded from there.

        It is taken to be in the codec that came from the tier last.
        """
        with self._lock:
            load = _line(self._loads.get(tier))
            decode = _line(self._decodes.get(self._codecs.get(tier, ""))) or Line(0.0, 0.0)
        return None if load is None else Line(decode.fixed_ms, load.ms_per_byte + decode.ms_per_byte)

    def rates(self) -> CostRates:
        """All that has been observed, as plain numbers."""
        with self._lock:
            known = self._prefill.rates()
            loads = {tier: line for tier, load in self._loads.items() if (line := _line(load)) is not None}
        tiers = {}
        for tier, load in loads.items():
            chunk = self.chunk(tier) or Line(0.0, load.ms_per_byte)
            tiers[tier] = TierRates(load.fixed_ms, chunk.fixed_ms, chunk.ms_per_byte)
        return CostRates(None if known is None else PrefillRates(*known), tiers)

    def prefill_ms(self, tokens: int, context: int) -> float | None:
        """Computing `tokens` tokens behind `context` others; None if the engine has not computed anything yet."""
        with self._lock:
            rates = self._prefill.rates()
        amounts = _prefill_amounts(tokens, context)
        return None if rates is None else sum(r * a for r, a in zip(rates, amounts, strict=True))

    def savings_ms(self, chunks: int, chunk_tokens: int) -> list[float] | None:
        """What the engine need not compute for each of the leading chunks; None if it has not computed anything yet."""
        with self._lock:
            rates = self._prefill.rates()
        if rates is None:
            return None
        first = rates[0] * chunk_tokens + rates[1] * chunk_tokens**2 / 2
        return [first + rates[1] * chunk_tokens**2 * index for index in range(chunks)]


def _prefill_amounts(tokens: int, context: int) -> tuple[float, float, float]:
    """(tokens, pairs, calls)."""
    return float(tokens), tokens * context + tokens * tokens / 2, 1.0


def _line(estimate: Estimate | None) -> Line | None:
    rates = None if estimate is None else estimate.rates()
    return None if rates is None else Line(fixed_ms=rates[1], ms_per_byte=rates[0])


def _check(*, ms: float, **amounts: int) -> None:
    if not 0 <= ms < math.inf:
        raise ConfigError(f"ms is {ms}; an observation takes a finite time, not a negative one")
    for name, amount in amounts.items():
        if not amount > 0:
            raise ConfigError(f"{name} is {amount}; an observation is of something")
