"""Settings of the tier below vLLM's own offloading: what stands beside its `type` and `module_path`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Literal
from urllib.parse import urlsplit

import msgspec

from kvstore.config import unknown_name
from kvstore.connect import SCHEMES
from kvstore.connectors.reading_settings import read_struct
from kvstore.connectors.vllm.settings import TOKEN_VARIABLE
from kvstore.errors import ConfigError


class TierSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What can be set; docs/engines.md explains each.

    Raises:
        ConfigError: a value is out of range; the message names it.
    """

    url: str
    token: str = ""
    namespace: str = ""
    weights_identity: str = ""
    durable: bool = False
    threads: int = 4
    lookup_deadline_ms: float = 500.0
    load_deadline_ms: float = 5_000.0
    store_deadline_ms: float = 30_000.0
    locality: Literal["", "LOCAL", "REMOTE"] = ""

    def __post_init__(self) -> None:
        scheme = urlsplit(self.url).scheme
        if scheme not in SCHEMES:
            raise unknown_name("URL scheme of the tier's url", scheme or self.url, SCHEMES)
        for field in ("threads", "lookup_deadline_ms", "load_deadline_ms", "store_deadline_ms"):
            if not getattr(self, field) > 0:
                raise ConfigError(f"{field} of the kvstore tier is {getattr(self, field)}; it must be positive")


def read_tier_settings(given: Mapping[str, Any]) -> TierSettings:
    """The settings in a tier's configuration; the token comes from KVSTORE_TOKEN if it is not there.

    Raises:
        ConfigError: a name or value is wrong; the message names it.
    """
    token = os.environ.get(TOKEN_VARIABLE, "")
    return read_struct(TierSettings, {"token": token, **given}, "the kvstore tier")
