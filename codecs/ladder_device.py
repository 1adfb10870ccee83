"""Decodes ladder segments straight into an engine's tensors on a GPU: the bytes cross the bus compressed.

The host takes segments apart, checks their hashes and counts; the device does the rest. Integers are decoded by the
kernels of `ladder_triton`, all layer groups of a chunk at once, for a tile is one warp's work; what follows are whole
arrays in torch, each operation rounded as in `ladder_reference`. So without a basis the elements are those of the host,
bit for bit; with one they are those of torch's fp32 matrix product (and of less where `allow_tf32` has been set).

Needs torch and triton. Where Triton interprets, "the device" may be the CPU; that is how it is tested without a GPU.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch

from kvstore.codec import LayerSegments
from kvstore.codecs import ladder_triton
from kvstore.codecs.ladder_bank import Bank
from kvstore.codecs.ladder_classes import ALPHABETS, PITCH
from kvstore.codecs.ladder_group import OpenedGroup
from kvstore.codecs.ladder_level import LevelPlan
from kvstore.codecs.ladder_profile import PartProfile
from kvstore.codecs.ladder_segment import Numbers, OpenedLevel, lanes_of, open_level
from kvstore.codecs.ladder_transform import Transform
from kvstore.errors import CodecError, ContainerError
from kvstore.outcome import Reason
from kvstore.spec import KVArrays, KVSpec

if TYPE_CHECKING:
    from kvstore.codecs.ladder import LadderCodec

Tensors = Sequence[tuple[torch.Tensor, torch.Tensor]]
"""K and V of every layer, (heads, tokens, dim) in the spec's dtype, any strides."""

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_BITS = {2: (np.int16, torch.int16), 4: (np.int32, torch.int32)}


def decode(
    codec: LadderCodec,
    groups: Sequence[LayerSegments],
    tensors: Tensors,
    spec: KVSpec,
    *,
    first_position: int | None = None,
) -> None:
    """Fill some layer groups of `tensors` from their segments; returns once it is known that all were good.

    Raises:
        ContainerError: a segment is damaged or missing, or the profile is of another model; the groups' tensors are
            then unspecified.
        CodecError: the chunk cannot be moved to `first_position`, or torch has no such elements.
    """
    if spec.dtype not in DTYPES:
        raise CodecError(f"{spec.dtype} is decoded on the host; a device decodes to {', '.join(DTYPES)}")
    tokens = tensors[0][0].shape[1]
    coded: list[tuple[tuple[int, int], OpenedGroup]] = []
    for segments in groups:
        opened = codec.open(segments, spec, tokens, first_position)
        if opened is None:
            _through_host(codec, segments, tensors, spec, first_position)
        else:
            coded.append((segments[0][0].layers, opened))
    if not coded:
        return
    values = _Values([group for _, group in coded], codec.bank, tensors[0][0].device)
    for at, (layers, group) in enumerate(coded):
        _write(group, values.parts(at), tensors[slice(*layers)], codec.bank, spec)


