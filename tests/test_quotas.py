"""Quotas of tenants: who leaves, against a plain reference; and that nobody ever has more than its quota."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvstore.errors import ConfigError
from kvstore.keys import ROOT
from kvstore.outcome import PutStatus, Reason
from kvstore.testing.harness import FakeClock, get, item, key_of, present
from kvstore.tier import IO_ALIGN, PutItem, Tier
from kvstore.tiers import quotas as quotas_module
from kvstore.tiers.dram import DramTier
from kvstore.tiers.index import ChunkEntry, ChunkIndex, Index
from kvstore.tiers.nvme import NvmeTier
from kvstore.tiers.packed_index import new_index
from kvstore.tiers.quotas import Quotas
from kvstore.tiers.saved_tenants import FILE_NAME, load_tenants, save_tenants

QUOTA_PAGES = {"a": 5, "b": 3}
CHUNKS = 10
PARENTS = {1: 0, 2: 1, 3: 1, 5: 4, 6: 5}


def padded(nbytes: int) -> int:
    """Whole pages."""
    return -(-nbytes // IO_ALIGN) * IO_ALIGN


def parent_of(number: int) -> bytes:
    """The chunk before a test chunk."""
    return key_of(PARENTS[number]) if number in PARENTS else ROOT


class Reference:
    """An index with quotas over it, and whose every chunk is, as plain data."""

    def __init__(self, index: Index, *, exact: bool) -> None:
        self.index = index
        self.exact = exact
        self.quotas = Quotas(index, padded, {name: pages * IO_ALIGN for name, pages in QUOTA_PAGES.items()})
        self.tenant: dict[int, str] = {}
        self.next_offset = 0

    def entries(self) -> dict[int, ChunkEntry]:
        """What is there."""
        found = {number: self.index.get(key_of(number)) for number in range(CHUNKS)}
        return {number: entry for number, entry in found.items() if entry is not None}

    def used_bytes(self, tenant: str) -> int:
        """What a tenant has."""
        return sum(padded(e.nbytes) for number, e in self.entries().items() if self.tenant[number] == tenant)

    def leaving(self, tenant: str, nbytes: int, keep: bytes) -> list[bytes] | Reason:
        """Always the least recently used of the tenant's that may leave."""
        if tenant not in QUOTA_PAGES:
            return []
        quota_bytes = QUOTA_PAGES[tenant] * IO_ALIGN
        if nbytes > quota_bytes:
            return Reason.TOO_LARGE
        stay = {entry.key for entry in self.index.kept(0.0)} | {keep}
        left = self.entries()
        over_bytes = self.used_bytes(tenant) + nbytes - quota_bytes
        leaving = []
        while over_bytes > 0:
            parents = {entry.parent for entry in left.values()}
            free = [
                (entry.access, number)
                for number, entry in left.items()
                if self.tenant[number] == tenant and entry.key not in stay and entry.key not in parents
            ]
            if not free:
                return Reason.OVER_QUOTA
            entry = left.pop(min(free)[1])
            leaving.append(entry.key)
            over_bytes -= padded(entry.nbytes)
        return leaving

    def add(self, number: int, tenant: str, pages: int) -> None:
        """Store a chunk, the reference's victims having left."""
        answer = self.quotas.leaving(tenant, pages * IO_ALIGN, 0.0, parent_of(number))
        expected = self.leaving(tenant, pages * IO_ALIGN, parent_of(number))
        if self.exact or isinstance(answer, Reason) or isinstance(expected, Reason):
            assert (answer if isinstance(answer, Reason) else [entry.key for entry in answer]) == expected
        else:
            self.judge(answer, tenant, pages * IO_ALIGN, parent_of(number))
        if isinstance(answer, Reason) or self.index.get(key_of(number)) is not None:
            return
        for entry in answer:
            self.remove(entry)
        offset, self.next_offset = self.next_offset, self.next_offset + pages * IO_ALIGN
        self.quotas.charge(tenant, offset, pages * IO_ALIGN)
        entry = ChunkEntry(key_of(number), offset, pages * IO_ALIGN - 7, parent=parent_of(number))
        self.index.add(entry)
        self.quotas.added(entry)
        self.tenant[number] = tenant

    def judge(self, leaving: list[ChunkEntry], tenant: str, nbytes: int, keep: bytes) -> None:
        """Who leaves may, in this order, and is enough but not more."""
        there = self.entries()
        stay = {entry.key for entry in self.index.kept(0.0)} | {keep}
        over_bytes = self.used_bytes(tenant) + nbytes - QUOTA_PAGES.get(tenant, 1000) * IO_ALIGN
        for entry in leaving:
            assert over_bytes > 0, "enough have left"
            (number,) = [number for number, one in there.items() if one.key == entry.key]
            assert self.tenant[number] == tenant
            assert entry.key not in stay
            del there[number]
            assert entry.key not in {one.parent for one in there.values()}, "a parent before its child"
            over_bytes -= padded(entry.nbytes)
        assert over_bytes <= 0

    def remove(self, entry: ChunkEntry) -> None:
        """A chunk leaves."""
        self.index.remove(entry)
        self.quotas.release(entry.offset, padded(entry.nbytes))


