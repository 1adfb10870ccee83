"""Settings of the vLLM connector: `kv_connector_extra_config` of vLLM's `--kv-transfer-config`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Literal
from urllib.parse import urlsplit

import msgspec

from kvstore.connectors.prefix import LoadPolicy
from kvstore.connectors.reading_settings import read_struct
from kvstore.connectors.vllm.blend_settings import BlendSettings
from kvstore.errors import ConfigError
from kvstore.keys import DEFAULT_CHUNK_TOKENS
from kvstore.spec import CHUNK_TOKENS_MAX

TOKEN_VARIABLE = "KVSTORE_TOKEN"


class VllmSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What can be set; docs/engines.md explains each.

    Raises:
        ConfigError: a value is out of range; the message names it.
    """

    url: str
    token: str = ""
    chunk_tokens: int = DEFAULT_CHUNK_TOKENS
    codec: str = ""
    durable: bool = False
    salt: str = ""
    load: Literal["async", "sync"] = "async"
    load_policy: LoadPolicy = "cost"
    lookup_deadline_ms: float = 500.0
    load_deadline_ms: float = 5_000.0
    store_deadline_ms: float = 5_000.0
    load_threads: int = 2
    save_queue_chunks: int = 1024
    weights_identity: str = ""
    share_between_engines: bool = False
    blend: BlendSettings | None = None

    def __post_init__(self) -> None:
        scheme = urlsplit(self.url).scheme
        if scheme not in ("unix", "http", "https"):
            raise ConfigError(
                f"url is {self.url!r}: the vLLM connector needs a daemon, unix:/path/to/socket or http://host:port, "
                "because scheduler and workers are processes of their own; start one with 'kvstore serve'"
            )
        if self.share_between_engines and self.weights_identity:
            raise ConfigError(
                "share_between_engines names weights by their files, as other engines do; remove weights_identity"
            )
        if not 1 <= self.chunk_tokens <= CHUNK_TOKENS_MAX:
            raise ConfigError(f"chunk_tokens is {self.chunk_tokens}; it must be in 1..{CHUNK_TOKENS_MAX}")
        for field in ("lookup_deadline_ms", "load_deadline_ms", "store_deadline_ms"):
            if not getattr(self, field) > 0:
                raise ConfigError(f"{field} is {getattr(self, field)}; give a positive number of milliseconds")
        for field in ("load_threads", "save_queue_chunks"):
            if getattr(self, field) < 1:
                raise ConfigError(f"{field} is {getattr(self, field)}; it must be at least 1")


def read_settings(extra: Mapping[str, Any]) -> VllmSettings:
    """The settings in a `kv_connector_extra_config`; the token comes from KVSTORE_TOKEN if it is not there.

    Raises:
        ConfigError: a name or value is wrong; the message names it.
    """
    token = os.environ.get(TOKEN_VARIABLE, "")
    return read_struct(VllmSettings, {"token": token, **extra}, "kv_connector_extra_config")
