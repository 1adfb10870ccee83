"""Admission in the tiers: what nvme refuses stays in memory, is counted, and is told with the reason."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvstore.compose import open_store
from kvstore.config import load
from kvstore.errors import ConfigError
from kvstore.keys import ROOT
from kvstore.outcome import Reason
from kvstore.store import Store
from kvstore.testing.chunks import sample_container, sample_key
from kvstore.testing.harness import item, key_of, present, put
from kvstore.tier import PutItem
from kvstore.tiers.dram import DramTier
from kvstore.tiers.nvme import NvmeTier
from kvstore.tiers.policies.registry import EVICTIONS

CAPACITY = 8 << 20
CHUNK = 256 << 10


def second_touch(directory: Path) -> NvmeTier:
    """A tier that takes a chunk when it is offered for the second time."""
    return NvmeTier(directory, CAPACITY, policy="lru", admission="second_touch")


def test_nvme_refuses_with_a_reason_and_takes_what_is_required(tmp_path: Path) -> None:
    tier = second_touch(tmp_path)
    first = put(tier, 1, CHUNK)
    assert (first.stored, first.reason) == (False, Reason.NOT_ADMITTED)
    assert put(tier, 1, CHUNK).durable
    assert put(tier, 1, CHUNK).existed
    (required,) = tier.put([PutItem(key_of(2), item(2, CHUNK).data, required=True)])
    assert required.durable
    assert (tier.counters()["refused"], tier.counters()["refused_bytes"]) == (1, CHUNK)
    tier.close()


def test_a_chunk_behind_a_refused_one_is_refused_and_one_behind_an_admitted_one_is_not(tmp_path: Path) -> None:
    tier = second_touch(tmp_path)
    chain = [item(1, CHUNK), item(2, CHUNK, key_of(1)), item(3, CHUNK, key_of(2))]
    tier.put(chain[1:2])
    statuses = tier.put(chain)
    assert [status.stored for status in statuses] == [False, False, False]
    assert statuses[1].detail == "the chunk before it is not there"
    assert all(status.durable for status in tier.put(chain))
    tier.close()


@pytest.mark.parametrize("policy", EVICTIONS)
def test_every_policy_keeps_the_bound_and_the_chains(policy: str, tmp_path: Path) -> None:
    memory = DramTier(CAPACITY, policy=policy)
    disk = NvmeTier(tmp_path, CAPACITY, policy=policy, direct_io=False)
    for tier in (memory, disk):
        for number in range(60):
            parent = key_of(number - 1) if number % 4 else ROOT
            tier.put([item(number, CHUNK, parent)])
            tier.touch([key_of(number - 7), key_of(number - 8)])
            there = {entry.key: entry.parent for entry in tier.scan()}
            assert all(parent == ROOT or parent in there for parent in there.values())
            assert tier.usage().used_bytes <= tier.capacity_bytes
        assert tier.counters()["evictions"]
        assert present(tier, range(60))
        tier.close()


def test_an_adaptive_tier_opens_again_with_what_it_had(tmp_path: Path) -> None:
    tier = NvmeTier(tmp_path, CAPACITY, policy="adaptive")
    for number in range(40):
        put(tier, number, CHUNK)
    before = present(tier, range(40))
    tier.close()
    tier = NvmeTier(tmp_path, CAPACITY, policy="adaptive")
    assert present(tier, range(40)) == before
    tier.touch([key_of(number) for number in before])
    (status,) = tier.put([PutItem(key_of(99), item(99, CHUNK).data, required=True)])
    assert status.durable
    tier.close()


def test_a_refused_chunk_stays_in_memory_and_a_durable_put_is_not_refused(tmp_path: Path) -> None:
    store = Store([DramTier(CAPACITY), second_touch(tmp_path)])
    try:
        key, other = sample_key(1), sample_key(2)
        store.put([PutItem(key, memoryview(sample_container(key)))])
        assert store.flush()
        assert store.lookup([key]).tiers == ("dram",)
        assert store.counters.get("demotions_refused", "nvme") == 1
        assert store.counters.get("demotions_failed", "nvme") == 0
        (explained,) = store.explain([key])
        assert explained.detail == "nvme did not admit it: not worth its place now"
        (durable,) = store.put([PutItem(other, memoryview(sample_container(other)))], durable=True)
        assert durable.durable
        (again,) = store.put([PutItem(key, memoryview(sample_container(key)))], durable=True)
        assert again.durable
        assert store.tiers[0].delete([key, other]) == [True, True]
        assert store.lookup([key, other]).tiers == ("nvme", "nvme")
    finally:
        store.close()


def test_explain_tells_that_a_chunk_that_is_gone_had_been_refused(tmp_path: Path) -> None:
    store = Store([DramTier(CAPACITY), second_touch(tmp_path)])
    try:
        key = sample_key(1)
        store.put([PutItem(key, memoryview(sample_container(key)))])
        assert store.flush()
        store.tiers[0].delete([key])
        (explained,) = store.explain([key])
        assert explained.why == "deleted"
        assert explained.detail.endswith("on request; nvme did not admit it: not worth its place now")
    finally:
        store.close()


def test_the_configuration_names_policies(tmp_path: Path) -> None:
    def config(**flags: str) -> Store:
        values = {"tiers.dram.capacity": "8MiB", "tiers.nvme.capacity": "8MiB", "tiers.nvme.path": str(tmp_path / "n")}
        names = {f"tiers.{name.replace('_', '.')}": value for name, value in flags.items()}
        return open_store(load(environment={}, flags=values | names)[0])

    config().close()
    config(dram_policy="arc", nvme_policy="lru", nvme_admission="second_touch").close()
    with pytest.raises(ConfigError, match="unknown eviction policy 'ark'; did you mean 'arc'"):
        config(nvme_policy="ark")
    with pytest.raises(ConfigError, match=r"tiers.dram has no option 'admission'"):
        config(dram_admission="always")
    with pytest.raises(ConfigError, match="needs eviction policy 'adaptive'"):
        config(nvme_policy="lru", nvme_admission="adaptive")
    config().close()