@pytest.mark.parametrize("new", [ChunkIndex, new_index])
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_the_least_recently_used_of_the_tenants_own_leaves(
    new: Callable[[], Index], monkeypatch: pytest.MonkeyPatch, data: st.DataObject
) -> None:
    monkeypatch.setattr(quotas_module, "STALE_MIN", data.draw(st.sampled_from([0, 64])))
    monkeypatch.setattr(quotas_module, "PUT_RIGHT_MAX", put_right_max := data.draw(st.sampled_from([0, 1, 1024])))
    reference = Reference(new(), exact=put_right_max > CHUNKS)
    index = reference.index
    for _ in range(data.draw(st.integers(1, 40))):
        verb = data.draw(st.sampled_from(["add", "add", "add", "touch", "pin", "unpin", "read", "remove"]))
        number = data.draw(st.integers(0, CHUNKS - 1))
        entry = index.get(key_of(number))
        if verb == "add":
            reference.add(number, data.draw(st.sampled_from(["a", "a", "b", "", "c"])), data.draw(st.integers(1, 3)))
        elif verb == "touch":
            index.touch([key_of(number), key_of(data.draw(st.integers(0, CHUNKS - 1)))])
        elif entry is None:
            continue
        elif verb == "pin":
            index.pin(entry, 10.0)
        elif verb == "unpin":
            index.unpin(entry, 0.0)
        elif verb == "read" and not entry.readers:
            index.start_reading(entry)
        elif entry.readers:
            index.stop_reading(entry)
        else:
            reference.remove(entry)
        for tenant, usage in reference.quotas.usage().items():
            assert usage.used_bytes == reference.used_bytes(tenant) <= usage.quota_bytes
        for at, there in reference.entries().items():
            whose = reference.tenant[at]
            assert reference.quotas.tenant_of(there.key) == (whose if whose in QUOTA_PAGES else "")


def put_for(tier: Tier, tenant: str, number: int, pages: int = 1, parent: bytes = ROOT) -> PutStatus:
    """Put a test chunk for a tenant."""
    plain = item(number, pages * IO_ALIGN, parent)
    (status,) = tier.put([PutItem(plain.key, plain.data, parent, tenant=tenant)])
    return status


QUOTAS = {"a": 3 * IO_ALIGN, "b": 2 * IO_ALIGN}


@pytest.fixture(params=["dram", "nvme"])
def tier(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Tier]:
    """A tier with room for all quotas and more."""
    clock = FakeClock()
    made: Tier = (
        DramTier(64 * IO_ALIGN, clock=clock, quotas=QUOTAS)
        if request.param == "dram"
        else NvmeTier(tmp_path / "volume", 64 * IO_ALIGN, clock=clock, quotas=QUOTAS)
    )
    yield made
    made.close()


def test_a_tenant_makes_room_among_its_own(tier: Tier) -> None:
    assert put_for(tier, "", 50).stored
    assert put_for(tier, "b", 40).stored
    for number in range(5):
        assert put_for(tier, "a", number).stored
        tier.touch([key_of(0)])
    assert present(tier, range(5)) == [0, 3, 4]
    assert present(tier, range(40, 51)) == [40, 50]
    assert tier.tenants([key_of(n) for n in (0, 40, 50, 99)]) == ["a", "b", "", ""]
    assert tier.tenant_usage()["a"].used_bytes == QUOTAS["a"]


def test_what_stays_is_refused_with_a_reason_and_counted(tier: Tier) -> None:
    for number in (0, 1):
        assert put_for(tier, "b", number).stored
    tier.pin([key_of(0), key_of(1)], expires_at=2000.0)
    refused = put_for(tier, "b", 2)
    assert (refused.stored, refused.reason) == (False, Reason.OVER_QUOTA)
    assert f"of which tenant b may have {QUOTAS['b']}" in refused.detail
    assert put_for(tier, "b", 3, pages=3).reason is Reason.TOO_LARGE
    assert tier.tenant_usage()["b"].refused == 2
    assert put_for(tier, "a", 2).stored, "others have room"
    tier.unpin([key_of(0)])
    assert put_for(tier, "b", 4).stored
    assert present(tier, range(5)) == [1, 2, 4]


def test_children_of_others_keep_a_chunk_and_parents_of_what_comes_too(tier: Tier) -> None:
    assert put_for(tier, "b", 0).stored
    assert put_for(tier, "a", 1, parent=key_of(0)).stored
    assert put_for(tier, "b", 2).stored
    assert put_for(tier, "b", 3, parent=key_of(2)).reason is Reason.OVER_QUOTA
    assert put_for(tier, "b", 4).stored
    assert present(tier, range(5)) == [0, 1, 4]


