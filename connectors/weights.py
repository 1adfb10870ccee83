"""Digests of a model's weights, so that a key names what the numbers were computed with and never a path or a name."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
import xxhash
from torch import nn

Signature = tuple[tuple[int, int], ...]


def weights_digest(module: nn.Module) -> bytes:
    """SHA-256 over (name, dtype, shape, XXH3-128 of the bytes) of every parameter and buffer, sorted by name.

    Buffers count because they change KV: casting a model after loading it also rounds its rotary frequencies.
    """
    digest = hashlib.sha256(b"kvstore-weights-1\0")
    for name, tensor in sorted(_tensors(module), key=lambda item: item[0]):
        line = f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode()
        digest.update(len(line).to_bytes(4, "little") + line)
        digest.update(xxhash.xxh3_128_digest(_bytes(tensor)))
    return digest.digest()


def weights_signature(module: nn.Module) -> Signature:
    """A cheap value that changes when a parameter or buffer is replaced or written in place.

    It reads torch's version counters, which do not see writes through `.data` or through another array that shares the
    memory, and which tensors made in inference mode do not have: after such a write, make a new connector.
    """
    return tuple((tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version) for _, tensor in _tensors(module))


def _tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _bytes(tensor: torch.Tensor) -> memoryview:
    flat: npt.NDArray[np.uint8] = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return flat.data
