"""Traces of prompts as chains of blocks: read from a file, or made up from a seed.

A file has one JSON object a line, in order of time: `timestamp` (ms), `input_length` and `output_length` (tokens),
`hash_ids` (one number for each block of the prompt; equal numbers mean an equal prefix up to and with that block).
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from kvstore.errors import KVStoreError

BLOCK_TOKENS = 512


class TraceError(KVStoreError, ValueError):
    """A file is not a trace; names the line and what is wrong there."""


class Request(msgspec.Struct, frozen=True):
    """One prompt."""

    timestamp: float
    input_length: int
    output_length: int
    hash_ids: tuple[int, ...]


def read_trace(path: Path) -> list[Request]:
    """The requests of a file. Raises TraceError."""
    decoder = msgspec.json.Decoder(Request)
    requests: list[Request] = []
    number = 0
    try:
        with path.open("rb") as lines:
            for line in lines:
                number += 1
                if line.strip():
                    requests.append(decoder.decode(line))
    except OSError as error:
        raise TraceError(f"cannot read trace {path}: {error.strerror}") from error
    except msgspec.DecodeError as error:
        raise TraceError(f"{path}, line {number}: {error}; a line needs timestamp, input_length, hash_ids …") from error
    if not requests:
        raise TraceError(f"{path} has no requests; give a file with one JSON object a line")
    return requests


Prompts = Iterator[tuple[float, tuple[int, ...]]]
"""Time in ms and blocks of each prompt, in order of time."""


def synthetic(kind: str, requests: int, seed: int = 0) -> list[Request]:
    """That many made-up requests of one of `KINDS`; the same for the same arguments."""
    draw = random.Random(f"{kind} {seed}")
    prompts = itertools.islice(KINDS[kind](draw, itertools.count()), requests)
    return [Request(time_ms, len(blocks) * BLOCK_TOKENS, 300, blocks) for time_ms, blocks in prompts]


def _conversations(
    draw: random.Random, ids: Iterator[int], *, heads: list[tuple[int, ...]], again: float, pause_ms: float, first: int
) -> Prompts:
    """Conversations behind one of `heads`: each turn has the last one's blocks and some new ones.

    `again` is the chance of another turn after each, `pause_ms` the median time to it, `first` the mean new blocks of
    the first turn. Four new conversations begin each second.
    """
    turns: list[tuple[float, int, tuple[int, ...]]] = []
    order, start_ms = itertools.count(), 0.0
    while True:
        while not turns or turns[0][0] >= start_ms:
            new = 1 + int(draw.expovariate(1 / first))
            blocks = (*draw.choice(heads), *itertools.islice(ids, new))
            heapq.heappush(turns, (start_ms, next(order), blocks))
            start_ms += draw.expovariate(4 / 1000)
        time_ms, _, blocks = heapq.heappop(turns)
        yield time_ms, blocks
        if draw.random() < again:
            longer = (*blocks, *itertools.islice(ids, 1 + int(draw.expovariate(1 / 2))))
            heapq.heappush(turns, (time_ms + draw.lognormvariate(0, 0.8) * pause_ms, next(order), longer))


def _chat(draw: random.Random, ids: Iterator[int]) -> Prompts:
    return _conversations(draw, ids, heads=[(next(ids),)], again=0.5, pause_ms=60_000, first=12)


def _system_prompts(draw: random.Random, ids: Iterator[int]) -> Prompts:
    heads = [tuple(itertools.islice(ids, 20)) for _ in range(200)]
    return _conversations(draw, ids, heads=heads, again=0.2, pause_ms=30_000, first=3)


def _agents(draw: random.Random, ids: Iterator[int]) -> Prompts:
    return _conversations(draw, ids, heads=[tuple(itertools.islice(ids, 8))], again=0.93, pause_ms=4_000, first=4)


def _documents(draw: random.Random, ids: Iterator[int]) -> Prompts:
    """Questions about one of 2,000 documents of 10 blocks; a few are popular (Zipf), and popularity drifts."""
    documents = [tuple(itertools.islice(ids, 10)) for _ in range(2000)]
    for number in itertools.count():
        if number % 2000 == 1999:
            draw.shuffle(documents)
        rank = min(int(draw.paretovariate(0.7)) - 1, len(documents) - 1)
        yield number * 250.0, (*documents[rank], next(ids))


def _scans(draw: random.Random, ids: Iterator[int]) -> Prompts:
    """Conversations, and every so often a batch of long prompts that are never seen again."""
    for number, (time_ms, blocks) in enumerate(_chat(draw, ids)):
        yield time_ms, blocks
        if number % 400 >= 300:
            yield time_ms, tuple(itertools.islice(ids, 40))


def _mixed(draw: random.Random, ids: Iterator[int]) -> Prompts:
    """All the other kinds at once, merged by time."""
    return heapq.merge(*(KINDS[kind](draw, ids) for kind in ("chat", "system_prompts", "agents", "documents")))


KINDS: dict[str, Callable[[random.Random, Iterator[int]], Prompts]] = {
    "agents": _agents,
    "chat": _chat,
    "documents": _documents,
    "mixed": _mixed,
    "scans": _scans,
    "system_prompts": _system_prompts,
}
"""Kinds of made-up workload."""