class _Values:
    """The integers of all blocks of some groups, on a device, at the highest level of each group."""

    def __init__(self, groups: Sequence[OpenedGroup], bank: Bank, device: torch.device) -> None:
        self._groups = groups
        self._device = device
        self._tokens = groups[0].blocks.tokens
        self._widths = [np.array([len(own) for own in group.blocks.classes], dtype=np.int64) for group in groups]
        counts = [int(widths.sum()) for widths in self._widths]
        self._columns = np.cumsum([0, *counts])  # before each group
        classes = np.concatenate([own.astype(np.int8) for group in groups for own in group.blocks.classes])
        self._classes = torch.from_numpy(classes).to(device)
        self._values = torch.zeros(len(classes) * self._tokens, dtype=torch.int16, device=device)
        self._tables = _KEPT.get(bank, "tables", device, lambda: bank.tables.decode.view(np.int32).copy())
        verdicts = [own for level in range(max(len(g.levels) for g in groups)) for own in self._decode(level)]
        if not torch.cat(verdicts).all():
            raise ContainerError(Reason.MALFORMED, "a tile of a ladder segment does not decode")

    def parts(self, group: int) -> list[torch.Tensor]:
        """(blocks, tokens, components) of each part of a group."""
        out, at = [], int(self._columns[group]) * self._tokens
        for transform in self._groups[group].transforms:
            shape = len(transform.classes), self._tokens, len(transform.classes[0]) if transform.classes else 0
            size = int(np.prod(shape))
            out.append(self._values[at : at + size].view(shape))
            at += size
        return out

    def _decode(self, level: int) -> list[torch.Tensor]:
        """Bring all groups that have it to a level; answers which tiles were whole."""
        having = [index for index, group in enumerate(self._groups) if level < len(group.levels)]
        opened = [open_level(self._groups[i].blocks, level, Numbers(self._groups[i].levels[level])) for i in having]
        rows = [_rows(own) for own in opened]
        word_start = packed_start = 0
        for index, own, table in zip(having, opened, rows, strict=True):
            starts = np.cumsum(self._widths[index]) - self._widths[index] + self._columns[index]
            packed = np.array([len(part) for part in own.packed], dtype=np.int64)
            table[:, 0] += word_start
            table[:, 2] = np.cumsum(packed) - packed + packed_start
            table[:, 3], table[:, 4], table[:, 5] = starts * self._tokens, starts, self._widths[index]
            word_start += len(own.stream) // 2
            packed_start += int(packed.sum())
        blocks = self._to_device(np.concatenate(rows).astype(np.int32))
        if level:
            digits = [part for own in opened for part in own.packed]
            widest = max(int(self._widths[index].max(initial=0)) for index in having)
            packed_bytes = self._to_device(np.concatenate([np.zeros(0, np.uint8), *digits]))
            ladder_triton.raise_values(self._values, blocks, packed_bytes, self._tokens, widest)
        verdicts = self._decode_tiles(level, opened, blocks)
        for index, own in zip(having, opened, strict=True):
            self._patch(index, own)
        return verdicts

    def _decode_tiles(self, level: int, opened: Sequence[OpenedLevel], blocks: torch.Tensor) -> list[torch.Tensor]:
        """The tiles of a level, those with as many lanes together."""
        words = self._to_device(np.concatenate([own.stream for own in opened]).view(np.int16))
        lanes = [lanes_of(sum(plan.symbols for plan in own.plans), len(own.plans)) for own in opened]
        of_block = np.repeat(lanes, [len(own.plans) for own in opened])
        common = words, self._classes, self._tables, self._tokens, PITCH * level
        return [
            ladder_triton.decode_level(
                self._values, blocks[self._to_device(np.flatnonzero(of_block == count))], *common, count
            )
            for count in sorted(set(lanes))
        ]

    def _patch(self, index: int, opened: OpenedLevel) -> None:
        patches = opened.patches
        if not len(patches.values):
            return
        widths = self._widths[index]
        starts = (np.cumsum(widths) - widths + self._columns[index]) * self._tokens
        places = starts[patches.blocks] + patches.tokens * widths[patches.blocks] + patches.components
        places, last = np.unique(places[::-1], return_index=True)
        self._values[self._to_device(places)] = self._to_device(patches.values[::-1][last])

    def _to_device(self, array: npt.NDArray[np.generic]) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device)


def _rows(opened: OpenedLevel) -> npt.NDArray[np.int64]:
    """What the kernels are told of a group's blocks, but for where things are. Raises ContainerError."""
    if (opened.lengths % 2 != 0).any():
        raise ContainerError(Reason.MALFORMED, "a tile of a ladder segment does not decode")
    out = np.zeros((len(opened.plans), ladder_triton.COLUMNS), dtype=np.int64)
    words = opened.lengths.astype(np.int64) // 2
    out[:, 0], out[:, 1] = np.cumsum(words) - words, words
    for row, plan in zip(out, opened.plans, strict=True):
        row[6:] = plan.packed, plan.refined, *_first_ends(plan)
    return out


def _first_ends(plan: LevelPlan) -> list[int]:
    """Where the first values of each alphabet end, the largest alphabet first."""
    ends, end = [], plan.refined
    for _, alphabet in reversed(ALPHABETS):
        end = next((run.stop for run in plan.runs if run.alphabet == alphabet), end)
        ends.append(end)
    return ends


