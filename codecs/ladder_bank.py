"""Banks: the probability tables and centroids of the ladder's scale classes, parametric or trained.

A bank is `frequencies` (TABLES, 256) of R32 and `centroids` (CLASS_MAX + 1 + 24,) fp32: by how much of a step the
mean of a bin lies nearer to zero than its middle, for the classes that a component can have at any level.

The parametric bank is part of the format: its components are Gaussian. Every platform must find the same numbers, so
it is computed with correctly rounded operations only: decimal exp and sqrt, then IEEE multiplication, addition, `fsum`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal, localcontext

import numpy as np
import numpy.typing as npt

from kvstore.codecs.ladder_classes import (
    CLASS_MAX,
    CONTEXTS,
    DIGIT_SYMBOLS,
    FIRST_ROWS,
    LEVELS,
    PITCH,
    REFINE_PITCH,
    REFINE_ROWS,
    TABLES,
    Alphabet,
    alphabet_of,
    ratio_of,
)
from kvstore.codecs.r32 import TableSet
from kvstore.codecs.r32.tables import SLOTS, SYMBOLS_MAX

CENTROIDS = CLASS_MAX + 1 + PITCH * (LEVELS - 1)

_CELLS = 48
"""Cells a step in which the Gaussian density is summed; a multiple of 6, so that thirds of a step begin at cells."""

RARE = 2.0**-17
"""A first value's symbol less likely than this gets no frequency; values that need it are stored apart."""


@dataclass(frozen=True, eq=False)
class Bank:
    """Tables and centroids of all classes."""

    tables: TableSet
    centroids: npt.NDArray[np.float32]


def can_code(frequencies: npt.NDArray[np.uint16]) -> bool:
    """Whether tables (TABLES, 256) can code every digit, and in every class values of zero, which patches stand on."""
    zeros = [alphabet_of(scale_class).zero_symbol for scale_class in range(FIRST_ROWS)]
    firsts = frequencies[np.arange(FIRST_ROWS), zeros]
    return bool((firsts > 0).all() and (frequencies[FIRST_ROWS:, :DIGIT_SYMBOLS] > 0).all())


@functools.cache
def parametric() -> Bank:
    """The bank of the format, for components that are Gaussian."""
    frequencies = np.zeros((TABLES, SYMBOLS_MAX), dtype=np.uint16)
    centroids = np.zeros(CENTROIDS, dtype=np.float32)
    for scale_class in range(CENTROIDS):
        cells = _gaussian(float(ratio_of(scale_class)))
        centroids[scale_class] = round(_centroid(cells) * 1024) / 1024
        if scale_class < FIRST_ROWS:
            probabilities = joint(_values(cells, alphabet_of(scale_class)), alphabet_of(scale_class).count)
            frequencies[scale_class, : len(probabilities)] = apportion(probabilities)
    for row in range(REFINE_ROWS):
        cells = _gaussian(float(ratio_of(row * REFINE_PITCH + (REFINE_PITCH - 1) / 2)))
        digits = [_digits(cells, context) for context in range(CONTEXTS)]
        for one in range(CONTEXTS):
            for other in range(CONTEXTS):
                pair = [digits[one][i] * digits[other][j] for j in range(3) for i in range(3)]
                at = FIRST_ROWS + (row * CONTEXTS + one) * CONTEXTS + other
                frequencies[at, :DIGIT_SYMBOLS] = apportion(pair, rare=0.0)
    return Bank(TableSet(frequencies), centroids)


def joint(probabilities: Sequence[float], count: int) -> list[float]:
    """Probabilities of symbols of `count` independent values, the first the least significant digit."""
    out = [1.0]
    for _ in range(count):
        out = [high * low for high in probabilities for low in out]
    return out


def apportion(weights: Sequence[float], *, rare: float = RARE) -> npt.NDArray[np.uint16]:
    """R32 frequencies near to weights, the same on every platform; a weight below `rare` of the sum gets none.

    Each gets 1 and its share of what is left, rounded down, and the largest what then remains.
    """
    total = math.fsum(weights)
    used = [weight >= rare * total for weight in weights]
    room = SLOTS - sum(used)
    out = [1 + math.floor(weight / total * room) if use else 0 for weight, use in zip(weights, used, strict=True)]
    out[out.index(max(out))] += SLOTS - sum(out)
    return np.asarray(out, dtype=np.uint16)


def _gaussian(ratio: float) -> list[float]:
    """Density at the middles of the cells from 0 on, up to 7 standard deviations; not normalised.

    exp(-(i + 1/2)**2 h) by multiplication alone: (i + 1/2)**2 grows by 2 i + 2.
    """
    half = _half_exponent(ratio)
    count = min(128 * _CELLS, math.ceil(7 * ratio * _CELLS) + _CELLS)
    value = half
    factor = half * half
    factor *= factor
    factor *= factor
    growth, out = factor, []
    for _ in range(count):
        out.append(value)
        value *= growth
        growth *= factor
    return out


@functools.cache
def _half_exponent(ratio: float) -> float:
    """exp(-h / 4) where h = 1 / (2 (ratio * _CELLS)**2), correctly rounded."""
    with localcontext() as context:
        context.prec = 40
        return float((-1 / (8 * (Decimal(ratio) * _CELLS) ** 2)).exp())


def _mass(cells: list[float], start: int, stop: int) -> float:
    return math.fsum(cells[max(start, 0) : max(stop, 0)])


def _values(cells: list[float], alphabet: Alphabet) -> list[float]:
    """Probabilities of the values -limit..limit, not normalised."""
    half = _CELLS // 2
    positive = [_mass(cells, n * _CELLS - half, n * _CELLS + half) for n in range(1, alphabet.limit + 1)]
    return [*reversed(positive), 2 * _mass(cells, 0, half), *positive]


def _digits(cells: list[float], context: int) -> list[float]:
    """Probabilities of the digits -1, 0, 1 behind a value of that context (not negative)."""
    third = _CELLS // 3
    if context == 0:
        side = _mass(cells, third // 2, third // 2 + third)
        return _normal([side, 2 * _mass(cells, 0, third // 2), side])
    values = [1] if context == 1 else range(2, 2 + len(cells) // _CELLS)
    starts = [value * _CELLS - _CELLS // 2 for value in values]
    return _normal([math.fsum(_mass(cells, s + i * third, s + (i + 1) * third) for s in starts) for i in range(3)])


def _normal(weights: list[float]) -> list[float]:
    """Weights that sum to 1; equal ones if there is nothing."""
    total = math.fsum(weights)
    return [weight / total for weight in weights] if total > 0 else [1 / len(weights)] * len(weights)


def _centroid(cells: list[float]) -> float:
    """By how much of a step values not coded as zero lie nearer to zero than the value that stands for them."""
    half = _CELLS // 2
    excess, mass = [], []
    for at, density in enumerate(cells[half:], start=half):
        value = (at + half) // _CELLS
        excess.append((value - (at + 0.5) / _CELLS) * density)
        mass.append(density)
    total = math.fsum(mass)
    return min(0.5, math.fsum(excess) / total) if total > 0 else 0.0
