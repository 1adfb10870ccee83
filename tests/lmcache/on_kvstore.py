"""A pytest plugin that has LMCache's own tests of its example adapters run on kvstore's adapters instead.

    pytest -p on_kvstore tests/v1/distributed/test_mock_l2_adapter.py ...      (in LMCache's source archive)

LMCache's tests are written against its interface, with one of its example adapters as the subject. The names of those
examples are bound to the classes here, which translate the examples' parameters (a capacity) into a store's.
"""

from __future__ import annotations

import functools
import sys
from types import ModuleType
from typing import Any

import pytest
from lmcache.v1.distributed.l2_adapters import mock_l2_adapter  # type: ignore[import-not-found]
from lmcache.v1.distributed.l2_adapters.config import L2AdapterConfigBase  # type: ignore[import-not-found]

from kvstore.connectors.lmcache import KVStoreL2Adapter
from kvstore.connectors.lmcache_native import KVStoreNativeConnector
from kvstore.container import LEVEL0_ALIGN

OBJECT_BYTES = 4096
"""Size of the objects with which the example's eviction test fills its capacity."""

NOT_OF_THE_INTERFACE = {
    "test_store_completion_is_delayed_by_bandwidth": "the example sleeps to look slow",
}
"""Tests of what an example adds to the interface: name -> why it is left out."""


class OnCapacity(KVStoreL2Adapter):
    """An adapter whose store has the capacity that an example was asked for, in whole objects."""

    made = 0

    def __init__(self, config: Any, **kwargs: Any) -> None:
        OnCapacity.made += 1
        size_gb = config["max_size_gb"] if isinstance(config, dict) else config.max_size_gb
        objects = max(1, int(size_gb * (1 << 30)) // OBJECT_BYTES)
        url = f"embedded:?dram={objects * (OBJECT_BYTES + LEVEL0_ALIGN)}"
        super().__init__({"url": url, "max_capacity_gb": size_gb}, **kwargs)


class InMemoryL2AdapterConfig(L2AdapterConfigBase):  # type: ignore[misc]
    """The parameters of the example plugin."""

    def __init__(self, max_size_gb: float = 0.5, mock_bandwidth_gb: float = 10.0) -> None:
        self.max_size_gb, self.mock_bandwidth_gb = max_size_gb, mock_bandwidth_gb

    @classmethod
    def from_dict(cls, d: dict[str, Any]) -> InMemoryL2AdapterConfig:
        return cls(**d)

    @classmethod
    def help(cls) -> str:
        return ""


def example_plugin() -> ModuleType:
    """A module with the example plugin's names."""
    module = ModuleType("lmc_external_l2_adapter")
    vars(module).update(InMemoryL2Adapter=OnCapacity, InMemoryL2AdapterConfig=InMemoryL2AdapterConfig)
    return module


mock_l2_adapter.MockL2Adapter = OnCapacity
sys.modules["lmc_external_l2_adapter"] = example_plugin()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        module = getattr(item, "module", None)
        if hasattr(module, "MockNativeConnector"):
            vars(module)["MockNativeConnector"] = functools.partial(KVStoreNativeConnector, url="embedded:?dram=64MiB")
        reason = NOT_OF_THE_INTERFACE.get(item.name.partition("[")[0])
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    terminalreporter.write_line(f"kvstore's plugin was made {OnCapacity.made} times")


def pytest_sessionfinish(session: pytest.Session) -> None:
    if not OnCapacity.made:
        session.exitstatus = pytest.ExitCode.NO_TESTS_COLLECTED
