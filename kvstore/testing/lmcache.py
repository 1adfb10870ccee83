"""A stand-in of the little of LMCache that kvstore's adapter touches, for tests where LMCache is not installed.

It has LMCache's names and behaviour (0.5.6) and none of its code. `tests/test_lmcache_adapter.py` runs on the real
classes where they can be imported, and then also compares this stand-in with them.
"""

from __future__ import annotations

import math
import sys
import threading
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from importlib.util import find_spec
from types import ModuleType
from typing import Any


class Bitmap:
    """A bit for each key of a task."""

    def __init__(self, size: int) -> None:
        self._bits = [False] * size

    def set(self, index: int) -> None:
        self._bits[index] = True

    def test(self, index: int) -> bool:
        return self._bits[index]

    def popcount(self) -> int:
        return sum(self._bits)


@dataclass(frozen=True)
class L2StoreResult:
    """What became of one store task."""

    success: bool
    nbytes: int

    def is_successful(self) -> bool:
        return self.success

    def bytes_transferred(self) -> int:
        return self.nbytes if self.success else 0


@dataclass(frozen=True)
class ObjectKey:
    """Name of an object."""

    chunk_hash: bytes
    model_name: str
    kv_rank: int
    object_group_id: int = 0
    cache_salt: str = ""


@dataclass
class ObjectMetadata:
    """What LMCache says of an object's bytes."""

    shape: tuple[int, ...]
    dtype: Any
    shapes: list[tuple[int, ...]] | None = None
    dtypes: list[Any] | None = None


@dataclass
class MemoryObject:
    """Memory of LMCache's, to be read or filled."""

    meta: ObjectMetadata
    data: bytearray = field(default_factory=bytearray)

    @property
    def byte_array(self) -> memoryview:
        return memoryview(self.data)

    def get_size(self) -> int:
        return len(self.data)


class L2AdapterInterface(ABC):
    """The base class of adapters: abstract verbs, and the accounting that subclasses notify."""

    def __init__(self, max_capacity_bytes: int = 0) -> None:
        self._max_capacity_bytes = max_capacity_bytes
        self._listeners: list[Any] = []
        self._bytes_used = 0
        self._usage_lock = threading.Lock()

    @abstractmethod
    def get_store_event_fd(self) -> int: ...

    @abstractmethod
    def get_lookup_and_lock_event_fd(self) -> int: ...

    @abstractmethod
    def get_load_event_fd(self) -> int: ...

    @abstractmethod
    def submit_store_task(self, keys: list[Any], objects: list[Any]) -> int: ...

    @abstractmethod
    def pop_completed_store_tasks(self) -> dict[int, Any]: ...

    @abstractmethod
    def submit_lookup_and_lock_task(self, keys: list[Any], group_layout_descs: dict[int, Any]) -> int: ...

    @abstractmethod
    def query_lookup_and_lock_result(self, task_id: int) -> Any: ...

    @abstractmethod
    def submit_unlock(self, keys: list[Any]) -> None: ...

    @abstractmethod
    def submit_load_task(self, keys: list[Any], objects: list[Any]) -> int: ...

    @abstractmethod
    def query_load_result(self, task_id: int) -> Any: ...

    @abstractmethod
    def close(self) -> None: ...

    def delete(self, keys: list[Any]) -> None:
        return

    def report_status(self) -> dict[str, Any]:
        return {"is_healthy": True}

    def register_listener(self, listener: Any) -> None:
        self._listeners.append(listener)

    def _notify_keys_stored(self, keys: list[Any], sizes: list[int]) -> None:
        self._account(sum(sizes))
        for listener in self._listeners:
            listener.on_l2_keys_stored(keys, sizes)

    def _notify_keys_accessed(self, keys: list[Any]) -> None:
        for listener in self._listeners:
            listener.on_l2_keys_accessed(keys)

    def _notify_keys_deleted(self, keys: list[Any], sizes: list[int]) -> None:
        self._account(-sum(sizes))
        for listener in self._listeners:
            listener.on_l2_keys_deleted(keys)

    def _account(self, nbytes: int) -> None:
        with self._usage_lock:
            self._bytes_used += nbytes


MODULES: dict[str, dict[str, Any]] = {
    "lmcache": {},
    "lmcache.lmcache_native": {"Bitmap": Bitmap},
    "lmcache.v1": {},
    "lmcache.v1.distributed": {},
    "lmcache.v1.distributed.api": {"ObjectKey": ObjectKey},
    "lmcache.v1.distributed.internal_api": {"L2StoreResult": L2StoreResult},
    "lmcache.v1.distributed.l2_adapters": {},
    "lmcache.v1.distributed.l2_adapters.base": {"L2AdapterInterface": L2AdapterInterface},
}
"""Module -> the names that the stand-in has of it."""


def installed() -> bool:
    """Whether the real LMCache can be imported."""
    return "lmcache" not in sys.modules and find_spec("lmcache") is not None


def modules() -> dict[str, ModuleType]:
    """The stand-in as entries for `sys.modules`."""
    made: dict[str, ModuleType] = {}
    for name, names in MODULES.items():
        made[name] = ModuleType(name)
        vars(made[name]).update(names)
    return made


def memory_object(data: bytes | bytearray, shape: tuple[int, ...], dtype: str) -> MemoryObject:
    """An object of one tensor with a torch dtype's name; `shape` is () for bytes."""
    shape = shape or (len(data),)
    assert math.prod(shape), "an object is not empty"
    return MemoryObject(ObjectMetadata(shape, f"torch.{dtype}"), bytearray(data))
