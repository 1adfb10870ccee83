"""The ladder's share of a profile: means, gains or bases, classes and tables, calibrated for one model.

Attributes `ladder`: `format` (1), `spec` (the KVSpec), `layers` and `heads` (what a block is: heads "one" is one head
of one layer; "all" is all heads of `layers` consecutive layers), `shift` (by how many classes to move the base step
unless asked otherwise). Arrays, for each part p in k, v that the model has, with C = layers * heads * dim and R
components:

    ladder.mean.p         fp32 (layers, heads, dim)             of the channel, without rotary embedding
    ladder.root.p         fp32 (layers, heads, dim, dim) or (layers, heads, dim)   what weights errors, applied first
    ladder.inverse.p      likewise                              undoes the root
    ladder.basis.p        fp16 (blocks, C, R), or absent        orthonormal columns; absent: components are channels
    ladder.codes.p        u8 (blocks, R)                        stored classes; descending where there is a basis
    ladder.frequencies    u16 (TABLES, 256)
    ladder.centroids      fp32 (CENTROIDS,)

Components are  ((x - mean) root) basis / step, channels  mean + (components * step) (basis^T inverse). With a basis
both are one matrix product of fp32 numbers, whose sums may be taken in any order.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import cached_property
from typing import Literal

import msgspec
import numpy as np
import numpy.typing as npt

from kvstore.codecs.ladder_bank import CENTROIDS, Bank, can_code
from kvstore.codecs.ladder_classes import CODES, SHIFT_MAX, TABLES, class_of
from kvstore.codecs.ladder_transform import Placing
from kvstore.codecs.profile import Profile
from kvstore.codecs.r32 import TableSet
from kvstore.decoding import convert
from kvstore.errors import CodecError, ContainerError
from kvstore.outcome import Reason
from kvstore.spec import KVSpec

Float32 = npt.NDArray[np.float32]
PARTS = ("k", "v")


class Attributes(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`attributes["ladder"]` of a profile."""

    format: Literal[1]
    spec: KVSpec
    heads: Literal["one", "all"]
    layers: int = 1
    shift: int = 0


class LadderProfile:
    """A profile as the ladder uses it. Raises ContainerError if it is not one."""

    def __init__(self, profile: Profile) -> None:
        try:
            attributes = convert(profile.attributes.get("ladder"), Attributes)
        except (msgspec.MsgspecError, ValueError) as error:
            raise ContainerError(Reason.UNKNOWN_PROFILE, f"profile has no ladder: {error}") from error
        if not 1 <= attributes.layers <= attributes.spec.layers or abs(attributes.shift) > SHIFT_MAX:
            raise ContainerError(Reason.MALFORMED, "profile's ladder has an attribute out of range")
        if attributes.heads == "one" and attributes.layers != 1:
            raise ContainerError(Reason.MALFORMED, "a block of one head cannot span layers")
        self.spec = attributes.spec
        self.shift = attributes.shift
        self.layers = attributes.layers
        self.mixes_heads = attributes.heads == "all" and attributes.spec.kv_heads > 1
        frequencies = profile.array("ladder.frequencies", "uint16", TABLES, 256)
        centroids = profile.array("ladder.centroids", "float32", CENTROIDS)
        if not (np.isfinite(centroids).all() and (np.abs(centroids) <= 1).all()):
            raise ContainerError(Reason.MALFORMED, "profile's centroids are out of range")
        if not can_code(frequencies):
            raise ContainerError(Reason.MALFORMED, "profile's tables lack a symbol that every table needs")
        try:
            self.bank = Bank(TableSet(frequencies), np.asarray(centroids, dtype=np.float32))
        except CodecError as error:
            raise ContainerError(Reason.MALFORMED, f"profile's tables: {error}") from error
        dims = (self.spec.key_dim, self.spec.value_dim)
        self.parts = [
            PartTables(profile, name, self.spec, dim, attributes.heads == "all", attributes.layers)
            for name, dim in zip(PARTS, dims, strict=True)
            if dim
        ]


