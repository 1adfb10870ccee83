"""Every client passes one suite: embedded, over shared memory, over a UNIX socket, over TCP."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kvstore.client import Client
from kvstore.connect import connect
from kvstore.connectors.remote import RemoteClient
from kvstore.embedded import EmbeddedClient
from kvstore.testing.client import ClientContract
from kvstore.testing.serving import ServerThread, small_store


class TestEmbedded(ClientContract):
    @contextmanager
    def connected(self, directory: Path) -> Iterator[Client]:
        with EmbeddedClient(small_store(directory)) as client:
            yield client


class TestUnixSharedMemory(ClientContract):
    @contextmanager
    def connected(self, directory: Path) -> Iterator[Client]:
        with ServerThread(small_store(directory)) as server, connect(server.unix_url) as client:
            assert isinstance(client, RemoteClient)
            assert client.session() is not None
            yield client


class TestUnixBytes(ClientContract):
    @contextmanager
    def connected(self, directory: Path) -> Iterator[Client]:
        with (
            ServerThread(small_store(directory)) as server,
            connect(server.unix_url + "?transport=bytes") as client,
        ):
            yield client


class TestHttp(ClientContract):
    @contextmanager
    def connected(self, directory: Path) -> Iterator[Client]:
        with ServerThread(small_store(directory, nvme="")) as server, connect(server.http_url) as client:
            yield client
