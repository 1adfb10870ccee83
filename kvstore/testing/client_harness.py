"""What the client suites share: sample chunks put and compared, patience, and the hook a client's tests provide."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, cast

import pytest

from kvstore.client import Client, Order, Part, PutChunk
from kvstore.container import parse
from kvstore.keys import ROOT
from kvstore.outcome import Reason
from kvstore.testing.chunks import sample_container

PATIENCE_SECONDS = 20.0
ORDERS: tuple[Order, ...] = ("chunk", "layer")


def put_chunk(key: bytes, container: bytes, parent: bytes = ROOT) -> PutChunk:
    """A chunk whose container is `container`."""

    def write(buffer: memoryview) -> int:
        buffer[: len(container)] = container
        return len(container)

    return PutChunk(key, len(container) + 100, write, parent)


def put_samples(client: Client, keys: Sequence[bytes]) -> list[bytes]:
    """Store the sample containers of `keys`; answers their bytes."""
    containers = [sample_container(key) for key in keys]
    statuses = client.put([put_chunk(key, data) for key, data in zip(keys, containers, strict=True)])
    assert all(status.stored for status in statuses), statuses
    return containers


def collect(parts: Iterator[Part], containers: Sequence[bytes | None]) -> dict[int, Reason | None]:
    """Check every byte of a fetch against `containers`; answers the miss of each chunk, None for one served whole."""
    seen: dict[int, int] = {}
    ended: dict[int, Reason | None] = {}
    for part in parts:
        assert part.index not in ended, "a part after the chunk's last"
        if part.miss is not None:
            ended[part.index] = part.miss.reason
            continue
        container = containers[part.index]
        assert container is not None
        assert part.header is not None
        assert part.header == parse(memoryview(container))
        groups = part.header.groups()
        for group in part.groups:
            assert tuple(segment for segment, _ in group) == groups[seen.get(part.index, 0)]
            for segment, view in group:
                assert bytes(view) == container[segment.offset : segment.offset + segment.length]
            seen[part.index] = seen.get(part.index, 0) + 1
        if seen[part.index] == len(groups):
            ended[part.index] = None
    return ended


def eventually(condition: Callable[[], bool]) -> bool:
    """True as soon as `condition` is, False if it is not within PATIENCE_SECONDS."""
    end = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def pinned_bytes(client: Client) -> int:
    """Bytes leased or pinned in any tier."""
    tiers = cast("dict[str, Any]", client.stats()["tiers"])
    return sum(int(tier["usage"]["pinned_bytes"]) for tier in tiers.values())


class ClientHarness(ABC):
    """The hook and the fixture of the client suites."""

    @abstractmethod
    def connected(self, directory: Path) -> AbstractContextManager[Client]:
        """A client of an empty store that may keep files in `directory`."""

    @pytest.fixture
    def client(self, tmp_path: Path) -> Iterator[Client]:
        """A client of an empty store."""
        with self.connected(tmp_path) as client:
            yield client
