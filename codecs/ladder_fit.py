"""Fits the ladder's share of a profile to K and V of a model: moments, bases, classes, tables.

    moments = Moments(spec, grouping)
    moments.add(keys, values) ...            # many sequences, streamed
    fitted = fit_transforms(moments, weights)
    counter = TableCounter(fitted); counter.add(keys, values) ...   # other sequences, so that the tables are honest
    attributes, arrays = counter.finish()

Arrays are (layers, heads, tokens, dim) fp32 without rotary embedding and without the first tokens of the sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt

from kvstore.codecs.ladder_bank import CENTROIDS, RARE, Bank, parametric
from kvstore.codecs.ladder_classes import (
    CODES,
    DIGIT_SYMBOLS,
    FIRST_ROWS,
    LEVELS,
    PITCH,
    TABLES,
    class_of,
    code_of,
)
from kvstore.codecs.ladder_level import VALUE_MAX, code_level, ladder_values, level_plan
from kvstore.codecs.ladder_profile import PARTS
from kvstore.codecs.ladder_transform import BASE_STEP
from kvstore.codecs.r32 import TableSet, quantise
from kvstore.codecs.r32.tables import SLOTS, SYMBOLS_MAX
from kvstore.errors import ConfigError
from kvstore.spec import KVSpec

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]

RIDGE = 0.1
"""Share of the plain squared error in the error weights: what calibration has not seen must not be free."""

DEVIATION_MIN = 0.01
"""Components below this many average standard deviations never carry bits and are left out of the basis."""

PRIOR_SYMBOLS = 64.0
"""How many symbols' worth the parametric tables count against the measured ones."""


@dataclass(frozen=True)
class Grouping:
    """What is transformed together: `heads` "one" or "all" of `layers` layers, with a basis or without."""

    heads: Literal["one", "all"]
    layers: int
    basis: bool

    @classmethod
    def parse(cls, name: str, layers: int) -> Grouping:
        """The grouping of a name: x0, head, layer, group:N or all. Raises ConfigError."""
        simple = {"x0": cls("one", 1, False), "head": cls("one", 1, True), "layer": cls("all", 1, True)}
        if name in simple:
            return simple[name]
        if name == "all":
            return cls("all", layers, True)
        prefix, _, count = name.partition(":")
        if prefix == "group" and count.isdecimal() and 1 <= int(count) <= layers:
            return cls("all", int(count), True)
        raise ConfigError(f"profile {name!r} is unknown; use x0, head, layer, group:N (N of 1..{layers}) or all")


