"""How much may be pinned, and who gives way: against a plain model, and through the daemon."""

from __future__ import annotations

import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from unittest import mock

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvstore import pins as pins_module
from kvstore.client import Client
from kvstore.compose import open_store
from kvstore.config import Config, TierConfig
from kvstore.connect import connect
from kvstore.context import Context
from kvstore.embedded import EmbeddedClient
from kvstore.errors import ConfigError
from kvstore.outcome import Reason
from kvstore.pins import Pins
from kvstore.protocol import PinReply
from kvstore.store import Store
from kvstore.store_settings import StoreSettings
from kvstore.testing.chunks import sample_container, sample_keys, sample_spec
from kvstore.testing.client_harness import put_chunk
from kvstore.testing.harness import FakeClock, item, key_of, put
from kvstore.testing.serving import ServerThread
from kvstore.tier import IO_ALIGN
from kvstore.tiers.dram import DramTier

PAGES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 3, 5: 1}
WHERE = ({0, 1, 2, 3, 4, 5}, {0, 2, 4})
"""Which of these chunks the first and the second tier have."""
BOUND_PAGES = (5, 4)
OWNERS = ("a", "b")


class Model:
    """Pins as plain data: chunk -> owner -> (end, priority); and the chunks that are pinned in each tier."""

    def __init__(self, clock: FakeClock) -> None:
        self.clock = clock
        self.pins: dict[int, dict[str, tuple[float, int]]] = {}
        self.held: tuple[set[int], set[int]] = (set(), set())

    def rank(self, number: int) -> tuple[int, float, bytes]:
        """Who gives way first."""
        pins = self.pins[number].values()
        live = [priority for end, priority in pins if end > self.clock.now]
        return max(live, default=-1), max(end for end, _ in pins), key_of(number)

    def pin(self, numbers: list[int], owner: str, end: float, priority: int) -> list[Reason | None]:
        """What becomes of the pins."""
        outcomes: list[Reason | None] = []
        for number in numbers:
            if number not in PAGES:
                outcomes.append(Reason.ABSENT)
            elif Reason.FULL in outcomes or (victims := self.victims(number, priority)) is None:
                outcomes.append(Reason.FULL)
            else:
                for victim in victims:
                    self.forget(victim)
                for tier, there in enumerate(WHERE):
                    if number in there:
                        self.held[tier].add(number)
                old_end, old_priority = self.pins.setdefault(number, {}).get(owner, (0.0, 0))
                self.pins[number][owner] = (max(end, old_end), max(priority, old_priority))
                outcomes.append(None)
        return outcomes

    def victims(self, number: int, priority: int) -> list[int] | None:
        """Whose pins end for this one; None if that is not enough."""
        leaving: list[int] = []
        for tier, there in enumerate(WHERE):
            if number not in there or number in self.held[tier]:
                continue
            lower = sorted((one for one in self.held[tier] if self.rank(one)[0] < priority), key=self.rank)
            for one in [None, *lower]:
                if one is not None and one not in leaving:
                    leaving.append(one)
                staying = self.held[tier] - set(leaving)
                if sum(PAGES[one] for one in staying) + PAGES[number] <= BOUND_PAGES[tier]:
                    break
            else:
                return None
        return leaving

    def forget(self, number: int) -> None:
        """No pins on it any more."""
        self.pins.pop(number, None)
        for held in self.held:
            held.discard(number)

    def unpin(self, number: int, owner: str) -> bool:
        """End one owner's pin."""
        end, _ = self.pins.get(number, {}).pop(owner, (0.0, 0))
        if not self.pins.get(number):
            self.forget(number)
        return end > self.clock.now


@contextmanager
def bounded_pins() -> Iterator[tuple[Pins, list[DramTier], FakeClock]]:
    """Pins over two tiers of 40 and 32 pages, an eighth of which may be pinned."""
    clock = FakeClock()
    tiers = [DramTier(8 * pages * IO_ALIGN, clock=clock, name=str(pages)) for pages in BOUND_PAGES]
    for tier, there in zip(tiers, WHERE, strict=True):
        tier.put([item(number, PAGES[number] * IO_ALIGN) for number in sorted(there)])
    with mock.patch.object(pins_module, "time", SimpleNamespace(monotonic=clock)):
        yield Pins(tiers, share_max=0.125), tiers, clock
    for tier in tiers:
        tier.close()


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_the_lowest_pins_give_way_and_no_more_than_are_needed(data: st.DataObject) -> None:
    with bounded_pins() as (pins, tiers, clock):
        model = Model(clock)
        for _ in range(data.draw(st.integers(1, 25))):
            numbers = data.draw(st.lists(st.integers(0, len(PAGES)), max_size=4, unique=True))
            keys = [key_of(number) for number in numbers]
            owner = data.draw(st.sampled_from(OWNERS))
            verb = data.draw(st.sampled_from(["pin", "pin", "pin", "unpin", "wait", "forget"]))
            if verb == "pin":
                end = clock.now + data.draw(st.sampled_from([1.0, 10.0, 100.0]))
                priority = data.draw(st.integers(0, 3))
                found = [
                    miss and miss.reason for miss in pins.pin(keys, owner=owner, expires_at=end, priority=priority)
                ]
                assert found == model.pin(numbers, owner, end, priority)
            elif verb == "unpin":
                assert pins.unpin(keys, owner=owner) == [model.unpin(number, owner) for number in numbers]
            elif verb == "wait":
                clock.advance(data.draw(st.sampled_from([0.5, 5.0, 50.0])))
            else:
                pins.forget(keys)
                for tier, there in zip(tiers, WHERE, strict=True):
                    tier.delete(keys)
                    tier.put([item(number, PAGES[number] * IO_ALIGN) for number in sorted(there & set(numbers))])
                for number in numbers:
                    model.forget(number)
            live = {number for number in model.pins if model.rank(number)[0] >= 0}
            for tier, held, bound in zip(tiers, model.held, BOUND_PAGES, strict=True):
                assert tier.usage().pinned_bytes == sum(PAGES[number] for number in held & live) * IO_ALIGN
                assert tier.usage().pinned_bytes <= bound * IO_ALIGN
            assert len(pins) == sum(len(owners) for owners in model.pins.values())


