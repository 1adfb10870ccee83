"""Fetch in chunk order: windows of chunks, the next one read while the caller consumes this one."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Executor, Future

import msgspec

from kvstore.client import Origin
from kvstore.container import Header, Segment
from kvstore.errors import ContainerError
from kvstore.levels import parse_up_to
from kvstore.loan import Loan, Standby, holds_room
from kvstore.movers import Movers, begin, collected, give_back
from kvstore.outcome import Miss
from kvstore.partial_reading import borrow_up_to
from kvstore.promotion import Promoter

WINDOWS_AHEAD = 2
"""Windows of a fetch started at once: one being consumed, one being read."""


class Step(msgspec.Struct, frozen=True):
    """One step of a fetch inside the process: a miss, or layer groups of a chunk that `view` lends until the next step.

    `offset` is where `view` starts in the memory of an addressable tier, None if it lies elsewhere. `first` and `last`
    mark the first and last step of this chunk. `origin` is set where a lossy chunk has been decoded.
    """

    index: int
    miss: Miss | None = None
    header: Header | None = None
    groups: tuple[tuple[Segment, ...], ...] = ()
    view: memoryview = memoryview(b"")
    offset: int | None = None
    tier: str = ""
    first: bool = True
    last: bool = True
    origin: Origin | None = None


def chunk_steps(
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
    """Every chunk as one step, in order; the next window of chunks is read while the caller consumes this one."""
    waiting = windows(keys, sizes(keys), window_bytes)
    started: deque[_Window] = deque()
    try:
        while True:
            while len(started) < WINDOWS_AHEAD and (indices := next(waiting, None)) is not None:
                started.append(_Window(promoter, movers.seekers, indices, keys, deadline, min_quality, max_quality))
            if not started:
                return
            yield from started[0].steps()
            started.popleft()
    finally:
        for window in started:
            window.release()


class _Window:
    """Consecutive chunks of a fetch. What is in memory is leased at once, without a thread hop; movers read others.

    Until its turn has come a window keeps no room outside memory from anybody who waits for such room: what it has read
    into it is given up then, and read again.
    """

    def __init__(
        self,
        promoter: Promoter,
        movers: Executor,
        indices: list[int],
        keys: Sequence[bytes],
        deadline: float,
        min_quality: int,
        max_quality: int | None,
    ) -> None:
        self._promoter = promoter
        self._movers = movers
        self._deadline = deadline
        self._min_quality = min_quality
        self._level_max = max_quality
        self._lock = threading.Lock()
        self._ahead = True
        self._standby: Standby | None = None
        self._outcomes: dict[int, Loan | Miss] = {}
        self._indices = indices
        for index in indices:
            loan = promoter.lease(keys[index], min_quality=min_quality)
            if loan is not None:
                self._outcomes[index] = loan
        self._rest = [index for index in indices if index not in self._outcomes]
        self._keys = [keys[index] for index in self._rest]
        self._reading = self._begin(self._keys) if self._rest else None

    def steps(self) -> Iterator[Step]:
        """One step a chunk; each loan ends when the caller asks for the next step."""
        for index in self._indices:
            if index not in self._outcomes:
                self._collect()
            outcome = self._outcomes.pop(index)
            if isinstance(outcome, Miss):
                yield Step(index, outcome)
            else:
                with outcome:
                    yield _whole(index, outcome, self._level_max)

    def release(self) -> None:
        """Give back everything that was not consumed, now or once it has been read."""
        for outcome in self._outcomes.values():
            if isinstance(outcome, Loan):
                outcome.release()
        self._outcomes.clear()
        self._come()
        if self._reading is not None:
            give_back(self._reading)

    def _begin(self, keys: list[bytes]) -> Future[list[Loan | Miss | None]]:
        return begin(self._movers, self._read, keys)

    def _read(self, keys: list[bytes]) -> list[Loan | Miss | None]:
        """Read chunks, on a mover's thread. An outcome becomes None if its room is given up before its turn comes."""
        outcomes: list[Loan | Miss | None] = [
            *borrow_up_to(self._promoter, keys, self._level_max, deadline=self._deadline, min_quality=self._min_quality)
        ]
        with self._lock:
            if self._ahead and holds_room(outcomes):
                self._standby = Standby(self._promoter.transient, outcomes)
        return outcomes

    def _come(self) -> None:
        """The turn has come, or will not: what has been read stays as it is from now on."""
        with self._lock:
            self._ahead = False
        if self._standby is not None:
            self._standby.end()

    def _collect(self) -> None:
        assert self._reading is not None
        self._come()
        outcomes = collected(self._reading, len(self._rest), self._deadline)
        given_up = [at for at, outcome in enumerate(outcomes) if outcome is None]
        if given_up:
            self._reading = self._begin([self._keys[at] for at in given_up])
            again = collected(self._reading, len(given_up), self._deadline)
            for at, outcome in zip(given_up, again, strict=True):
                outcomes[at] = outcome
        self._reading = None
        for index, outcome in zip(self._rest, outcomes, strict=True):
            assert outcome is not None, "only what is ahead is given up"
            self._outcomes[index] = outcome


def _whole(index: int, loan: Loan, level_max: int | None) -> Step:
    try:
        header = parse_up_to(loan.view, level_max, available=len(loan.view))
    except ContainerError as error:
        return Step(index, Miss(error.reason, error.detail))
    return Step(index, None, header, tuple(header.groups()), loan.view[: header.total_bytes], loan.offset, loan.tier)


def windows(keys: Sequence[bytes], sizes: list[int], window_bytes: int) -> Iterator[list[int]]:
    """Indices of consecutive chunks that together have at most `window_bytes`, or of one larger chunk."""
    window: list[int] = []
    total = 0
    for index, nbytes in enumerate(sizes):
        if window and total + nbytes > window_bytes:
            yield window
            window, total = [], 0
        window.append(index)
        total += nbytes
    if window:
        yield window
