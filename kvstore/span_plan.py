"""What can be asked of a plan of a prompt, and the plan: spans that cover the prompt, and what they should take."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from kvstore.cost_rates import CostRates
from kvstore.errors import ConfigError
from kvstore.outcome import Miss
from kvstore.spans import Document, Span

DOCUMENTS_MAX = 4096


class PlanOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How to plan a prompt.

    Args:
        documents: where the prompt has documents, from left to right, without overlap; at most DOCUMENTS_MAX.
        preamble_tokens: how many of the prompt's first tokens are the preamble that documents are computed behind.
        scan: look for known documents everywhere else, too.
        any_preamble: accept pieces that were computed behind another preamble; their spans say so.
        context_tokens: how many positions the model has; None for not checked.
        recompute_share: of the tokens that are reused out of place, how many the blending policy computes again.
        rates: what loading and computing take, for a plan by time; without, whatever is stored is loaded.

    Raises:
        ConfigError: documents that are empty, too many, or overlap one another or the preamble; a number out of range.
    """

    documents: Sequence[Document] = ()
    preamble_tokens: int = 0
    scan: bool = True
    any_preamble: bool = False
    context_tokens: int | None = None
    recompute_share: float = 0.0
    rates: CostRates = CostRates()

    def __post_init__(self) -> None:
        if self.preamble_tokens < 0:
            raise ConfigError(f"preamble_tokens is {self.preamble_tokens}; it must not be negative")
        if not 0 <= self.recompute_share <= 1:
            raise ConfigError(f"recompute_share is {self.recompute_share}; it must be in 0..1")
        if len(self.documents) > DOCUMENTS_MAX:
            raise ConfigError(f"documents has {len(self.documents)} entries; a plan takes {DOCUMENTS_MAX}")
        end, before = self.preamble_tokens, "the preamble"
        for index, document in enumerate(self.documents):
            name = f"documents[{index}]"
            if document.start >= document.stop:
                raise ConfigError(f"{name} is empty ({document.start}..{document.stop}); leave it out")
            if document.start < end:
                raise ConfigError(f"{name} starts at token {document.start}, before {before} ends at {end}")
            if document.tokens is not None and not len(document.tokens):
                raise ConfigError(f"{name}.tokens is empty; leave it out where the prompt's tokens are the document's")
            end, before = document.stop, name

    def check(self, tokens: int) -> None:
        """Raise ConfigError unless a prompt of so many tokens can be planned like this."""
        if not tokens:
            raise ConfigError("tokens is empty; a plan needs a prompt")
        if self.context_tokens is not None and tokens > self.context_tokens:
            raise ConfigError(f"the prompt has {tokens} tokens; the model's context has {self.context_tokens}")
        if self.preamble_tokens > tokens:
            raise ConfigError(f"preamble_tokens is {self.preamble_tokens}; the prompt has {tokens} tokens")
        if self.documents and self.documents[-1].stop > tokens:
            raise ConfigError(f"documents[-1] ends at {self.documents[-1].stop}; the prompt has {tokens} tokens")


class SpanPlan(msgspec.Struct, frozen=True, kw_only=True):
    """Spans from the prompt's first token to its last, each token in exactly one; the last token is always computed.

    `load_ms` is what all loads should take, `compute_ms` what the engine then still computes, `prefill_ms` what it
    would compute without the store; None where that cannot be told yet. `miss` is set if the store did not answer;
    everything is then recomputed.
    """

    spans: tuple[Span, ...]
    load_ms: float | None = None
    compute_ms: float | None = None
    prefill_ms: float | None = None
    miss: Miss | None = None

    @property
    def tokens(self) -> int:
        """Tokens of the prompt."""
        return self.spans[-1].stop if self.spans else 0

    @property
    def reused_tokens(self) -> int:
        """Tokens whose KV is loaded."""
        return sum(span.tokens for span in self.spans if span.kind != "recompute")
