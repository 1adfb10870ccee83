"""What a chunk on its way up has: a flight, a place to be read to, and what its lower tier says of it."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import NamedTuple, cast

from kvstore.loan import Loan, TransientBuffer
from kvstore.outcome import Miss
from kvstore.tier import Slot, Tier


class Flight:
    """One chunk being read by one thread, which waits for no consumer. `miss` is set if it could not be."""

    __slots__ = ("done", "miss")

    def __init__(self) -> None:
        self.done = threading.Event()
        self.miss: Miss | None = None


class Place:
    """Where a chunk is read to: a slot in the memory tier, or a transient buffer when the tier has no room for it.

    `tenant` is whose quota it counts against in the tier that it is written through to.
    """

    __slots__ = ("_buffer", "_slot", "_tier", "nbytes", "tenant")

    def __init__(
        self, tier: str, nbytes: int, slot: Slot | None, buffer: TransientBuffer | None, tenant: str = ""
    ) -> None:
        self._tier = tier
        self.tenant = tenant
        self._slot = slot
        self._buffer = buffer
        self.nbytes = nbytes

    @property
    def transient(self) -> bool:
        """Whether this is room outside memory."""
        return self._buffer is not None

    @property
    def view(self) -> memoryview:
        """Writable bytes of the chunk's size."""
        return self._holder.view

    @property
    def padded(self) -> memoryview:
        """`view` and its padding, for direct I/O."""
        return self._holder.padded

    def publish(self, nbytes: int | None = None) -> Loan:
        """Make the first `nbytes` (default all) a loan, visible to other readers if they are in a slot."""
        nbytes = self.nbytes if nbytes is None else nbytes
        if self._slot is not None:
            lease = self._slot.commit(nbytes)
            return Loan(lease.view, self._tier, lease, lease.offset)
        buffer = cast(TransientBuffer, self._buffer)
        return Loan(buffer.view[:nbytes], self._tier, buffer)

    def abort(self) -> None:
        """Give the place back unpublished."""
        if self._slot is not None:
            self._slot.abort()
        else:
            cast(TransientBuffer, self._buffer).release()

    @property
    def _holder(self) -> Slot | TransientBuffer:
        return self._slot if self._slot is not None else cast(TransientBuffer, self._buffer)


class Wanted(NamedTuple):
    """A chunk of a lower tier for which a place is wanted, the chunk before it, and whose quota it counts against."""

    key: bytes
    nbytes: int
    parent: bytes
    tenant: str = ""


def wanted_from(tier: Tier, keys: Sequence[bytes]) -> list[Wanted | None]:
    """The chunks as a tier has them, None where it has none."""
    chunks = zip(keys, tier.sizes(keys), tier.parents(keys), tier.tenants(keys), strict=True)
    return [None if nbytes is None else Wanted(key, nbytes, parent, whose) for key, nbytes, parent, whose in chunks]