def test_a_chunk_that_comes_to_a_tier_is_pinned_there_if_there_is_room() -> None:
    with bounded_pins() as (pins, (first, second), clock):
        second.delete([key_of(number) for number in PAGES])
        keys = [key_of(number) for number in (0, 2)]
        assert pins.pin(keys, owner="a", expires_at=clock.now + 10, priority=9) == [None, None]
        for number, pages in ((0, 3), (2, 2)):
            put(second, number, pages * IO_ALIGN)
            pins.apply(key_of(number), second)
        assert second.usage().pinned_bytes == 3 * IO_ALIGN, "there is no room for the pin on chunk 2"
        clock.advance(11)
        put(second, 7, IO_ALIGN)
        assert pins.pin([key_of(7)], owner="b", expires_at=clock.now + 10) == [None], "what has ended takes no room"
        assert first.usage().pinned_bytes == 0


def test_pins_that_left_with_their_chunks_take_no_room() -> None:
    with bounded_pins() as (pins, (first, _), clock):
        assert pins.pin([key_of(3), key_of(4)], owner="a", expires_at=clock.now + 10) == [None, None]
        first.delete([key_of(3), key_of(4)])  # as a quarantine does
        assert pins.pin([key_of(1), key_of(5)], owner="b", expires_at=clock.now + 10) == [None, None]


@pytest.fixture
def client() -> Iterator[Client]:
    config = Config(
        tiers={"dram": TierConfig(capacity="1MiB", policy="lru")}, store=StoreSettings(pinned_share_max=0.5)
    )
    with EmbeddedClient(open_store(config)) as client:
        yield client


def test_contexts_of_a_higher_priority_displace_others_and_puts_go_on(client: Client) -> None:
    spec = sample_spec(layers=2, kv_heads=4, dim=64)
    keys = sample_keys(24)
    for key in keys[:10]:
        assert client.put([put_chunk(key, sample_container(key, spec=spec, tokens=32))])[0].stored
    nbytes = len(sample_container(keys[0], spec=spec, tokens=32))
    fit = (512 << 10) // (-(-nbytes // IO_ALIGN) * IO_ALIGN)
    assert 3 < fit < 10, "half of the tier holds some of them"
    low = Context(client, keys[:10])
    assert low.renew() == fit
    assert client.stats()["counters"]["pins_refused"]["full"] > 0
    high = Context(client, keys[7:10], priority=7)
    assert high.renew() == 3
    assert client.stats()["counters"]["pins_displaced"] == {"": 3}
    for key in keys[10:]:
        assert client.put([put_chunk(key, sample_container(key, spec=spec, tokens=32))])[0].stored
    assert all(info is not None for info in client.head(keys[7:10])), "pinned chunks stay"
    low.close()
    high.close()
    assert client.stats()["tiers"]["dram"]["usage"]["pinned_bytes"] == 0


@pytest.mark.parametrize("priority", [-1, 256])
def test_a_priority_out_of_range_is_the_callers_mistake(client: Client, priority: int) -> None:
    with pytest.raises(ConfigError, match=r"of a pin it must be in 0\.\.255"):
        client.pin(sample_keys(1), ttl_seconds=1, priority=priority)


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_out_of_range_is_refused(share: float) -> None:
    with pytest.raises(ConfigError, match=r"store\.pinned_share_max is .*; it must be in 0\.\.1"):
        StoreSettings(pinned_share_max=share)


def test_the_daemon_says_why_a_chunk_is_not_pinned() -> None:
    store = Store([DramTier(16 * IO_ALIGN)], StoreSettings(pinned_share_max=0.25))
    keys = sample_keys(3)
    with ServerThread(store) as server, connect(server.http_url) as client:
        for key in keys:
            assert client.put([put_chunk(key, sample_container(key, spec=sample_spec(layers=1), tokens=1))])[0].stored
        assert client.pin(keys[:2], ttl_seconds=60, owner="low") == [True, True]
        body = {"keys": [key.hex() for key in [*keys, bytes(32)]], "ttl_seconds": 60, "owner": "other"}
        request = urllib.request.Request(f"{server.http_url}/v1/pin", msgspec.json.encode(body))
        with urllib.request.urlopen(request, timeout=20) as answer:
            reply = msgspec.json.decode(answer.read(), type=PinReply)
        assert reply.found == [True, True, False, False]
        assert [miss and miss.reason for miss in reply.misses] == [None, None, Reason.FULL, Reason.ABSENT]
        assert reply.misses[2] is not None
        assert "16.0 KiB of dram may be pinned" in reply.misses[2].detail
        assert client.pin([keys[2]], ttl_seconds=60, owner="high", priority=255) == [True]
        assert client.unpin(keys[:2], owner="low").count(True) == 1
