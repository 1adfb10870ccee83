"""Links and disks in virtual time, to try load control on: any bandwidth over time, and an oracle that knows it."""

from __future__ import annotations

import msgspec

from kvstore.load_control import LoadControl
from kvstore.promotion import LATE


class Link(msgspec.Struct, frozen=True):
    """A link whose bandwidth changes over time.

    `steps` are (milliseconds, bytes per millisecond) one after another, 0 for a stall; after the last one it goes on
    at `then`. A request takes `latency_ms` before its first byte.
    """

    steps: tuple[tuple[float, float], ...] = ()
    then: float = 0.0
    latency_ms: float = 0.0

    def arrival_ms(self, start_ms: float, nbytes: float) -> float:
        """When so many bytes have come that flow from `start_ms` on; infinity if never."""
        at = 0.0
        for length_ms, rate in self.steps:
            end = at + length_ms
            begin = max(at, start_ms)
            if begin < end:
                if rate * (end - begin) >= nbytes:
                    return begin + (nbytes / rate if rate else 0.0)
                nbytes -= rate * (end - begin)
            at = end
        return max(at, start_ms) + (nbytes / self.then if self.then else float("inf"))


class Prompt(msgspec.Struct, frozen=True):
    """A prompt whose chunks are stored behind a link.

    `nbytes` are each chunk's bytes up to each level; `savings_ms` what having it really saves; `rest_ms` what the
    engine computes in any case; `decode_ms` what decoding one chunk takes.
    """

    nbytes: tuple[tuple[int, ...], ...]
    savings_ms: tuple[float, ...]
    rest_ms: float
    decode_ms: float = 0.0

    @property
    def recompute_ms(self) -> float:
        """Computing all of it."""
        return sum(self.savings_ms) + self.rest_ms


def simulate(control: LoadControl, link: Link, prompt: Prompt) -> tuple[float, list[int]]:
    """Milliseconds of load and computing together under `control`, and the level of each chunk that was loaded."""
    now = 0.0
    levels: list[int] = []
    while (batch := control.next(now)) is not None:
        flowing = now + link.latency_ms
        late = None
        for sizes in prompt.nbytes[control.loaded : batch.stop]:
            nbytes = sizes[batch.level]
            flowing = link.arrival_ms(flowing, nbytes)
            if max(now, flowing) > batch.deadline_ms:
                now, late = max(now, batch.deadline_ms), LATE
                break
            now = max(now, flowing)
            control.arrived(now)
            now += prompt.decode_ms
            control.decoded(now, "raw")
            levels.append(batch.level)
        control.ended(now, late)
    return now + prompt.recompute_ms - sum(prompt.savings_ms[: control.loaded]), levels


def oracle_ms(link: Link, prompt: Prompt, deadline_ms: float = float("inf")) -> float:
    """The least that load and computing can take together, for one who knows the link's future: the best prefix."""
    best = total = prompt.recompute_ms
    flowing, now = link.latency_ms, 0.0
    for sizes, saving in zip(prompt.nbytes, prompt.savings_ms, strict=True):
        flowing = link.arrival_ms(flowing, sizes[0])
        now = max(now, flowing) + prompt.decode_ms
        if flowing > deadline_ms:
            break
        total -= saving
        best = min(best, now + total)
    return best


def load_all_ms(link: Link, prompt: Prompt) -> float:
    """What loading every chunk and computing the rest takes, however long that is."""
    flowing, now = link.latency_ms, 0.0
    for sizes in prompt.nbytes:
        flowing = link.arrival_ms(flowing, sizes[0])
        now = max(now, flowing) + prompt.decode_ms
    return now + prompt.rest_ms
