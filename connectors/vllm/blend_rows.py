"""One run of a loaded vLLM model over some rows of a prompt, over the KV of all of its tokens.

What `kvstore.connectors.blend.passes` does with transformers models. Positions of the rows in the prompt decide what
they attend to: every row sees the tokens at places up to its own. Rows are taken in slabs, so that a slab looks no
further than its last row does. Of the last layer nothing but K and V is wanted: what follows the prompt is computed by
vLLM itself, from its own blocks.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch.nn.functional import scaled_dot_product_attention

from kvstore.connectors.blend.masks import visible
from kvstore.connectors.blend.memory import BlendMemory
from kvstore.connectors.blend.policy import Attention
from kvstore.connectors.blend.queries import weights
from kvstore.connectors.vllm.blend_model import RowsModel

SLAB_ROWS = 256

Computed = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor | None]
"""(layer, rows, K, V) -> which rows go on, bool (n,), or None for all; K and V are (heads, n, dim)."""


class TooLateError(Exception):
    """A run was given up at its deadline."""


class RowsRun:
    """Runs a model over rows of a prompt.

    Args:
        model: loaded by vLLM.
        memory: the prompt's KV, read and written.
        ids: the prompt, (T,); every token is at the position of its place.
        deadline: time.monotonic() seconds; looked at before every layer.
        computed: called when K and V of a layer are computed, before they take the place of what was reused.
        attended: called with what the rows in `queries` attended to in every layer; None to save that work.
        queries: places in the prompt, bool (T,); all of them are rows.
    """

    def __init__(
        self,
        model: RowsModel,
        memory: BlendMemory,
        ids: torch.Tensor,
        deadline: float,
        *,
        computed: Computed | None = None,
        attended: Callable[[Attention], None] | None = None,
        queries: torch.Tensor | None = None,
    ) -> None:
        self._model = model
        self._memory = memory
        self._ids = ids
        self._deadline = deadline
        self._computed = computed
        self._attended = attended
        self._queries = queries
        self._going_on: torch.Tensor | None = None
        self._masks: list[torch.Tensor] = []
        self._rows = torch.empty(0, dtype=torch.long)
        self.rows_of_layers: list[torch.Tensor] = []

    def run(self, rows: torch.Tensor) -> None:
        """Compute K and V of these places in the prompt, increasing, (n,), in every layer that they go on to.

        Raises:
            TooLateError: the deadline has passed; the memory is then of no use.
        """
        self._rows, self.rows_of_layers, self._masks = rows, [], []
        hidden = self._model.embed(self._ids[rows]) if len(rows) else torch.empty(0)
        residual: torch.Tensor | None = None
        self._model.running = self
        try:
            for index, layer in enumerate(self._model.layers):
                if time.monotonic() > self._deadline:
                    raise TooLateError(f"at layer {index} of {len(self._model.layers)}")
                self._memory.fill(index)
                if residual is not None:
                    hidden, residual = self._drop(hidden, residual)
                self.rows_of_layers.append(self._rows)
                if len(self._rows):
                    hidden, residual = layer(self._rows, hidden, residual)
        finally:
            self._model.running = None

    def attend(
        self, layer: int, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        """Place the rows' K and V among those of the others, and attend to all; called by the running layer."""
        known_keys, known_values = self._memory.layer(layer)  # (1, heads, T, dim)
        own_keys, own_values = _by_head(keys, known_keys), _by_head(values, known_values)
        if self._computed is not None:
            self._going_on = self._computed(layer, self._rows, own_keys, own_values)
        known_keys.index_copy_(2, self._rows, own_keys[None])
        known_values.index_copy_(2, self._rows, own_values[None])
        split = _by_head(queries, known_keys)
        if self._attended is not None and self._queries is not None:
            asking = self._queries[self._rows]
            seen = visible(self._rows[asking], len(self._ids), None)
            found = weights(split[:, asking].float(), known_keys[0], seen, scaling)
            self._attended(Attention(layer, found, known_values[0]))
        if layer == len(self._model.layers) - 1:
            return torch.zeros_like(queries)
        return self._attention(split, known_keys, known_values, scaling)

    def _attention(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        """(n, heads * dim); queries are (heads, n, dim), K and V (1, kv heads, T, dim)."""
        heads, rows, dim = queries.shape
        out = queries.new_empty(rows, heads, values.shape[3])
        sharing = queries.view(keys.shape[1], -1, rows, dim)  # query heads that share a KV head are one after another
        places = out.view(rows, keys.shape[1], -1, values.shape[3])
        for slab, start in enumerate(range(0, rows, SLAB_ROWS)):
            stop = min(start + SLAB_ROWS, rows)
            limit = int(self._rows[stop - 1]) + 1
            mask = self._mask(slab, start, stop, limit, queries.dtype)
            for member in range(sharing.shape[1]):  # K and V are not copied for each
                found = scaled_dot_product_attention(
                    sharing[None, :, member, start:stop],
                    keys[:, :, :limit],
                    values[:, :, :limit],
                    attn_mask=mask,
                    scale=scaling,
                )
                places[start:stop, :, member] = found[0].transpose(0, 1)
        return out.view(rows, -1)

    def _mask(self, slab: int, start: int, stop: int, limit: int, dtype: torch.dtype) -> torch.Tensor:
        """What to add to the scores of a slab of the current rows, (1, 1, slab, limit)."""
        if slab == len(self._masks):
            seen = visible(self._rows[start:stop], limit, None)
            mask = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, float("-inf"))
            self._masks.append(mask[None, None])
        return self._masks[slab]

    def _drop(self, hidden: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The states of the rows that go on."""
        going_on, self._going_on = self._going_on, None
        if going_on is None or bool(going_on.all()):
            return hidden, residual
        self._rows, self._masks = self._rows[going_on], []
        return hidden[going_on], residual[going_on]


def _by_head(projected: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """(heads, n, dim) of what a projection answered, (n, heads * dim); the dim is that of `like`."""
    return projected.view(len(projected), -1, like.shape[3]).transpose(0, 1)
