"""Pages between vLLM's CPU memory and a store, in threads: jobs go in, each comes out once, whatever happens to it.

Every page that is loaded is verified where it lies. A job that is not done by its deadline, counted from when it was
given, ends as failed in what is missing; it never ends while its memory may still be read or written.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from kvstore.connectors.lanes import Lane
from kvstore.connectors.objects import milliseconds_until
from kvstore.connectors.pages import Page
from kvstore.connectors.vllm.tier_pages import TierPages
from kvstore.connectors.vllm.tier_settings import TierSettings
from kvstore.outcome import Miss, PutStatus, Reason

CLIENT_SECONDS = 60.0
"""How much longer than its deadline a client's call may take at most: it gives up connections, and tidies up."""

_NOT_BEGUN = "not begun by the deadline, or refused because too many jobs wait"
_NOT_LOADED = Miss(Reason.BUSY, _NOT_BEGUN)
_NOT_STORED = PutStatus(stored=False, reason=Reason.BUSY, detail=_NOT_BEGUN)

Rows = npt.NDArray[np.uint8]
"""vLLM's CPU memory, (pages, bytes of a page)."""


class FinishedJob(msgspec.Struct, frozen=True):
    """A job that has ended: the pages that are whole where they should be, those that are not, and how it went."""

    job_id: int
    load: bool
    done: tuple[bytes, ...]
    failed: tuple[bytes, ...]
    seconds: float
    counts: dict[str, int]

    @property
    def success(self) -> bool:
        """Whether every page is whole."""
        return not self.failed


class TierTransfers:
    """The jobs of one engine.

    Args:
        pages: the way to the store.
        rows: vLLM's CPU memory; (pages, bytes of a page).
        settings: deadlines, and how many threads load, and store.
    """

    def __init__(self, pages: TierPages, rows: Rows, settings: TierSettings) -> None:
        self._pages = pages
        self._rows: Rows | None = rows
        self._settings = settings
        self._loads: Lane[Miss | None, FinishedJob] = Lane("tier-load", settings.threads, _NOT_LOADED)
        self._stores: Lane[PutStatus, FinishedJob] = Lane("tier-store", settings.threads, _NOT_STORED)

    def load(self, job_id: int, names: Sequence[bytes], rows: Sequence[int]) -> None:
        """Bring pages into rows of the memory. Never waits."""
        targets = self._at(names, rows)
        begun = time.monotonic()

        def job(start: int, stop: int, deadline: float) -> list[Miss | None]:
            pages = self._pages.get(deadline)
            if isinstance(pages, Miss):
                return [pages] * (stop - start)
            return pages.load(targets[start:stop], deadline_ms=milliseconds_until(deadline))

        def finish(outcomes: list[Miss | None]) -> FinishedJob:
            counts = Counter("loaded" if miss is None else f"failed_{miss.reason}" for miss in outcomes)
            return _finished(job_id, True, names, [miss is None for miss in outcomes], begun, counts)

        deadline_seconds = self._settings.load_deadline_ms / 1e3
        self._loads.submit(job_id, len(names), job, finish, deadline_seconds=deadline_seconds)

    def store(self, job_id: int, names: Sequence[bytes], rows: Sequence[int]) -> None:
        """Put pages that lie in rows of the memory into the store. Never waits."""
        sources = self._at(names, rows)
        begun = time.monotonic()

        def job(start: int, stop: int, deadline: float) -> list[PutStatus]:
            pages = self._pages.get(deadline)
            if isinstance(pages, Miss):
                return [PutStatus(stored=False, reason=pages.reason, detail=pages.detail)] * (stop - start)
            return pages.store(sources[start:stop], deadline_ms=milliseconds_until(deadline))

        def finish(outcomes: list[PutStatus]) -> FinishedJob:
            return _finished(
                job_id, False, names, [put.stored for put in outcomes], begun, Counter(map(_word, outcomes))
            )

        deadline_seconds = self._settings.store_deadline_ms / 1e3
        self._stores.submit(job_id, len(names), job, finish, deadline_seconds=deadline_seconds)

    def finished(self) -> list[FinishedJob]:
        """The jobs that have ended since the last call."""
        return [*self._loads.take_all().values(), *self._stores.take_all().values()]

    def drain(self) -> bool:
        """Wait until no job reads or writes the memory any more; False if one has outstayed every deadline."""
        loads = self._loads.drain(self._settings.load_deadline_ms / 1e3 + CLIENT_SECONDS)
        return self._stores.drain(self._settings.store_deadline_ms / 1e3 + CLIENT_SECONDS) and loads

    def close(self) -> None:
        """Begin nothing more, wait for what runs, and let go of the memory. Idempotent."""
        self._loads.close()
        self._stores.close()
        self._rows = None

    def _at(self, names: Sequence[bytes], rows: Sequence[int]) -> list[Page]:
        """Pages by their places in the memory."""
        assert self._rows is not None, "the tier has been shut down"
        memory: Any = self._rows  # to mypy an array's rows are no buffers
        return [Page(name.hex(), (memoryview(memory[row]),)) for name, row in zip(names, rows, strict=True)]


def _finished(
    job_id: int, load: bool, names: Sequence[bytes], whole: Sequence[bool], begun: float, counts: Counter[str]
) -> FinishedJob:
    return FinishedJob(
        job_id=job_id,
        load=load,
        done=tuple(name for name, good in zip(names, whole, strict=True) if good),
        failed=tuple(name for name, good in zip(names, whole, strict=True) if not good),
        seconds=time.monotonic() - begun,
        counts=dict(counts),
    )


def _word(put: PutStatus) -> str:
    """The counter of what became of one page."""
    if put.existed:
        return "existing"
    return "saved" if put.stored else f"unsaved_{put.reason}"
