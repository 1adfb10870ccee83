"""The L2 adapter keeps LMCache's contract and adds its own: on LMCache's classes if installed, else a stand-in."""

from __future__ import annotations

import importlib
import inspect
import os
import select
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvstore.bench.daemon import Daemon
from kvstore.client import DEADLINE_MS_DEFAULT
from kvstore.errors import ConfigError, ServiceUnavailableError
from kvstore.testing import lmcache as stand_in

REAL = stand_in.installed()
PATIENCE_SECONDS = 20.0
MEMORY = {"url": "embedded:?dram=32MiB"}


@pytest.fixture(scope="module", autouse=True)
def interface() -> Iterator[None]:
    """LMCache's modules, real or not, while this file's tests run."""
    if REAL:
        yield
        return
    made = stand_in.modules()
    sys.modules.update(made)
    try:
        yield
    finally:
        for name in (*made, "kvstore.connectors.lmcache"):
            sys.modules.pop(name, None)


@pytest.fixture
def make() -> Iterator[Callable[..., Any]]:
    """Makes adapters and closes them."""
    adapters: list[Any] = []

    def made(**params: Any) -> Any:
        adapter_class = importlib.import_module("kvstore.connectors.lmcache").KVStoreL2Adapter
        adapters.append(adapter_class({**MEMORY, **params}, l1_memory_desc=None))
        return adapters[-1]

    yield made
    for adapter in adapters:
        adapter.close()


def key(index: int, salt: str = "", model: str = "org/model") -> Any:
    api = importlib.import_module("lmcache.v1.distributed.api")
    return api.ObjectKey(
        chunk_hash=index.to_bytes(4, "big"), model_name=model, kv_rank=0, object_group_id=0, cache_salt=salt
    )


def memory(data: bytes | bytearray, shape: tuple[int, ...] = (), dtype: str = "uint8") -> Any:
    """A memory object of LMCache's, or of the stand-in."""
    if not REAL:
        return stand_in.memory_object(data, shape, dtype)
    torch = importlib.import_module("torch")
    management = importlib.import_module("lmcache.v1.memory_management")
    raw = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    meta = management.MemoryObjMetadata(
        shape=torch.Size(shape or (len(data),)),
        dtype=getattr(torch, dtype),
        address=0,
        phy_size=len(data),
        ref_count=1,
        fmt=management.MemoryFormat.KV_2LTD,
    )
    return management.TensorMemoryObj(raw, meta, parent_allocator=None)


def content(obj: Any) -> bytes:
    return bytes(memoryview(obj.byte_array).cast("B"))


def ready(fd: int) -> None:
    assert select.select([fd], [], [], PATIENCE_SECONDS)[0]
    os.eventfd_read(fd)


def store(adapter: Any, keys: list[Any], objects: list[Any]) -> Any:
    task = adapter.submit_store_task(keys, objects)
    ready(adapter.get_store_event_fd())
    return adapter.pop_completed_store_tasks()[task]


def look(adapter: Any, keys: list[Any]) -> list[bool]:
    task = adapter.submit_lookup_and_lock_task(keys, {})
    ready(adapter.get_lookup_and_lock_event_fd())
    bitmap = adapter.query_lookup_and_lock_result(task)
    assert adapter.query_lookup_and_lock_result(task) is None
    return [bitmap.test(index) for index in range(len(keys))]


def load(adapter: Any, keys: list[Any], objects: list[Any]) -> list[bool]:
    task = adapter.submit_load_task(keys, objects)
    ready(adapter.get_load_event_fd())
    bitmap = adapter.query_load_result(task)
    assert adapter.query_load_result(task) is None
    return [bitmap.test(index) for index in range(len(keys))]


def test_a_batch_is_stored_found_and_loaded(make: Callable[..., Any]) -> None:
    adapter = make()
    fds = {adapter.get_store_event_fd(), adapter.get_lookup_and_lock_event_fd(), adapter.get_load_event_fd()}
    assert len(fds) == 3
    keys = [key(index) for index in range(5)]
    data = [os.urandom(3000 + index) for index in range(5)]
    result = store(adapter, keys, [memory(part) for part in data])
    assert result.is_successful()
    assert result.bytes_transferred() == sum(map(len, data))
    assert look(adapter, [*keys, key(99), key(0, "salt"), key(0, model="other")]) == [True] * 5 + [False] * 3
    adapter.submit_unlock(keys)
    targets = [memory(bytes(len(part))) for part in (*data, data[0])]
    assert load(adapter, [*keys, key(99)], targets) == [True] * 5 + [False]
    assert [content(target) for target in targets[:5]] == data
    assert adapter.report_status()["is_healthy"]
    assert adapter.report_status()["load_misses"] == {"absent": 1}
    adapter.delete(keys[:2])
    assert look(adapter, keys) == [False, False, True, True, True]