class PartTables:
    """A profile's tables for K or V."""

    def __init__(self, profile: Profile, name: str, spec: KVSpec, dim: int, whole: bool, layers: int) -> None:
        shape = (spec.layers, spec.kv_heads, dim)
        self.mean = profile.array(f"ladder.mean.{name}", "float32", *shape)
        self.block_layers = layers
        self.whole = whole
        blocks = -(-spec.layers // layers) if whole else spec.layers * spec.kv_heads
        channels = layers * spec.kv_heads * dim if whole else dim
        self.codes = profile.array(f"ladder.codes.{name}", "uint8", blocks, None)
        self.basis: npt.NDArray[np.float16] | None = None
        if f"ladder.basis.{name}" in profile.arrays:
            self.basis = profile.array(f"ladder.basis.{name}", "float16", blocks, channels, self.codes.shape[1])
            self.root = profile.array(f"ladder.root.{name}", "float32", *shape, dim)
            self.inverse = profile.array(f"ladder.inverse.{name}", "float32", *shape, dim)
            self.order = np.broadcast_to(np.arange(self.codes.shape[1]), self.codes.shape)
        else:
            self.root = profile.array(f"ladder.root.{name}", "float32", *shape)
            self.inverse = profile.array(f"ladder.inverse.{name}", "float32", *shape)
            self.order = np.argsort(CODES - self.codes, axis=1, kind="stable")
        falling = np.take_along_axis(self.codes, self.order, axis=1).astype(np.int16)
        if (self.codes >= CODES).any() or (np.diff(falling, axis=1) > 0).any() or (not whole and layers != 1):
            raise ContainerError(Reason.MALFORMED, f"profile's ladder.codes.{name} are out of range or order")
        if self.basis is None and (whole or self.codes.shape[1] != channels):
            raise ContainerError(Reason.MALFORMED, f"profile's ladder.codes.{name} need a basis")
        self._lock = threading.Lock()
        self._matrices: dict[int, tuple[Float32, Float32]] = {}

    @cached_property
    def sorted_codes(self) -> npt.NDArray[np.uint8]:
        """Stored classes of every block, descending."""
        return np.take_along_axis(self.codes, self.order, axis=1)

    def matrices(self, block: int) -> tuple[Float32, Float32]:
        """(channels to components, components to channels) of a block, fp32; kept once made."""
        with self._lock:
            if block not in self._matrices:
                self._matrices[block] = self._make(block)
            return self._matrices[block]

    def _make(self, block: int) -> tuple[Float32, Float32]:
        assert self.basis is not None
        basis = self.basis[block].astype(np.float32)
        heads, dim = self.mean.shape[1:]
        rows = self.block_layers * heads if self.whole else 1
        first = block * rows
        root = self.root.reshape(-1, dim, dim)[first : first + rows]
        inverse = self.inverse.reshape(-1, dim, dim)[first : first + rows]
        columns = basis.reshape(rows, dim, -1)[: len(root)]
        analysis = np.zeros_like(basis)
        synthesis = np.zeros((basis.shape[1], basis.shape[0]), dtype=np.float32)
        filled = len(root) * dim
        analysis[:filled] = np.matmul(root, columns).reshape(filled, -1)
        synthesis[:, :filled] = np.matmul(columns.transpose(0, 2, 1), inverse).transpose(1, 0, 2).reshape(-1, filled)
        return analysis, synthesis


class PartProfile:
    """The calibrated transform of K or V of some layers; a `ladder_transform.Transform`.

    Args:
        tables: of the part.
        layers: (start, stop), starting at a block's first layer.
        shift: by how many classes the base step is moved.
        step: the base step.
    """

    def __init__(self, tables: PartTables, layers: tuple[int, int], shift: int, step: np.float32) -> None:
        self._tables = tables
        self._layers = layers
        self._step = step
        heads = tables.mean.shape[1]
        if tables.whole:
            self._blocks = range(layers[0] // tables.block_layers, -(-layers[1] // tables.block_layers))
        else:
            self._blocks = range(layers[0] * heads, layers[1] * heads)
        self.means = np.ascontiguousarray(tables.mean[slice(*layers)])
        self.steps = np.full(len(self._blocks), step, dtype=np.float32)
        self.classes = [class_of(tables.sorted_codes[block], shift) for block in self._blocks]

    def analyse(self, x: Float32) -> list[Float32]:
        """Every block's components in base steps; in the order of channels where they are channels."""
        centred = x - self.means[:, :, None, :]
        inverse_step = np.float32(1) / self._step
        if self._tables.basis is None:
            centred *= self._tables.root[slice(*self._layers)][:, :, None, :] * inverse_step
            return list(centred.reshape(len(self._blocks), -1, x.shape[-1]))
        return [
            np.matmul(matrix, self._tables.matrices(block)[0] * inverse_step, dtype=np.float32)
            for block, matrix in zip(self._blocks, self._to_blocks(centred), strict=True)
        ]

    @property
    def placing(self) -> Placing | None:
        """Channels in the order of their classes, times the inverse of the root; None with a basis."""
        if self._tables.basis is not None:
            return None
        order = self._tables.order[self._blocks.start : self._blocks.stop]
        gains = self._tables.inverse[slice(*self._layers)]
        return Placing(order.reshape(-1).astype(np.uint32), np.asarray(gains, np.float32).reshape(-1))

    def products(self, blocks: Sequence[Float32]) -> list[Float32]:
        """Channels from the components: by the basis, or by place and gain."""
        layers, heads, dim = self.means.shape
        tokens = len(blocks[0])
        if self._tables.basis is None:
            placed = np.zeros((len(blocks), tokens, dim), dtype=np.float32)
            for target, index, block in zip(placed, self._blocks, blocks, strict=True):
                target[:, self._tables.order[index, : block.shape[1]]] = block
            return list(
                placed.reshape(layers, heads, tokens, dim) * self._tables.inverse[slice(*self._layers)][:, :, None]
            )
        width = self._tables.block_layers * heads * dim if self._tables.whole else dim
        out = np.empty((len(blocks), tokens, width), dtype=np.float32)
        for target, index, block in zip(out, self._blocks, blocks, strict=True):
            np.matmul(block, self._tables.matrices(index)[1][: block.shape[1]], out=target)
        if not self._tables.whole:
            return list(out.reshape(layers, heads, tokens, dim))
        split = out.reshape(len(blocks), tokens, -1, heads, dim).transpose(0, 2, 3, 1, 4)
        return [layer for block in split for layer in block][:layers]

    @property
    def whole(self) -> bool:
        """Whether a block is all heads of some layers, rather than one head."""
        return self._tables.whole

    def matrix_of(self, index: int) -> tuple[PartTables, int]:
        """(tables, number of the block in them) of a block; `tables.matrices(number)` are its matrices."""
        return self._tables, self._blocks[index]

    def _to_blocks(self, x: Float32) -> list[Float32]:
        """(layers, heads, tokens, dim) to a (tokens, channels) matrix a block."""
        layers, heads, tokens, dim = x.shape
        if not self._tables.whole:
            return list(x.reshape(layers * heads, tokens, dim))
        missing = len(self._blocks) * self._tables.block_layers - layers
        if missing:
            x = np.concatenate([x, np.zeros((missing, heads, tokens, dim), dtype=np.float32)])
        grouped = x.reshape(len(self._blocks), -1, heads, tokens, dim).transpose(0, 3, 1, 2, 4)
        return list(grouped.reshape(len(self._blocks), tokens, -1))
