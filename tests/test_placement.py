"""Where an arena's memory lies: NUMA nodes through the kernel, CUDA through a stand-in for the driver."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from kvstore.errors import ConfigError, TierError
from kvstore.tiers import placement, registry
from kvstore.tiers.arena import Arena, ReaderArena
from kvstore.tiers.dram import DramTier

CAPACITY_BYTES = 4 << 20


def bound_nodes() -> list[str]:
    """The memory policies of this process's mappings of arenas, as the kernel shows them."""
    text = Path("/proc/self/numa_maps").read_text() if Path("/proc/self/numa_maps").exists() else ""
    return re.findall(r"^\S+ (\S+) file=\S*kvstore-dram", text, flags=re.MULTILINE)


class Driver:
    """A stand-in for CUDA's runtime: remembers what is registered."""

    def __init__(self, error: int = 0) -> None:
        self.error = error
        self.registered: dict[int, tuple[int, int]] = {}

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:  # noqa: N802
        if not self.error:
            self.registered[address] = (nbytes, flags)
        return self.error

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        del self.registered[address]
        return 0


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    driver = Driver()
    monkeypatch.setattr(torch, "cuda", SimpleNamespace(is_available=lambda: True, cudart=lambda: driver))
    return driver


def test_an_arena_is_bound_to_its_node() -> None:
    node = placement.nodes_with_memory()[-1]
    before = bound_nodes().count(f"bind:{node}")
    try:
        arena = Arena(CAPACITY_BYTES, numa_node=node, prefault=True)
    except TierError as error:
        pytest.skip(f"this kernel has no NUMA policies: {error}")
    assert arena.wait_prefaulted(60)
    arena.view(0, 3)[:] = b"abc"
    if nodes := bound_nodes():
        assert nodes.count(f"bind:{node}") == before + 1
    arena.close()


def test_a_node_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for node in (-1, 1023, 5000):
        with pytest.raises(ConfigError, match=rf"numa_node is {node}; the nodes with memory on this machine are: 0"):
            DramTier(CAPACITY_BYTES, numa_node=node)
    with pytest.raises(ConfigError, match=r"tiers.cxl: numa_node is 9"):
        registry.open_tier("dram", name="cxl", capacity_bytes=CAPACITY_BYTES, numa_node=9)
    listed = tmp_path / "has_memory"
    listed.write_text("0-2,5,7-8\n")
    monkeypatch.setattr(placement, "NODES", listed)
    assert placement.nodes_with_memory() == [0, 1, 2, 5, 7, 8]
    with pytest.raises(ConfigError, match="numa_node is 3; .*: 0, 1, 2, 5, 7, 8"):
        DramTier(CAPACITY_BYTES, numa_node=3)
    with pytest.raises(TierError, match="cannot take memory from numa_node 8"):  # the kernel knows better
        DramTier(CAPACITY_BYTES, numa_node=8)
    monkeypatch.setattr(placement, "NODES", tmp_path / "none")
    assert placement.nodes_with_memory() == [0]
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    with pytest.raises(ConfigError, match="not supported on riscv64"):
        DramTier(CAPACITY_BYTES, numa_node=0)


def test_a_declared_bandwidth_is_the_tiers() -> None:
    tier = DramTier(CAPACITY_BYTES, name="cxl", bandwidth_gb_per_second=25.5)
    assert tier.bandwidth_bytes_per_second == 25.5e9
    tier.close()
    with pytest.raises(ConfigError, match="bandwidth_gb_per_second is -1"):
        DramTier(CAPACITY_BYTES, bandwidth_gb_per_second=-1)


def test_an_arena_is_registered_with_cuda_until_it_closes(driver: Driver) -> None:
    tier = DramTier(CAPACITY_BYTES, pin_for_cuda=True)
    assert tier.arena.pinned
    assert driver.registered == {tier.arena.address: (CAPACITY_BYTES, 1)}
    assert tier.arena.pin(), "twice is once"
    reader = ReaderArena(tier.arena.fd, CAPACITY_BYTES)
    assert reader.pin()
    assert driver.registered[reader.address] == (CAPACITY_BYTES, 1 | 8)
    reader.close()
    tier.close()
    assert driver.registered == {}


def test_a_driver_that_refuses_costs_nothing_but_speed(driver: Driver, caplog: pytest.LogCaptureFixture) -> None:
    driver.error = 2
    tier = DramTier(CAPACITY_BYTES, pin_for_cuda=True)
    assert not tier.arena.pinned
    assert "error 2" in caplog.text
    tier.close()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_without_cuda_the_arena_stays_unpinned(caplog: pytest.LogCaptureFixture) -> None:
    tier = DramTier(CAPACITY_BYTES, pin_for_cuda=True)
    assert not tier.arena.pinned
    assert "torch finds no CUDA" in caplog.text
    tier.close()
