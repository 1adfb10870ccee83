"""Places in a volume: the limit on entries, readers of deleted chunks, quarantine, and what must settle first."""

from __future__ import annotations

from kvstore.outcome import Reason
from kvstore.testing.harness import key_of
from kvstore.tiers.extents import ExtentAllocator
from kvstore.tiers.groupcommit import Ticket
from kvstore.tiers.index import ChunkEntry
from kvstore.tiers.packed_index import new_index
from kvstore.tiers.records import Operation
from kvstore.tiers.volume_space import Reservation, VolumeSpace

PAGE = 4096


def new_space(pages: int = 8, entries_max: int = 100) -> VolumeSpace:
    """An empty space."""
    return VolumeSpace(ExtentAllocator(pages * PAGE), new_index(), entries_max)


def fill(space: VolumeSpace, number: int, pages: int, evictions: Ticket | None = None) -> Reservation | None:
    """Reserve and publish a chunk."""
    ticket = evictions or Ticket()
    reservation, _ = space.reserve(ChunkEntry(key_of(number), 0, pages * PAGE), 0.0, ticket)
    if isinstance(reservation, Reason):
        return None
    space.publish(reservation.entry)
    return reservation


def held(space: VolumeSpace) -> list[bytes]:
    """Keys in the index."""
    return [entry.key for entry in space.index]


def test_the_limit_on_entries_evicts_though_there_is_room() -> None:
    space = new_space(entries_max=2)
    evictions = Ticket()
    for number in range(3):
        assert fill(space, number, 1, evictions) is not None
    assert held(space) == [key_of(1), key_of(2)]
    assert evictions.operations == [Operation(key_of(0), None)]


def test_the_limit_on_entries_counts_what_is_being_filled() -> None:
    space = new_space(entries_max=1)
    first, _ = space.reserve(ChunkEntry(key_of(1), 0, PAGE), 0.0, Ticket())
    assert isinstance(first, Reservation)
    assert space.reserve(ChunkEntry(key_of(2), 0, PAGE), 0.0, Ticket()) == (Reason.FULL, [])
    space.abandon(first.entry, quarantine=False)
    assert fill(space, 2, 1) is not None


def test_an_evicted_extent_waits_for_its_own_deletion_only() -> None:
    space = new_space(pages=4)
    fill(space, 1, 2)
    fill(space, 2, 2)
    first, second = Ticket(), Ticket()
    one = fill(space, 3, 2, first)
    two = fill(space, 4, 2, second)
    assert one is not None
    assert two is not None
    assert one.waits == [first]
    assert two.waits == [second]
    space.settle(first)
    third = Ticket()
    again = fill(space, 5, 1, third)
    assert again is not None
    assert again.waits == [third]
    rest = fill(space, 6, 1)
    assert rest is not None
    assert rest.waits == [third], "the other page of the evicted extent waits too"


def test_a_deleted_chunk_keeps_its_place_while_it_is_read() -> None:
    space = new_space(pages=2)
    reservation = fill(space, 1, 2)
    assert reservation is not None
    entry = reservation.entry
    space.index.start_reading(entry)
    space.index.start_reading(entry)
    space.remove(entry, Ticket())
    assert fill(space, 2, 1) is None
    space.stop_reading(entry)
    assert space.usage(0.0).used_bytes == 2 * PAGE
    space.stop_reading(entry)
    assert space.usage(0.0).used_bytes == 0
    assert fill(space, 2, 2) is not None


def test_a_quarantined_place_is_not_used_again() -> None:
    space = new_space(pages=2)
    reservation = fill(space, 1, 1)
    assert reservation is not None
    space.index.start_reading(reservation.entry)
    space.remove(reservation.entry, Ticket(), quarantine=True)
    space.stop_reading(reservation.entry)
    assert space.usage(0.0).used_bytes == PAGE
    assert fill(space, 2, 2) is None
    other = fill(space, 3, 1)
    assert other is not None
    assert other.entry.offset != reservation.entry.offset


def test_evicting_ahead_never_goes_beyond_the_room_asked_for() -> None:
    space = new_space(pages=8)
    for number in range(4):
        fill(space, number, 2)
    assert space.evict_ahead(PAGE, 0.0, Ticket()) == []
    victims = space.evict_ahead(5 * PAGE, 0.0, Ticket())
    assert [entry.key for entry in victims] == [key_of(0), key_of(1)]
    assert space.evict_ahead(5 * PAGE, 0.0, Ticket()) == []
