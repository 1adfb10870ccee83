"""What a `CostModel` knows as plain numbers, so that they can travel to whoever plans elsewhere."""

from __future__ import annotations

from typing import Annotated

import msgspec

Amount = Annotated[float, msgspec.Meta(ge=0, le=1e12)]


class TierRates(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Milliseconds of loading from a tier, decoding included: a request, each chunk of it, each container byte."""

    request_ms: Amount
    chunk_ms: Amount
    byte_ms: Amount


class PrefillRates(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Milliseconds of prefill: for a token, for each pair of a token and an earlier one, for a call."""

    token_ms: Amount
    pair_ms: Amount
    call_ms: Amount

    def tokens_ms(self, tokens: int, context: int) -> float:
        """Computing `tokens` tokens behind `context` others, without the call."""
        return self.token_ms * tokens + self.pair_ms * (tokens * context + tokens * tokens / 2)


class CostRates(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Rates as far as they are known: of prefill, and of loading from each tier by its name."""

    prefill: PrefillRates | None = None
    tiers: dict[str, TierRates] = {}

    def load_ms(self, tier: str, nbytes: int) -> float | None:
        """One chunk more in a request to a tier, decoded; None if nothing was ever loaded from there."""
        rates = self.tiers.get(tier)
        return None if rates is None else rates.chunk_ms + rates.byte_ms * nbytes

    def request_ms(self, tier: str) -> float:
        """What a request to a tier takes besides its chunks; 0 if that is not known."""
        rates = self.tiers.get(tier)
        return 0.0 if rates is None else rates.request_ms
