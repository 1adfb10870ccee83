"""`kvstore.connect`: a client from a URL."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

import msgspec

from kvstore.client import Client
from kvstore.config import Config, TierConfig, unknown_name
from kvstore.errors import ConfigError

SCHEMES = ("embedded", "unix", "http", "https")
TIERS = ("hbm", "dram", "nvme")
"""Kinds of tier that a URL can ask for, fastest first."""


def connect(url: str, *, token: str | None = None, timeout_ms: float = 5000) -> Client:
    """A client for a store, near or far.

        embedded:/var/cache/kv?dram=1GiB&nvme=8GiB   a store in this process; the path holds the nvme tier
        embedded:?dram=1GiB                          memory only
        embedded:?hbm=8GiB&dram=64GiB                with GPU memory above it
        unix:/run/kvstore.sock                       a daemon on this host; bytes move through shared memory
        http://127.0.0.1:8650                        a daemon anywhere (https:// with TLS)

    Args:
        url: where the store is.
        token: bearer token of a remote store.
        timeout_ms: how long to wait for the daemon's first answer.

    Raises:
        ConfigError: the URL is wrong; the message names the part and the remedy.
        ServiceUnavailableError: nobody answers there.
        TierError: an embedded tier cannot start.
    """
    scheme, colon, _ = url.partition(":")
    if not colon or scheme not in SCHEMES:
        raise unknown_name("URL scheme", scheme if colon else url, SCHEMES)
    if scheme == "embedded":
        return _embedded(url)
    from kvstore.connectors.remote import RemoteClient

    return RemoteClient(url, token=token, timeout_ms=timeout_ms)


def _embedded(url: str) -> Client:
    from kvstore.compose import open_store
    from kvstore.embedded import EmbeddedClient

    parts = urlsplit(url)
    if parts.netloc:
        raise ConfigError(f"{url!r} has a host; write embedded:/path?dram=1GiB&nvme=8GiB")
    tiers: dict[str, TierConfig] = {}
    for kind, capacity in parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query)):
        if kind not in TIERS:
            raise unknown_name("tier in the URL", kind, TIERS)
        if kind == "nvme" and not parts.path:
            raise ConfigError(f"{url!r} asks for nvme without a path; write embedded:/path?nvme={capacity}")
        path = str(Path(parts.path) / "nvme") if kind == "nvme" else ""
        options = {"shared": False} if kind == "dram" else {}  # nobody else can ask for its descriptor
        tiers[kind] = TierConfig(capacity=capacity, path=path, options=options)
    ordered = {kind: tiers[kind] for kind in TIERS if kind in tiers}
    return EmbeddedClient(open_store(msgspec.structs.replace(Config(), tiers=ordered)))
