"""Pins with owners, against a plain model: a chunk stays exactly as long as somebody wants it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from unittest import mock

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvstore import pins as pins_module
from kvstore.pins import Pins
from kvstore.testing.harness import FakeClock, item, key_of
from kvstore.tier import IO_ALIGN
from kvstore.tiers.dram import DramTier

CHUNKS = 4
OWNERS = ("", "a", "b")


@contextmanager
def pinned_tier(pins_max: int = 1000) -> Iterator[tuple[Pins, DramTier, FakeClock]]:
    """Pins over one tier that holds chunks 0..3, of a page each, and a clock for both."""
    clock = FakeClock()
    tier = DramTier(16 * IO_ALIGN, clock=clock)
    tier.put([item(number, 100) for number in range(CHUNKS)])
    with mock.patch.object(pins_module, "time", SimpleNamespace(monotonic=clock)):
        yield Pins([tier], pins_max=pins_max), tier, clock
    tier.close()


def pinned(pins: Pins, keys: list[bytes], *, owner: str, expires_at: float) -> list[bool]:
    """Which chunks could be pinned."""
    return [miss is None for miss in pins.pin(keys, owner=owner, expires_at=expires_at)]


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_a_chunk_is_pinned_as_long_as_an_owner_wants_it(data: st.DataObject) -> None:
    with pinned_tier() as (pins, tier, clock):
        wanted: dict[tuple[int, str], float] = {}
        for _ in range(data.draw(st.integers(1, 25))):
            numbers = data.draw(st.lists(st.integers(0, CHUNKS), max_size=4))
            keys = [key_of(number) for number in numbers]
            owner = data.draw(st.sampled_from(OWNERS))
            verb = data.draw(st.sampled_from(["pin", "pin", "unpin", "wait", "forget"]))
            if verb == "pin":
                expires_at = clock.now + data.draw(st.sampled_from([1.0, 10.0, 100.0]))
                held = [number < CHUNKS for number in numbers]
                assert pinned(pins, keys, owner=owner, expires_at=expires_at) == held
                for number, there in zip(numbers, held, strict=True):
                    if there:
                        wanted[number, owner] = max(expires_at, wanted.get((number, owner), 0.0))
            elif verb == "unpin":
                ended = [wanted.pop((number, owner), 0.0) > clock.now for number in numbers]
                assert pins.unpin(keys, owner=owner) == ended
            elif verb == "wait":
                clock.advance(data.draw(st.sampled_from([0.5, 5.0, 50.0])))
            else:
                tier.delete(keys)
                pins.forget(keys)
                wanted = {place: at for place, at in wanted.items() if place[0] not in numbers}
                tier.put([item(number, 100) for number in range(CHUNKS)])
            kept = {number for (number, _), at in wanted.items() if at > clock.now}
            assert tier.usage().pinned_bytes == len(kept) * IO_ALIGN
            assert len(pins) == len(wanted)


def test_there_is_room_for_so_many_and_expired_ones_make_room() -> None:
    with pinned_tier(pins_max=3) as (pins, _, clock):
        keys = [key_of(number) for number in range(CHUNKS)]
        assert pinned(pins, keys, owner="a", expires_at=clock.now + 10) == [True, True, True, False]
        assert pinned(pins, keys[:1], owner="b", expires_at=clock.now + 10) == [False]
        assert pinned(pins, keys[:1], owner="a", expires_at=clock.now + 20) == [True]
        clock.advance(15)
        assert pinned(pins, keys[1:3], owner="b", expires_at=clock.now + 10) == [True, True]
        assert len(pins) == 3


def test_a_tier_that_gets_a_pinned_chunk_pins_it() -> None:
    with pinned_tier() as (pins, _, clock):
        late = DramTier(16 * IO_ALIGN, clock=clock)
        late.put([item(0, 100), item(1, 100)])
        pins.pin([key_of(0)], owner="a", expires_at=clock.now + 10)
        for number in range(2):
            pins.apply(key_of(number), late)
        assert late.unpin([key_of(0), key_of(1)]) == [True, False]
        late.close()
