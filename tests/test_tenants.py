"""Tenants of a store: from the configuration and the access token to the quota, on every way a chunk takes."""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from kvstore.client import Client
from kvstore.codecs.raw import RawCodec
from kvstore.compose import open_store
from kvstore.config import Config, ServiceConfig, Settings, TierConfig
from kvstore.connect import connect
from kvstore.embedded import EmbeddedClient
from kvstore.errors import ConfigError, ServiceError
from kvstore.outcome import Reason
from kvstore.service.auth import Gate
from kvstore.store import Store
from kvstore.store_settings import StoreSettings
from kvstore.tenants import TENANT_HEADER, TENANTS_MAX, TenantConfig, check_tenants
from kvstore.testing.chunks import sample_container, sample_keys, sample_spec
from kvstore.testing.client_harness import put_chunk
from kvstore.testing.serving import ServerThread
from kvstore.testing.wrappers import GatedTier
from kvstore.tier import IO_ALIGN, PutItem
from kvstore.tiers.dram import DramTier
from kvstore.tiers.nvme import NvmeTier

KEYS = sample_keys(8)
UNIT = 2 * IO_ALIGN
SPEC = sample_spec(layers=2, kv_heads=1, dim=16)
TOKEN, OTHER_TOKEN = "a-token-of-the-service", "a-token-of-research"
NAMES = {"research": TenantConfig(quota={"dram": 2 * UNIT}), "chat": TenantConfig(quota={"dram": "50%"})}


def container_of(number: int) -> bytes:
    """A container that takes a UNIT."""
    data = sample_container(KEYS[number], spec=SPEC, tokens=1, codec=RawCodec())
    assert IO_ALIGN < len(data) <= UNIT
    return data


def put(client: Client, number: int, *, durable: bool = False) -> Any:
    """Put one of them."""
    return client.put([put_chunk(KEYS[number], container_of(number))], durable=durable)[0]


def small_config(**more: Any) -> Config:
    """Memory for 16 of them."""
    return Config(tiers={"dram": TierConfig(capacity=16 * UNIT, policy="lru")}, tenants=NAMES, **more)


def used_units(client: Client, tenant: str, tier: str = "dram") -> int:
    """What a tenant has of a tier."""
    return int(client.stats()["tiers"][tier]["tenants"][tenant]["used_bytes"]) // UNIT


# -- configuration ---------------------------------------------------------------------------------------------------


def test_the_configuration_names_tenants(tmp_path: Path) -> None:
    path = tmp_path / "kvstore.toml"
    path.write_text(
        '[tiers.dram]\ncapacity = "1MiB"\n[tiers.nvme]\ncapacity = "2MiB"\npath = "x"\n'
        '[tenants.chat]\nquota.dram = "25%"\ntoken_file = "t"\n[tenants.batch.quota]\ndram = 4096\nnvme = "1MiB"\n'
    )
    settings = Settings()
    settings.add_file(path)
    tenants = settings.resolve().tenants
    assert tenants["chat"] == TenantConfig(quota={"dram": "25%"}, token_file="t")
    assert tenants["batch"].quota == {"dram": 4096, "nvme": "1MiB"}
    settings.add({"tenants": {"chat": {"quotas": {}}}}, "here")
    with pytest.raises(ConfigError, match=r"unknown setting 'tenants\.chat\.quotas'; did you mean 'quota'"):
        settings.resolve()


