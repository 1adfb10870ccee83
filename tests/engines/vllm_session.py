"""`kvstore.bench.vllm_session` with faults between the connector and the store.

Commands have two more fields, "fault" and "fault_rate" (0..1): "miss", "corrupt" (a bit flipped, noticed), "unverified"
(a bit flipped, and the hash made to fit), "slow", "raise" (the client breaks its promise).
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from typing import Any

import msgspec

from kvstore import kernels
from kvstore.bench import vllm_session
from kvstore.client import Client, Part
from kvstore.connect import connect
from kvstore.connectors.vllm import access
from kvstore.outcome import Miss, Reason


class Faults:
    """What goes wrong with the chunks that are fetched, in this process."""

    def __init__(self) -> None:
        self.kind = ""
        self.rate = 0.0
        self._random = random.Random(7)
        self._connect = connect

    def connect(self, *args: Any, **kwargs: Any) -> Client:
        """`kvstore.connect` with faults."""
        client: Any = self._connect(*args, **kwargs)
        fetch = client.fetch
        client.fetch = lambda *args, **kwargs: self._spoil(fetch(*args, **kwargs))
        return client  # type: ignore[no-any-return]

    def _spoil(self, parts: Iterator[Part]) -> Iterator[Part]:
        for part in parts:
            if part.miss is not None or not self.kind or self._random.random() >= self.rate:
                yield part
            elif self.kind == "miss":
                yield Part(part.index, Miss(Reason.IO_ERROR, "injected"))
            elif self.kind == "slow":
                time.sleep(0.3)
                yield part
            elif self.kind == "raise":
                raise RuntimeError("injected")
            else:
                yield flipped(part, keep_hash=self.kind == "corrupt")

    def commanded(self, command: dict[str, Any]) -> None:
        """Take the faults that a command asks for."""
        self.kind, self.rate = command.get("fault", ""), command.get("fault_rate", 0.0)


def flipped(part: Part, *, keep_hash: bool) -> Part:
    """The part with a high bit of many numbers flipped, under the hash of before or one that fits."""
    groups = []
    for group in part.groups:
        spoilt = []
        for segment, view in group:
            data = bytearray(view)
            for position in range(3, len(data), 64):
                data[position] ^= 0x41
            xxh3 = segment.xxh3 if keep_hash else kernels.xxh3(data)
            spoilt.append((msgspec.structs.replace(segment, xxh3=xxh3), memoryview(data)))
        groups.append(spoilt)
    return msgspec.structs.replace(part, groups=tuple(groups))


if __name__ == "__main__":
    faults = Faults()
    vars(access)["connect"] = faults.connect
    vllm_session.serve(faults.commanded)
