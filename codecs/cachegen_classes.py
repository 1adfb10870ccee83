"""CacheGen's symbol distributions: channels of about the same spread share a table.

The paper keeps one distribution for every (layer, channel). Channels differ in the spread of their integers, hardly in
anything else, so a class of spreads, half an octave wide, stands for all channels in it; that costs about a hundredth
of a bit and lets a model's tables stay in a processor's cache. Anchors also have a mean, which is subtracted first.

A profile holds, for each part p in k, v (docs/codecs.md):

    cachegen.deviation.p   fp32 (layers, heads, dim)   standard deviation of the deltas
    cachegen.mean.p        int8 (layers, heads, dim)   mean of the anchors' integers
    cachegen.classes.p     u8 (layers, heads, dim)     class of the anchors' integers
    cachegen.anchors       u16 (16, 256)               tables of the anchors' classes
    cachegen.deltas        u16 (16, 256)               tables of the deltas' classes
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvstore.codecs.cachegen_part import Bytes, Float32, Int32
from kvstore.codecs.profile import Profile
from kvstore.codecs.r32 import TableSet
from kvstore.codecs.r32.tables import SYMBOLS_MAX
from kvstore.errors import CodecError, ContainerError
from kvstore.outcome import Reason
from kvstore.spec import KVSpec

CLASSES = 16
ZERO = 128
"""Symbol of an integer that is 0."""

PER_OCTAVE = 2
DELTAS_LOWEST = -6
ANCHORS_LOWEST = -1
"""Class 0 is a spread of 2**(lowest / PER_OCTAVE) steps and all below."""

BINS = (0.5, 1.0, 1.5)
"""Widths of the deltas' bins in the first, second and last third of the layers, in typical deviations."""

PARTS = ("k", "v")
_SIGMA_MIN = 1e-30


@dataclass(frozen=True)
class PartProfile:
    """What a profile says of one part: arrays of (layers, heads, dim)."""

    deviation: Float32
    mean: npt.NDArray[np.int8]
    classes: Bytes


class CacheGenProfile:
    """A profile's tables for CacheGen. Raises ContainerError if it has none that serve the spec."""

    def __init__(self, profile: Profile) -> None:
        self._profile = profile
        try:
            self.anchors = TableSet(profile.array("cachegen.anchors", "uint16", CLASSES, SYMBOLS_MAX))
            self.deltas = TableSet(profile.array("cachegen.deltas", "uint16", CLASSES, SYMBOLS_MAX))
        except (CodecError, ContainerError) as error:
            raise ContainerError(Reason.UNKNOWN_PROFILE, f"profile has no tables for cachegen: {error}") from error

    def part(self, index: int, spec: KVSpec) -> PartProfile:
        """The arrays of K (0) or V (1). Raises ContainerError if the profile is of another geometry."""
        name, dim = PARTS[index], (spec.key_dim, spec.value_dim)[index]
        shape = (spec.layers, spec.kv_heads, dim)
        try:
            part = PartProfile(
                self._profile.array(f"cachegen.deviation.{name}", "float32", *shape),
                self._profile.array(f"cachegen.mean.{name}", "int8", *shape),
                self._profile.array(f"cachegen.classes.{name}", "uint8", *shape),
            )
        except ContainerError as error:
            raise ContainerError(Reason.UNKNOWN_PROFILE, f"profile is of another model: {error.detail}") from error
        if not (np.isfinite(part.deviation).all() and (part.deviation >= 0).all() and (part.classes < CLASSES).all()):
            raise ContainerError(Reason.MALFORMED, "profile's cachegen arrays are out of range")
        return part


def step_of(deviation: Float32, scaling: float, layer: int, layers: int) -> np.float32:
    """Width of a layer's bins: its third's bin times the median deviation of those of its channels that vary."""
    varying = deviation[deviation > 0]
    typical = float(np.median(varying)) if varying.size else 0.0
    width = BINS[min(2, 3 * layer // layers)] * scaling * typical
    return np.float32(width if width > _SIGMA_MIN else 1.0)


def class_of(spread: Float32, lowest: int) -> Bytes:
    """Classes of spreads in steps; `lowest` is DELTAS_LOWEST or ANCHORS_LOWEST."""
    octaves = np.log2(np.maximum(spread, 2.0**-20))
    classes: Bytes = np.clip(np.rint(PER_OCTAVE * octaves) - lowest, 0, CLASSES - 1).astype(np.uint8)
    return classes


def centre(anchors: Int32, mean: Int32) -> Int32:
    """Integers less their channel's mean, in -128..127 by going round; `mean` is negated to undo it."""
    return (anchors - mean[:, None] + ZERO) % SYMBOLS_MAX - ZERO


def symbols_of(integers: Int32, classes: Bytes, tables: TableSet) -> tuple[Bytes, Int32, Int32]:
    """Symbols (tiles, rows, dim) of integers; positions (flat) and values of those that their table lacks.

    The latter's symbols are the commonest of their table. `classes` (tiles, dim) are rows of `tables`.
    """
    known = tables.frequencies > 0
    symbols = np.clip(integers, -ZERO, ZERO - 1) + ZERO
    rows = np.broadcast_to(classes[:, None], integers.shape)
    absent = ~known[rows, symbols] | (integers + ZERO != symbols)
    commonest = tables.frequencies.argmax(axis=1)
    coded: Bytes = np.where(absent, commonest[rows], symbols).astype(np.uint8)
    positions = np.flatnonzero(absent).astype(np.int32)
    return coded, positions, integers.reshape(-1)[positions]
