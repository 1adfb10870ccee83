"""What the engine takes to compute prompts, seen from its scheduler: the clock is read at steps and when requests end.

One request is watched at a time, from the step that begins to compute it to when its first new token is known; that the
engine is idle or far ahead with its steps in between is then impossible. All that has been scheduled meanwhile counts
as computed meanwhile, of whatever request: how fast a prompt is computed depends on what is computed beside it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from kvstore.connectors.vllm.requests import Entry, Request
from kvstore.cost import CostModel


class PrefillClock:
    """Tells `costs` what prefills take.

    Args:
        costs: the estimates.
        tokens_min: what computes fewer tokens of a prompt is not watched: it says little of a prompt's cost.
        clock: seconds.
    """

    def __init__(self, costs: CostModel, *, tokens_min: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self._costs = costs
        self._tokens_min = tokens_min
        self._clock = clock
        self._watched: str | None = None
        self._known_tokens = 0
        self._began = 0.0
        self._tokens = 0
        self._pairs = 0.0

    def step(self, scheduled: Mapping[str, int], entries: Mapping[str, Entry], *, waits: bool) -> None:
        """A step is about to compute `scheduled` tokens of each request; with `waits` it loads KV first."""
        if self._watched is not None:
            entry = entries.get(self._watched)
            if entry is None or waits or self._watched not in scheduled:
                self._watched = None
            elif entry.request.num_tokens > self._known_tokens:
                self._observe()
        if self._watched is None and not waits:
            self._watch(scheduled, entries)
        if self._watched is not None:
            for request_id, tokens in scheduled.items():
                entry = entries.get(request_id)
                context = 0 if entry is None else entry.request.num_computed_tokens
                self._tokens += tokens
                self._pairs += tokens * context + tokens * tokens / 2

    def finished(self, request: Request) -> None:
        """A request is over."""
        if request.request_id == self._watched:
            if request.num_tokens > self._known_tokens:
                self._observe()
            self._watched = None

    def _watch(self, scheduled: Mapping[str, int], entries: Mapping[str, Entry]) -> None:
        """Choose a request that this step begins to compute."""
        for request_id, tokens in scheduled.items():
            entry = entries.get(request_id)
            if tokens >= self._tokens_min and entry is not None:
                self._watched, self._known_tokens = request_id, entry.request.num_tokens
                self._began = self._clock()
                self._tokens, self._pairs = 0, 0.0
                return

    def _observe(self) -> None:
        """The first token behind what was watched is known."""
        ms = (self._clock() - self._began) * 1e3
        # The context at which as many tokens of one prompt would look at as many pairs.
        context = max(0, round((self._pairs - self._tokens**2 / 2) / self._tokens))
        self._costs.observe_prefill(tokens=self._tokens, context=context, ms=ms)
        self._watched = None
