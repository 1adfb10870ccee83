"""How much of a known prefix is worth loading: what is not expected to come sooner than it is computed is not begun.

The scheduler's side decides, by what loads have taken in the workers and prefills in the engine so far; a worker ends a
load that turns out slower (`kvstore.load_control`). Until both have been observed, everything is loaded.
"""

from __future__ import annotations

import math
from collections import deque

import msgspec

from kvstore.connectors.vllm.messages import Observation
from kvstore.connectors.vllm.settings import VllmSettings
from kvstore.cost import CostModel
from kvstore.load_control import Candidate, LoadControl
from kvstore.outcome import Lookup, Miss

OBSERVATIONS_MAX = 256
"""What a worker remembers until it is asked; the oldest are forgotten first."""


class Choice(msgspec.Struct, frozen=True):
    """Have the prompt's leading `chunks` chunks, no more because of `refusal`.

    The lists begin with the first chunk that the engine does not have all of itself: where it is, its container bytes,
    and what it saves, None if that shall not end the load. The load may take `deadline_ms`.
    """

    chunks: int
    tiers: list[str] = []
    nbytes: list[int] = []
    savings_ms: list[float] | None = None
    deadline_ms: float = math.inf
    refusal: Miss | None = None


class Weighing:
    """The choices of one scheduler.

    Args:
        settings: the connector's.
    """

    def __init__(self, settings: VllmSettings) -> None:
        self.costs = CostModel()
        self._chunk = settings.chunk_tokens
        self._deadline_ms = settings.load_deadline_ms
        self._weigh = settings.load_policy == "cost"

    def choose(self, found: Lookup, chunks: int, local_tokens: int) -> Choice:
        """What to load of the `chunks` leading chunks that `found` tells of, behind the engine's own tokens."""
        first = min(local_tokens // self._chunk, chunks)
        sized = len(found.nbytes) == found.chunks
        tiers = list(found.tiers[first:chunks])
        nbytes = list(found.nbytes[first:chunks]) if sized else []
        everything = Choice(chunks, tiers, nbytes)
        savings = self.costs.savings_ms(chunks, self._chunk) if self._weigh and sized and tiers else None
        if savings is None:
            return everything
        savings = savings[first:]
        savings[0] *= 1 - (local_tokens - first * self._chunk) / self._chunk
        candidates = [Candidate(tier, (max(1, size),)) for tier, size in zip(tiers, nbytes, strict=True)]
        control = LoadControl(self.costs, candidates, savings, deadline_ms=self._deadline_ms)
        batch = control.next(0.0)
        if batch is None:
            return Choice(first, refusal=control.stop)
        if control.planned == 1:  # nothing to think again about on the way: it comes by this time or it does not
            return Choice(first + 1, tiers[:1], nbytes[:1], deadline_ms=batch.deadline_ms)
        planned = control.planned
        return Choice(first + planned, tiers[:planned], nbytes[:planned], savings[:planned])

    def observe(self, observation: Observation) -> None:
        """A worker has seen what something takes."""
        seen = observation
        if seen.codec:
            self.costs.observe_decode(seen.codec, tier=seen.tier, nbytes=seen.nbytes, ms=seen.ms)
        else:
            self.costs.observe_load(seen.tier, nbytes=seen.nbytes, ms=seen.ms)


class WorkerCosts(CostModel):
    """A worker's own estimates; what it observes it remembers for the scheduler's side, too."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: deque[Observation] = deque(maxlen=OBSERVATIONS_MAX)

    def observe_load(self, tier: str, *, nbytes: int, ms: float) -> None:
        super().observe_load(tier, nbytes=nbytes, ms=ms)
        self._seen.append(Observation(tier, nbytes, ms))

    def observe_decode(self, codec: str, *, nbytes: int, ms: float, tier: str = "") -> None:
        super().observe_decode(codec, nbytes=nbytes, ms=ms, tier=tier)
        self._seen.append(Observation(tier, nbytes, ms, codec))

    def take(self) -> list[Observation]:
        """What has been observed since the last call."""
        taken = []
        while self._seen:
            taken.append(self._seen.popleft())
        return taken