def test_kv_goes_through_a_codec_and_back(make: Callable[..., Any]) -> None:
    adapter = make(codec="lossless")
    shape = (2, 3, 16, 32)
    data = (b"\x80\x3f\x00\xbf" * (2 * 3 * 16 * 32))[: 2 * 3 * 16 * 32 * 2]
    assert store(adapter, [key(1)], [memory(data, shape, "bfloat16")]).is_successful()
    (info,) = adapter._objects.client.head([adapter._objects.key("org/model@00000000@0@00000001")])
    assert info is not None
    target = memory(bytes(len(data)), shape, "bfloat16")
    assert load(adapter, [key(1)], [target]) == [True]
    assert content(target) == data
    wrong = memory(bytes(len(data)), shape, "float16")
    assert load(adapter, [key(1)], [wrong]) == [False]
    assert adapter.report_status()["load_misses"] == {"wrong_fingerprint": 1}


def test_locked_objects_are_not_evicted_until_the_last_holder_lets_go(make: Callable[..., Any]) -> None:
    adapter = make(url="embedded:?dram=1MiB")
    data = os.urandom(200_000)
    assert store(adapter, [key(0)], [memory(data)]).is_successful()
    assert look(adapter, [key(0)]) == look(adapter, [key(0)]) == [True]
    adapter.submit_unlock([key(0)])
    for index in range(1, 12):
        store(adapter, [key(index)], [memory(data)])
    assert look(adapter, [key(0)]) == [True]
    adapter.submit_unlock([key(0), key(0), key(77)])
    assert look(adapter, [key(77)]) == [False]  # behind the unlock in the same lane
    for index in range(20, 32):
        store(adapter, [key(index)], [memory(data)])
    assert look(adapter, [key(0)]) == [False]


def test_what_cannot_be_stored_says_so_and_is_counted(make: Callable[..., Any]) -> None:
    adapter = make(url="embedded:?dram=1MiB")
    result = store(adapter, [key(1), key(2)], [memory(bytes(2 << 20)), memory(b"x" * 100)])
    assert not result.is_successful()
    assert result.bytes_transferred() == 0
    assert look(adapter, [key(1), key(2)]) == [False, True]
    assert adapter.report_status()["store_failures"] == {"too_large": 1}


class Listener:
    """Records what it is told; raises if asked to."""

    def __init__(self, *, raising: bool = False) -> None:
        self.raising = raising
        self.seen: list[tuple[str, list[Any]]] = []

    def _tell(self, what: str, keys: list[Any]) -> None:
        self.seen.append((what, list(keys)))
        if self.raising:
            raise RuntimeError("listener")

    def on_l2_keys_stored(self, keys: list[Any], sizes: list[int]) -> None:
        self._tell("stored", keys)

    def on_l2_keys_accessed(self, keys: list[Any]) -> None:
        self._tell("accessed", keys)

    def on_l2_keys_deleted(self, keys: list[Any]) -> None:
        self._tell("deleted", keys)


def test_listeners_hear_of_what_happened_and_cannot_break_a_task(make: Callable[..., Any]) -> None:
    adapter = make()
    for raising in (False, True):
        listener = Listener(raising=raising)
        adapter.register_listener(listener)
        assert store(adapter, [key(1)], [memory(b"abcd")]).is_successful()
        assert load(adapter, [key(1), key(2)], [memory(bytes(4)), memory(bytes(4))]) == [True, False]
        adapter.delete([key(1), key(2)])
        assert listener.seen == [("stored", [key(1)]), ("accessed", [key(1)]), ("deleted", [key(1)])]


