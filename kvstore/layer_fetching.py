"""Fetch in layer order: the first layers of all chunks, then the next layers of all chunks, and so on.

Chunks in memory are leased. The others are read straight into their place in memory, one layer group of all chunks at a
time, the next group while the caller consumes this one. Each segment is verified before it is handed on, and a chunk is
published for other readers once it is whole.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import CancelledError, Executor, Future
from concurrent.futures import TimeoutError as FutureTimeoutError

from kvstore import container
from kvstore.container import Header, Segment
from kvstore.errors import ContainerError
from kvstore.fetching import Step, windows
from kvstore.levels import up_to_level
from kvstore.loan import Loan
from kvstore.movers import CLOSED, Movers, begin
from kvstore.outcome import Miss
from kvstore.places import Place, wanted_from
from kvstore.promotion import ABSENT, HEAD_READ_BYTES, LATE, Promoter
from kvstore.tier import IO_ALIGN, ReadItem, Tier


class _Load:
    """One chunk of the fetch: its bytes are lent (`loan`), or being read from `tier` into `place`."""

    __slots__ = ("cut", "groups", "header", "index", "key", "level_max", "loan", "place", "tier")

    def __init__(self, index: int, key: bytes, level_max: int | None) -> None:
        self.index = index
        self.key = key
        self.level_max = level_max
        self.cut = False
        self.loan: Loan | None = None
        self.place: Place | None = None
        self.tier: Tier | None = None
        self.header: Header | None = None
        self.groups: list[tuple[Segment, ...]] = []

    @property
    def view(self) -> memoryview:
        """The chunk's bytes, as far as they are there."""
        if self.loan is not None:
            return self.loan.view
        assert self.place is not None
        return self.place.view.toreadonly()

    def accept_header(self) -> None:
        """Parse the header out of the bytes that are there. Raises ContainerError."""
        whole = container.parse(self.view)
        container.expect(whole, key=self.key)
        self.header = whole if self.level_max is None else up_to_level(whole, self.level_max)
        self.cut = self.header is not whole
        self.groups = self.header.groups()

    def step(self, round_index: int) -> Step:
        """What to tell the caller about one layer group."""
        assert self.header is not None
        return Step(
            self.index,
            None,
            self.header,
            (self.groups[round_index],),
            self.view[: self.header.total_bytes],
            self.loan.offset if self.loan is not None else None,
            self.loan.tier if self.loan is not None else "",
            round_index == 0,
            round_index == len(self.groups) - 1,
        )


def layer_steps(
    promoter: Promoter,
    movers: Movers,
    keys: Sequence[bytes],
    sizes: Callable[[Sequence[bytes]], list[int]],
    *,
    window_bytes: int,
    deadline: float,
    min_quality: int = 0,
    max_quality: int | None = None,
) -> Generator[Step, None, None]:
    """Layer groups of all chunks of a window, then of the next: all of a window's chunks are held at once."""
    for indices in windows(keys, sizes(keys), window_bytes):
        chunks = [(index, keys[index]) for index in indices]
        yield from LayerFetch(
            promoter, movers, chunks, deadline=deadline, min_quality=min_quality, max_quality=max_quality
        ).steps()