class Moments:
    """Sums and sums of products of the channels of every block, added up in float64."""

    def __init__(self, spec: KVSpec, grouping: Grouping) -> None:
        self.spec = spec
        self.grouping = grouping
        self.dims = [dim for dim in (spec.key_dim, spec.value_dim) if dim]
        self.tokens = 0
        self.sums: list[Float64] = []
        self.products: list[Float64] = []
        for dim in self.dims:
            blocks, channels = self._shape(dim)
            self.sums.append(np.zeros((spec.layers, spec.kv_heads, dim)))
            self.products.append(np.zeros((blocks, channels, channels)))

    def add(self, parts: list[Float32]) -> None:
        """Count one sequence: K and V, each (layers, heads, tokens, dim)."""
        self.tokens += parts[0].shape[2]
        for sums, products, x in zip(self.sums, self.products, parts, strict=True):
            sums += x.sum(axis=2, dtype=np.float64)
            for total, matrix in zip(products, self.blocks(x), strict=True):
                total += matrix.T @ matrix

    def blocks(self, x: Float32) -> list[Float32]:
        """A (tokens, channels) matrix a block; layers that the last block lacks are zeros."""
        layers, heads, tokens, dim = x.shape
        if self.grouping.heads == "one":
            return list(x.reshape(layers * heads, tokens, dim))
        missing = -layers % self.grouping.layers
        if missing:
            x = np.concatenate([x, np.zeros((missing, heads, tokens, dim), dtype=x.dtype)])
        split = x.reshape(-1, self.grouping.layers * heads, tokens, dim).transpose(0, 2, 1, 3)
        return list(split.reshape(len(split), tokens, -1))

    def _shape(self, dim: int) -> tuple[int, int]:
        if self.grouping.heads == "one":
            return self.spec.layers * self.spec.kv_heads, dim
        return -(-self.spec.layers // self.grouping.layers), self.grouping.layers * self.spec.kv_heads * dim


@dataclass
class FittedPart:
    """Transform of K or V: arrays of the profile, and the matrices from centred channels to components."""

    arrays: dict[str, npt.NDArray[Any]]
    mean: Float32
    analysis: Float32  # (blocks, channels, components)


@dataclass
class Fitted:
    """Transforms of a model."""

    moments: Moments
    parts: list[FittedPart]


def fit_transforms(moments: Moments, weights: list[Float64] | None = None) -> Fitted:
    """Means, roots of the error weights, and bases.

    Args:
        moments: of K and V. weights: for K and for V, (layers, heads, dim, dim) positive semi-definite: what a unit
        of squared error costs in
            every direction; None counts all errors alike. Scales of layers are made equal.
    """
    parts = []
    for index, (name, dim) in enumerate(zip(PARTS, moments.dims, strict=False)):
        own = None if weights is None else weights[index]
        parts.append(_fit_part(moments, index, name, dim, own))
    return Fitted(moments, parts)


def _fit_part(moments: Moments, index: int, name: str, dim: int, weights: Float64 | None) -> FittedPart:
    spec, grouping = moments.spec, moments.grouping
    tokens = max(1, moments.tokens)
    mean = moments.sums[index] / tokens
    centres = np.stack(moments.blocks(mean[:, :, None, :].astype(np.float64)))[:, 0]
    covariance = moments.products[index] / tokens - centres[:, :, None] * centres[:, None, :]
    heads = _head_covariances(covariance, spec, dim)
    metric = np.broadcast_to(np.eye(dim), heads.shape) if weights is None else _ridged(weights)
    power = np.einsum("lhij,lhji->l", metric, heads) / (spec.kv_heads * dim)
    metric = metric / np.maximum(power, np.finfo(np.float32).tiny)[:, None, None, None]
    if not grouping.basis:
        gain = np.sqrt(np.einsum("lhii->lhi", metric))
        arrays = {
            f"ladder.root.{name}": gain.astype(np.float32),
            f"ladder.inverse.{name}": (1 / gain).astype(np.float32),
        }
        analysis = np.stack([np.diag(own) for own in gain.reshape(-1, dim)])
    else:
        root, inverse = _roots(metric)
        whole = _block_diagonal(root, covariance.shape)
        basis = _basis(whole @ covariance @ whole)
        arrays = {
            f"ladder.root.{name}": root.astype(np.float32),
            f"ladder.inverse.{name}": inverse.astype(np.float32),
            f"ladder.basis.{name}": basis,
        }
        analysis = whole @ basis.astype(np.float64)
    arrays[f"ladder.mean.{name}"] = mean.astype(np.float32)
    return FittedPart(arrays, mean.astype(np.float32), analysis.astype(np.float32))


def _head_covariances(covariance: Float64, spec: KVSpec, dim: int) -> Float64:
    """The diagonal blocks of every head, (layers, heads, dim, dim)."""
    count = covariance.shape[1] // dim
    split = covariance.reshape(len(covariance), count, dim, count, dim)
    diagonal: Float64 = split.transpose(0, 1, 3, 2, 4)[:, np.arange(count), np.arange(count)]
    return diagonal.reshape(-1, spec.kv_heads, dim, dim)[: spec.layers]


def _ridged(weights: Float64) -> Float64:
    """Weights with RIDGE of their trace spread over all directions."""
    dim = weights.shape[-1]
    trace = np.maximum(np.einsum("lhii->lh", weights) / dim, np.finfo(np.float32).tiny)[:, :, None, None]
    ridged: Float64 = (1 - RIDGE) * weights + RIDGE * trace * np.eye(dim)
    return ridged


def _roots(metric: Float64) -> tuple[Float64, Float64]:
    """Symmetric square roots of positive definite matrices, and their inverses."""
    values, vectors = np.linalg.eigh(metric)
    values = np.sqrt(np.maximum(values, np.finfo(np.float32).tiny))[..., None, :]
    turned = vectors.swapaxes(-1, -2)
    return (vectors * values) @ turned, (vectors / values) @ turned


def _block_diagonal(root: Float64, shape: tuple[int, ...]) -> Float64:
    """(blocks, channels, channels) with the heads' matrices on the diagonal, zeros for layers that are missing."""
    dim = root.shape[-1]
    flat = root.reshape(-1, dim, dim)
    out = np.zeros(shape)
    count = shape[1] // dim
    for row, matrix in enumerate(flat):
        at = row % count * dim
        out[row // count, at : at + dim, at : at + dim] = matrix
    return out


def _basis(covariance: Float64) -> npt.NDArray[np.float16]:
    """Eigenvectors in descending order of variance, as many as carry bits in some block."""
    values, vectors = np.linalg.eigh(covariance)
    keep = max(1, int((np.sqrt(np.maximum(values, 0)) >= DEVIATION_MIN).sum(axis=1).max()))
    return np.ascontiguousarray(vectors[:, :, ::-1][:, :, :keep]).astype(np.float16)


class TableCounter:
    """Counts symbols of sequences that the transforms were not fitted to; `measure` them all first, then `add` them."""

    def __init__(self, fitted: Fitted, shift: int = 0) -> None:
        self._fitted = fitted
        self._shift = shift
        self._energy = [np.zeros(part.analysis.shape[::2]) for part in fitted.parts]
        self._tokens = 0
        self._counts = np.zeros((TABLES, SYMBOLS_MAX))
        self._excess = np.zeros((2, CENTROIDS))
        uniform = np.full((TABLES, SYMBOLS_MAX), SLOTS // SYMBOLS_MAX, dtype=np.uint16)
        self._bank = Bank(TableSet(uniform), parametric().centroids)
        self._codes: list[npt.NDArray[np.uint8]] | None = None

    def measure(self, parts: list[Float32]) -> None:
        """Add one sequence to the components' deviations."""
        self._tokens += parts[0].shape[2]
        for energy, components in zip(self._energy, self._components(parts), strict=True):
            for row, own in zip(energy, components, strict=True):
                row += np.einsum("tc,tc->c", own, own, dtype=np.float64)

    def add(self, parts: list[Float32]) -> None:
        """Count one sequence's symbols."""
        step = np.float32(3 ** (LEVELS - 1) / BASE_STEP)
        for codes, components in zip(self.codes, self._components(parts), strict=True):
            for own_codes, own in zip(codes, components, strict=True):
                order = np.argsort(CODES - own_codes, kind="stable")
                classes = class_of(own_codes[order], self._shift)
                scaled = own[:, order] * step
                ladder = ladder_values(np.rint(scaled).clip(-VALUE_MAX, VALUE_MAX).astype(np.int16))
                seen = None
                for level in range(LEVELS):
                    plan = level_plan(classes, level, len(own))
                    coded = code_level(plan, ladder[level], seen, self._bank)
                    seen = coded.seen
                    at = coded.ids.astype(np.int64) * SYMBOLS_MAX + coded.symbols
                    self._counts += np.bincount(at, minlength=TABLES * SYMBOLS_MAX).reshape(TABLES, SYMBOLS_MAX)
                    self._count_excess(ladder[level][:, : plan.coded], scaled, classes, level)

    @property
    def codes(self) -> list[npt.NDArray[np.uint8]]:
        """Stored classes of every block's components, from the deviations measured so far."""
        if self._codes is None:
            self._codes = []
            for part, energy in zip(self._fitted.parts, self._energy, strict=True):
                codes = code_of(np.sqrt(energy / max(1, self._tokens)) / BASE_STEP)
                if any("basis" in name for name in part.arrays):
                    codes = np.minimum.accumulate(codes, axis=1)
                self._codes.append(codes)
        return self._codes

    def finish(self) -> tuple[dict[str, Any], dict[str, npt.NDArray[Any]]]:
        """The attributes and arrays of the ladder's share of a profile."""
        prior = parametric()
        weights = self._counts + PRIOR_SYMBOLS * prior.tables.frequencies / SLOTS
        rare = RARE * weights.sum(axis=1, keepdims=True)
        digits = weights[FIRST_ROWS:, :DIGIT_SYMBOLS]
        np.maximum(digits, rare[FIRST_ROWS:], out=digits)  # nothing stands in for a digit that has no frequency
        weights[weights < rare] = 0
        excess, count = self._excess
        centroids = (excess + PRIOR_SYMBOLS * prior.centroids) / (count + PRIOR_SYMBOLS)
        arrays: dict[str, npt.NDArray[Any]] = {
            "ladder.frequencies": quantise(weights),
            "ladder.centroids": np.clip(centroids, -0.5, 0.5).astype(np.float32),
        }
        for name, part, codes in zip(PARTS, self._fitted.parts, self.codes, strict=False):
            arrays |= part.arrays
            arrays[f"ladder.codes.{name}"] = codes
        moments = self._fitted.moments
        attributes = {
            "format": 1,
            "spec": msgspec.to_builtins(moments.spec),
            "heads": moments.grouping.heads,
            "layers": moments.grouping.layers,
            "shift": self._shift,
        }
        return {"ladder": attributes}, arrays

    def _components(self, parts: list[Float32]) -> list[list[Float32]]:
        """Components of every block of K and of V, in average standard deviations."""
        return [
            [
                matrix @ analysis
                for matrix, analysis in zip(
                    self._fitted.moments.blocks(x - own.mean[:, :, None]), own.analysis, strict=True
                )
            ]
            for x, own in zip(parts, self._fitted.parts, strict=True)
        ]

    def _count_excess(
        self, values: npt.NDArray[np.int16], scaled: Float32, classes: npt.NDArray[np.int64], level: int
    ) -> None:
        """How far numbers lie below the values that stand for them, in steps of the level."""
        exact = np.abs(scaled[:, : values.shape[1]]) / np.float32(3 ** (LEVELS - 1 - level))
        coded = values != 0
        excess = np.where(coded, np.abs(values) - exact, 0).sum(axis=0)
        present = classes[: values.shape[1]] + PITCH * level
        np.add.at(self._excess[0], present, excess)
        np.add.at(self._excess[1], present, coded.sum(axis=0))
