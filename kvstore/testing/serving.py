"""A daemon inside the test's own process, on a thread, so that a test can look at its store from behind."""

from __future__ import annotations

import asyncio
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Self

import msgspec

from kvstore.compose import open_store
from kvstore.config import Config, ServiceConfig, TierConfig
from kvstore.service.server import Server
from kvstore.store import Store
from kvstore.tenants import TenantConfig

WAIT_SECONDS = 30.0


def small_store(directory: Path, *, dram: str = "16MiB", nvme: str = "64MiB") -> Store:
    """A store of a dram tier and, unless `nvme` is empty, an nvme tier in `directory`."""
    tiers = {"dram": TierConfig(capacity=dram)}
    if nvme:
        tiers["nvme"] = TierConfig(capacity=nvme, path=str(directory / "nvme"))
    return open_store(Config(tiers=tiers))


class ServerThread:
    """Serves `store` on a UNIX socket and a TCP port of the system's choice. A context manager; closes the store.

    Args:
        store: what to serve.
        config: settings other than the addresses.
        tenants: who share the store.
    """

    def __init__(
        self, store: Store, config: ServiceConfig | None = None, tenants: Mapping[str, TenantConfig] | None = None
    ) -> None:
        self.store = store
        # pytest's directories are too long for the path of a UNIX socket.
        self._directory = tempfile.TemporaryDirectory(prefix="kvstore-")
        self.socket_path = f"{self._directory.name}/kv.sock"
        config = msgspec.structs.replace(config or ServiceConfig(), port=0, socket=self.socket_path)
        self.server = Server(store, config, tenants)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="kvstore-test-server", daemon=True)

    @property
    def unix_url(self) -> str:
        """For a client that maps the arena; append ?transport=bytes for one that does not."""
        return f"unix:{self.socket_path}"

    @property
    def http_url(self) -> str:
        """For a client over TCP."""
        return f"http://127.0.0.1:{self.server.port}"

    def __enter__(self) -> Self:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self.server.start(), self._loop).result(WAIT_SECONDS)
        return self

    def __exit__(self, *exc: object) -> None:
        asyncio.run_coroutine_threadsafe(self.server.stop(), self._loop).result(WAIT_SECONDS)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(WAIT_SECONDS)
        self._loop.close()
        self.store.close()
        self._directory.cleanup()
