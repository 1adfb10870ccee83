"""What the store knows of a prompt, asked by threads so that the engine's loop never waits for the store."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future

import msgspec

from kvstore.client import Client
from kvstore.connectors.store_errors import unavailable
from kvstore.connectors.vllm.access import StoreAccess
from kvstore.connectors.vllm.asking import Asking, answered
from kvstore.keys import KeyScheme
from kvstore.outcome import Lookup, Miss, Reason

LOOKUP_THREADS = 2
LOOKUPS_MAX = 4096

Schemes = Callable[[str], KeyScheme]
"""The key scheme of a cache salt; waits until the model's fingerprint is known."""


class Answer(msgspec.Struct, frozen=True):
    """The keys of a prompt's full chunks, what the store has of them, and when it said so (monotonic)."""

    chain: list[bytes]
    found: Lookup
    at: float

    @property
    def chunks(self) -> int:
        """How many leading chunks the store has."""
        return self.found.chunks

    @property
    def stop(self) -> Miss | None:
        """Why it has no more; None if it has all."""
        return self.found.stop


class Lookups:
    """Asks a store about prompts in the background.

    Args:
        access: the way to the store.
        schemes: the keys of prompts.
    """

    def __init__(self, access: StoreAccess, schemes: Schemes) -> None:
        self._access = access
        self._schemes = schemes
        self._asking = Asking(LOOKUP_THREADS, LOOKUPS_MAX, "kvstore-lookup")

    def ask(self, tokens: Sequence[int], cache_salt: str) -> Future[Answer]:
        """What the store has of a prompt; an empty answer at once if too many are being asked for."""
        asked = self._asking.ask(lambda: self._ask(tokens, cache_salt))
        if asked is not None:
            return asked
        stop = Miss(Reason.BUSY, f"{LOOKUPS_MAX} lookups are waiting")
        return answered(Answer([], Lookup((), stop), time.monotonic()))

    def close(self) -> None:
        """Answer nothing any more."""
        self._asking.close(wait=False)

    def _ask(self, tokens: Sequence[int], cache_salt: str) -> Answer:
        chain: list[bytes] = []
        try:
            chain = self._schemes(cache_salt).chain(tokens)
            client = self._access.client()
            found = client.lookup(chain) if isinstance(client, Client) else Lookup((), client)
        except Exception as error:  # whatever goes wrong with the store must not reach the engine
            found = Lookup((), unavailable(error))
        return Answer(chain, found, time.monotonic())