def _write(group: OpenedGroup, values: Sequence[torch.Tensor], tensors: Tensors, bank: Bank, spec: KVSpec) -> None:
    """From integers to the elements of some layers."""
    level = len(group.levels) - 1
    for part, transform, rotation, own in zip(group.parts, group.transforms, group.rotations, values, strict=True):
        x = _channels(_dequantised(own, transform, level, bank), transform)
        x += _like(transform.means, x)[:, :, None, :]
        if rotation is not None:
            cosine, sine = _like(rotation.cosine, x), _like(rotation.sine, x)
            first, second = x[..., : rotation.half], x[..., rotation.half : 2 * rotation.half]
            turned = first * cosine - second * sine
            second.copy_(second * cosine + first * sine)
            first.copy_(turned)
        dtype = DTYPES[spec.dtype]
        if dtype != torch.float32:
            x.clamp_(-torch.finfo(dtype).max, torch.finfo(dtype).max)
        for layer, pair in zip(x, tensors, strict=True):
            pair[part].copy_(layer)
    for part, tokens, bits in group.exact:
        if not len(tokens):
            continue
        host, device = _BITS[spec.itemsize]
        at = torch.from_numpy(tokens).to(tensors[0][0].device)
        for pair, kept in zip(tensors, bits, strict=True):
            pair[part].view(device)[:, at] = torch.from_numpy(kept.view(host)).to(at.device)


def _dequantised(values: torch.Tensor, transform: Transform, level: int, bank: Bank) -> torch.Tensor:
    """Components (blocks, tokens, components) fp32."""
    scale = np.stack(transform.classes) + PITCH * level
    numbers = values.float()
    centroids = np.where(scale < 0, np.float32(0), bank.centroids[np.maximum(scale, 0)])
    numbers -= torch.sign(numbers) * _like(centroids, numbers)[:, None, :]
    numbers *= float(np.float32(1 / 3**level))
    numbers *= _like(transform.steps, numbers)[:, None, None]
    return numbers


def _channels(components: torch.Tensor, transform: Transform) -> torch.Tensor:
    """Channels less their means, (layers, heads, tokens, dim)."""
    layers, heads, dim = transform.means.shape
    blocks, tokens, width = components.shape
    placing = transform.placing
    if placing is not None:
        places = torch.from_numpy(placing.places.astype(np.int64)).to(components.device).view(blocks, 1, width)
        channels = torch.empty_like(components).scatter_(2, places.expand(components.shape), components)
        channels *= _like(placing.gains, channels).view(blocks, 1, width)
        return channels.view(layers, heads, tokens, dim)
    assert isinstance(transform, PartProfile)
    products = [own @ _synthesis(transform, at, own.device) for at, own in enumerate(components)]
    if not transform.whole:
        return torch.stack(products).view(layers, heads, tokens, dim)
    split = torch.stack(products).view(blocks, tokens, -1, heads, dim).permute(0, 2, 3, 1, 4)
    return split.reshape(-1, heads, tokens, dim)[:layers]


def _synthesis(transform: PartProfile, at: int, device: torch.device) -> torch.Tensor:
    owner, block = transform.matrix_of(at)
    return _KEPT.get(owner, str(block), device, lambda: owner.matrices(block)[1])


def _like(array: npt.NDArray[np.float32], tensor: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(np.array(array, dtype=np.float32)).to(tensor.device)  # a copy: torch refuses read-only ones


def _through_host(
    codec: LadderCodec, segments: LayerSegments, tensors: Tensors, spec: KVSpec, first_position: int | None
) -> None:
    """A group that is stored raw is decoded on the host and copied."""
    host, device = _BITS[spec.itemsize]
    start, stop = segments[0][0].layers
    arrays: KVArrays = [
        (np.empty(keys.shape, spec.bit_dtype), np.empty(values.shape, spec.bit_dtype)) for keys, values in tensors
    ]
    codec.decode(segments, arrays, spec, first_position=first_position)
    for pair, bits in zip(tensors[start:stop], arrays[start:stop], strict=True):
        for tensor, own in zip(pair, bits, strict=True):
            tensor.view(device).copy_(torch.from_numpy(own.view(host)))


class _Kept:
    """Constants on devices, each made once and kept as long as the object that it belongs to."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tensors: WeakKeyDictionary[object, dict[tuple[str, torch.device], torch.Tensor]] = WeakKeyDictionary()

    def get(
        self, owner: object, name: str, device: torch.device, make: Callable[[], npt.NDArray[np.generic]]
    ) -> torch.Tensor:
        with self._lock:
            own = self._tensors.setdefault(owner, {})
            if (name, device) not in own:
                own[name, device] = torch.from_numpy(make()).to(device)
            return own[name, device]


_KEPT = _Kept()
