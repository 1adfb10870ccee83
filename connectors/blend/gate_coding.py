"""KV of documents as it comes back from a lossy codec, and how far it is from what went in."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from kvstore.chunk import decode_chunk, encode_chunk, encoded_bytes_max
from kvstore.codec import Codec
from kvstore.connectors.blend.sources import KV
from kvstore.connectors.torch_kv import TORCH_DTYPE, TorchKV
from kvstore.container import FLAG_CONTENT_KEY, ChunkMeta
from kvstore.errors import CodecError
from kvstore.gate_limits import number
from kvstore.keys import KeyScheme
from kvstore.spec import KVSpec


class CodedKV:
    """Puts documents through a codec, and keeps count of the squared error that it leaves in every layer.

    Args:
        codec: a lossy one.
        spec: geometry of the model.
        fingerprint: of the model.
        level: the highest level that is decoded; None for all.

    Raises:
        CodecError: the codec cannot serve the model, or has no such level.
    """

    def __init__(self, codec: Codec, spec: KVSpec, fingerprint: bytes, level: int | None) -> None:
        highest = max(plan.level for plan in codec.plan(spec, 1))
        if level is not None and not 0 <= level <= highest:
            raise CodecError(f"codec {codec.id!r} has levels 0..{highest}, asked for {level}")
        self.codec = codec
        self.level = highest if level is None else level
        self._spec = spec
        self._keys = KeyScheme(fingerprint)
        self._squares = torch.zeros(spec.layers, 2, dtype=torch.float64)
        self._elements = torch.zeros(spec.layers, 2, dtype=torch.float64)

    def through(self, layers: Sequence[KV], ids: Sequence[int], position: int) -> list[KV]:
        """K and V of every layer, each (heads, tokens, dim), encoded and decoded; `position` is the first token's."""
        memory = TorchKV(self._spec, [(keys[None], values[None]) for keys, values in layers])
        tokens = layers[0][0].shape[1]
        meta = ChunkMeta(
            fingerprint=self._keys.fingerprint,
            key=self._keys.content(ids),
            spec=self._spec,
            tokens=tokens,
            first_position=position,
            flags=FLAG_CONTENT_KEY,
        )
        buffer = memoryview(bytearray(encoded_bytes_max(self.codec, self._spec, tokens)))
        nbytes = encode_chunk(self.codec, meta, memory.readable(0, tokens), buffer)
        arrays = self._spec.arrays(np.empty(self._spec.chunk_bytes(tokens), np.uint8), tokens)
        decode_chunk(buffer[:nbytes], arrays, lambda *_: self.codec, level_max=self.level)
        dtype, device = TORCH_DTYPE[self._spec.dtype], layers[0][0].device
        out = [
            (torch.from_numpy(keys).view(dtype).to(device), torch.from_numpy(values).view(dtype).to(device))
            for keys, values in arrays
        ]
        for layer, (old, new) in enumerate(zip(layers, out, strict=True)):
            for part in range(2):
                self._squares[layer, part] += float((old[part].float() - new[part].float()).square().sum())
                self._elements[layer, part] += old[part].numel()
        return out

    def noise(self) -> tuple[tuple[float, float], ...]:
        """Mean squared error of an element of K and of V so far, for each layer."""
        means = (self._squares / self._elements.clamp(min=1)).tolist()
        return tuple((number(keys), number(values)) for keys, values in means)
