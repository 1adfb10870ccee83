"""What a caller does wrong: one error that names it, from every client, and nothing that it breaks for others."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvstore.client import Client, PutChunk
from kvstore.connect import connect
from kvstore.embedded import EmbeddedClient
from kvstore.errors import ConfigError, ServiceError
from kvstore.testing.chunks import sample_keys
from kvstore.testing.client_harness import collect, eventually, pinned_bytes, put_samples
from kvstore.testing.serving import ServerThread, small_store

KEY = sample_keys(1, 900)[0]


@pytest.fixture(params=["embedded", "shm", "bytes"])
def client(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Client]:
    if request.param == "embedded":
        with EmbeddedClient(small_store(tmp_path)) as embedded:
            yield embedded
        return
    with (
        ServerThread(small_store(tmp_path)) as server,
        connect(f"{server.unix_url}?transport={request.param}") as remote,
    ):
        yield remote


def put(client: Client, nbytes_max: Any = 1000, write: Any = lambda buffer: 500) -> Any:
    return client.put([PutChunk(KEY, nbytes_max, write)])


@pytest.mark.parametrize("nbytes_max", [0, -1, 1.5, None])
def test_room_that_cannot_be_is_refused_and_breaks_nothing(client: Client, nbytes_max: Any) -> None:
    with pytest.raises(ConfigError, match="nbytes_max"):
        put(client, nbytes_max)
    keys = sample_keys(3)
    containers = put_samples(client, keys)
    assert collect(client.fetch(keys), containers) == dict.fromkeys(range(3))
    assert client.flush()
    assert eventually(lambda: pinned_bytes(client) == 0)


@pytest.mark.parametrize("answer", [None, 0, -1, 1001, "all"])
def test_a_write_that_answers_nonsense_is_refused_and_leaves_nothing(client: Client, answer: Any) -> None:
    with pytest.raises(ConfigError, match="nbytes_max is 1000"):
        put(client, write=lambda buffer: answer)
    assert pinned_bytes(client) == 0
    assert client.head([KEY]) == [None]


@pytest.mark.parametrize("key", ["ab" * 32, b"short", None, 7])
def test_what_is_no_key_is_refused_by_every_verb(client: Client, key: Any) -> None:
    verbs: list[Callable[[], object]] = [
        lambda: client.lookup([key]),
        lambda: list(client.fetch([key])),
        lambda: client.head([key]),
        lambda: client.explain([key]),
        lambda: client.prefetch([key]),
        lambda: client.cancel([key]),
        lambda: client.park([key]),
        lambda: client.resume([key]),
        lambda: client.pin([key], ttl_seconds=1),
        lambda: client.unpin([key]),
        lambda: client.delete([key]),
    ]
    for verb in verbs:
        with pytest.raises(ConfigError, match="32 bytes"):
            verb()


def test_a_deadline_of_for_ever_is_a_long_one(client: Client) -> None:
    keys = sample_keys(2)
    containers = put_samples(client, keys)
    for deadline_ms in (math.inf, 1e300, 7_200_000.0):
        assert collect(client.fetch(keys, deadline_ms=deadline_ms), containers) == dict.fromkeys(range(2))
        assert all(status.stored for status in client.prefetch(keys, deadline_ms=deadline_ms))
        assert all(status.stored for status in client.resume(keys, deadline_ms=deadline_ms))
        assert client.flush(deadline_ms=deadline_ms)


@pytest.mark.parametrize("way", ["shm", "bytes", "http"])
def test_a_forked_process_and_its_parent_do_not_get_each_others_answers(tmp_path: Path, way: str) -> None:
    with ServerThread(small_store(tmp_path)) as server:
        url = server.http_url if way == "http" else f"{server.unix_url}?transport={way}"
        with connect(url) as client:
            keys = {"parent": sample_keys(3), "child": sample_keys(2, 50)}
            containers = {name: put_samples(client, own) for name, own in keys.items()}

            def right(name: str) -> bool:
                own = keys[name]
                return all(
                    all(client.head(own))
                    and collect(client.fetch(own), containers[name]) == dict.fromkeys(range(len(own)))
                    for _ in range(100)
                )

            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # this process has threads: that is the point
                child = os.fork()
            if child == 0:
                try:
                    os._exit(0 if right("child") else 1)
                finally:
                    os._exit(2)
            try:
                assert right("parent")
            finally:
                _, status = os.waitpid(child, 0)
            assert os.waitstatus_to_exitcode(status) == 0
            assert right("parent")


def test_a_tenant_that_is_not_there_is_said_so(tmp_path: Path) -> None:
    with (
        ServerThread(small_store(tmp_path, nvme="")) as server,
        pytest.raises(ServiceError, match="refuses: there is no tenant 'nobody'"),
    ):
        connect(f"{server.unix_url}?tenant=nobody")
