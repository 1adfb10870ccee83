"""A fetch's steps as frames: what is said about each, and which bytes go behind it."""

from __future__ import annotations

from collections.abc import Sequence

from kvstore.fetching import Step
from kvstore.protocol import Frame, encode_frame
from kvstore.service.ledger import Ledger


class Packet:
    """One frame ready to be sent: its header bytes, and views of what follows. Views are valid until the next step."""

    __slots__ = ("head", "pieces")

    def __init__(self, frame: Frame, pieces: Sequence[memoryview] = ()) -> None:
        self.head = encode_frame(frame)
        self.pieces = pieces

    @property
    def payload_bytes(self) -> int:
        """Bytes that follow the header."""
        return sum(len(piece) for piece in self.pieces)

    def flatten(self) -> None:
        """Copy the payload behind the header, so that the packet needs no views any more."""
        self.head = b"".join([self.head, *self.pieces])
        self.pieces = ()


class Framer:
    """Turns the steps of one fetch into packets.

    Args:
        keys: what was asked for, by index.
        ledger: where shared-memory frames get their leases; None sends every byte inline.
        memory: name of the tier whose arena the client maps.
    """

    def __init__(self, keys: Sequence[bytes], ledger: Ledger | None, memory: str) -> None:
        self._keys = keys
        self._ledger = ledger
        self._memory = memory
        self._groups_sent: dict[int, int] = {}
        self._inline: set[int] = set()
        self._lent: set[int] = set()

    def packet(self, step: Step) -> Packet:
        """The frame of a step, and its payload if the client cannot read it in place."""
        if step.miss is not None or step.header is None:
            if self._ledger is not None:
                self._ledger.count()
            return Packet(Frame(kind="miss", index=step.index, miss=step.miss))
        whole = step.first and step.last
        start = self._groups_sent.get(step.index, 0)
        self._groups_sent[step.index] = start + len(step.groups)
        expires_at = self._lend(step)
        if expires_at is not None:
            return Packet(
                Frame(
                    kind="chunk" if whole else "layers",
                    index=step.index,
                    group=start,
                    groups=len(step.groups),
                    offset=step.offset if step.offset is not None else -1,
                    nbytes=step.header.total_bytes,
                    expires_at=expires_at,
                )
            )
        if self._ledger is not None:
            self._ledger.count()
        if whole:
            frame = Frame(kind="chunk", index=step.index, payload_bytes=len(step.view), origin=step.origin)
            return Packet(frame, [step.view])
        return self._layers(step, start)

    def _layers(self, step: Step, start: int) -> Packet:
        assert step.header is not None
        # A client that has been reading this chunk in place has its header already.
        header_bytes = 0 if step.index in self._inline or step.index in self._lent else step.header.header_bytes
        self._inline.add(step.index)
        pieces = [step.view[:header_bytes]] if header_bytes else []
        pieces += [step.view[s.offset : s.offset + s.length] for group in step.groups for s in group]
        frame = Frame(
            kind="layers",
            index=step.index,
            group=start,
            groups=len(step.groups),
            header_bytes=header_bytes,
            payload_bytes=sum(len(piece) for piece in pieces),
        )
        return Packet(frame, pieces)

    def _lend(self, step: Step) -> float | None:
        if self._ledger is None or step.offset is None or step.tier != self._memory or step.index in self._inline:
            return None
        expires_at = self._ledger.grant(self._keys[step.index], step.index, step.offset, last=step.last)
        if expires_at is not None:
            self._lent.add(step.index)
        return expires_at
