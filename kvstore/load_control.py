"""When to load, how much at a time, and when to stop waiting: one prompt's load, steered while it runs.

What is promised. Let R be what the engine takes to compute the whole prompt, S(k) the part of it that having the first
k chunks saves, L(k) when they were there, and P(k) the patience then: PATIENCE of all that could still be saved, or
PATIENCE_NEXT of what the next chunk would save, or PATIENCE_MS_MIN, whichever is most. Whatever the store, disk and
network do, and however wrong the estimates of loads are, load and computing together take at most

    R + P(0) + o

where o is how much longer than asked a fetch takes to end, and the decoding of one chunk beyond what computing it would
take. Proof: a batch is asked for with the deadline S(j) + B(j), where j chunks are there when it begins and B(j) is the
least of L(k) - S(k) + P(k) over k <= j, and nothing is begun after that time. S grows and B(j) <= P(0). So when loading
ends, with j chunks, at most S(j) + P(0) + o has passed, and computing the rest takes R - S(j). This is the argument of
ski rental: what has been saved is the rent that may be paid on. In the same way it takes at most P(k) longer than to
have stopped after any k chunks with which a batch began. Where the engine's own R and S are estimated too high by d,
the bound is higher by d.

Some patience is unavoidable: who must wait for bytes before computing can be made to wait for nothing, so only never
loading is never slower. The price of a small P is what is forgone when bytes come late: one who knows all arrivals can
be 1 + 1 / PATIENCE times as fast. docs/load_or_recompute.md says what was measured.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import accumulate

import msgspec

from kvstore.cost import CostModel, Line
from kvstore.outcome import Miss, Reason
from kvstore.planning import Plan, plan_loads

PATIENCE = 0.1
PATIENCE_NEXT = 0.5
PATIENCE_MS_MIN = 20.0
"""What is not worth weighing: a load that should take no longer is always begun."""

MARGIN = 2.0
MARGIN_REFINED = 8.0
"""A batch is as large as would arrive by its deadline even if it took this many times longer than expected. One in
more than the lowest level is smaller, so that there is time to think again.
"""

PACE_FADE = 0.5
"""Weight of a batch against the next one, for how fast this load is compared with what was expected."""


class Candidate(msgspec.Struct, frozen=True):
    """A chunk that could be loaded: the tier it is in, and its container bytes up to each level, lowest first."""

    tier: str
    nbytes: tuple[int, ...]


class Batch(msgspec.Struct, frozen=True):
    """Fetch chunks up to `stop`, from the first that has not been loaded; `level` counts `Candidate.nbytes`.

    What has not come by `deadline_ms`, counted from the start of the load, is not waited for.
    """

    stop: int
    level: int
    deadline_ms: float


class LoadControl:
    """Steers one load. Ask `next` for a batch, report what becomes of it, `ended` last, and ask again.

    `loaded` chunks are there, and by the latest plan `planned` in all are worth having. All times are milliseconds
    since the load began. Not safe for threads.

    Args:
        costs: estimates; told of what is observed.
        candidates: the chunks of the prefix, in order; at least one.
        savings_ms: what having each of them saves the engine; None if unknown: then everything is loaded.
        deadline_ms: loading never takes longer.
    """

    def __init__(
        self,
        costs: CostModel,
        candidates: Sequence[Candidate],
        savings_ms: Sequence[float] | None,
        *,
        deadline_ms: float,
    ) -> None:
        self.loaded = 0
        self.planned = 0
        self.stop: Miss | None = None
        self._costs = costs
        self.candidates = candidates
        self._savings = savings_ms
        self._saved = [0.0, *accumulate(savings_ms or ())]
        self._deadline_ms = deadline_ms
        self._patience = _patience(savings_ms or ())
        self._bound_ms = self._patience[0]
        self._started = False
        self._lines: dict[str, Line | None] = {}
        self._fixed_ms = 0.0
        self._learn()
        self._expected_ms = self._actual_ms = 0.0
        self._batch = Batch(0, 0, 0.0)
        self._mark_ms = self._batch_began_ms = 0.0
        self._batch_first = 0
        self._waited: defaultdict[str, tuple[int, float]] = defaultdict(lambda: (0, 0.0))
        self._decoding: defaultdict[tuple[str, str], tuple[int, int, float]] = defaultdict(lambda: (0, 0, 0.0))

    def next(self, now_ms: float) -> Batch | None:
        """The next batch to fetch; None if there is nothing more to load, `stop` says why if chunks are left."""
        if self.loaded == len(self.candidates) or self.stop is not None:
            return None
        batch = self._everything(now_ms) if self._savings is None else self._next(now_ms, self._savings)
        if batch is not None:
            self._batch, self._batch_first = batch, self.loaded
            self._mark_ms = self._batch_began_ms = now_ms
            self._started = True
        return batch

    def arrived(self, now_ms: float) -> None:
        """The batch's next chunk has come."""
        candidate = self.candidates[self.loaded]
        nbytes, ms = self._waited[candidate.tier]
        self._waited[candidate.tier] = (
            nbytes + candidate.nbytes[self._batch.level],
            ms + max(0.0, now_ms - self._mark_ms),
        )
        self._mark_ms = now_ms

    def decoded(self, now_ms: float, codec: str) -> None:
        """That chunk has been decoded: it counts as loaded."""
        candidate = self.candidates[self.loaded]
        chunks, nbytes, ms = self._decoding[codec, candidate.tier]
        self._decoding[codec, candidate.tier] = (
            chunks + 1,
            nbytes + candidate.nbytes[self._batch.level],
            ms + max(0.0, now_ms - self._mark_ms),
        )
        self._mark_ms = now_ms
        self.loaded += 1
        if self._savings is not None:
            here = now_ms - self._saved[self.loaded] + self._patience[self.loaded]
            self._bound_ms = min(self._bound_ms, here)

    def ended(self, now_ms: float, miss: Miss | None) -> None:
        """The batch is over, with `miss` for its next chunk if it did not come.

        Who has waited for a chunk in vain must expect to wait as long again: as if that had happened, it counts. The
        load goes on only if something of the batch was there in time.
        """
        late = miss is not None and miss.reason == Reason.DEADLINE
        if late:
            self._mark_ms -= now_ms - self._mark_ms
            self.arrived(now_ms)
        for tier, (nbytes, ms) in self._waited.items():
            self._costs.observe_load(tier, nbytes=nbytes, ms=ms)
        for (codec, tier), (chunks, nbytes, ms) in self._decoding.items():
            self._costs.observe_decode(codec, tier=tier, nbytes=nbytes // chunks, ms=ms / chunks)
        self._waited.clear()
        self._decoding.clear()
        done = range(self._batch_first, self.loaded + late)
        expected = sum(self._load_ms(index)[self._batch.level] for index in done)
        self._expected_ms = PACE_FADE * self._expected_ms + expected + self._fixed_ms
        self._actual_ms = PACE_FADE * self._actual_ms + now_ms - self._batch_began_ms
        if None in self._lines.values():
            self._learn()
        if miss is not None and (not late or self._savings is None):
            self.stop = miss
        elif late and self.loaded == self._batch_first:
            self.stop = self._overdue(now_ms)

    def _everything(self, now_ms: float) -> Batch | None:
        """All of it, in its best level: nothing is known to compare it with."""
        if now_ms >= self._deadline_ms:
            self.stop = self._overdue(now_ms)
            return None
        return self._all(self._deadline_ms)

    def _all(self, deadline_ms: float) -> Batch:
        self.planned = len(self.candidates)
        return Batch(len(self.candidates), -1, deadline_ms)

    def _next(self, now_ms: float, savings: Sequence[float]) -> Batch | None:
        until = self._saved[self.loaded] + self._bound_ms
        deadline_ms = min(until, self._deadline_ms)
        if now_ms >= deadline_ms:
            self.stop = self._overdue(now_ms)
            return None
        # This load may be slower or faster than those before it.
        pace = self._actual_ms / self._expected_ms if self._expected_ms > 0 else 1.0
        left = range(self.loaded, len(self.candidates))
        loads = [[pace * ms for ms in self._load_ms(index)] for index in left]
        fixed_ms = pace * self._fixed_ms
        plan = plan_loads(
            savings[self.loaded :],
            loads,
            self._patience[self.loaded : -1],
            fixed_ms=fixed_ms,
            room_ms=until - now_ms,
            budget_ms=self._deadline_ms - now_ms,
        )
        if not plan.levels:
            everything = fixed_ms + sum(ms[0] for ms in loads)
            if not self._started and fixed_ms + sum(ms[-1] for ms in loads) <= min(PATIENCE_MS_MIN, deadline_ms):
                return self._all(deadline_ms)
            if not self._started and self._costs.probes.allow(self._saved[-1], self._patience[0]):
                self.planned = 1
                return Batch(1, 0, deadline_ms)
            self.stop = self._refusal(now_ms, fixed_ms + loads[0][0], everything)
            return None
        self.planned = self.loaded + len(plan.levels)
        return Batch(self.loaded + self._count(plan, loads, deadline_ms - now_ms), plan.levels[0], deadline_ms)

    def _count(self, plan: Plan, loads: Sequence[Sequence[float]], time_ms: float) -> int:
        """How many of the plan's chunks to ask for at once: of one level, and not more than will come in time.

        Tiers whose chunks have several levels do not mix with others: their levels need not be the same.
        """
        expected = plan.load_ms - sum(ms[level] for ms, level in zip(loads, plan.levels, strict=False))
        margin = MARGIN_REFINED if plan.levels[0] else MARGIN
        count = 0
        for ms, level in zip(loads, plan.levels, strict=False):
            tier = self.candidates[self.loaded + count].tier
            expected += ms[level]
            if count and (level != plan.levels[0] or margin * expected > time_ms or self._differ(count)):
                break
            count += 1
            if self._lines[tier] is None:
                break  # a tier of unknown speed: one chunk will tell
        return count

    def _overdue(self, now_ms: float) -> Miss:
        late = f"{self.loaded} chunks in {now_ms:.0f} ms"
        if self._savings is None or self._saved[self.loaded] + self._bound_ms > self._deadline_ms:
            return Miss(Reason.DEADLINE, late)
        return Miss(Reason.NOT_WORTH_IT, f"{late}; computing the rest is quicker than to wait for it")

    def _differ(self, ahead: int) -> bool:
        one, other = self.candidates[self.loaded], self.candidates[self.loaded + ahead]
        return one.tier != other.tier and max(len(one.nbytes), len(other.nbytes)) > 1

    def _refusal(self, now_ms: float, next_ms: float, load_ms: float) -> Miss:
        if now_ms + next_ms > self._deadline_ms:
            detail = f"{self.loaded} chunks in {now_ms:.0f} ms, and no time for the next"
            return Miss(Reason.DEADLINE, detail)
        left = self._saved[-1] - self._saved[self.loaded]
        tiers = ", ".join(sorted({candidate.tier for candidate in self.candidates[self.loaded :]}))
        detail = f"loading the rest from {tiers} would take {load_ms:.0f} ms, computing it {left:.0f} ms"
        return Miss(Reason.NOT_WORTH_IT, detail)

    def _load_ms(self, index: int) -> list[float]:
        """What a chunk should take in each level; zeros, to try it, if its tier has not been seen."""
        candidate = self.candidates[index]
        line = self._lines[candidate.tier]
        return [line.ms(nbytes) if line is not None else 0.0 for nbytes in candidate.nbytes]

    def _learn(self) -> None:
        """Take the estimates of the tiers."""
        tiers = dict.fromkeys(candidate.tier for candidate in self.candidates)
        self._lines = {tier: self._costs.chunk(tier) for tier in tiers}
        requests = [self._costs.load(tier) for tier in tiers]
        self._fixed_ms = sum(line.fixed_ms for line in requests if line is not None)


def _patience(savings_ms: Sequence[float]) -> list[float]:
    """P(k) for every number of chunks k."""
    left = [*accumulate(reversed(savings_ms), initial=0.0)][::-1]
    return [
        max(PATIENCE_MS_MIN, PATIENCE * still, PATIENCE_NEXT * following)
        for still, following in zip(left, [*savings_ms, 0.0], strict=True)
    ]
