"""The pages of vLLM's offloading in a store: their keys, and the way there once the weights have a name.

vLLM names what it offloads by a hash of tokens (with `cache_salt`, multimodal inputs and the adapter's name in it).
That says nothing of weights, types, layouts or ranks, so all of these go into the keys: bytes are found again only by
an engine that would write the very same ones. vLLM tells a tier neither its attention backend nor what overrides the
checkpoint's configuration; `namespace` is there for those who change them.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import msgspec

from kvstore.client import Client
from kvstore.connectors.pages import OpaquePages
from kvstore.connectors.vllm.access import Connection
from kvstore.connectors.vllm.identity import checkpoint_digest, stated_digest, weight_files
from kvstore.connectors.vllm.tier_settings import TierSettings
from kvstore.errors import UnsupportedModelError
from kvstore.outcome import Miss, Reason

_DOMAIN = b"kvstore-vllm-tier-1\0"

Identity = dict[str, str | bytes | int]


def page_identity(config: Any, *, row_bytes: int, engine: str, namespace: str) -> Identity:
    """Everything but weights and tokens that decides the bytes of a page.

    Args:
        config: vLLM's `OffloadingConfig`.
        row_bytes: bytes of a page; those of all workers are in it.
        engine: vLLM's version and the kind of its device: how it lays KV out is its own affair.
        namespace: the operator's part.
    """
    parallel = config.parallel
    groups = [[group.tokens_per_block, list(group.layer_names)] for group in config.groups]
    return {
        "namespace": namespace,
        "engine": engine,
        "row_bytes": row_bytes,
        "dtype": str(config.model.dtype),
        "groups": msgspec.json.encode(groups),
        "hash_tokens": config.cache.tokens_per_hash,
        "blocks": config.cache.blocks_per_chunk,
        "layout": str(getattr(config, "kv_cache_layout", None)),
        "canonical": int(getattr(config, "canonical_layout", False)),
        "replicated": int(getattr(config, "replicated_layout", False)),
        "ranks": msgspec.json.encode(
            [parallel.world_size, parallel.tp_size, parallel.pp_size, parallel.pcp_size, parallel.dcp_size]
        ),
    }


def weights_reader(settings: TierSettings, model: str) -> Callable[[], bytes]:
    """What answers the 32-byte name of the weights; it reads their files, so it may take a while and raise OSError.

    Raises:
        UnsupportedModelError: nothing names them.
    """
    if settings.weights_identity:
        return lambda: stated_digest(settings.weights_identity)
    directory = Path(model)
    if not directory.is_dir():
        raise UnsupportedModelError(
            f"{model!r} is no directory, and a name does not say which weights are meant; give vLLM the directory "
            "of the checkpoint, or the kvstore tier a weights_identity that changes whenever the weights do"
        )
    files = weight_files(directory)
    config = directory / "config.json"
    return lambda: checkpoint_digest([*files, config] if config.exists() else files)


class TierPages:
    """The way of one engine to its pages. Only threads in the background may wait for it.

    Args:
        connection: the way to the store.
        identity: of the pages, without the weights.
        weights: what answers the name of the weights; called once, in a thread.
        durable: whether a page is stored only once it would survive kill -9.
    """

    def __init__(
        self, connection: Connection, identity: Identity, weights: Callable[[], bytes], *, durable: bool = False
    ) -> None:
        self._connection = connection
        self._identity = identity
        self._durable = durable
        self._weights: Future[bytes] = Future()
        threading.Thread(target=_fill, args=(self._weights, weights), name="kvstore-weights", daemon=True).start()

    def get(self, deadline: float) -> OpaquePages | Miss:
        """The pages, or why there are none by the deadline, in time.monotonic seconds. Raises nothing."""
        try:
            weights = self._weights.result(max(0.0, deadline - time.monotonic()))
        except TimeoutError:
            return Miss(Reason.DEADLINE, "the weight files are still being read, so they have no name yet")
        except Exception as error:  # whatever the files are like, the engine goes on
            return Miss(Reason.UNAVAILABLE, f"the weight files could not be read: {error}")
        client = self._connection.client()
        if not isinstance(client, Client):
            return client
        return OpaquePages(client, _DOMAIN, {**self._identity, "weights": weights}, durable=self._durable)

    def exist(self, names: Sequence[bytes], deadline: float) -> list[bool] | Miss:
        """Whether the store has each page, or why it does not say by the deadline."""
        pages = self.get(deadline)
        return pages if isinstance(pages, Miss) else pages.exist([name.hex() for name in names])

    def renew(self) -> None:
        """The weights may have been changed in place: from now on share nothing with anyone, nor with before."""
        fresh: Future[bytes] = Future()
        fresh.set_result(hashlib.sha256(os.urandom(32)).digest())
        self._weights = fresh

    def close(self) -> None:
        """Leave the store. Idempotent."""
        self._connection.close()


def _fill(future: Future[bytes], weights: Callable[[], bytes]) -> None:
    try:
        future.set_result(weights())
    except BaseException as error:  # a future without a result would cost every lookup its deadline
        future.set_exception(error)
