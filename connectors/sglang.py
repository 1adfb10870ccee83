"""kvstore below SGLang's hierarchical cache: a HiCache storage backend, loaded by configuration.

    sglang.launch_server ... --enable-hierarchical-cache --hicache-storage-backend dynamic
        --hicache-storage-backend-extra-config '{"backend_name": "kvstore", "module_path": "kvstore.connectors.sglang",
        "class_name": "KVStoreHiCache", "interface_v1": 1, "kvstore": {"url": "unix:/run/kvstore.sock"}}'

Keeps the contract of sglang.srt.mem_cache.hicache_storage (0.5.23), v1 (pages in place in the host pool) and v0 (pages
as tensors), and adds: once made, nothing raises; every call ends by a deadline; a page that does not verify is a miss.

SGLang's names are of tokens only, so the model's name, the ranks, the layout, the type and the size of a page are part
of the key. Models that keep more than K and V of every token (Mamba, sliding windows, indexers) are refused.

This is the only module that imports SGLang.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import torch
from sglang.srt.mem_cache.hicache_storage import HiCacheStorage  # type: ignore[import-not-found]

from kvstore.connect import connect
from kvstore.connectors.pages import Page
from kvstore.connectors.reading_settings import read_struct
from kvstore.connectors.sglang_pages import SGLangPages
from kvstore.errors import ConfigError

_log = logging.getLogger(__name__)

T = TypeVar("T")


class SGLangSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The object `kvstore` in the backend's extra configuration.

    `url` is what `kvstore.connect` takes, `token_file` has a remote store's bearer token. `namespace` is part of every
    key, for what the model's name does not tell apart: revisions, adapters. With `durable` a page is stored only once
    it would survive kill -9. What is not done by a deadline is a miss, or not stored.
    """

    url: str
    token_file: str = ""
    namespace: str = ""
    durable: bool = False
    load_deadline_ms: float = 5_000.0
    store_deadline_ms: float = 30_000.0

    def __post_init__(self) -> None:
        for field in ("load_deadline_ms", "store_deadline_ms"):
            if not getattr(self, field) > 0:
                raise ConfigError(f"kvstore.{field} is {getattr(self, field)}; it must be positive")

    @classmethod
    def of(cls, extra: Mapping[str, Any] | None) -> SGLangSettings:
        """Settings from SGLang's extra configuration. Raises ConfigError naming the parameter and the remedy."""
        params = (extra or {}).get("kvstore")
        if not isinstance(params, dict) or "url" not in params:
            raise ConfigError('the extra config needs "kvstore": {"url": ...}, e.g. unix:/run/kvstore.sock')
        return read_struct(cls, params, "kvstore")


