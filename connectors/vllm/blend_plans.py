"""Plans of prompts that shall be blended, asked for by threads so that the engine's loop never waits for the store."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future

import msgspec

from kvstore.client import Client
from kvstore.connectors.store_errors import unavailable
from kvstore.connectors.vllm.access import StoreAccess
from kvstore.connectors.vllm.asking import Asking, answered
from kvstore.connectors.vllm.blend_messages import Piece
from kvstore.connectors.vllm.blend_requests import BlendAsked
from kvstore.connectors.vllm.lookups import Schemes
from kvstore.errors import KVStoreError
from kvstore.outcome import Miss, Reason
from kvstore.spans import Span

PLAN_THREADS = 2
PLANS_MAX = 1024


class Planned(msgspec.Struct, frozen=True):
    """Stored chunks of a prompt, from left to right, at least one, and whose KV it is."""

    pieces: list[Piece]
    fingerprint: bytes


Plan = Planned | Miss


class BlendPlans:
    """Asks a store for plans in the background.

    Args:
        access: the way to the store.
        schemes: the keys of documents of a salt.
        context_tokens: how many positions the model has.
    """

    def __init__(self, access: StoreAccess, schemes: Schemes, context_tokens: int) -> None:
        self._access = access
        self._schemes = schemes
        self._context_tokens = context_tokens
        self._asking = Asking(PLAN_THREADS, PLANS_MAX, "kvstore-plan")

    def ask(self, tokens: Sequence[int], asked: BlendAsked) -> Future[Plan]:
        """What of a prompt is stored; a miss at once if too many are being asked for."""
        plan = self._asking.ask(lambda: self._ask(tokens, asked))
        return answered(Miss(Reason.BUSY, f"{PLANS_MAX} plans are waiting")) if plan is None else plan

    def close(self) -> None:
        """Answer nothing any more."""
        self._asking.close(wait=False)

    def _ask(self, tokens: Sequence[int], asked: BlendAsked) -> Plan:
        try:
            client = self._access.client()
            if not isinstance(client, Client):
                return client
            keys = self._schemes(asked.salt)
            plan = client.plan(tokens, keys, asked.options(self._context_tokens))
            found = plan.miss or pieces_of(plan.spans, keys.chunk_tokens)
            return found if isinstance(found, Miss) else Planned(found, keys.fingerprint)
        except KVStoreError as error:
            return Miss(Reason.MALFORMED, f"{error}".splitlines()[0])
        except Exception as error:  # whatever goes wrong with the store must not reach the engine
            return unavailable(error)


def pieces_of(spans: Sequence[Span], chunk_tokens: int) -> list[Piece] | Miss:
    """The pieces to load of a plan's spans; a miss if there are none."""
    pieces: list[Piece] = []
    for span in spans:
        if span.kind == "prefix":
            for index, key in enumerate(span.keys):
                start = index * chunk_tokens
                pieces.append(Piece(key, start, min(start + chunk_tokens, span.stop), start, exact=True))
        elif span.kind == "content":
            pieces.append(Piece(span.keys[0], span.start, span.stop, span.position))
    if not pieces:
        reasons = sorted({f"{span.reason}" for span in spans if span.reason is not None})
        return Miss(Reason.ABSENT, f"nothing of the prompt is stored: {', '.join(reasons)}")
    return pieces
