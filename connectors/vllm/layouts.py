"""Where an attention backend of vLLM keeps K and V: views (blocks, heads, tokens, dim) of its block memory.

vLLM hands out one tensor a layer that is nominally (blocks, heads, tokens, K dim + V dim), in any memory order; the
orders, cross-layer ones included, are strides. What differs by more than strides is what a backend really writes there.
A backend whose bytes have not been verified is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from kvstore.errors import UnsupportedModelError

Views = tuple[torch.Tensor, torch.Tensor]
"""K and V of one layer, each (blocks, heads, tokens, dim), sharing the engine's memory."""


def side_by_side(cache: torch.Tensor, key_dim: int, value_dim: int) -> Views:
    """K and V of a token next to each other: FlashAttention, Triton and FlexAttention."""
    return cache[..., :key_dim], cache[..., key_dim:]


def transposed_keys(cache: torch.Tensor, key_dim: int, value_dim: int) -> Views:
    """All K of a block and head, transposed to (dim, tokens), then all V, (tokens, dim): vLLM's CPU kernels."""
    blocks, heads, tokens, width = cache.shape
    if cache.stride()[2:] != (width, 1):
        raise UnsupportedModelError(
            f"vLLM's CPU attention keeps blocks with strides {cache.stride()}; only head-major blocks are known"
        )
    block_stride, head_stride = cache.stride()[:2]
    first = cache.storage_offset()
    keys = cache.as_strided((blocks, heads, tokens, key_dim), (block_stride, head_stride, 1, tokens), first)
    values = cache.as_strided(
        (blocks, heads, tokens, value_dim), (block_stride, head_stride, value_dim, 1), first + tokens * key_dim
    )
    return keys, values


_LAYOUTS: dict[str, Callable[[torch.Tensor, int, int], Views]] = {
    "FLASH_ATTN": side_by_side,
    "TRITON_ATTN": side_by_side,
    "FLEX_ATTENTION": side_by_side,
    "CPU_ATTN/vec": transposed_keys,
    "CPU_ATTN/vec16": transposed_keys,
}

LAYOUTS = tuple(_LAYOUTS)
"""Backends whose layout is known, as `backend` or `backend/instruction set`."""


def kv_views(layout: str, cache: torch.Tensor, *, heads: int, key_dim: int, value_dim: int) -> Views:
    """K and V of one layer as views of a backend's block memory.

    Args:
        layout: one of LAYOUTS.
        cache: what vLLM registers, (blocks, heads, tokens, key_dim + value_dim).
        heads: KV heads of this worker.
        key_dim: width of a K head.
        value_dim: width of a V head.

    Raises:
        UnsupportedModelError: the layout is not known, or the tensor is not of it.
    """
    if layout not in _LAYOUTS:
        raise UnsupportedModelError(
            f"the attention backend {layout!r} keeps its KV in an unknown layout; known are {', '.join(LAYOUTS)}"
        )
    if cache.dim() != 4 or cache.shape[1] != heads or cache.shape[3] != key_dim + value_dim:
        raise UnsupportedModelError(
            f"the attention backend {layout!r} keeps its KV as {tuple(cache.shape)}; known is "
            f"(blocks, {heads} heads, tokens, {key_dim} + {value_dim})"
        )
    return _LAYOUTS[layout](cache, key_dim, value_dim)
