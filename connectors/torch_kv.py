"""KV in torch tensors: a transformers cache with room for what is to come, and its bits as NumPy arrays.

transformers' own DynamicCache concatenates on every step, which copies the whole cache for each generated token and
once more for a loaded prefix. Here a layer has its room allocated at the start; a loaded chunk is decoded into its
place, new tokens are written behind it, and attention gets a view.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer

from kvstore.spec import Bits, KVArrays, KVSpec

TORCH_DTYPE: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
_BIT_DTYPE: dict[int, torch.dtype] = {2: torch.uint16, 4: torch.uint32}
_GROWTH = 1.5


class RoomyLayer(DynamicLayer):  # type: ignore[no-untyped-call]  # transformers' __init_subclass__
    """One layer's cache in preallocated room.

    `keys` and `values` are always views (rows, heads, length, dim) of the tokens present, whatever their layer type:
    windowed attention is left to the mask. When room runs out, or transformers has rearranged the cache (beams, crop),
    what is present is copied to new room.

    Args:
        keys: room for K, (rows, heads, capacity, dim); the first `length` tokens are present.
        values: room for V, likewise.
        length: tokens present.
    """

    is_sliding = False

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, length: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True
        self._use(keys, values, length)

    def _use(self, keys: torch.Tensor, values: torch.Tensor, length: int) -> None:
        self._room = keys, values
        self.keys, self.values = keys[..., :length, :], values[..., :length, :]
        self._shown = self.keys, self.values

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append K and V (rows, heads, tokens, dim); returns views of everything present."""
        rearranged = self.keys is not self._shown[0] or self.values is not self._shown[1]
        start = self.get_seq_length()
        stop = start + key_states.shape[-2]
        rows, _, capacity, _ = self._room[0].shape
        if rearranged or stop > capacity or key_states.shape[0] != rows:
            self._move(start, int(stop * _GROWTH), key_states, value_states)
        keys, values = self._room
        keys[..., start:stop, :] = key_states
        values[..., start:stop, :] = value_states
        self._use(keys, values, stop)
        return self._shown

    def reset(self) -> None:
        """Forget every token and keep the room."""
        self._use(*self._room, 0)

    def _move(self, length: int, capacity: int, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Copy what is present to new room shaped like the incoming states."""
        keys = key_states.new_empty((*key_states.shape[:-2], capacity, key_states.shape[-1]))
        values = value_states.new_empty((*value_states.shape[:-2], capacity, value_states.shape[-1]))
        if self.keys is not None and self.values is not None:
            keys[..., :length, :] = self.keys
            values[..., :length, :] = self.values
        self._use(keys, values, length)


class TorchKV:
    """The K and V of all layers as tensors (rows, heads, tokens, dim); a `KVMemory` when it has one row.

    Args:
        spec: geometry; the tensors fit it.
        layers: (K, V) of every layer, all with the same number of rows and tokens.
        staged: move bits through host memory; needed when the tensors are not in it.
    """

    def __init__(
        self, spec: KVSpec, layers: list[tuple[torch.Tensor, torch.Tensor]], *, staged: bool | None = None
    ) -> None:
        self.spec = spec
        self.layers = layers
        self.staged = layers[0][0].device.type != "cpu" if staged is None else staged
        self._staging: torch.Tensor | None = None

    @classmethod
    def allocate(cls, spec: KVSpec, rows: int, capacity: int, device: torch.device) -> TorchKV:
        """Uninitialised room for `capacity` tokens in each of `rows` rows."""
        dtype = TORCH_DTYPE[spec.dtype]

        def room(dim: int) -> torch.Tensor:
            return torch.empty((rows, spec.kv_heads, capacity, dim), dtype=dtype, device=device)

        return cls(spec, [(room(spec.key_dim), room(spec.value_dim)) for _ in range(spec.layers)])

    @classmethod
    def of(cls, spec: KVSpec, cache: Cache) -> TorchKV:
        """Views of what a cache holds now."""
        layers: list[Any] = cache.layers  # in general of several kinds, here RoomyLayer
        return cls(spec, [(layer.keys, layer.values) for layer in layers])

    def row(self, row: int, first: int = 0) -> TorchKV:
        """Views of one row from token `first` on."""
        cut = [(k[row : row + 1, :, first:], v[row : row + 1, :, first:]) for k, v in self.layers]
        return TorchKV(self.spec, cut, staged=self.staged)

    def clear(self, row: int, stop: int) -> None:
        """Zero the first `stop` tokens of a row: masked positions must still hold finite numbers."""
        for keys, values in self.layers:
            keys[row, :, :stop] = 0
            values[row, :, :stop] = 0

    def cache(self, length: int) -> Cache:
        """A transformers cache over this room in which `length` tokens are present."""
        return Cache(layers=[RoomyLayer(keys, values, length) for keys, values in self.layers])

    def writable(self, start: int, stop: int) -> KVArrays:
        """Arrays to fill with tokens start..stop of row 0, (heads, tokens, dim) bits; then call `commit`."""
        return self._staging_arrays(stop - start) if self.staged else self._views(start, stop)

    def commit(self, start: int, stop: int) -> None:
        """Move what `writable` answered to its place, if it is not there already."""
        if self.staged:
            for place, landed in self._places(start, stop):
                place.copy_(landed)

    def device_tensors(self, start: int, stop: int) -> list[tuple[torch.Tensor, torch.Tensor]] | None:
        """Tokens start..stop of row 0, (heads, tokens, dim), for codecs that decode on CUDA; None elsewhere."""
        if self.layers[0][0].device.type != "cuda":
            return None
        return [(keys[0, :, start:stop], values[0, :, start:stop]) for keys, values in self.layers]

    def readable(self, start: int, stop: int) -> KVArrays:
        """The bits of tokens start..stop of row 0, (heads, tokens, dim)."""
        if not self.staged:
            return self._views(start, stop)
        arrays = self._staging_arrays(stop - start)
        for place, landing in self._places(start, stop):
            landing.copy_(place)
        return arrays

    def _views(self, start: int, stop: int) -> KVArrays:
        return [(_bits(keys[0, :, start:stop]), _bits(values[0, :, start:stop])) for keys, values in self.layers]

    def _staging_arrays(self, tokens: int) -> KVArrays:
        return self.spec.arrays(self._host(tokens).numpy(), tokens)

    def _host(self, tokens: int) -> torch.Tensor:
        """Host memory for one chunk in canonical order, kept for the next one; pinned if the tensors are on CUDA."""
        nbytes = self.spec.chunk_bytes(tokens)
        if self._staging is None or self._staging.numel() != nbytes:
            pinned = self.layers[0][0].device.type == "cuda"
            self._staging = torch.empty(nbytes, dtype=torch.uint8, pin_memory=pinned)
        return self._staging

    def _places(self, start: int, stop: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(the engine's tensor, its part of the staging memory) for K and V of every layer, (heads, tokens, dim)."""
        flat = self._host(stop - start).view(TORCH_DTYPE[self.spec.dtype])
        places = []
        done = 0
        for layer in self.layers:
            for tensor in layer:
                place = tensor[0, :, start:stop]
                places.append((place, flat[done : done + place.numel()].view(place.shape)))
                done += place.numel()
        return places


def _bits(tensor: torch.Tensor) -> Bits:
    """A host tensor's elements as unsigned integers of the same size, sharing its memory and strides."""
    array: Bits = tensor.detach().view(_BIT_DTYPE[tensor.itemsize]).numpy()
    return array
