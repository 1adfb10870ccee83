"""Which chunks of a prefix to load, in which quality level, and which to let the engine compute.

Only a prefix can be reused, so the question is how far to load. The levels follow the controller of CacheGen (Liu et
al., SIGCOMM 2024): everything in its lowest level first, then refined while time allows; what would come too late even
so is computed.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec


class Plan(msgspec.Struct, frozen=True):
    """Load the leading `len(levels)` chunks, each up to its level; compute the rest.

    `levels` count the entries of each chunk's list of load times. `load_ms` is what that should take, `saved_ms` what
    the engine then need not compute.
    """

    levels: tuple[int, ...] = ()
    load_ms: float = 0.0
    saved_ms: float = 0.0


def plan_loads(
    savings_ms: Sequence[float],
    loads_ms: Sequence[Sequence[float]],
    patience_ms: Sequence[float],
    *,
    fixed_ms: float = 0.0,
    room_ms: float,
    budget_ms: float,
) -> Plan:
    """The prefix worth loading. Linear in chunks times levels.

    How many chunks: the prefix that saves most beyond what its lowest levels take to load, if any saves more than it
    takes. How good: level after level, from the first chunk on, each chunk is refined while loading it still takes no
    longer than computing it would and the bounds hold.

    Args:
        savings_ms: what having each chunk saves, by position.
        loads_ms: what loading each chunk takes, for each of its levels, lowest first; at least one a chunk.
        patience_ms: once everything before a chunk is there, how long it may take beyond what has been saved since.
        fixed_ms: what a request takes besides.
        room_ms: how long the first chunk may take.
        budget_ms: what all loads together may take.
    """
    count, gain = 0, 0.0
    spent, saved, bound = fixed_ms, 0.0, room_ms
    ahead: list[float] = []  # the time left when each chunk has been loaded
    for saving, loads, patience in zip(savings_ms, loads_ms, patience_ms, strict=True):
        bound = min(bound, spent - saved + patience) if ahead else bound
        spent += loads[0]
        ahead.append(min(saved + bound, budget_ms) - spent)
        if ahead[-1] < 0:
            break
        saved += saving
        if saved - spent > gain:
            count, gain = len(ahead), saved - spent
    levels = _refine(savings_ms, loads_ms[:count], ahead[:count])
    return Plan(
        levels=tuple(levels),
        load_ms=fixed_ms + sum(loads[level] for loads, level in zip(loads_ms, levels, strict=False)) if levels else 0.0,
        saved_ms=sum(savings_ms[:count]),
    )


def _refine(savings_ms: Sequence[float], loads_ms: Sequence[Sequence[float]], ahead: list[float]) -> list[int]:
    """The level of each chunk. `ahead` is the room behind each one in its lowest level."""
    levels = [0] * len(loads_ms)
    for level in range(1, max((len(loads) for loads in loads_ms), default=0)):
        room = ahead.copy()  # before any later chunk runs out of room
        for index in reversed(range(len(room) - 1)):
            room[index] = min(room[index], room[index + 1])
        added = 0.0
        for index, loads in enumerate(loads_ms):
            if level < len(loads) and levels[index] == level - 1 and loads[level] <= savings_ms[index]:
                extra = loads[level] - loads[level - 1]
                if added + extra <= room[index]:
                    levels[index] = level
                    added += extra
            ahead[index] -= added
    return levels
