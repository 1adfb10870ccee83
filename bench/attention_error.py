"""How much a codec changes what attention makes of a chunk, and what it costs: the two axes of every comparison.

Error of one layer: queries q of tokens behind the chunk, which no codec has seen, attend to the chunk's tokens alone,

    o = softmax(q K^T / sqrt(dim)) V,    e = sqrt(sum |o - o'|^2 / sum |o|^2)    over all queries and heads,

o' being the same with decoded K and V. A chunk's error is the mean of its layers', a codec's the mean of its chunks'.
All of it is in fp32 from the bits that an engine would get. Cost: bits of the whole stored object for each element,
header, alignment and tables included, model-wide profiles not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvstore.bench.kv_samples import SampleChunk, float_parts
from kvstore.spec import KVArrays, KVSpec

Float32 = npt.NDArray[np.float32]

COMPARED = 9
"""Errors at which two curves are compared, log-spaced over what both reach."""


@dataclass(frozen=True)
class Point:
    """One setting of a codec: bits an element, and error."""

    bits: float
    error: float


def attention_error(chunk: SampleChunk, decoded: KVArrays, spec: KVSpec) -> float:
    """The error of one decoded chunk, see the module's text."""
    before, after = float_parts(chunk.arrays, spec), float_parts(decoded, spec)
    errors = []
    for layer, queries in enumerate(chunk.queries):
        original = _attend(queries, before[0][layer], before[1][layer])
        other = _attend(queries, after[0][layer], after[1][layer])
        errors.append(math.sqrt(float(np.square(original - other).sum()) / float(np.square(original).sum())))
    return sum(errors) / len(errors)


def _attend(queries: Float32, keys: Float32, values: Float32) -> Float32:
    """(query heads, queries, dim) over (heads, tokens, dim)."""
    grouped = queries.reshape(len(keys), -1, queries.shape[-1])
    scores = grouped @ keys.transpose(0, 2, 1) / np.float32(math.sqrt(queries.shape[-1]))
    weights = np.exp(scores - scores.max(axis=2, keepdims=True))
    weights /= weights.sum(axis=2, keepdims=True)
    output: Float32 = weights @ values
    return output


def bits_at(curve: list[Point], error: float) -> float | None:
    """Bits that the codec takes for that error, linear in log error between its points; None beyond its ends.

    A setting that another one beats in both bits and error is left out first.
    """
    front = [p for p in curve if not any(o.bits <= p.bits and o.error < p.error for o in curve)]
    ordered = sorted(front, key=lambda point: -point.error)
    errors = [-math.log(point.error) for point in ordered]
    wanted = -math.log(error)
    if not ordered or not errors[0] - 1e-9 <= wanted <= errors[-1] + 1e-9:
        return None
    return float(np.interp(wanted, errors, [point.bits for point in ordered]))


def bits_ratio(curve: list[Point], anchor: list[Point]) -> float | None:
    """Bits of one codec over those of another at equal error: the geometric mean over what both reach.

    An anchor of one point is compared at its error. None if the two have no error in common.
    """
    if len(anchor) == 1:
        bits = bits_at(curve, anchor[0].error)
        return None if bits is None else bits / anchor[0].bits
    low = max(min(point.error for point in own) for own in (curve, anchor))
    high = min(max(point.error for point in own) for own in (curve, anchor))
    if low > high:
        return None
    ratios = []
    for error in np.geomspace(low, high, COMPARED):
        first, second = bits_at(curve, float(error)), bits_at(anchor, float(error))
        if first is not None and second is not None:
            ratios.append(math.log(first / second))
    return math.exp(sum(ratios) / len(ratios)) if ratios else None
