"""Measures CacheGen's share of a profile on K and V of a model.

meter = Meter(spec)
meter.add([keys, values]) ...      # many sequences, as engines cache them
arrays = meter.arrays()            # into the profile, beside those of other codecs
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kvstore.codecs.cachegen_classes import (
    ANCHORS_LOWEST,
    CLASSES,
    DELTAS_LOWEST,
    PARTS,
    PER_OCTAVE,
    ZERO,
    class_of,
)
from kvstore.codecs.cachegen_part import ANCHOR_MAX, Float32, deltas_of, quantise_anchors
from kvstore.codecs.profile import Array
from kvstore.codecs.r32 import quantise
from kvstore.codecs.r32.tables import SYMBOLS_MAX
from kvstore.errors import CodecError
from kvstore.spec import KVSpec

SHARE_MIN = 2.0**-15
"""A symbol rarer than this has no frequency: integers that need it are listed apart."""


class Meter:
    """Deviations, means and symbol distributions of one model. Memory is bounded by a few numbers a channel."""

    def __init__(self, spec: KVSpec) -> None:
        self._statistics = [_Statistics(spec, dim) for dim in (spec.key_dim, spec.value_dim)]
        self._anchors, self._deltas = _Density(), _Density()

    def add(self, parts: Sequence[Float32]) -> None:
        """Count K and V of one sequence, each (layers, heads, tokens, dim), K with its rotary embedding.

        Raises:
            CodecError: a value is not finite.
        """
        for own, part in zip(self._statistics, parts, strict=True):
            own.add(part, self._anchors, self._deltas)

    def arrays(self) -> dict[str, Array]:
        """The arrays of a profile.

        Raises:
            CodecError: no sequence had two tokens or more.
        """
        if not self._statistics[0].rows:
            raise CodecError("cachegen cannot be calibrated without sequences of two tokens or more")
        out: dict[str, Array] = {}
        for name, own in zip(PARTS, self._statistics, strict=True):
            out |= {f"cachegen.{field}.{name}": array for field, array in own.arrays().items()}
        return out | {
            "cachegen.anchors": self._anchors.tables(ANCHORS_LOWEST),
            "cachegen.deltas": self._deltas.tables(DELTAS_LOWEST),
        }


class _Density:
    """Density of values divided by their channel's spread, pooled over all channels."""

    CELLS = 64
    REACH = 32

    def __init__(self) -> None:
        self._cells = np.zeros(2 * self.CELLS * self.REACH, dtype=np.int64)

    def add(self, values: Float32, spread: Float32) -> None:
        """Count (tiles, rows, dim) values whose channels have the spreads (tiles, dim)."""
        scaled = values / np.where(spread > 0, spread, np.float32(1.0))[:, None] + self.REACH
        cells = np.clip(scaled * self.CELLS, 0, len(self._cells) - 1).astype(np.int64)
        self._cells += np.bincount(cells.reshape(-1), minlength=len(self._cells))

    def tables(self, lowest: int) -> npt.NDArray[np.uint16]:
        """Frequencies for integers in every class, (CLASSES, 256)."""
        edges = np.arange(len(self._cells) + 1) / self.CELLS - self.REACH
        cumulative = np.append(0, np.cumsum(self._cells)) / self._cells.sum()
        ratios = 2.0 ** ((np.arange(CLASSES) + lowest) / PER_OCTAVE)
        bounds = (np.arange(SYMBOLS_MAX + 1) - ZERO - 0.5) / ratios[:, None]
        shares = np.diff(np.interp(bounds, edges, cumulative), axis=1)
        shares[:, ZERO] += SHARE_MIN  # also where nothing was counted
        return quantise(np.where(shares < SHARE_MIN, 0.0, shares))


class _Statistics:
    """Sums over the chunks of one part."""

    def __init__(self, spec: KVSpec, dim: int) -> None:
        shape = (spec.layers, spec.kv_heads, dim)
        self.rows = 0
        self._groups = 0
        self._delta_squares = np.zeros(shape)
        self._anchor_sums = np.zeros(shape)
        self._anchor_squares = np.zeros(shape)

    def add(self, values: Float32, anchor_density: _Density, delta_density: _Density) -> None:
        """Count one chunk, (layers, heads, tokens, dim)."""
        layers, heads, tokens, dim = values.shape
        if not np.isfinite(values).all():
            raise CodecError("cachegen cannot be calibrated with values that are not finite")
        flat = values.reshape(layers * heads, tokens, dim)
        anchors = quantise_anchors(flat)
        deltas = deltas_of(flat, anchors)
        if not deltas.size:
            return
        integers = anchors.values.astype(np.float32)
        mean, spread = integers.mean(axis=1), integers.std(axis=1)
        deviation = np.sqrt((deltas * deltas).mean(axis=1))
        anchor_density.add(integers - mean[:, None], spread)
        delta_density.add(deltas, deviation)
        shape = (layers, heads, dim)
        self.rows += deltas.shape[1]
        self._groups += anchors.values.shape[1]
        self._delta_squares += (deltas.astype(np.float64) ** 2).sum(axis=1).reshape(shape)
        self._anchor_sums += integers.sum(axis=1, dtype=np.float64).reshape(shape)
        self._anchor_squares += (integers.astype(np.float64) ** 2).sum(axis=1).reshape(shape)

    def arrays(self) -> dict[str, Array]:
        """`deviation`, `mean` and `classes` of what has been counted."""
        groups = max(1, self._groups)
        mean = self._anchor_sums / groups
        spread = np.sqrt(np.maximum(self._anchor_squares / groups - mean * mean, 0.0))
        return {
            "deviation": np.sqrt(self._delta_squares / max(1, self.rows)).astype(np.float32),
            "mean": np.clip(np.rint(mean), -ANCHOR_MAX, ANCHOR_MAX).astype(np.int8),
            "classes": class_of(spread.astype(np.float32), ANCHORS_LOWEST),
        }
