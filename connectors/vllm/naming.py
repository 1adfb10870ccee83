"""The name of the model's weights, found in the background while the engine starts, and the keys made with it."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from kvstore.connectors.shared_identity import check_shareable, shared_fingerprint
from kvstore.connectors.vllm.identity import checkpoint_digest, model_fingerprint, stated_digest
from kvstore.connectors.vllm.settings import VllmSettings
from kvstore.errors import UnsupportedModelError
from kvstore.keys import KeyScheme
from kvstore.spec import KVSpec

WAIT_SECONDS = 60.0

_log = logging.getLogger(__name__)


class ModelName:
    """The fingerprint of a model, known once its weight files have been read.

    Args:
        settings: the connector's.
        spec: geometry of the model's KV.
        files: its weight files; none if the settings name the weights.
        config: the model's configuration.
        quantisation: the scheme that vLLM quantises the weights with; "" for none.

    Raises:
        UnsupportedModelError: the model shall be shared with other engines, and cannot be.
    """

    def __init__(
        self, settings: VllmSettings, spec: KVSpec, files: list[Path], config: Mapping[str, Any], quantisation: str
    ) -> None:
        if settings.share_between_engines:
            if quantisation:
                raise UnsupportedModelError(
                    f"share_between_engines: the weights are quantised ({quantisation}), and not in every engine alike"
                )
            check_shareable(spec, files, config)
        self._settings = settings
        self._spec = spec
        self._config = config
        self._quantisation = quantisation
        self._fingerprint: Future[bytes] = Future()
        threading.Thread(target=self._read, args=(files,), name="kvstore-weights", daemon=True).start()

    def now(self) -> bytes:
        """The fingerprint; b"" while it is not known."""
        done = self._fingerprint.done() and self._fingerprint.exception() is None
        return self._fingerprint.result() if done else b""

    def renew(self) -> None:
        """The weights may have been changed in place: from now on share nothing with anyone, nor with before."""
        fresh: Future[bytes] = Future()
        fresh.set_result(model_fingerprint(self._spec, os.urandom(32), self._config, self._quantisation))
        self._fingerprint = fresh

    def scheme(self, cache_salt: str) -> KeyScheme | None:
        """The keys of a cache salt; None while the fingerprint is not known."""
        fingerprint = self.now()
        return self._scheme(fingerprint, cache_salt) if fingerprint else None

    def scheme_wait(self, cache_salt: str) -> KeyScheme:
        """The keys of a cache salt; waits for the fingerprint. Raises TimeoutError or OSError if it does not come."""
        return self._scheme(self._fingerprint.result(WAIT_SECONDS), cache_salt)

    def _scheme(self, fingerprint: bytes, cache_salt: str) -> KeyScheme:
        return KeyScheme(
            fingerprint,
            chunk_tokens=self._settings.chunk_tokens,
            salt=self._settings.salt.encode(),
            extras={"cache_salt": cache_salt} if cache_salt else {},
        )

    def _name(self, files: list[Path]) -> bytes:
        if self._settings.share_between_engines:
            return shared_fingerprint(self._spec, files)
        stated = self._settings.weights_identity
        weights = stated_digest(stated) if stated else checkpoint_digest(files)
        return model_fingerprint(self._spec, weights, self._config, self._quantisation)

    def _read(self, files: list[Path]) -> None:
        future = self._fingerprint
        try:
            fingerprint = self._name(files)
            _log.info("the model's fingerprint is %s", fingerprint.hex())
            future.set_result(fingerprint)
        except Exception as error:  # without a name nothing is reused, and the engine goes on
            _log.exception("the weight files could not be read; nothing is reused")
            future.set_exception(error)
