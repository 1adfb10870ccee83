"""kvstore below LMCache: its L2 `plugin` adapter, loaded by configuration.

    lmcache server ... --l2-adapter '{"type": "plugin", "module_path": "kvstore.connectors.lmcache",
        "class_name": "KVStoreL2Adapter", "adapter_params": {"url": "unix:/run/kvstore.sock"}}'

LMCache's objects become chunks (`kvstore.connectors.lmcache_objects`) and get kvstore's tiers, bounds, checksums and
exact codecs. The adapter keeps LMCache's contract (lmcache.v1.distributed.l2_adapters.base, 0.5.6) and adds: once made,
nothing raises, and nothing but `delete` and `close` waits for the store; every task ends by a deadline; an object that
does not verify is a miss.

The store evicts by itself and does not tell LMCache, whose accounting so counts what this process stored and deleted.

This is the only module that imports LMCache.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lmcache.lmcache_native import Bitmap  # type: ignore[import-not-found]
from lmcache.v1.distributed.internal_api import L2StoreResult  # type: ignore[import-not-found]
from lmcache.v1.distributed.l2_adapters.base import L2AdapterInterface  # type: ignore[import-not-found]

from kvstore.connectors.lanes import Lane
from kvstore.connectors.lmcache_objects import LMCacheObject, geometry_of
from kvstore.connectors.lmcache_settings import LMCacheSettings
from kvstore.outcome import Miss, PutStatus, Reason

_log = logging.getLogger(__name__)

ACCOUNTED_KEYS_MAX = 1 << 16
"""Objects whose size is remembered for the accounting of their deletion; beyond it the oldest count as size 0."""
LOOKUP_DEADLINE_SECONDS = 5.0

_NOT_STORED = PutStatus(stored=False, reason=Reason.UNAVAILABLE, detail="the put failed")
_NOT_LOADED = Miss(Reason.UNAVAILABLE, "the fetch failed")


class KVStoreL2Adapter(L2AdapterInterface):  # type: ignore[misc]
    """LMCache's L2 adapter over a kvstore client.

    Args:
        params: `adapter_params`, see `LMCacheSettings`.

    Raises:
        ConfigError: a parameter is wrong.
        ServiceUnavailableError: nobody answers at the URL.
        TierError: an embedded store cannot start.
    """

    def __init__(self, params: Mapping[str, Any], **_: object) -> None:
        self.settings = LMCacheSettings.of(params)
        super().__init__(max_capacity_bytes=int(self.settings.max_capacity_gb * (1 << 30)))
        self._objects = self.settings.open()
        threads = self.settings.threads
        self._stores: Lane[PutStatus, Any] = Lane("lmcache-store", threads, _NOT_STORED)
        self._lookups: Lane[bool, Any] = Lane("lmcache-lookup", 1, False)
        self._loads: Lane[Miss | None, Any] = Lane("lmcache-load", threads, _NOT_LOADED)
        self._tasks = itertools.count()
        self._lock = threading.Lock()
        self._locks: dict[str, int] = {}
        self._sizes: OrderedDict[str, int] = OrderedDict()
        self._misses: dict[Reason, int] = {}
        self._failed_puts: dict[Reason, int] = {}
        self._available = True

    def get_store_event_fd(self) -> int:
        return self._stores.fd

    def get_lookup_and_lock_event_fd(self) -> int:
        return self._lookups.fd

    def get_load_event_fd(self) -> int:
        return self._loads.fd

    def submit_store_task(self, keys: list[Any], objects: list[Any]) -> int:
        task = next(self._tasks)

        def job(start: int, stop: int, deadline: float) -> list[PutStatus]:
            items = [_object(key, obj) for key, obj in zip(keys[start:stop], objects[start:stop], strict=True)]
            return self._objects.store(items, deadline=deadline)

        def finish(statuses: list[PutStatus]) -> Any:
            return self._stored(keys, objects, statuses)

        self._stores.submit(task, len(keys), job, finish, deadline_seconds=self.settings.store_deadline_ms / 1e3)
        return task

    def pop_completed_store_tasks(self) -> dict[int, Any]:
        return self._stores.take_all()

    def submit_lookup_and_lock_task(self, keys: list[Any], group_layout_descs: dict[int, Any]) -> int:
        task = next(self._tasks)
        names = [object_name(key) for key in keys]

        def job(start: int, stop: int, deadline: float) -> list[bool]:
            found = self._objects.lock(names[start:stop], ttl_seconds=self.settings.lock_seconds)
            with self._lock:
                for name, there in zip(names[start:stop], found, strict=True):
                    if there:
                        self._locks[name] = self._locks.get(name, 0) + 1
            return found

        self._lookups.submit(task, len(keys), job, _bitmap, deadline_seconds=LOOKUP_DEADLINE_SECONDS)
        return task

    def query_lookup_and_lock_result(self, task_id: int) -> Any:
        return self._lookups.take(task_id)

    def submit_unlock(self, keys: list[Any]) -> None:
        """Ends locks that nobody else holds; one that cannot be ended now ends by itself after `lock_seconds`."""
        free: list[str] = []
        with self._lock:
            for name in map(object_name, keys):
                holders = self._locks.pop(name, 0)
                if holders > 1:
                    self._locks[name] = holders - 1
                elif holders:
                    free.append(name)
        if free:
            self._lookups.run(lambda: self._objects.unlock(free))

    def submit_load_task(self, keys: list[Any], objects: list[Any]) -> int:
        task = next(self._tasks)

        def job(start: int, stop: int, deadline: float) -> list[Miss | None]:
            items = [_object(key, obj) for key, obj in zip(keys[start:stop], objects[start:stop], strict=True)]
            return self._objects.load(items, deadline=deadline)

        def finish(misses: list[Miss | None]) -> Any:
            return self._loaded(keys, misses)

        self._loads.submit(task, len(keys), job, finish, deadline_seconds=self.settings.load_deadline_ms / 1e3)
        return task

    def query_load_result(self, task_id: int) -> Any:
        return self._loads.take(task_id)

    def delete(self, keys: list[Any]) -> None:
        """Remove objects, at once."""
        try:
            found = self._objects.delete([object_name(key) for key in keys])
        except Exception as error:  # whatever goes wrong must not reach LMCache
            _log.warning("lmcache: %d objects could not be deleted: %s", len(keys), error)
            return
        gone = [key for key, there in zip(keys, found, strict=True) if there]
        with self._lock:
            sizes = [self._sizes.pop(object_name(key), 0) for key in gone]
        if gone:
            _guarded(lambda: self._notify_keys_deleted(gone, sizes))

    def report_status(self) -> dict[str, Any]:
        """Health, and why objects missed and puts failed, since the start."""
        with self._lock:
            return {
                "is_healthy": self._available,
                "type": "kvstore",
                "url": self.settings.url,
                "load_misses": {str(reason): count for reason, count in self._misses.items()},
                "store_failures": {str(reason): count for reason, count in self._failed_puts.items()},
            }

    def close(self) -> None:
        """Wait for what runs, each by its deadline, then leave the store. Idempotent."""
        for lane in (self._stores, self._lookups, self._loads):
            lane.close()
        self._objects.client.close()

    def _stored(self, keys: list[Any], objects: list[Any], statuses: list[PutStatus]) -> Any:
        """The result of a store, after the accounting."""
        stored: list[Any] = []
        sizes: list[int] = []
        with self._lock:
            for key, obj, status in zip(keys, objects, statuses, strict=True):
                if not status.stored:
                    _count(self._failed_puts, status.reason)
                    continue
                name = object_name(key)
                new = not status.existed and name not in self._sizes
                stored.append(key)
                sizes.append(obj.get_size() if new else 0)
                if new:
                    self._sizes[name] = sizes[-1]
            while len(self._sizes) > ACCOUNTED_KEYS_MAX:
                self._sizes.popitem(last=False)
            self._judge([status.reason for status in statuses if not status.stored], len(statuses))
        if stored:
            _guarded(lambda: self._notify_keys_stored(stored, sizes))
        return L2StoreResult(len(stored) == len(keys), sum(sizes))

    def _loaded(self, keys: list[Any], misses: list[Miss | None]) -> Any:
        """The result of a load, after telling who listens."""
        with self._lock:
            for miss in misses:
                if miss is not None:
                    _count(self._misses, miss.reason)
            self._judge([miss.reason for miss in misses if miss is not None], len(misses))
        served = [key for key, miss in zip(keys, misses, strict=True) if miss is None]
        if served:
            _guarded(lambda: self._notify_keys_accessed(served))
        return _bitmap([miss is None for miss in misses])

    def _judge(self, failures: Sequence[Reason | None], total: int) -> None:
        """Unhealthy from a task that failed because nobody answers, until one that did not."""
        if total:
            self._available = failures.count(Reason.UNAVAILABLE) < total


def object_name(key: Any) -> str:
    """LMCache's name of an object, as its native connectors spell it: unambiguous, no field may contain "@"."""
    name = f"{key.model_name}@{key.kv_rank:08x}@{key.object_group_id:x}@{key.chunk_hash.hex()}"
    return f"{name}@{key.cache_salt}" if key.cache_salt else name


def _object(key: Any, obj: Any) -> LMCacheObject:
    """An object of LMCache's memory: its bytes, and what its metadata says of them."""
    view = memoryview(obj.byte_array).cast("B")
    shapes, dtypes = obj.meta.shapes, obj.meta.dtypes
    if not shapes or not dtypes:
        shapes, dtypes = [obj.meta.shape], [obj.meta.dtype]
    geometry = None
    if len(shapes) == len(dtypes) == 1:
        geometry = geometry_of(tuple(shapes[0]), str(dtypes[0]).removeprefix("torch."), len(view))
    return LMCacheObject(object_name(key), view, geometry)


def _bitmap(found: Sequence[bool]) -> Any:
    bitmap = Bitmap(len(found))
    for index, there in enumerate(found):
        if there:
            bitmap.set(index)
    return bitmap


def _count(counters: dict[Reason, int], reason: Reason | None) -> None:
    reason = reason or Reason.UNAVAILABLE
    counters[reason] = counters.get(reason, 0) + 1


def _guarded(notify: Callable[[], None]) -> None:
    """Call a listener of LMCache; what it raises must not cost a task its result."""
    try:
        notify()
    except Exception:
        _log.exception("lmcache: a listener raised")
