"""One level of one block of the ladder: from values to symbols, table ids, packed digits and patches, and back.

A block is (tokens, components), components in descending order of their class, so that those coded alike are a run:

    packed | digits by tables | first values, by alphabet | absent

A value that its table cannot say, or one of an absent component that lies far from what is known of it, is a patch: the
value itself, apart. So the error of a component is bounded whatever the data (by ABSENT_ERROR_MAX + 1/2 steps).

Symbols of a block lie in this order: digits (pairs of tokens, components), then first values of each alphabet (groups
of tokens, components). Behind the last token of a group values are 0. A digit is mirrored where its parent is
negative.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from kvstore.codecs.ladder_bank import Bank
from kvstore.codecs.ladder_classes import (
    CONTEXTS,
    LEVELS,
    PACKED_MIN,
    PITCH,
    Alphabet,
    alphabet_of,
    refine_row,
)

Ints = npt.NDArray[np.int16]
Bytes = npt.NDArray[np.uint8]
Ids = npt.NDArray[np.uint16]

ABSENT_ERROR_MAX = 2
"""Largest difference, in steps of a level, that is left to an absent component."""

VALUE_MAX = 32767 // 3 ** (LEVELS - 1) * 3 ** (LEVELS - 1)
"""Largest value at the finest level, so that values and what refines them fit 16 bits at every level."""

TRITS = 5
"""Packed digits of one byte."""

_PAIR, _TRITS = Alphabet(1, 2), Alphabet(1, TRITS)
_TRIT_SCALES = np.array([1, 3, 9, 27, 81], dtype=np.uint8)


@dataclass(frozen=True)
class Run:
    """First values of components start..stop, coded with one alphabet."""

    start: int
    stop: int
    alphabet: Alphabet


class LevelPlan:
    """What a block has at a level, from its components' classes (descending, at level 0) alone."""

    def __init__(self, classes: npt.NDArray[np.int64], level: int, tokens: int) -> None:
        scale = classes + PITCH * level
        self.tokens = tokens
        self.components = len(classes)
        ascending = -scale
        parented = 0 if level == 0 else int(np.searchsorted(ascending, -PITCH, side="right"))
        self.packed = min(parented, int(np.searchsorted(ascending, -PACKED_MIN, side="right")))
        self.refined = parented
        self.coded = int(np.searchsorted(ascending, 0, side="right"))
        self.runs = _runs(scale, parented, self.coded)
        self.first_ids = [scale[run.start : run.stop].astype(np.uint16) for run in self.runs]
        self.refine_ids = refine_row(scale[self.packed : self.refined]).astype(np.uint16)

    @property
    def packed_bytes(self) -> int:
        """Bytes of the packed digits."""
        return -(-self.tokens * self.packed // TRITS)

    @property
    def symbols(self) -> int:
        """Number of R32 symbols."""
        pairs = -(-self.tokens // 2) * (self.refined - self.packed)
        return pairs + sum(-(-self.tokens // r.alphabet.count) * (r.stop - r.start) for r in self.runs)


@lru_cache(maxsize=8192)
def _plan(classes: bytes, level: int, tokens: int) -> LevelPlan:
    return LevelPlan(np.frombuffer(classes, dtype=np.int8).astype(np.int64), level, tokens)


def level_plan(classes: npt.NDArray[np.int64], level: int, tokens: int) -> LevelPlan:
    """The plan of a block whose components have these classes at level 0, descending."""
    return _plan(classes.astype(np.int8).tobytes(), level, tokens)


def _runs(scale: npt.NDArray[np.int64], start: int, stop: int) -> tuple[Run, ...]:
    runs: list[Run] = []
    while start < stop:
        alphabet = alphabet_of(int(scale[start]))
        end = start
        while end < stop and alphabet_of(int(scale[end])) == alphabet:
            end += 1
        runs.append(Run(start, end, alphabet))
        start = end
    return tuple(runs)


def ladder_values(finest: Ints) -> list[Ints]:
    """Values at every level, lowest first, that nest: n = 3 n' + digit; from those of the finest step."""
    out = [finest]
    for _ in range(LEVELS - 1):
        out.append(np.floor_divide(out[-1] + 1, 3))
    return out[::-1]


Patches = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], Ints]
"""Tokens, components and values."""


@dataclass
class Coded:
    """What a block has at a level, and the values (tokens, components) that a decoder of this level will have."""

    symbols: Bytes
    ids: Ids
    packed: Bytes
    patches: Patches
    seen: Ints


def code_level(plan: LevelPlan, values: Ints, parents: Ints | None, bank: Bank) -> Coded:
    """What `values` (tokens, components) take at a level, behind what was seen at the level below (None at level 0)."""
    symbols, ids = [], []
    patches: list[Patches] = []
    packed = np.zeros(0, dtype=np.uint8)
    if parents is not None:
        digits = (values[:, : plan.refined] - 3 * parents[:, : plan.refined]).astype(np.int8)
        packed = _pack_trits(digits[:, : plan.packed])
        above = parents[:, plan.packed : plan.refined]
        mirrored = _mirrored(digits[:, plan.packed :], above)
        grouped = _groups((mirrored + np.int8(1)).view(np.uint8), 2, 1)
        symbols.append((grouped[:, 0] + 3 * grouped[:, 1]).reshape(-1))
        ids.append(_pair_ids(plan, above))
    for run, row in zip(plan.runs, plan.first_ids, strict=True):
        own = values[:, run.start : run.stop]
        coded = _first_symbols(own, run.alphabet)
        repeated = np.broadcast_to(row, coded.shape)
        lost = bank.tables.frequencies[repeated, coded] == 0
        outside = np.abs(own) > run.alphabet.limit
        if lost.any() or outside.any():
            coded[lost] = run.alphabet.zero_symbol
            hit = outside | (np.repeat(lost, run.alphabet.count, axis=0)[: plan.tokens] & (own != 0))
            tokens, components = np.nonzero(hit)
            patches.append((tokens, components + run.start, own[hit]))
        symbols.append(coded.reshape(-1))
        ids.append(repeated.reshape(-1))
    seen = values
    if plan.coded < plan.components:
        seen = values.copy()
        known = 0 if parents is None else 3 * parents[:, plan.coded :]
        seen[:, plan.coded :] = known
        far = np.abs(values[:, plan.coded :] - known) > ABSENT_ERROR_MAX
        if far.any():
            tokens, components = np.nonzero(far)
            patches.append((tokens, components + plan.coded, values[:, plan.coded :][far]))
            seen[:, plan.coded :][far] = patches[-1][2]
    return Coded(
        np.concatenate([np.zeros(0, np.uint8), *symbols]),
        np.concatenate([np.zeros(0, np.uint16), *ids]),
        packed,
        _joined(patches),
        seen,
    )


def ids_of(plan: LevelPlan, parents: Ints | None) -> Ids:
    """Table ids of the block's symbols at this level, known from the level below."""
    ids = [np.zeros(0, dtype=np.uint16)]
    if parents is not None:
        ids.append(_pair_ids(plan, parents[:, plan.packed : plan.refined]))
    for run, row in zip(plan.runs, plan.first_ids, strict=True):
        ids.append(np.tile(row, -(-plan.tokens // run.alphabet.count)))
    return np.concatenate(ids)


def read_level(plan: LevelPlan, symbols: Bytes, packed: Bytes, parents: Ints | None) -> Ints:
    """Values (tokens, components) of a level, before patches; undoes `code_level`."""
    values = np.zeros((plan.tokens, plan.components), dtype=np.int16)
    at = 0
    if parents is not None:
        np.multiply(parents, 3, out=values)
        trits = _digits(packed, _TRITS, plan.tokens * plan.packed, 1)
        values[:, : plan.packed] += trits.reshape(plan.tokens, plan.packed)
        above = parents[:, plan.packed : plan.refined]
        at = -(-plan.tokens // 2) * above.shape[1]
        digits = _digits(symbols[:at], _PAIR, plan.tokens, above.shape[1])
        values[:, plan.packed : plan.refined] += _mirrored(digits, above)
    for run in plan.runs:
        width = run.stop - run.start
        count = -(-plan.tokens // run.alphabet.count) * width
        own = symbols[at : at + count]
        values[:, run.start : run.stop] = _digits(own, run.alphabet, plan.tokens, width)
        at += count
    return values


def _groups(digits: Bytes, count: int, filler: int) -> Bytes:
    """(tokens, n) to (groups, count, n), filled up behind the last token."""
    tokens, width = digits.shape
    missing = -tokens % count
    if missing:
        digits = np.concatenate([digits, np.full((missing, width), filler, dtype=np.uint8)])
    return digits.reshape(-(-tokens // count), count, width)


def _pair_ids(plan: LevelPlan, above: Ints) -> Ids:
    context = _groups(np.minimum(np.abs(above), CONTEXTS - 1).astype(np.uint8), 2, 0)
    return (plan.refine_ids + (context[:, 0] * np.uint8(CONTEXTS) + context[:, 1])).reshape(-1)


def _first_symbols(values: Ints, alphabet: Alphabet) -> Bytes:
    inside = np.where(np.abs(values) <= alphabet.limit, values, 0)
    digits = _groups((inside + alphabet.limit).astype(np.uint8), alphabet.count, alphabet.limit)
    coded = digits[:, 0].copy()
    for place in range(1, alphabet.count):
        coded += digits[:, place] * np.uint8(alphabet.radix**place)
    return coded


def _mirrored(digits: npt.NDArray[np.int8], above: Ints) -> npt.NDArray[np.int8]:
    """Digits, negated where what is above them is negative."""
    signs = (above >> np.int16(15)).astype(np.int8)
    return (digits ^ signs) - signs


def _digits(symbols: Bytes, alphabet: Alphabet, tokens: int, width: int) -> npt.NDArray[np.int8]:
    """Values (tokens, width) from symbols in the order token group, component."""
    radix, limit, count = np.uint8(alphabet.radix), np.int8(alphabet.limit), alphabet.count
    groups = -(-tokens // count)
    rest = symbols.reshape(groups, width)
    out = np.empty((groups, count, width), dtype=np.int8)
    for place in range(count):
        quotient = rest // radix
        out[:, place] = (rest - quotient * radix).view(np.int8) - limit  # wraps where the digit is above 127
        rest = quotient
    return out.reshape(groups * count, width)[:tokens]


def _pack_trits(digits: npt.NDArray[np.int8]) -> Bytes:
    flat = digits.reshape(-1)
    padded = np.zeros(-(-len(flat) // TRITS) * TRITS, dtype=np.uint8)
    padded[: len(flat)] = flat + 1
    out: Bytes = np.einsum("ij,j->i", padded.reshape(-1, TRITS), _TRIT_SCALES, dtype=np.uint8, casting="unsafe")
    return out


def _joined(patches: list[Patches]) -> Patches:
    nothing = (np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.int16))
    tokens, components, values = zip(*[nothing, *patches], strict=True)
    return np.concatenate(tokens), np.concatenate(components), np.concatenate(values)
