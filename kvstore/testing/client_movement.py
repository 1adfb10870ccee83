"""Prefetching, parking and resuming, pins with owners: a part of `kvstore.testing.client.ClientContract`."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from kvstore.client import Client
from kvstore.context import Context
from kvstore.errors import ConfigError
from kvstore.keys import ROOT
from kvstore.outcome import PutStatus, Reason
from kvstore.testing.chunks import sample_container, sample_key, sample_keys
from kvstore.testing.client_harness import ClientHarness, collect, eventually, pinned_bytes, put_chunk


def put_chain(client: Client, keys: Sequence[bytes], parent: bytes = ROOT) -> list[bytes]:
    """Store the sample containers of a chain; answers their bytes."""
    parents = [parent, *keys[:-1]]
    containers = [sample_container(key, parent=before) for key, before in zip(keys, parents, strict=True)]
    chunks = [put_chunk(*chunk) for chunk in zip(keys, containers, parents, strict=True)]
    assert all(status.stored for status in client.put(chunks))
    return containers


def durable_tiers(client: Client) -> list[str]:
    """Names of the durable tiers, if there are any."""
    return [name for name, tier in client.stats()["tiers"].items() if tier["durable"]]


def check_parked(client: Client, keys: Sequence[bytes], statuses: Sequence[PutStatus]) -> None:
    """A chain that nobody else needs lies in the durable tier alone; without such a tier it has stayed."""
    durable = durable_tiers(client)
    infos = client.head(keys)
    for status, info in zip(statuses, infos, strict=True):
        assert status.stored
        assert info is not None
        assert status.durable == bool(durable)
        if durable:
            assert info.tiers == (durable[0],)
        else:
            assert status.reason == Reason.UNAVAILABLE


class MovementContract(ClientHarness):
    """What `Client` says of the verbs that move chunks."""

    def test_a_parked_chain_is_resumed_bit_for_bit(self, client: Client) -> None:
        keys = sample_keys(6)
        containers = put_chain(client, keys)
        check_parked(client, keys, client.park(keys))
        again = client.resume(keys)
        assert all(status.stored for status in again)
        assert [status.existed for status in again] == [not durable_tiers(client)] * 6
        assert all(status.existed for status in client.resume(keys))
        assert collect(client.fetch(keys), containers) == dict.fromkeys(range(6))
        assert eventually(lambda: pinned_bytes(client) == 0)

    def test_chunks_that_are_nowhere_are_neither_parked_nor_resumed(self, client: Client) -> None:
        keys = sample_keys(3)
        put_chain(client, keys[:2])
        for verb in (client.park, client.resume):
            statuses = verb(keys)
            assert [status.stored for status in statuses] == [True, True, False]
        assert statuses[2].reason == Reason.ABSENT
        assert not client.park([])
        assert not client.resume([])

    def test_prefetches_can_be_ordered_and_taken_back(self, client: Client) -> None:
        keys = sample_keys(4)
        containers = put_chain(client, keys)
        client.park(keys)
        statuses = client.prefetch([*keys, sample_key(77)], priority=5)
        assert [status.stored for status in statuses] == [True] * 4 + [False]
        assert len(client.cancel(keys)) == 4
        assert client.cancel([sample_key(77)]) == [False]
        assert collect(client.fetch(keys), containers) == dict.fromkeys(range(4))

    def test_a_pin_of_one_owner_outlives_that_of_another(self, client: Client) -> None:
        keys = sample_keys(2)
        put_chain(client, keys)
        assert client.flush()
        for owner in ("a", "b", ""):
            assert client.pin(keys, ttl_seconds=60, owner=owner) == [True, True]
        assert client.unpin(keys, owner="a") == [True, True]
        assert client.unpin(keys, owner="a") == [False, False]
        assert client.unpin(keys) == [True, True]
        assert pinned_bytes(client) > 0
        client.park(keys)
        assert all(status.existed for status in client.resume(keys)), "a pin keeps a chunk in memory"
        assert client.unpin(keys, owner="b") == [True, True]
        assert pinned_bytes(client) == 0

    def test_forks_share_their_prefix_and_park_without_harm_to_each_other(self, client: Client) -> None:
        shared, left, right = sample_keys(3), sample_keys(2, 10), sample_keys(2, 20)
        containers = put_chain(client, shared)
        put_chain(client, left, shared[-1])
        put_chain(client, right, shared[-1])
        with Context(client, shared) as trunk, trunk.fork() as one, trunk.fork() as two:
            trunk.close()
            one.extend(left)
            two.extend(right)
            assert (one.keys, two.keys) == ((*shared, *left), (*shared, *right))
            assert (one.renew(), two.renew()) == (5, 5)
            one.park()
            assert all(status.existed for status in client.resume(shared)), "the other branch keeps the prefix"
            infos = client.head(left)
            assert all(info is not None and (not durable_tiers(client) or len(info.tiers) == 1) for info in infos)
            assert all(status.stored for status in one.resume())
            two.park()
            one.park()
            assert all(info is not None for info in client.head(shared))
            assert collect(client.fetch(shared), containers) == dict.fromkeys(range(3))
        assert eventually(lambda: pinned_bytes(client) == 0)

    def test_a_context_keeps_nothing_after_its_end(self, client: Client) -> None:
        keys = sample_keys(3)
        put_chain(client, keys)
        with Context(client, [*keys, sample_key(9)], ttl_seconds=60) as context:
            assert context.renew() == 3
            assert pinned_bytes(client) > 0
        context.close()
        assert eventually(lambda: pinned_bytes(client) == 0)

    def test_a_deadline_that_has_passed_moves_nothing_wrongly(self, client: Client) -> None:
        keys = sample_keys(3)
        containers = put_chain(client, keys)
        for verb in (client.park, client.resume):
            assert len(verb(keys, deadline_ms=0)) == 3
        assert collect(client.fetch(keys), containers) == dict.fromkeys(range(3))

    def test_mistakes_about_movement_raise(self, client: Client) -> None:
        for call in (
            lambda: client.park([b"short"]),
            lambda: client.resume([b"short"]),
            lambda: client.cancel([b"short"]),
            lambda: client.park([ROOT], deadline_ms=-1),
            lambda: client.pin([ROOT], ttl_seconds=1, owner="x" * 200),
            lambda: client.unpin([ROOT], owner="x" * 200),
        ):
            with pytest.raises(ConfigError):
                call()