@pytest.mark.parametrize(
    ("tenants", "message"),
    [
        ({"a b": TenantConfig()}, r"tenant 'a b' is no name; use 1 to 64 letters"),
        ({"": TenantConfig()}, "tenant '' is no name"),
        ({"a": TenantConfig(quota={"disk": 1})}, r"tenants\.a\.quota\.disk: there is no tier 'disk'; .* dram"),
        ({"a": TenantConfig(quota={"dram": "lots"})}, r"tenants\.a\.quota\.dram is 'lots'"),
        ({"a": TenantConfig(quota={"dram": -1})}, r"tenants\.a\.quota\.dram is -1; it must not be negative"),
        ({"a": TenantConfig(quota={"dram": "101%"})}, r"is '101%'; a share is from '0%' to '100%'"),
        ({"a": TenantConfig(quota={"dram": "x%"})}, r"is 'x%'; a share is"),
        ({f"t{n}": TenantConfig() for n in range(TENANTS_MAX + 1)}, "there are 1025 tenants; at most 1024"),
    ],
)
def test_what_is_wrong_with_a_tenant_is_named(tenants: Mapping[str, TenantConfig], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_tenants(tenants, {"dram": None})


def test_a_tier_without_quotas_cannot_be_given_one() -> None:
    tiers = {"hbm": TierConfig(capacity="1MiB", options={"device": "cpu"}), "dram": TierConfig(capacity="1MiB")}
    with pytest.raises(ConfigError, match=r"tiers\.hbm keeps no quotas; take tenants\.a\.quota\.hbm away"):
        open_store(Config(tiers=tiers, tenants={"a": TenantConfig(quota={"hbm": "1MiB"})}))


# -- the ways of a chunk ---------------------------------------------------------------------------------------------


def test_puts_of_a_tenant_count_and_others_keep_their_room() -> None:
    with EmbeddedClient(open_store(small_config()), tenant="research") as client:
        store = client.store
        nobody = EmbeddedClient(store)
        assert put(nobody, 0).stored
        for number in (1, 2, 3):
            assert put(client, number).stored
        assert [info is not None for info in client.head(KEYS[:4])] == [True, False, True, True]
        assert (used_units(client, "research"), used_units(client, "chat")) == (2, 0)
        assert client.pin(KEYS[2:4], ttl_seconds=60) == [True, True]
        refused = put(client, 4)
        assert (refused.stored, refused.reason) == (False, Reason.OVER_QUOTA)
        assert client.stats()["counters"]["puts"] == {"over_quota": 1, "stored": 4}
        assert client.stats()["tiers"]["dram"]["tenants"]["research"]["refused"] == 1
        assert f"dram did not admit it: {refused.detail}" in client.explain(KEYS[4:5])[0].detail
        assert put(EmbeddedClient(store, tenant="chat"), 4).stored
        assert put(EmbeddedClient(store, tenant="chat"), 2).existed


def two_tiers(path: Path, dram: Mapping[str, int], nvme: Mapping[str, int]) -> Store:
    """Memory and a disk with quotas in units."""
    return Store(
        [
            DramTier(16 * UNIT, quotas={name: units * UNIT for name, units in dram.items()}),
            NvmeTier(path, 64 * UNIT, quotas={name: units * UNIT for name, units in nvme.items()}),
        ],
        StoreSettings(),
    )


def test_what_is_written_behind_and_promoted_stays_the_tenants(tmp_path: Path) -> None:
    with EmbeddedClient(two_tiers(tmp_path, {"a": 2}, {"a": 3}), tenant="a") as client:
        for number in range(4):
            assert put(client, number, durable=True).durable
        assert (used_units(client, "a"), used_units(client, "a", "nvme")) == (2, 3)
        assert [info.tiers if info else () for info in client.head(KEYS[:4])] == [
            (),
            ("nvme",),
            ("dram", "nvme"),
            ("dram", "nvme"),
        ]
        nobody = EmbeddedClient(client.store)
        assert all(part.miss is None for part in nobody.fetch(KEYS[1:2])), "whoever reads it"
        assert client.head(KEYS[1:2])[0].tiers == ("dram", "nvme")  # type: ignore[union-attr]
        assert used_units(client, "a") == 2
        assert client.pin([*KEYS[1:2], *KEYS[3:4]], ttl_seconds=60) == [True, True]
        assert all(part.miss is None for part in nobody.fetch(KEYS[2:3])), "served without a place in memory"
        assert used_units(client, "a") == 2


def test_a_quota_too_small_for_a_chunk_sends_it_below(tmp_path: Path) -> None:
    with EmbeddedClient(two_tiers(tmp_path, {"a": 0}, {"a": 2}), tenant="a") as client:
        assert put(client, 0).durable
        assert client.head(KEYS[:1])[0].tiers == ("nvme",)  # type: ignore[union-attr]
        assert (used_units(client, "a"), used_units(client, "a", "nvme")) == (0, 1)
        assert all(part.miss is None for part in client.fetch(KEYS[:1]))


def test_a_delete_waits_for_what_is_written_below_after_its_deadline(tmp_path: Path) -> None:
    disk = GatedTier(NvmeTier(tmp_path, 64 * UNIT, quotas={"a": 2 * UNIT}))
    store = Store([DramTier(16 * UNIT, quotas={"a": 0}), disk])
    disk.put_gate.clear()
    item = PutItem(KEYS[0], memoryview(container_of(0)), tenant="a")
    (status,) = store.put([item], deadline_ms=20)
    assert (status.stored, status.reason) == (False, Reason.DEADLINE)
    with ThreadPoolExecutor(1) as pool:
        deleting = pool.submit(store.delete, KEYS[:1])
        disk.put_gate.set()
        assert deleting.result(timeout=30) == [True]
    assert store.head(KEYS[:1]) == [None]
    store.close()


def test_a_disk_over_quota_is_a_refusal_below(tmp_path: Path) -> None:
    with EmbeddedClient(two_tiers(tmp_path, {"a": 4}, {"a": 1}), tenant="a") as client:
        assert put(client, 0, durable=True).durable
        assert client.pin(KEYS[:1], ttl_seconds=60) == [True]
        status = put(client, 1, durable=True)
        assert (status.stored, status.durable, status.reason) == (True, False, Reason.OVER_QUOTA)
        assert used_units(client, "a", "nvme") == 1
        assert "of which tenant a may have" in client.explain(KEYS[1:2])[0].detail


def test_what_is_handed_down_stays_the_tenants() -> None:
    quotas = {"a": 2 * UNIT}
    fast, slow = DramTier(8 * UNIT, quotas=quotas), DramTier(8 * UNIT, name="cxl", quotas=quotas)
    with EmbeddedClient(Store([fast, slow]), tenant="a") as client:
        for number in range(5):
            assert put(client, number).stored
        tiers = [info.tiers if info else () for info in client.head(KEYS[:5])]
        assert tiers == [(), ("cxl",), ("cxl",), ("dram",), ("dram",)]
        assert (used_units(client, "a"), used_units(client, "a", "cxl")) == (2, 2)


def test_containers_put_as_bytes_count_too() -> None:
    store = Store([DramTier(8 * UNIT, quotas={"a": UNIT})])
    for number in range(2):
        (status,) = store.put([PutItem(KEYS[number], memoryview(container_of(number)), tenant="a")])
        assert status.stored
    assert store.tiers[0].tenants(KEYS[:2]) == ["", "a"]
    store.close()


# -- the daemon ------------------------------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ServerThread]:
    """A daemon with a token of its own and one of a tenant."""
    for name, token in (("service", TOKEN), ("research", OTHER_TOKEN)):
        (tmp_path / name).write_text(token)
        (tmp_path / name).chmod(0o600)
    tenants = {**NAMES, "research": TenantConfig(quota={"dram": 2 * UNIT}, token_file=str(tmp_path / "research"))}
    config = small_config()
    service = ServiceConfig(token_file=str(tmp_path / "service"))
    with ServerThread(open_store(config), service, tenants) as server:
        yield server


def test_a_token_says_whose_a_put_is(server: ServerThread) -> None:
    with connect(server.http_url, token=OTHER_TOKEN) as client:
        for number in range(3):
            assert put(client, number).stored
        assert used_units(client, "research") == 2
        assert client.pin(KEYS[1:3], ttl_seconds=60) == [True, True]
        assert put(client, 3).reason is Reason.OVER_QUOTA


@pytest.mark.parametrize("transport", ["", "&transport=bytes"])
def test_over_the_socket_the_client_says_who_it_is(server: ServerThread, transport: str) -> None:
    with connect(f"{server.unix_url}?tenant=chat{transport}") as client, connect(server.unix_url) as nobody:
        for number in range(3):
            assert put(client, number).stored
        assert put(nobody, 3).stored
        assert (used_units(client, "chat"), used_units(client, "research")) == (3, 0)


def ask(server: ServerThread, token: str, tenant: str) -> int:
    """The status of a request."""
    headers = {"Authorization": f"Bearer {token}", TENANT_HEADER: tenant}
    request = urllib.request.Request(f"{server.http_url}/v1/stats", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code


def test_who_may_say_whose_a_put_is(server: ServerThread) -> None:
    assert ask(server, TOKEN, "chat") == 200, "the service's token speaks for everybody"
    assert ask(server, OTHER_TOKEN, "research") == 200
    assert ask(server, OTHER_TOKEN, "chat") == 403
    assert ask(server, TOKEN, "nobody-knows") == 400
    assert ask(server, "a-token-of-nobody", "chat") == 401
    with pytest.raises(ServiceError, match="there is no tenant 'nobody-knows'"):
        connect(f"{server.unix_url}?tenant=nobody-knows")


def test_a_refusal_says_when_to_try_again(server: ServerThread) -> None:
    with connect(server.http_url, token=OTHER_TOKEN) as client:
        for number in range(2):
            assert put(client, number).stored
        assert client.pin(KEYS[:2], ttl_seconds=60) == [True, True]
    url = f"{server.http_url}/v1/chunks/{KEYS[2].hex()}"
    headers = {"Authorization": f"Bearer {OTHER_TOKEN}"}
    request = urllib.request.Request(url, data=container_of(2), headers=headers, method="PUT")
    with urllib.request.urlopen(request, timeout=10) as answer:
        assert answer.headers["Retry-After"] == "1"
        assert b'"over_quota"' in answer.read()


def test_metrics_tell_tenants_apart(server: ServerThread) -> None:
    with connect(f"{server.unix_url}?tenant=chat") as client:
        assert put(client, 0).stored
    text = server.server.daemon.metrics.render().decode()
    assert f'kvstore_tenant_used_bytes{{tenant="chat",tier="dram"}} {float(UNIT)}' in text
    assert f'kvstore_tenant_quota_bytes{{tenant="research",tier="dram"}} {float(2 * UNIT)}' in text
    assert 'kvstore_tenant_refused_total{tenant="chat",tier="dram"} 0.0' in text


def test_tokens_are_told_apart() -> None:
    with pytest.raises(ConfigError, match="two token files hold the same token"):
        Gate(TOKEN, "localhost", {"a": TOKEN})
    with pytest.raises(ConfigError, match=r"set service\.token_file"):
        Gate(None, "0.0.0.0", {"a": None})
    Gate(None, "0.0.0.0", {"a": TOKEN})
    with pytest.raises(ConfigError, match="tenant 'a b' is no name"):
        connect("unix:/nowhere?tenant=a%20b")
