"""The books of a session: what each fetch has lent, and when it ends."""

from __future__ import annotations

import asyncio

import pytest

from kvstore.service.ledger import Ledger
from kvstore.service.refusal import RefusalError
from kvstore.service.session import FETCHES_MAX, Session
from kvstore.testing.chunks import sample_key
from kvstore.tier import PutItem
from kvstore.tiers.dram import DramTier


def test_a_session_has_a_bounded_number_of_fetches() -> None:
    tier = DramTier(1 << 20)
    tier.put([PutItem(sample_key(1), memoryview(bytes(5000)))])

    async def use() -> None:
        session = Session(tier, tier.capacity_bytes, lease_ttl_seconds=60)
        ledgers = [session.open_fetch() for _ in range(FETCHES_MAX)]
        for ledger in ledgers:
            assert ledger.grant(sample_key(1), 0, 0, last=True) is not None
            session.end_fetch(ledger)
        with pytest.raises(RefusalError, match="not acknowledged"):
            session.open_fetch()
        session.acknowledge(ledgers[3].number, 1)
        assert session.open_fetch().number == FETCHES_MAX + 1
        session.acknowledge(10**9, 1)
        assert tier.usage().pinned_bytes > 0
        session.close()
        assert tier.usage().pinned_bytes == 0
        assert ledgers[0].grant(sample_key(1), 0, 0, last=True) is None

    asyncio.run(use())
    tier.close()


def test_a_ledger_lends_what_was_asked_for_or_nothing() -> None:
    tier = DramTier(1 << 20)
    tier.put([PutItem(sample_key(1), memoryview(bytes(5000))), PutItem(sample_key(2), memoryview(bytes(5000)))])

    async def use() -> None:
        ledger = Ledger(1, tier, "someone", ttl_seconds=60, bytes_max=6000)
        assert ledger.grant(sample_key(3), 0, 0, last=True) is None
        assert ledger.grant(sample_key(2), 0, 0, last=True) is None  # it lies elsewhere
        assert tier.usage().pinned_bytes == 0
        for _ in range(5):
            assert ledger.grant(sample_key(1), 0, 0, last=False) is not None
        assert ledger.has_room  # a chunk counts when its last layers have been sent
        ledger.grant(sample_key(1), 0, 0, last=True)
        ledger.grant(sample_key(2), 1, 8192, last=True)
        assert not ledger.has_room
        ledger.acknowledge(5)
        assert not ledger.has_room
        ledger.acknowledge(6)
        assert ledger.has_room
        ledger.acknowledge(10**6)  # more than were sent
        assert tier.usage().pinned_bytes == 0
        ledger.count()
        ledger.seal()
        assert not ledger.closed
        ledger.acknowledge(8)
        assert ledger.closed
        assert not await ledger.wait_for_room()

    asyncio.run(use())
    tier.close()
