"""kvstore below LMCache: the `native_plugin` connector, for objects as bare bytes.

    lmcache server ... --l2-adapter '{"type": "native_plugin", "module_path": "kvstore.connectors.lmcache_native",
        "class_name": "KVStoreNativeConnector", "adapter_params": {"url": "unix:/run/kvstore.sock"}}'

LMCache gives such a connector names and memory, no geometry, so no codec applies and its objects are apart from those
of `kvstore.connectors.lmcache`, which is the better choice where there is one.

Imports nothing of LMCache.
"""

from __future__ import annotations

import itertools
from typing import Any

from kvstore.connectors.lanes import Job, Lane
from kvstore.connectors.lmcache_objects import LMCacheObject
from kvstore.connectors.lmcache_settings import LMCacheSettings

Completion = tuple[int, bool, str, list[bool] | None]
"""(task, whether it succeeded, why not, an outcome for each key where LMCache wants one)."""

_BYTES = "bytes/"
"""Prefix of the namespace, so that names here never meet those whose objects have a geometry."""


class KVStoreNativeConnector:
    """What LMCache asks of a native connector, over a kvstore client.

    Args:
        params: see `LMCacheSettings`, as keyword arguments.

    Raises:
        ConfigError: a parameter is wrong.
        ServiceUnavailableError: nobody answers at the URL.
        TierError: an embedded store cannot start.
    """

    def __init__(self, **params: Any) -> None:
        self.settings = LMCacheSettings.of({**params, "namespace": _BYTES + str(params.get("namespace", ""))})
        self._objects = self.settings.open()
        self._lane: Lane[bool, Completion] = Lane("lmcache-native", self.settings.threads, False)
        self._tasks = itertools.count(1)

    def event_fd(self) -> int:
        """Readable when there are completions."""
        return self._lane.fd

    def submit_batch_get(self, keys: list[str], memoryviews: list[Any]) -> int:
        """Fill memory; a completion says which keys were served whole."""

        def job(start: int, stop: int, deadline: float) -> list[bool]:
            items = _objects(keys[start:stop], memoryviews[start:stop])
            return [miss is None for miss in self._objects.load(items, deadline=deadline)]

        return self._submit(len(keys), job, self.settings.load_deadline_ms)

    def submit_batch_set(self, keys: list[str], memoryviews: list[Any]) -> int:
        """Store memory; a completion succeeds if all of it is stored."""

        def job(start: int, stop: int, deadline: float) -> list[bool]:
            items = _objects(keys[start:stop], memoryviews[start:stop])
            return [status.stored for status in self._objects.store(items, deadline=deadline)]

        return self._submit(len(keys), job, self.settings.store_deadline_ms, whole=True)

    def submit_batch_exists(self, keys: list[str]) -> int:
        """Say which keys there are."""
        return self._submit(
            len(keys), lambda start, stop, _: self._objects.exists(keys[start:stop]), self.settings.load_deadline_ms
        )

    def submit_batch_delete(self, keys: list[str]) -> int:
        """Remove keys; a completion says which there were."""
        return self._submit(
            len(keys), lambda start, stop, _: self._objects.delete(keys[start:stop]), self.settings.store_deadline_ms
        )

    def drain_completions(self) -> list[Completion]:
        """Completions not yet taken."""
        self._lane.quiet()
        return list(self._lane.take_all().values())

    def close(self) -> None:
        """Wait for what runs, each by its deadline, then leave the store. Idempotent."""
        self._lane.close()
        self._objects.client.close()

    def _submit(self, keys: int, job: Job[bool], deadline_ms: float, *, whole: bool = False) -> int:
        """Start a task; with `whole` it succeeds or fails as one, else it succeeds with an outcome for each key."""
        task = next(self._tasks)

        def finish(outcomes: list[bool]) -> Completion:
            if not whole:
                return task, True, "", outcomes
            failed = outcomes.count(False)
            return task, not failed, f"{failed} of {keys} objects were not stored" if failed else "", None

        self._lane.submit(task, keys, job, finish, deadline_seconds=deadline_ms / 1e3)
        return task


def _objects(keys: list[str], memoryviews: list[Any]) -> list[LMCacheObject]:
    return [LMCacheObject(key, memoryview(view).cast("B")) for key, view in zip(keys, memoryviews, strict=True)]
