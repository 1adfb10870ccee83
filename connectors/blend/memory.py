"""The KV of a prompt while it is blended: reused layers moved to their places as they arrive, then computed rows."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from transformers.cache_utils import Cache, DynamicLayer

from kvstore.connectors.blend.moving import KeyMover
from kvstore.connectors.blend.prompt import Prompt
from kvstore.connectors.torch_kv import TorchKV
from kvstore.errors import SpecError


class Writer(Protocol):
    """Who computes rows of a prompt, told of every layer's."""

    rows: torch.Tensor
    """Places in the prompt of what is computed now, (n,)."""

    def computed(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """K and V of the rows are there, (1, heads, n, dim); what was reused is still in its place."""

    def placed(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """They have been placed: K and V of all tokens, (1, heads, T, dim)."""


class BlendMemory:
    """Room for the KV of one prompt, filled layer by layer.

    Args:
        prompt: what is known of the tokens.
        room: one row with room for them, from its first token on.
        mover: of the model's rope.
        positions: that every token is rotated to, (T,).
    """

    def __init__(self, prompt: Prompt, room: TorchKV, mover: KeyMover, positions: torch.Tensor) -> None:
        self._prompt = prompt
        self._room = room
        self._mover = mover
        self._positions = positions
        self._filled = 0

    def fill(self, layer: int) -> None:
        """Have every reused K and V of a layer at its place; waits for sources that have not got it yet.

        Raises:
            SpecError: a source answered tensors of another shape.
        """
        while self._filled <= layer:
            keys, values = self.layer(self._filled)
            fresh = self._prompt.fresh.to(keys.device)
            keys[:, :, fresh], values[:, :, fresh] = 0, 0  # masked, and yet to be computed: but finite
            for span in self._prompt.spans:
                new_keys, new_values = span.source.layer(self._filled)
                self._check(span.source.start, len(span.source.ids), new_keys, new_values)
                used = span.stop - span.start
                old = span.source.computed_at + torch.arange(used)
                moved = self._mover.move(
                    new_keys[:, :used].to(keys.device), old, self._positions[span.start : span.stop]
                )
                keys[0, :, span.start : span.stop] = moved
                values[0, :, span.start : span.stop] = new_values[:, :used]
            self._filled += 1

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of a layer, views (1, heads, T, dim)."""
        keys, values = self._room.layers[index]
        return keys[:, :, : self._prompt.tokens], values[:, :, : self._prompt.tokens]

    def cache(self, writer: Writer) -> Cache:
        """A transformers cache that places what is computed for `writer.rows` and shows attention every token."""
        return Cache(layers=[_RowsLayer(index, *self.layer(index), writer) for index in range(self._prompt.layers)])

    def _check(self, start: int, tokens: int, *found: torch.Tensor) -> None:
        spec = self._room.spec
        for name, tensor, dim in zip("KV", found, (spec.key_dim, spec.value_dim), strict=True):
            if tuple(tensor.shape) != (spec.kv_heads, tokens, dim):
                raise SpecError(
                    f"the source at token {start} answered {name} of shape {tuple(tensor.shape)} for layer "
                    f"{self._filled}; it must be {(spec.kv_heads, tokens, dim)}"
                )


class _RowsLayer(DynamicLayer):  # type: ignore[no-untyped-call]  # transformers' __init_subclass__
    """One layer: `update` places the rows of the running pass and answers all tokens."""

    is_sliding = False

    def __init__(self, index: int, keys: torch.Tensor, values: torch.Tensor, writer: Writer) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True
        self.keys, self.values = keys, values
        self._index, self._writer = index, writer

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Place K and V (1, heads, rows, dim); returns all tokens'."""
        assert self.keys is not None  # set for good in __init__
        assert self.values is not None
        self._writer.computed(self._index, key_states, value_states)
        self.keys.index_copy_(2, self._writer.rows, key_states)
        self.values.index_copy_(2, self._writer.rows, value_states)
        self._writer.placed(self._index, self.keys, self.values)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """0: the rows of a pass say themselves where they stand."""
        return 0
