"""A worker's or the scheduler's way to the store: connects when it is first needed, and again when it went away."""

from __future__ import annotations

import logging
import threading
import time

from kvstore.client import Client
from kvstore.codecs import registry
from kvstore.connect import connect
from kvstore.connectors.prefix import PrefixStore
from kvstore.connectors.store_errors import one_line
from kvstore.connectors.vllm.settings import VllmSettings
from kvstore.connectors.vllm.weighing import WorkerCosts
from kvstore.errors import CodecError, ContainerError, KVStoreError
from kvstore.keys import ROOT, KeyScheme
from kvstore.outcome import Miss, Reason
from kvstore.spec import KVSpec

RETRY_SECONDS = 1.0
CONNECT_TIMEOUT_MS = 1_000.0

_log = logging.getLogger(__name__)


class Connection:
    """One connection to a store for all threads of this process. Only the engine's threads in the background use it.

    Args:
        url: where the store is.
        token: bearer token, "" for none.
    """

    def __init__(self, url: str, token: str) -> None:
        self._url = url
        self._token = token
        self._lock = threading.Lock()
        self._client: Client | None = None
        self._failure = Miss(Reason.UNAVAILABLE, "not connected yet")
        self._retry_at = 0.0

    def client(self) -> Client | Miss:
        """The client, or why there is none; tries to connect at most once in RETRY_SECONDS."""
        with self._lock:
            if self._client is None and time.monotonic() >= self._retry_at:
                try:
                    self._client = connect(self._url, token=self._token or None, timeout_ms=CONNECT_TIMEOUT_MS)
                except (KVStoreError, OSError) as error:
                    detail = one_line(error)
                    if detail != self._failure.detail:
                        _log.warning("no store, so nothing is reused until there is one: %s", detail)
                    self._failure = Miss(Reason.UNAVAILABLE, detail)
                    self._retry_at = time.monotonic() + RETRY_SECONDS
            return self._failure if self._client is None else self._client

    def close(self) -> None:
        """Close the connection. Idempotent."""
        with self._lock:
            client, self._client = self._client, None
            self._retry_at = float("inf")
            self._failure = Miss(Reason.UNAVAILABLE, "closed")
        if client is not None:
            client.close()


class StoreAccess(Connection):
    """A connection with the store of a model's prefixes over it.

    Args:
        settings: where the store is, and how to use it.
    """

    def __init__(self, settings: VllmSettings) -> None:
        super().__init__(settings.url, settings.token)
        self._settings = settings
        self.costs = WorkerCosts()
        self._prefixes: PrefixStore | None = None

    def prefixes(self, spec: KVSpec, fingerprint: bytes) -> PrefixStore | Miss:
        """The store of a model's prefixes, or why there is none."""
        client = self.client()
        if isinstance(client, Miss):
            return client
        with self._lock:
            if self._prefixes is None or self._prefixes.keys.fingerprint != fingerprint:
                settings = self._settings
                self._prefixes = PrefixStore(
                    client,
                    spec,
                    KeyScheme(fingerprint, chunk_tokens=settings.chunk_tokens),
                    registry.get(settings.codec or exact_codec(client), ROOT),
                    durable=settings.durable,
                    load_deadline_ms=settings.load_deadline_ms,
                    store_deadline_ms=settings.store_deadline_ms,
                    costs=self.costs,
                )
            return self._prefixes


def exact_codec(client: Client) -> str:
    """The codec that the store asks for if it is exact, else lossless."""
    asked = client.put_codec
    return asked if asked and registry.is_exact(asked) else "lossless"


def check_codec(codec_id: str) -> None:
    """Raise CodecError unless the codec exists and is exact."""
    if not codec_id:
        return
    try:
        codec = registry.get(codec_id, ROOT)
    except ContainerError as error:
        raise CodecError(f"codec: {error.detail}") from error
    if not codec.exact:
        raise CodecError(f"codec is {codec_id!r}, which is lossy; the vLLM connector stores exact KV only")