class KVStoreHiCache(HiCacheStorage):  # type: ignore[misc]
    """SGLang's storage backend over a kvstore client.

    Args:
        config: SGLang's `HiCacheStorageConfig`.

    Raises:
        ConfigError: a parameter is wrong, or the model has no name.
        ServiceUnavailableError: nobody answers at the URL.
        TierError: an embedded store cannot start.
    """

    def __init__(self, config: Any, _: object = None) -> None:
        self.settings = SGLangSettings.of(config.extra_config)
        if not (config.model_name or self.settings.namespace):
            raise ConfigError("the model has no name; set kvstore.namespace to one that stands for its weights")
        token = Path(self.settings.token_file).read_text().strip() if self.settings.token_file else None
        self._client = connect(self.settings.url, token=token)
        self._config = config
        self._pages: SGLangPages | None = None

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        """Take the pool that pages lie in; its layout and type become part of every key."""
        super().register_mem_pool_host(mem_pool_host)
        config, pool = self._config, mem_pool_host
        identity: dict[str, str | bytes | int] = {
            "namespace": self.settings.namespace,
            "model": config.model_name or "",
            "ranks": "mla" if config.is_mla_model else f"{config.tp_rank} of {config.tp_size}",
            "stage": f"{config.pp_rank} of {config.pp_size}",
            "context": f"{config.attn_cp_rank} of {config.attn_cp_size}, {config.dcp_rank} of {config.dcp_size}",
            "layout": str(pool.layout),
            "dtype": str(pool.dtype),
            "page_tokens": int(pool.page_size),
            # In place and as a tensor, some layouts put the same K and V into another order.
            "interface": "v1" if (config.extra_config or {}).get("interface_v1") else "v0",
        }
        self._pages = SGLangPages(self._client, identity, durable=self.settings.durable)

    def register_mem_host_pool_v2(self, host_pool: Any, host_pool_name: Any) -> None:
        """Refuse models with more than one pool. Raises ConfigError for every pool but that of K and V."""
        if str(host_pool_name) != "kv":
            raise ConfigError(f"the model keeps a pool {host_pool_name!s} beside K and V; kvstore does not serve it")
        super().register_mem_host_pool_v2(host_pool, host_pool_name)

    def batch_set_v1(self, keys: list[str], host_indices: torch.Tensor, extra_info: Any = None) -> list[bool]:
        return self._guarded(lambda: self._stored(self._in_pool(keys, host_indices)), [False] * len(keys))

    def batch_get_v1(self, keys: list[str], host_indices: torch.Tensor, extra_info: Any = None) -> list[bool]:
        return self._guarded(lambda: self._loaded(self._in_pool(keys, host_indices)), [False] * len(keys))

    def batch_exists(self, keys: list[str], extra_info: Any = None) -> int:
        return self._guarded(lambda: self._ready().leading(keys), 0)

    def exists(self, key: str) -> bool:
        return self.batch_exists([key]) == 1

    def batch_get(
        self, keys: list[str], target_locations: Any = None, target_sizes: Any = None
    ) -> list[torch.Tensor | None]:
        def load() -> list[torch.Tensor | None]:
            found = self._loaded(
                [_tensor_page(key, target) for key, target in zip(keys, target_locations, strict=True)]
            )
            return [target if there else None for target, there in zip(target_locations, found, strict=True)]

        return self._guarded(load, [None] * len(keys))

    def get(self, key: str, target_location: Any = None, target_sizes: Any = None) -> torch.Tensor | None:
        return self.batch_get([key], [target_location])[0]

    def batch_set(
        self, keys: list[str], values: Any = None, target_locations: Any = None, target_sizes: Any = None
    ) -> bool:
        def store() -> list[bool]:
            return self._stored(
                [_tensor_page(key, value.contiguous()) for key, value in zip(keys, values, strict=True)]
            )

        return all(self._guarded(store, [False]))

    def set(self, key: str, value: Any = None, target_location: Any = None, target_sizes: Any = None) -> bool:
        return self.batch_set([key], [value])

    def close(self) -> None:
        """Leave the store. Idempotent."""
        self._client.close()

    def _ready(self) -> SGLangPages:
        if self._pages is None:
            raise ConfigError("no host pool has been registered")
        return self._pages

    def _stored(self, pages: Sequence[Page]) -> list[bool]:
        statuses = self._ready().store(pages, deadline_ms=self.settings.store_deadline_ms)
        return [status.stored for status in statuses]

    def _loaded(self, pages: Sequence[Page]) -> list[bool]:
        misses = self._ready().load(pages, deadline_ms=self.settings.load_deadline_ms)
        return [miss is None for miss in misses]

    def _in_pool(self, keys: Sequence[str], host_indices: torch.Tensor) -> list[Page]:
        """The pages in the host pool, each the same number of spans. Raises ValueError if they do not fit the keys."""
        addresses, sizes = self.mem_pool_host.get_page_buffer_meta(host_indices)
        spans = [_memory(address, size) for address, size in zip(addresses, sizes, strict=True)]
        count, rest = divmod(len(spans), len(keys))
        if rest or not count:
            raise ValueError(f"{len(spans)} spans of memory for {len(keys)} pages")
        return [Page(key, tuple(spans[at * count : (at + 1) * count])) for at, key in enumerate(keys)]

    def _guarded(self, work: Callable[[], T], failure: T) -> T:
        """The result of `work`, or `failure`: whatever goes wrong must not reach SGLang."""
        try:
            return work()
        except Exception as error:
            _log.warning("sglang: %s: %s", type(error).__name__, error)
            return failure


def _memory(address: int, nbytes: int) -> memoryview:
    """Memory of the host pool, which lives as long as the backend."""
    return memoryview((ctypes.c_char * nbytes).from_address(int(address))).cast("B")


def _tensor_page(name: str, tensor: torch.Tensor) -> Page:
    """A page in a contiguous tensor."""
    if not tensor.is_contiguous():
        raise ValueError("a page's tensor is not contiguous")
    return Page(name, (tensor.view(torch.uint8).reshape(-1).numpy().data,))