def test_what_is_shared_counts_for_the_first(tier: Tier) -> None:
    assert put_for(tier, "a", 0).stored
    assert put_for(tier, "b", 0).existed
    assert tier.tenants([key_of(0)]) == ["a"]
    assert tier.tenant_usage()["b"].used_bytes == 0


def test_a_deleted_chunk_counts_until_its_last_reader() -> None:
    tier = DramTier(64 * IO_ALIGN, quotas={"a": IO_ALIGN})
    assert put_for(tier, "a", 0).stored
    lease = tier.lease(key_of(0))
    tier.delete([key_of(0)])
    assert tier.tenant_usage()["a"].used_bytes == IO_ALIGN
    assert put_for(tier, "a", 1).reason is Reason.OVER_QUOTA
    lease.release()  # type: ignore[union-attr]
    assert put_for(tier, "a", 1).stored
    tier.close()
    assert tier.tenant_usage() == {}


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 1 << 30))
def test_nobody_ever_has_more_than_its_quota(tier: Tier, seed: int) -> None:
    rng = random.Random(seed)
    tier.delete([key_of(number) for number in range(30)])
    for _ in range(40):
        number = rng.randrange(30)
        parent = key_of(number - 1) if number % 3 else ROOT
        before = present(tier, range(30))
        tenant = rng.choice(["", "a", "b"])
        status = put_for(tier, tenant, number, rng.randint(1, 2), parent)
        assert status.stored or (tenant and status.reason is Reason.OVER_QUOTA)
        keys = [key_of(one) for one in range(30)]
        for name, usage in tier.tenant_usage().items():
            pairs = zip(tier.tenants(keys), tier.sizes(keys), strict=True)
            assert usage.used_bytes == sum(nbytes or 0 for whose, nbytes in pairs if whose == name) <= QUOTAS[name]
        if not tenant and len(before) < 25:
            assert set(before) <= set(present(tier, range(30))), "there was room for all"
        if rng.random() < 0.2:
            tier.delete([key_of(rng.randrange(30))])


def test_a_negative_quota_is_refused() -> None:
    with pytest.raises(ConfigError, match="quota of tenant 'a' is -1; it must not be negative"):
        DramTier(IO_ALIGN, quotas={"a": -1})


def open_volume(path: Path, **quotas: int) -> NvmeTier:
    """A volume of 64 pages with quotas in pages."""
    return NvmeTier(path, 64 * IO_ALIGN, quotas={name: pages * IO_ALIGN for name, pages in quotas.items()})


def test_whose_chunks_are_survives_a_restart(tmp_path: Path) -> None:
    tier = open_volume(tmp_path, a=3, b=2)
    for number, tenant in enumerate(("a", "a", "b", "")):
        assert put_for(tier, tenant, number).stored
    tier.close()
    tier = open_volume(tmp_path, a=3, b=2)
    assert tier.tenants([key_of(n) for n in range(4)]) == ["a", "a", "b", ""]
    assert put_for(tier, "a", 4, pages=2).stored
    assert present(tier, range(5)) == [1, 2, 3, 4]
    tier.close()
    tier = open_volume(tmp_path, a=2)  # less than before: what is over it leaves
    assert tier.tenant_usage()["a"].used_bytes <= 2 * IO_ALIGN
    assert present(tier, range(5)) == [2, 3, 4]
    assert get(tier, 2, IO_ALIGN) != Reason.ABSENT
    tier.close()
    (tmp_path / FILE_NAME).write_bytes(b"KVTENANTS1\n rubbish")
    tier = open_volume(tmp_path, a=2)
    assert tier.tenants([key_of(n) for n in (2, 3, 4)]) == ["", "", ""]
    tier.close()


def test_the_saved_file_names_whose_the_keys_are(tmp_path: Path) -> None:
    saved = {"a": [key_of(0), key_of(1)], "b": [], "c": [key_of(2)]}
    save_tenants(tmp_path, saved)
    assert dict(load_tenants(tmp_path)) == {key_of(0): "a", key_of(1): "a", key_of(2): "c"}
    assert list(load_tenants(tmp_path / "nowhere")) == []
    save_tenants(tmp_path / "nowhere", saved)  # logged


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=80), st.integers(0, 200), st.booleans())
def test_a_damaged_file_is_not_believed(tmp_path: Path, noise: bytes, at: int, cut: bool) -> None:
    save_tenants(tmp_path, {"a": [key_of(0)], "b": [key_of(1)]})
    whole = (tmp_path / FILE_NAME).read_bytes()
    damaged = whole[:at] if cut else whole[:at] + noise + whole[at + len(noise) :]
    (tmp_path / FILE_NAME).write_bytes(damaged)
    assert damaged == whole or list(load_tenants(tmp_path)) == []
