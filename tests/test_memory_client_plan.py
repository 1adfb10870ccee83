"""The dictionary that connectors are tested against plans as any client does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kvstore.client import Client
from kvstore.testing.client_plan import PlanContract
from kvstore.testing.memory_client import MemoryClient


class TestMemoryClient(PlanContract):
    @contextmanager
    def connected(self, directory: Path) -> Iterator[Client]:
        with MemoryClient() as client:
            yield client