def test_nothing_raises_when_the_store_does(make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = make()

    def broken(*_: object, **__: object) -> Any:
        raise OSError("gone")

    for verb in ("put", "fetch", "pin", "unpin", "delete", "head"):
        monkeypatch.setattr(adapter._objects.client, verb, broken)
    assert not store(adapter, [key(1)], [memory(b"abcd")]).is_successful()
    assert look(adapter, [key(1)]) == [False]
    assert load(adapter, [key(1)], [memory(bytes(4))]) == [False]
    adapter.submit_unlock([key(1)])
    adapter.delete([key(1)])
    assert not adapter.report_status()["is_healthy"]


def test_a_stalled_store_ends_at_the_deadline(make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = make(threads=1, load_deadline_ms=50, store_deadline_ms=50)
    begun, release = threading.Event(), threading.Event()
    seen: list[float] = []

    def stall(keys: Any, *, deadline_ms: float = DEADLINE_MS_DEFAULT) -> Any:
        seen.append(deadline_ms)
        begun.set()
        release.wait(PATIENCE_SECONDS)
        return iter(())

    def fetch(keys: Any, *, deadline_ms: float = DEADLINE_MS_DEFAULT) -> Any:
        stall(keys, deadline_ms=deadline_ms)
        yield from ()

    monkeypatch.setattr(adapter._objects.client, "fetch", fetch)
    first = adapter.submit_load_task([key(1)], [memory(bytes(4))])
    assert begun.wait(PATIENCE_SECONDS)
    behind = adapter.submit_load_task([key(2)], [memory(bytes(4))])
    time.sleep(0.06)
    release.set()
    results: dict[int, Any] = {}
    while len(results) < 2:
        ready(adapter.get_load_event_fd())
        results |= {t: r for t in (first, behind) if (r := adapter.query_load_result(t)) is not None}
    assert not any(bitmap.test(0) for bitmap in results.values())
    assert len(seen) == 1  # the one behind was over before it was begun
    assert 0 < seen[0] <= 50


def test_tasks_after_close_still_get_no_exception(make: Callable[..., Any]) -> None:
    adapter = make()
    adapter.close()
    adapter.submit_store_task([key(1)], [memory(b"abcd")])
    adapter.submit_lookup_and_lock_task([key(1)], {})
    adapter.submit_load_task([key(1)], [memory(bytes(4))])
    adapter.submit_unlock([key(1)])
    adapter.delete([key(1)])
    adapter.close()


def test_over_a_daemon_that_dies_and_comes_back(make: Callable[..., Any], tmp_path: Path) -> None:
    data = os.urandom(100_000)
    with Daemon(tmp_path, dram="64MiB", nvme="256MiB") as daemon:
        daemon.start().close()
        adapter = make(url=daemon.url, durable=True, load_deadline_ms=2000, store_deadline_ms=5000)
        assert store(adapter, [key(1)], [memory(data)]).is_successful()
        daemon.kill()
        assert load(adapter, [key(1)], [memory(bytes(len(data)))]) == [False]
        assert not adapter.report_status()["is_healthy"]
        assert look(adapter, [key(1)]) == [False]
        daemon.start().close()
        target = memory(bytes(len(data)))
        for _ in range(50):  # the client waits a moment before it tries again
            if load(adapter, [key(1)], [target]) == [True]:
                break
            time.sleep(0.1)
        assert content(target) == data
        assert adapter.report_status()["is_healthy"]


def test_a_wrong_configuration_fails_at_the_start(make: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'url'"):
        make(urll="x")
    with pytest.raises(ServiceUnavailableError):
        make(url=f"unix:{tmp_path}/none.sock")


@pytest.mark.skipif(not REAL, reason="needs LMCache; `make test-lmcache` runs this with it")
def test_the_stand_in_is_like_lmcache() -> None:
    for name, names in stand_in.MODULES.items():
        module = importlib.import_module(name)
        for attribute, ours in names.items():
            theirs = getattr(module, attribute)
            public = {n for n, v in vars(ours).items() if inspect.isfunction(v) and n != "__init__"}
            public = {n for n in public if not n.startswith("__") and n != "_account"}
            for method in public:
                assert hasattr(theirs, method), f"{attribute}.{method}"
                if attribute == "L2AdapterInterface":
                    wanted = list(inspect.signature(getattr(theirs, method)).parameters)
                    assert list(inspect.signature(getattr(ours, method)).parameters) == wanted, method
    base = importlib.import_module("lmcache.v1.distributed.l2_adapters.base").L2AdapterInterface
    assert base.__abstractmethods__ == stand_in.L2AdapterInterface.__abstractmethods__
    fields = importlib.import_module("lmcache.v1.distributed.api").ObjectKey.__dataclass_fields__
    assert [n for n in fields if not n.startswith("_")] == list(stand_in.ObjectKey.__dataclass_fields__)


@pytest.mark.skipif(not REAL, reason="needs LMCache; `make test-lmcache` runs this with it")
@pytest.mark.parametrize("kind", ["plugin", "native_plugin"])
def test_lmcache_loads_both_by_configuration(kind: str) -> None:
    config = importlib.import_module("lmcache.v1.distributed.l2_adapters.config")
    adapters = importlib.import_module("lmcache.v1.distributed.l2_adapters")
    module, name = {
        "plugin": ("kvstore.connectors.lmcache", "KVStoreL2Adapter"),
        "native_plugin": ("kvstore.connectors.lmcache_native", "KVStoreNativeConnector"),
    }[kind]
    spec = {"module_path": module, "class_name": name, "adapter_params": MEMORY}
    adapter = adapters.create_l2_adapter(config.get_l2_adapter_config_class(kind).from_dict(spec))
    try:
        assert store(adapter, [key(1)], [memory(b"abcd")]).is_successful()
        assert look(adapter, [key(1), key(2)]) == [True, False]
        target = memory(bytes(4))
        assert load(adapter, [key(1)], [target]) == [True]
        assert content(target) == b"abcd"
    finally:
        adapter.close()