class LayerFetch:
    """One window in layer order. `steps` is used once.

    Args:
        promoter: where chunks are leased, placed and read from.
        movers: threads for the reads.
        chunks: (index, key) of the chunks wanted.
        deadline: time.monotonic seconds; what has not been read by then is a miss.
        min_quality: a chunk stored below it is a miss.
        max_quality: the highest level wanted, None for all; a chunk cut by it is not published.
    """

    def __init__(
        self,
        promoter: Promoter,
        movers: Movers,
        chunks: Sequence[tuple[int, bytes]],
        *,
        deadline: float,
        min_quality: int = 0,
        max_quality: int | None = None,
    ) -> None:
        self._promoter = promoter
        self._movers = movers
        self._deadline = deadline
        self._min_quality = min_quality
        self._loads = [_Load(index, key, max_quality) for index, key in chunks]
        self._reading: Future[dict[int, Miss]] | None = None
        self._given_up = False

    def steps(self) -> Iterator[Step]:
        """The steps; closing the iterator releases everything."""
        try:
            misses = self._open()
            active = self._loads
            round_index = 0
            while active:
                for load in active:
                    if load.index in misses:
                        if not self._given_up:
                            self._end(load)
                        yield Step(load.index, misses[load.index], first=round_index == 0)
                active = [load for load in active if load.index not in misses]
                if self._given_up:
                    return  # all of them have missed
                if round_index == 0:
                    self._start(self._movers.holders, self._read_round, active, 0)
                misses = self._collect(active)
                arrived = [load for load in active if load.index not in misses]
                further = [load for load in arrived if len(load.groups) > round_index + 1]
                if not self._given_up:
                    self._start(self._movers.holders, self._read_round, further, round_index + 1)
                for load in arrived:
                    yield load.step(round_index)
                    if load not in further:
                        self._finish(load)
                active = further + [load for load in active if load.index in misses]
                round_index += 1
        finally:
            # A read that still runs writes into places that must not be given back under it.
            if self._reading is not None:
                self._reading.add_done_callback(lambda _: self._end_all())
            else:
                self._end_all()

    def _start(
        self,
        movers: Executor,
        read: Callable[[list[_Load], int], dict[int, Miss]],
        loads: list[_Load],
        round_index: int,
    ) -> None:
        """Let a mover read for those of `loads` that are not lent; what is in memory costs no thread hop."""
        behind = [load for load in loads if load.loan is None]
        self._reading = begin(movers, read, behind, round_index) if behind else None

    def _collect(self, loads: list[_Load]) -> dict[int, Miss]:
        """The misses of the read that was started last; at the deadline everything not lent is one."""
        if self._reading is None:
            return {}
        try:
            misses = self._reading.result(timeout=max(0.0, self._deadline - time.monotonic()))
        except FutureTimeoutError:
            self._reading.cancel()
            self._given_up = True
            return {load.index: LATE for load in loads}
        except CancelledError:
            self._given_up = True
            return {load.index: CLOSED for load in loads}
        self._reading = None
        return misses

    def _open(self) -> dict[int, Miss]:
        """Lease every chunk that is in memory, place the others and read their headers. Answers the misses."""
        for load in self._loads:
            load.loan = self._promoter.lease(load.key, min_quality=self._min_quality)
        self._start(self._movers.seekers, lambda loads, _: self._open_below(loads), self._loads, 0)
        misses = self._collect(self._loads)
        for load in self._loads:
            if load.loan is not None and load.index not in misses:
                try:
                    load.accept_header()
                except ContainerError as error:
                    misses[load.index] = Miss(error.reason, error.detail)
            if load.header is not None and load.index not in misses:
                poor = self._promoter.poor(load.header, self._min_quality)
                if poor is not None:
                    misses[load.index] = poor
        return misses

    def _open_below(self, loads: list[_Load]) -> dict[int, Miss]:
        """Lease what others are reading, find places for the rest and read their headers. Answers the misses.

        What another fetch in layer order is reading is not waited for: that goes on as its caller does. Its slot is
        taken, so ours is a transient buffer. Waiting comes first, when nothing is held that others may wait for.
        """
        misses = self._join(loads)
        left = [load for load in loads if load.loan is None and load.index not in misses]
        for tier in self._promoter.lower:
            chunks = wanted_from(tier, [load.key for load in left])
            found = [(load, chunk) for load, chunk in zip(left, chunks, strict=True) if chunk is not None]
            left = [load for load, chunk in zip(left, chunks, strict=True) if chunk is None]
            holds_room = any(load.place is not None and load.place.transient for load in loads)
            places = self._promoter.places(
                [chunk for _, chunk in found],
                deadline=0.0 if holds_room else self._deadline,
                min_quality=self._min_quality,
            )
            for (load, _), place in zip(found, places, strict=True):
                if isinstance(place, Miss):
                    misses[load.index] = place
                elif isinstance(place, Loan):
                    load.loan = place
                else:
                    load.place, load.tier = place, tier
            self._read_heads(tier, [load for load in loads if load.tier is tier], misses)
        return misses | {load.index: ABSENT for load in left}

    def _join(self, loads: list[_Load]) -> dict[int, Miss]:
        """Lease chunks that others are reading into memory, once they are there. Answers the misses."""
        misses: dict[int, Miss] = {}
        for load in loads:
            flight = self._promoter.flight(load.key)
            if flight is None:
                continue
            if not flight.done.wait(max(0.0, self._deadline - time.monotonic())):
                misses[load.index] = LATE
                continue
            load.loan = self._promoter.lease(load.key, min_quality=self._min_quality)
            if load.loan is None and flight.miss is not None:
                misses[load.index] = flight.miss
        return misses

    def _read_heads(self, tier: Tier, loads: list[_Load], misses: dict[int, Miss]) -> None:
        reads = [_read_item(load, 0, HEAD_READ_BYTES) for load in loads]
        for load, outcome in zip(loads, tier.read(reads), strict=True):
            if isinstance(outcome, Miss):
                misses[load.index] = outcome
                continue
            try:
                header_bytes = container.peek_header_bytes(load.view)
                if header_bytes > HEAD_READ_BYTES:
                    (more,) = tier.read([_read_item(load, 0, header_bytes)])
                    if isinstance(more, Miss):
                        misses[load.index] = more
                        continue
                load.accept_header()
            except ContainerError as error:
                misses[load.index] = self._promoter.quarantine(tier, load.key, error)

    def _read_round(self, loads: list[_Load], round_index: int) -> dict[int, Miss]:
        """Read and verify one layer group of every chunk that is not lent; answers the misses."""
        misses: dict[int, Miss] = {}
        for tier in self._promoter.lower:
            owners: list[tuple[_Load, Segment]] = []
            for load in loads:
                if load.tier is tier:
                    owners += [(load, segment) for segment in load.groups[round_index]]
            reads = [_read_item(load, segment.offset, segment.offset + segment.length) for load, segment in owners]
            for (load, segment), outcome in zip(owners, tier.read(reads), strict=True):
                if isinstance(outcome, Miss):
                    misses[load.index] = outcome
                    continue
                try:
                    container.check_segment(segment, load.view[segment.offset : segment.offset + segment.length])
                except ContainerError as error:
                    misses[load.index] = self._promoter.quarantine(tier, load.key, error)
        return misses

    def _finish(self, load: _Load) -> None:
        """A chunk has been consumed: publish it if we have read all of it, and end."""
        if load.place is not None and load.tier is not None:
            nbytes = load.header.total_bytes if load.cut and load.header is not None else load.place.nbytes
            self._promoter.hit(load.tier, nbytes)
            if not load.cut:
                published = self._promoter.publish(load.key, load.place)
                load.loan, load.place = (published if isinstance(published, Loan) else None), None
        self._end(load)

    def _end(self, load: _Load) -> None:
        if load.loan is not None:
            load.loan.release()
        if load.place is not None:
            load.place.abort()
        load.loan, load.place = None, None

    def _end_all(self) -> None:
        for load in self._loads:
            self._end(load)


def _read_item(load: _Load, start: int, stop: int) -> ReadItem:
    """The read of bytes start..stop of a chunk into their place, widened to what direct I/O wants."""
    assert load.place is not None
    start = start // IO_ALIGN * IO_ALIGN
    stop = min(container.align(stop, IO_ALIGN), len(load.place.padded))
    return ReadItem(load.key, load.place.padded[start:stop], start)
