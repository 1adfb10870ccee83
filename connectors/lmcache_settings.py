"""What there is to set in the `adapter_params` of LMCache's configuration, and the store and lanes that it makes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from kvstore.connect import connect
from kvstore.connectors.lmcache_objects import LMCacheObjects
from kvstore.connectors.reading_settings import read_struct
from kvstore.errors import ConfigError


class LMCacheSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Settings of both adapters.

    `url` is what `kvstore.connect` takes, `token_file` has a remote store's bearer token. `namespace` is part of every
    key, for what LMCache's model name does not tell apart. `codec` is how objects are written whose geometry is known:
    an exact codec, or "" for what the store asks for, else raw. With `durable` a store is successful only once it would
    survive kill -9. `threads` of each lane work at once. What is not done by a deadline is a miss, or not stored.
    `lock_seconds` bounds how long a lookup keeps its objects from eviction. `max_capacity_gb` is for LMCache's own
    accounting and eviction only; the store has its own bounds.
    """

    url: str
    token_file: str = ""
    namespace: str = ""
    codec: str = ""
    durable: bool = False
    threads: int = 4
    load_deadline_ms: float = 5_000.0
    store_deadline_ms: float = 30_000.0
    lock_seconds: float = 30.0
    max_capacity_gb: float = 0.0

    def __post_init__(self) -> None:
        for field in ("threads", "load_deadline_ms", "store_deadline_ms", "lock_seconds"):
            if not getattr(self, field) > 0:
                raise ConfigError(f"adapter_params.{field} is {getattr(self, field)}; it must be positive")
        if not self.max_capacity_gb >= 0:
            raise ConfigError(f"adapter_params.max_capacity_gb is {self.max_capacity_gb}; it must not be negative")

    @classmethod
    def of(cls, params: Mapping[str, Any]) -> LMCacheSettings:
        """Settings from LMCache's dictionary. Raises ConfigError naming the parameter and the remedy."""
        return read_struct(cls, params, "adapter_params")

    def open(self) -> LMCacheObjects:
        """Connect to the store.

        Raises:
            ConfigError: the URL, token file or codec is wrong.
            ServiceUnavailableError: nobody answers there.
            TierError: an embedded tier cannot start.
        """
        token = None
        if self.token_file:
            try:
                token = Path(self.token_file).read_text().strip()
            except OSError as error:
                raise ConfigError(f"adapter_params.token_file {self.token_file}: {error.strerror}") from error
        client = connect(self.url, token=token)
        try:
            return LMCacheObjects(client, namespace=self.namespace, codec=self.codec, durable=self.durable)
        except BaseException:
            client.close()
            raise
